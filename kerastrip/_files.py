"""Files that a reader, or a run that was cut off, finds whole."""

from __future__ import annotations

import os
import pathlib
import secrets
from typing import Any

from kerastrip import _checks


def readable(value: Any) -> str:
    """A value as text that can be written and drawn.

    The name of a file that is not in UTF-8 has lone surrogates, which no encoding
    takes; they become escapes (`\\udce9`).
    """
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def refuse_devices(name: str, path: str | os.PathLike[str]) -> None:
    """ValueError for a pipe or device.

    A pipe would be waited for without end, and a device replaced by a file.

    Args:
        name: the argument.
        path: what came.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        received = _checks.Told(f"{str(path)!r}, a pipe or device")
        raise _checks.value_error(name, "the path of a file", received)


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file beside `path` and puts it in its place in one step.

    Writers of one path do not meet: the last one that ends has written it. Where the
    path is a link, the file that it leads to is written, and the link stays.

    Args:
        path: the file.
        content: bytes, or text for UTF-8.

    Raises:
        OSError: it cannot be written; what was there is still there.
        ValueError: there is a pipe or device.
    """
    refuse_devices("path", path)
    path = pathlib.Path(os.path.realpath(path))
    if isinstance(content, str):
        content = readable(content).encode("utf-8")
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        # "x" makes the file: a link that somebody has put there is not followed.
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
