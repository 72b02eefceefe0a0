"""The two splits of metric learning, as pure functions of labels and a seed.

`split_classes` holds out whole classes, `split_samples` holds out samples of every class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kerastrip import _checks, _labels
from kerastrip.sampling import permutation
from kerastrip.sampling.permutation import mix

__all__ = [
    "split_classes",
    "split_samples",
]

# The stream of keys for splits: `plan` takes the other streams of a seed.
_SPLIT = 3


def split_classes(
    labels: Any, *, test: float | int | Sequence[Any] = 0.2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Split samples so that no class is in both parts.

    This is the split that shows whether an embedding knows classes it has never
    seen.

    Args:
        labels: `(samples,)` labels or one-hot rows, as for `PKPlan`.
        test: the share of the classes (a float in (0, 1), rounded, at least one
            class in each part), their number (an integer), or their labels.
        seed: any integer; which classes are taken depends on it alone.

    Returns:
        `(train, test)` int64 positions into `labels`, ascending.

    Raises:
        TypeError: `test` is none of the three.
        ValueError: fewer than two classes, or `test` leaves one part empty.

    Example:

    >>> train, test = split_classes(["a", "a", "b", "c"], test=["b"])
    >>> train, test
    (array([0, 1, 3]), array([2]))
    """
    seed = _checks.integer("seed", seed)
    table = _labels.LabelTable(labels)
    # Columns of one-hot rows that never occur are no classes to hold out.
    present = np.unique(table.codes)
    if isinstance(test, (float, int, np.number)):
        count = _share("test", test, np.array([len(present)]), "classes")
        order = permutation.permute(
            np.arange(len(present)), len(present), mix(seed, _SPLIT)
        )
        held_out = present[order[: count[0]]]
    else:
        if np.ndim(test) != 1:
            raise _checks.type_error(
                "test", "a share, a number or a list of labels", test
            )
        held_out = np.unique(table.encode(test, "test"))
        if len(held_out) == len(present):
            raise _checks.value_error(
                "test", "some of the classes, not all of them", test
            )
    in_test = np.isin(table.codes, held_out)
    return np.flatnonzero(~in_test), np.flatnonzero(in_test)


def split_samples(
    labels: Any, *, test: float | int = 0.2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Split samples so that every class is in both parts.

    Args:
        labels: `(samples,)` labels or one-hot rows, as for `PKPlan`.
        test: the share of each class (a float in (0, 1), rounded, at least one
            sample in each part) or the number of samples of each class (an
            integer).
        seed: any integer; which samples are taken depends on it alone.

    Returns:
        `(train, test)` int64 positions into `labels`, ascending.

    Raises:
        TypeError: `test` is neither.
        ValueError: a class is too small to be in both parts; it is named.

    Example:

    >>> train, test = split_samples([5, 5, 5, 7, 7], test=1)
    >>> len(train), len(test)
    (3, 2)
    """
    seed = _checks.integer("seed", seed)
    table = _labels.LabelTable(labels)
    order, sizes = _labels.sorted_by(table.codes)
    stratum = np.repeat(np.arange(len(sizes)), sizes)
    code = table.codes[order]
    starts = np.cumsum(sizes) - sizes
    if (sizes < 2).any():
        too_small = table.classes[code[starts[sizes < 2]]]
        raise _checks.value_error(
            "labels",
            "at least 2 samples of every class, one for each part",
            _checks.Told(f"{len(too_small)} classes with one sample"),
            f"The first is {too_small.tolist()[0]!r}.",
        )
    count = _share("test", test, sizes, "samples of the smallest class")
    # `place` counts the samples of each class from 0. Each class is shuffled by a key of
    # its own, and the first `count` places of the shuffle go to the test part:
    #
    #     code         0 0 0 1 1 1 1 1
    #     place        0 1 2 0 1 2 3 4
    #     shuffled     1 2 0 3 0 4 1 2      with count = 1, 2 samples 2, 4 and 6 are in test
    place = np.arange(len(order)) - starts[stratum]
    shuffled = permutation.permute(place, sizes[stratum], mix(seed, _SPLIT, code))
    in_test = np.zeros(len(order), bool)
    in_test[order] = shuffled < count[stratum]
    return np.flatnonzero(~in_test), np.flatnonzero(in_test)


def _share(name: str, value: Any, sizes: np.ndarray, what: str) -> np.ndarray:
    """How many of each of `sizes` go to the test part.

    Args:
        name: the argument, for errors.
        value: a share in (0, 1) or a number.
        sizes: how many there are to share, for each class.
        what: what is counted, for errors.
    """
    least = int(sizes.min())
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        if not 0 < value < least:
            raise _checks.value_error(
                name, f"an integer in 1..{least - 1} (of {least} {what})", value
            )
        return np.full_like(sizes, value)
    fraction = _checks.number(name, value, above=0, below=1)
    if least < 2:
        raise _checks.value_error(
            name, f"at least 2 {what} to split", _checks.Told(least)
        )
    return np.clip(np.rint(fraction * sizes).astype(np.int64), 1, sizes - 1)
