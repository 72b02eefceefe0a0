"""Mining of whole rows of the distance matrix: one coefficient per entry.

For every block of rows: the losses of its rows, and the block of coefficients
d loss / d distance. The gradient is two matrix products with that block. It serves
what takes every triplet or every pair of the batch, a distance matrix that a callable
made, and rows with so many positives that `_mining_pairs` would not keep them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from kerastrip._mining_blocks import (
    INFINITE,
    TINY,
    Anchors,
    Batch,
    add_margin,
    block_of,
    block_rows,
    compiled,
    count_below,
    count_true,
    entry,
    extremes,
    find_anchors,
    loss_and_slope,
    positive_column,
    positive_entries,
    put,
    row_sum,
    signed_distances,
    sorted_negatives,
    zero,
)

# Per row of a block: the loss, how many units are > 0, coefficients (count, padded).
Terms = tuple[Any, Any, Any]


class Rule(NamedTuple):
    """What a loss takes from the matrix."""

    mining: str  # a mining word, or "contrastive"
    rooted: bool  # distances are roots of the matrix entries
    soft: bool = False
    matrix: bool = False  # the rows are a matrix of distances
    above: int = 0  # only rows with more positives than this


def _by_pairs(d: Any, order: Any, here: Anchors, margin: Any, rule: Rule) -> Terms:
    """One negative for every positive, found in the sorted row."""
    count, width = ops.shape(d)
    ascending = sorted_negatives(d, order)
    p = ops.abs(d)
    at = count_below(ascending, p, inclusive=True)
    beyond = ops.take_along_axis(ascending, ops.minimum(at, width - 1), axis=1)
    if rule.mining == "semi_hard":
        last = ops.maximum(here.negatives - 1, 0)[:, None]
        at = ops.minimum(at, last)
    else:
        at = ops.where(beyond < add_margin(p, margin, rule.rooted), at, 0)
    n = ops.take_along_axis(ascending, at, axis=1)
    if rule.rooted:
        p, n = ops.sqrt(p), ops.sqrt(n)
    loss, slope = loss_and_slope(p - n, margin, rule.soft)
    wanted = positive_entries(d, here) & (here.positives > rule.above)[:, None]
    wanted = wanted & (here.negatives > 0)[:, None]
    loss, slope = ops.where(wanted, loss, 0.0), ops.where(wanted, slope, 0.0)
    row = ops.arange(count, dtype="int32")[:, None] * width
    place = row + ops.take_along_axis(order, at, axis=1)
    pushed = ops.segment_sum(
        ops.reshape(slope, (-1,)), ops.reshape(place, (-1,)), num_segments=count * width
    )
    return (
        row_sum(loss),
        count_true(loss > 0),
        slope - ops.reshape(pushed, (count, width)),
    )


def _by_anchors(d: Any, _: Any, here: Anchors, margin: Any, rule: Rule) -> Terms:
    """The farthest positive and the nearest negative of every row."""
    positive, negative, _ = extremes(d)
    gap = ops.abs(entry(d, positive)), ops.abs(entry(d, negative))
    if rule.rooted:
        gap = ops.sqrt(gap[0]), ops.sqrt(gap[1])
    valid = (here.positives > 0) & (here.negatives > 0)
    loss, slope = loss_and_slope(gap[0] - gap[1], margin, rule.soft)
    loss, slope = ops.where(valid, loss, 0.0), ops.where(valid, slope, 0.0)
    column = ops.arange(ops.shape(d)[1], dtype="int32")
    signs = _at(column, positive) - _at(column, negative)
    return loss, ops.cast(loss > 0, "int32"), slope[:, None] * signs


def _by_triplets(d: Any, _: Any, here: Anchors, margin: Any, rule: Rule) -> Terms:
    """Every triplet, one pass per positive rank."""
    column = ops.arange(ops.shape(d)[1], dtype="int32")
    negative = ~(d < 0)  # NaN too: it has to show in the loss
    n = ops.where(negative, d, 0.0)
    if rule.rooted:
        n = ops.sqrt(n)

    def step(rank: Any, losses: Any, active: Any, coefficients: Any) -> Any:
        at = positive_column(here, rank, ops.shape(d)[1])
        p = ops.abs(entry(d, at))
        if rule.rooted:
            p = ops.sqrt(p)
        valid = negative & (rank < here.positives)[:, None]
        loss, slope = loss_and_slope(p[:, None] - n, margin, rule.soft)
        loss, slope = ops.where(valid, loss, 0.0), ops.where(valid, slope, 0.0)
        pull = _at(column, at) * row_sum(slope)[:, None]
        return (
            rank + 1,
            losses + loss,
            active + count_true(loss > 0),
            coefficients + pull - slope,
        )

    nothing = ops.zeros_like(d)
    state = (zero(), nothing, ops.zeros_like(here.own), nothing)
    most = ops.max(here.positives)
    _, losses, active, coefficients = ops.while_loop(
        lambda rank, *_: rank < most, step, state
    )
    return row_sum(losses), active, coefficients


def _contrast(d: Any, _: Any, here: Anchors, margin: Any, rule: Rule) -> Terms:
    """Every pair: half the squared excess over one margin or lack of the other."""
    real = d != -INFINITE
    size = ops.where(real, ops.abs(d), 0.0)
    if rule.rooted:
        size = ops.sqrt(size)
    column = ops.arange(ops.shape(d)[1], dtype="int32")
    pair = real & (column != here.own[:, None])
    pair = pair & (here.positives + here.negatives > 0)[:, None]
    excess = ops.relu(size - margin[0])
    lack = ops.relu(margin[1] - size)
    slope = ops.where(pair, ops.where(d < 0, excess, -lack), 0.0)
    return 0.5 * row_sum(ops.square(slope)), count_true(slope != 0), slope


def _at(column: Any, place: Any) -> Any:
    return ops.cast(column == place[:, None], "float32")


_TERMS = {
    "semi_hard": _by_pairs,
    "semi_hard_or_hard": _by_pairs,
    "hard": _by_anchors,
    "all": _by_triplets,
    "contrastive": _contrast,
}


def prepared(function: Callable, rule: Rule) -> Callable:
    """`function` for a rule, compiled as a whole unless its rows are sorted.

    XLA sorts three to five times slower on a CPU than TensorFlow does: then the sort
    stays outside, between two compiled pieces.
    """
    if _TERMS[rule.mining] is _by_pairs:
        return functools.partial(function, rule=rule, piece=compiled)
    return compiled(function, rule=rule, piece=functools.partial)


def _distances(
    rows: Any, labels: Any, size: Any, here: Anchors, first: Any, *, matrix: bool
) -> tuple[Any, Any]:
    """Signed distances of a block, and what to sort: inf for all but negatives."""
    d = signed_distances(Batch(rows, labels, size), here, first, matrix)
    return d, ops.where(d >= 0, d, INFINITE)


def _losses_of_block(
    d: Any, order: Any, here: Anchors, margin: Any, *, rule: Rule
) -> tuple[Any, Any]:
    return _TERMS[rule.mining](d, order, here, margin, rule)[:2]


def _gradient_of_block(
    rows: Any,
    d: Any,
    order: Any,
    here: Anchors,
    margin: Any,
    weights: Any,
    *,
    rule: Rule,
) -> tuple[Any, Any]:
    """The block's share in the gradient: of its own rows, and of all columns."""
    coefficients = _TERMS[rule.mining](d, order, here, margin, rule)[2]
    coefficients = coefficients * weights[:, None]
    if rule.matrix:
        return coefficients, ops.zeros((1, 1))
    if rule.rooted:
        # The least distance of a positive stands for 0, which has no direction.
        apart = (d > 0) | (d < -TINY)
        coefficients = ops.where(apart, coefficients / ops.sqrt(ops.abs(d)), 0.0)
    else:
        coefficients = 2.0 * coefficients
    own = ops.take(rows, here.own, axis=0)
    back = ops.transpose(coefficients)
    return (
        row_sum(coefficients)[:, None] * own - ops.matmul(coefficients, rows),
        row_sum(back)[:, None] * rows - ops.matmul(back, own),
    )


def _walk(batch: Batch, rule: Rule, piece: Callable, visit: Callable, state: Any):
    """Call visit(d, order, here, first, *state) on the blocks that have work."""
    anchors = find_anchors(batch)
    padded = ops.shape(batch.rows)[0]
    count = block_rows(padded)

    def block(first: Any, *state: Any) -> Any:
        here = block_of(anchors, first, count)

        def work() -> Any:
            d, keys = piece(_distances, matrix=rule.matrix)(*batch, here, first)
            order = None
            if _TERMS[rule.mining] is _by_pairs:
                order = ops.cast(ops.argsort(keys, axis=1), "int32")
            return visit(d, order, here, first, *state)

        if rule.above:
            wide = ops.max(here.positives) > rule.above
            return first + count, *ops.cond(wide, work, lambda: state)
        return first + count, *work()

    return ops.while_loop(lambda first, *_: first < padded, block, (zero(), *state))[1:]


def dense_losses(
    rows: Any, labels: Any, size: Any, margin: Any, *, rule: Rule, piece: Callable
) -> tuple[Any, Any]:
    """Per row the sum of its losses and the number of those > 0, both (padded,)."""
    padded = ops.shape(rows)[0]
    state = ops.zeros((padded,), "float32"), ops.zeros((padded,), "int32")

    def visit(d: Any, order: Any, here: Anchors, first: Any, *state: Any) -> Any:
        found = piece(_losses_of_block, rule=rule)(d, order, here, margin)
        return tuple(put(x, (first,), y) for x, y in zip(state, found, strict=True))

    return _walk(Batch(rows, labels, size), rule, piece, visit, state)


def dense_gradient(
    rows: Any,
    labels: Any,
    size: Any,
    margin: Any,
    weights: Any,
    *,
    rule: Rule,
    piece: Callable,
) -> Any:
    """Gradient of sum(weights * losses) with respect to `rows`, in their shape."""
    width = ops.shape(rows)[1]

    def visit(d: Any, order: Any, here: Anchors, first: Any, gradient: Any) -> Any:
        to_rows, to_columns = piece(_gradient_of_block, rule=rule)(
            rows, d, order, here, margin, ops.take(weights, here.own)
        )
        if rule.matrix:
            return (put(gradient, (first, 0), to_rows),)
        before = ops.slice(gradient, (first, 0), (ops.shape(d)[0], width))
        return (put(gradient, (first, 0), before + to_rows) + to_columns,)

    batch = Batch(rows, labels, size)
    return _walk(batch, rule, piece, visit, (ops.zeros_like(rows),))[0]


def forward(
    rows: Any, labels: Any, size: Any, margin: Any, *, rule: Rule, piece: Callable
) -> tuple[Any, Any, Any]:
    """`dense_losses` and the number of units of every row, (padded,) float32."""
    losses, active = dense_losses(rows, labels, size, margin, rule=rule, piece=piece)
    anchors = find_anchors(Batch(rows, labels, size))
    positives = ops.cast(anchors.positives, "float32")
    negatives = ops.cast(anchors.negatives, "float32")
    units = {
        "contrastive": positives + negatives,
        "all": positives * negatives,
        "hard": ops.minimum(positives, 1.0) * ops.minimum(negatives, 1.0),
    }
    return (
        losses,
        active,
        units.get(rule.mining, positives * ops.minimum(negatives, 1.0)),
    )
