"""A batch ordered by label and padded; distances of one block of its rows.

The mining engine works on the batch in the order of its labels. Every class is then
one stretch of rows, so that two numbers tell the positives of a row, and the padding at
the end makes all blocks of rows equal. A batch of seven rows in three classes:

    row       0   1   2   3   4   5   6   7   8   9
    label     a   a   a   b   b   c   c   (padding: a class of its own)
    start     0   0   0   3   3   5   5   7   7   7      row 1: its class is [0, 3), so
    stop      3   3   3   5   5   7   7   10  10  10     its positives are the rows 0, 2
    positives 2   2   2   1   1   1   1   0   0   0      and the rows 3 to 6 its
    negatives 4   4   4   5   5   5   5   0   0   0      negatives

The *rank* of a positive is its place among the other rows of the class: for row 0 the
ranks 0 and 1 are the rows 1 and 2, for row 1 the rows 0 and 2, for row 2 the rows 0 and 1.

The batch size may be unknown when a function is traced: sizes are Python integers or
scalar tensors. Below, `padded` is the number of rows with the padding, `count` that of
one block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from kerastrip.distances import is_rooted, squared_distances

__all__ = [
    "INFINITE",
    "MOST_RANKS",
    "NOT_NEGATIVE",
    "TINY",
    "Anchors",
    "OrderedBatch",
    "Rule",
    "Terms",
    "add_margin",
    "block_rows",
    "choose",
    "compiled_on_jax",
    "compiled_on_tensorflow",
    "count_below",
    "count_true",
    "entry",
    "find_anchors",
    "first_true",
    "flag",
    "inverse_order",
    "loss_and_slope",
    "near_the_origin",
    "order_by_label",
    "over_blocks",
    "over_ranks",
    "padded_size",
    "positive_column",
    "positive_entries",
    "put",
    "rank_seen_from",
    "ranks",
    "row_sum",
    "signed_distances",
    "take_padded",
]

INFINITE = float("inf")
TINY = 2e-38  # the least distance of a positive: above every denormal number
NOT_NEGATIVE = -0.75 * TINY  # between what is no negative and the negatives
# The positives of a row are taken rank by rank up to so many, which is the height of the
# table of chosen negatives; a row with more positives is sorted.
MOST_RANKS = 64


class Rule(NamedTuple):
    """What a loss takes from a batch: plain values, fixed when a function is traced."""

    mining: str  # a mining word, "contrastive" or "census"
    distance: str
    soft: bool = False
    average_over: str = "all"

    @property
    def rooted(self) -> bool:
        """Whether the distance is the root of what `signed_distances` gives."""
        return is_rooted(self.distance)

    @property
    def by_pairs(self) -> bool:
        """Whether every pair has one negative."""
        return self.mining in ("semi_hard", "semi_hard_or_hard")

    @property
    def by_anchors(self) -> bool:
        """Whether every anchor has one positive and one negative."""
        return self.mining == "hard"


class OrderedBatch(NamedTuple):
    """Rows ordered by label, then padding; every row is an anchor."""

    rows: Any  # (padded, dim) float32
    labels: Any  # (padded,) integers
    size: Any  # () int32: how many rows are real


class Anchors(NamedTuple):
    """For every row: where its class lies, and how many rows match.

    The positives of a row are the rows [start, stop) without `own`.
    """

    own: Any  # (padded,) int32: the row's own number
    start: Any  # (padded,) int32
    stop: Any  # (padded,) int32
    positives: Any  # (padded,) int32: 0 for padding
    negatives: Any  # (padded,) int32: 0 for padding


class Terms(NamedTuple):
    """What a loss finds in a batch, by row."""

    losses: Any  # (padded,) float32: the sum over the row's units
    active: Any  # (padded,) int32: how many of its units have a loss > 0
    units: Any  # (padded,) int32 or float32: how many units it has
    kept: Any  # a structure of tensors that the gradient goes on with


def flag(condition: Any) -> Any:
    """1 or 0, a Python integer for a Python bool."""
    if isinstance(condition, bool):
        return int(condition)
    return ops.cast(condition, "int32")


def padded_size(size: Any) -> Any:
    """`size` rounded up to one of few sizes: few sizes, few compilations.

    An empty batch gets one unit. The unit is 32 up to 128 rows, 64 up to 1,024, 128 up to
    4,096, 512 up to 16,384, then 2,048.
    """
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
    """`yes()` or `no()`; where sizes alone decide, XLA compiles the chosen branch only.

    `ops.cond` would compile both branches, and their results would need equal shapes.
    """
    if isinstance(condition, bool):
        return yes() if condition else no()
    return ops.switch(ops.cast(condition, "int32"), [no, yes])


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


def find_anchors(batch: OrderedBatch) -> Anchors:
    """Where the class of every row lies, by one pass over the ordered labels."""
    padded = ops.shape(batch.labels)[0]
    own = ops.arange(padded, dtype="int32")
    # A class begins where the label changes; padding is a class of its own. For the seven
    # rows above:  begins  0 0 0 1 0 1 0 1 0 0     code  0 0 0 1 1 2 2 3 3 3
    #              members by code  3 2 2 3        stop by code  3 5 7 10
    differs = batch.labels[1:] != batch.labels[:-1]
    begins = ops.concatenate([own[:1] > 0, differs | (own[1:] == batch.size)])
    code = ops.cumsum(ops.cast(begins, "int32"))
    members = ops.segment_sum(ops.ones_like(own), code, num_segments=padded)
    stop = ops.cast(ops.take(ops.cumsum(members), code), "int32")
    members = ops.cast(ops.take(members, code), "int32")
    real = ops.cast(own < batch.size, "int32")
    return Anchors(
        own, stop - members, stop, real * (members - 1), real * (batch.size - members)
    )


def near_the_origin(batch: OrderedBatch) -> OrderedBatch:
    """The batch moved by one vector of whole numbers, so that the mean of its rows is small.

    Distances come from squares of lengths: far from the origin the small difference of
    two rows would drown in them. A vector of whole numbers leaves whole numbers exact, and
    rows of length 1, for which it is 0, as they are.
    """
    finite = ops.where(ops.isfinite(batch.rows), batch.rows, 0.0)  # the padding is 0
    size = ops.maximum(ops.cast(batch.size, "float32"), 1.0)
    mean = ops.sum(finite, axis=0) / size  # (dim,)
    return batch._replace(rows=batch.rows - ops.round(mean))


def ranks(positives: Any) -> Any:
    """How many ranks to go through: the positives, or 0 if they are too many."""
    return ops.where(positives <= MOST_RANKS, positives, 0)


def over_blocks(batch: OrderedBatch, visit: Callable, state: tuple) -> tuple:
    """Call `visit(here, first, *state)` for one block of rows after the other.

    Args:
        batch: ordered by label.
        visit: gets the anchors of the block, its first row () int32 and the state;
            returns the next state, tensors of the same shapes.
        state: a tuple of tensors.

    Returns:
        The last state.
    """
    anchors = find_anchors(batch)
    padded = ops.shape(batch.rows)[0]
    count = block_rows(padded)

    def block(first: Any, *state: Any) -> Any:
        here = Anchors(*(ops.slice(field, (first,), (count,)) for field in anchors))
        return first + count, *visit(here, first, *state)

    start = ops.zeros((), "int32")
    return ops.while_loop(lambda first, *_: first < padded, block, (start, *state))[1:]


def over_ranks(count: Any, visit: Callable, state: tuple) -> tuple:
    """Call `visit(rank, *state)` for the ranks 0 ... `count` - 1 of the positives.

    All rows are at the same rank at the same time, see `positive_column`. `visit` leaves
    out the rows with fewer positives than `count`.

    Args:
        count: () int32.
        visit: gets the rank () int32 and the state; returns the next state.
        state: a tuple of tensors.

    Returns:
        The last state.
    """

    def step(rank: Any, *state: Any) -> Any:
        return rank + 1, *visit(rank, *state)

    start = ops.zeros((), "int32")
    return ops.while_loop(lambda rank, *_: rank < count, step, (start, *state))[1:]


def positive_column(anchors: Anchors, rank: Any, padded: Any) -> Any:
    """The column of every row's positive of that rank, kept below `padded`."""
    at = anchors.start + rank
    # The row itself is no positive: behind it all columns move by one.
    return ops.minimum(at + ops.cast(at >= anchors.own, "int32"), padded - 1)


def rank_seen_from(anchors: Anchors, positive: Any) -> Any:
    """The rank that every row has among the positives of its positive.

    The inverse of `positive_column`. Of the rows 0, 1, 2 of a class, row 2 has for row 0
    the rank 1: rank 0 is row 1, and row 0 itself has none.
    """
    place = anchors.own - anchors.start
    return place - ops.cast(anchors.own > positive, "int32")


def signed_distances(batch: OrderedBatch, here: Anchors, first: Any) -> Any:
    """Squared distances of a block to all rows; the sign tells the kind.

    A negative has d >= 0; the row itself and its positives -max(d, TINY) < 0;
    padding -inf. So the negatives farther than a positive p are the entries > |p|,
    with no mask beside the matrix. (A row of the padding sees the real rows as
    negatives: only `here.negatives` tells that it has no negative.)

    In the batch at the head of this module, let the points lie at 0, 1, 3 (a), 2, 5 (b)
    and 4, 4 (c) on a line:

        row 0    -tiny  -1     -9     4    25    16    16   -inf ...
        row 1    -1     -tiny  -4     1    16     9     9   -inf ...

    Args:
        batch: all rows.
        here: the anchors of the block.
        first: the block's first row, () int32.

    Returns:
        (count, padded) float32.
    """
    rows = batch.rows
    count, dim = ops.shape(here.own)[0], ops.shape(rows)[1]
    d = squared_distances(ops.slice(rows, (first, 0), (count, dim)), rows)
    column = ops.arange(ops.shape(rows)[0], dtype="int32")
    same = (column >= here.start[:, None]) & (column < here.stop[:, None])
    d = ops.where(same, -ops.maximum(d, TINY), d)
    return ops.where(column < batch.size, d, -INFINITE)


def positive_entries(d: Any, anchors: Anchors) -> Any:
    """Which signed distances belong to positives of their row."""
    column = ops.arange(ops.shape(d)[1], dtype="int32")
    return (d < 0) & (d > -INFINITE) & (column != anchors.own[:, None])


def first_true(mask: Any) -> Any:
    """The column of the first True of every row; the last column of a row without True."""
    width = ops.shape(mask)[-1]
    column = ops.arange(width, dtype="int32")
    return ops.min(ops.where(mask, column, width - 1), axis=-1)


def entry(d: Any, column: Any) -> Any:
    """d[i, column[i]] of every row i."""
    return ops.take_along_axis(d, column[:, None], axis=1)[:, 0]


def row_sum(x: Any) -> Any:
    """Sum of every row, as a matrix product: a plain float sum is not vectorised."""
    return ops.matmul(x, ops.ones((ops.shape(x)[1], 1), x.dtype))[:, 0]


def count_true(mask: Any) -> Any:
    """How many entries of every row are True, int32."""
    return ops.sum(ops.cast(mask, "int32"), axis=1)


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


def add_margin(d: Any, margin: Any, rooted: bool) -> Any:
    """d + margin, where d and the result are squares if the distance is a root."""
    return ops.square(ops.sqrt(d) + margin) if rooted else d + margin


def loss_and_slope(gap: Any, margin: Any, soft: bool) -> tuple[Any, Any]:
    """Loss of a triplet with gap = d(a,p) - d(a,n), and its derivative."""
    if soft:
        return ops.softplus(gap), ops.sigmoid(gap)
    loss = ops.relu(gap + margin)
    return loss, ops.cast(loss > 0, "float32")


@functools.cache
def compiled_on_tensorflow(function: Callable, **static: Any) -> Callable:
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
