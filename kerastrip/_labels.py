"""The label table: any labels in, class codes 0..C-1 out."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kerastrip import _checks

_CHUNK = 1 << 22


class LabelTable:
    """Distinct labels in sorted order, and the code of each sample.

    Args:
        labels: `(samples,)` integers (booleans count as 0 and 1), strings or bytes, or
            `(samples, classes)` one-hot rows (then the labels are the columns).
        classes: the label table, in any order; by default all labels that occur.
        name: what errors call the labels.

    Attributes:
        classes: `(C,)` distinct labels, sorted.
        codes: `(samples,)` int32, `classes[codes]` are the labels.

    Raises:
        TypeError: labels of a float or a mixed dtype.
        ValueError: no labels at all, a missing label (None, NaN, pandas' NA, masked), a
            wrong shape, a label that is not in `classes`.
    """

    def __init__(self, labels: Any, classes: Any = None, name: str = "labels") -> None:
        values, width = _label_values(labels, name)
        if classes is not None:
            given, rows = _label_values(classes, "classes")
            if rows is not None:
                raise _checks.value_error("classes", "a one-dimensional table", classes)
            self.classes = _distinct(given)
        elif width is not None:
            self.classes = np.arange(width)
        else:
            self.classes = _distinct(values)
        if len(self.classes) > np.iinfo(np.int32).max:
            raise _checks.value_error(
                name,
                "at most 2**31 - 1 distinct labels",
                _checks.Told(f"{len(self.classes)}"),
            )
        self.codes = self._codes(values, name)

    @property
    def kind(self) -> str:
        """What the labels are: "integers", "strings" or "bytes"."""
        return _family(self.classes)

    def encode(self, labels: Any, name: str = "labels") -> np.ndarray:
        """The int32 codes of `labels`; ValueError names an unknown label."""
        return self._codes(_label_values(labels, name)[0], name)

    def class_weight(self, weights: Mapping[Any, float]) -> dict[int, float]:
        """Weights by label as weights by code, for `fit(class_weight=)`.

        Keras reads the targets of a batch. These are codes: code 1 is the second label.

        Args:
            weights: label -> finite weight >= 0. Labels that are left out weigh 1.

        Raises:
            TypeError, ValueError: `weights` is no dict, a label is not in the table, or
                a weight is no finite number >= 0.
        """
        name = "class_weight"
        if not isinstance(weights, Mapping) or not weights:
            expected = "a dict of one weight for each label"
            raise _checks.type_error(name, expected, weights)
        codes = self.encode(list(weights), name).tolist()
        return {
            code: _checks.number(f"{name}[{label!r}]", weight, minimum=0)
            for code, (label, weight) in zip(codes, weights.items(), strict=True)
        }

    def decode(self, codes: Any) -> np.ndarray:
        """The labels of `codes`; ValueError for a code outside the table."""
        codes = np.asarray(codes)
        if codes.dtype.kind not in "iu":
            raise _checks.type_error("codes", "integers", codes)
        if codes.size and not 0 <= codes.min() <= codes.max() < len(self.classes):
            raise _checks.value_error(
                "codes",
                f"integers in 0..{len(self.classes) - 1}",
                _checks.Told(f"{codes.min()}..{codes.max()}"),
            )
        return self.classes[codes]

    def _codes(self, values: np.ndarray, name: str) -> np.ndarray:
        codes = np.empty(len(values), np.int32)
        lookup = self._lookup(values)
        # In chunks, so that the temporaries stay small beside the labels.
        for start in range(0, len(values), _CHUNK):
            chunk = values[start : start + _CHUNK]
            of_chunk, known = lookup(chunk)
            if not known.all():
                first = int(np.argmin(known))
                raise _checks.value_error(
                    name,
                    f"labels among the {len(self.classes)} known ones",
                    np.asarray(chunk[first]).item(),
                    f"It stands at position {start + first}.",
                )
            codes[start : start + len(chunk)] = of_chunk
        return codes

    def _lookup(self, values: np.ndarray) -> Callable[[np.ndarray], tuple]:
        """A function: chunk of labels -> (their codes, whether each label is known).

        It looks codes up in a table over the range of the labels, if that is small, and
        searches the sorted labels otherwise. For the classes 3, 5 and 6:

            label    3  4  5  6
            code     0 -1  1  2
        """
        classes = self.classes
        if _family(values) != _family(classes):
            return lambda chunk: (0, np.zeros(len(chunk), bool))
        if _is_dense(classes, len(values)):
            low, high = int(classes[0]), int(classes[-1])
            table = np.full(high - low + 1, -1, np.int32)
            table[_offsets(classes, low)] = np.arange(len(classes))

            def direct(chunk: np.ndarray) -> tuple:
                known = (chunk >= low) & (chunk <= high)
                if not known.all():
                    return 0, known
                # In the dtype of the table: NumPy would mix int64 and uint64 as floats.
                code = table[_offsets(chunk.astype(classes.dtype, copy=False), low)]
                return code, code >= 0

            return direct
        mixed = {values.dtype.kind, classes.dtype.kind} == {"i", "u"}
        if mixed and np.uint64 in (values.dtype, classes.dtype):
            # NumPy would compare int64 with uint64 as floats; Python integers are exact.
            classes = classes.astype(object)

        def search(chunk: np.ndarray) -> tuple:
            chunk = chunk.astype(object) if classes.dtype.kind == "O" else chunk
            code = np.searchsorted(classes, chunk)
            code = np.minimum(code, len(classes) - 1)
            return code, classes[code] == chunk

        return search


def label_array(labels: Any, name: str = "labels") -> np.ndarray:
    """Labels as the user gave them, checked: a fresh array.

    `np.array` alone would make a missing name a class "nan", and 1 beside "x" a class "1".

    Args:
        labels: as for `LabelTable`.
        name: what errors call the labels.

    Returns:
        `(samples,)` integers, strings or bytes, or `(samples, classes)` one-hot rows.

    Raises:
        TypeError, ValueError: as `LabelTable`.
    """
    values, width = _label_values(labels, name)
    return np.array(values if width is None else labels)


def _label_values(labels: Any, name: str) -> tuple[np.ndarray, int | None]:
    """1-D labels of one kind, and the number of columns if they were one-hot."""
    _checks.refuse_masked(name, labels)
    values = _checks.native(np.asarray(labels))
    if values.dtype.kind == "T":  # NumPy's StringDType
        values = values.astype(object)
    if values.ndim == 2:
        return _from_one_hot(values, name), values.shape[1]
    if values.ndim != 1:
        raise _checks.value_error(
            name,
            "shape (samples,) or (samples, classes)",
            values,
            f"Pass the `labels` of the {type(labels).__name__}."
            if hasattr(labels, "labels")
            else "",
        )
    if len(values) == 0:
        raise _checks.value_error(name, "at least one label", values)
    if not hasattr(labels, "dtype") and (
        values.dtype.kind in "fUS" or len({type(label) for label in labels}) > 1
    ):
        # NumPy would turn ["a", 1] into strings, [-1, 2**63] into floats and [True, 2]
        # into integers.
        values = np.array(list(labels), object)
    if values.dtype.kind == "O":
        values = _from_objects(values, name)
    if values.dtype.kind == "f":
        if (missing := np.isnan(values)).any():
            raise ValueError(_no_label(name, "NaN", int(np.argmax(missing))))
        raise _checks.type_error(
            name,
            "integers, strings, bytes or one-hot rows",
            values,
            "Whole numbers become labels with `.astype(int)`.",
        )
    if values.dtype.kind == "b":
        values = values.astype(np.int64)
    if values.dtype.kind not in "iuUSO":
        raise _checks.type_error(
            name, "integers, strings, bytes or one-hot rows", values
        )
    return values, None


def _from_one_hot(values: np.ndarray, name: str) -> np.ndarray:
    numeric = values.dtype.kind in "biuf"
    if (
        not numeric
        or not values.size
        or not ((values == 0) | (values == 1)).all()
        or not (values.sum(axis=1) == 1).all()
    ):
        raise _checks.value_error(
            name,
            "one label for each sample, or one-hot rows of 0 and a single 1",
            values,
            "A column of labels becomes a list of labels with `.ravel()`."
            if values.shape[1] == 1
            else "Choose the column of the classes that are to be told apart, such "
            "as `labels[:, 0]`. Labels that were mixed or smoothed are needed as "
            "they were before.",
        )
    return values.argmax(axis=1)


def _from_objects(values: np.ndarray, name: str) -> np.ndarray:
    """Strings, bytes or integers held as Python objects."""
    kinds = {type(value) for value in values}
    if kinds <= {str, np.str_}:
        return values.astype(np.str_)
    if kinds <= {bytes, np.bytes_}:
        # As objects: a fixed-width dtype would strip trailing zero bytes.
        return values
    if kinds <= {bool, np.bool_}:
        return values.astype(np.int64)
    if all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in kinds):
        try:
            return values.astype(np.int64)
        except OverflowError:
            return values
    if all(issubclass(kind, (float, np.floating)) for kind in kinds):
        return values.astype(np.float64)
    missing = next((i for i, value in enumerate(values) if _is_missing(value)), None)
    if missing is not None:
        raise ValueError(_no_label(name, values[missing], missing))
    first: dict[str, int] = {}
    for position, value in enumerate(values):
        first.setdefault(type(value).__name__, position)
    by_kind = [
        f"{kind} ({_checks.describe(values[first[kind]])} at position {first[kind]})"
        for kind in sorted(first)
    ]
    raise _checks.type_error(
        name,
        "labels of one kind: integers, strings or bytes",
        _checks.Told(", ".join(by_kind)),
    )


def _is_missing(value: Any) -> bool:
    """Whether an object stands for "no label"."""
    # The names are compared, because `NA == NA` of pandas is neither true nor false.
    if type(value).__name__ in ("NoneType", "NAType", "NaTType", "MaskedConstant"):
        return True
    return isinstance(value, numbers.Number) and bool(value != value)


def _no_label(name: str, value: Any, position: int) -> str:
    words = (
        "NaN"
        if isinstance(value, numbers.Number)
        else "masked"
        if value is np.ma.masked
        else value
    )
    return _checks.message(
        name,
        "a label for every sample",
        _checks.Told(f"{words} at position {position}"),
        "Leave the sample out, or give it a label of its own.",
    )


def _family(values: np.ndarray) -> str:
    """ "integers", "strings" or "bytes": labels of one family can be compared."""
    if values.dtype.kind != "O":
        return {"U": "strings", "S": "bytes"}.get(values.dtype.kind, "integers")
    return "bytes" if isinstance(values[0], bytes) else "integers"


def _is_dense(values: np.ndarray, samples: int) -> bool:
    """Whether a table over the range of `values` is small beside the samples."""
    if values.dtype.kind not in "iu":
        return False
    return int(values.max()) - int(values.min()) < max(samples, 1 << 16)


def _offsets(values: np.ndarray, low: int) -> np.ndarray:
    """`values - low` without overflow in a narrow dtype."""
    if values.dtype == np.uint64:
        return (values - np.uint64(low)).astype(np.int64)
    return values.astype(np.int64) - low


def _distinct(values: np.ndarray) -> np.ndarray:
    """The distinct values, sorted."""
    if not _is_dense(values, len(values)):
        ordered = np.sort(values)
        return ordered[np.concatenate(([True], ordered[1:] != ordered[:-1]))]
    low = int(values.min())
    present = np.zeros(int(values.max()) - low + 1, bool)
    for start in range(0, len(values), _CHUNK):
        present[_offsets(values[start : start + _CHUNK], low)] = True
    distinct = np.flatnonzero(present)  # as offsets from `low`
    if values.dtype == np.uint64:
        return distinct.astype(np.uint64) + np.uint64(low)
    return (distinct + low).astype(values.dtype)


def sorted_by(strata: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions sorted by stratum, then by position; the size of each stratum.

    The stratum and the position are packed into one integer and sorted in place:
    12 bytes a sample at the peak, where a stable argsort takes 20. For the strata 1 0 1:

        packed      1|0  0|1  1|2     stratum and position; the position has 2 bits here
        sorted      0|1  1|0  1|2
        order         1    0    2
    """
    sizes = np.bincount(strata)
    samples = len(strata)
    bits = samples.bit_length()
    packed = strata.astype(np.int64)
    packed <<= bits
    order = np.empty(samples, np.int32 if bits < 32 else np.int64)
    step = 1 << 22
    for start in range(0, samples, step):
        part = packed[start : start + step]
        part |= np.arange(start, start + len(part))
    packed.sort()
    for start in range(0, samples, step):
        part = packed[start : start + step]
        order[start : start + len(part)] = part & ((1 << bits) - 1)
    return order, sizes[sizes > 0]


def counted(counts: np.ndarray) -> np.ndarray:
    """0 ... count-1 for each count, one after the other: 2 0 3 gives 0 1 0 1 2."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
