"""The ranks of the hits in whole rankings, without sorting the rankings."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

__all__ = [
    "hit_ranks",
]

# About so many numbers are looked at at a time: they fit into the cache.
_PART = 1 << 19


def hit_ranks(numbers: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """The ranks of some columns, the hits, when every row is put in order.

    Args:
        numbers: (rows, columns) float32 of at least 0, smaller is nearer. Equal numbers
            stand in the order of their columns.
        row, column: (hits,) the places of the hits, of finite numbers; ordered by row,
            and at least one in every row.

    Returns:
        (hits,) int64 ranks from 1, ordered by row, ascending within a row.
    """
    first = np.searchsorted(row, np.arange(len(numbers) + 1))
    step = max(1, _PART // numbers.shape[1])

    def ranks_from(low: int) -> np.ndarray:
        high = min(low + step, len(numbers))
        hits = slice(first[low], first[high])
        return _hit_ranks(numbers[low:high], row[hits] - low, column[hits])

    # Threads help, because the slow functions of NumPy release the interpreter lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.concatenate(list(pool.map(ranks_from, range(0, len(numbers), step))))


def _hit_ranks(numbers: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """`hit_ranks` for the rows of one thread.

    The range of the hits of a row is cut into cells. Only numbers in a cell with a hit
    are sorted; all others are counted by cell. For hits at 2, 5 and 6:

        number        0.5  1.7 | 2.0 2.4 | 3.1 3.3 3.9 | 4.2 | 5.0 5.5 | 6.0 | 7.5
        hit                       x                             x         x
        place among sorted        1   2                         3   4     5
        skipped before            2   2                         6   6     6
        rank                      3                             9        11

    """
    rows, columns = numbers.shape
    values = numbers[row, column]
    first = np.searchsorted(row, np.arange(rows))
    low = np.minimum.reduceat(values, first)[:, None]
    range_ = np.maximum.reduceat(values, first)[:, None] - low
    # Cell 0 is for numbers before the first hit, the last cell for those after the last.
    count = int(np.clip(32 * len(row) / rows, 64, min(2 * columns + 64, 1 << 16)))
    scaled = numbers - low
    scaled *= (count - 1) / np.maximum(range_, np.float32(1e-30))
    scaled += np.float32(1)
    np.clip(scaled, 0, count + 1, out=scaled)
    cells = scaled.astype(np.int64)
    cells += np.arange(rows)[:, None] * (count + 2)
    has_hit = np.zeros(rows * (count + 2), bool)
    has_hit[cells[row, column]] = True
    counts = np.bincount(cells.ravel(), minlength=len(has_hit))
    counts[has_hit] = 0
    skipped = np.cumsum(counts.reshape(rows, -1), axis=1).ravel()

    sorted_ = np.flatnonzero(has_hit[cells])
    is_hit = np.zeros(numbers.size, bool)
    is_hit[row * columns + column] = True
    # Row, number and column in one integer; adding 0 makes -0 positive.
    bits = (numbers.ravel()[sorted_] + np.float32(0)).view(np.int32)
    i, j = np.divmod(sorted_, columns)
    width = columns.bit_length()
    keys = (((i << 31) | bits) << width) | j
    keys.sort()
    i, j = keys >> (31 + width), keys & ((1 << width) - 1)
    place = np.flatnonzero(is_hit[i * columns + j])
    i, j = i[place], j[place]
    return place - np.searchsorted(keys >> (31 + width), i) + skipped[cells[i, j]] + 1
