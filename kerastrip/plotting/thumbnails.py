"""Thumbnails: the small uint8 images that figures, sprites and reports show.

images of the user --as_uint8--> uint8 images --thumbnail--> thumbnails --png--> a file
(any size, floats too)           (same size)                 (at most `size` pixels a side)
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from kerastrip import _checks
from kerastrip.evaluation.embedding import is_batches, source_of
from kerastrip.sources import as_source

__all__ = [
    "Thumbnails",
    "as_uint8",
    "file_names",
    "png",
    "thumbnails_of",
]

# The range of the values of so many images is taken for the range of all images.
_PROBED = 256
_SIZE = 128  # pixels: as many as a screen of a phone gives to a sample of a figure


def as_uint8(name: str, images: Any, limits: tuple[float, float] | None = None) -> Any:
    """`images` as uint8, (n, height, width) or (n, height, width, 3).

    Args:
        name: name of the images in errors.
        images: `(n, height, width)` or `(n, height, width, channels)` with 1 or 3
            channels; integers in 0..255, booleans or floats.
        limits: the floats that become 0 and 255. Default: the `_limits_of` these images.

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
    low, high = limits or _limits_of(images)
    shares = (images.astype("float32") - low) / max(high - low, 1e-12)
    return np.round(np.clip(np.nan_to_num(shares), 0, 1) * 255).astype("uint8")


def _limits_of(images: np.ndarray) -> tuple[float, float]:
    """(0, 1), or the least and the greatest value of images that leave 0 ... 1."""
    finite = images[np.isfinite(images)] if images.dtype.kind == "f" else images
    if not finite.size or (finite.min() >= 0 and finite.max() <= 1):
        return 0.0, 1.0
    return float(finite.min()), float(finite.max())


def file_names(source: Any) -> list[str] | None:
    """The names of the files that a source of images reads, None if it has no files."""
    if callable(getattr(source, "origin", None)):  # some samples of another source
        origin, rows = source.origin()
        names = file_names(origin)
        return None if names is None else [names[row] for row in rows]
    paths = getattr(source, "paths", None)
    if paths is None or len(paths) != len(source):
        return None
    return [os.path.basename(path) for path in paths]


def _thumbnail(image: np.ndarray, size: int) -> np.ndarray:
    """A uint8 image, made smaller until its longer side is at most `size`."""
    import cv2

    scale = size / max(image.shape[:2])
    if scale >= 1:
        return image
    height, width = (max(1, round(scale * side)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def png(image: np.ndarray) -> bytes:
    """A PNG file of a grey (height, width) or RGB (height, width, 3) uint8 image."""
    import cv2

    return cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)[
        1
    ].tobytes()


class Thumbnails:
    """A source of thumbnails of the images of another source.

    Args:
        source: a source of images.
        name: name of the images in errors.
        paths: the names of their files, None if they have no files.
    """

    def __init__(self, source: Any, name: str, paths: list[str] | None):
        self._source, self._name, self.paths = source, name, paths
        length = len(source)
        probed = np.arange(min(length, _PROBED)) * length // min(length, _PROBED)
        images = np.asarray(source.take(probed))
        as_uint8(name, images)  # an error now, not after the first epoch
        self._limits = _limits_of(images)

    def __deepcopy__(self, memo: Any) -> Thumbnails:
        return self  # nothing here ever changes, and the images may be large

    def __len__(self) -> int:
        return len(self._source)

    def take(self, rows: Any, size: int = _SIZE) -> np.ndarray:
        """The thumbnails of some rows, no side longer than `size` pixels."""
        images = as_uint8(self._name, self._source.take(rows), self._limits)
        return np.stack([_thumbnail(image, size) for image in images])


def thumbnails_of(x: Any, images: Any) -> Thumbnails | None:
    """Thumbnails of `images`, one for each sample of x; of x itself without `images`.

    None where x holds no images, or comes in batches.
    """
    if is_batches(x):
        if images is not None:
            raise _checks.value_error(
                "images", "None for a dataset, whose order may change", images
            )
        return None
    source = source_of(x)
    if images is None:
        try:
            return Thumbnails(source, "x", file_names(source))
        except (TypeError, ValueError):  # not images
            return None
    shown = as_source(images, "images")
    if len(shown) != len(source):
        raise _checks.value_error(
            "images",
            f"{len(source)} images, one per sample",
            _checks.Told(f"{len(shown)}"),
        )
    return Thumbnails(shown, "images", file_names(shown) or file_names(source))
