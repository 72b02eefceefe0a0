"""Mining by pairs and by anchors: one chosen negative each, kept in a table.

    choose     goes over the blocks of distances and leaves the numbers of the rows chosen:
               a table (MOST_RANKS, padded), one line for each rank of the positives
    losses     computes distances and losses of the rows that the table names
    gradient   flows through these rows only, not through the matrix of distances

By anchors ("hard") the table is (2, padded): the positive and the negative of every row.

Rows with more than `MOST_RANKS` positives do not fit the table: `mining.dense` takes
them, and what it finds is added here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from kerastrip._numerics import safe_divide, safe_sqrt
from kerastrip.mining import blocks, dense
from kerastrip.mining.blocks import Anchors, OrderedBatch, Rule, Terms

__all__ = [
    "Found",
    "choose_anchors",
    "choose_negatives",
    "farthest_negative",
    "farthest_positive",
    "gradient",
    "losses",
    "nearest_beyond",
    "nearest_negative",
]


class Found(NamedTuple):
    """What is found for the rows with few positives.

    A triplet (a, p, n) adds `pull * (a - p) - push * (a - n)` to the gradient of its
    anchor. With s = d loss / d distance, pull is s / d(a,p) if the distance is a root and
    2 s if it is a square, and push the same with d(a,n). There are as many `lines` as
    in the table.
    """

    losses: Any  # (padded,) float32
    active: Any  # (padded,) int32
    units: Any  # (padded,) int32, of the rows with many positives too
    most: Any  # () int32, the largest number of positives
    table: Any  # (lines, padded) int32
    pull: Any  # (lines, padded) float32; (padded,) by anchors
    push: Any  # likewise


# Choosing -----------------------------------------------------------------------------


def nearest_beyond(d: Any, bound: Any) -> tuple[Any, Any]:
    """The least entry > bound of every row and its column.

    A row without such an entry gets inf and any column.

    In two stages, since finding the place of a minimum costs three times the minimum:
    the least of every stretch of columns, then the column in the best stretch.
    """
    count, width = ops.shape(d)[0], ops.shape(d)[1]
    stretch = 32 + 32 * blocks.flag(width > 128) + 64 * blocks.flag(width > 1024)
    stretches = ops.reshape(d, (count, width // stretch, stretch))
    beyond = ops.where(stretches > bound[:, None, None], stretches, blocks.INFINITE)
    least = ops.min(beyond, axis=2)  # (count, width // stretch)
    value = ops.min(least, axis=1)
    best = blocks.first_true(least == value[:, None])
    within = ops.take_along_axis(stretches, best[:, None, None], axis=1)[:, 0]
    return value, best * stretch + blocks.first_true(within == value[:, None])


def nearest_negative(d: Any) -> Any:
    """(count,) columns; any column where there is no negative."""
    return nearest_beyond(d, ops.full_like(d[:, 0], blocks.NOT_NEGATIVE))[1]


def farthest_negative(d: Any) -> Any:
    """(count,) columns; any column where there is no negative."""
    return blocks.first_true(d == ops.max(d, axis=1, keepdims=True))


def farthest_positive(d: Any) -> Any:
    """(count,) columns; any column where there is no positive."""
    positive = ops.where(d == -blocks.INFINITE, 0.0, d)
    return blocks.first_true(positive == ops.min(positive, axis=1, keepdims=True))


def choose_anchors(batch: OrderedBatch) -> Any:
    """The farthest positive and the nearest negative of every row, (2, padded)."""
    batch = blocks.near_the_origin(batch)

    def visit(here: Anchors, first: Any, table: Any) -> tuple:
        d = blocks.signed_distances(batch, here, first)  # (count, padded)
        lines = ops.stack([farthest_positive(d), nearest_negative(d)])
        return (blocks.put(table, (0, first), lines),)

    table = ops.zeros((2, ops.shape(batch.rows)[0]), "int32")
    return blocks.over_blocks(batch, visit, (table,))[0]


def choose_negatives(batch: OrderedBatch, margin: Any, rule: Rule) -> Any:
    """The negative of every pair, (MOST_RANKS, padded): line r for positives of rank r."""
    batch = blocks.near_the_origin(batch)
    padded = ops.shape(batch.rows)[0]

    def visit(here: Anchors, first: Any, table: Any) -> tuple:
        d = blocks.signed_distances(batch, here, first)  # (count, padded)
        # "semi_hard" takes the nearest negative beyond the positive, however far it is;
        # only "semi_hard_or_hard" asks whether it is within the margin. Without one:
        instead = {
            "semi_hard": farthest_negative,
            "semi_hard_or_hard": nearest_negative,
        }[rule.mining](d)

        def line(rank: Any, table: Any) -> tuple:
            p = ops.abs(blocks.entry(d, blocks.positive_column(here, rank, padded)))
            value, column = nearest_beyond(d, p)  # (count,) each
            bound = ops.full_like(p, blocks.INFINITE)
            if rule.mining == "semi_hard_or_hard":
                bound = blocks.add_margin(p, margin, rule.rooted)
            column = ops.where(value < bound, column, instead)
            return (blocks.put(table, (rank, first), column[None]),)

        return blocks.over_ranks(ops.max(blocks.ranks(here.positives)), line, (table,))

    table = ops.zeros((blocks.MOST_RANKS, padded), "int32")
    return blocks.over_blocks(batch, visit, (table,))[0]


# Losses -------------------------------------------------------------------------------


def _losses_and_factors(
    rows: Any, positive: Any, negative: Any, margin: Any, rule: Rule
) -> tuple[Any, Any, Any]:
    """Losses, pull and push of the triplets (row, positive, negative), (n,) each."""
    dp = ops.sum(ops.square(rows - ops.take(rows, positive, axis=0)), axis=1)
    dn = ops.sum(ops.square(rows - ops.take(rows, negative, axis=0)), axis=1)
    if rule.rooted:
        dp, dn = safe_sqrt(dp), safe_sqrt(dn)
    loss, slope = blocks.loss_and_slope(dp - dn, margin, rule.soft)
    if rule.rooted:
        return loss, safe_divide(slope, dp), safe_divide(slope, dn)
    return loss, 2.0 * slope, 2.0 * slope


def _losses_of_pairs(batch: OrderedBatch, margin: Any, rule: Rule) -> Found:
    table = choose_negatives(batch, margin, rule)
    anchors, rows = blocks.find_anchors(batch), batch.rows
    padded = ops.shape(rows)[0]
    units = ops.where(anchors.negatives > 0, anchors.positives, 0)

    def line(rank: Any, losses: Any, active: Any, pull: Any, push: Any) -> tuple:
        positive = blocks.positive_column(anchors, rank, padded)
        found = _losses_and_factors(rows, positive, table[rank], margin, rule)
        loss, pulled, pushed = (
            ops.where(rank < blocks.ranks(units), x, 0.0) for x in found
        )
        return (
            losses + loss,
            active + ops.cast(loss > 0, "int32"),
            blocks.put(pull, (rank, 0), pulled[None]),
            blocks.put(push, (rank, 0), pushed[None]),
        )

    slopes = ops.zeros((blocks.MOST_RANKS, padded), "float32")
    sums = ops.zeros((padded,), "float32"), ops.zeros((padded,), "int32")
    losses, active, pull, push = blocks.over_ranks(
        ops.max(blocks.ranks(units)), line, (*sums, slopes, slopes)
    )
    most = ops.max(anchors.positives)
    return Found(losses, active, units, most, table, pull, push)


def _losses_of_anchors(batch: OrderedBatch, margin: Any, rule: Rule) -> Found:
    table = choose_anchors(batch)
    anchors = blocks.find_anchors(batch)
    units = ops.minimum(ops.minimum(anchors.positives, anchors.negatives), 1)
    found = _losses_and_factors(batch.rows, table[0], table[1], margin, rule)
    loss, pull, push = (ops.where(units > 0, x, 0.0) for x in found)
    active = ops.cast(loss > 0, "int32")
    return Found(loss, active, units, ops.max(anchors.positives), table, pull, push)


def _losses_of_few(batch: OrderedBatch, margin: Any, *, rule: Rule) -> Found:
    find = _losses_of_anchors if rule.by_anchors else _losses_of_pairs
    return find(batch, margin, rule)


def _may_have_many(batch: OrderedBatch, rule: Rule) -> bool:
    """Whether a batch of this size can hold a class that is too large for the table."""
    padded = ops.shape(batch.rows)[0]
    can = not isinstance(padded, int) or padded > blocks.MOST_RANKS + 1
    return can and rule.by_pairs


def losses(batch: OrderedBatch, margin: Any, rule: Rule) -> Terms:
    """The losses of all rows, by pairs or by anchors.

    Args:
        batch: ordered by label.
        margin: () float32.
        rule: its `mining` is "semi_hard", "semi_hard_or_hard" or "hard".
    """
    found = blocks.compiled_on_tensorflow(_losses_of_few, rule=rule)(batch, margin)
    if not _may_have_many(batch, rule):
        return Terms(found.losses, found.active, found.units, (found, None))
    many = ops.cond(
        found.most > blocks.MOST_RANKS,
        lambda: dense.losses(batch, margin, rule),
        lambda: dense.no_losses(batch),
    )
    return Terms(
        found.losses + many.losses,
        found.active + many.active,
        found.units,
        (found, many.kept),
    )


# Gradient -----------------------------------------------------------------------------


def _sum_by_column(values: Any, columns: Any) -> Any:
    """For every row the sum of the `values` (padded, dim) whose column it is."""
    return ops.segment_sum(values, columns, num_segments=ops.shape(values)[0])


def _gradient_of_pairs(batch: OrderedBatch, weights: Any, found: Found) -> Any:
    anchors, rows = blocks.find_anchors(batch), batch.rows
    padded = ops.shape(rows)[0]
    pull, push = found.pull * weights, found.push * weights
    flat = ops.reshape(pull, (-1,))  # (MOST_RANKS * padded,)

    def line(rank: Any, gradient: Any) -> tuple:
        # A row is pulled to its positive p as an anchor, and as a positive of the anchor
        # p: that is pull[the rank that the row has for p, p].
        p = blocks.positive_column(anchors, rank, padded)
        back = ops.minimum(blocks.rank_seen_from(anchors, p), blocks.MOST_RANKS - 1)
        both = pull[rank] + ops.take(flat, back * padded + p)
        both = ops.where(rank < blocks.ranks(anchors.positives), both, 0.0)
        gradient = gradient + both[:, None] * (rows - ops.take(rows, p, axis=0))
        away = rows - ops.take(rows, found.table[rank], axis=0)
        away = push[rank][:, None] * away
        return (gradient - away + _sum_by_column(away, found.table[rank]),)

    most = ops.max(blocks.ranks(anchors.positives))
    return blocks.over_ranks(most, line, (ops.zeros_like(rows),))[0]


def _gradient_of_anchors(batch: OrderedBatch, weights: Any, found: Found) -> Any:
    rows, (p, n) = batch.rows, (found.table[0], found.table[1])
    near = (found.pull * weights)[:, None] * (rows - ops.take(rows, p, axis=0))
    far = (found.push * weights)[:, None] * (rows - ops.take(rows, n, axis=0))
    return near - far - _sum_by_column(near, p) + _sum_by_column(far, n)


def _gradient_of_few(
    batch: OrderedBatch, weights: Any, found: Found, *, rule: Rule
) -> Any:
    flow = _gradient_of_anchors if rule.by_anchors else _gradient_of_pairs
    return flow(batch, weights, found)


def gradient(
    batch: OrderedBatch, margin: Any, weights: Any, kept: Any, rule: Rule
) -> Any:
    """Gradient of sum(weights * losses) with respect to the rows, (padded, dim).

    Args:
        batch, margin: what `losses` got.
        weights: (padded,) float32.
        kept: what `losses` kept.
        rule: what `losses` got.
    """
    found, coefficients = kept
    result = blocks.compiled_on_tensorflow(_gradient_of_few, rule=rule)(
        batch, weights, found
    )
    if not _may_have_many(batch, rule):
        return result
    return result + ops.cond(
        found.most > blocks.MOST_RANKS,
        lambda: dense.gradient(batch, margin, weights, coefficients, rule),
        lambda: ops.zeros_like(result),
    )
