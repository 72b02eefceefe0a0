"""Files that a reader, or a run that was cut off, finds whole."""

from __future__ import annotations

import os
import pathlib


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file beside `path` and puts it in its place in one step."""
    content = content.encode("utf-8") if isinstance(content, str) else content
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
