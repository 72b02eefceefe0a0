"""Images straight from a zip archive."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from kerastrip import _checks
from kerastrip._files import refuse_devices
from kerastrip.sources._listing import is_image, labelled_images
from kerastrip.sources.decoding import MAX_PIXELS, check_bytes, check_head
from kerastrip.sources.images import ImageFiles, is_wrong_with_file

__all__ = [
    "ZipImages",
]

_STORED_OR_DEFLATED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# A few bytes may unpack to gigabytes. The first `_HEAD` bytes of a member over `_LARGE`
# bytes are checked before the rest is unpacked.
_LARGE, _HEAD = 1 << 20, 1 << 16


def ZipImages(
    path: str | os.PathLike[str],
    *,
    size: int | tuple[int, int],
    label_from: str | Callable[[str], Any] | None = None,
    color: str = "rgb",
    cache: str | os.PathLike[str] | None = None,
    on_error: str = "raise",
    bits: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> ImageFiles:
    """The images of a zip archive that holds one folder for each class.

    Nothing is unpacked to disk. The table of contents is read once. After that each image
    opens the archive again, so that threads and processes share nothing. Each image is
    compared with its checksum in the archive.

    Folders are read as by `ImageFolder`, with one difference: if one outermost folder
    holds all the others, as in most archives, it is left out of the paths.

    Args:
        path: the archive. Members are stored or deflated, not encrypted.
        size: (height, width) of the rows, or one integer for both.
        label_from: None (default), "parent", "top", "path" or a callable, as for
            `ImageFolder`.
        color: "rgb" (default) or "gray".
        cache: None (default), "memory" or a path, as for `ImageFiles`.
        on_error: "raise" (default) or "skip", as for `ImageFiles`.
        bits: None (default) or 9 ... 16, as for `ImageFiles`.
        max_pixels: the largest image that is decoded, as for `ImageFiles`. A member
            that is larger than such an image is not unpacked, and no member is unpacked
            beyond the size that the archive names.

    Returns:
        `ImageFiles` with `labels`; its `paths` are "archive/member".

    Raises:
        TypeError, ValueError: the file is no zip archive, or packed in a way that is not
            read here, or as `ImageFolder`.

    Example:
        >>> import pathlib, tempfile, zipfile
        >>> import cv2, numpy as np
        >>> png = cv2.imencode(".png", np.zeros((9, 9, 3), "uint8"))[1].tobytes()
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "letters.zip"
        >>> with zipfile.ZipFile(path, "w") as archive:
        ...     for name in ("Greek/alpha/1.png", "Latin/alpha/1.png"):
        ...         archive.writestr(f"letters/{name}", png)
        >>> ZipImages(path, size=8, label_from="path").labels.tolist()
        ['Greek/alpha', 'Latin/alpha']
    """
    limit = _checks.integer("max_pixels", max_pixels, 1)
    archive = _Archive(os.fspath(path), limit)
    # Some Windows programs write "\" between the parts, against the specification.
    members = {name.replace("\\", "/"): name for name in archive.members}
    names = {name for name in members if not name.startswith("__MACOSX/")}
    images = [name for name in names if is_image(name)]
    root = images[0].split("/")[0] + "/" if images else ""
    if not all(name.startswith(root) and name.count("/") > 1 for name in images):
        root = ""
    inner, labels = labelled_images(
        "path", [name.removeprefix(root) for name in images], label_from
    )
    chosen = [members[root + name] for name in inner]
    archive.check(chosen)
    return ImageFiles(
        [f"{archive.path}/{name}" for name in chosen],
        labels,
        size=size,
        color=color,
        cache=cache,
        on_error=on_error,
        read=archive,
        bits=bits,
        max_pixels=max_pixels,
    )


class _Archive:
    """Reads members by "archive/member", from any thread or process."""

    thread_safe = True  # each call opens the archive for itself

    def __init__(self, path: str, max_pixels: int):
        self.path, self._max_pixels = path, max_pixels
        refuse_devices("path", path)
        try:
            with zipfile.ZipFile(path) as archive:
                self.members = {
                    info.filename: info
                    for info in archive.infolist()
                    if not info.is_dir()
                }
        except Exception as error:
            # zipfile raises errors of a dozen kinds for a damaged table. Other errors are
            # of the disk or the memory, and say nothing about the archive.
            may_pass = isinstance(error, OSError) and not is_wrong_with_file(error)
            if may_pass or isinstance(error, MemoryError):
                raise
            words = _checks.message("path", "a zip archive", path, f"{error}.")
            raise ValueError(words) from error

    def check(self, names: Sequence[str]) -> None:
        """Forgets all other members; ValueError if one of these cannot be unpacked."""
        self.members = {name: self.members[name] for name in names}
        for name, info in self.members.items():
            encrypted = info.flag_bits & 1
            if encrypted or info.compress_type not in _STORED_OR_DEFLATED:
                way = "encrypted" if encrypted else f"method {info.compress_type}"
                expected = "an archive of stored or deflated members"
                received = _checks.Told(f"{name!r} ({way})")
                raise _checks.value_error("path", expected, received, "Pack it anew.")

    def stamps(self, paths: Sequence[str]) -> list[tuple[int, int]]:
        """(size, checksum) of the members, from the table of contents."""
        infos = [self.members[path[len(self.path) + 1 :]] for path in paths]
        # A damaged table may tell of more bytes than int64 holds.
        return [(min(info.file_size, 2**63 - 1), info.CRC) for info in infos]

    def __call__(self, path: str) -> bytes:
        info = self.members[path[len(self.path) + 1 :]]
        size = info.file_size
        check_bytes(size, self._max_pixels)
        with open(self.path, "rb") as file:
            ends = info.header_offset + 30 + info.compress_size
            if info.header_offset < 0 or ends > os.fstat(file.fileno()).st_size:
                raise ValueError("the archive is damaged: it ends before the member")
            file.seek(info.header_offset)
            header = file.read(30)
            if header[:4] != b"PK\x03\x04":
                raise ValueError("the archive is damaged: no member begins there")
            file.seek(sum(struct.unpack("<2H", header[26:30])), os.SEEK_CUR)
            data = file.read(info.compress_size)
        if info.compress_type == zipfile.ZIP_DEFLATED:
            if size > _LARGE:
                check_head(_inflated(data, _HEAD), self._max_pixels)
            # One byte too many is enough to see that more would come.
            data = _inflated(data, size + 1)
        if len(data) != size:
            amount = "more" if len(data) > size else "fewer"
            raise ValueError(
                "the archive is damaged: the member should have "
                f"{size:,} bytes, but there are {amount}"
            )
        if zlib.crc32(data) != info.CRC:
            raise ValueError("the archive is damaged: wrong checksum")
        return data


def _inflated(data: bytes, most: int) -> bytes:
    """The first `most` bytes of a deflated member."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, most)
    except zlib.error as error:
        raise ValueError(f"the archive is damaged: {error}") from error
