"""Files that are written as a whole: no reader ever finds half of a file."""

from __future__ import annotations

import os
import pathlib
import secrets
from typing import Any

from kerastrip import _checks


def readable(value: Any) -> str:
    """A value as text that can be written to files and figures.

    If the name of a file is not in UTF-8, Python puts lone surrogates into it, which
    cannot be encoded. They become escapes (`\\udce9`).
    """
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def refuse_devices(name: str, path: str | os.PathLike[str]) -> None:
    """ValueError for a pipe or device.

    To read a pipe would wait without end, and to write would replace a device by a file.

    Args:
        name: the argument, for the error.
        path: the value of the argument.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        received = _checks.Told(f"{str(path)!r}, a pipe or device")
        raise _checks.value_error(name, "the path of a file", received)


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file beside `path` and puts it in its place in one step.

    Several writers of one path do not disturb each other: the last one that ends leaves
    its file. If the path is a link, the file that it leads to is written, and the link
    stays.

    Args:
        path: the file.
        content: bytes, or text for UTF-8.

    Raises:
        OSError: the file cannot be written; an earlier file is still there.
        ValueError: the path is a pipe or device.
    """
    refuse_devices("path", path)
    path = pathlib.Path(os.path.realpath(path))
    if isinstance(content, str):
        content = readable(content).encode("utf-8")
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        # Mode "x" makes a new file, and never follows a link that lies there already.
        with open(unfinished, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
