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
from kerastrip.sources.images import ImageFiles, ImageFolder

__all__ = [
    "ArraySource",
    "BrokenSamples",
    "ImageFiles",
    "ImageFolder",
    "LazyArraySource",
    "RowSource",
    "StructureSource",
    "Subset",
    "ZipImages",
    "as_source",
]
