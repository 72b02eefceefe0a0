"""Nearest neighbours and distances among rows of embeddings: exact, NumPy on the CPU."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from kerastrip import _checks
from kerastrip.distances import DISTANCES
from kerastrip.evaluation._progress import progress

__all__ = [
    "Space",
    "embeddings_array",
    "equal_rows",
    "nearest",
    "row_distances",
    "search",
    "shared_rows",
    "unit_rows",
    "unusable_rows",
]

# A block of distances has at most `_ROWS` rows and at most `_NUMBERS` numbers.
_ROWS, _NUMBERS = 512, 1 << 25
# `nearest` picks the neighbours out of about so many numbers at a time.
_PART = 1 << 21
# Squares of larger numbers are near the end of float32.
_LARGE = 1e15


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """The rows, scaled to length 1; a row of zeros stays zeros."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1.0)


def search(
    queries: Any, gallery: Any, k: int, *, distance: str = "euclidean"
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of the gallery for every query: exact, by brute force.

    A matrix product in float32, in blocks, finds the candidates; the mean of the
    gallery is subtracted first, so that the product is accurate relative to the
    *spread* of the embeddings. The returned distances are computed again from the
    rows. Neighbours at equal distances stand in the order of their rows.

    Candidates whose squared distances differ by less than float32 resolves
    (about 1e-7 of the squared radius of the gallery) count as equally near at
    the k-th place.

    Args:
        queries: (n, dim) embeddings.
        gallery: (m, dim) embeddings.
        k: number of neighbours per query, 1 ... m.
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`. The
            arrays do not tell which distance they were trained with: give the distance
            of the loss.

    Returns:
        (n, k) float32 distances, ascending, and (n, k) int64 rows of the gallery.

    Raises:
        TypeError, ValueError: if the arrays are not embeddings of one dimension,
            hold NaN or infinity, or k is not in 1 ... m.

    Example:

    >>> import numpy as np
    >>> gallery = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    >>> distances, indices = search(np.zeros((1, 2)), gallery, 2)
    >>> distances, indices
    (array([[0., 1.]], dtype=float32), array([[0, 2]]))
    """
    queries = embeddings_array("queries", queries)
    gallery = embeddings_array("gallery", gallery)
    k = _checks.integer("k", k, 1)
    if k > len(gallery):
        raise _checks.value_error(
            "k", f"at most the {len(gallery)} rows of the gallery", k
        )
    space = Space.of(queries, gallery, distance)
    indices = np.empty((len(queries), k), np.int64)
    distances = np.empty((len(queries), k), np.float32)
    # Eight more candidates than k: float32 may have ordered the last of them wrongly.
    taken = min(k + 8, len(gallery))
    step = max(1, _NUMBERS // (8 * taken * queries.shape[1]))
    for rows, block in space.blocks(clamp=False):
        candidates = nearest(block, taken)
        for low in range(rows.start, rows.stop, step):
            some = slice(low, min(low + step, rows.stop))
            chosen = candidates[some.start - rows.start : some.stop - rows.start]
            exact = row_distances(
                space.queries[some, None], space.gallery[chosen], distance
            )
            order = np.lexsort((chosen, exact), axis=-1)[:, :k]
            distances[some] = np.take_along_axis(exact, order, axis=1)
            indices[some] = np.take_along_axis(chosen, order, axis=1)
    return distances, indices


def nearest(block: np.ndarray, k: int) -> np.ndarray:
    """The columns of the k smallest numbers of every row, in order.

    Args:
        block: (rows, columns) floats; numbers below 0 count as 0.
        k: 1 ... columns.

    Returns:
        (rows, k) int64, ascending by number; equal numbers by column.
    """
    # Threads help, because the slow functions of NumPy release the interpreter lock.
    parts = np.array_split(block, min(len(block), block.size // _PART + 1))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.concatenate(list(pool.map(_nearest, parts, itertools.repeat(k))))


def _nearest(block: np.ndarray, k: int) -> np.ndarray:
    """`nearest` for the rows of one thread.

    The columns are dealt into groups, and the least number of each group is found. The
    k-th smallest of these least numbers is a bound: k numbers of the row are at most as
    large, so the k smallest numbers of the row are, too. Only the few numbers within
    the bound are sorted. For k = 2 and three groups:

        column     0  1  2  3  4  5     groups (0, 3) (1, 4) (2, 5)
        number     7  4  9  8  5  1     least     7      4      1     bound 4
        within        4           1     sorted: columns 5 and 1

    (To find the k-th smallest number of all columns takes ten times as long.)
    """
    rows, columns = block.shape
    groups = columns // max(1, math.isqrt(columns // (2 * k)))  # about the fastest
    dealt = block[:, : columns // groups * groups].reshape(rows, -1, groups)
    least = dealt.min(axis=1)  # (rows, groups), k groups or more
    bound = np.maximum(np.partition(least, k - 1, axis=1)[:, k - 1, None], 0.0)
    row, column = np.divmod(np.flatnonzero(block <= bound), columns)
    # The numbers within the bound move to the left of `within`, in their order. There are
    # k or more in a row, and the rows with fewer than others are filled with infinity.
    first = np.searchsorted(row, np.arange(rows))
    place = np.arange(len(row)) - first[row]
    within = np.full((rows, place.max() + 1), np.inf, block.dtype)
    within[row, place] = np.maximum(block[row, column], 0.0)
    order = np.argsort(within, axis=1, kind="stable")[:, :k]
    return column[first[:, None] + order]


def embeddings_array(name: str, value: Any) -> np.ndarray:
    """`value` as (n, dim) finite float32 rows, else an error with the name of it."""
    _checks.refuse_masked(name, value)
    rows = np.asarray(value)
    if rows.dtype.kind not in "fiub" and rows.dtype.name != "bfloat16":
        raise _checks.type_error(name, "(n, dim) numbers", value)
    if rows.ndim != 2 or 0 in rows.shape:
        raise _checks.value_error(
            name, "an array of shape (n, dim), n and dim at least 1", rows
        )
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(rows, dtype="float32")
    bad = unusable_rows(rows)
    if len(bad):
        raise _checks.value_error(
            name,
            f"finite numbers under {_LARGE:g}",
            _checks.Told(
                f"NaN, infinity or more in {len(bad)} of {len(rows)} rows, the "
                f"first is row {bad[0]}"
            ),
        )
    return rows


def equal_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows that equal an earlier row, and the first row that each of them equals.

    Args:
        rows: (n, dim) floats.
    """
    rows = np.ascontiguousarray(rows + 0.0)  # which makes -0 positive
    whole = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]
    _, first, which = np.unique(whole, return_index=True, return_inverse=True)
    later = np.flatnonzero(first[which] != np.arange(len(rows)))
    return later, first[which[later]]


def shared_rows(queries: Any, gallery: Any) -> np.ndarray | None:
    """The row of `gallery` that lies in the same memory as each row of `queries`.

    Returns:
        (n,) int64, -1 where no row does; None if no row is shared.
    """
    if queries is gallery and np.ndim(queries):
        return np.arange(len(queries))
    # Lists become new arrays, which share nothing.
    queries, gallery = np.asarray(queries), np.asarray(gallery)
    if (
        not np.may_share_memory(queries, gallery)
        or queries.dtype != gallery.dtype
        or queries.shape[1:] != gallery.shape[1:]
        or queries.strides[1:] != gallery.strides[1:]
        or not (gallery.ndim and gallery.strides[0])
    ):
        return None
    begin, gallery_begin = (
        array.__array_interface__["data"][0] for array in (queries, gallery)
    )
    # A row of the queries is a row of the gallery if it begins a whole number of rows
    # after the beginning of the gallery.
    offsets = begin - gallery_begin + np.arange(len(queries)) * queries.strides[0]
    rows, rest = np.divmod(offsets, gallery.strides[0])
    rows[(rest != 0) | (rows < 0) | (rows >= len(gallery))] = -1
    return rows if (rows >= 0).any() else None


def unusable_rows(rows: np.ndarray) -> np.ndarray:
    """The numbers of the rows that hold NaN, infinity or numbers too large to square.

    Args:
        rows: (n, dim) floats.
    """
    return np.flatnonzero(~(np.abs(rows) < _LARGE).all(axis=1))


class Space(NamedTuple):
    """Queries and gallery as two matrices whose product is the distance.

    With rows centred on the mean c of the gallery, half the squared distance is

        |q - g|^2 / 2 = |q|^2 / 2 + |g|^2 / 2 - q.g,

    so a query becomes (q, 1, |q|^2 / 2) and a gallery row (-g, |g|^2 / 2, 1). For
    the cosine distance 1 - q.g of normalised rows the two terms behind q and -g are
    -c.g and 1 - |c|^2 - c.q. They hold for rows of zeros, too (distance 1).

    Attributes:
        queries: (n, dim) rows, normalised for the cosine distance.
        gallery: (m, dim) rows, normalised for the cosine distance.
        left: (n, dim + 2) the queries as rows of the product.
        right: (dim + 2, m) the gallery as columns of the product.
        distance: one of `DISTANCES`.
    """

    queries: np.ndarray
    gallery: np.ndarray
    left: np.ndarray
    right: np.ndarray
    distance: str

    @classmethod
    def of(
        cls,
        queries: np.ndarray,
        gallery: np.ndarray,
        distance: str,
        dtype: str = "float32",
    ) -> Space:
        """The space of (n, dim) queries and an (m, dim) gallery, float32.

        Args:
            queries: (n, dim) embeddings.
            gallery: (m, dim) embeddings.
            distance: one of `DISTANCES`.
            dtype: of all arrays and of the blocks.
        """
        _checks.one_of("distance", distance, DISTANCES)
        if queries.shape[1] != gallery.shape[1]:
            raise _checks.value_error(
                "gallery",
                f"rows of {queries.shape[1]} numbers, as the queries have",
                gallery,
            )
        queries, gallery = (
            rows.astype(dtype, copy=False) for rows in (queries, gallery)
        )
        cosine = distance == "cosine"
        if cosine:
            queries, gallery = unit_rows(queries), unit_rows(gallery)
        centre = _centre(gallery)
        left = np.empty((len(queries), queries.shape[1] + 2), dtype)
        right = np.empty((gallery.shape[1] + 2, len(gallery)), dtype)
        np.subtract(queries, centre, out=left[:, :-2])
        np.subtract(centre[:, None], gallery.T, out=right[:-2])
        left[:, -2] = right[-1] = 1.0
        if cosine:
            left[:, -1] = 1.0 - centre @ centre - left[:, :-2] @ centre
            right[-2] = centre @ right[:-2]
        else:
            left[:, -1] = np.einsum("nd,nd->n", left[:, :-2], left[:, :-2]) / 2
            right[-2] = np.einsum("dn,dn->n", right[:-2], right[:-2]) / 2
        return cls(queries, gallery, left, right, distance)

    def blocks(
        self, *, upper: bool = False, clamp: bool = True, verbose: bool = False
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Slices of the queries, and (rows, m) numbers that stand for their distances.

        The numbers are half the squared euclidean distance, or the cosine distance.
        All blocks lie in one buffer: a block is valid until the next one is asked for.

        Args:
            upper: leave out the columns before the first row of a block.
            clamp: set numbers that rounding took below 0 to 0, in one more pass.
            verbose: draw a progress bar if the work takes long.
        """
        columns = self.right.shape[1]
        step = max(1, min(_ROWS, _NUMBERS // columns, len(self.left)))
        buffer = np.empty(step * columns, self.left.dtype)
        show = progress(len(self.left), "row", verbose)
        for low in range(0, len(self.left), step):
            rows = slice(low, min(low + step, len(self.left)))
            shape = rows.stop - low, columns - low * upper
            block = buffer[: shape[0] * shape[1]].reshape(shape)
            np.matmul(self.left[rows], self.right[:, columns - shape[1] :], out=block)
            if clamp:
                np.maximum(block, 0.0, out=block)
            yield rows, block
            show(rows.stop)

    def distances(self, numbers: np.ndarray) -> np.ndarray:
        """The distances that the numbers of `blocks` stand for."""
        if self.distance == "cosine":
            return numbers
        return np.sqrt(2 * numbers) if self.distance == "euclidean" else 2 * numbers


def _centre(rows: np.ndarray) -> np.ndarray:
    """(dim,) about the mean of the rows: a multiple of a power of two.

    The power is about an eighth of the largest deviation from the mean. So whole numbers
    around this centre have few binary places, and their products are exact: rows that
    are equally near get equal numbers.
    """
    mean = rows.mean(axis=0, dtype="float64")
    largest = np.maximum(rows.max(axis=0) - mean, mean - rows.min(axis=0)).max()
    step = 2.0 ** np.floor(np.log2(max(largest, 1e-30)) - 3)
    return (np.round(mean / step) * step).astype(rows.dtype)


def row_distances(starts: np.ndarray, ends: np.ndarray, distance: str) -> np.ndarray:
    """Distances along the last axis, from the differences: accurate near 0.

    Args:
        starts: (..., dim) float32; for the cosine distance of length 1 or 0.
        ends: as `starts`, of a shape that broadcasts with it.
        distance: one of `DISTANCES`.
    """
    differences = ends - starts
    squares = np.einsum("...d,...d->...", differences, differences)
    if distance == "euclidean":
        return np.sqrt(squares)
    if distance == "cosine":
        # 1 - s.e = (|s - e|^2 + (1 - |s|^2) + (1 - |e|^2)) / 2, and the lengths |s| and
        # |e| are 0 or 1, so that the last two terms count the rows of zeros.
        zeros = (~starts.any(axis=-1)).astype("float32") + ~ends.any(axis=-1)
        return (squares + zeros) / 2
    return squares
