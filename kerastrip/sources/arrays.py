"""Sources over what is already an array, or behaves like a list of samples.

A source is anything with `len(source)` and `source.take(indices)` that is neither
indexed nor iterated (arrays and data sets have a `take` too): `take` returns fresh arrays, the rows in the order asked for, in the
structure that the model gets (an array, a tuple or a dict of arrays). A source that
knows the labels of its samples has them as `labels`. What cannot be read is a
`BrokenSamples` error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kerastrip._checks import Told, message

_NO_NUMBERS = "OSUTMm"  # dtype kinds that no model takes as input


def as_source(x: Any, name: str = "x") -> Any:
    """The source that gives random access to `x`.

    | `x` | read by |
    |---|---|
    | array, `np.memmap`, tensor, data frame | one indexing call |
    | h5py or zarr array, or what else has `shape` and `dtype` | one call, in sorted order |
    | Hugging Face or PyTorch dataset, list of samples | one call if it has `__getitems__`, else sample by sample; sorted, each once |
    | dict or tuple of these | one source per part |
    | a source of `kerastrip.sources` | itself |

    Nothing is copied: a change made later to the array is seen by the source.

    Args:
        x: the samples, first axis first.
        name: what error messages call it.

    Returns:
        An object with `len()` and `take(indices)`.

    Raises:
        TypeError: if `x` gives no random access to samples made of numbers.
        ValueError: if it is empty, or the parts of a structure differ in length.

    Example:
        >>> import numpy as np
        >>> source = as_source({"image": np.zeros((5, 8, 8)), "age": [3, 1, 4, 1, 5]})
        >>> len(source), source.take([4, 0])["age"].tolist()
        (5, [5, 3])
    """
    if _has(x, "take", "__len__") and not (
        hasattr(x, "__getitem__") or hasattr(x, "__iter__")
    ):
        return x
    if isinstance(x, (Mapping, tuple)):
        return StructureSource(x, name)
    if isinstance(x, np.ndarray):
        return RowSource(x, name) if x.dtype == object else ArraySource(x, name)
    if hasattr(x, "__dlpack__") or hasattr(x, "numpy"):  # tensors
        return ArraySource(np.asarray(x), name)
    if hasattr(x, "to_numpy"):
        return as_source(x.to_numpy(), name)
    if _has(x, "shape", "dtype", "__getitem__"):
        return LazyArraySource(x, name)
    if _has(x, "__len__", "__getitem__") and not isinstance(x, (str, bytes)):
        return RowSource(x, name)
    raise TypeError(
        message(
            name,
            "samples with random access: an array, np.memmap, anything with `__len__` "
            "and `__getitem__`, a kerastrip source, or a dict or tuple of those",
            x,
        )
    )


class ArraySource:
    """Rows of a NumPy array or memory map, gathered by one indexing call.

    Args:
        array: (samples, ...) array of numbers.
        name: what error messages call it.

    Raises:
        TypeError: if the array holds no numbers.
        ValueError: if it has no rows.

    Attributes:
        array: the array itself. Augmentations read its rows where they are.
    """

    def __init__(self, array: np.ndarray, name: str = "x"):
        _check_array(array, name)
        self.array = np.asarray(array)

    def __len__(self) -> int:
        return len(self.array)

    def take(self, indices: Any) -> np.ndarray:
        """(len(indices), ...) fresh array of the rows, in the order asked for."""
        return self.array[np.asarray(indices)]


class LazyArraySource:
    """Rows of an array that lives elsewhere (h5py, zarr), read in sorted order.

    Such arrays read ranges from disk and want increasing indices, each once.

    Args:
        array: object with `shape`, `dtype` and indexing by a list of rows.
        name: what error messages call it.

    Raises:
        TypeError: if the array holds no numbers.
        ValueError: if it has no rows.
    """

    def __init__(self, array: Any, name: str = "x"):
        _check_array(array, name)
        self._array, self._name = array, name

    def __len__(self) -> int:
        return int(self._array.shape[0])

    def take(self, indices: Any) -> np.ndarray:
        """(len(indices), ...) fresh array of the rows, in the order asked for."""
        rows, inverse = np.unique(np.asarray(indices), return_inverse=True)
        # zarr keeps indexing by lists of rows under this name.
        got = np.asarray(getattr(self._array, "oindex", self._array)[rows])
        expected = (len(rows), *self._array.shape[1:])
        if got.shape != expected or got.dtype.kind in _NO_NUMBERS:
            raise TypeError(
                message(
                    self._name,
                    f"an array that returns shape {expected} for {len(rows)} rows",
                    got,
                    "Convert it to a NumPy array first.",
                )
            )
        return got[inverse]


class RowSource:
    """Samples of anything with `__len__` and `__getitem__`, stacked.

    A sample may be an array, a number, an image object, or a dict or tuple of
    those. Every sample must have the shapes of the first.

    Args:
        rows: the samples.
        name: what error messages call it.

    Raises:
        TypeError: if the first sample is not made of numbers.
        ValueError: if there are no samples.
    """

    def __init__(self, rows: Any, name: str = "x"):
        _check_length(len(rows), rows, name)
        self._rows, self._name = rows, name
        self._first = self._read([0])[0]
        _stack([self._first], [0], [0], self._first, name)

    def __len__(self) -> int:
        return len(self._rows)

    def _read(self, indices: list[int]) -> Sequence[Any]:
        if hasattr(self._rows, "__getitems__"):
            return self._rows.__getitems__(indices)
        return [self._rows[index] for index in indices]

    def take(self, indices: Any) -> Any:
        """Fresh arrays of the samples, in the order asked for."""
        unique, inverse = np.unique(np.asarray(indices), return_inverse=True)
        places = unique.tolist()
        return _stack(
            self._read(places), places, inverse.tolist(), self._first, self._name
        )


class StructureSource:
    """A dict or tuple of sources of one length: the inputs of a model.

    Args:
        parts: dict or tuple of anything that `as_source` takes.
        name: what error messages call it.

    Raises:
        TypeError: if a part gives no random access to samples.
        ValueError: if there are no parts or their lengths differ.
    """

    def __init__(self, parts: Mapping | tuple, name: str = "x"):
        if not parts:
            raise ValueError(message(name, "at least one input", parts))
        keyed = parts.items() if isinstance(parts, Mapping) else enumerate(parts)
        self._parts = {key: as_source(part, f"{name}[{key!r}]") for key, part in keyed}
        self._named = isinstance(parts, Mapping)
        lengths = {key: len(part) for key, part in self._parts.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{key!r}: {size}" for key, size in lengths.items())
            raise ValueError(
                message(name, "parts of one length", Told(f"lengths {{{told}}}"))
            )

    def __len__(self) -> int:
        return len(next(iter(self._parts.values())))

    def take(self, indices: Any) -> dict | tuple:
        """Dict or tuple of what each part returns for `indices`."""
        taken = {key: part.take(indices) for key, part in self._parts.items()}
        return taken if self._named else tuple(taken.values())


class Subset:
    """Some of the samples of a source, with their labels.

    Args:
        source: a source, or anything else that `as_source` takes.
        rows: (samples,) positions in it, or booleans, one per sample of it.

    Attributes:
        labels: those of the samples, or None.

    Raises:
        TypeError, ValueError: if the rows are none of the source.

    Example:
        >>> import numpy as np
        >>> part = Subset(np.arange(10) * 10, [7, 3])
        >>> part
        Subset(2 of 10 samples)
        >>> part.take([1, 0, 1])
        array([30, 70, 30])
    """

    def __init__(self, source: Any, rows: Any):
        self._source = as_source(source, "source")
        size, rows = len(self._source), np.array(rows)
        if rows.dtype == bool and rows.shape == (size,):
            rows = np.flatnonzero(rows)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise TypeError(message("rows", f"positions in 0..{size - 1}", rows))
        if not len(rows) or rows.min() < 0 or rows.max() >= size:
            told = f"{rows.min()}..{rows.max()}" if len(rows) else "none"
            expected = f"positions in 0..{size - 1}, at least one"
            raise ValueError(message("rows", expected, Told(told)))
        self._rows = rows
        labels = getattr(self._source, "labels", None)
        self.labels = None if labels is None else np.asarray(labels)[rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Subset({len(self)} of {len(self._source)} samples)"

    def origin(self) -> tuple[Any, np.ndarray]:
        """The source the samples are of, and their positions in it."""
        return self._source, self._rows

    def take(self, indices: Any) -> Any:
        """Fresh arrays of the samples, in the order asked for."""
        indices = np.asarray(indices)
        rows = self._rows[indices]
        try:
            return self._source.take(rows)
        except BrokenSamples as error:
            pairs = zip(indices.tolist(), rows.tolist(), strict=True)
            broken = {i: error.broken[row] for i, row in pairs if row in error.broken}
            raise BrokenSamples(broken, error.skip) from None


class BrokenSamples(ValueError):
    """Samples that a source cannot read.

    Args:
        broken: position in the source -> what is wrong, at least one.
        skip: whether a sampler shall draw others of their class instead.

    Attributes:
        broken: the first argument, a dict.
        skip: the second.

    Example:
        >>> str(BrokenSamples({3: "'cat/1.jpg': the file is empty"}))
        "Sample 3 cannot be read: 'cat/1.jpg': the file is empty. With on_error='skip' ..."
    """

    def __init__(self, broken: Mapping[int, str], skip: bool = False):
        super().__init__(broken, skip)  # what pickle hands to a copy
        self.broken, self.skip = dict(broken), skip

    def __str__(self) -> str:
        (row, why), *others = self.broken.items()
        more = f" (and {len(others)} more)" if others else ""
        text = f"Sample {row} cannot be read: {why}{more}."
        if self.skip:
            text += (
                " on_error='skip' is for the batches of a sampler; whoever needs every "
                "sample leaves out those of `find_broken()`, with `Subset`."
            )
        else:
            text += " With on_error='skip' a sampler draws others of their class."
        return text


def _has(x: Any, *names: str) -> bool:
    return all(hasattr(x, name) for name in names)


def _check_length(length: int, received: Any, name: str) -> None:
    if length == 0:
        raise ValueError(message(name, "at least one sample", received))


def _check_array(array: Any, name: str) -> None:
    if len(array.shape) == 0:
        raise ValueError(message(name, "an array with a first axis", array))
    dtype = np.dtype(array.dtype)
    if dtype.kind in _NO_NUMBERS or dtype.names is not None:
        raise TypeError(
            message(
                name,
                "numbers",
                array,
                "A structured array goes in as a dict of its fields."
                if dtype.names
                else "",
            )
        )
    _check_length(array.shape[0], array, name)


def _stack(
    rows: Sequence[Any], places: list[int], order: list[int], first: Any, name: str
) -> Any:
    """Stacks `rows[i] for i in order`; `places` are their positions in the source."""
    if isinstance(first, (Mapping, tuple)):
        keys = list(first) if isinstance(first, Mapping) else range(len(first))
        for row, place in zip(rows, places, strict=True):
            if type(row) is not type(first) or len(row) != len(first):
                raise ValueError(
                    message(
                        f"{name}[{place}]",
                        f"a {type(first).__name__} of {len(first)} entries, as "
                        f"{name}[0]",
                        row,
                    )
                )
        parts = {
            key: _stack(
                [row[key] for row in rows],
                places,
                order,
                first[key],
                f"{name}[{key!r}]",
            )
            for key in keys
        }
        return parts if isinstance(first, Mapping) else tuple(parts.values())
    model = np.asarray(first)
    if model.dtype.kind in _NO_NUMBERS or model.dtype.names is not None:
        raise TypeError(message(f"{name}[0]", "an array of numbers", first))
    arrays = [np.asarray(row) for row in rows]
    for array, place in zip(arrays, places, strict=True):
        if array.shape != model.shape or not np.can_cast(array.dtype, model.dtype):
            raise ValueError(
                message(
                    f"{name}[{place}]",
                    f"a sample of shape {model.shape} and dtype {model.dtype.name}, "
                    f"as {name}[0]",
                    Told(f"shape {array.shape} and dtype {array.dtype.name}"),
                    "Batches need one shape: resize, crop or pad the samples.",
                )
            )
    stacked = np.empty((len(order), *model.shape), model.dtype)
    for position, which in enumerate(order):
        stacked[position] = arrays[which]
    return stacked
