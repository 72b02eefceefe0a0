"""One encoded image as an array: the rule by which every image is read.

    bytes -> header checked -> decoded -> 8 bits per channel -> resized -> RGB or gray

The rule is part of a model that was trained with it. `read_image` applies the rule to one
new image, with the `reading` of the source that the model was trained on.
"""

from __future__ import annotations

import os
import stat
from typing import Any, NamedTuple

import numpy as np

from kerastrip import _checks
from kerastrip.sources._headers import Header, is_known, read_header

__all__ = [
    "CHANNELS",
    "MAX_PIXELS",
    "Reading",
    "check_bytes",
    "check_head",
    "check_ways",
    "checked_reading",
    "checked_size",
    "decode_image",
    "read_file",
    "read_image",
]

CHANNELS = {"rgb": 3, "gray": 1}
MAX_PIXELS = 200_000_000
# A `reading` names these ways, though there is one of each: a stored `reading` stays
# complete if a later version has more ways.
_WAYS = {"reduce": ("auto",), "resize": ("stretch",), "turn": ("exif",)}
_DAMAGED = (
    "it is cut short, damaged, or no image that is read here (AVIF, BMP, GIF, JPEG, "
    "JPEG 2000, PGM, PNG, PPM, TIFF, WebP)"
)
_BYTES_PER_PIXEL = 8  # four channels of 16 bits, not compressed
_BINARY, _NOT_TO_WAIT = getattr(os, "O_BINARY", 0), getattr(os, "O_NONBLOCK", 0)


def read_image(
    image: str | os.PathLike[str] | bytes,
    *,
    size: int | tuple[int, int],
    color: str = "rgb",
    bits: int | None = None,
    max_pixels: int = MAX_PIXELS,
    reduce: str = "auto",
    resize: str = "stretch",
    turn: str = "exif",
) -> np.ndarray:
    """One image as the sources read it: (height, width, channels) uint8.

    How images were resized and turned is part of a model: an embedding moves when the
    same photograph is resized another way. So store `reading` of the source beside the
    model, and give it here.

    Args:
        image: path of the file, or its bytes.
        size: (height, width) of the result, or one integer for both.
        color: "rgb" (default) or "gray".
        bits: None (default) or 9 ... 16, as for `ImageFiles`.
        max_pixels: the largest image that is decoded, as for `ImageFiles`.
        reduce: "auto", the one way there is: a large JPEG may be decoded at a
            fraction of its size, as by `ImageFiles`.
        resize: "stretch", the one way there is: the whole image goes to `size`,
            pixels are averaged where it shrinks, and bilinear where it grows.
        turn: "exif", the one way there is: upright, as the EXIF orientation says.

    Returns:
        The array.

    Raises:
        TypeError, ValueError: for arguments that do not work, or if the image is
            damaged or too large.
        OSError: the file cannot be read.

    Example:
        >>> import json, pathlib, tempfile
        >>> import cv2, numpy as np
        >>> from kerastrip.sources import ImageFiles
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.png"
        >>> done = cv2.imwrite(str(path), np.zeros((90, 60, 3), "uint8"))
        >>> text = json.dumps(ImageFiles([path], size=(48, 32)).reading)
        >>> read_image(path, **json.loads(text)).shape
        (48, 32, 3)
    """
    check_ways(reduce, resize, turn)
    reading = checked_reading(checked_size(size), color, bits, max_pixels)
    name, data = "its bytes", image
    if not isinstance(data, bytes):
        path = os.fspath(data)
        name, data = repr(path), read_file(path, reading.max_pixels)
    try:
        return reading.decode(data)
    except ValueError as error:
        raise ValueError(f"The image cannot be read from {name}: {error}") from error


class Reading(NamedTuple):
    """How a source reads every image: arguments that have been checked.

    Attributes:
        size: (height, width) of the results, or None: each image keeps its size.
        color: "rgb" or "gray".
        bits: how many bits of 16 hold the image, or None.
        max_pixels: the largest image that is decoded.
    """

    size: tuple[int, int] | None
    color: str
    bits: int | None
    max_pixels: int

    def decode(self, data: bytes) -> np.ndarray:
        """An encoded image as `decode_image` reads it."""
        return decode_image(data, **self._asdict())

    def as_dict(self) -> dict[str, Any]:
        """The arguments of `read_image`, as a dict that can be written as JSON."""
        ways = {name: way for name, (way,) in _WAYS.items()}
        size = self.size and list(self.size)
        return {"size": size, "color": self.color, "bits": self.bits, **ways}


def checked_reading(
    size: tuple[int, int] | None, color: Any, bits: Any, max_pixels: Any
) -> Reading:
    """The `Reading` of arguments that are checked here; `size` is checked already."""
    _checks.one_of("color", color, tuple(CHANNELS))
    if bits is not None and _checks.integer("bits", bits, 9) > 16:
        raise _checks.value_error("bits", "None or an integer from 9 to 16", bits)
    limit = _checks.integer("max_pixels", max_pixels, 1)
    return Reading(size, color, bits, limit)


def checked_size(size: Any) -> tuple[int, int]:
    """(height, width) of the argument `size`: a pair, or one integer for both."""
    if isinstance(size, (tuple, list)) and len(size) == 2:
        height, width = (_checks.integer("size", side, 1) for side in size)
        return height, width
    advice = "(height, width) is two of them."
    side = _checks.integer("size", size, 1, advice)
    return side, side


def check_ways(reduce: str, resize: str, turn: str) -> None:
    """ValueError if a stored `reading` names a way that this version does not know."""
    for name, way in (("reduce", reduce), ("resize", resize), ("turn", turn)):
        _checks.one_of(name, way, _WAYS[name])


def read_file(path: str, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of a file; ValueError if it is no file, or too large for an image.

    Args:
        path: the file.
        max_pixels: the largest image that shall be decoded.

    Returns:
        The bytes.
    """
    # Without this flag, to open a pipe would last until somebody writes into it.
    handle = os.open(path, os.O_RDONLY | _BINARY | _NOT_TO_WAIT)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            folder = stat.S_ISDIR(status.st_mode)
            raise ValueError(f"it is a {'directory' if folder else 'pipe or device'}")
        check_bytes(status.st_size, max_pixels)
        data = os.read(handle, status.st_size)
        # The system may return fewer bytes than asked for.
        while len(data) < status.st_size and (more := os.read(handle, 1 << 26)):
            data += more
        return data
    finally:
        os.close(handle)


def check_bytes(size: int, max_pixels: int) -> None:
    """ValueError if a file is larger than an image of `max_pixels` can be."""
    limit = max_pixels * _BYTES_PER_PIXEL + (1 << 20)
    if size > limit:
        raise ValueError(
            f"its {size:,} bytes are more than an image of max_pixels={max_pixels:,} "
            f"takes ({limit:,})"
        )


def check_head(head: bytes, max_pixels: int) -> None:
    """ValueError if the first bytes of a file are not of an image, or it is too large.

    Args:
        head: the first bytes. If they do not hold the size yet, it is not checked.
        max_pixels: the largest image that is decoded.
    """
    if not is_known(head):
        raise ValueError(_DAMAGED)
    if header := read_header(head):
        _check_pixels(header, max_pixels)


def decode_image(
    data: bytes,
    size: tuple[int, int] | None,
    *,
    color: str = "rgb",
    bits: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """An encoded image as (height, width, channels) uint8 array: see `ImageFiles`.

    Args:
        data: the bytes of the file.
        size: (height, width) of the result, or None: the image keeps its size.
        color: "rgb" (default) or "gray".
        bits: how many bits of files with 16 per channel hold the image.
        max_pixels: the largest image that is decoded.

    Returns:
        The array.

    Raises:
        ValueError: the image is damaged, too large, or in a format that is not read.
        MemoryError: the system has too little memory; the image may be whole.
    """
    import cv2

    data = data if isinstance(data, bytes) else bytes(memoryview(data))
    header = _checked_header(data, max_pixels)
    jpeg = data.startswith(b"\xff\xd8")
    # Only the decoder of JPEG can leave out pixels while it decodes.
    factor = _reduction(header, max(size)) if jpeg and size else 1
    kind = "GRAYSCALE" if color == "gray" else "COLOR"
    word = f"IMREAD_REDUCED_{kind}_{factor}" if factor > 1 else f"IMREAD_{kind}"
    flags = getattr(cv2, word) | (cv2.IMREAD_ANYDEPTH if header.deep else 0)
    image = _eight_bits(_decoded(data, flags, header), bits, header.top)
    # OpenCV drops transparency. An image in one colour, whose shapes are in the
    # transparency alone, would become empty.
    if not jpeg and _is_flat(image):
        image = _from_alpha(data, image)
    if size and image.shape[:2] != size:
        height, width = size
        shrinks = height < image.shape[0] or width < image.shape[1]
        way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        image = cv2.resize(image, (width, height), interpolation=way)
    if color == "gray":
        return image[..., None]
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _reduction(header: Header, least: int) -> int:
    """The fraction (1, 2, 4 or 8) that leaves both sides of a JPEG `least` pixels."""
    shorter = min(header.height, header.width)
    return next((n for n in (8, 4, 2) if shorter // n >= least), 1)


def _checked_header(data: bytes, max_pixels: int) -> Header:
    if not data:
        raise ValueError("the file is empty")
    header = read_header(data)
    if header is None or min(header.height, header.width) < 1:
        raise ValueError(_DAMAGED)
    _check_pixels(header, max_pixels)
    if len(data) < header.least:
        words = f"{header.height:,} x {header.width:,} pixels in {len(data):,} bytes"
        raise ValueError(f"it is cut short, or its header lies: {words}")
    return header


def _check_pixels(header: Header, max_pixels: int) -> None:
    if header.height * header.width > max_pixels:
        words = f"{header.height:,} x {header.width:,} pixels"
        raise ValueError(f"its {words} are more than max_pixels={max_pixels:,}")


def _decoded(data: bytes, flags: int, header: Header) -> np.ndarray:
    import cv2

    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError(str(error)) from error
        raise ValueError(f"OpenCV does not decode it: {error}") from error
    if image is None:
        # A decoder without memory returns None too. Then this line raises MemoryError.
        np.empty(header.height * header.width * _BYTES_PER_PIXEL, np.uint8)
        raise ValueError(_DAMAGED)
    return image


def _eight_bits(image: np.ndarray, bits: int | None, top: int | None) -> np.ndarray:
    """The values as uint8, where 255 is white.

    What white is depends on the format and the header, never on the pixels: all images of
    one kind are scaled alike.

    Args:
        image: the decoded values.
        bits: how many bits of 16 hold the image.
        top: the value of white, where the file names it.
    """
    if top is not None and top not in (255, 65535):  # a PGM file of 12 bits: 4095
        if not 0 < top < 65535:
            raise ValueError(_DAMAGED)
        wide = np.minimum(image, top).astype(np.uint32)
        return ((wide * 255 + top // 2) // top).astype(np.uint8)
    if image.dtype == np.uint8:
        return image
    if image.dtype != np.uint16:
        raise ValueError(f"its values are {image.dtype}, not of 8 or 16 bits")
    highest = int(image.max())
    if bits is None and 0 < highest < 4096:
        raise ValueError(
            f"its highest value is {highest} of 65535, so it would come out black: "
            "bits=12 says that these files hold 12 bits (or how many there are), "
            "bits=16 that they are as dark as that"
        )
    if highest >> (bits or 16):
        raise ValueError(
            f"its highest value, {highest}, has more than bits={bits} bits"
        )
    return (image >> ((bits or 16) - 8)).astype(np.uint8)


def _is_flat(image: np.ndarray) -> bool:
    """Whether all pixels are equal."""
    # The middle row and column first: in most images they differ already.
    pixel = image[0, 0].tobytes()
    for pixels in (image[image.shape[0] // 2], image[:, image.shape[1] // 2], image):
        values = pixels.tobytes()
        if values != pixel * (len(values) // len(pixel)):
            return False
    return True


def _from_alpha(data: bytes, image: np.ndarray) -> np.ndarray:
    """An image of one colour, painted on paper as its transparency says.

    The paper is white under a dark colour and black under a light colour. An image
    without transparency is returned as it is.
    """
    import cv2

    whole = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if whole is None or whole.ndim < 3 or whole.shape[2] < 4 or _is_flat(whole):
        return image
    alpha = whole[..., 3] / np.float32(255 if whole.dtype == np.uint8 else 65535)
    ink = image[0, 0].astype(np.float32)
    paper = 255 if ink.mean() < 128 else 0
    mixed = paper + (ink - paper) * (alpha if image.ndim == 2 else alpha[..., None])
    return np.rint(mixed).astype(np.uint8)
