"""The images of the samples that a callback shows."""

from __future__ import annotations

from typing import Any

import numpy as np

from kerastrip import _checks
from kerastrip.evaluation.embedding import is_batches, source_of
from kerastrip.plotting.pictures import file_names, limits_of, pictures, thumbnail
from kerastrip.sources import as_source

__all__ = [
    "Thumbnails",
    "thumbnails_of",
]

# So many samples tell the range of the values of all.
_PROBED = 256
_SIZE = 128  # pixels: as many as a screen of a phone gives to a sample of a figure


class Thumbnails:
    """A source of small pictures of samples, as figures and sprites show them.

    Args:
        source: of the images.
        name: what errors call them.
        paths: of their files, None if they have none.
    """

    def __init__(self, source: Any, name: str, paths: list[str] | None):
        self._source, self._name, self.paths = source, name, paths
        length = len(source)
        probed = np.arange(min(length, _PROBED)) * length // min(length, _PROBED)
        images = np.asarray(source.take(probed))
        pictures(name, images)
        self._limits = limits_of(images)

    def __deepcopy__(self, memo: Any) -> Thumbnails:
        return self  # nothing here ever changes, and the images may be large

    def __len__(self) -> int:
        return len(self._source)

    def take(self, rows: Any, size: int = _SIZE) -> np.ndarray:
        """uint8 pictures of some rows, no side longer than `size`."""
        images = pictures(self._name, self._source.take(rows), self._limits)
        return np.stack([thumbnail(image, size) for image in images])


def thumbnails_of(x: Any, images: Any) -> Thumbnails | None:
    """Thumbnails of `images`, one for each sample of x; of x itself without them.

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
