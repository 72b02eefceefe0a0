"""Sources over what is already an array, or behaves like a list of samples.

A source is anything with `len(source)` and `source.take(indices)` that is neither
indexed nor iterated (arrays and data sets have a `take` too): `take` returns fresh arrays, the rows in the order asked for, in the
structure that the model gets (an array, a tuple or a dict of arrays). A source that
knows the labels of its samples has them as `labels`. What cannot be read is a
`BrokenSamples` error.

Arrays are read by any number of threads at once. What users bring may keep an open
file, so threads take turns there, unless it has an attribute `thread_safe = True`.
"""

from __future__ import annotations

import mimetypes
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kerastrip._checks import Told, message, refuse_masked
from kerastrip.sources._turns import is_safe, turn

_NO_NUMBERS = "OSUTMm"  # dtype kinds that hold no numbers
_NO_INPUT = "OTMm"  # ... and no texts either
_FILES = (
    "ImageFolder(directory, size=...) reads a folder of class folders, "
    "ImageFiles(paths, size=...) a list of image files."
)

# Modes of Pillow whose arrays hold other numbers than the colours that are shown, and
# the way to these. (Pillow warns of a transparent palette that is turned into RGB.)
_SHOWN = {
    "1": ("L",),
    "P": ("RGBA", "RGB"),
    "PA": ("RGBA", "RGB"),
    "LA": ("L",),
    "La": ("LA", "L"),
    "CMYK": ("RGB",),
}


def as_source(x: Any, name: str = "x") -> Any:
    """The source that gives random access to `x`.

    | `x` | read by |
    |---|---|
    | array, `np.memmap`, tensor, data frame | one indexing call |
    | h5py or zarr array, or what else has `shape` and `dtype` | one call, in sorted order |
    | Hugging Face or PyTorch dataset, list of samples | one call if it has `__getitems__`, else sample by sample; sorted, each once |
    | dict or tuple of these | one source per part |
    | a source of `kerastrip.sources` | itself |
    | another object with `__len__` and `take` | its `take` |

    Nothing is copied: a change made later to the array is seen by the source.

    Threads read arrays, memory maps, zarr arrays and the sources of `kerastrip.sources`
    side by side. In everything else (data sets, h5py files, sources of your own) they
    take turns, because one open file has one position. Where reads may overlap, give
    the object an attribute `thread_safe = True`, and they will.

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
        ours = type(x).take.__module__.partition(".")[0] == "kerastrip"
        return x if ours else _ForeignSource(x, name)
    if isinstance(x, (Mapping, tuple)):
        return StructureSource(x, name)
    if isinstance(x, np.ndarray):
        rows = x.dtype.kind in "OT"  # Python objects, or NumPy's texts of any length
        return RowSource(x, name) if rows else ArraySource(x, name)
    if hasattr(x, "__dlpack__") or hasattr(x, "numpy"):  # tensors
        return as_source(np.asarray(x), name)
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
            _FILES if isinstance(x, (str, os.PathLike)) else "",
        )
    )


class ArraySource:
    """Rows of a NumPy array or memory map, gathered by one indexing call.

    Args:
        array: (samples, ...) array of numbers or texts.
        name: what error messages call it.

    Raises:
        TypeError: if the array holds neither, or paths of images.
        ValueError: if it has no rows, or masked entries.

    Attributes:
        array: the array itself. Augmentations read its rows where they are.
    """

    def __init__(self, array: np.ndarray, name: str = "x"):
        _check_array(array, name, _NO_INPUT)
        _check_rows(array, name)
        self.array = np.asarray(array)

    def __len__(self) -> int:
        return len(self.array)

    def take(self, indices: Any) -> np.ndarray:
        """(len(indices), ...) fresh array of the rows, in the order asked for."""
        return _native(self.array[np.asarray(indices)])


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
        self._array, self._name, self._safe = array, name, is_safe(array)

    def __len__(self) -> int:
        return int(self._array.shape[0])

    def take(self, indices: Any) -> np.ndarray:
        """(len(indices), ...) fresh array of the rows, in the order asked for."""
        rows, inverse = np.unique(np.asarray(indices), return_inverse=True)
        # zarr keeps indexing by lists of rows under this name.
        array = getattr(self._array, "oindex", self._array)
        with turn(self._safe):
            read = array[rows]
            got = np.asarray(read)
        if np.ma.isMaskedArray(read):  # as netCDF4 returns them
            for row, sample in zip(rows, read, strict=True):
                refuse_masked(f"{self._name}[{row}]", sample)
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
        return _native(got[inverse])


class RowSource:
    """Samples of anything with `__len__` and `__getitem__`, stacked.

    A sample may be an array, a number, a text, an image object, or a dict or tuple of
    those. Every sample must have the shapes of the first. Images of Pillow come in the
    colours that they show: those with a palette, and in CMYK, become RGB.

    Args:
        rows: the samples.
        name: what error messages call it.

    Raises:
        TypeError: if the first sample is made of something else, or of paths.
        ValueError: if there are no samples.
    """

    def __init__(self, rows: Any, name: str = "x"):
        _check_rows(rows, name)
        self._rows, self._name = rows, name
        self._safe = is_safe(rows) or (
            isinstance(rows, (list, np.ndarray))
            and all(
                isinstance(row, (np.ndarray, np.generic, int, float, str))
                for row in rows
            )
        )
        with turn(self._safe):
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
        # To the end of `_stack`: an image object reads its file when it becomes an array.
        with turn(self._safe):
            return _stack(
                self._read(places), places, inverse.tolist(), self._first, self._name
            )


class _ForeignSource:
    """A source that the user has written, with all that it has beside `take`."""

    def __init__(self, source: Any, name: str):
        self._source, self._name, self._safe = source, name, is_safe(source)

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return repr(self._source)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a copy under way has no `_source` yet
            raise AttributeError(name)
        return getattr(self._source, name)

    def take(self, indices: Any) -> Any:
        """What the source gives, in the byte order of this machine."""
        with turn(self._safe):
            return _native(self._source.take(indices), f"{self._name}.take(...)")


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
        refuse_masked("rows", rows)
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
        self.reading = getattr(self._source, "reading", None)

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

    def stamps(self) -> np.ndarray | None:
        """Those of the source for these samples, None if it has none."""
        stamps = getattr(self._source, "stamps", lambda: None)()
        return None if stamps is None else stamps[self._rows]


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


def _check_rows(rows: Any, name: str) -> None:
    """Refuses what has no rows, masked entries, or paths in place of samples."""
    _check_length(len(rows), rows, name)
    refuse_masked(name, rows)
    if isinstance(rows, (list, np.ndarray)):
        few = [rows[i] for i in range(min(len(rows), 10))]
        if all(_is_path(row) for row in few):
            raise _no_samples(name, few[0])


def _is_path(sample: Any) -> bool:
    if isinstance(sample, (str, bytes)):
        text = os.fsdecode(sample)
        kind = mimetypes.guess_type(text)[0] or ""
        return kind.startswith("image/") or (len(text) < 256 and os.path.isfile(text))
    return isinstance(sample, os.PathLike)


def _no_samples(name: str, path: Any) -> TypeError:
    return TypeError(message(name, "samples, not paths of files", path, _FILES))


def _native(taken: Any, name: str = "x") -> Any:
    """Arrays in the byte order of this machine, for which every backend is made.

    JAX and TensorFlow read the bytes of the others the wrong way round.
    """
    if isinstance(taken, Mapping):
        return {key: _native(part, f"{name}[{key!r}]") for key, part in taken.items()}
    if type(taken) in (tuple, list):
        return type(taken)(_native(part, name) for part in taken)
    refuse_masked(name, taken)
    if isinstance(taken, np.ndarray) and not taken.dtype.isnative:
        return taken.astype(taken.dtype.newbyteorder("="))
    return taken


def _check_array(array: Any, name: str, refused: str = _NO_NUMBERS) -> None:
    if len(array.shape) == 0:
        raise ValueError(message(name, "an array with a first axis", array))
    dtype = np.dtype(array.dtype)
    if dtype.kind in refused or dtype.names is not None:
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
    refuse_masked(name, array)


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
    if isinstance(first, (str, bytes)):
        return _texts(rows, places, order, first, name)
    model = _shown(first, f"{name}[0]")
    if model.dtype.kind in _NO_NUMBERS or model.dtype.names is not None:
        if isinstance(first, os.PathLike):
            raise _no_samples(f"{name}[0]", first)
        raise TypeError(message(f"{name}[0]", "an array of numbers, or a text", first))
    arrays = []
    for row, place in zip(rows, places, strict=True):
        array = _shown(row, f"{name}[{place}]")
        if array.shape != model.shape or not np.can_cast(array.dtype, model.dtype):
            raise ValueError(
                message(
                    f"{name}[{place}]",
                    f"a sample of shape {model.shape} and dtype {model.dtype.name}, "
                    f"as {name}[0]",
                    Told(f"shape {array.shape} and dtype {array.dtype.name}"),
                    "Batches need one shape: resize, crop or pad the samples."
                    if array.shape[:2] != model.shape[:2] or not hasattr(row, "convert")
                    else "Images become alike with `.convert('RGB')`.",
                )
            )
        arrays.append(array)
    stacked = np.empty((len(order), *model.shape), model.dtype.newbyteorder("="))
    for position, which in enumerate(order):
        stacked[position] = arrays[which]
    return stacked


def _texts(
    rows: Sequence[Any], places: list[int], order: list[int], first: Any, name: str
) -> np.ndarray:
    """(len(order),) texts, or bytes, as Python objects: they differ in length."""
    if _is_path(first):
        raise _no_samples(f"{name}[0]", first)
    for row, place in zip(rows, places, strict=True):
        if not isinstance(row, type(first)):
            kind = "a text" if isinstance(first, str) else "bytes"
            raise ValueError(message(f"{name}[{place}]", f"{kind}, as {name}[0]", row))
    return np.array([rows[which] for which in order], object)


def _shown(sample: Any, name: str) -> np.ndarray:
    """A sample as an array; an image of Pillow in the colours that it shows."""
    refuse_masked(name, sample)
    if hasattr(sample, "convert"):
        for mode in _SHOWN.get(getattr(sample, "mode", ""), ()):
            sample = sample.convert(mode)
    return np.asarray(sample)
