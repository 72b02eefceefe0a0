"""What the first bytes of an encoded image say about it, before it is decoded.

An image of 30,000 x 30,000 pixels fits into a PNG of 100 kB and takes gigabytes when it
is decoded, so the size is read here first. If a file names several sizes, the largest
counts, because decoders differ in the size that they believe.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Header(NamedTuple):
    """Height and width in pixels, and what else is needed to decode the image.

    `deep`: whether OpenCV returns values of 16 bits unchanged. `top`: the value of white,
    if the file names it (PGM, PPM). `least`: a file with fewer bytes is cut short.
    """

    height: int
    width: int
    deep: bool = False
    top: int | None = None
    least: int = 0


def is_known(data: bytes) -> bool:
    """Whether the first bytes of a file are of one of the formats that are read."""
    return any(data.startswith(start, place) for start, place, _ in _FORMATS)


def read_header(data: bytes) -> Header | None:
    """The header of an encoded image; None if the format is not read, or it is damaged."""
    for start, place, parse in _FORMATS:
        if data.startswith(start, place):
            try:
                return parse(data)
            except (struct.error, IndexError, KeyError, ValueError):
                return None
    return None


def _png(data: bytes) -> Header:
    """A chain of chunks: a length, four letters, the content, and a checksum."""
    width, height = struct.unpack_from(">II", data, 16)
    offset, kind = 8, b""
    while offset + 8 <= len(data) and kind != b"IEND":
        kind = data[offset + 4 : offset + 8]
        # OpenCV takes memory for a chunk before it looks whether the file is long enough.
        # So the length of the file is compared with all the lengths in it (`least`).
        offset += 12 + int.from_bytes(data[offset : offset + 4], "big")
    return Header(height, width, deep=True, least=offset)


def _jpeg(data: bytes) -> Header | None:
    """A chain of segments: a marker (0xFF and a byte), a length, and what it says.

    FF D8 | FF E1 length ... | FF C0 length bits height width ... | ... | FF D9
    begin | EXIF             | the frame                                | end
    """
    offset = data.find(b"\xff", 2)
    while offset >= 0 and offset + 9 <= len(data):
        marker = data[offset + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, offset + 5)
            # Huffman codes (FF C0 to C2) need at least a bit for each block of 8 x 8.
            least = height // 8 * (width // 8) // 8 if marker <= 0xC2 else 0
            # A file that was cut short has no end marker, and coded data cannot hold one
            # by chance: there, a 0 follows each FF.
            if data.rfind(b"\xff\xd9", offset) < 0:
                least = len(data) + 1
            return Header(height, width, least=least)
        if marker == 0xFF:  # filling
            offset += 1
        else:
            alone = marker in (0, 1) or 0xD0 <= marker <= 0xD9
            length = (
                0 if alone else int.from_bytes(data[offset + 2 : offset + 4], "big")
            )
            offset = data.find(b"\xff", offset + 2 + length)
    return None


def _gif(data: bytes) -> Header:
    width, height = struct.unpack_from("<HH", data, 6)
    return Header(height, width)


def _bmp(data: bytes) -> Header:
    if data[14] == 12:  # of OS/2
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return Header(abs(height), abs(width))


def _webp(data: bytes) -> Header:
    kind = data[12:16]
    if kind == b"VP8X":
        sides = [
            int.from_bytes(data[offset : offset + 3], "little") + 1
            for offset in (24, 27)
        ]
        return Header(sides[1], sides[0])
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return Header((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    width, height = struct.unpack_from("<HH", data, 26)
    return Header(height & 0x3FFF, width & 0x3FFF)


def _tiff(data: bytes) -> Header:
    """The first directory: entries of a tag, a type, a count and a value."""
    order = "<" if data.startswith(b"I") else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    (offset,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, offset)
    offset, step, value = (offset + 8, 20, 12) if big else (offset + 2, 12, 8)
    sides: dict[int, int] = {}
    for entry in range(offset, min(offset + count * step, len(data)), step):
        tag, kind = struct.unpack_from(order + "HH", data, entry)
        if tag in _TIFF_SIDES and kind in _TIFF_INTEGERS:
            (side,) = struct.unpack_from(
                order + _TIFF_INTEGERS[kind], data, entry + value
            )
            sides[tag] = max(side, sides.get(tag, 0))
    width, height, *tile = (sides.get(tag, 0) for tag in _TIFF_SIDES)
    if width * height < tile[0] * tile[1]:  # a tile is decoded as a whole
        width, height = tile
    return Header(height, width, deep=True)


_TIFF_SIDES = (256, 257, 322, 323)  # width and height, of the image and of a tile
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}


def _pixels(header: Header) -> int:
    return header.height * header.width


def _places(data: bytes, word: bytes) -> Iterator[int]:
    offset = data.find(word)
    while offset >= 0:
        yield offset + len(word)
        offset = data.find(word, offset + 1)


def _jpeg2000(data: bytes) -> Header:
    """The segment SIZ: where the image ends and begins on a grid, and its bits."""
    headers = []
    for offset in _places(data, b"\xff\x4f\xff\x51"):
        right, bottom, left, top = struct.unpack_from(">4I", data, offset + 4)
        # OpenCV scales 9 to 15 bits to 8 bits by itself.
        deep = data[offset + 38] & 127 == 15
        headers.append(Header(bottom - top, right - left, deep=deep))
    return max(headers, key=_pixels)


def _avif(data: bytes) -> Header:
    """The property `ispe` of each image in the file: version, width, height."""
    meta = data[: data.find(b"mdat")] if b"mdat" in data else data
    sides = [
        struct.unpack_from(">II", meta, offset + 4) for offset in _places(meta, b"ispe")
    ]
    return max((Header(height, width) for width, height in sides), key=_pixels)


def _netpbm(data: bytes) -> Header:
    """Words between white space: `P5`, width, height, the value of white."""
    if data.startswith(b"P7"):
        head = data[: data.find(b"ENDHDR")].splitlines()
        named = dict(line.split()[:2] for line in head if len(line.split()) > 1)
        height, width = int(named[b"HEIGHT"]), int(named[b"WIDTH"])
        return Header(height, width, True, int(named[b"MAXVAL"]))
    needed = 2 if data[1:2] in b"14" else 3  # black and white have no value of white
    words: list[bytes] = []
    for line in data[2:4096].splitlines():
        words += line.partition(b"#")[0].split()
        if len(words) >= needed:
            break
    width, height, *top = (int(word) for word in words[:needed])
    # OpenCV scales values that are written as text by itself.
    if data[1:2] in b"23" and top[0] < 256:
        top = []
    return Header(height, width, True, *top)


def _raster(data: bytes) -> Header:
    width, height = struct.unpack_from(">II", data, 4)
    return Header(height, width)


_FORMATS: list[tuple[bytes, int, Callable[[bytes], Header | None]]] = [
    (b"\xff\xd8", 0, _jpeg),
    (b"\x89PNG\r\n\x1a\n", 0, _png),
    (b"GIF8", 0, _gif),
    (b"BM", 0, _bmp),
    (b"WEBP", 8, _webp),
    *((start, 0, _tiff) for start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    (b"\0\0\0\x0cjP  \r\n\x87\n", 0, _jpeg2000),
    (b"\xff\x4f\xff\x51", 0, _jpeg2000),
    *((b"ftyp" + kind, 4, _avif) for kind in (b"avif", b"avis", b"mif1", b"miaf")),
    *((b"P%d" % kind, 0, _netpbm) for kind in range(1, 8)),
    (b"\x59\xa6\x6a\x95", 0, _raster),
]
