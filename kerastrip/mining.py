"""The mining engine: exact selection and exact census, in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from kerastrip import _checks
from kerastrip._numerics import integer_labels, safe_sqrt
from kerastrip.distances import DISTANCES, is_rooted, prepare, squared_distances

BLOCK_ROWS = 128


class Census(NamedTuple):
    positives: Any
    negatives: Any
    easy: Any
    semi_hard: Any
    hard: Any
    pairs_with_semi_hard: Any
    pos_dist: Any
    neg_dist: Any


class _Layout(NamedTuple):
    """The batch ordered by label: row i of a class lies in [start, stop)."""

    order: Any
    start: Any
    stop: Any


def _layout(labels: Any) -> _Layout:
    order = ops.argsort(labels)
    ordered = ops.take(labels, order)
    start = ops.cast(ops.searchsorted(ordered, ordered, side="left"), "int32")
    stop = ops.cast(ops.searchsorted(ordered, ordered, side="right"), "int32")
    return _Layout(order, start, stop)


def _map_blocks(body: Callable, size: Any, outputs: tuple) -> tuple:
    """Run body(rows) on blocks of row numbers; stack what it returns."""
    block = BLOCK_ROWS
    count = (size + block - 1) // block
    buffers = tuple(
        ops.zeros((ops.maximum(count, 1) * block, *s), d) for s, d in outputs
    )
    steps = ops.arange(block, dtype="int32")

    def step(i, *buffers):
        rows = ops.minimum(i * block + steps, size - 1)
        results = body(rows)
        starts = [(i * block,) + (0,) * len(s) for s, _ in outputs]
        return (
            i + 1,
            *(
                ops.slice_update(b, at, ops.cast(r, b.dtype))
                for b, at, r in zip(buffers, starts, results, strict=True)
            ),
        )

    _, *buffers = ops.while_loop(
        lambda i, *_: i < count, step, (ops.convert_to_tensor(0, "int32"), *buffers)
    )
    return tuple(b[:size] for b in buffers)


def triplet_census(
    labels: Any,
    embeddings: Any,
    *,
    margin: float = 0.2,
    distance: str = "euclidean",
) -> Census:
    _checks.one_of("distance", distance, DISTANCES)
    labels = integer_labels(labels)
    layout = _layout(labels)
    rows = ops.take(ops.stop_gradient(prepare(embeddings, distance)), layout.order, 0)
    size = ops.shape(rows)[0]
    rooted = is_rooted(distance)
    largest = ops.max(layout.stop - layout.start, initial=0)
    columns = ops.arange(size, dtype="int32")

    def body(index):
        start, stop = ops.take(layout.start, index), ops.take(layout.stop, index)
        d = squared_distances(ops.take(rows, index, 0), rows)
        if rooted:
            d = ops.sqrt(d)
        same = (columns >= start[:, None]) & (columns < stop[:, None])
        other = columns != index[:, None]
        n_neg = size - (stop - start)
        pos_dist = ops.sum(ops.where(same & other, d, 0.0), 1)
        neg_dist = ops.sum(ops.where(same, 0.0, d), 1)
        masked = ops.where(same, float("inf"), d)

        def rank(r, hard, semi, pairs):
            at = start + r
            valid = (at < stop) & (at != index)
            p = ops.take_along_axis(d, ops.minimum(at, size - 1)[:, None], 1)
            below = ops.sum(ops.cast(masked <= p, "int32"), 1)
            within = ops.sum(ops.cast(masked < p + margin, "int32"), 1)
            v = ops.cast(valid, "int32")
            found = ops.maximum(within - below, 0)
            return (
                r + 1,
                hard + v * below,
                semi + v * found,
                pairs + v * ops.cast(found > 0, "int32"),
            )

        zero = ops.zeros_like(index)
        _, hard, semi, pairs = ops.while_loop(
            lambda r, *_: r < largest,
            rank,
            (ops.convert_to_tensor(0, "int32"), zero, zero, zero),
        )
        n_pos = stop - start - 1
        return (
            n_pos, n_neg, n_pos * n_neg - hard - semi, semi, hard, pairs,
            pos_dist, neg_dist,
        )  # fmt: skip

    ints, floats = ((), "int32"), ((), "float32")
    out = _map_blocks(body, size, (ints,) * 6 + (floats,) * 2)
    back = ops.argsort(layout.order)
    return Census(*(ops.take(o, back) for o in out))


def triplet_values(
    labels: Any,
    embeddings: Any,
    *,
    margin: float = 0.2,
    mining: str = "semi_hard",
    distance: Any = "euclidean",
    soft: bool = False,
    average_over: str = "all",
) -> Any:
    """Per-row losses whose mean is the loss (first version: whole matrix)."""
    labels = integer_labels(labels)
    rows = prepare(embeddings, distance)
    size = ops.shape(rows)[0]
    d = squared_distances(rows, rows)
    if is_rooted(distance):
        d = safe_sqrt(d)
    index = ops.arange(size)
    same = labels[:, None] == labels[None, :]
    positive = same & (index[:, None] != index[None, :])
    has_negative = ops.any(~same, axis=1)
    far, big = ops.stop_gradient(d), 3e38

    def pick(at):
        return ops.take_along_axis(d, at, axis=1)

    nearest = ops.argmin(ops.where(same, big, far), axis=1)[:, None]
    if mining == "hard":
        farthest = ops.argmax(ops.where(positive, far, -1.0), axis=1)[:, None]
        valid = (ops.any(positive, axis=1) & has_negative)[:, None]
        gap = pick(farthest) - pick(nearest)
    elif mining == "all":
        gap = ops.reshape(d[:, :, None] - d[:, None, :], (size, size * size))
        valid = ops.reshape(positive[:, :, None] & ~same[:, None, :], ops.shape(gap))
    else:
        beyond = ~same[:, None, :] & (far[:, None, :] > far[:, :, None])
        if mining == "semi_hard":
            last = ops.argmax(ops.where(same, -1.0, far), axis=1)[:, None]
        else:
            beyond = beyond & (far[:, None, :] < far[:, :, None] + margin)
            last = nearest
        candidates = ops.where(beyond, far[:, None, :], big)
        found = ops.any(beyond, axis=2)
        chosen = ops.where(found, ops.argmin(candidates, axis=2), last)
        gap = d - pick(chosen)
        valid = positive & has_negative[:, None]
    losses = ops.softplus(gap) if soft else ops.relu(gap + margin)
    losses = ops.where(valid, losses, 0.0)
    units = losses > 0 if average_over == "active" else valid
    count = ops.maximum(ops.sum(ops.cast(units, "float32")), 1.0)
    return ops.sum(losses, axis=1) * (ops.cast(size, "float32") / count)
