"""k-reciprocal re-ranking against a plain transcription of the paper's equations."""

import sys

import numpy as np
import pytest
import reference

import kerastrip
from kerastrip.evaluation.reranking import rerank
from kerastrip.evaluation.retrieval import retrieval_metrics
from kerastrip.evaluation.search import search


def clustered(rng, n, classes, dim=6):
    y = np.arange(n) % classes
    x = rng.normal(size=(n, dim)) + 2 * rng.normal(size=(classes, dim))[y]
    return np.float32(x), y


def squared(rows, distance):
    rows = np.float64(rows)
    if distance == "cosine":
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return np.maximum(1 - unit @ unit.T, 0) * (1 - np.eye(len(rows)))
    return ((rows[:, None] - rows) ** 2).sum(axis=-1)


def assert_same_ranking(distances, indices, expected):
    """The expected distances (n, m) at the indices ascend and are the distances."""
    found = np.take_along_axis(expected, indices, axis=1)
    np.testing.assert_allclose(distances, found, atol=2e-6)
    nearest = np.sort(expected, axis=1)[:, : indices.shape[1]]
    np.testing.assert_allclose(found, nearest, atol=2e-6)


def of_ranking(indices, queries, gallery):
    """map and minp of (n, m) ranked rows; labels and groups of queries and gallery."""
    (y, groups), (other_y, other_groups) = queries, gallery
    precisions, last = [], []
    for i, order in enumerate(indices):
        same = other_y[order] == y[i]
        hits = same[~(same & (other_groups[order] == groups[i]))]
        if hits.any():
            ranks = np.flatnonzero(hits) + 1
            precisions.append((np.arange(1, len(ranks) + 1) / ranks).mean())
            last.append(len(ranks) / ranks[-1])
    return np.mean(precisions), np.mean(last)


class TestRerank:
    @pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine"])
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"k1": 7, "k2": 3, "original_weight": 0.0},
            {"k1": 4, "k2": 1, "original_weight": 0.6},
            {"k1": 1, "k2": 2},
            {"k1": 500, "k2": 400},  # more than there are rows
        ],
    )
    def test_equals_the_equations(self, rng, distance, settings):
        x, _ = clustered(rng, 70, 8)
        queries, gallery = x[:15], x[15:]
        distances, indices = rerank(queries, gallery, 55, distance=distance, **settings)
        both = np.concatenate([gallery, queries])
        expected = reference.reranked_distances(
            squared(both, distance), range(55, 70), *settings.values()
        )[:, :55]
        assert_same_ranking(distances, indices, expected)
        assert (distances.dtype, indices.dtype) == (np.float32, np.int64)

    @pytest.mark.parametrize("n", [2, 3, 40])
    def test_without_gallery_every_row_is_looked_up_without_itself(self, rng, n):
        x, _ = clustered(rng, n, 6)
        distances, indices = rerank(x, None, n - 1, k1=5)
        assert (indices != np.arange(n)[:, None]).all()
        expected = reference.reranked_distances(squared(x, ""), range(n), 5)
        np.fill_diagonal(expected, np.inf)
        assert_same_ranking(distances, indices, expected)

    def test_duplicates_and_ties_equal_the_equations(self, rng):
        x = np.float32(rng.integers(0, 3, (60, 3)))  # 27 different rows
        distances, indices = rerank(x[40:], x[:40].copy(), 40, k1=6, k2=3)
        expected = reference.reranked_distances(squared(x, ""), range(40, 60), 6, 3)
        assert_same_ranking(distances, indices, expected[:, :40])

    def test_queries_of_the_gallery_are_counted_once(self, rng):
        x, _ = clustered(rng, 50, 6)
        distances, indices = rerank(x[:9], x, 50, k1=5)
        expected = reference.reranked_distances(squared(x, ""), range(9), 5)
        assert_same_ranking(distances, indices, expected)
        np.testing.assert_array_equal(indices[:, 0], np.arange(9))

    def test_weight_one_is_the_order_of_search(self, rng):
        x, _ = clustered(rng, 60, 6)
        _, indices = rerank(x[:20], x[20:], 40, original_weight=1.0)
        np.testing.assert_array_equal(indices, search(x[:20], x[20:], 40)[1])

    def test_all_rows_at_one_point(self):
        distances, indices = rerank(np.ones((5, 2)), np.ones((30, 2)), 4)
        np.testing.assert_array_equal(distances, 0)
        np.testing.assert_array_equal(indices, [range(4)] * 5)

    @pytest.mark.parametrize("original_weight", [0.0, 0.3])
    def test_equal_rows_are_never_nearer_than_0(self, rng, original_weight):
        for _ in range(30):
            x = rng.normal(size=(12, 8))[rng.integers(0, 12, 50)]
            distances, _ = rerank(x, None, 49, original_weight=original_weight)
            assert distances.min() >= 0
            again, indices = rerank(x, x, 50, original_weight=original_weight)
            assert again.min() >= 0
            assert (np.diff(again, axis=1) >= 0).all()
            if original_weight == 0:  # equal distances stand in the order of the rows
                tied = np.diff(again, axis=1) == 0
                assert (np.diff(indices, axis=1)[tied] > 0).all()
                assert tied.any()
                assert not ((again > 0) & (again < 1e-9)).any()  # rounding is no order

    def test_parts_do_not_change_the_result(self, rng, monkeypatch):
        x, _ = clustered(rng, 90, 9)
        whole = rerank(x[:30], x[30:], 60)
        monkeypatch.setattr("kerastrip.evaluation.reranking._PART", 200)
        # `kerastrip.evaluation.search` is the function; this is its module.
        monkeypatch.setattr(sys.modules[search.__module__], "_ROWS", 7)
        parts = rerank(x[:30], x[30:], 60)
        np.testing.assert_allclose(parts[0], whole[0], atol=1e-6)
        assert (parts[1] == whole[1]).mean() > 0.99  # but for rounding

    @pytest.mark.parametrize(
        ("change", "error", "expected"),
        [
            ({"k": 0}, ValueError, "`k`"),
            ({"k": 5}, ValueError, "`k`.*at most the 4 rows"),
            ({"gallery": None, "k": 3}, ValueError, "`k`.*at most the 2 rows"),
            ({"k1": 0}, ValueError, "`k1`"),
            ({"k1": 2.0}, TypeError, "`k1`"),
            ({"k2": 0}, ValueError, "`k2`"),
            ({"original_weight": 1.5}, ValueError, "`original_weight`"),
            ({"distance": "angular"}, ValueError, "`distance`"),
            ({"gallery": np.ones((4, 5))}, ValueError, "`gallery`.*2 numbers"),
            ({"queries": [[np.nan, 0.0]]}, ValueError, "`queries`"),
        ],
    )
    def test_bad_input(self, change, error, expected):
        arguments = {"queries": np.eye(3)[:, :2], "gallery": np.ones((4, 2)), "k": 2}
        with pytest.raises(error, match=expected):
            rerank(**{**arguments, **change})


class TestMetricsOfTheReranked:
    WORDS = ("recall@1", "cmc@5", "map", "minp", "map@r", "mrr")

    def test_are_those_of_the_reranked_neighbours(self, rng):
        # With distances of its own, every order of neighbours can be judged.
        x, y = clustered(rng, 120, 10)
        groups = rng.integers(0, 3, 120)
        q, g = slice(30), slice(30, 120)
        _, indices = rerank(x[q], x[g], 90, k1=8)
        got = retrieval_metrics(
            x[q],
            y[q],
            gallery=x[g].copy(),
            gallery_labels=y[g],
            groups=groups[q],
            gallery_groups=groups[g],
            metrics=self.WORDS,
            rerank={"k1": 8},
        )
        expected = of_ranking(indices, (y[q], groups[q]), (y[g], groups[g]))
        assert (got["map"], got["minp"]) == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("original_weight", [0.0, 0.3])
    @pytest.mark.parametrize("kind", ["distinct", "one pair", "bursts", "one point"])
    def test_are_those_of_equal_rows(self, rng, kind, original_weight):
        for _ in range(15):
            n = int(rng.integers(20, 60))
            x = rng.normal(size=(n, 8))
            if kind == "one pair":
                x[1] = x[0]
            elif kind == "bursts":
                x = x[rng.integers(0, n // 4, n)]
            elif kind == "one point":
                x[:] = x[0]
            y, groups = rng.integers(0, 5, n), rng.integers(0, 3, n)
            y[1], groups[:2] = y[0], [0, 1]
            _, indices = rerank(x, None, n - 1, original_weight=original_weight)
            got = retrieval_metrics(
                x,
                y,
                groups=groups,
                metrics=("map", "minp"),
                rerank={"original_weight": original_weight},
            )
            expected = of_ranking(indices, (y, groups), (y, groups))
            assert (got["map"], got["minp"]) == pytest.approx(expected, abs=1e-9)

    def test_rise_where_classes_are_clusters(self, rng):
        x, y = clustered(rng, 400, 40, dim=8)
        plain = retrieval_metrics(x, y, metrics=("map",))
        better = retrieval_metrics(x, y, metrics=("map",), rerank={"k1": 8, "k2": 4})
        assert better["map"] > plain["map"] + 0.02

    def test_weight_one_changes_nothing(self, rng):
        x, y = clustered(rng, 80, 9)
        plain = retrieval_metrics(x, y, metrics=self.WORDS)
        same = retrieval_metrics(
            x, y, metrics=self.WORDS, rerank={"original_weight": 1.0}
        )
        assert same == pytest.approx(plain)
        assert retrieval_metrics(x, y, metrics=self.WORDS, rerank=False) == plain

    @pytest.mark.parametrize(
        ("value", "error", "expected"),
        [
            ("yes", TypeError, "`rerank`"),
            (20, TypeError, "`rerank`.*a dict of k1, k2, original_weight.*20"),
            ({"lambda_value": 0.3}, ValueError, "`rerank`.*paper is 'original_weight'"),
            ({"lambda_": 0.3}, ValueError, "`rerank`.*paper is 'original_weight'"),
            ({"k3": 3}, ValueError, "`rerank`.*one of 'k1'.*'k3'"),
            ({"lambda": 0.3}, ValueError, "`rerank`.*paper is 'original_weight'"),
            ({"k1": -1}, ValueError, "`k1`"),
        ],
    )
    def test_bad_input(self, value, error, expected):
        with pytest.raises(error, match=expected):
            retrieval_metrics(np.eye(3), [0, 0, 1], rerank=value)


def test_rerank_stands_beside_search():
    assert kerastrip.rerank is rerank
