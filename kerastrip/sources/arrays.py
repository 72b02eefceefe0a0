"""Sources over arrays, and over objects that behave like a list of samples.

A source has `__len__` and `take(indices)`, but no `__getitem__` and no `__iter__`. The
missing methods distinguish a source from arrays and data sets, some of which have a
`take` too. `take` returns fresh arrays, with the rows in the order of the indices, in the
structure that the model gets (an array, a tuple or a dict of arrays). A source that knows
the labels of its samples has an attribute `labels`. A sample that cannot be read raises
`BrokenSamples`.

Arrays are read by any number of threads at once. Objects of users may keep a file open,
so threads take turns there, unless the object has an attribute `thread_safe = True`.
"""

from __future__ import annotations

import mimetypes
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from kerastrip import _checks
from kerastrip.sources._headers import read_header
from kerastrip.sources._turns import is_safe, turn

__all__ = [
    "ArraySource",
    "BrokenSamples",
    "LazyArraySource",
    "RowSource",
    "StructureSource",
    "Subset",
    "as_source",
    "from_data_set",
]

_NO_NUMBERS = "OSUTMm"  # dtype kinds that hold no numbers
_NO_INPUT = "OTMm"  # dtype kinds that hold neither numbers nor texts
_TEXTS = "OSUT"
_FILES = (
    "ImageFolder(directory, size=...) reads a folder of class folders, "
    "ImageFiles(paths, size=...) a list of image files. Other files are read by an "
    "object with `__len__` and `__getitem__`."
)
_DECODE = (
    "Let `__getitem__` return kerastrip.sources.read_image(data, size=(height, width))."
)
_FEW = 10  # samples that are looked at, to distinguish paths from texts
_LONGEST = 4096  # characters: a longer text is no path

# Modes of Pillow whose arrays do not hold the colours that are shown, and the conversions
# that lead to these colours. (Pillow warns if a transparent palette becomes RGB at once.)
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
    | h5py or zarr array, or another object with `shape` and `dtype` | one call, in sorted order |
    | Hugging Face or PyTorch dataset, list of samples | one call if it has `__getitems__`, else sample by sample; sorted, each once |
    | dict or tuple of these | one source per part |
    | a source of `kerastrip.sources` | itself |
    | another object with `__len__` and `take` | its `take` |

    Nothing is copied: a change made later to the array is seen by the source.

    Threads read arrays, memory maps, zarr arrays and the sources of `kerastrip.sources`
    side by side. In everything else (data sets, h5py files, sources of your own) threads
    take turns, because an open file has one position. If the object allows reads that
    overlap, give it an attribute `thread_safe = True`.

    Args:
        x: the samples, first axis first.
        name: what error messages call `x`.

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
    expected = (
        "samples with random access: an array, np.memmap, anything with `__len__` and "
        "`__getitem__`, a kerastrip source, or a dict or tuple of these"
    )
    advice = _FILES if isinstance(x, (str, os.PathLike)) else ""
    raise _checks.type_error(name, expected, x, advice)


class ArraySource:
    """Rows of a NumPy array or memory map, gathered by one indexing call.

    Args:
        array: (samples, ...) array of numbers or texts.
        name: what error messages call the array.

    Raises:
        TypeError: if the array holds neither numbers nor texts, or paths of images.
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
    """Rows of an array that is not in memory (h5py, zarr), read in sorted order.

    h5py and zarr read ranges from disk, and accept increasing indices only, each once.

    Args:
        array: object with `shape`, `dtype` and indexing by a list of rows.
        name: what error messages call the array.

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
                _checks.refuse_masked(f"{self._name}[{row}]", sample)
        shape = (len(rows), *self._array.shape[1:])
        if got.shape != shape or got.dtype.kind in _NO_NUMBERS:
            expected = f"an array that returns shape {shape} for {len(rows)} rows"
            advice = "Convert it to a NumPy array first."
            raise _checks.type_error(self._name, expected, got, advice)
        return _native(got[inverse])


class RowSource:
    """Samples of anything with `__len__` and `__getitem__`, stacked.

    A sample may be an array, a number, a text, an image object, or a dict or tuple of
    these. Every sample must have the shapes of the first. Images of Pillow give the
    colours that they show: images with a palette, and in CMYK, become RGB.

    Args:
        rows: the samples.
        name: what error messages call the samples.

    Raises:
        TypeError: if the first sample is of another kind, or is a path.
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
            self._first = next(iter(self._read([0])))
            self._refuse_paths(name)
            _put(_room(self._first, 1, name), [0], self._first, self._first, 0, name)

    def __len__(self) -> int:
        return len(self._rows)

    def _refuse_paths(self, name: str) -> None:
        """Refuses paths and encoded images in place of samples."""
        leaves = dict(_leaves(self._first, name))
        for part, leaf in leaves.items():
            if isinstance(leaf, bytes) and _is_encoded(leaf):
                expected = "samples, not the bytes of image files"
                received = _checks.Told(
                    f"{len(leaf):,} bytes that begin with {leaf[:8]!r}"
                )
                raise _checks.type_error(f"{part}[0]", expected, received, _DECODE)
        paths = {part: leaf for part, leaf in leaves.items() if _is_path(leaf)}
        if paths:  # a single caption may end in ".jpg", but not ten captions in a row
            for row in self._read(list(range(1, min(len(self), _FEW)))):
                leaves = dict(_leaves(row, name))
                paths = {
                    p: leaf for p, leaf in paths.items() if _is_path(leaves.get(p))
                }
        for part, leaf in paths.items():
            raise _no_samples(f"{part}[0]", leaf)

    def _read(self, indices: list[int]) -> Iterable[Any]:
        """The samples one after the other.

        A sample is valid until the next one is read: a data set may read all of them into
        one buffer.
        """
        if hasattr(self._rows, "__getitems__"):
            rows = list(self._rows.__getitems__(indices))
            if not _share_memory(rows):
                return rows
        return (self._rows[index] for index in indices)

    def take(self, indices: Any) -> Any:
        """Fresh arrays of the samples, in the order asked for."""
        unique, inverse = np.unique(np.asarray(indices), return_inverse=True)
        places = unique.tolist()
        positions: list[list[int]] = [[] for _ in places]
        for position, which in enumerate(inverse.tolist()):
            positions[which].append(position)
        first, name = self._first, self._name
        taken = _room(first, len(inverse), name)
        # The turn lasts to the end of `_put`: an image object reads its file only when it
        # becomes an array.
        with turn(self._safe):
            rows = zip(self._read(places), places, positions, strict=True)
            for row, place, targets in rows:
                _put(taken, targets, row, first, place, name)
        return taken


class _ForeignSource:
    """A source that the user has written; it keeps all its other attributes."""

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
        """A copy of what the source returns, in the byte order of this machine.

        A copy, because the source may write its next batch into the same memory, and
        because augmentations would write into the data if the source returns a view.
        """
        with turn(self._safe):
            taken = self._source.take(indices)
            return _native(taken, f"{self._name}.take(...)", copy=True)


class StructureSource:
    """A dict or tuple of sources of one length: the inputs of a model.

    Args:
        parts: dict or tuple of anything that `as_source` takes.
        name: what error messages call the structure.

    Raises:
        TypeError: if a part gives no random access to samples.
        ValueError: if there are no parts or their lengths differ.
    """

    def __init__(self, parts: Mapping | tuple, name: str = "x"):
        if not parts:
            raise _checks.value_error(name, "at least one input", parts)
        keyed = parts.items() if isinstance(parts, Mapping) else enumerate(parts)
        self._parts = {key: as_source(part, f"{name}[{key!r}]") for key, part in keyed}
        self._named = isinstance(parts, Mapping)
        lengths = {key: len(part) for key, part in self._parts.items()}
        if len(set(lengths.values())) > 1:
            received = ", ".join(f"{key!r}: {size}" for key, size in lengths.items())
            received = f"lengths {{{received}}}"
            raise _checks.value_error(
                name, "parts of one length", _checks.Told(received)
            )

    def __len__(self) -> int:
        return len(next(iter(self._parts.values())))

    def take(self, indices: Any) -> dict | tuple:
        """Dict or tuple of the arrays that each part returns for `indices`."""
        taken = {key: part.take(indices) for key, part in self._parts.items()}
        return taken if self._named else tuple(taken.values())


class Subset:
    """Some of the samples of a source, with their labels.

    Args:
        source: a source, or anything else that `as_source` takes.
        rows: (samples,) positions in the source, or booleans, one per sample of the
            source.

    Attributes:
        labels: the labels of the samples, or None.

    Raises:
        TypeError, ValueError: if `rows` are not positions in the source.

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
        _checks.refuse_masked("rows", rows)
        size, rows = len(self._source), np.array(rows)
        if rows.dtype == bool and rows.shape == (size,):
            rows = np.flatnonzero(rows)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise _checks.type_error("rows", f"positions in 0..{size - 1}", rows)
        if not len(rows) or rows.min() < 0 or rows.max() >= size:
            received = f"{rows.min()}..{rows.max()}" if len(rows) else "none"
            expected = f"positions in 0..{size - 1}, at least one"
            raise _checks.value_error("rows", expected, _checks.Told(received))
        self._rows = rows
        labels = getattr(self._source, "labels", None)
        self.labels = None if labels is None else np.asarray(labels)[rows]
        self.reading = getattr(self._source, "reading", None)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Subset({len(self)} of {len(self._source)} samples)"

    def origin(self) -> tuple[Any, np.ndarray]:
        """The source that the samples come from, and their positions in the source."""
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
        """The stamps that the source has of these samples; None if it has none."""
        stamps = getattr(self._source, "stamps", lambda: None)()
        return None if stamps is None else stamps[self._rows]


def from_data_set(source: Any) -> bool:
    """Whether a data set, not the user, decides what the entries of a sample are."""
    while isinstance(source, Subset):
        source = source._source
    return isinstance(source, RowSource)


class BrokenSamples(ValueError):
    """Samples that a source cannot read.

    Args:
        broken: position in the source -> what is wrong, at least one.
        skip: whether a sampler shall draw other samples of the class instead.

    Attributes:
        broken: position -> what is wrong, a dict.
        skip: as the argument.

    Example:
        >>> str(BrokenSamples({3: "'cat/1.jpg': the file is empty"}))
        "Sample 3 cannot be read: 'cat/1.jpg': the file is empty. With on_error='skip' ..."
    """

    def __init__(self, broken: Mapping[int, str], skip: bool = False):
        super().__init__(broken, skip)  # pickle makes a copy from these arguments
        self.broken, self.skip = dict(broken), skip

    def __str__(self) -> str:
        (row, why), *others = self.broken.items()
        more = f" (and {len(others)} more)" if others else ""
        text = f"Sample {row} cannot be read: {why}{more}."
        if self.skip:
            text += (
                " on_error='skip' is for the batches of a sampler only. To read every "
                "sample, leave out the samples that `find_broken()` names, with `Subset`."
            )
        else:
            text += " With on_error='skip' a sampler draws others of their class."
        return text


def _has(x: Any, *names: str) -> bool:
    return all(hasattr(x, name) for name in names)


def _check_length(length: int, received: Any, name: str) -> None:
    if length == 0:
        raise _checks.value_error(name, "at least one sample", received)


def _check_rows(rows: Any, name: str) -> None:
    """An error for no rows at all, masked entries, or paths in place of samples."""
    _check_length(len(rows), rows, name)
    _checks.refuse_masked(name, rows)
    if isinstance(rows, (list, np.ndarray)):
        few = [rows[i] for i in range(min(len(rows), _FEW))]
        if isinstance(rows, np.ndarray) and rows.dtype.kind in _TEXTS:
            few = rows[:_FEW].ravel().tolist()  # a data frame has a second axis
        if few and all(_is_path(row) for row in few):
            raise _no_samples(name, few[0])


def _is_path(sample: Any) -> bool:
    if isinstance(sample, (str, bytes)):
        if len(sample) > _LONGEST:
            return False
        text = os.fsdecode(sample)
        ending = os.path.splitext(text)[1].lower()
        kind = (mimetypes.guess_type(f"a{ending}")[0] or "").partition("/")[0]
        named = kind in ("image", "audio", "video") or ending in (".npy", ".npz")
        return (named and not re.search(r"\s", text)) or os.path.isfile(text)
    return isinstance(sample, os.PathLike)


def _is_encoded(sample: bytes) -> bool:
    """Whether bytes are an image file rather than a text."""
    try:
        sample.decode()
    except UnicodeDecodeError:
        return read_header(sample) is not None
    return False


def _leaves(sample: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(what errors call it, leaf) of each leaf of a sample: `x['image'][0]`, array."""
    if isinstance(sample, (Mapping, tuple)):
        keys = sample if isinstance(sample, Mapping) else range(len(sample))
        for key in keys:
            yield from _leaves(sample[key], f"{name}[{key!r}]")
    else:
        yield name, sample


def _no_samples(name: str, path: Any) -> TypeError:
    return _checks.type_error(name, "samples, not paths of files", path, _FILES)


def _native(taken: Any, name: str = "x", copy: bool = False) -> Any:
    """Arrays in the byte order of this machine.

    JAX and TensorFlow read the bytes of arrays in the other byte order the wrong way
    round.
    """
    if isinstance(taken, Mapping):
        items = taken.items()
        return {key: _native(part, f"{name}[{key!r}]", copy) for key, part in items}
    if type(taken) in (tuple, list):
        return type(taken)(_native(part, name, copy) for part in taken)
    _checks.refuse_masked(name, taken)
    if not isinstance(taken, np.ndarray):
        return taken
    return _checks.native(taken.copy() if copy else taken)


def _check_array(array: Any, name: str, refused: str = _NO_NUMBERS) -> None:
    if len(array.shape) == 0:
        raise _checks.value_error(name, "an array with a first axis", array)
    dtype = np.dtype(array.dtype)
    if dtype.kind in refused or dtype.names is not None:
        advice = "A structured array goes in as a dict of its fields."
        raise _checks.type_error(name, "numbers", array, advice if dtype.names else "")
    _check_length(array.shape[0], array, name)
    _checks.refuse_masked(name, array)


def _room(first: Any, count: int, name: str) -> Any:
    """Empty arrays for `count` samples, in the structure and shapes of the first one."""
    if isinstance(first, Mapping):
        items = first.items()
        return {key: _room(part, count, f"{name}[{key!r}]") for key, part in items}
    if isinstance(first, tuple):
        parts = enumerate(first)
        return tuple(_room(part, count, f"{name}[{key!r}]") for key, part in parts)
    if isinstance(first, (str, bytes)):  # as Python objects: texts differ in length
        return np.empty(count, object)
    model = _shown(first, name, 0)
    if model.dtype.kind in _NO_NUMBERS or model.dtype.names is not None:
        if isinstance(first, os.PathLike):
            raise _no_samples(f"{name}[0]", first)
        raise _checks.type_error(f"{name}[0]", "an array of numbers, or a text", first)
    return np.empty((count, *model.shape), model.dtype.newbyteorder("="))


def _put(
    taken: Any, positions: list[int], row: Any, first: Any, place: int, name: str
) -> None:
    """Writes a sample into the arrays that `_room` made.

    Args:
        taken: the arrays.
        positions: the rows of the arrays that the sample fills.
        row: the sample.
        first: the first sample of the source; all others must be like it.
        place: the position of the sample in the source.
        name: what errors call the source.
    """
    # This runs for every sample, so the names for errors are made only in an error.
    if not isinstance(taken, np.ndarray):
        if type(row) is not type(first) or len(row) != len(first):
            kind = f"a {type(first).__name__} of {len(first)} entries"
            raise _checks.value_error(f"{name}[{place}]", f"{kind}, as {name}[0]", row)
        for key in taken if isinstance(taken, dict) else range(len(taken)):
            part = f"{name}[{key!r}]"
            _put(taken[key], positions, row[key], first[key], place, part)
        return
    if taken.dtype.hasobject:
        if not isinstance(row, type(first)):
            kind = "a text" if isinstance(first, str) else "bytes"
            raise _checks.value_error(f"{name}[{place}]", f"{kind}, as {name}[0]", row)
        array = row
    else:
        array = _shown(row, name, place)
        shape, dtype = taken.shape[1:], taken.dtype
        if array.shape != shape or not np.can_cast(array.dtype, dtype):
            expected = f"a sample of shape {shape} and dtype {dtype.name}, as {name}[0]"
            received = _checks.Told(f"shape {array.shape} and dtype {array.dtype.name}")
            advice = "Batches need one shape: resize, crop or pad the samples."
            if array.shape[:2] == shape[:2] and hasattr(row, "convert"):
                advice = "Images become alike with `.convert('RGB')`."
            raise _checks.value_error(f"{name}[{place}]", expected, received, advice)
    for position in positions:
        taken[position] = array


def _share_memory(rows: Iterable[Any]) -> bool:
    """Whether samples lie in one buffer, which each read has overwritten."""
    seen: set[int] = set()
    for row in rows:
        places = set(_memory(row))
        if not seen.isdisjoint(places):
            return True
        seen |= places
    return False


def _memory(sample: Any) -> list[int]:
    """The addresses at which the arrays and tensors of a sample begin."""
    if isinstance(sample, np.ndarray):
        return [sample.__array_interface__["data"][0]]
    if isinstance(sample, (int, float, str, bytes)):
        return []
    if isinstance(sample, (dict, tuple, Mapping)):
        parts = sample if isinstance(sample, tuple) else sample.values()
        return [place for part in parts for place in _memory(part)]
    if hasattr(sample, "data_ptr"):  # of PyTorch
        return [sample.data_ptr()]
    # An image of Pillow: with `seek`, one object shows one frame after the other.
    return [id(sample)] if hasattr(sample, "convert") else []


def _shown(sample: Any, name: str, place: int) -> np.ndarray:
    """A sample as an array; an image of Pillow in the colours that it shows."""
    if isinstance(sample, np.ma.MaskedArray):
        _checks.refuse_masked(f"{name}[{place}]", sample)
    if hasattr(sample, "convert"):
        for mode in _SHOWN.get(getattr(sample, "mode", ""), ()):
            sample = sample.convert(mode)
    return np.asarray(sample)
