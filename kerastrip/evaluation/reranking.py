"""k-reciprocal re-ranking: neighbours that know each other stand nearer.

NumPy on the CPU. The distances of one block of rows to all others are looked at at a
time; what is kept of every row is a few dozen numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from kerastrip import _checks
from kerastrip._labels import counted
from kerastrip.evaluation.search import (
    Space,
    embeddings_array,
    nearest,
    row_distances,
    shared_rows,
)

__all__ = [
    "Encodings",
    "Reranking",
    "rerank",
    "settings",
]

# About so many numbers are made at a time.
_PART = 1 << 20


def rerank(
    queries: Any,
    gallery: Any,
    k: int,
    *,
    k1: int = 20,
    k2: int = 6,
    original_weight: float = 0.3,
    distance: str = "euclidean",
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of the gallery after k-reciprocal re-ranking.

    Two rows are k-reciprocal neighbours if each is among the k nearest of the other. A
    row p is described by its set R*(p) of such rows, and two rows are near if their
    sets agree:

        R(p, k)  = the rows g with g in N(p, k) and p in N(g, k)            (3.2)
        R*(p)    = R(p, k1) and every R(q, k1/2) with q in R(p, k1), two thirds of
                   which, or more, lie in R(p, k1)                          (3.2)
        V(p, g)  = exp(-d(p, g)) if g is in R*(p), else 0                   (3.3)
        V(p)    <- mean of V(g) over g in N(p, k2)                          (3.4)
        dJ(p, g) = 1 - sum min(V(p), V(g)) / sum max(V(p), V(g))            (3.3)
        d*(p, g) = (1 - w) dJ(p, g) + w d(p, g)                             (3.5)

    The equations are those of the paper, by section. Where it leaves a choice, this
    function does as the program of its authors: neighbours are sought among gallery and
    queries together, so that the answer to a query depends on the other queries (ask
    one by one where this must not be); N(p, k) is p itself and its k nearest others, but
    for the mean, for which N(p, k2) has k2 rows with p (where more than k others equal
    p, N(p, k) is k + 1 of the equal rows, not always with p); d is the squared euclidean
    distance (for `"cosine"` the cosine distance), divided by the largest distance of p
    to any row; and V(p) has the sum 1.

    Of V only the numbers above 0 are kept, so that the memory is linear in the number
    of rows. Every row is looked up among all rows, which takes most of the time.

    Args:
        queries: (n, dim) embeddings.
        gallery: (m, dim) embeddings. None: the queries themselves, and every query is
            looked up without itself. Queries that lie in the memory of the gallery are
            not counted twice among the rows. A copy of a query is another row: in
            `rerank(e, e.copy(), k)` every query finds its copy, and no warning says so.
        k: number of neighbours per query, 1 ... m; without gallery 1 ... n - 1.
        k1: neighbours of a row that are asked whether they know it. Default 20. With
            fewer rows all are asked.
        k2: rows whose V are averaged, 1 for none but the own. Default 6.
        original_weight: w in [0, 1], the lambda of the paper: 1 leaves the
            order of `search`. Default 0.3.
        distance: `"euclidean"` (default), `"squared_euclidean"` (the same, because the
            squared distance enters) or `"cosine"`.

    Returns:
        (n, k) float32 distances d*, ascending, and (n, k) int64 rows of the gallery.
        Neighbours at equal distances stand in the order of their rows.

    Raises:
        TypeError, ValueError: if the arrays are not embeddings of one dimension, hold
            NaN or infinity, or a number is out of its range.

    Example:

    >>> import numpy as np
    >>> gallery = np.array([[0.0], [1.0], [2.2], [9.0], [9.5], [9.9]])
    >>> distances, indices = rerank([[4.0]], gallery, 3, k1=2, k2=1)
    >>> indices
    array([[2, 1, 0]])

    References:
        Zhong, Zheng, Cao, Li, "Re-ranking Person Re-identification with k-reciprocal
        Encoding", CVPR 2017, sections 3.2 to 3.5.
    """
    rows = embeddings_array("queries", queries)
    k = _checks.integer("k", k, 1)
    if gallery is None:
        others, own = rows, np.arange(len(rows))
    else:
        others, own = embeddings_array("gallery", gallery), np.full(len(rows), -1)
        shared = shared_rows(queries, gallery)
        own = own if shared is None else shared
    available = len(others) - (gallery is None)
    if k > available:
        raise _checks.value_error("k", f"at most the {available} rows to search in", k)
    reranking = Reranking.of(
        rows,
        others,
        own,
        distance,
        {"k1": k1, "k2": k2, "original_weight": original_weight},
    )
    indices = np.empty((len(rows), k), np.int64)
    distances = np.empty((len(rows), k), np.float32)
    for span, numbers in reranking.blocks(np.arange(len(rows))):
        if gallery is None:
            numbers[np.arange(len(numbers)), own[span]] = np.inf
        indices[span] = nearest(numbers, k)
        distances[span] = np.take_along_axis(numbers, indices[span], axis=1)
    return distances, indices


def settings(rerank: Any) -> dict[str, Any] | None:
    """The keywords of `rerank` from the argument `rerank` of a metric.

    Args:
        rerank: True, False, or a dict of `k1`, `k2` and `original_weight`.

    Returns:
        All three keywords; None for False.
    """
    chosen: dict[str, Any] = {"k1": 20, "k2": 6, "original_weight": 0.3}
    expected = f"True, False or a dict of {', '.join(chosen)}"
    if isinstance(rerank, Mapping):
        for name in rerank:
            if str(name).startswith("lambda"):
                advice = "The lambda of the paper is 'original_weight'."
                raise _checks.value_error("rerank", expected, name, advice)
            _checks.one_of("rerank", name, tuple(chosen))
        return chosen | dict(rerank)
    if not isinstance(rerank, bool):
        raise _checks.type_error("rerank", expected, rerank)
    return chosen if rerank else None


class Encodings(NamedTuple):
    """The vectors V of rows, of which only the numbers above 0 are kept.

    Attributes:
        start: (rows + 1,) where the numbers of each row begin.
        column: (numbers,) int64 columns, ascending within a row.
        value: (numbers,) float64 values; those of a row have the sum 1.
    """

    start: np.ndarray
    column: np.ndarray
    value: np.ndarray

    @classmethod
    def of(
        cls, rows: int, columns: int, key: np.ndarray, value: np.ndarray
    ) -> Encodings:
        """The rows from (row * columns + column, value), ordered by this number."""
        row, column = np.divmod(key, columns)
        return cls(np.searchsorted(row, np.arange(rows + 1)), column, value)

    def numbers_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the numbers of some rows are: places in `rows`, and in `column`."""
        first, count = self.start[rows], self.start[rows + 1] - self.start[rows]
        i = np.repeat(np.arange(len(rows)), count)
        return i, first[i] + counted(count)

    def averaged(self, near: np.ndarray) -> Encodings:
        """The mean of V over the rows that are near to each row (section 3.4).

        Args:
            near: (rows, k2) numbers of rows.
        """
        rows, k2 = near.shape
        keys, values = [], []
        step = max(1, _PART * rows // (len(self.column) * k2 + 1))
        for low in range(0, rows, step):
            i, place = self.numbers_of(near[low : low + step].ravel())
            # Row and column in one number: equal ones are added up.
            key = (low + i // k2) * rows + self.column[place]
            order = np.argsort(key, kind="stable")
            keys.append(key[order])
            values.append(self.value[place[order]])
        return _summed(rows, rows, np.concatenate(keys), np.concatenate(values) / k2)

    def turned(self, rows: int) -> Encodings:
        """The columns of the first `rows` rows as rows: who has a number in a column."""
        count = self.start[rows]
        row = np.repeat(np.arange(rows), np.diff(self.start[: rows + 1]))
        order = np.argsort(self.column[:count], kind="stable")
        columns = len(self.start) - 1
        start = np.searchsorted(self.column[:count][order], np.arange(columns + 1))
        return Encodings(start, row[order], self.value[:count][order])


class Reranking(NamedTuple):
    """Queries and a gallery, encoded: blocks of their re-ranked distances.

    Attributes:
        queries: (n, dim) embeddings.
        gallery: (m, dim) embeddings.
        distance: one of `DISTANCES`.
        weight: `original_weight`.
        rows: (n,) the row of `encodings` that belongs to each query.
        encodings: the vectors of the gallery, and of queries that are not in it.
        columns: the vectors of the gallery by column.
        largest: (all rows,) the largest number of `Space.blocks` of each row.
    """

    queries: np.ndarray
    gallery: np.ndarray
    distance: str
    weight: float
    rows: np.ndarray
    encodings: Encodings
    columns: Encodings
    largest: np.ndarray

    @classmethod
    def of(
        cls,
        queries: np.ndarray,
        gallery: np.ndarray,
        own: np.ndarray,
        distance: str,
        chosen: Mapping[str, Any],
    ) -> Reranking:
        """Encodes all rows.

        Args:
            queries: (n, dim) embeddings.
            gallery: (m, dim) embeddings.
            own: (n,) the row of the gallery that is the query itself, or -1.
            distance: one of `DISTANCES`.
            chosen: `k1`, `k2` and `original_weight`.
        """
        k1 = _checks.integer("k1", chosen["k1"], 1)
        k2 = _checks.integer("k2", chosen["k2"], 1)
        weight = _checks.number(
            "original_weight", chosen["original_weight"], minimum=0.0, maximum=1.0
        )
        Space.of(queries[:1], gallery, distance)  # checks that they fit each other
        strangers = own < 0
        rows = np.where(strangers, len(gallery) - 1 + np.cumsum(strangers), own)
        both = np.concatenate([gallery, queries[strangers]])
        space = Space.of(both, both, distance)
        near = np.empty((len(both), min(max(k1 + 1, k2), len(both))), np.int64)
        largest = np.empty(len(both), np.float32)
        for span, numbers in space.blocks():
            numbers[np.arange(len(numbers)), np.arange(span.start, span.stop)] = 0.0
            near[span] = nearest(numbers, near.shape[1])
            largest[span] = numbers.max(axis=1)
        largest = np.maximum(largest, np.float32(1e-30))  # all rows at one point
        encodings = _encoded(space, near[:, : k1 + 1], largest, round(k1 / 2))
        encodings = encodings.averaged(near[:, :k2])
        columns = encodings.turned(len(gallery))
        return cls(
            *(queries, gallery, distance, weight, rows, encodings, columns, largest)
        )

    def blocks(
        self, chosen: np.ndarray, *, verbose: bool = False
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Slices of `chosen`, and (rows, m) re-ranked distances of these queries.

        As `Space.blocks`: a block is valid until the next one is asked for.

        Args:
            chosen: (queries,) numbers of queries.
            verbose: draw a progress bar if the work takes long.
        """
        space = Space.of(self.queries[chosen], self.gallery, self.distance)
        for span, numbers in space.blocks(verbose=verbose):
            rows = self.rows[chosen[span]]
            numbers *= self.weight / self.largest[rows, None]
            step = max(1, _PART // len(self.gallery))
            parts = [slice(low, low + step) for low in range(0, len(rows), step)]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                jaccard = pool.map(self._jaccard, [rows[part] for part in parts])
                for part, found in zip(parts, jaccard, strict=True):
                    numbers[part] += (1 - self.weight) * found
            yield span, numbers

    def _jaccard(self, rows: np.ndarray) -> np.ndarray:
        """(rows, m) distances dJ of some rows to the gallery (section 3.3).

        A gallery row shares something with a row only in the columns where the row has
        a number; so these columns are looked through, not the gallery.
        """
        size = len(self.gallery)
        i, place = self.encodings.numbers_of(rows)
        j, other = self.columns.numbers_of(self.encodings.column[place])
        least = np.minimum(self.encodings.value[place][j], self.columns.value[other])
        cell = i[j] * size + self.columns.column[other]
        shared = np.bincount(cell, least, minlength=len(rows) * size)
        # Both vectors have the sum 1, so sum max = 2 - sum min. Rounding takes the share of
        # two equal vectors to 1 +- 3e-16. In float32 it is 1 again, so that all of them
        # are equally near. No distance may be below 0: `hit_ranks` relies on this.
        share = np.float32(shared / (2 - shared))
        return np.maximum(1 - share, 0).reshape(len(rows), size)


def _encoded(
    space: Space, near: np.ndarray, largest: np.ndarray, half: int
) -> Encodings:
    """The vectors V of all rows, before they are averaged (sections 3.2 and 3.3).

    Args:
        space: all rows among each other.
        near: (rows, k1 + 1) every row and its nearest others.
        largest: (rows,) what distances are divided by.
        half: k1 / 2.
    """
    rows, width = near.shape
    mutual = _mutual(near)  # (rows, k1 + 1) members of R(p, k1)
    near_half = near[:, : half + 1]
    mutual_half = _mutual(near_half)  # (rows, half + 1) members of R(q, k1/2)
    size = mutual_half.sum(axis=1)
    keys = []
    step = max(1, _PART // (width * width * (half + 1)))
    for low in range(0, rows, step):
        p = np.arange(low, min(low + step, rows))
        q = near[p]  # (block, k1 + 1)
        members = np.where(
            mutual_half[q], near_half[q], -1
        )  # (block, k1 + 1, half + 1)
        reciprocal = np.where(mutual[p], q, -2)  # (block, k1 + 1)
        known = members[..., None] == reciprocal[:, None, None]
        common = known.any(axis=-1).sum(axis=-1)  # (block, k1 + 1)
        taken = mutual[p] & (3 * common >= 2 * size[q])
        members[~taken] = -1
        found = np.concatenate([reciprocal, members.reshape(len(p), -1)], axis=1)
        key = p[:, None] * rows + found
        keys.append(np.unique(key[found >= 0]))
    key = np.concatenate(keys)
    p, g = np.divmod(key, rows)
    value = np.empty(len(key))
    # The numbers of `Space.blocks` are half the squared distance, or the cosine distance.
    word, share = (
        ("cosine", 1.0) if space.distance == "cosine" else ("squared_euclidean", 0.5)
    )
    step = max(1, _PART // space.queries.shape[1])
    for low in range(0, len(key), step):
        part = slice(low, low + step)
        d = row_distances(space.queries[p[part]], space.gallery[g[part]], word)
        value[part] = np.exp(-share * d / largest[p[part]])
    value /= np.bincount(p, value, minlength=rows)[p]
    return Encodings.of(rows, rows, key, value)


def _mutual(near: np.ndarray) -> np.ndarray:
    """(rows, k) whether a row is among the near rows of its near row, too."""
    found = np.empty(near.shape, bool)
    step = max(1, _PART // near.shape[1] ** 2)
    for low in range(0, len(near), step):
        p = np.arange(low, min(low + step, len(near)))
        found[p] = (near[near[p]] == p[:, None, None]).any(axis=-1)
    return found


def _summed(rows: int, columns: int, key: np.ndarray, value: np.ndarray) -> Encodings:
    """The vectors from numbers ordered by `key`, equal keys added up."""
    first = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
    return Encodings.of(rows, columns, key[first], np.add.reduceat(value, first))
