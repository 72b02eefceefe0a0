"""Image files as a source: read, decoded and resized when they are asked for.

`ImageFiles` takes a list of paths, `ImageFolder` a folder of class folders. Images
in an archive are in `kerastrip.sources.archives`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from kerastrip import _checks
from kerastrip._labels import label_array
from kerastrip.sources._listing import files_below, labelled_images
from kerastrip.sources._turns import alone
from kerastrip.sources.arrays import BrokenSamples
from kerastrip.sources.decoding import (
    CHANNELS,
    MAX_PIXELS,
    check_ways,
    checked_reading,
    checked_size,
    read_file,
)
from kerastrip.sources.decoding import (
    decode_image as decode_image,
)  # where it was in version 0.1

__all__ = [
    "ImageFiles",
    "ImageFolder",
    "is_wrong_with_file",
]

_ON_ERROR = ("raise", "skip")
# Errors of the system that say something about a file, and not about the moment.
_OF_THE_FILE = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)


class ImageFiles:
    """Images in files, decoded with OpenCV: (height, width, channels) uint8 rows.

    A file is read when a batch asks for it, in the thread or process that makes the
    batch. The content decides on the format, not the ending of the name. Each image is

    - decoded to 8 bits per channel: the upper 8 of 16 bits, see `bits`. A large JPEG is
      decoded at 1/2, 1/4 or 1/8 of its size, if its shorter side then still has the
      pixels of the longer side of `size`. That is faster, and changes pixels by a few
      grey levels;
    - turned upright as its EXIF orientation says (JPEG, PNG, TIFF, WebP);
    - resized to `size`: averaging pixels where it shrinks, bilinear where it grows. The
      aspect ratio is not kept;
    - put in the order red, green, blue. Transparency is dropped, unless the whole image
      has one colour: then it is painted in that colour on white paper (on black paper if
      the colour is light). An animation gives its first image.

    `read_image` does the same with one new image.

    With `on_error="skip"` a `PKSampler` draws another sample of the class in place
    of a missing or broken sample: batches stay P x K and a pure function of
    (seed, epoch, step). The sampler warns once; `sampler.broken` names the broken samples
    and `sampler.report()` counts them. `embed`, evaluation and a cache file need every
    sample in order, and raise the error all the same: leave out the samples that
    `find_broken()` finds, with `Subset`. An image is broken if its file is gone, empty,
    damaged or too large. If the system is short of memory or of file handles, if a disk or
    network fails or a permission is missing, the error is raised whatever `on_error` says,
    because the image may be whole.

    Args:
        paths: paths of the files, in the order of the rows.
        labels: one per path, as for `PKSampler`. Default None.
        size: (height, width) of the rows, or one integer for both.
        color: "rgb" (default) or "gray".
        cache: where decoded images are kept. None (default): nowhere. "memory": in
            an array that fills up as images are read. Threads share the array, each
            process has its own, and a file that changes afterwards is not read again. A
            path: in the cache of `kerastrip.cache_images`, which is written now, or used
            if it is there; processes share it.
        on_error: what a missing or broken file does: "raise" (default) or "skip".
        read: function path -> bytes, if the images are not in files; picklable for
            processes that are spawned. A ValueError, a FileNotFoundError or an OSError
            without a number says that an image is broken; other errors are raised. Threads
            call it one at a time, unless it has an attribute `thread_safe = True`.
            Default None: the file is read.
        bits: how many bits of a file with 16 per channel hold the image: 12 in
            many X-ray and microscope images. Default None: 16, but a file whose
            upper four bits are empty is an error, because it would come out black.
        max_pixels: the largest image, height x width, that is decoded; checked before
            memory is taken for it. A larger image counts as broken. Default 200 million
            pixels, as many as the largest phone cameras have.
        reduce, resize, turn: the one way there is, as for `read_image`. They are
            arguments so that the `reading` of another source can be passed on:
            `ImageFiles(paths, **photos.reading)`.

    Attributes:
        paths: list of the paths, as text.
        labels: array of the labels, or None.
        reading: how images are read, as a dict that goes to JSON beside the model and
            to `read_image`.

    Raises:
        TypeError, ValueError: an argument does not work, or a file is missing (with
            `on_error="raise"`).

    Example:
        >>> import pathlib, tempfile
        >>> import cv2, numpy as np
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("a.png", "b.png"):
        ...     done = cv2.imwrite(str(folder / name), np.zeros((90, 60, 3), "uint8"))
        >>> images = ImageFiles(sorted(folder.iterdir()), ["cat", "dog"], size=(48, 32))
        >>> images.take([1, 0, 1]).shape
        (3, 48, 32, 3)
    """

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str]],
        labels: Any = None,
        *,
        size: int | tuple[int, int],
        color: str = "rgb",
        cache: str | os.PathLike[str] | None = None,
        on_error: str = "raise",
        read: Callable[[str], bytes] | None = None,
        bits: int | None = None,
        max_pixels: int = MAX_PIXELS,
        reduce: str = "auto",
        resize: str = "stretch",
        turn: str = "exif",
    ):
        if isinstance(paths, (str, bytes, os.PathLike)):
            advice = "ImageFolder(directory) reads a folder of class folders."
            raise _checks.type_error("paths", "a list of paths", paths, advice)
        self.paths = [os.fspath(path) for path in paths]
        if not self.paths:
            raise _checks.value_error("paths", "at least one path", self.paths)
        self.labels = None if labels is None else label_array(labels)
        if self.labels is not None and len(self.labels) != len(self.paths):
            expected = f"{len(self.paths)} labels, one per path"
            raise _checks.value_error("labels", expected, self.labels)
        check_ways(reduce, resize, turn)
        self._reading = checked_reading(checked_size(size), color, bits, max_pixels)
        self.reading = self._reading.as_dict()
        self._skip = _checks.one_of("on_error", on_error, _ON_ERROR) == "skip"
        if read is None and not self._skip:
            _check_files(self.paths)
        # A function of the user may keep a file open, so threads take turns in it.
        self._own = read not in (None, read_file)
        own = partial(read_file, max_pixels=self._reading.max_pixels)
        self._read: Callable[[str], bytes] = alone(read) if read and self._own else own
        self._memory: _Memory | None = None
        self._file: Any = None
        if cache == "memory":
            self._memory = _Memory((len(self.paths), *self._shape))
        elif cache is not None:
            from kerastrip.sources.cache import cache_images

            self._file = cache_images(self, cache)

    @property
    def _shape(self) -> tuple[int, int, int]:
        height, width = self.reading["size"]
        return height, width, CHANNELS[self._reading.color]

    def __len__(self) -> int:
        return len(self.paths)

    def stamps(self) -> np.ndarray | None:
        """(n, 2) int64 array that shows which files have changed.

        A row holds the size of a file in bytes and the time of its last change in
        nanoseconds; for a member of an archive its size and checksum; -1 where there is no
        file. None if `read` is a function of your own.
        """
        tell = getattr(self._read, "stamps", None)
        if tell is not None:
            return np.array(tell(self.paths), np.int64)
        return None if self._own else np.array([*map(_stamp, self.paths)], np.int64)

    def take(self, indices: Any) -> np.ndarray:
        """(len(indices), height, width, channels) uint8, in the order of `indices`.

        Raises:
            BrokenSamples: images are missing or broken; the error names them.
        """
        if self._file is not None:
            return self._file.take(indices)
        rows = np.asarray(indices).tolist()
        images = np.empty((len(rows), *self._shape), np.uint8)
        # A small class repeats its samples in a batch: each is read once, then copied.
        first: dict[int, int] = {}  # row -> its first place in the batch
        broken = {}
        for place, row in enumerate(rows):
            if row in first:
                images[place] = images[first[row]]
            elif why := self._load(row, images[place]):
                broken[row] = why
                # A sampler that skips needs all broken images of the batch at once. For
                # an error the first one is enough.
                if not self._skip:
                    break
            first.setdefault(row, place)
        if broken:
            raise BrokenSamples(broken, skip=self._skip)
        return images

    def _load(self, row: int, out: np.ndarray) -> str:
        """Writes an image into `out`; returns what is wrong with the image, or ""."""
        memory = self._memory
        if memory is not None and memory.filled[row]:
            out[...] = memory.rows[row]
            return ""
        path = self.paths[row]
        try:
            out[...] = self._reading.decode(self._read(path))
        except (OSError, ValueError) as error:
            if not is_wrong_with_file(error):
                raise
            why = getattr(error, "strerror", None) or str(error)
            return f"{path!r}: {why}"
        if memory is not None:
            memory.rows[row] = out
            # The mark comes last: other threads read a row as soon as it is marked.
            memory.filled[row] = True
        return ""

    def find_broken(self) -> dict[int, str]:
        """Reads every image: row -> what is wrong, for all broken images."""

        def load(row: int) -> str:
            return self._load(row, np.empty(self._shape, np.uint8))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            reasons = enumerate(pool.map(load, range(len(self))))
            return {row: why for row, why in reasons if why}

    def __repr__(self) -> str:
        height, width, _ = self._shape
        words = f"{len(self)} images, {height}x{width} {self._reading.color}"
        if self.labels is not None:
            words += f", {len(np.unique(self.labels))} classes"
        return f"ImageFiles({words})"


def _check_files(paths: Sequence[str]) -> None:
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        advice = (
            f"{len(missing)} of {len(paths)} are not there. on_error='skip' draws "
            "others of their class."
        )
        raise _checks.value_error("paths", "paths of files", missing[0], advice)


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        if not is_wrong_with_file(error):
            raise
        return -1, -1
    return status.st_size, status.st_mtime_ns


def is_wrong_with_file(error: Exception) -> bool:
    """Whether an error in reading an image means that the image is broken, for good.

    Other errors may pass: no file handle or memory is left, a disk or a network fails, a
    permission is missing. For these errors the image must not be left out.
    """
    if not isinstance(error, OSError):
        return isinstance(error, ValueError)
    if error.errno is None:  # made by a program, such as the `read` of a user
        return type(error) in (OSError, FileNotFoundError)
    return error.errno in _OF_THE_FILE


class _Memory:
    """An array of decoded images, and which rows of it are filled.

    The system gives memory to a page of the array when the page is first written. A copy
    made by pickle is empty.
    """

    def __init__(self, shape: Sequence[int]):
        self.rows = np.empty(shape, np.uint8)
        self.filled = np.zeros(shape[0], bool)

    def __reduce__(self) -> tuple:
        return _Memory, (self.rows.shape,)


def ImageFolder(
    directory: str | os.PathLike[str],
    *,
    size: int | tuple[int, int],
    label_from: str | Callable[[str], Any] | None = None,
    color: str = "rgb",
    cache: str | os.PathLike[str] | None = None,
    on_error: str = "raise",
    bits: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> ImageFiles:
    """The images of a folder that holds one folder for each class.

        photos/cat/01.jpg, photos/cat/02.jpg, photos/dog/01.jpg, ...

    Files are found at any depth by the ending of their name, in any case: bmp, dib,
    jfif, jpe, jpeg, jpg, pbm, pgm, png, pnm, ppm, tif, tiff, webp, and where OpenCV was
    built with these, avif, gif, j2k, jp2. Names that begin with a dot are left out.
    Links are followed, but every file comes once: a link to a file or folder that is
    there already, or to a folder above, is left out. One warning names the files that were
    left out though they may be images. Rows are sorted by path.

    Args:
        directory: the folder.
        size: (height, width) of the rows, or one integer for both.
        label_from: what the class of an image is. None (default): the name of its
            folder; folders within class folders are an error, because their meaning is
            not known. "parent": the name of the folder that holds the image; folders of
            one name in several places are one class. "top": the name of the
            outermost folder. "path": all folders, as in "Greek/character01". A
            callable: relative path ("Greek/character01/0394_01.png") -> label, or
            None to leave the image out.
        color: "rgb" (default) or "gray".
        cache: None (default), "memory" or a path, as for `ImageFiles`.
        on_error: "raise" (default) or "skip", as for `ImageFiles`.
        bits: None (default) or 9 ... 16, as for `ImageFiles`.
        max_pixels: the largest image that is decoded, as for `ImageFiles`.

    Returns:
        `ImageFiles` with `labels`.

    Raises:
        TypeError, ValueError: if there is no such folder, no image in it, an image
            outside of the class folders, or fewer than two classes.

    Example:
        >>> import pathlib, tempfile
        >>> import cv2, numpy as np
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        ...     (folder / name).parent.mkdir(exist_ok=True)
        ...     done = cv2.imwrite(str(folder / name), np.zeros((9, 9, 3), "uint8"))
        >>> ImageFolder(folder, size=8).labels.tolist()
        ['cat', 'cat', 'dog']
    """
    root = os.fspath(directory)
    if not os.path.isdir(root):
        raise _checks.value_error("directory", "a folder", directory)
    names, notes = files_below(root)
    names, labels = labelled_images("directory", names, label_from, notes)
    return ImageFiles(
        [os.path.join(root, *name.split("/")) for name in names],
        labels,
        size=size,
        color=color,
        cache=cache,
        on_error=on_error,
        read=read_file,  # so that `ImageFiles` does not look for the files once more
        bits=bits,
        max_pixels=max_pixels,
    )
