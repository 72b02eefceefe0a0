"""A loss that receives its labels as the integers the user gave."""

from __future__ import annotations

from typing import Any

import keras

from kerastrip._numerics import as_given, plain
from kerastrip.mining.replicas import gathered


class _Bound(keras.losses.Loss):
    """One call of a LabelLoss: reduction and masks are Keras', labels are ours."""

    def __init__(self, loss: LabelLoss, labels: Any) -> None:
        super().__init__(name=loss.name, reduction=loss.reduction, dtype=loss.dtype)
        self._loss = loss
        self._labels = labels

    def call(self, y_true: Any, y_pred: Any) -> Any:
        if not self._loss.gather:
            return self._loss.call(self._labels, y_pred)
        labels, y_pred, own_part = gathered(self._labels, y_pred)
        return own_part(self._loss.call(labels, y_pred))


class LabelLoss(keras.losses.Loss):
    """A `keras.losses.Loss` that hands labels to `call` as they were given.

    Keras casts `y_true` to the dtype of the loss before `call`: in float32 class
    ids above 2^24 collide. Here the labels go round that cast, in their own shape.

    With a true `gather`, `call` gets the batch of all replicas. Of the values that it
    returns, each replica keeps the values of its own rows.
    """

    gather = False

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        labels, y_pred = as_given("y_true", y_true), plain("y_pred", y_pred)
        return _Bound(self, labels)(y_pred, y_pred, sample_weight)

    def get_config(self) -> dict[str, Any]:
        """Name, reduction and dtype."""
        return {**super().get_config(), "dtype": self.dtype}
