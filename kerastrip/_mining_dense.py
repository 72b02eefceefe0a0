"""Mining of whole rows of the distance matrix: one coefficient per entry.

For every block of rows: the losses of its rows, and the block of coefficients
d loss / d distance, with which the gradient is a matrix product. Batches of up to
`KEPT_ROWS` keep the coefficients for the backward pass, larger ones make them again.
It serves what takes every triplet or every pair of the batch, a distance matrix that
a callable made, and rows with so many positives that `_mining_pairs` would not keep
them.
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
    choose,
    compiled,
    count_below,
    count_true,
    counts_by_search,
    entry,
    extremes,
    find_anchors,
    flag,
    loss_and_slope,
    positive_column,
    positive_entries,
    put,
    row_sum,
    signed_distances,
    sorted_negatives,
    zero,
)


class Terms(NamedTuple):
    """What is found for the rows of a block."""

    losses: Any  # (count,) float32
    active: Any  # (count,) int32, how many units are > 0
    coefficients: Any  # (count, columns) float32; with others see `_coefficients`
    counts: Any = ()  # (3, count) int32, what `counts_by_search` returns
    distance: Any = ()  # (count,) float32, likewise


KEPT_ROWS = 2048


class Rule(NamedTuple):
    """What a loss takes from the matrix."""

    mining: str  # a mining word, or "contrastive"
    rooted: bool  # distances are roots of the matrix entries
    soft: bool = False
    matrix: bool = False  # the rows are a matrix of distances
    above: int = 0  # only rows with more positives than this
    census: bool = False  # count the triplets of these rows, for the pair minings


def _coefficients(
    of_slopes: Callable,
    slope: Any,
    positive: Any,
    negative: Any,
    here: Anchors,
    padded: Any,
) -> Any:
    """The coefficients of a block: `of_slopes` turns slopes of triplets into them.

    With others (count, columns + padded): behind those of the anchors the ones that
    the rows of the batch get as positives and negatives. These are of the triplets
    inside the batch, whose columns `positive` and `negative` are both below `padded`.
    """
    coefficients = of_slopes(slope)
    if here.other_start is None:
        return coefficients
    inside = (positive < padded) & (negative < padded)
    back = of_slopes(ops.where(inside, slope, 0.0))[:, :padded]
    return ops.concatenate([coefficients, back], axis=1)


def _by_pairs(
    d: Any, order: Any, here: Anchors, margin: Any, padded: Any, rule: Rule
) -> Terms:
    """One negative for every positive, found in the sorted row."""
    count, width = ops.shape(d)
    ascending = sorted_negatives(d, order)
    p = ops.abs(d)
    at = below = count_below(ascending, p, inclusive=True)
    beyond = ops.take_along_axis(ascending, ops.minimum(at, width - 1), axis=1)
    if rule.mining == "semi_hard":
        last = ops.maximum(here.negatives - 1, 0)[:, None]
        at = ops.minimum(at, last)
    else:
        at = ops.where(beyond < add_margin(p, margin, rule.rooted), at, 0)
    n = ops.take_along_axis(ascending, at, axis=1)
    gap = ops.sqrt(p) - ops.sqrt(n) if rule.rooted else p - n
    loss, slope = loss_and_slope(gap, margin, rule.soft)
    wanted = positive_entries(d, here) & (here.positives > rule.above)[:, None]
    wanted = wanted & (here.negatives > 0)[:, None]
    loss, slope = ops.where(wanted, loss, 0.0), ops.where(wanted, slope, 0.0)
    row = ops.arange(count, dtype="int32")[:, None] * width
    negative = ops.take_along_axis(order, at, axis=1)
    place = ops.reshape(row + negative, (-1,))

    def of_slopes(slope: Any) -> Any:
        flat = ops.reshape(slope, (-1,))
        pushed = ops.segment_sum(flat, place, num_segments=count * width)
        return slope - ops.reshape(pushed, (count, width))

    positive = ops.arange(width, dtype="int32")
    terms = Terms(
        row_sum(loss),
        count_true(loss > 0),
        _coefficients(of_slopes, slope, positive, negative, here, padded),
    )
    if not rule.census:
        return terms
    many = here.positives > rule.above
    counts, distance = counts_by_search(d, ascending, below, here, margin, rule.rooted)
    return terms._replace(
        counts=ops.where(many, counts, 0), distance=ops.where(many, distance, 0.0)
    )


def _by_anchors(
    d: Any, order: Any, here: Anchors, margin: Any, padded: Any, rule: Rule
) -> Terms:
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
    return Terms(loss, ops.cast(loss > 0, "int32"), slope[:, None] * signs)


def _by_triplets(
    d: Any, order: Any, here: Anchors, margin: Any, padded: Any, rule: Rule
) -> Terms:
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

        def of_slopes(slope: Any) -> Any:
            return _at(column, at) * row_sum(slope)[:, None] - slope

        more = _coefficients(of_slopes, slope, at[:, None], column, here, padded)
        return (
            rank + 1,
            losses + loss,
            active + count_true(loss > 0),
            coefficients + more,
        )

    nothing = ops.zeros_like(d)
    start = _coefficients(ops.zeros_like, nothing, column, column, here, padded)
    state = (zero(), nothing, ops.zeros_like(here.own), start)
    most = ops.max(here.positives)
    _, losses, active, coefficients = ops.while_loop(
        lambda rank, *_: rank < most, step, state
    )
    return Terms(row_sum(losses), active, coefficients)


def _contrast(
    d: Any, order: Any, here: Anchors, margin: Any, padded: Any, rule: Rule
) -> Terms:
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
    return Terms(0.5 * row_sum(ops.square(slope)), count_true(slope != 0), slope)


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
    batch: Batch, columns: Any, here: Anchors, first: Any, *, matrix: bool
) -> tuple[Any, Any]:
    """Signed distances of a block, and what to sort: inf for all but negatives."""
    d = signed_distances(batch, columns, here, first, matrix)
    return d, ops.where(d >= 0, d, INFINITE)


def _kept_columns(width: Any) -> Any:
    """How many columns of coefficients are kept: all of them or none."""
    return flag(width <= KEPT_ROWS) * width


def _terms_of_block(
    d: Any, order: Any, here: Anchors, margin: Any, rows: Any, *, rule: Rule
) -> Terms:
    """The terms of a block of the batch's `rows`.

    A coefficient is what the difference of two rows is multiplied by:
    d loss / d distance, divided by the distance if that is a root.
    """
    padded = ops.shape(rows)[0]
    terms = _TERMS[rule.mining](d, order, here, margin, padded, rule)
    coefficients = terms.coefficients
    if here.other_start is not None:
        d = ops.concatenate([d, d[:, :padded]], axis=1)
    if rule.rooted:
        # The least distance of a positive stands for 0, which has no direction.
        apart = (d > 0) | (d < -TINY)
        coefficients = ops.where(apart, coefficients / ops.sqrt(ops.abs(d)), 0.0)
    elif not rule.matrix:
        coefficients = 2.0 * coefficients
    return terms._replace(coefficients=coefficients)


def _kept_terms(
    d: Any, order: Any, here: Anchors, margin: Any, rows: Any, *, rule: Rule
) -> Terms:
    """`_terms_of_block`, coefficients as far as they are kept."""
    terms = _terms_of_block(d, order, here, margin, rows, rule=rule)
    columns = _kept_columns(ops.shape(terms.coefficients)[1])
    return terms._replace(coefficients=terms.coefficients[:, :columns])


def _gradient_of_block(
    rows: Any,
    columns: Any,
    d: Any,
    order: Any,
    here: Anchors,
    margin: Any,
    weights: Any,
    *,
    rule: Rule,
) -> tuple[Any, Any]:
    """The block's share in the gradient: of its own rows, and of all rows."""
    terms = _terms_of_block(d, order, here, margin, rows, rule=rule)
    coefficients = terms.coefficients * weights[:, None]
    if rule.matrix:
        return coefficients, ops.zeros((1, 1))
    own = ops.take(rows, here.own, axis=0)
    back = ops.transpose(coefficients[:, -ops.shape(rows)[0] :])
    coefficients = coefficients[:, : ops.shape(columns)[0]]
    return (
        row_sum(coefficients)[:, None] * own - ops.matmul(coefficients, columns),
        row_sum(back)[:, None] * rows - ops.matmul(back, own),
    )


def _gradient_of_kept(batch: Batch, weights: Any, kept: Any, *, matrix: bool) -> Any:
    """The whole gradient from all coefficients."""
    kept = kept * weights[:, None]
    if matrix:
        return kept
    rows = batch.rows
    if batch.others is None:
        kept = kept + ops.transpose(kept)
        return row_sum(kept)[:, None] * rows - ops.matmul(kept, rows)
    padded, width = ops.shape(rows)[0], batch.width()
    back = ops.transpose(kept[:, width:])
    kept = ops.concatenate([kept[:, :padded] + back, kept[:, padded:width]], axis=1)
    return row_sum(kept)[:, None] * rows - ops.matmul(kept, batch.columns())


def _walk(batch: Batch, rule: Rule, piece: Callable, visit: Callable, state: Any):
    """Call visit(d, order, here, first, *state) on the blocks that have work."""
    anchors = find_anchors(batch)
    columns = batch.columns()
    padded = ops.shape(batch.rows)[0]
    count = block_rows(padded)

    def block(first: Any, *state: Any) -> Any:
        here = block_of(anchors, first, count)

        def work() -> Any:
            measure = piece(_distances, matrix=rule.matrix)
            d, keys = measure(batch, columns, here, first)
            order = None
            if _TERMS[rule.mining] is _by_pairs:
                order = ops.cast(ops.argsort(keys, axis=1), "int32")
            return visit(d, order, here, first, *state)

        if rule.above:
            wide = ops.max(here.positives) > rule.above
            return first + count, *ops.cond(wide, work, lambda: state)
        return first + count, *work()

    return ops.while_loop(lambda first, *_: first < padded, block, (zero(), *state))[1:]


def dense_losses(batch: Batch, margin: Any, *, rule: Rule, piece: Callable) -> Terms:
    """The terms of all rows.

    Returns:
        `Terms` of (padded,) rows, the coefficients those kept for `dense_gradient`:
        (padded, columns) or (padded, 0).
    """

    def visit(d: Any, order: Any, here: Anchors, first: Any, *state: Any) -> Any:
        found = piece(_kept_terms, rule=rule)(d, order, here, margin, batch.rows)
        corners = (first,), (first,), (first, 0), (0, first), (first,)
        return tuple(map(put, state, corners, found))

    state = no_losses(batch, rule.census)[: 5 if rule.census else 3]
    return Terms(*_walk(batch, rule, piece, visit, state))


def no_losses(batch: Batch, census: bool) -> Terms:
    """What `dense_losses` returns for a batch without any loss."""
    padded, width = ops.shape(batch.rows)[0], batch.width()
    if batch.others is not None:
        width = width + padded
    terms = Terms(
        ops.zeros((padded,), "float32"),
        ops.zeros((padded,), "int32"),
        ops.zeros((padded, _kept_columns(width)), "float32"),
    )
    if not census:
        return terms
    return terms._replace(
        counts=ops.zeros((3, padded), "int32"), distance=ops.zeros((padded,), "float32")
    )


def dense_gradient(
    batch: Batch,
    margin: Any,
    weights: Any,
    kept: Any,
    *,
    rule: Rule,
    piece: Callable,
) -> Any:
    """Gradient of sum(weights * losses) with respect to the rows, in their shape.

    Args:
        batch, margin: what `dense_losses` got.
        weights: (padded,).
        kept: the coefficients that it returned.
        rule, piece: as there.
    """
    rows, columns = batch.rows, batch.columns()
    width = ops.shape(rows)[1]

    def visit(d: Any, order: Any, here: Anchors, first: Any, gradient: Any) -> Any:
        to_rows, to_columns = piece(_gradient_of_block, rule=rule)(
            rows, columns, d, order, here, margin, ops.take(weights, here.own)
        )
        if rule.matrix:
            return (put(gradient, (first, 0), to_rows),)
        before = ops.slice(gradient, (first, 0), (ops.shape(d)[0], width))
        return (put(gradient, (first, 0), before + to_rows) + to_columns,)

    def anew() -> Any:
        return _walk(batch, rule, piece, visit, (ops.zeros_like(rows),))[0]

    return choose(
        ops.shape(kept)[1] > 0,
        lambda: piece(_gradient_of_kept, matrix=rule.matrix)(batch, weights, kept),
        anew,
    )


def forward(
    batch: Batch, margin: Any, *, rule: Rule, piece: Callable
) -> tuple[Terms, Any]:
    """`dense_losses` and the number of units of every row, (padded,) float32."""
    terms = dense_losses(batch, margin, rule=rule, piece=piece)
    anchors = find_anchors(batch)
    positives = ops.cast(anchors.positives, "float32")
    negatives = ops.cast(anchors.negatives, "float32")
    units = {
        "contrastive": positives + negatives,
        "all": positives * negatives,
        "hard": ops.minimum(positives, 1.0) * ops.minimum(negatives, 1.0),
    }
    return terms, units.get(rule.mining, positives * ops.minimum(negatives, 1.0))
