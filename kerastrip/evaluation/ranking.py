"""The ranks of the hits in whole rankings, without sorting the rankings."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

__all__ = [
    "hit_ranks",
]

# About so many numbers are looked at at a time: they fit into the cache.
_PART = 1 << 18


def hit_ranks(numbers: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """The ranks of some columns, the hits, when every row is put in order.

    Args:
        numbers: (rows, columns) floats of at least 0, smaller is nearer. Equal numbers
            stand in the order of their columns. Numbers below 0 are not looked for, and
            give wrong ranks.
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

    The range of the hits of a row is cut into cells, and the numbers are counted by cell.
    Only the numbers of a mixed cell, of hits and others, must be sorted. For hits at 20,
    21, 50 and 60, and cells of ten:

        number    05  17 | 21 20 | 31 33 39 | 50 52 | 60 | 75
        hit                x  x               x       x
        cell              no other            mixed   no other
        before     0       2        4         7       9    10
        rank               3  4               8       10
    """
    rows, columns = numbers.shape
    values = numbers[row, column]
    first = np.searchsorted(row, np.arange(rows))
    low = np.minimum.reduceat(values, first)[:, None]
    range_ = np.maximum.reduceat(values, first)[:, None] - low
    # Cell 0 is for numbers before the first hit, the last cell for those after the last.
    # More cells cost more to count, fewer leave more numbers to sort.
    count = min(int(3 * math.sqrt(len(row) / rows * columns)), 1 << 22)
    # Where all hits are equally near, the range is 0. Divided by 1e-30 instead, they all
    # fall into cell 1, and what is farther away goes into the last cell, if need be by
    # way of infinity.
    scaled = numbers - low
    with np.errstate(over="ignore"):
        scaled *= (count - 1) / np.maximum(range_, 1e-30)
    scaled += 1
    np.clip(scaled, 0, count + 1, out=scaled)
    cells = scaled.astype(np.int64)
    cells += np.arange(rows)[:, None] * (count + 2)
    counts = np.bincount(cells.ravel(), minlength=rows * (count + 2))
    hits = np.bincount(cells[row, column], minlength=len(counts))
    # A place is the number of the row times `columns`, plus the rank from 0: so many
    # numbers stand before a cell.
    before = np.cumsum(counts) - counts
    is_mixed = (hits > 0) & (hits < counts)
    # The hits of cells without others take the places from `before` on.
    alone = np.flatnonzero((hits == counts) & (hits > 0))
    of_cell = counts[alone]
    shift = before[alone] - np.cumsum(of_cell) + of_cell
    places = np.arange(of_cell.sum()) + np.repeat(shift, of_cell)

    mixed = np.flatnonzero(is_mixed[cells])
    mixed = mixed[_order(numbers.ravel()[mixed], mixed // columns)]
    is_hit = np.zeros(numbers.size, bool)
    is_hit[row * columns + column] = True
    nth = np.flatnonzero(is_hit[mixed])
    # The nth number of mixed cells has n of them before it; the rest is counted.
    counts *= is_mixed
    before -= np.cumsum(counts) - counts
    is_taken = np.zeros(numbers.size, bool)
    is_taken[places] = True
    is_taken[nth + before[cells.ravel()[mixed[nth]]]] = True
    return np.flatnonzero(is_taken) - row * columns + 1


def _order(values: np.ndarray, row: np.ndarray) -> np.ndarray:
    """The stable order of values by row, then by size; `row` ascends."""
    if values.dtype != np.float32:
        return np.lexsort((values, row))
    # Much faster: row, value and place in one integer. The bits of floats ascend with the
    # floats from 0 on, not below. Adding 0 makes -0 positive.
    bits = (values + np.float32(0)).view(np.int32)
    width = len(values).bit_length()
    keys = (((row << 31) | bits) << width) | np.arange(len(values))
    keys.sort()
    return keys & ((1 << width) - 1)
