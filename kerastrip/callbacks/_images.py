"""The images of the samples that a callback shows."""

from __future__ import annotations

from typing import Any

import numpy as np

from kerastrip import _checks
from kerastrip._pictures import limits_of, pictures, thumbnail
from kerastrip.inference import is_batches, source_of
from kerastrip.sources import as_source

# So many samples tell the range of the values of all.
_PROBED = 256


class Thumbnails:
    """Small pictures of samples, by their row.

    Args:
        source: gives the images by `take`.
        length: how many there are.
        name: what errors call them.
    """

    def __init__(self, source: Any, length: int, name: str):
        self._source, self._name = source, name
        probed = np.arange(min(length, _PROBED)) * length // min(length, _PROBED)
        images = np.asarray(source.take(probed))
        pictures(name, images)
        self._limits = limits_of(images)

    def __deepcopy__(self, memo: Any) -> Thumbnails:
        return self  # nothing here ever changes, and the images may be large

    def take(self, rows: Any, size: int) -> list[np.ndarray]:
        """uint8 pictures of some rows, no side longer than `size`."""
        images = pictures(self._name, self._source.take(rows), self._limits)
        return [thumbnail(image, size) for image in images]


def thumbnails_of(x: Any, images: Any) -> Thumbnails | None:
    """Thumbnails of `images`, one for each sample of x; of x itself without them.

    None where x holds no images, or comes in batches.
    """
    if is_batches(x):
        if images is not None:
            raise ValueError(
                _checks.message(
                    "images", "None for a dataset, whose order may change", images
                )
            )
        return None
    source = source_of(x)
    if images is None:
        try:
            return Thumbnails(source, len(source), "x")
        except (TypeError, ValueError):  # not images
            return None
    shown = as_source(images, "images")
    if len(shown) != len(source):
        raise ValueError(
            _checks.message(
                "images",
                f"{len(source)} images, one per sample",
                _checks.Told(f"{len(shown)}"),
            )
        )
    return Thumbnails(shown, len(shown), "images")
