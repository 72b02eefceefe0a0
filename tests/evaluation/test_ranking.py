"""Ranks of hits against sorted rows."""

import numpy as np
import pytest

from kerastrip.evaluation import ranking


def sorted_ranks(numbers, hit):
    """The places of the hits in the sorted rows, equal numbers by column."""
    return np.concatenate(
        [
            np.flatnonzero(of_row[np.argsort(row, kind="stable")]) + 1
            for row, of_row in zip(numbers, hit, strict=True)
        ]
    )


@pytest.mark.parametrize("part", [1, 5000, 1 << 22])
@pytest.mark.parametrize("values", [1, 3, 500, None])
@pytest.mark.parametrize(
    ("rows", "columns", "share"),
    [(1, 1, 1.0), (4, 7, 0.3), (30, 2000, 0.01), (30, 900, 0.5), (2, 70_000, 0.001)],
)
def test_ranks_are_those_of_a_sort(
    rng, monkeypatch, rows, columns, share, values, part
):
    monkeypatch.setattr(ranking, "_PART", part)
    numbers = np.float32(rng.normal(size=(rows, columns)) ** 2)
    if values is not None:
        numbers = np.float32(rng.integers(0, values, (rows, columns)))
    hit = rng.random((rows, columns)) < share
    hit[np.arange(rows), rng.integers(0, columns, rows)] = True
    numbers[~hit & (rng.random((rows, columns)) < 0.1)] = np.inf  # left out
    got = ranking.hit_ranks(numbers, *np.nonzero(hit))
    np.testing.assert_array_equal(got, sorted_ranks(numbers, hit))


@pytest.mark.parametrize(
    "row",
    [
        [0.0, -0.0, 0.0, -0.0, 1.0],
        [1e30, 1e-30, 1e-38, 0.0, 3e38],  # a range that no grid of cells resolves
        [5.0, 5.0, np.nextafter(np.float32(5), np.float32(6)), 5.0, 5.0],
    ],
)
def test_extreme_numbers(row):
    numbers = np.float32([row])
    for hits in range(1, 32):
        hit = np.array([[bool(hits >> place & 1) for place in range(5)]])
        got = ranking.hit_ranks(numbers, *np.nonzero(hit))
        np.testing.assert_array_equal(got, sorted_ranks(numbers, hit))
