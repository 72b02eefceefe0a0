"""A batch ordered by label and padded; distances of one block of its rows.

The mining engine works on the batch in the order of its labels. Every class is then
one stretch of rows, so the positives of a row are known by two numbers, and the
padding at the end makes all blocks of rows equal. The batch size may be unknown when
a function is traced: sizes are Python integers or scalar tensors.

Columns of the distance matrix are the rows of the batch, and behind them other rows,
of a memory, which have positives and negatives in nobody's eyes but the batch's. They
get no gradient, and in a triplet with one of them the anchor alone does. For a negative
that cannot give way the positive would be pulled to the anchor with nothing in return,
and the batch would shrink to a point.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from kerastrip.distances import squared_distances

INFINITE = float("inf")
TINY = 2e-38  # the least distance of a positive: above every denormal number


class OtherRows(NamedTuple):
    """Rows that are no anchors, ordered by label, then padding."""

    rows: Any  # (more, dim) float32
    labels: Any  # (more,) integers, those of the padding not below the others
    size: Any  # () int32: how many rows are real
    positives: bool  # whether those of an anchor's label are positives, or nothing


class Batch(NamedTuple):
    """Rows ordered by label, then padding; every row is an anchor."""

    rows: Any  # (padded, dim) float32, or a (padded, padded) matrix of distances
    labels: Any  # (padded,) integers
    size: Any  # () int32: how many rows are real
    others: OtherRows | None = None

    def width(self) -> Any:
        """The number of columns."""
        padded = ops.shape(self.rows)[0]
        return padded + (0 if self.others is None else ops.shape(self.others.rows)[0])

    def columns(self) -> Any:
        """The rows to measure against, (columns, dim): the batch, then the others."""
        if self.others is None:
            return self.rows
        return ops.concatenate([self.rows, self.others.rows])


class Anchors(NamedTuple):
    """For every row: where its class lies among the columns, and how many rows match.

    The positives of a row are the columns [start, stop) without `own`, and of the
    others, where there are any, [other_start, other_stop).
    """

    own: Any  # (padded,) int32: the row's own column
    start: Any  # (padded,) int32
    stop: Any  # (padded,) int32
    positives: Any  # (padded,) int32: 0 for padding
    negatives: Any  # (padded,) int32: 0 for padding
    other_start: Any = None  # (padded,) int32
    other_stop: Any = None  # (padded,) int32


def flag(condition: Any) -> Any:
    if isinstance(condition, bool):
        return int(condition)
    return ops.cast(condition, "int32")


def padded_size(size: Any) -> Any:
    """`size` rounded up to one of few sizes: few sizes, few compilations."""
    unit = (
        32
        + 32 * flag(size > 128)
        + 64 * flag(size > 1024)
        + 384 * flag(size > 4096)
        + 1536 * flag(size > 16384)
    )
    return (size + flag(size < 1) + unit - 1) // unit * unit


def block_rows(padded: Any) -> Any:
    """Rows per block, a divisor of the padded size: a block stays in the cache."""
    small = flag(padded <= 128)
    return small * padded + (1 - small) * 64


def choose(condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """`yes()` or `no()`; where sizes alone decide, XLA compiles only that one.

    (`ops.cond` compiles both, whose shapes must then agree.)
    """
    if isinstance(condition, bool):
        return yes() if condition else no()
    return ops.switch(ops.cast(condition, "int32"), [no, yes])


def zero() -> Any:
    """The int32 scalar 0, where a loop begins."""
    return ops.zeros((), "int32")


def put(buffer: Any, at: tuple, values: Any) -> Any:
    """`buffer` with `values` written at the given corner."""
    return ops.slice_update(buffer, at, ops.cast(values, buffer.dtype))


def order_by_label(labels: Any, size: Any, padded: Any) -> Any:
    """The order of `size` rows by label, and behind them the padding."""
    order = ops.cast(ops.argsort(labels), "int32")
    return ops.concatenate([order, ops.arange(size, padded, dtype="int32")])


def inverse_order(order: Any) -> Any:
    """The order that undoes `order`."""
    padded = ops.shape(order)[0]
    positions = ops.arange(padded, dtype="int32")
    return ops.scatter(order[:, None], positions, (padded,))


def take_padded(x: Any, order: Any) -> Any:
    """`x` with zeros appended up to the length of `order`, in that order."""
    fill = ops.shape(order)[0] - ops.shape(x)[0]
    zeros = ops.zeros((fill, *ops.shape(x)[1:]), x.dtype)
    return ops.take(ops.concatenate([x, zeros]), order, axis=0)


def find_anchors(batch: Batch) -> Anchors:
    """Where the class of every row lies, by one pass over the ordered labels."""
    padded = ops.shape(batch.labels)[0]
    own = ops.arange(padded, dtype="int32")
    # A class begins where the label changes; padding is a class of its own.
    differs = batch.labels[1:] != batch.labels[:-1]
    begins = ops.concatenate([own[:1] > 0, differs | (own[1:] == batch.size)])
    code = ops.cumsum(ops.cast(begins, "int32"))
    members = ops.segment_sum(ops.ones_like(own), code, num_segments=padded)
    stop = ops.cast(ops.take(ops.cumsum(members), code), "int32")
    members = ops.cast(ops.take(members, code), "int32")
    real = ops.cast(own < batch.size, "int32")
    anchors = Anchors(
        own, stop - members, stop, real * (members - 1), real * (batch.size - members)
    )
    if batch.others is None:
        return anchors
    return _among_others(anchors, batch, batch.others)


def _among_others(anchors: Anchors, batch: Batch, others: OtherRows) -> Anchors:
    """The anchors with their positives and negatives among the others."""
    start, stop = (
        ops.minimum(
            ops.cast(ops.searchsorted(others.labels, batch.labels, side), "int32"),
            others.size,
        )
        for side in ("left", "right")
    )
    real = ops.cast(anchors.own < batch.size, "int32")
    positives = stop - start if others.positives else 0
    return anchors._replace(
        positives=anchors.positives + real * positives,
        negatives=anchors.negatives + real * (others.size - (stop - start)),
        other_start=start + ops.shape(batch.rows)[0],
        other_stop=stop + ops.shape(batch.rows)[0],
    )


def block_of(anchors: Anchors, first: Any, count: Any) -> Anchors:
    """The anchors of the rows [first, first + count)."""
    return Anchors(
        *(
            None if field is None else ops.slice(field, (first,), (count,))
            for field in anchors
        )
    )


def signed_distances(
    batch: Batch, columns: Any, anchors: Anchors, first: Any, matrix: bool
) -> Any:
    """Distances of a block of rows to all columns; the sign tells the kind.

    A negative has d >= 0; the row itself and its positives -max(d, TINY) < 0;
    padding -inf. So the negatives farther than a positive p are the entries > |p|,
    with no mask beside the matrix.

    Args:
        batch: all rows; for `matrix` its rows are distances already.
        columns: those of the batch.
        anchors: those of the block.
        first: the block's first row.
        matrix: take distances (>= 0) from `batch.rows` instead of squared
            euclidean distances of the rows.

    Returns:
        (count, columns) float32.
    """
    count, width = ops.shape(anchors.own)[0], ops.shape(batch.rows)[1]
    d = ops.slice(batch.rows, (first, 0), (count, width))
    if not matrix:
        d = squared_distances(d, columns)
    column = ops.arange(ops.shape(columns)[0], dtype="int32")
    same = (column >= anchors.start[:, None]) & (column < anchors.stop[:, None])
    real = column < batch.size
    if batch.others is not None:
        again = column >= anchors.other_start[:, None]
        again = again & (column < anchors.other_stop[:, None])
        padded = ops.shape(batch.rows)[0]
        real = real | ((column >= padded) & (column < padded + batch.others.size))
        if batch.others.positives:
            same = same | again
        else:
            real = real & ~again
    d = ops.where(same, -ops.maximum(d, TINY), d)
    return ops.where(real, d, -INFINITE)


def positive_column(anchors: Anchors, rank: Any, columns: Any) -> Any:
    """The column of the positive number `rank` of every row, kept below `columns`."""
    at = anchors.start + rank
    at = at + ops.cast(at >= anchors.own, "int32")
    if anchors.other_start is not None:
        at = ops.where(at < anchors.stop, at, anchors.other_start + (at - anchors.stop))
    return ops.minimum(at, columns - 1)


def first_true(mask: Any) -> Any:
    """The first True of every row, or the last column if there is none."""
    width = ops.shape(mask)[-1]
    column = ops.arange(width, dtype="int32")
    return ops.min(ops.where(mask, column, width - 1), axis=-1)


def entry(d: Any, column: Any) -> Any:
    """d[i, column[i]] of every row i."""
    return ops.take_along_axis(d, column[:, None], axis=1)[:, 0]


def nearest_beyond(d: Any, bound: Any) -> tuple[Any, Any]:
    """The least entry > bound of every row and its column; inf and any if none.

    In two stages, since finding the place of a minimum costs three times the minimum:
    the least of every stretch of columns, then the column in the best stretch.
    """
    count, width = ops.shape(d)[0], ops.shape(d)[1]
    stretch = 32 + 32 * flag(width > 128) + 64 * flag(width > 1024)
    stretches = ops.reshape(d, (count, width // stretch, stretch))
    beyond = ops.where(stretches > bound[:, None, None], stretches, INFINITE)
    least = ops.min(beyond, axis=2)
    value = ops.min(least, axis=1)
    best = first_true(least == value[:, None])
    within = ops.take_along_axis(stretches, best[:, None, None], axis=1)[:, 0]
    return value, best * stretch + first_true(within == value[:, None])


def extremes(d: Any) -> tuple[Any, Any, Any]:
    """Columns of the farthest positive, the nearest and the farthest negative.

    Args:
        d: (count, padded) signed distances.

    Returns:
        Three (count,) int32 columns; any column where there is none.
    """
    positive = ops.where(d == -INFINITE, 0.0, d)
    positive = first_true(positive == ops.min(positive, axis=1, keepdims=True))
    farthest = first_true(d == ops.max(d, axis=1, keepdims=True))
    return (
        positive,
        nearest_beyond(d, ops.full_like(d[:, 0], -0.75 * TINY))[1],
        farthest,
    )


def row_sum(x: Any) -> Any:
    """Sum of every row, as a matrix product: a plain float sum is not vectorised."""
    return ops.matmul(x, ops.ones((ops.shape(x)[1], 1), x.dtype))[:, 0]


def count_true(mask: Any) -> Any:
    """How many entries of every row are True, int32."""
    return ops.sum(ops.cast(mask, "int32"), axis=1)


def count_two(d: Any, low: Any, high: Any) -> tuple[Any, Any]:
    """How many entries of every row are <= low, and how many in (low, high).

    Args:
        d: (count, width).
        low: (count,).
        high: (count,), not below `low`.

    Returns:
        Two (count,) int32, counted in the two halves of one number where they fit:
        one pass over the block in place of two.
    """
    low, high = low[:, None], high[:, None]

    def packed() -> Any:
        within = ops.where(d < high, 65536, 0)
        found = ops.sum(ops.where(d <= low, 1, within), axis=1)
        return ops.bitwise_and(found, 65535), ops.right_shift(found, 16)

    def apart() -> Any:
        return count_true(d <= low), count_true((d > low) & (d < high))

    width = ops.shape(d)[1]
    if isinstance(width, int):
        return packed() if width < 32768 else apart()
    return ops.cond(width < 32768, packed, apart)


def positive_entries(d: Any, anchors: Anchors) -> Any:
    """Which signed distances belong to positives of their row."""
    column = ops.arange(ops.shape(d)[1], dtype="int32")
    return (d < 0) & (d > -INFINITE) & (column != anchors.own[:, None])


def sorted_negatives(d: Any, order: Any) -> Any:
    """Every row's negatives in rising order, then inf; `order` are their columns."""
    return ops.take_along_axis(ops.where(d >= 0, d, INFINITE), order, axis=1)


def count_below(ascending: Any, bounds: Any, *, inclusive: bool) -> Any:
    """How many entries of each ascending row are < (or <=) each bound of that row.

    Args:
        ascending: (count, width) sorted rows.
        bounds: (count, n).
        inclusive: count entries equal to the bound.

    Returns:
        (count, n) int32, by binary search.
    """
    width = ops.shape(ascending)[1]

    def halve(span: Any, low: Any, high: Any) -> Any:
        middle = (low + high) // 2
        value = ops.take_along_axis(ascending, ops.minimum(middle, width - 1), axis=1)
        below = value <= bounds if inclusive else value < bounds
        below, inside = below & (low < high), low < high
        return (
            span // 2,
            ops.where(below, middle + 1, low),
            ops.where(inside & ~below, middle, high),
        )

    low = ops.zeros_like(bounds, dtype="int32")
    span = ops.convert_to_tensor(width, "int32")
    return ops.while_loop(lambda span, *_: span > 0, halve, (span, low, low + width))[1]


def counts_by_search(
    d: Any, ascending: Any, below: Any, anchors: Anchors, margin: Any, rooted: bool
) -> tuple[Any, Any]:
    """The census of every row from its sorted negatives, for many positives.

    Args:
        d: (count, padded) signed distances.
        ascending: (count, padded) the negatives of every row, sorted.
        below: (count, padded) int32, how many of them are not farther than each entry.
        anchors: those of the block.
        margin: () float32.
        rooted: whether distances are roots of the entries.

    Returns:
        Hard triplets, semi-hard triplets and pairs with a semi-hard one, (3, count)
        int32, and the sum of the distances to the positives, (count,).
    """
    p = ops.abs(d)
    within = count_below(ascending, add_margin(p, margin, rooted), inclusive=False)
    within = ops.maximum(within - below, 0)
    positive = positive_entries(d, anchors)
    counts = ops.stack([below, within, ops.cast(within > 0, "int32")])
    counts = ops.sum(ops.where(positive, counts, 0), axis=2)
    p = ops.where(positive, p, 0.0)
    return counts, row_sum(ops.sqrt(p) if rooted else p)


def add_margin(d: Any, margin: Any, rooted: bool) -> Any:
    """d + margin, where d and the result are squares if the distance is a root."""
    return ops.square(ops.sqrt(d) + margin) if rooted else d + margin


def loss_and_slope(gap: Any, margin: Any, soft: bool) -> tuple[Any, Any]:
    """Loss of a triplet with gap = d(a,p) - d(a,n), and its derivative."""
    if soft:
        return ops.softplus(gap), ops.sigmoid(gap)
    loss = ops.relu(gap + margin)
    return loss, ops.cast(loss > 0, "float32")


def with_gradient(rows: Any, values: Any, needed: Any, gradient: Callable) -> Any:
    """`values`, with a gradient of one's own with respect to `rows`.

    Args:
        rows: what the gradient is for.
        values: (batch,).
        needed: a structure of all tensors that `gradient` works with.
        gradient: from `needed` and weights (batch,) to the gradient of
            sum(weights * values) for `rows`.
    """
    # JAX differentiates a compiled function only where a gradient of one's own, within
    # it, gets tensors as arguments. The other backends take them from the closure.
    leaves = keras.tree.flatten((values, needed))
    on_jax = keras.backend.backend() == "jax"
    passed = [on_jax and ops.is_tensor(leaf) for leaf in leaves]

    @ops.custom_gradient
    def attach(rows: Any, *tensors: Any) -> Any:
        given = iter(tensors)
        refilled = [
            next(given) if is_passed else leaf
            for leaf, is_passed in zip(leaves, passed, strict=True)
        ]
        result, state = keras.tree.pack_sequence_as((values, needed), refilled)

        def grad(*args: Any, upstream: Any = None) -> Any:
            slope = gradient(state, args[0] if upstream is None else upstream)
            return (slope, *(None for _ in tensors)) if tensors else slope

        return result, grad

    return attach(rows, *itertools.compress(leaves, passed))


@functools.cache
def compiled(function: Callable, **static: Any) -> Callable:
    """`function` with the keyword arguments bound; on TensorFlow compiled by XLA.

    Under XLA one pass over a block is one loop over memory. Op by op every
    comparison, choice and minimum is a trip of its own and three to ten times slower,
    so a graph without `jit_compile` calls the compiled function as well.
    """
    bound = functools.partial(function, **static)
    if keras.backend.backend() != "tensorflow":
        return bound
    import tensorflow as tf

    return tf.function(bound, jit_compile=True, autograph=False, reduce_retracing=True)


@functools.cache
def compiled_on_jax(function: Callable, /, **static: Any) -> Callable:
    """`function` with the keyword arguments bound; on JAX compiled, once for all calls.

    Its loops and branches are closures made anew in every call, which JAX, outside a
    compiled step, would compile anew in every call as well.
    """
    bound = functools.partial(function, **static)
    if keras.backend.backend() != "jax":
        return bound
    import jax

    return jax.jit(bound)
