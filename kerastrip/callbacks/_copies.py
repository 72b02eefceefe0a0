"""Copies of callbacks, as tuners make them."""

from __future__ import annotations

from typing import Any

import keras


def without_model(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """The state of a callback for a copy or a pickle.

    The attributes that Keras sets in a `fit` (the model, the parameters) are reset as in
    a new callback: a copy is for another `fit`, and not every model can be copied.
    """
    return {**vars(callback), **vars(keras.callbacks.Callback())}
