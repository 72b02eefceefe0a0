"""Argument checks with one error voice.

Every message names the argument, what was expected, what was received and,
where there is something to say, what would work:

    Invalid value for `mining`: expected one of 'semi_hard', 'hard', 'all',
    received 'semihard'. Did you mean 'semi_hard'?
"""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import reprlib
import types
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

# Packages whose lines a warning does not show: they stand between it and the user.
_NOT_THE_USERS = {
    *("kerastrip", "keras", "tensorflow", "jax", "torch"),
    *("contextlib", "concurrent", "threading"),
}

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def describe(value: Any) -> str:
    """A short text for a received value: shape and dtype for arrays."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        if tuple(shape) == ():
            return f"{value!r}"
        kind = getattr(dtype, "name", dtype)  # a torch dtype has no name
        return f"an array of shape {tuple(shape)} and dtype {kind}"
    return _SHORT.repr(value)


def message(name: str, expected: str, received: Any, advice: str = "") -> str:
    """The text of an error about one argument.

    Args:
        name: the argument, as the user wrote it.
        expected: what would be accepted, a noun phrase.
        received: what came: a value, shown short, or a `str` subclass `Told`
            that is shown as it stands.
        advice: a sentence on what would work.
    """
    told = received if isinstance(received, Told) else describe(received)
    words = f"Invalid value for `{name}`: expected {expected}, received {told}."
    return f"{words} {advice}" if advice else words


class Told(str):
    """Words for `message(received=...)` that are shown without quotes."""

    __slots__ = ()


def value_error(
    name: str, expected: str, received: Any, advice: str = ""
) -> ValueError:
    """The error about a value that does not do; the arguments are those of `message`."""
    return ValueError(message(name, expected, received, advice))


def type_error(name: str, expected: str, received: Any, advice: str = "") -> TypeError:
    """The error about a value of another kind; the arguments are those of `message`."""
    return TypeError(message(name, expected, received, advice))


def one_of(name: str, value: Any, options: Sequence[str]) -> str:
    """`value` if it is one of `options`, else ValueError with the nearest word."""
    if isinstance(value, str) and value in options:
        return value
    near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.6)
    advice = f"Did you mean {near[0]!r}?" if near else ""
    words = ", ".join(repr(option) for option in options)
    raise ValueError(message(name, f"one of {words}", value, advice))


def boolean(name: str, value: Any) -> bool:
    """`value` if it is True or False; TypeError for anything else."""
    if not isinstance(value, bool):
        raise TypeError(message(name, "True or False", value))
    return value


def text(name: str, value: Any, advice: str = "") -> str:
    """`value` if it is a str; TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError(message(name, "a str", value, advice))
    return value


def integer(name: str, value: Any, minimum: int | None = None, advice: str = "") -> int:
    """`value` as int, at least `minimum`; TypeError for anything but an integer."""
    expected = "an integer" if minimum is None else f"an integer of at least {minimum}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise TypeError(message(name, expected, value, advice))
    if minimum is not None and value < minimum:
        raise ValueError(message(name, expected, value, advice))
    return int(value)


def integer64(name: str, value: Any, advice: str = "") -> int:
    """`value` as int, if 64 bits hold it with its sign."""
    number = integer(name, value, advice=advice)
    if not -(2**63) <= number < 2**63:
        expected = "an integer of 64 bits, from -2**63 to 2**63 - 1"
        advice = advice or f"{name} % 2**63 is such an integer."
        raise ValueError(message(name, expected, value, advice))
    return number


def number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    minimum: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
    advice: str = "",
) -> float:
    """`value` as a finite float within the given bounds.

    Args:
        name: the argument.
        value: what came.
        above: exclusive lower bound.
        minimum: inclusive lower bound.
        below: exclusive upper bound.
        maximum: inclusive upper bound.
        advice: a sentence on what would work.
    """
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in (
            (">", above),
            (">=", minimum),
            ("<", below),
            ("<=", maximum),
        )
        if bound is not None
    ]
    expected = " ".join(["a finite number", " and ".join(bounds)]).strip()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(message(name, expected, value, advice))
    x = float(value)
    if (
        not math.isfinite(x)
        or (above is not None and not x > above)
        or (minimum is not None and not x >= minimum)
        or (below is not None and not x < below)
        or (maximum is not None and not x <= maximum)
    ):
        raise ValueError(message(name, expected, value, advice))
    return x


def refuse_masked(name: str, value: Any) -> None:
    """ValueError where entries of a NumPy masked array are masked.

    `np.asarray` would drop the mask, and what lies under it would count.

    Args:
        name: the argument.
        value: what came: an array of any kind, or the constant `np.ma.masked`.
    """
    if not np.ma.isMaskedArray(value):
        return
    mask = np.ma.getmaskarray(value)
    if not mask.any():
        return
    place = np.unravel_index(int(np.argmax(mask)), mask.shape)
    at = ", ".join(str(int(axis)) for axis in place)
    told = f"{int(mask.sum())} masked, the first at position {at}" if at else "a mask"
    raise ValueError(
        message(
            name,
            "an array without masked entries",
            Told(told),
            "Leave such samples out, or put values there with `.filled(...)`.",
        )
    )


def native(array: np.ndarray) -> np.ndarray:
    """The array in the byte order of this machine, the only one that JAX and PyTorch know."""
    if array.dtype.isnative:
        return array
    return array.astype(array.dtype.newbyteorder("="))


def warn(words: str) -> None:
    """A `UserWarning` that shows the line of the user's program which led to it.

    In a thread of ours there is none: then no line is shown.
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None and _package(frame) in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(words, stacklevel=level)


def _package(frame: types.FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]
