"""Image files as a source: read, decoded and resized when they are asked for.

`ImageFiles` takes a list of paths, `ImageFolder` a folder of class folders. Images
in an archive are in `kerastrip.sources.archives`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from kerastrip import _checks
from kerastrip._checks import Told, message
from kerastrip.sources.arrays import BrokenSamples

EXTENSIONS = ("bmp", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
CHANNELS = {"rgb": 3, "gray": 1}
REDUCE = ("auto", "never")
ON_ERROR = ("raise", "skip")
LABEL_FROM = ("parent", "top", "path")


class ImageFiles:
    """Images in files, decoded with OpenCV: (height, width, channels) uint8 rows.

    Files are read when a batch asks for them, in the thread or process that does.
    What an image goes through: the bytes are decoded to 8 bits per channel (the upper
    ones of 16), turned upright as its EXIF orientation says, resized to `size`
    (averaging pixels where it shrinks, bilinear where it grows; the aspect ratio
    is not kept) and put in the order red, green, blue. Transparency is dropped.

    With `on_error="skip"` a `PKSampler` draws another sample of the class in place
    of one that is missing or broken: batches stay P x K and a pure function of
    (seed, epoch, step). It warns once; `sampler.broken` and `sampler.report()` tell.
    Whoever wants every sample in order (`embed`, evaluation, a cache file) gets the
    error all the same, because rows must line up: leave out what `find_broken()`
    finds, with `Subset`.

    Args:
        paths: paths of the files, in the order of the rows.
        labels: one per path, as for `PKSampler`. Default None.
        size: (height, width) of the rows, or one integer for both.
        color: "rgb" (default) or "gray".
        reduce: "auto": a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size as
            long as its shorter side remains at least the longer one of `size`,
            which is faster; pixels differ by a few grey levels. "never": always in
            full.
        cache: where decoded rows are kept. None (default): nowhere. "memory": in
            an array that fills up as they are read; threads share it, each process
            has its own. A path: in the file of `kerastrip.cache_images`, which is
            written now, or used if it is there; processes share it.
        on_error: what a missing or broken file does: "raise" (default) or "skip".
        read: function path -> bytes, if the images are not in files; picklable for
            processes that are spawned; an OSError or ValueError of it says that
            an image is broken. Default None: the file is read.

    Attributes:
        paths: list of the paths, as text.
        labels: array of the labels, or None.

    Raises:
        TypeError, ValueError: for arguments that do not work, a missing file
            (`on_error="raise"`) among them.

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
        reduce: str = "auto",
        cache: str | os.PathLike[str] | None = None,
        on_error: str = "raise",
        read: Callable[[str], bytes] | None = None,
    ):
        if isinstance(paths, (str, bytes, os.PathLike)):
            advice = "ImageFolder(directory) reads a folder of class folders."
            raise TypeError(message("paths", "a list of paths", paths, advice))
        self.paths = [os.fspath(path) for path in paths]
        if not self.paths:
            raise ValueError(message("paths", "at least one path", self.paths))
        self.labels = None if labels is None else np.array(labels)
        if self.labels is not None and len(self.labels) != len(self.paths):
            expected = f"{len(self.paths)} labels, one per path"
            raise ValueError(message("labels", expected, self.labels))
        self._size = checked_size(size)
        self._color = _checks.one_of("color", color, tuple(CHANNELS))
        self._reduce = _checks.one_of("reduce", reduce, REDUCE) == "auto"
        self._skip = _checks.one_of("on_error", on_error, ON_ERROR) == "skip"
        if read is None and not self._skip:
            missing = [path for path in self.paths if not os.path.isfile(path)]
            if missing:
                raise ValueError(
                    message(
                        "paths",
                        "paths of files",
                        missing[0],
                        f"{len(missing)} of {len(self.paths)} are not there. "
                        "on_error='skip' draws others of their class.",
                    )
                )
        self._read = read or read_file
        self._memory: _Memory | None = None
        self._file: Any = None
        if cache == "memory":
            self._memory = _Memory((len(self.paths), *self._shape))
        elif cache is not None:
            from kerastrip.sources.cache import cache_images

            self._file = cache_images(self, cache)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (*self._size, CHANNELS[self._color])

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Any) -> np.ndarray:
        """(len(indices), height, width, channels) fresh uint8 array, in that order.

        Raises:
            BrokenSamples: if images are missing or broken; it names them.
        """
        if self._file is not None:
            return self._file.take(indices)
        rows = np.asarray(indices).tolist()
        images = np.empty((len(rows), *self._shape), np.uint8)
        first: dict[int, int] = {}
        broken = {}
        for place, row in enumerate(rows):
            if row in first:
                images[place] = images[first[row]]
            elif why := self._load(row, images[place]):
                broken[row] = why
                if not self._skip:
                    break
            first.setdefault(row, place)
        if broken:
            raise BrokenSamples(broken, skip=self._skip)
        return images

    def _load(self, row: int, out: np.ndarray) -> str:
        """Puts an image into `out`; what is wrong with it, if something is."""
        memory = self._memory
        if memory is not None and memory.filled[row]:
            out[...] = memory.rows[row]
            return ""
        try:
            data = self._read(self.paths[row])
            out[...] = decode_image(
                data, self._size, color=self._color, reduce=self._reduce
            )
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            return f"{self.paths[row]!r}: {why}"
        if memory is not None:
            memory.rows[row] = out
            memory.filled[row] = True  # last: others may read what is marked
        return ""

    def find_broken(self) -> dict[int, str]:
        """Reads every image: row -> what is wrong, for those that are broken."""

        def load(row: int) -> str:
            return self._load(row, np.empty(self._shape, np.uint8))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = enumerate(pool.map(load, range(len(self))))
            return {row: why for row, why in found if why}

    def __repr__(self) -> str:
        height, width, _ = self._shape
        told = f"{len(self)} images, {height}x{width} {self._color}"
        if self.labels is not None:
            told += f", {len(np.unique(self.labels))} classes"
        return f"ImageFiles({told})"


class _Memory:
    """Decoded rows and whether they are there. It is pickled without them.

    The system gives an array its pages when they are first written.
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
    reduce: str = "auto",
    cache: str | os.PathLike[str] | None = None,
    on_error: str = "raise",
) -> ImageFiles:
    """The images of a folder that holds one folder for each class.

        photos/cat/01.jpg, photos/cat/02.jpg, photos/dog/01.jpg, ...

    Files are found by their extension (bmp, jpeg, jpg, pgm, png, ppm, tif, tiff,
    webp, in any case), at any depth, through links; names that begin with a dot
    are left out. Rows are sorted by path.

    Args:
        directory: the folder.
        size: (height, width) of the rows, or one integer for both.
        label_from: what the class of an image is. None (default): the name of its
            folder; folders within class folders are an error, because what
            they mean is open. "parent": the name of the folder it lies in, equal
            ones of different places being one class. "top": the name of the
            outermost folder. "path": all folders, as in "Greek/character01". A
            callable relative path ("Greek/character01/0394_01.png") -> label, or
            None to leave the image out.
        color: "rgb" (default) or "gray".
        reduce: "auto" (default) or "never", as for `ImageFiles`.
        cache: None (default), "memory" or a path, as for `ImageFiles`.
        on_error: "raise" (default) or "skip", as for `ImageFiles`.

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
        raise ValueError(message("directory", "a folder", directory))
    names = []
    for parent, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        within = os.path.relpath(parent, root).replace(os.sep, "/")
        names += [name if within == "." else f"{within}/{name}" for name in files]
    names, labels = labelled_images("directory", names, label_from)
    return ImageFiles(
        [os.path.join(root, *name.split("/")) for name in names],
        labels,
        size=size,
        color=color,
        reduce=reduce,
        cache=cache,
        on_error=on_error,
        read=read_file,  # they were there a moment ago
    )


def labelled_images(
    name: str, paths: Iterable[str], label_from: Any
) -> tuple[list[str], np.ndarray]:
    """The images among `paths`, sorted, and their labels.

    Args:
        name: the argument that they come from, for errors.
        paths: relative paths, parts separated by "/".
        label_from: as for `ImageFolder`.

    Returns:
        Paths and labels.

    Raises:
        TypeError, ValueError: as `ImageFolder`.
    """
    if label_from is not None and not callable(label_from):
        _checks.one_of("label_from", label_from, LABEL_FROM)
    images = sorted(path for path in paths if is_image(path))
    if not images:
        told = f"images ({', '.join(EXTENSIONS)}) in class folders"
        raise ValueError(message(name, told, Told("none")))
    if callable(label_from):
        pairs = [(path, label_from(path)) for path in images]
        pairs = [(path, label) for path, label in pairs if label is not None]
        if not pairs:
            expected = "a label for some of the images"
            raise ValueError(message("label_from", expected, Told("None for all")))
        images, labels = [list(part) for part in zip(*pairs, strict=True)]
    else:
        labels = [_folder_label(name, path, label_from) for path in images]
    if len(set(labels)) < 2:
        raise ValueError(
            message(
                name,
                "at least two classes",
                Told(f"one, {labels[0]!r}, with {len(labels)} images"),
                "Give the folder above, or read images without classes with "
                "ImageFiles(paths).",
            )
        )
    return images, np.array(labels)


def _folder_label(name: str, path: str, word: str | None) -> str:
    *folders, _ = path.split("/")
    if not folders:
        raise ValueError(
            message(
                name,
                "every image in the folder of its class",
                path,
                "A callable label_from= makes labels of file names.",
            )
        )
    if word == "path":
        return "/".join(folders)
    if word is None and len(folders) > 1:
        raise ValueError(
            message(
                "label_from",
                "a word, as folders lie within folders",
                None,
                f"For {path!r} the class is {folders[-1]!r} with 'parent', "
                f"{folders[0]!r} with 'top', {'/'.join(folders)!r} with 'path'.",
            )
        )
    return folders[0] if word == "top" else folders[-1]


def is_image(path: str) -> bool:
    """Whether a path has the extension of an image and no hidden part."""
    hidden = any(part.startswith(".") for part in path.split("/"))
    return path.lower().rpartition(".")[2] in EXTENSIONS and not hidden


def read_file(path: str) -> bytes:
    """The bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


def decode_image(
    data: bytes,
    size: tuple[int, int] | None,
    *,
    color: str = "rgb",
    reduce: bool = True,
) -> np.ndarray:
    """An encoded image as (height, width, channels) uint8 array: see `ImageFiles`.

    Args:
        data: the bytes of the file.
        size: (height, width) of the result, or None for that of the image.
        color: "rgb" (default) or "gray".
        reduce: whether large JPEGs may be decoded at a fraction of their size.

    Returns:
        The array.

    Raises:
        ValueError: if OpenCV does not decode it.
    """
    import cv2

    if not data:
        raise ValueError("the file is empty")
    factor = _reduction(data, max(size)) if size and reduce else 1
    kind = "GRAYSCALE" if color == "gray" else "COLOR"
    flag = f"IMREAD_REDUCED_{kind}_{factor}" if factor > 1 else f"IMREAD_{kind}"
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), getattr(cv2, flag))
    except cv2.error as error:
        raise ValueError(f"OpenCV does not decode it: {error}") from error
    if image is None:
        raise ValueError("it is cut short, damaged, or no image that OpenCV decodes")
    if size and image.shape[:2] != size:
        height, width = size
        shrinks = height < image.shape[0] or width < image.shape[1]
        way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        image = cv2.resize(image, (width, height), interpolation=way)
    if color == "gray":
        return image[..., None]
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _reduction(data: bytes, least: int) -> int:
    """The fraction (1, 2, 4 or 8) that leaves both sides of a JPEG `least` pixels."""
    shorter = min(_jpeg_size(data))
    return next((n for n in (8, 4, 2) if shorter // n >= least), 1)


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Height and width from the header of a JPEG; (0, 0) for anything else.

    A header is a chain of segments: a marker (0xFF and a byte) and a length.
    """
    at = 2 if data.startswith(b"\xff\xd8") else len(data)
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return struct.unpack_from(">HH", data, at + 5)
        if marker == 0xFF:  # filling
            at += 1
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0, 0


def checked_size(size: Any) -> tuple[int, int]:
    """(height, width) of what `size=` got: such a pair, or one integer for both."""
    if isinstance(size, (tuple, list)) and len(size) == 2:
        height, width = (_checks.integer("size", side, 1) for side in size)
        return height, width
    advice = "(height, width) is two of them."
    side = _checks.integer("size", size, 1, advice)
    return side, side
