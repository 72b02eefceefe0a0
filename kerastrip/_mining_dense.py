"""Mining of whole rows of the distance matrix: one coefficient per entry.

For every block of rows: the losses of its rows, and the block of coefficients
d loss / d distance. The gradient is two matrix products with that block. It serves
what takes every triplet or every pair of the batch, a distance matrix that a callable
made, and rows with so many positives that `_mining_pairs` would not keep them.
"""

from __future__ import annotations

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


class Rule(NamedTuple):
    """What a loss takes from the matrix."""

    mining: str  # a mining word, or "contrastive"
    rooted: bool  # distances are roots of the matrix entries
    soft: bool = False
    matrix: bool = False  # the rows are a matrix of distances
    above: int = 0  # only rows with more positives than this


def _by_pairs(d: Any, here: Anchors, margin: Any, rule: Rule) -> tuple[Any, Any, Any]:
    """One negative for every positive, found in the sorted row."""
    count, width = ops.shape(d)
    ascending, order = sorted_negatives(d)
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


def _by_anchors(d: Any, here: Anchors, margin: Any, rule: Rule) -> tuple[Any, Any, Any]:
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


def _by_triplets(
    d: Any, here: Anchors, margin: Any, rule: Rule
) -> tuple[Any, Any, Any]:
    """Every triplet, one pass per positive rank."""
    column = ops.arange(ops.shape(d)[1], dtype="int32")
    negative = d >= 0
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


def _contrast(d: Any, here: Anchors, margin: Any, rule: Rule) -> tuple[Any, Any, Any]:
    """Every pair: half the squared excess over one margin or lack of the other."""
    real = d > -INFINITE
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


def _has_work(here: Anchors, rule: Rule) -> Any:
    return ops.max(here.positives) > rule.above if rule.above else here.own[0] >= 0


def dense_losses(
    rows: Any, labels: Any, size: Any, margin: Any, *, rule: Rule
) -> tuple[Any, Any]:
    """Per row the sum of its losses and the number of those > 0, both (padded,)."""
    batch = Batch(rows, labels, size)
    anchors = find_anchors(batch)
    padded = ops.shape(rows)[0]
    count = block_rows(padded)

    def block(first: Any, losses: Any, active: Any) -> Any:
        here = block_of(anchors, first, count)

        def work() -> Any:
            d = signed_distances(batch, here, first, matrix=rule.matrix)
            loss, more, _ = _TERMS[rule.mining](d, here, margin, rule)
            return put(losses, (first,), loss), put(active, (first,), more)

        done = ops.cond(_has_work(here, rule), work, lambda: (losses, active))
        return first + count, *done

    state = (zero(), ops.zeros((padded,), "float32"), ops.zeros((padded,), "int32"))
    return ops.while_loop(lambda first, *_: first < padded, block, state)[1:]


def dense_gradient(
    rows: Any, labels: Any, size: Any, margin: Any, weights: Any, *, rule: Rule
) -> Any:
    """Gradient of sum(weights * losses) with respect to `rows`, in their shape."""
    batch = Batch(rows, labels, size)
    anchors = find_anchors(batch)
    padded = ops.shape(rows)[0]
    count = block_rows(padded)

    def block(first: Any, gradient: Any) -> Any:
        here = block_of(anchors, first, count)

        def work() -> Any:
            d = signed_distances(batch, here, first, matrix=rule.matrix)
            _, _, coefficients = _TERMS[rule.mining](d, here, margin, rule)
            share = ops.slice(weights, (first,), (count,))
            coefficients = coefficients * share[:, None]
            if rule.matrix:
                return put(gradient, (first, 0), coefficients)
            if rule.rooted:
                root = ops.sqrt(ops.abs(d))
                # The least positive distance stands for 0: no direction, no gradient.
                real = (d > 0) | (d < -TINY)
                coefficients = ops.where(real, coefficients / root, 0.0)
            else:
                coefficients = 2.0 * coefficients
            own = ops.slice(rows, (first, 0), (count, ops.shape(rows)[1]))
            to_columns = row_sum(ops.transpose(coefficients))[
                :, None
            ] * rows - ops.matmul(ops.transpose(coefficients), own)
            to_rows = row_sum(coefficients)[:, None] * own - ops.matmul(
                coefficients, rows
            )
            before = ops.slice(gradient, (first, 0), (count, ops.shape(rows)[1]))
            return put(gradient, (first, 0), before + to_rows) + to_columns

        return first + count, ops.cond(_has_work(here, rule), work, lambda: gradient)

    return ops.while_loop(
        lambda first, _: first < padded, block, (zero(), ops.zeros_like(rows))
    )[1]


def forward(
    rows: Any, labels: Any, size: Any, margin: Any, *, rule: Rule
) -> tuple[Any, Any, Any]:
    """`dense_losses` and the number of units of every row, (padded,) float32."""
    losses, active = dense_losses(rows, labels, size, margin, rule=rule)
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
