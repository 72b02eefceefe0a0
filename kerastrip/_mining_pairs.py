"""Mining by pairs and by anchors: one chosen negative each, kept in a table.

The selection goes over blocks of rows, with one pass over the block per positive
rank (the first positive of every row, the second, ...). It leaves a table of columns,
one line per rank. Distances, losses and gradients come from the rows the table names,
not from the matrix product that chose them.

Rows with more than `TABLE_RANKS` positives are left to `_mining_dense`.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from kerastrip._mining_blocks import (
    INFINITE,
    Anchors,
    Batch,
    add_margin,
    block_of,
    block_rows,
    count_below,
    count_two,
    counts_by_search,
    entry,
    extremes,
    find_anchors,
    loss_and_slope,
    nearest_beyond,
    positive_column,
    put,
    row_sum,
    signed_distances,
    zero,
)
from kerastrip._numerics import safe_divide, safe_sqrt

TABLE_RANKS = 64


def few(positives: Any) -> Any:
    """The number of positives, 0 where they do not fit the table."""
    return ops.where(positives <= TABLE_RANKS, positives, 0)


def _sorted_counts(d: Any, here: Anchors, margin: Any, rooted: bool) -> Any:
    ascending = ops.sort(ops.where(d >= 0, d, INFINITE), axis=1)
    below = count_below(ascending, ops.abs(d), inclusive=True)
    return counts_by_search(d, ascending, below, here, margin, rooted)


def sweep(
    batch: Batch,
    margin: Any,
    *,
    mining: str | None,
    rooted: bool,
    census: bool,
) -> dict[str, Any]:
    """One walk over all blocks of rows: columns chosen, and the census counted.

    Args:
        batch: ordered by label.
        margin: () float32.
        mining: what to choose; None for the census alone.
        rooted: whether distances are roots of the squared ones.
        census: whether to count. With pairs to choose, the triplets of rows with
            more than `TABLE_RANKS` positives are left to `_mining_dense`.

    Returns:
        `columns`, with `mining`: (TABLE_RANKS, padded) int32 negatives of the pairs;
        for "hard" (2, padded), the positive and the negative of each row.
        `counts`, with `census`: (5, padded) int32: positives, negatives, hard,
        semi-hard triplets, pairs with a semi-hard one.
        `sums`, with `census`: (2, padded) float32, distances to positives, negatives.
    """
    anchors = find_anchors(batch)
    rows = batch.columns()
    padded, width = ops.shape(batch.rows)[0], ops.shape(rows)[0]
    count = block_rows(padded)
    by_pairs = mining in ("semi_hard", "semi_hard_or_hard")

    def block(first: Any, found: dict[str, Any]) -> Any:
        here = block_of(anchors, first, count)
        d = signed_distances(batch, rows, here, first, matrix=False)
        if mining:
            positive, nearest, farthest = extremes(d)
        if mining == "hard":
            chosen = ops.stack([positive, nearest])
            found = {**found, "columns": put(found["columns"], (0, first), chosen)}
        positives = few(here.positives)

        def step(rank: Any, columns: Any, counts: Any, distance: Any) -> Any:
            p = ops.abs(entry(d, positive_column(here, rank, width)))
            bound = add_margin(p, margin, rooted)
            if by_pairs:
                value, column = nearest_beyond(d, p)
                if mining == "semi_hard":
                    column = ops.where(value < INFINITE, column, farthest)
                else:
                    column = ops.where(value < bound, column, nearest)
                columns = put(columns, (rank, first), column[None])
            if census:
                valid = rank < positives
                # What is not a negative of the row is < 0, so it counts as below.
                below, within = count_two(d, p, bound)
                below = below - (width - here.negatives)
                more = ops.stack([below, within, ops.cast(within > 0, "int32")])
                counts = counts + ops.where(valid, more, 0)
                p = ops.where(valid, p, 0.0)
                distance = distance + (ops.sqrt(p) if rooted else p)
            return rank + 1, columns, counts, distance

        most = ops.max(positives) if by_pairs or census else 0
        columns, counts, distance = ops.while_loop(
            lambda rank, *_: rank < most,
            step,
            (
                zero(),
                found["columns"] if by_pairs else zero(),
                ops.zeros((3, count), "int32"),
                ops.zeros((count,), "float32"),
            ),
        )[1:]
        if by_pairs:
            found = {**found, "columns": columns}
        if census:
            if not by_pairs:
                many = here.positives > TABLE_RANKS
                counted = ops.cond(
                    ops.any(many),
                    lambda: _sorted_counts(d, here, margin, rooted),
                    lambda: (counts, distance),
                )
                counts = ops.where(many, counted[0], counts)
                distance = ops.where(many, counted[1], distance)
            far = ops.where(d < 0, 0.0, d)  # NaN stays
            sums = ops.stack([distance, row_sum(ops.sqrt(far) if rooted else far)])
            known = ops.stack([here.positives, here.negatives])
            counts = ops.concatenate([known, counts])
            found = {
                **found,
                "counts": put(found["counts"], (0, first), counts),
                "sums": put(found["sums"], (0, first), sums),
            }
        return first + count, found

    found = {}
    if mining:
        lines = 2 if mining == "hard" else TABLE_RANKS
        found["columns"] = ops.zeros((lines, padded), "int32")
    if census:
        found["counts"] = ops.zeros((5, padded), "int32")
        found["sums"] = ops.zeros((2, padded), "float32")
    return ops.while_loop(lambda first, _: first < padded, block, (zero(), found))[1]


def _slopes(
    rows: Any, columns: Any, positive: Any, negative: Any, margin: Any, rooted, soft
) -> Any:
    """Losses (n,) of the triplets (row, positive, negative) and their slopes.

    A slope is d loss / d distance, divided by the distance if it is a root (times 2
    if it is a square): what the difference of two rows is multiplied by.
    """
    dp = ops.sum(ops.square(rows - ops.take(columns, positive, axis=0)), axis=1)
    dn = ops.sum(ops.square(rows - ops.take(columns, negative, axis=0)), axis=1)
    if rooted:
        dp, dn = safe_sqrt(dp), safe_sqrt(dn)
    loss, slope = loss_and_slope(dp - dn, margin, soft)
    if rooted:
        return loss, safe_divide(slope, dp), safe_divide(slope, dn)
    return loss, 2.0 * slope, 2.0 * slope


def pair_losses(
    batch: Batch,
    margin: Any,
    table: Any,
    *,
    rooted: bool,
    soft: bool,
) -> tuple[Any, Any, Any, Any]:
    """Per row the sum of its pairs' losses and how many are > 0; slopes per pair.

    Returns:
        Losses (padded,) float32, active (padded,) int32, and the slopes of the
        positive and the negative distances, (TABLE_RANKS, padded) float32.
    """
    anchors = find_anchors(batch)
    rows, columns = batch.rows, batch.columns()
    padded, width = ops.shape(rows)[0], ops.shape(columns)[0]
    positives = ops.where(anchors.negatives > 0, few(anchors.positives), 0)

    def step(rank: Any, losses: Any, active: Any, pull: Any, push: Any) -> Any:
        valid = rank < positives
        positive = positive_column(anchors, rank, width)
        found = _slopes(rows, columns, positive, table[rank], margin, rooted, soft)
        loss, to_positive, to_negative = (ops.where(valid, x, 0.0) for x in found)
        return (
            rank + 1,
            losses + loss,
            active + ops.cast(loss > 0, "int32"),
            put(pull, (rank, 0), to_positive[None]),
            put(push, (rank, 0), to_negative[None]),
        )

    slopes = ops.zeros((TABLE_RANKS, padded), "float32")
    sums = ops.zeros((padded,), "float32"), ops.zeros((padded,), "int32")
    most = ops.max(positives)
    return ops.while_loop(
        lambda rank, *_: rank < most, step, (zero(), *sums, slopes, slopes)
    )[1:]


def _arrived(batch: Batch, values: Any, columns: Any, partner: Any) -> Any:
    """For every row the sum of the values meant for its column, (padded, dim).

    Those whose partner, the third row of the triplet, is one of the others stay away.
    """
    padded = ops.shape(batch.rows)[0]
    if batch.others is None:
        return ops.segment_sum(values, columns, num_segments=padded)
    columns = ops.where(partner < padded, ops.minimum(columns, padded), padded)
    return ops.segment_sum(values, columns, num_segments=padded + 1)[:padded]


def pair_gradient(batch: Batch, weights: Any, table: Any, pull: Any, push: Any) -> Any:
    """Gradient of sum(weights * losses) with respect to the rows, (padded, dim)."""
    anchors = find_anchors(batch)
    rows, columns = batch.rows, batch.columns()
    padded, width = ops.shape(rows)[0], ops.shape(columns)[0]
    positives = few(anchors.positives)
    pull, push = pull * weights, push * weights
    back = pull
    if batch.others is not None:
        back = ops.where(table < padded, pull, 0.0)
    flat = ops.reshape(back, (-1,))

    def step(rank: Any, gradient: Any) -> Any:
        # A row is pulled to its positive p as anchor and as positive of the anchor p:
        # the second slope is read where p has its own line for the row.
        p = positive_column(anchors, rank, width)
        back = anchors.own - anchors.start - ops.cast(anchors.own > p, "int32")
        back = ops.minimum(back, TABLE_RANKS - 1)
        back = ops.take(flat, back * padded + ops.minimum(p, padded - 1))
        if batch.others is not None:
            back = ops.where(p < padded, back, 0.0)
        both = pull[rank] + back
        both = ops.where(rank < positives, both, 0.0)
        gradient = gradient + both[:, None] * (rows - ops.take(columns, p, axis=0))
        away = rows - ops.take(columns, table[rank], axis=0)
        away = push[rank][:, None] * away
        arrived = _arrived(batch, away, table[rank], p)
        return rank + 1, gradient - away + arrived

    most = ops.max(positives)
    return ops.while_loop(
        lambda rank, _: rank < most, step, (zero(), ops.zeros_like(rows))
    )[1]


def anchor_losses(
    batch: Batch,
    margin: Any,
    table: Any,
    *,
    rooted: bool,
    soft: bool,
) -> tuple[Any, Any, Any, Any]:
    """`pair_losses` for one triplet per row; all results are (padded,)."""
    anchors = find_anchors(batch)
    valid = (anchors.positives > 0) & (anchors.negatives > 0)
    found = _slopes(
        batch.rows, batch.columns(), table[0], table[1], margin, rooted, soft
    )
    loss, pull, push = (ops.where(valid, x, 0.0) for x in found)
    return loss, ops.cast(loss > 0, "int32"), pull, push


def anchor_gradient(
    batch: Batch, weights: Any, table: Any, pull: Any, push: Any
) -> Any:
    """`pair_gradient` for one triplet per row."""
    rows, columns = batch.rows, batch.columns()
    p, n = table[0], table[1]
    near = (pull * weights)[:, None] * (rows - ops.take(columns, p, axis=0))
    far = (push * weights)[:, None] * (rows - ops.take(columns, n, axis=0))
    return near - far - _arrived(batch, near, p, n) + _arrived(batch, far, n, p)


def forward(
    batch: Batch,
    margin: Any,
    *,
    mining: str,
    rooted: bool,
    soft: bool,
    census: bool,
) -> dict[str, Any]:
    """`sweep`, and the losses of the triplets it chose.

    Returns:
        What `sweep` returns, and `losses`, `active` (padded,), `pull`, `push`;
        `units`: (padded,) how many pairs or anchors have a loss, those of rows with
        many positives too; `most`: () the largest number of positives.
    """
    found = sweep(batch, margin, mining=mining, rooted=rooted, census=census)
    anchors = find_anchors(batch)
    units = ops.where(anchors.negatives > 0, anchors.positives, 0)
    if mining == "hard":
        units = ops.minimum(units, 1)
    take = anchor_losses if mining == "hard" else pair_losses
    losses, active, pull, push = take(
        batch, margin, found["columns"], rooted=rooted, soft=soft
    )
    return {
        **found,
        "losses": losses,
        "active": active,
        "pull": pull,
        "push": push,
        "units": units,
        "most": ops.max(anchors.positives),
    }


def backward(
    batch: Batch,
    weights: Any,
    found: dict[str, Any],
    *,
    mining: str,
) -> Any:
    """Gradient of sum(weights * losses) of `forward` for the rows, (padded, dim)."""
    chosen = found["columns"], found["pull"], found["push"]
    gradient = anchor_gradient if mining == "hard" else pair_gradient
    return gradient(batch, weights, *chosen)
