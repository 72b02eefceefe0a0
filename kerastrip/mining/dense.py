"""Mining of whole rows of the distance matrix: one coefficient for each entry.

For every block of rows: the losses of its rows, and the block of coefficients
d loss / d distance, with which the gradient is a matrix product. With c(a,b) the
coefficient of a row a and another row b, divided by the distance if that is a root:

    gradient of row a = sum over b of (c(a,b) + c(b,a)) * (a - b)

Batches of up to `KEPT_ROWS` keep the coefficients for the backward pass, larger ones
make them again. It serves what takes every triplet or every pair of the batch, and the
rows with so many positives that `mining.pairs` would not keep them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from kerastrip.mining import blocks
from kerastrip.mining.blocks import Anchors, OrderedBatch, Rule, Terms

__all__ = [
    "Block",
    "gradient",
    "losses",
    "no_losses",
]

KEPT_ROWS = 2048


class Block(NamedTuple):
    """What is found for the rows of a block."""

    losses: Any  # (count,) float32
    active: Any  # (count,) int32, how many units are > 0
    coefficients: Any  # (count, padded) float32


# Where XLA compiles. It sorts three to five times slower on a CPU than TensorFlow does, so
# by pairs the sort stays outside, between functions that are compiled by themselves:
#
#     all, contrastive    XLA[ loop over blocks[ distances -> block ] ]
#     pairs               loop over blocks[ XLA[distances] -> sort -> XLA[block] ]
#
# (In a step that the user compiles with `jit_compile=True` all is inside.)


def _compile_outer(function: Callable, rule: Rule) -> Callable:
    """`function`, which goes over blocks, for a rule."""
    if rule.by_pairs:
        return functools.partial(function, rule=rule)
    return blocks.compiled_on_tensorflow(function, rule=rule)


def _compile_inner(function: Callable, rule: Rule) -> Callable:
    """`function`, which is called for one block, for a rule."""
    if rule.by_pairs:
        return blocks.compiled_on_tensorflow(function, rule=rule)
    return functools.partial(function, rule=rule)


# The units of one block ---------------------------------------------------------------


def _by_pairs(
    d: Any, by_distance: Any, here: Anchors, margin: Any, rule: Rule
) -> Block:
    """One negative for every positive of the rows with many, found in the sorted row.

    A row with the signed distances -4 -9 (positives), 6, 2, 16 (negatives) is sorted to
    2, 6, 16. Below the positive 4 lies one negative, so place 1 is the nearest beyond it.

    Args:
        d: (count, padded) signed distances.
        by_distance: (count, padded) int32 columns, the negatives first, the nearest
            before all; None for the other functions here.
        here, margin, rule: the anchors of the block, () float32, what to take.
    """
    count, width = ops.shape(d)
    p = ops.abs(d)
    ascending = ops.where(d >= 0, d, blocks.INFINITE)
    ascending = ops.take_along_axis(ascending, by_distance, axis=1)
    chosen = blocks.count_below(ascending, p, inclusive=True)  # places, (count, padded)
    if rule.mining == "semi_hard":
        chosen = ops.minimum(chosen, ops.maximum(here.negatives - 1, 0)[:, None])
    else:
        beyond = ops.take_along_axis(ascending, ops.minimum(chosen, width - 1), axis=1)
        within = beyond < blocks.add_margin(p, margin, rule.rooted)
        chosen = ops.where(within, chosen, 0)
    n = ops.take_along_axis(ascending, chosen, axis=1)
    gap = ops.sqrt(p) - ops.sqrt(n) if rule.rooted else p - n
    loss, slope = blocks.loss_and_slope(gap, margin, rule.soft)
    many = (here.positives > blocks.MOST_RANKS) & (here.negatives > 0)
    wanted = blocks.positive_entries(d, here) & many[:, None]
    loss, slope = ops.where(wanted, loss, 0.0), ops.where(wanted, slope, 0.0)
    # Several pairs of a row may have the same negative: their slopes add up.
    row = ops.arange(count, dtype="int32")[:, None] * width
    place = ops.reshape(row + ops.take_along_axis(by_distance, chosen, axis=1), (-1,))
    slopes = ops.reshape(slope, (-1,))
    pushed = ops.segment_sum(slopes, place, num_segments=count * width)
    coefficients = slope - ops.reshape(pushed, (count, width))
    return Block(blocks.row_sum(loss), blocks.count_true(loss > 0), coefficients)


def _by_triplets(
    d: Any, by_distance: None, here: Anchors, margin: Any, rule: Rule
) -> Block:
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


def _by_contrast(
    d: Any, by_distance: None, here: Anchors, margin: Any, rule: Rule
) -> Block:
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


_BY_WORD = {
    "semi_hard": _by_pairs,
    "semi_hard_or_hard": _by_pairs,
    "all": _by_triplets,
    "contrastive": _by_contrast,
}


def _block(
    d: Any, by_distance: Any, here: Anchors, margin: Any, *, rule: Rule
) -> Block:
    """What is found for a block, its coefficients ready for differences of rows."""
    found = _BY_WORD[rule.mining](d, by_distance, here, margin, rule)
    coefficients = 2.0 * found.coefficients
    if rule.rooted:
        # The least distance of a positive stands for 0, which has no direction.
        apart = (d > 0) | (d < -blocks.TINY)
        coefficients = found.coefficients / ops.sqrt(ops.abs(d))
        coefficients = ops.where(apart, coefficients, 0.0)
    return found._replace(coefficients=coefficients)


# The blocks of a batch ----------------------------------------------------------------


def _distances(batch: OrderedBatch, here: Anchors, first: Any, *, rule: Rule) -> tuple:
    """Signed distances of a block, and what to sort: inf for all but negatives."""
    d = blocks.signed_distances(batch, here, first)
    return d, ops.where(d >= 0, d, blocks.INFINITE)


def _over_blocks(
    batch: OrderedBatch, rule: Rule, visit: Callable, state: tuple
) -> tuple:
    """Call `visit(d, by_distance, here, first, *state)` for the blocks that have work.

    Every block has, but by pairs only a block that holds a row with many positives.
    """

    def block(here: Anchors, first: Any, *state: Any) -> tuple:
        def work() -> tuple:
            d, keys = _compile_inner(_distances, rule)(batch, here, first)
            by_distance = None
            if rule.by_pairs:
                by_distance = ops.cast(ops.argsort(keys, axis=1), "int32")
            return visit(d, by_distance, here, first, *state)

        if not rule.by_pairs:
            return work()
        has_many = ops.max(here.positives) > blocks.MOST_RANKS
        return ops.cond(has_many, work, lambda: state)

    return blocks.over_blocks(batch, block, state)


def _kept_columns(width: Any) -> Any:
    """How many columns of coefficients are kept: all, or 0 in a large batch."""
    return blocks.flag(width <= KEPT_ROWS) * width


def _kept_block(
    d: Any, by_distance: Any, here: Anchors, margin: Any, *, rule: Rule
) -> Block:
    """`_block`, its coefficients as far as they are kept."""
    found = _block(d, by_distance, here, margin, rule=rule)
    columns = _kept_columns(ops.shape(found.coefficients)[1])
    return found._replace(coefficients=found.coefficients[:, :columns])


def _units(batch: OrderedBatch, rule: Rule) -> Any:
    """The number of units of every row, (padded,) float32."""
    anchors = blocks.find_anchors(batch)
    positives = ops.cast(anchors.positives, "float32")
    negatives = ops.cast(anchors.negatives, "float32")
    if rule.mining == "contrastive":
        return positives + negatives
    if rule.mining == "all":
        return positives * negatives
    return positives * ops.minimum(negatives, 1.0)


def no_losses(batch: OrderedBatch) -> Terms:
    """What `losses` returns for a batch without any unit."""
    padded = ops.shape(batch.rows)[0]
    return Terms(
        ops.zeros((padded,), "float32"),
        ops.zeros((padded,), "int32"),
        ops.zeros((padded,), "float32"),
        ops.zeros((padded, _kept_columns(padded)), "float32"),
    )


def _losses(batch: OrderedBatch, margin: Any, *, rule: Rule) -> Terms:
    batch = blocks.near_the_origin(batch)

    def visit(
        d: Any, by_distance: Any, here: Anchors, first: Any, *state: Any
    ) -> tuple:
        found = _compile_inner(_kept_block, rule)(d, by_distance, here, margin)
        return tuple(map(blocks.put, state, ((first,), (first,), (first, 0)), found))

    nothing = no_losses(batch)
    state = nothing.losses, nothing.active, nothing.kept
    losses, active, kept = _over_blocks(batch, rule, visit, state)
    return Terms(losses, active, _units(batch, rule), kept)


def losses(batch: OrderedBatch, margin: Any, rule: Rule) -> Terms:
    """The losses of all rows; by pairs only of rows with more than `MOST_RANKS` positives.

    Args:
        batch: ordered by label.
        margin: () float32; for "contrastive" (2,), the positive and the negative one.
        rule: its `mining` is any word but "hard".

    Returns:
        `Terms`; kept are the coefficients, (padded, padded), or (padded, 0) where they
        are too many to keep.
    """
    return _compile_outer(_losses, rule)(batch, margin)


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


def _gradient(
    batch: OrderedBatch, margin: Any, weights: Any, kept: Any, *, rule: Rule
) -> Any:
    batch = blocks.near_the_origin(batch)
    rows = batch.rows
    dim = ops.shape(rows)[1]

    def visit(
        d: Any, by_distance: Any, here: Anchors, first: Any, gradient: Any
    ) -> tuple:
        found = _compile_inner(_block, rule)(d, by_distance, here, margin)
        to_own, to_all = _compile_inner(_gradient_of_block, rule)(
            rows, here, found.coefficients, ops.take(weights, here.own)
        )
        before = ops.slice(gradient, (first, 0), (ops.shape(d)[0], dim))
        return (blocks.put(gradient, (first, 0), before + to_own) + to_all,)

    were_kept = ops.shape(kept)[1] > 0
    return blocks.choose(
        were_kept,
        lambda: _compile_inner(_gradient_of_kept, rule)(rows, weights, kept),
        lambda: _over_blocks(batch, rule, visit, (ops.zeros_like(rows),))[0],
    )


def gradient(
    batch: OrderedBatch, margin: Any, weights: Any, kept: Any, rule: Rule
) -> Any:
    """Gradient of sum(weights * losses) with respect to the rows, (padded, dim).

    Args:
        batch, margin: what `losses` got.
        weights: (padded,) float32.
        kept: the coefficients that `losses` kept.
        rule: what `losses` got.
    """
    return _compile_outer(_gradient, rule)(batch, margin, weights, kept)
