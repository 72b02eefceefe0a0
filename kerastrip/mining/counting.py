"""Counting the easy, semi-hard and hard triplets of every row.

Rows with few positives are counted by one pass over the block of distances for each
rank of the positives. A row with more than `MOST_RANKS` of them is sorted, and binary search
counts for all of its positives together.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from kerastrip.mining import blocks
from kerastrip.mining.blocks import Anchors, OrderedBatch

__all__ = [
    "count",
    "count_two",
]


def count_two(d: Any, low: Any, high: Any) -> tuple[Any, Any]:
    """How many entries of every row are <= low, and how many in (low, high).

    Args:
        d: (count, width).
        low: (count,).
        high: (count,), not below `low`.

    Returns:
        Two (count,) int32, counted in the two halves of one number where they fit:
        one pass over the block in place of two. (A width of 32,768 and more could reach
        the bit of the sign.)
    """
    low, high = low[:, None], high[:, None]

    def packed() -> Any:
        within = ops.where(d < high, 65536, 0)
        found = ops.sum(ops.where(d <= low, 1, within), axis=1)
        return ops.bitwise_and(found, 65535), ops.right_shift(found, 16)

    def apart() -> Any:
        return blocks.count_true(d <= low), blocks.count_true((d > low) & (d < high))

    width = ops.shape(d)[1]
    if isinstance(width, int):
        return packed() if width < 32768 else apart()
    return ops.cond(width < 32768, packed, apart)


def _count_by_search(
    d: Any, here: Anchors, margin: Any, rooted: bool
) -> tuple[Any, Any]:
    """The census of every row from its sorted negatives.

    Args:
        d: (count, padded) signed distances.
        here: the anchors of the block.
        margin: () float32.
        rooted: whether distances are roots of the entries.

    Returns:
        Hard triplets, semi-hard triplets and pairs with a semi-hard one, (3, count)
        int32, and the sum of the distances to the positives, (count,).
    """
    p = ops.abs(d)
    ascending = ops.sort(ops.where(d >= 0, d, blocks.INFINITE), axis=1)
    below = blocks.count_below(ascending, p, inclusive=True)  # (count, padded)
    bound = blocks.add_margin(p, margin, rooted)
    within = blocks.count_below(ascending, bound, inclusive=False)
    within = ops.maximum(within - below, 0)
    positive = blocks.positive_entries(d, here)
    counts = ops.stack([below, within, ops.cast(within > 0, "int32")])
    counts = ops.sum(ops.where(positive, counts, 0), axis=2)
    p = ops.where(positive, p, 0.0)
    return counts, blocks.row_sum(ops.sqrt(p) if rooted else p)


def _count_by_rank(d: Any, here: Anchors, margin: Any, rooted: bool) -> tuple[Any, Any]:
    """What `_count_by_search` returns, 0 for rows with many positives."""
    count, width = ops.shape(d)[0], ops.shape(d)[1]
    positives = blocks.ranks(here.positives)

    def add(rank: Any, counts: Any, sums: Any) -> tuple:
        valid = rank < positives
        p = ops.abs(blocks.entry(d, blocks.positive_column(here, rank, width)))
        below, within = count_two(d, p, blocks.add_margin(p, margin, rooted))
        # What is not a negative of the row is < 0, so it counts as below.
        below = below - (width - here.negatives)
        more = ops.stack([below, within, ops.cast(within > 0, "int32")])
        p = ops.where(valid, p, 0.0)
        return (
            counts + ops.where(valid, more, 0),
            sums + (ops.sqrt(p) if rooted else p),
        )

    start = ops.zeros((3, count), "int32"), ops.zeros((count,), "float32")
    return blocks.over_ranks(ops.max(positives), add, start)


def count(batch: OrderedBatch, margin: Any, *, rooted: bool) -> tuple[Any, Any]:
    """The census of all rows.

    Args:
        batch: ordered by label.
        margin: () float32.
        rooted: whether distances are roots of the squared ones.

    Returns:
        (5, padded) int32: positives, negatives, hard and semi-hard triplets, pairs with
        a semi-hard one; (2, padded) float32: the sums of the distances to the positives
        and to the negatives.
    """
    batch = blocks.near_the_origin(batch)
    padded = ops.shape(batch.rows)[0]

    def visit(here: Anchors, first: Any, counts: Any, sums: Any) -> tuple:
        d = blocks.signed_distances(batch, here, first)  # (count, padded)
        kinds, distance = _count_by_rank(d, here, margin, rooted)
        many = here.positives > blocks.MOST_RANKS
        sorted_kinds, sorted_distance = ops.cond(
            ops.any(many),
            lambda: _count_by_search(d, here, margin, rooted),
            lambda: (kinds, distance),
        )
        kinds = ops.where(many, sorted_kinds, kinds)
        distance = ops.where(many, sorted_distance, distance)
        far = ops.where(d < 0, 0.0, d)  # NaN stays
        far = blocks.row_sum(ops.sqrt(far) if rooted else far)
        known = ops.stack([here.positives, here.negatives])
        return (
            blocks.put(counts, (0, first), ops.concatenate([known, kinds])),
            blocks.put(sums, (0, first), ops.stack([distance, far])),
        )

    start = ops.zeros((5, padded), "int32"), ops.zeros((2, padded), "float32")
    return blocks.over_blocks(batch, visit, start)
