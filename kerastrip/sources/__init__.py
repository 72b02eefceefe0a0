"""Random access to samples: `as_source(x)` and the kinds of source behind it."""

from kerastrip.sources.archives import ZipImages
from kerastrip.sources.arrays import (
    ArraySource,
    BrokenSamples,
    LazyArraySource,
    RowSource,
    StructureSource,
    Subset,
    as_source,
)
from kerastrip.sources.cache import CachedImages, cache_images
from kerastrip.sources.decoding import read_image
from kerastrip.sources.images import ImageFiles, ImageFolder
from kerastrip.sources.tfrecord import TFRecordSource

__all__ = [
    "ArraySource",
    "BrokenSamples",
    "CachedImages",
    "ImageFiles",
    "ImageFolder",
    "LazyArraySource",
    "RowSource",
    "StructureSource",
    "Subset",
    "TFRecordSource",
    "ZipImages",
    "as_source",
    "cache_images",
    "read_image",
]
