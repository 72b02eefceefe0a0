"""Random access to samples: `as_source(x)` and the kinds of source behind it."""

from kerastrip.sources.arrays import (
    ArraySource,
    LazyArraySource,
    RowSource,
    StructureSource,
    as_source,
)

__all__ = [
    "ArraySource",
    "LazyArraySource",
    "RowSource",
    "StructureSource",
    "as_source",
]
