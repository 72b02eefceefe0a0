"""Pairwise distances between the rows of a batch.

| word | formula |
|---|---|
| `"squared_euclidean"` | sum (x - y)^2 |
| `"euclidean"` | sqrt(sum (x - y)^2) |
| `"cosine"` | 1 - cos(x, y) = half the squared distance of the normalised rows |
"""

from __future__ import annotations

from typing import Any

from keras import ops

from kerastrip import _checks
from kerastrip._numerics import plain, safe_sqrt

__all__ = [
    "DISTANCES",
    "is_rooted",
    "pairwise_distances",
    "prepare",
    "squared_distances",
]

DISTANCES = ("euclidean", "squared_euclidean", "cosine")


def prepare(embeddings: Any, distance: str) -> Any:
    """Float32 rows whose squared distances carry the distance word.

    For `"cosine"` the rows come back with length 1/sqrt(2), so that their squared
    euclidean distance *is* the cosine distance; a zero row stays zero. For the
    other words the rows come back unchanged.
    """
    rows = ops.cast(embeddings, "float32")
    if distance == "cosine":
        # The largest entry is taken out first: squares of 1e20 would overflow.
        largest = ops.max(ops.abs(rows), axis=1, keepdims=True, initial=0.0)
        rows = rows / ops.where(largest > 0, ops.stop_gradient(largest), 1.0)
        length = safe_sqrt(ops.sum(ops.square(rows), axis=1, keepdims=True))
        rows = rows / ops.where(length > 0, length, 1.0) * (0.5**0.5)
    return rows


def is_rooted(distance: str) -> bool:
    """Whether the distance is the root of the squared distance of `prepare`."""
    return distance == "euclidean"


def squared_distances(rows: Any, columns: Any) -> Any:
    """Squared euclidean distances by one matrix product, clamped at 0.

    |x - y|^2 = |x|^2 + |y|^2 - 2 x.y

    Args:
        rows: (n, dim) float32.
        columns: (m, dim) float32.

    Returns:
        (n, m) float32.
    """
    left = ops.sum(ops.square(rows), axis=1, keepdims=True)
    right = ops.sum(ops.square(columns), axis=1)
    product = ops.matmul(rows, ops.transpose(columns))
    return ops.maximum(left - 2.0 * product + right, 0.0)


def pairwise_distances(
    embeddings: Any, *, distance: str = "euclidean", others: Any = None
) -> Any:
    """The distance matrix of a batch, in float32 and with a finite gradient.

    Args:
        embeddings: (batch, dim) rows.
        distance: one of `"euclidean"`, `"squared_euclidean"`, `"cosine"`.
        others: (m, dim) rows to measure against, by default `embeddings`.

    Returns:
        (batch, m) float32 tensor. Without `others` the diagonal is exactly 0.

    Raises:
        ValueError: for an unknown `distance`.

    Example:

    >>> from keras import ops
    >>> ops.convert_to_numpy(pairwise_distances([[0.0, 0.0], [3.0, 4.0]]))
    array([[0., 5.],
           [5., 0.]], dtype=float32)
    """
    _checks.one_of("distance", distance, DISTANCES)
    rows = prepare(ops.convert_to_tensor(plain("embeddings", embeddings)), distance)
    if others is None:
        size = ops.arange(ops.shape(rows)[0])
        off_diagonal = ops.cast(size[:, None] != size[None, :], "float32")
        result = squared_distances(rows, rows) * off_diagonal
    else:
        result = squared_distances(
            rows, prepare(ops.convert_to_tensor(plain("others", others)), distance)
        )
    return safe_sqrt(result) if is_rooted(distance) else result
