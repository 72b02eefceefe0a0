"""Samples decoded once and kept as a memory-mapped array.

A cache is a directory: `images.npy` and `labels.npy`, which NumPy reads by itself, and
`cache.json`, which says what is in them and how many rows are. It is replaced as a
whole, after the rows that it counts are on the disk, so what a killed process was
about to write is never taken for a row.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np

from kerastrip._checks import Told, message
from kerastrip.sources.arrays import ArraySource, as_source

_VERSION = 1
_SECONDS = 2.0  # of work, at most, are lost with a killed process
_ROWS, _BYTES = 256, 1 << 26  # what is read at a time, at most
_COMPARED = 8
_AGAIN = "Delete the directory, or give another path."


def cache_images(
    source: Any, path: str | os.PathLike[str], *, verbose: bool = False
) -> CachedImages:
    """The samples of a source, decoded and resized once, in a memory-mapped array.

        images = kerastrip.cache_images(ImageFolder("photos", size=(128, 128)), "cache")
        train = PKSampler(images, classes_per_batch=16, samples_per_class=4)

    The first call reads the source with a thread for each core and writes the
    directory; one that was killed is taken up where it stopped. Later calls open what
    is there, after comparing length, shape, dtype, labels and eight samples with the
    source. Of two processes that begin at once (not on Windows) one waits for the
    other.

    Args:
        source: what `as_source` takes; its samples must be arrays of one shape that
            are the same each time.
        path: directory of the cache, made if there is none.
        verbose: whether to show a progress bar. Default False.

    Returns:
        The cache as a source, with the `labels` of `source` if it has any.

    Raises:
        TypeError: the samples are no arrays of numbers, or the labels are objects.
        ValueError: the cache is damaged, or was made from another source or with
            other parameters.
        FileExistsError: `path` is something else.

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
    about = _about(source, labels)
    header = _header(path)
    if header is None or header["rows"] < about["samples"]:
        path.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            _fill(source, labels, about, path, verbose)
    else:
        _compare(source, about, path, header)
    return CachedImages(path)


class CachedImages:
    """A directory that `cache_images` wrote, as a source.

    Nothing is read but the rows that are asked for, and the pages of the file are
    shared by all processes. It is pickled by its path.

    Args:
        path: the directory.

    Attributes:
        labels: (n,) array, or None where the source had none.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: it is unfinished, truncated, damaged or of a newer kerastrip.

    Example:
        >>> import numpy as np, tempfile
        >>> path = tempfile.mkdtemp()
        >>> _ = cache_images(np.zeros((3, 8, 8), "uint8"), path)
        >>> CachedImages(path)
        CachedImages((3, 8, 8), uint8)
        >>> CachedImages(path).take([2, 0]).shape
        (2, 8, 8)
    """

    def __init__(self, path: str | os.PathLike[str]):
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
        self._source = ArraySource(_images(self._path, about, rows))
        self.array = self._source.array
        self.labels = None
        if about["labels"] is not None:
            try:
                self.labels = np.load(self._path / "labels.npy")
            except (OSError, ValueError, EOFError) as error:
                raise _refused(self._path, f"labels.npy damaged ({error})") from error
            if _digest(self.labels) != about["labels"]:
                raise _refused(self._path, "labels.npy changed")

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return f"CachedImages({self.array.shape}, {self.array.dtype})"

    def take(self, indices: Any) -> np.ndarray:
        """(len(indices), ...) fresh array of the rows, in the order asked for."""
        return self._source.take(indices)

    def __getstate__(self) -> pathlib.Path:
        return self._path

    def __setstate__(self, path: pathlib.Path) -> None:
        self.__init__(path)  # type: ignore[misc]


def _about(source: Any, labels: np.ndarray | None) -> dict[str, Any]:
    """What a cache of the source is known by."""
    first = source.take([0])
    if not isinstance(first, np.ndarray) or first.dtype.kind not in "biufc":
        raise TypeError(
            message(
                "source",
                "samples that are arrays of numbers",
                first,
                "Cache the parts of a structure one by one.",
            )
        )
    if labels is not None and (labels.dtype.hasobject or len(labels) != len(source)):
        expected = f"{len(source)} labels that are numbers or strings"
        raise TypeError(message("source.labels", expected, labels))
    return {
        "version": _VERSION,
        "samples": len(source),
        "shape": list(first.shape[1:]),
        "dtype": first.dtype.str,
        "labels": None if labels is None else _digest(labels),
    }


def _digest(array: np.ndarray) -> str:
    told = f"{array.dtype.str}{array.shape}".encode()
    data = np.ascontiguousarray(array).tobytes()
    return hashlib.blake2b(told + data, digest_size=8).hexdigest()


def _refused(path: pathlib.Path, received: str, advice: str = _AGAIN) -> ValueError:
    return ValueError(
        message(
            "path", "a whole cache of images", Told(f"{received} in {path}"), advice
        )
    )


# -- the header ------------------------------------------------------------------


def _checksum(about: dict[str, Any], rows: int) -> str:
    text = json.dumps([about, rows], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _header(path: pathlib.Path) -> dict[str, Any] | None:
    """The header {about, rows}, or None if there is none."""
    try:
        header = json.loads((path / "cache.json").read_bytes())
        whole = header["checksum"] == _checksum(header["about"], header["rows"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise _refused(path, "a damaged cache.json")
    if header["about"]["version"] != _VERSION:
        raise _refused(path, f"version {header['about']['version']}, not {_VERSION},")
    return header


def _write_header(path: pathlib.Path, about: dict[str, Any], rows: int) -> None:
    header = {"about": about, "rows": rows, "checksum": _checksum(about, rows)}
    part = path / "cache.json.part"
    with open(part, "w") as file:
        json.dump(header, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path / "cache.json")


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """One process, or thread, at a time; a killed one lets the next one in."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(path / "cache.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- the rows --------------------------------------------------------------------


def _images(path: pathlib.Path, about: dict[str, Any], rows: int) -> np.ndarray:
    """The first rows of images.npy as a memory map, if they are what they must be."""
    shape, dtype = tuple(about["shape"]), np.dtype(about["dtype"])
    try:
        with open(path / "images.npy", "rb") as file:
            np.lib.format.read_magic(file)
            found, fortran, kind = np.lib.format.read_array_header_1_0(file)
            begin, size = file.tell(), file.seek(0, os.SEEK_END)
    except (OSError, ValueError) as error:
        raise _refused(path, f"images.npy damaged ({error})") from error
    if (found, fortran, kind) != ((about["samples"], *shape), False, dtype):
        raise _refused(path, f"images.npy of shape {found} and dtype {kind}")
    needed = begin + rows * dtype.itemsize * int(np.prod(shape))
    if size < needed or (rows == about["samples"] and size > needed):
        raise _refused(path, f"images.npy of {size} bytes, not {needed},")
    return np.memmap(path / "images.npy", dtype, "r", begin, (rows, *shape))


def _compare(
    source: Any, about: dict[str, Any], path: pathlib.Path, header: dict[str, Any]
) -> None:
    """Refuse a cache that was not made from this source."""
    for name, value in about.items():
        if header["about"][name] != value:
            told = "other labels"
            if name != "labels":
                told = f"{name} {header['about'][name]}, not {value},"
            raise _refused(path, told, f"It is of another source. {_AGAIN}")
    rows = np.unique(np.linspace(0, header["rows"] - 1, _COMPARED).astype(int))
    kept, read = _images(path, about, header["rows"])[rows], source.take(rows)
    for row, before, now in zip(rows, kept, read, strict=True):
        if before.tobytes() != now.tobytes():
            raise _refused(
                path,
                f"another sample {row}",
                "It is of another source, or made with other parameters or another "
                f"decoder. {_AGAIN} CachedImages(path) opens it as it is.",
            )


def _create(labels: np.ndarray | None, about: dict[str, Any], path: pathlib.Path):
    """The files of a cache without rows."""
    for name in ("images.npy", "labels.npy"):
        # The header comes first, so that these are ours if it is there.
        if (path / name).exists() and _header(path) is None:
            raise FileExistsError(f"{path / name} is there, but is not of a cache.")
    _write_header(path, about, 0)
    if labels is not None:
        np.save(path / "labels.npy", labels)
    with open(path / "images.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(
            file,
            {
                "descr": about["dtype"],
                "fortran_order": False,
                "shape": (about["samples"], *about["shape"]),
            },
        )


def _fill(
    source: Any,
    labels: np.ndarray | None,
    about: dict[str, Any],
    path: pathlib.Path,
    verbose: bool,
) -> None:
    """Write the rows that are not there yet."""
    header = _header(path) or {"about": about, "rows": 0}
    if header["rows"]:
        _compare(source, about, path, header)
    else:
        _create(labels, about, path)
    rows, total = header["rows"], about["samples"]
    size = np.dtype(about["dtype"]).itemsize * int(np.prod(about["shape"]))
    step = max(1, min(_ROWS, _BYTES // max(size, 1)))
    threads = os.cpu_count() or 1
    bar = keras.utils.Progbar(total, unit_name="sample") if verbose else None
    # Written, not mapped: a full disk is an error then, and does not kill the process.
    with (
        open(path / "images.npy", "r+b") as file,
        ThreadPoolExecutor(threads) as pool,
    ):
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        file.truncate(file.seek(rows * size, os.SEEK_CUR))
        saved = time.monotonic()
        while rows < total:
            block = np.arange(rows, min(rows + step, total))
            parts = [part for part in np.array_split(block, threads) if len(part)]
            for part, images in zip(parts, pool.map(source.take, parts), strict=True):
                if images.nbytes != len(part) * size or images.dtype != about["dtype"]:
                    raise ValueError(
                        message(
                            "source",
                            f"samples of shape {tuple(about['shape'])} and dtype "
                            f"{about['dtype']} in rows {part[0]} ... {part[-1]}",
                            images,
                        )
                    )
                file.write(np.ascontiguousarray(images).data)
            rows += len(block)
            if rows == total or time.monotonic() - saved >= _SECONDS:
                file.flush()
                os.fsync(file.fileno())
                _write_header(path, about, rows)
                saved = time.monotonic()
            if bar is not None:
                bar.update(rows)
