"""A progress bar for work on many samples or rows, where the work takes long."""

from __future__ import annotations

import time
from collections.abc import Callable

import keras

# Seconds after which a progress bar is worth its line.
_LONG = 2.0


def progress(total: int | None, unit: str, verbose: bool) -> Callable[[int], None]:
    """A function to call with the number done: it draws a bar if the work is long."""
    bar, begun = keras.utils.Progbar(total, unit_name=unit), time.monotonic()

    def show(done: int) -> None:
        if verbose and time.monotonic() - begun >= _LONG:
            bar.update(done)

    return show
