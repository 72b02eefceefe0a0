"""Samples decoded once and kept as a memory-mapped array.

A cache is a directory with these files. NumPy can read the arrays by itself.

    cache.json          what the arrays hold, and how many rows are complete
    images.npy          the samples
    labels.npy          their labels, if the source has any
    checksums.npy       CRC-32 of each sample, compared when the sample is first read
    stamps.npy          size and time of change of each sample's file, when it was read

`cache.json` is replaced as a whole, after the rows that it counts are on the disk. So rows
that a killed process was about to write never count:

    rows written and flushed to disk  ->  cache.json says so  ->  next rows ...
    killed here: written again            killed here: kept
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pathlib
import re
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import keras
import numpy as np

from kerastrip import _checks
from kerastrip._files import write_whole
from kerastrip.sources.arrays import ArraySource, as_source

__all__ = [
    "CachedImages",
    "cache_images",
]

_VERSION = 2
_SECONDS = 2.0  # a killed process loses the work of so many seconds at most
_ROWS, _BYTES = 256, 1 << 26  # at most so many rows and bytes are read at a time
_COMPARED = 8  # samples that are compared with the source when a cache is opened
_HEADER = 1 << 20  # bytes of cache.json, at most
_LABELS = "biufcSUmM"  # kinds of labels that a file can hold
_GROWING = ("images.npy", "checksums.npy", "stamps.npy")
_AGAIN = "Delete the directory, or give another path."


def cache_images(
    source: Any,
    path: str | os.PathLike[str],
    *,
    verbose: bool = False,
    verify: bool = False,
) -> CachedImages:
    """The samples of a source, decoded and resized once, in a memory-mapped array.

        images = kerastrip.cache_images(ImageFolder("photos", size=(128, 128)), "cache")
        train = PKSampler(images, classes_per_batch=16, samples_per_class=4)

    The first call reads the source with a thread for each core and writes the
    directory. If that call was killed, the next call continues where it stopped. Later
    calls open the directory, after they have compared length, shape, dtype, labels and
    eight samples with the source, and also each sample whose file has another size or time
    of change now. If two processes begin at once, one waits for the other (not on
    Windows).

    Args:
        source: a source, or anything that `as_source` takes. Its samples must be arrays
            of one shape, and the same at each reading.
        path: directory of the cache; it is made if there is none.
        verbose: whether to show a progress bar. Default False.
        verify: whether to compare all rows with their checksums now. Default False:
            each when it is first read.

    Returns:
        The cache as a source, with the `labels` of `source` if it has any.

    Raises:
        TypeError: the samples are no arrays of numbers, or the labels are objects.
        ValueError: the cache is damaged, or was made from another source, with
            other parameters, or from files that have changed.
        FileExistsError: `path` holds files that are not of a cache.

    Example:
        >>> import numpy as np, tempfile
        >>> path = tempfile.mkdtemp()
        >>> cached = cache_images(np.arange(12, dtype="uint8").reshape(3, 2, 2), path)
        >>> len(cached), cached.take([2]).tolist()
        (3, [[[8, 9], [10, 11]]])
    """
    source, path = as_source(source, "source"), pathlib.Path(path)
    labels = getattr(source, "labels", None)
    labels = None if labels is None else np.asarray(labels)
    _checks.boolean("verbose", verbose)
    _checks.boolean("verify", verify)
    # The stamps are taken before a sample is read, so that a change during the reading
    # shows when the cache is opened.
    stamps = _stamps(source)
    about = _about(source, labels)
    header = _header(path)
    if header is None or header["rows"] < about["samples"]:
        path.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            _fill(source, labels, stamps, about, path, verbose)
    else:
        _compare(source, stamps, about, path, header)
    return CachedImages(path, verify=verify)


class CachedImages:
    """A directory that `cache_images` wrote, as a source.

    Only the rows that are asked for are read, and all processes share the pages of the
    file in memory. A row is compared with its checksum when a process first takes it. The
    source is pickled by its path.

    Args:
        path: the directory.
        verify: whether to compare all rows with their checksums now, which reads the
            whole file. Default False.

    Attributes:
        labels: (n,) array, or None where the source had none.
        array: (n, ...) memory map of the rows; rows that are read here are not compared
            with their checksums.
        reading: how the source decoded the images (`ImageFiles.reading`), or None.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: the cache is unfinished, truncated, damaged or of another version of
            kerastrip.

    Example:
        >>> import numpy as np, tempfile
        >>> path = tempfile.mkdtemp()
        >>> _ = cache_images(np.zeros((3, 8, 8), "uint8"), path)
        >>> CachedImages(path)
        CachedImages((3, 8, 8), uint8)
        >>> CachedImages(path).take([2, 0]).shape
        (2, 8, 8)
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = False):
        _checks.boolean("verify", verify)
        self._path = pathlib.Path(path).absolute()
        header = _header(self._path)
        if header is None:
            raise FileNotFoundError(f"There is no cache of images in {self._path}")
        about, rows = header["about"], header["rows"]
        if rows < about["samples"]:
            raise _refused(
                self._path,
                f"an unfinished one with {rows} of {about['samples']} rows",
                "Call cache_images again.",
            )
        self._source = ArraySource(_rows(self._path, "images.npy", about, rows))
        self.array = self._source.array
        self.labels = None
        if about["labels"] is not None:
            self.labels = np.array(_rows(self._path, "labels.npy", about, rows))
            if _digest(self.labels) != about["labels"]["digest"]:
                raise _refused(self._path, "labels.npy changed")
        self.reading = about["reading"]
        self._checksums = np.array(_rows(self._path, "checksums.npy", about, rows))
        self._checked = np.zeros(rows, bool)
        self._bytes = self.array.reshape(-1).view(np.uint8)
        self._size = len(self._bytes) // rows
        if verify:
            self.check(np.arange(rows))

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return f"CachedImages({self.array.shape}, {self.array.dtype})"

    def take(self, indices: Any) -> np.ndarray:
        """(len(indices), ...) fresh array of the rows, in the order asked for.

        Raises:
            ValueError: a row has changed since it was written.
        """
        self.check(indices)
        return self._source.take(indices)

    def check(self, indices: Any) -> None:
        """Compares rows with their checksums, each once in a process.

        Raises:
            ValueError: a row has changed since it was written.
        """
        indices = np.asarray(indices)
        new = indices[~self._checked[indices]]
        for row in new.tolist():
            data = self._bytes[row * self._size : (row + 1) * self._size]
            if zlib.crc32(data.data) != self._checksums[row]:
                raise _refused(self._path, f"a damaged row {row}")
        self._checked[new] = True

    def __getstate__(self) -> pathlib.Path:
        return self._path

    def __setstate__(self, path: pathlib.Path) -> None:
        self.__init__(path)  # type: ignore[misc]


def _stamps(source: Any) -> np.ndarray:
    """(n, 2) integers that differ if the file of a sample differs; zeros if not known."""
    read = getattr(source, "stamps", None)
    stamps = None if read is None else read()
    return np.zeros((len(source), 2), "<i8") if stamps is None else stamps.astype("<i8")


def _about(source: Any, labels: np.ndarray | None) -> dict[str, Any]:
    """The entries of `cache.json` that describe the source: a cache of another differs."""
    first = source.take([0])
    if not isinstance(first, np.ndarray) or first.dtype.kind not in "biufc":
        expected = "samples that are arrays of numbers"
        advice = "Cache the parts of a structure one by one."
        raise _checks.type_error("source", expected, first, advice)
    if labels is not None and (
        labels.dtype.kind not in _LABELS or len(labels) != len(source)
    ):
        expected = f"{len(source)} labels that are numbers or strings"
        raise _checks.type_error("source.labels", expected, labels)
    return {
        "version": _VERSION,
        "samples": len(source),
        "shape": list(first.shape[1:]),
        "dtype": first.dtype.str,
        "reading": getattr(source, "reading", None),
        "labels": None
        if labels is None
        else {
            "shape": list(labels.shape[1:]),
            "dtype": labels.dtype.str,
            "digest": _digest(labels),
        },
    }


def _digest(array: np.ndarray) -> str:
    layout = f"{array.dtype.str}{array.shape}".encode()
    data = np.ascontiguousarray(array).tobytes()
    return hashlib.blake2b(layout + data, digest_size=8).hexdigest()


def _refused(path: pathlib.Path, received: str, advice: str = _AGAIN) -> ValueError:
    received = _checks.Told(f"{received} in {path}")
    return _checks.value_error("path", "a whole cache of images", received, advice)


# -- the header ------------------------------------------------------------------


def _checksum(about: dict[str, Any], rows: int) -> str:
    text = json.dumps([about, rows], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _header(path: pathlib.Path) -> dict[str, Any] | None:
    """The header {about, rows}, or None if there is none."""
    try:
        with open(path / "cache.json", "rb") as file:
            header = json.loads(file.read(_HEADER))
        about, rows = header["about"], header["rows"]
        whole = header["checksum"] == _checksum(about, rows)
        version = about["version"]
        known = version != _VERSION or _is_known(about, rows)
    except FileNotFoundError:
        return None
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError):
        whole = known = False
    if not (whole and known):
        raise _refused(path, "a damaged cache.json")
    if version != _VERSION:
        raise _refused(path, f"version {version}, not {_VERSION},")
    return header


def _is_known(about: dict[str, Any], rows: Any) -> bool:
    """Whether the entries of a header have the types and ranges that we write.

    The checksum alone does not show that, because anybody can compute it.
    """
    samples, labels = about["samples"], about["labels"]
    return (
        type(samples) is type(rows) is int
        and samples > 0
        and 0 <= rows <= samples
        and (about["reading"] is None or isinstance(about["reading"], dict))
        and _is_layout(about["shape"], about["dtype"], "biufc")
        and (labels is None or _is_layout(labels["shape"], labels["dtype"], _LABELS))
    )


def _is_layout(shape: Any, dtype: Any, kinds: str) -> bool:
    return (
        all(type(side) is int and side >= 0 for side in shape)
        and re.fullmatch(rf"[<>|][{kinds}]\d+(\[\w+\])?", dtype) is not None
        and np.dtype(dtype).str == dtype
    )


def _write_header(path: pathlib.Path, about: dict[str, Any], rows: int) -> None:
    header = {"about": about, "rows": rows, "checksum": _checksum(about, rows)}
    write_whole(path / "cache.json", json.dumps(header))


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """Lets one process, or thread, write at a time; the lock of a killed process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with open(os.open(path / "cache.lock", flags, 0o666), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- the rows --------------------------------------------------------------------


def _layout(name: str, about: dict[str, Any]) -> tuple[bytes, np.dtype, tuple]:
    """(the first bytes of a file, dtype of its rows, shape of a row).

    The first bytes are made here, not by NumPy, and compared byte by byte. So no parser
    has to be trusted with a file from elsewhere.
    """
    shape, dtype = {
        "images.npy": lambda: (about["shape"], about["dtype"]),
        "labels.npy": lambda: (about["labels"]["shape"], about["labels"]["dtype"]),
        "checksums.npy": lambda: ([], "<u4"),
        "stamps.npy": lambda: ([2], "<i8"),
    }[name]()
    whole = (about["samples"], *shape)
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {whole}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
    return start, np.dtype(dtype), tuple(shape)


def _rows(
    path: pathlib.Path, name: str, about: dict[str, Any], rows: int
) -> np.ndarray:
    """The first rows of a file as a memory map; ValueError if the file is damaged."""
    start, dtype, shape = _layout(name, about)
    needed = len(start) + rows * dtype.itemsize * math.prod(shape)
    try:
        with open(path / name, "rb") as file:
            beginning, size = file.read(len(start)), file.seek(0, os.SEEK_END)
    except OSError as error:
        raise _refused(path, f"{name} damaged ({error})") from error
    if beginning != start:
        raise _refused(path, f"{name} damaged (it is of another shape or dtype)")
    if size < needed or (rows == about["samples"] and size > needed):
        raise _refused(path, f"{name} of {size} bytes, not {needed},")
    return np.memmap(path / name, dtype, "r", len(start), (rows, *shape))


def _step(about: dict[str, Any]) -> int:
    """How many rows are read at a time."""
    size = np.dtype(about["dtype"]).itemsize * math.prod(about["shape"])
    return max(1, min(_ROWS, _BYTES // max(size, 1)))


def _compare(
    source: Any,
    stamps: np.ndarray,
    about: dict[str, Any],
    path: pathlib.Path,
    header: dict[str, Any],
) -> None:
    """ValueError if a cache was not made from this source in its present state."""
    for name, value in about.items():
        if header["about"][name] != value:
            received = "other labels"
            if name != "labels":
                received = f"{name} {header['about'][name]}, not {value},"
            advice = f"It is of another source, or made with other parameters. {_AGAIN}"
            raise _refused(path, received, advice)
    rows = header["rows"]
    images, _, known = (_rows(path, name, about, rows) for name in _GROWING)
    changed = np.flatnonzero((known != stamps[:rows]).any(axis=1))
    # Samples whose file may have changed are read and compared. A few others are compared
    # too, because the decoder or the code of the source may have changed.
    spread = np.linspace(0, rows - 1, _COMPARED).astype(int)
    compared, paths = np.union1d(spread, changed), getattr(source, "paths", None)
    for first in range(0, len(compared), _step(about)):
        block = compared[first : first + _step(about)]
        for row, now in zip(block, source.take(block), strict=True):
            if images[row].tobytes() != now.tobytes():
                file = f" ({paths[row]!r})" if paths else ""
                raise _refused(
                    path,
                    f"another sample {row}{file}",
                    "Its file has changed, or the cache is of another source, or made "
                    f"with other parameters or another decoder. {_AGAIN} "
                    "CachedImages(path) opens it as it is.",
                )
    if len(changed):
        # The files were touched or copied, and hold the same pixels: their new stamps are
        # kept, unless the cache is read-only.
        with contextlib.suppress(OSError):
            start, *_ = _layout("stamps.npy", about)
            write_whole(path / "stamps.npy", start + stamps[:rows].tobytes())


def _create(
    labels: np.ndarray | None, about: dict[str, Any], path: pathlib.Path
) -> None:
    """The files of a cache without rows."""
    for name in ("labels.npy", *_GROWING):
        # `cache.json` is written first: if it is there, these files are of a cache.
        if os.path.lexists(path / name) and _header(path) is None:
            raise FileExistsError(f"{path / name} is there, but is not of a cache.")
    _write_header(path, about, 0)
    if labels is not None:
        start, *_ = _layout("labels.npy", about)
        write_whole(path / "labels.npy", start + labels.tobytes())
    for name in _GROWING:
        write_whole(path / name, _layout(name, about)[0])


def _fill(
    source: Any,
    labels: np.ndarray | None,
    stamps: np.ndarray,
    about: dict[str, Any],
    path: pathlib.Path,
    verbose: bool,
) -> None:
    """Write the rows that are not there yet."""
    header = _header(path) or {"about": about, "rows": 0}
    if header["rows"]:
        _compare(source, stamps, about, path, header)
    else:
        _create(labels, about, path)
    rows, total, step = header["rows"], about["samples"], _step(about)
    threads = os.cpu_count() or 1
    bar = keras.utils.Progbar(total, unit_name="sample") if verbose else None
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        # The files are written, not memory-mapped: on a full disk, a write raises an error,
        # but a memory map would kill the process.
        files = [stack.enter_context(open(path / name, "r+b")) for name in _GROWING]
        for file, name in zip(files, _GROWING, strict=True):
            start, dtype, shape = _layout(name, about)
            size = len(start) + rows * dtype.itemsize * math.prod(shape)
            file.seek(file.truncate(size))
        saved = time.monotonic()
        while rows < total:
            block = np.arange(rows, min(rows + step, total))
            pieces = [p for p in np.array_split(block, threads) if len(p)]
            taken = pool.map(source.take, pieces)
            for piece, images in zip(pieces, taken, strict=True):
                _append(files, piece, images, stamps, about)
            rows += len(block)
            if rows == total or time.monotonic() - saved >= _SECONDS:
                for file in files:
                    file.flush()
                    os.fsync(file.fileno())
                _write_header(path, about, rows)
                saved = time.monotonic()
            if bar is not None:
                bar.update(rows)


def _append(
    files: Sequence[IO[bytes]],
    rows: np.ndarray,
    images: np.ndarray,
    stamps: np.ndarray,
    about: dict[str, Any],
) -> None:
    """Appends samples, their checksums and their stamps to the files `_GROWING`."""
    shape = (len(rows), *about["shape"])
    if images.shape != shape or images.dtype != about["dtype"]:
        expected = (
            f"samples of shape {shape[1:]} and dtype {about['dtype']} in rows "
            f"{rows[0]} ... {rows[-1]}"
        )
        raise _checks.value_error("source", expected, images)
    images = np.ascontiguousarray(images)
    checksums = [zlib.crc32(image.tobytes()) for image in images]
    for file, array in zip(
        files, (images, np.array(checksums, "<u4"), stamps[rows]), strict=True
    ):
        file.write(array.data)
