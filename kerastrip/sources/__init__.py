"""Random access to samples: `as_source(x)` and the kinds of source behind it."""

from kerastrip.sources.arrays import (
    ArraySource,
    LazyArraySource,
    RowSource,
    StructureSource,
    as_source,
)
from kerastrip.sources.cache import CachedImages, cache_images
from kerastrip.sources.tfrecord import TFRecordSource

__all__ = [
    "ArraySource",
    "CachedImages",
    "LazyArraySource",
    "RowSource",
    "StructureSource",
    "TFRecordSource",
    "as_source",
    "cache_images",
]
