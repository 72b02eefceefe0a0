"""Images as figures, sprites and reports show them: uint8, small, PNG."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from kerastrip import _checks

__all__ = [
    "file_names",
    "limits_of",
    "pictures",
    "png",
    "thumbnail",
]


def pictures(name: str, images: Any, limits: tuple[float, float] | None = None) -> Any:
    """`images` as uint8, (n, height, width) or (n, height, width, 3).

    Args:
        name: what errors call the images.
        images: `(n, height, width)` or `(n, height, width, channels)` with 1 or 3
            channels; integers in 0..255, booleans or floats.
        limits: the floats that are drawn black and white. Default: `limits_of` them.

    Raises:
        ValueError: if the shape is another.
    """
    images = np.asarray(images)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim != 3 and (images.ndim != 4 or images.shape[-1] != 3):
        raise _checks.value_error(
            name, "shape (rows, height, width[, 1 or 3 channels])", images
        )
    if images.dtype.kind in "ui":
        return np.clip(images, 0, 255).astype("uint8")
    low, high = limits or limits_of(images)
    shares = (images.astype("float32") - low) / max(high - low, 1e-12)
    return np.round(np.clip(np.nan_to_num(shares), 0, 1) * 255).astype("uint8")


def limits_of(images: np.ndarray) -> tuple[float, float]:
    """(0, 1), or the least and the greatest value where that does not hold them."""
    finite = images[np.isfinite(images)] if images.dtype.kind == "f" else images
    if not finite.size or (finite.min() >= 0 and finite.max() <= 1):
        return 0.0, 1.0
    return float(finite.min()), float(finite.max())


def file_names(source: Any) -> list[str] | None:
    """The names of the files that a source of images reads, None if it knows none."""
    if callable(getattr(source, "origin", None)):  # some samples of another source
        origin, rows = source.origin()
        names = file_names(origin)
        return None if names is None else [names[row] for row in rows]
    paths = getattr(source, "paths", None)
    if paths is None or len(paths) != len(source):
        return None
    return [os.path.basename(path) for path in paths]


def thumbnail(picture: np.ndarray, size: int) -> np.ndarray:
    """The picture, made smaller until its longer side is at most `size`."""
    import cv2

    scale = size / max(picture.shape[:2])
    if scale >= 1:
        return picture
    height, width = (max(1, round(scale * side)) for side in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def png(picture: np.ndarray) -> bytes:
    """A PNG file of a grey (height, width) or RGB (height, width, 3) picture."""
    import cv2

    return cv2.imencode(".png", picture[..., ::-1] if picture.ndim == 3 else picture)[
        1
    ].tobytes()
