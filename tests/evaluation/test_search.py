"""search and nearest against plain loops."""

import numpy as np
import pytest

from kerastrip.evaluation.search import equal_rows, nearest, search

DISTANCES = ("euclidean", "squared_euclidean", "cosine")


def brute_force(queries, gallery, k, distance):
    """All distances in float64, a stable sort."""
    queries, gallery = np.float64(queries), np.float64(gallery)
    if distance == "cosine":
        lengths = [np.linalg.norm(rows, axis=1) for rows in (queries, gallery)]
        product = lengths[0][:, None] * lengths[1]
        table = 1 - queries @ gallery.T / np.where(product, product, 1)
    else:
        table = np.array([[((q - g) ** 2).sum() for g in gallery] for q in queries])
        table = np.sqrt(table) if distance == "euclidean" else table
    order = np.argsort(table, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(table, order, axis=1), order


class TestSearch:
    @pytest.mark.parametrize("distance", DISTANCES)
    @pytest.mark.parametrize(
        ("n", "m", "k"),
        [(1, 1, 1), (20, 30, 5), (300, 900, 7), (3, 3, 3), (5, 700, 300), (4, 999, 1)],
    )
    def test_equals_brute_force(self, rng, distance, n, m, k):
        queries, gallery = rng.normal(size=(n, 5)), rng.normal(size=(m, 5))
        queries, gallery = np.float32(queries), np.float32(gallery)
        distances, indices = search(queries, gallery, k, distance=distance)
        expected, order = brute_force(queries, gallery, k, distance)
        np.testing.assert_array_equal(indices, order)
        np.testing.assert_allclose(distances, expected, rtol=1e-5, atol=1e-7)
        assert distances.dtype == np.float32
        assert indices.dtype == np.int64

    @pytest.mark.parametrize("distance", DISTANCES)
    def test_equal_rows_come_in_the_order_of_the_index(self, rng, distance):
        rows = np.float32(rng.normal(size=(40, 6)))
        gallery = np.repeat(rows, 5, axis=0)[rng.permutation(200)]
        _, indices = search(rows, gallery, 5, distance=distance)
        for row, found in zip(rows, indices, strict=True):
            twins = np.flatnonzero((gallery == row).all(axis=1))
            np.testing.assert_array_equal(found, twins)

    def test_all_rows_at_one_point(self):
        distances, indices = search(np.full((7, 3), 0.3), np.full((500, 3), 0.3), 4)
        np.testing.assert_array_equal(indices, np.tile(np.arange(4), (7, 1)))
        np.testing.assert_array_equal(distances, 0)

    def test_accurate_far_from_the_origin(self, rng):
        gallery = np.float32(rng.normal(size=(300, 8)) * 1e-2 + 100)
        distances, indices = search(gallery, gallery, 3)
        expected, order = brute_force(gallery, gallery, 3, "euclidean")
        np.testing.assert_array_equal(indices, order)
        np.testing.assert_allclose(distances, expected, rtol=1e-4)

    def test_row_of_zeros_is_at_cosine_distance_one(self):
        gallery = np.array([[0.0, 0.0], [-1.0, 0.0], [3.0, 4.0]])
        distances, indices = search([[1.0, 0.0]], gallery, 3, distance="cosine")
        np.testing.assert_array_equal(indices, [[2, 0, 1]])
        np.testing.assert_allclose(distances, [[0.4, 1.0, 2.0]], rtol=1e-6)
        distances, _ = search([[0.0, 0.0]], gallery, 3, distance="cosine")
        np.testing.assert_array_equal(distances, [[1.0, 1.0, 1.0]])

    def test_more_queries_than_one_block(self, rng):
        rows = np.float32(rng.normal(size=(1000, 3)))
        distances, indices = search(rows, rows, 1)
        np.testing.assert_array_equal(indices[:, 0], np.arange(1000))
        np.testing.assert_array_equal(distances, 0)

    @pytest.mark.parametrize(
        ("queries", "gallery", "k", "expected"),
        [
            (np.ones((2, 3)), np.ones((2, 4)), 1, "gallery"),
            (np.ones((2, 3)), np.ones((2, 3)), 3, "at most the 2 rows"),
            (np.ones((2, 3)), np.ones((2, 3)), 0, "`k`"),
            (np.ones(3), np.ones((2, 3)), 1, r"queries.*\(n, dim\)"),
            (np.ones((0, 3)), np.ones((2, 3)), 1, "queries"),
            ([[1.0], [np.nan]], [[1.0]], 1, "queries.*1 of 2 rows.*row 1"),
            ([[1.0]], [[np.inf]], 1, "gallery.*row 0"),
            ([[1.0]], [[1e30]], 1, "gallery.*under 1e"),
        ],
    )
    def test_bad_input(self, queries, gallery, k, expected):
        with pytest.raises(ValueError, match=expected):
            search(queries, gallery, k)

    def test_wrong_types_and_words(self):
        with pytest.raises(TypeError, match="queries"):
            search([["a"]], [[1.0]], 1)
        with pytest.raises(ValueError, match="Did you mean 'euclidean'"):
            search([[1.0]], [[1.0]], 1, distance="euclidian")


@pytest.mark.parametrize("k", [1, 3, 17, 400])
@pytest.mark.parametrize("levels", [1, 2, 50, 10**9])
def test_nearest_orders_ties_by_column(rng, k, levels):
    block = np.float32(rng.integers(0, levels, size=(30, 400)))
    block[:, ::7] *= np.float32(-0.0)  # zeros of both signs are equal
    expected = np.argsort(block, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(nearest(block, k), expected)


def test_equal_rows(rng):
    rows = np.float32(rng.integers(0, 2, (50, 4))) * rng.choice([-1.0, 1.0], (50, 1))
    later, first = equal_rows(rows)
    for i, row in enumerate(rows):
        earliest = np.flatnonzero((rows == row).all(axis=1))[0]
        assert (i in later) == (earliest < i)
        if i in later:
            assert first[np.flatnonzero(later == i)[0]] == earliest
    assert len(equal_rows(rng.normal(size=(9, 2)))[0]) == 0
