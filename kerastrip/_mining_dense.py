"""Mining of whole rows of the distance matrix: one coefficient for each entry.

For every block of rows: the losses of its rows, and the block of coefficients
d loss / d distance, with which the gradient is a matrix product. With c(a,b) the
coefficient of a row a and another row b, divided by the distance if that is a root:

    gradient of row a = sum over b of (c(a,b) + c(b,a)) * (a - b)

Batches of up to `KEPT_ROWS` keep the coefficients for the backward pass, larger ones
make them again. It serves what takes every triplet or every pair of the batch, and the
rows with so many positives that `_mining_pairs` would not keep them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from kerastrip import _mining_blocks as blocks
from kerastrip._mining_blocks import Anchors, Batch, Rule, Terms

KEPT_ROWS = 2048


class Block(NamedTuple):
    """What is found for the rows of a block."""

    losses: Any  # (count,) float32
    active: Any  # (count,) int32, how many units are > 0
    coefficients: Any  # (count, padded) float32


def _whole(function: Callable, rule: Rule) -> Callable:
    """`function` for a rule, compiled as a whole unless its rows are sorted.

    XLA sorts three to five times slower on a CPU than TensorFlow does: then the sort
    stays outside, between functions that `_piece` has compiled.
    """
    if rule.by_pairs:
        return functools.partial(function, rule=rule)
    return blocks.compiled(function, rule=rule)


def _piece(function: Callable, rule: Rule) -> Callable:
    """`function` for a rule, compiled where what calls it is not."""
    if rule.by_pairs:
        return blocks.compiled(function, rule=rule)
    return functools.partial(function, rule=rule)


# The units of one block ---------------------------------------------------------------


def _by_pairs(d: Any, order: Any, here: Anchors, margin: Any, rule: Rule) -> Block:
    """One negative for every positive of the rows with many, found in the sorted row.

    Args:
        d: (count, padded) signed distances.
        order: (count, padded) int32 columns, the negatives first, in rising order.
        here, margin, rule: as everywhere.
    """
    count, width = ops.shape(d)
    p = ops.abs(d)
    ascending = ops.where(d >= 0, d, blocks.INFINITE)
    ascending = ops.take_along_axis(ascending, order, axis=1)
    at = blocks.count_below(ascending, p, inclusive=True)  # place of the negative
    if rule.mining == "semi_hard":
        at = ops.minimum(at, ops.maximum(here.negatives - 1, 0)[:, None])
    else:
        beyond = ops.take_along_axis(ascending, ops.minimum(at, width - 1), axis=1)
        at = ops.where(beyond < blocks.add_margin(p, margin, rule.rooted), at, 0)
    n = ops.take_along_axis(ascending, at, axis=1)
    gap = ops.sqrt(p) - ops.sqrt(n) if rule.rooted else p - n
    loss, slope = blocks.loss_and_slope(gap, margin, rule.soft)
    many = (here.positives > blocks.FEW) & (here.negatives > 0)
    wanted = blocks.positive_entries(d, here) & many[:, None]
    loss, slope = ops.where(wanted, loss, 0.0), ops.where(wanted, slope, 0.0)
    # Several pairs of a row may have the same negative: their slopes add up.
    row = ops.arange(count, dtype="int32")[:, None] * width
    place = ops.reshape(row + ops.take_along_axis(order, at, axis=1), (-1,))
    slopes = ops.reshape(slope, (-1,))
    pushed = ops.segment_sum(slopes, place, num_segments=count * width)
    coefficients = slope - ops.reshape(pushed, (count, width))
    return Block(blocks.row_sum(loss), blocks.count_true(loss > 0), coefficients)


def _by_triplets(d: Any, here: Anchors, margin: Any, rule: Rule) -> Block:
    """Every triplet, one pass per positive rank."""
    column = ops.arange(ops.shape(d)[1], dtype="int32")
    negative = ~(d < 0)  # NaN too: it has to show in the loss
    n = ops.where(negative, d, 0.0)
    if rule.rooted:
        n = ops.sqrt(n)

    def add(rank: Any, losses: Any, active: Any, coefficients: Any) -> tuple:
        at = blocks.positive_column(here, rank, ops.shape(d)[1])
        p = ops.abs(blocks.entry(d, at))  # (count,)
        if rule.rooted:
            p = ops.sqrt(p)
        valid = negative & (rank < here.positives)[:, None]
        loss, slope = blocks.loss_and_slope(p[:, None] - n, margin, rule.soft)
        loss, slope = ops.where(valid, loss, 0.0), ops.where(valid, slope, 0.0)
        pulled = ops.cast(column == at[:, None], "float32")
        pulled = pulled * blocks.row_sum(slope)[:, None]
        return (
            losses + loss,
            active + blocks.count_true(loss > 0),
            coefficients + (pulled - slope),
        )

    nothing = ops.zeros_like(d)
    losses, active, coefficients = blocks.over_ranks(
        ops.max(here.positives), add, (nothing, ops.zeros_like(here.own), nothing)
    )
    return Block(blocks.row_sum(losses), active, coefficients)


def _by_contrast(d: Any, here: Anchors, margin: Any, rule: Rule) -> Block:
    """Every pair: half the squared excess over one margin or lack of the other."""
    real = d != -blocks.INFINITE
    size = ops.where(real, ops.abs(d), 0.0)
    if rule.rooted:
        size = ops.sqrt(size)
    column = ops.arange(ops.shape(d)[1], dtype="int32")
    pair = real & (column != here.own[:, None])
    pair = pair & (here.positives + here.negatives > 0)[:, None]
    excess = ops.relu(size - margin[0])
    lack = ops.relu(margin[1] - size)
    slope = ops.where(pair, ops.where(d < 0, excess, -lack), 0.0)
    losses = 0.5 * blocks.row_sum(ops.square(slope))
    return Block(losses, blocks.count_true(slope != 0), slope)


def _block(d: Any, order: Any, here: Anchors, margin: Any, *, rule: Rule) -> Block:
    """What is found for a block, its coefficients ready for differences of rows."""
    if rule.mining == "contrastive":
        found = _by_contrast(d, here, margin, rule)
    elif rule.mining == "all":
        found = _by_triplets(d, here, margin, rule)
    else:
        found = _by_pairs(d, order, here, margin, rule)
    coefficients = 2.0 * found.coefficients
    if rule.rooted:
        # The least distance of a positive stands for 0, which has no direction.
        apart = (d > 0) | (d < -blocks.TINY)
        coefficients = found.coefficients / ops.sqrt(ops.abs(d))
        coefficients = ops.where(apart, coefficients, 0.0)
    return found._replace(coefficients=coefficients)


# The blocks of a batch ----------------------------------------------------------------


def _distances(batch: Batch, here: Anchors, first: Any, *, rule: Rule) -> tuple:
    """Signed distances of a block, and what to sort: inf for all but negatives."""
    d = blocks.signed_distances(batch, here, first)
    return d, ops.where(d >= 0, d, blocks.INFINITE)


def _over_blocks(batch: Batch, rule: Rule, visit: Callable, state: tuple) -> tuple:
    """Call `visit(d, order, here, first, *state)` for the blocks that have work.

    That is every block, or with pairs those that hold a row with many positives.
    """

    def block(here: Anchors, first: Any, *state: Any) -> tuple:
        def work() -> tuple:
            d, keys = _piece(_distances, rule)(batch, here, first)
            order = None
            if rule.by_pairs:
                order = ops.cast(ops.argsort(keys, axis=1), "int32")
            return visit(d, order, here, first, *state)

        if not rule.by_pairs:
            return work()
        has_many = ops.max(here.positives) > blocks.FEW
        return ops.cond(has_many, work, lambda: state)

    return blocks.over_blocks(batch, block, state)


def _kept_columns(width: Any) -> Any:
    """How many columns of coefficients are kept: all of them or none."""
    return blocks.flag(width <= KEPT_ROWS) * width


def _kept_block(d: Any, order: Any, here: Anchors, margin: Any, *, rule: Rule) -> Block:
    """`_block`, its coefficients as far as they are kept."""
    found = _block(d, order, here, margin, rule=rule)
    columns = _kept_columns(ops.shape(found.coefficients)[1])
    return found._replace(coefficients=found.coefficients[:, :columns])


def _units(batch: Batch, rule: Rule) -> Any:
    """The number of units of every row, (padded,) float32."""
    anchors = blocks.find_anchors(batch)
    positives = ops.cast(anchors.positives, "float32")
    negatives = ops.cast(anchors.negatives, "float32")
    if rule.mining == "contrastive":
        return positives + negatives
    if rule.mining == "all":
        return positives * negatives
    return positives * ops.minimum(negatives, 1.0)


def no_losses(batch: Batch) -> Terms:
    """What `losses` returns for a batch without any unit."""
    padded = ops.shape(batch.rows)[0]
    return Terms(
        ops.zeros((padded,), "float32"),
        ops.zeros((padded,), "int32"),
        ops.zeros((padded,), "float32"),
        ops.zeros((padded, _kept_columns(padded)), "float32"),
    )


def _losses(batch: Batch, margin: Any, *, rule: Rule) -> Terms:
    def visit(d: Any, order: Any, here: Anchors, first: Any, *state: Any) -> tuple:
        found = _piece(_kept_block, rule)(d, order, here, margin)
        return tuple(map(blocks.put, state, ((first,), (first,), (first, 0)), found))

    nothing = no_losses(batch)
    state = nothing.losses, nothing.active, nothing.kept
    losses, active, kept = _over_blocks(batch, rule, visit, state)
    return Terms(losses, active, _units(batch, rule), kept)


def losses(batch: Batch, margin: Any, rule: Rule) -> Terms:
    """The losses of all rows, with pairs of those with many positives alone.

    Args:
        batch: ordered by label.
        margin: () float32; for "contrastive" (2,), the positive and the negative one.
        rule: its `mining` is any word but "hard".

    Returns:
        `Terms`; kept are the coefficients, (padded, padded) or (padded, 0).
    """
    return _whole(_losses, rule)(batch, margin)


# Gradient -----------------------------------------------------------------------------


def _gradient_of_block(
    rows: Any, here: Anchors, coefficients: Any, weights: Any, *, rule: Rule
) -> tuple[Any, Any]:
    """The block's share in the gradient: of its own rows, and of all rows."""
    coefficients = coefficients * weights[:, None]  # (count, padded)
    own = ops.take(rows, here.own, axis=0)  # (count, dim)
    back = ops.transpose(coefficients)
    return (
        blocks.row_sum(coefficients)[:, None] * own - ops.matmul(coefficients, rows),
        blocks.row_sum(back)[:, None] * rows - ops.matmul(back, own),
    )


def _gradient_of_kept(rows: Any, weights: Any, kept: Any, *, rule: Rule) -> Any:
    """The whole gradient from all coefficients."""
    kept = kept * weights[:, None]
    both = kept + ops.transpose(kept)
    return blocks.row_sum(both)[:, None] * rows - ops.matmul(both, rows)


def _gradient(batch: Batch, margin: Any, weights: Any, kept: Any, *, rule: Rule) -> Any:
    rows = batch.rows
    dim = ops.shape(rows)[1]

    def visit(d: Any, order: Any, here: Anchors, first: Any, gradient: Any) -> tuple:
        found = _piece(_block, rule)(d, order, here, margin)
        to_own, to_all = _piece(_gradient_of_block, rule)(
            rows, here, found.coefficients, ops.take(weights, here.own)
        )
        before = ops.slice(gradient, (first, 0), (ops.shape(d)[0], dim))
        return (blocks.put(gradient, (first, 0), before + to_own) + to_all,)

    return blocks.choose(
        ops.shape(kept)[1] > 0,
        lambda: _piece(_gradient_of_kept, rule)(rows, weights, kept),
        lambda: _over_blocks(batch, rule, visit, (ops.zeros_like(rows),))[0],
    )


def gradient(batch: Batch, margin: Any, weights: Any, kept: Any, rule: Rule) -> Any:
    """Gradient of sum(weights * losses) with respect to the rows, (padded, dim).

    Args:
        batch, margin, rule: what `losses` got.
        weights: (padded,) float32.
        kept: the coefficients that `losses` kept.
    """
    return _whole(_gradient, rule)(batch, margin, weights, kept)
