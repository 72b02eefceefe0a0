"""The nearest other rows of embeddings, and the classes that they confuse."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kerastrip.evaluation.search import search

__all__ = [
    "Confusion",
    "confusions",
    "nearest_others",
    "spread_rows",
]


class Confusion(NamedTuple):
    """The samples of one class whose nearest neighbour is of one other class.

    Attributes:
        code: class of the queries.
        taken_for: class of the neighbours.
        total: number of samples of the class `code`.
        queries: (count,) row numbers, the query nearest to its neighbour first.
        neighbours: (count,) row numbers of the neighbours.
    """

    code: int
    taken_for: int
    total: int
    queries: np.ndarray
    neighbours: np.ndarray


def nearest_others(
    rows: np.ndarray, k: int, distance: str, queries: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(q, k) distances and row numbers of the k nearest other rows of some rows.

    With fewer than k other rows there are fewer columns: one for each other row.

    Args:
        rows: (n, dim) embeddings, n at least 2.
        k: the number of neighbours.
        distance: one of `DISTANCES`.
        queries: (q,) numbers of the rows to look up. Default: all rows.
    """
    own = np.arange(len(rows)) if queries is None else queries
    k = min(k, len(rows) - 1)
    distances, neighbours = search(rows[own], rows, k + 1, distance=distance)
    other = neighbours != own[:, None]
    # Among more than k rows at one point a row need not be among its own k + 1 nearest:
    # then the last neighbour goes in its place.
    other[other.all(axis=1), -1] = False
    return distances[other].reshape(-1, k), neighbours[other].reshape(-1, k)


def confusions(
    codes: np.ndarray, nearest: np.ndarray, distances: np.ndarray, most: int
) -> list[Confusion]:
    """The pairs of classes of which the first is most often taken for the second.

    A row without a positive (another row of its class) is not counted, because its
    nearest neighbour cannot be of its class.

    Args:
        codes: (n,) class of every row, 0 ... C - 1.
        nearest: (n,) number of the nearest other row.
        distances: (n,) distance to it.
        most: the largest number of pairs to return.
    """
    sizes = np.bincount(codes)
    wrong = np.flatnonzero((codes != codes[nearest]) & (sizes[codes] > 1))
    # The query nearest to its neighbour comes first, in every pair of classes.
    wrong = wrong[np.argsort(distances[wrong], kind="stable")]
    pairs = codes[wrong].astype(np.int64) * len(sizes) + codes[nearest[wrong]]
    ids, counts = np.unique(pairs, return_counts=True)
    confused = []
    for i in np.argsort(-counts, kind="stable")[:most]:
        code, taken_for = (int(number) for number in divmod(ids[i], len(sizes)))
        queries = wrong[pairs == ids[i]]
        confused.append(
            Confusion(code, taken_for, int(sizes[code]), queries, nearest[queries])
        )
    return confused


def spread_rows(codes: np.ndarray, count: int) -> np.ndarray:
    """At most `count` rows, of as many different classes as possible, ordered by class."""
    order = np.argsort(codes, kind="stable")
    _, starts, sizes = np.unique(codes[order], return_index=True, return_counts=True)
    chosen = np.arange(count) * len(starts) // count  # class of each row to choose
    nth = np.arange(count) - np.searchsorted(chosen, chosen)  # its place in the class
    rows = np.unique(order[starts[chosen] + nth % sizes[chosen]])
    return rows[np.argsort(codes[rows], kind="stable")]
