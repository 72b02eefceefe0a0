"""Retrieval and verification figures against loops, scikit-learn and a peer."""

from unittest import mock

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.cluster import KMeans

from kerastrip._labels import LabelTable
from kerastrip.evaluation import retrieval, verification
from kerastrip.evaluation.retrieval import METRICS, retrieval_metrics
from kerastrip.evaluation.verification import (
    pair_distances,
    verification_curve,
    verification_folds,
    verification_metrics,
)


def loops(x, y, gallery=None, gallery_labels=None):
    """The definitions, one query at a time."""
    values = {word: [] for word in (*METRICS, "precision@3", "knn@3", "knn@6")}
    for i in range(len(x)):
        others = np.float64(x if gallery is None else gallery)
        labels = np.asarray(y if gallery is None else gallery_labels)
        d = ((others - np.float64(x[i])) ** 2).sum(axis=1)
        order = [
            j for j in np.argsort(d, kind="stable") if gallery is not None or j != i
        ]
        hits = [labels[j] == y[i] for j in order]
        total = sum(hits)
        if total == 0:
            continue
        precision = [sum(hits[: r + 1]) / (r + 1) for r in range(total)]
        for k in (1, 5, 10):
            values[f"recall@{k}"].append(any(hits[:k]))
        values["precision@1"].append(hits[0])
        values["precision@3"].append(sum(hits[:3]) / 3)
        values["r_precision"].append(sum(hits[:total]) / total)
        values["map@r"].append(
            sum(precision[r] * hits[r] for r in range(total)) / total
        )
        values["mrr"].append(1 / (hits.index(True) + 1))
        for k in (3, 6):
            votes = [labels[j] for j in order[:k]]
            winner = max(votes, key=votes.count)  # the first of equals
            values[f"knn@{k}"].append(winner == y[i])
    return {word: np.mean(list_) for word, list_ in values.items()}, len(values["mrr"])


class TestRetrieval:
    @pytest.mark.parametrize(
        ("n", "classes"), [(12, 2), (60, 3), (300, 40), (400, 150), (200, 2)]
    )
    def test_equals_loops(self, rng, n, classes):
        y = rng.integers(0, classes, n)
        x = rng.normal(size=(n, 5)) + 0.5 * rng.normal(size=(classes, 5))[y]
        x = np.float32(x)
        expected, count = loops(x, y)
        got = retrieval_metrics(x, y, metrics=tuple(expected))
        assert (got["queries"], got["lone_queries"]) == (count, n - count)
        for word, value in expected.items():
            assert got[word] == pytest.approx(value, abs=1e-12), word

    def test_query_and_gallery_equal_loops(self, rng):
        y, other_y = rng.integers(0, 30, 70), rng.integers(0, 25, 200)
        x, other = np.float32(rng.normal(size=(270, 4)))[:70], None
        other = np.float32(rng.normal(size=(200, 4)))
        expected, count = loops(x, y, other, other_y)
        got = retrieval_metrics(
            x, y, gallery=other, gallery_labels=other_y, metrics=tuple(expected)
        )
        assert got["queries"] == count
        assert got["lone_queries"] == 70 - count > 0
        for word, value in expected.items():
            assert got[word] == pytest.approx(value, abs=1e-12), word

    def test_equals_pytorch_metric_learning(self):
        # AccuracyCalculator of pytorch-metric-learning 2.9.0 on these arrays
        rng = np.random.default_rng(2024)
        x = rng.normal(size=(120, 6)).astype("float32")
        labels = np.arange(120) % 17
        labels[:3] = [100, 101, 102]  # without a positive
        x += 0.8 * rng.normal(size=(103, 6))[labels].astype("float32")
        words = ("map@r", "mrr", "precision@1", "r_precision")
        got = retrieval_metrics(x, labels, metrics=words)
        golden = (0.1243019943019943, 0.38605252, 0.20512820512820512)
        golden += (0.2091168091168091,)
        np.testing.assert_allclose([got[word] for word in words], golden, rtol=1e-7)
        got = retrieval_metrics(
            x[:40],
            labels[:40],
            gallery=x[40:],
            gallery_labels=labels[40:],
            metrics=words,
        )
        golden = (0.13463963963963965, 0.38234201, 0.21621621621621623)
        golden += (0.19594594594594594,)
        np.testing.assert_allclose([got[word] for word in words], golden, rtol=1e-7)

    def test_perfect_and_worst(self):
        x = np.array([[0.0], [0.1], [5.0], [5.1]])
        best = retrieval_metrics(x, [0, 0, 1, 1])
        assert all(best[word] == 1.0 for word in METRICS)
        worst = retrieval_metrics(x, [0, 1, 0, 1])
        assert worst["recall@1"] == worst["map@r"] == 0.0
        assert worst["recall@5"] == 1.0
        assert worst["mrr"] == pytest.approx((1 / 2 + 1 / 3) / 2)

    @pytest.mark.parametrize("n", [40, 1000])
    def test_order_of_the_rows_does_not_matter(self, rng, n):
        x, y = np.float32(rng.normal(size=(n, 4))), rng.integers(0, 9, n)
        order = rng.permutation(n)
        first, second = retrieval_metrics(x, y), retrieval_metrics(x[order], y[order])
        assert first == pytest.approx(second, abs=1e-12)

    def test_labels_of_every_kind_agree(self, rng):
        x, y = rng.normal(size=(30, 3)), rng.integers(0, 4, 30)
        expected = retrieval_metrics(x, y)
        names = np.array(["ant", "bee", "cat", "dog"])
        for labels in (
            y.tolist(),
            y + 2**40,
            names[y],
            names.astype(object)[y],
            np.eye(4)[y],
        ):
            assert retrieval_metrics(x, labels) == expected

    @pytest.mark.parametrize(
        ("own", "others"),
        [
            ([10**30, 5, 7], [5, 10**30, 6]),  # both objects
            ([10**30, 5, 7], [5, 6, 7]),
            ([5, 6, 7], [7, 10**30, 5]),
            (np.int64([-1, 5, 7]), np.uint64([5, 6, 2**63])),
            (np.uint64([2**63, 2**63 + 1, 5]), np.int64([5, -1, 6])),
            (np.uint32([5, 6, 7]), np.int8([-1, 7, 5])),
            ([b"a\0", b"b", b"c"], np.array([b"b", b"d", b"cc"])),
            (np.array(["a", "bb", "c"]), ["bb", "cccc", "d"]),
        ],
    )
    def test_labels_of_a_gallery_meet_in_any_dtype(self, own, others):
        for first, second in ((own, others), (others, own)):
            codes, row_codes = retrieval.common_codes(
                LabelTable(first), LabelTable(second)
            )
            expected = [[a == b for b in list(second)] for a in list(first)]
            assert np.any(expected)
            np.testing.assert_array_equal(codes[:, None] == row_codes, expected)

    def test_cosine_ignores_lengths(self, rng):
        x, y = rng.normal(size=(50, 3)), rng.integers(0, 5, 50)
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        scaled = unit * rng.uniform(0.1, 10, size=(50, 1))
        assert retrieval_metrics(scaled, y, distance="cosine") == pytest.approx(
            retrieval_metrics(unit, y)
        )

    def test_all_embeddings_at_one_point(self):
        # Neighbours in the order of the rows: nothing is found by chance alone.
        got = retrieval_metrics(np.ones((6, 2)), [0, 1, 2, 2, 1, 0])
        assert got["recall@1"] == pytest.approx(1 / 6)
        assert got["lone_queries"] == 0

    def test_clustering(self, rng):
        y = np.repeat(np.arange(4), 20)
        x = rng.normal(size=(80, 2)) * 0.01 + np.eye(4)[y][:, :2] + y[:, None]
        got = retrieval_metrics(x, y, metrics=("nmi", "ami"))
        assert got["nmi"] == pytest.approx(1.0)
        assert got["ami"] == pytest.approx(1.0)
        shuffled = retrieval_metrics(x, rng.permutation(y), metrics=("ami",))
        assert abs(shuffled["ami"]) < 0.1
        assert "nmi" not in shuffled
        vague = rng.normal(size=(80, 2)) + y[:, None]
        got = retrieval_metrics(vague, y, metrics=("nmi", "ami"), seed=3)
        found = KMeans(4, n_init=1, random_state=3).fit_predict(np.float32(vague))
        assert got["nmi"] == pytest.approx(sk.normalized_mutual_info_score(y, found))
        assert got["ami"] == pytest.approx(sk.adjusted_mutual_info_score(y, found))

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"labels": [0, 0]}, "labels.*3 labels"),
            ({"labels": [0, 1, 2]}, "occurs twice"),
            ({"labels": [[1, 1], [0, 1], [1, 0]]}, "single 1"),
            ({"embeddings": np.ones(3)}, "embeddings"),
            ({"embeddings": [[1.0], [np.nan], [2.0]]}, "embeddings.*row 1"),
            ({"gallery": np.ones((2, 2))}, "gallery_labels"),
            ({"gallery": np.ones((2, 2)), "gallery_labels": [7, 8]}, "gallery"),
            ({"gallery": np.ones((2, 3)), "gallery_labels": [0, 1]}, "gallery"),
            ({"metrics": ()}, "metrics"),
            ({"metrics": ("recall@0",)}, "recall@0"),
            ({"metrics": ("recal@1",)}, "Did you mean 'recall@1'"),
            *(
                ({"metrics": (word,)}, f"`metrics`.*'{word}'. Did you mean '{hint}'")
                for word, hint in {
                    **{"mAP": "map", "mINP": "minp", "Recall@1": "recall@1"},
                    **dict.fromkeys(("rank-1", "Rank1", "rank@1", "R@1"), "cmc@1"),
                }.items()
            ),
            ({"metrics": ("map@5",)}, "map@r"),
            ({"metrics": (3,)}, "metrics"),
            ({"distance": "angular"}, "distance"),
        ],
    )
    def test_bad_input(self, change, expected):
        arguments = {"embeddings": np.ones((3, 2)), "labels": [0, 0, 1]} | change
        with pytest.raises(ValueError, match=expected):
            retrieval_metrics(**arguments)

    def test_wrong_types(self):
        x = np.ones((2, 1))
        for labels in ([0.5, 0.5], ["a", 1]):
            with pytest.raises(TypeError, match="labels"):
                retrieval_metrics(x, labels)
        with pytest.raises(ValueError, match=r"labels.*None at position 0"):
            retrieval_metrics(x, [None, None])
        with pytest.raises(TypeError, match="gallery_labels"):
            retrieval_metrics(x, [0, 0], gallery=x, gallery_labels=["0", "0"])


def figures_of(found):
    """The metrics of a list of queries of `reference.market1501`."""
    first, precision, penalty = (np.array(one) for one in zip(*found, strict=True))
    return {
        **{f"cmc@{k}": (first < k).mean() for k in (1, 3, 10)},
        "map": precision.mean(),
        "minp": penalty.mean(),
        "mrr": (1 / (first + 1)).mean(),
    }


def squares(x, other):
    return ((np.float64(x)[:, None] - np.float64(other)) ** 2).sum(axis=-1)


class TestGroups:
    """Rows of the query's label and group are left out of its ranking."""

    WORDS = ("cmc@1", "cmc@3", "cmc@10", "map", "minp", "mrr")

    @given(
        seed=st.integers(0, 10**6),
        n=st.integers(1, 40),
        m=st.integers(1, 60),
        labels=st.integers(1, 9),
        cameras=st.integers(1, 5),
        values=st.integers(1, 6),
        exact=st.sampled_from([0, 1 << 24]),
    )
    @settings(max_examples=150, deadline=None)
    @pytest.mark.filterwarnings("ignore:.*have an equal row")
    def test_equal_the_protocol_of_market1501_with_ties(
        self, seed, n, m, labels, cameras, values, exact
    ):
        # Whole numbers: their distances are exact, and there are many ties.
        rng = np.random.default_rng(seed)
        x, other = rng.integers(0, values, (n, 3)), rng.integers(0, values, (m, 3))
        y, other_y = rng.integers(0, labels, n), rng.integers(0, labels, m)
        g, other_g = rng.integers(0, cameras, n), rng.integers(0, cameras, m)
        found = reference.market1501(squares(x, other), y, g, other_y, other_g)
        gallery = {"gallery": other, "gallery_labels": other_y}
        arguments = {"groups": g, "gallery_groups": other_g, "metrics": self.WORDS}
        if not found:
            known = np.isin(y, other_y).any()
            expected = "another group of the gallery" if known else "`labels`"
            with pytest.raises(ValueError, match=expected):
                retrieval_metrics(x, y, **gallery, **arguments)
            return
        with mock.patch.object(retrieval, "_EXACT", exact):  # float32 or float64
            got = retrieval_metrics(x, y, **gallery, **arguments)
        assert got["queries"] == len(found)
        lone = (~np.isin(y, other_y)).sum()
        assert got["lone_queries"] == lone
        assert got["lone_across_groups"] == n - len(found) - lone
        for word, value in figures_of(found).items():
            assert got[word] == pytest.approx(value, abs=1e-9), word

    @pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine"])
    @pytest.mark.parametrize(("n", "classes"), [(300, 2), (1200, 60)])
    def test_every_metric_equals_loops_without_a_gallery(
        self, rng, distance, n, classes
    ):
        y, groups = rng.integers(0, classes, n), rng.integers(0, 3, n)
        x = np.float32(rng.normal(size=(n, 6)))
        unit = np.float64(x) / np.linalg.norm(np.float64(x), axis=1, keepdims=True)
        words = (*self.WORDS, *METRICS, "precision@7", "knn@4")
        got = retrieval_metrics(x, y, groups=groups, distance=distance, metrics=words)
        points = unit if distance == "cosine" else np.float64(x)
        values = {word: [] for word in words}
        for i in range(n):
            order = np.argsort(((points - points[i]) ** 2).sum(axis=1), kind="stable")
            order = order[(y[order] != y[i]) | (groups[order] != groups[i])]
            hits = y[order] == y[i]
            ranks = np.flatnonzero(hits) + 1
            total = len(ranks)
            if total == 0:
                continue
            precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
            for k in (1, 3, 5, 10):
                values.setdefault(f"cmc@{k}", []).append(hits[:k].any())
                values.setdefault(f"recall@{k}", []).append(hits[:k].any())
            values["precision@1"].append(hits[0])
            values["precision@7"].append(hits[:7].sum() / 7)
            values["r_precision"].append(hits[:total].mean())
            values["map@r"].append((precision * hits)[:total].sum() / total)
            values["mrr"].append(1 / ranks[0])
            values["map"].append(precision[hits].mean())
            values["minp"].append(total / ranks[-1])
            votes = y[order[:4]].tolist()
            values["knn@4"].append(max(votes, key=votes.count) == y[i])
        assert got["queries"] == len(values["map"])
        for word in words:
            assert got[word] == pytest.approx(np.mean(values[word]), abs=1e-9), word

    @pytest.mark.parametrize("exact", [0, 1 << 24])
    @pytest.mark.parametrize(("n", "m", "dim"), [(17, 33, 512), (40, 999, 128)])
    def test_equal_rows_stand_in_their_order(self, rng, monkeypatch, exact, n, m, dim):
        # A product of matrices rounds some columns otherwise than others.
        monkeypatch.setattr(retrieval, "_EXACT", exact)
        rows = rng.normal(size=(5, dim))
        which = rng.integers(0, len(rows), m)
        x, y = rng.normal(size=(n, dim)), np.arange(n) % 3
        other_y, zeros = rng.integers(0, 3, m), np.zeros(n, int)
        d = squares(np.float32(x), np.float32(rows))[:, which]
        found = reference.market1501(d, y, zeros, other_y, np.ones(m))
        got = retrieval_metrics(
            x, y, gallery=rows[which], gallery_labels=other_y, metrics=self.WORDS
        )
        for word, value in figures_of(found).items():
            assert got[word] == pytest.approx(value, abs=1e-9), word

    @pytest.mark.filterwarnings("error")
    def test_the_same_array_as_gallery_is_no_gallery(self, rng):
        x, y, g = rng.normal(size=(40, 3)), np.arange(40) % 7, np.arange(40) % 3
        alone = retrieval_metrics(x, y, groups=g, metrics=self.WORDS)
        both = {"gallery": x, "gallery_labels": y, "gallery_groups": g}
        assert retrieval_metrics(x, y, groups=g, metrics=self.WORDS, **both) == alone

    @pytest.mark.filterwarnings("error")
    def test_copies_in_the_same_group_are_left_out_without_a_warning(self, rng):
        x, y, g = rng.normal(size=(40, 3)), np.arange(40) % 7, np.arange(40) % 3
        both = {"gallery": x.copy(), "gallery_labels": y, "gallery_groups": g}
        got = retrieval_metrics(x, y, groups=g, metrics=self.WORDS, **both)
        assert got == retrieval_metrics(x, y, groups=g, metrics=self.WORDS)

    def test_queries_that_lose_all_positives_are_counted_apart(self):
        got = retrieval_metrics(
            np.arange(6.0)[:, None],
            ["a", "a", "b", "b", "b", "c"],
            groups=["1", "1", "1", "1", "2", "2"],
            metrics=("recall@1", "map"),
        )
        # a: both in camera 1. b: each finds the others across cameras. c: alone.
        assert got["queries"] == 3
        assert got["lone_queries"] == 1
        assert got["lone_across_groups"] == 2
        assert "lone_across_groups" not in retrieval_metrics(
            np.arange(4.0)[:, None], [0, 0, 1, 1]
        )

    def test_groups_of_their_own_leave_nothing_out(self, rng):
        x, y = rng.normal(size=(60, 4)), np.arange(60) % 9
        words = (*self.WORDS, *METRICS)
        apart = retrieval_metrics(x, y, groups=np.arange(60), metrics=words)
        assert apart.pop("lone_across_groups") == 0
        assert apart == retrieval_metrics(x, y, metrics=words)

    def test_rows_left_out_do_not_vote(self):
        # Query 0 finds one row of its label, and one of another label farther away.
        x, y = [[0.0], [0.1], [0.2], [0.3], [1.0], [2.0]], ["a"] * 5 + ["b"]
        got = retrieval_metrics(
            x[:1],
            y[:1],
            groups=[0],
            gallery=x[1:],
            gallery_labels=y[1:],
            gallery_groups=[0, 0, 0, 1, 1],
            metrics=("knn@5", "precision@5"),
        )
        assert (got["knn@5"], got["precision@5"]) == (1.0, 0.2)

    @pytest.mark.parametrize(
        ("change", "error", "expected"),
        [
            ({"groups": [0, 1]}, ValueError, "`groups`.*4 groups.*2 groups"),
            ({"groups": [0, 1, None, 1]}, ValueError, "`groups`.*None at position 2"),
            ({"groups": ["a", 1, "a", 1]}, TypeError, "`groups`.*one kind"),
            ({"groups": [0.5, 1.0, 1.0, 2.0]}, TypeError, "`groups`"),
            ({"groups": [3, 3, 3, 3]}, ValueError, "`groups`.*two groups.*4 queries"),
            (
                {"groups": [3, 3, 3, 3], "labels": range(4)},
                ValueError,
                "`labels`.*occurs twice.*4 queries",
            ),
            ({"gallery_groups": [0, 1]}, ValueError, "`gallery_groups`.*`gallery`"),
        ],
    )
    def test_bad_groups(self, change, error, expected):
        with pytest.raises(error, match=expected):
            retrieval_metrics(
                **{"embeddings": np.eye(4), "labels": [0, 0, 1, 1], **change}
            )

    @pytest.mark.parametrize(
        ("change", "error", "expected"),
        [
            ({"gallery_groups": None}, ValueError, "`gallery_groups`.*of `gallery`"),
            ({"groups": None}, ValueError, "`gallery_groups`.*`groups` with it"),
            ({"gallery_groups": [0]}, ValueError, "`gallery_groups`.*2 groups"),
            (
                {"gallery_groups": ["1", "0"]},
                TypeError,
                "`gallery_groups`.*as `groups`, integers, received strings, .*'0'",
            ),
            (
                {"groups": ["a", "b"] * 2, "gallery_groups": [b"b", b"a"]},
                TypeError,
                "`gallery_groups`.*as `groups`, strings, received bytes, .*b'a'",
            ),
            (
                {"gallery_labels": [5, 6]},
                ValueError,
                "`labels`.*a label of the gallery, received 4 queries",
            ),
            (
                {"gallery_labels": [0, 6], "groups": [0] * 4},
                ValueError,
                "`groups`.*another group of the gallery, received 2 queries.* and 2 ",
            ),
            ({"gallery_groups": [0, None]}, ValueError, "`gallery_groups`.*None"),
        ],
    )
    def test_bad_groups_of_a_gallery(self, change, error, expected):
        arguments = {
            "groups": [0, 1, 0, 1],
            "gallery": np.eye(4)[:2],
            "gallery_labels": [0, 1],
            "gallery_groups": [0, 1],
        }
        with pytest.raises(error, match=expected):
            retrieval_metrics(np.eye(4), [0, 0, 1, 1], **{**arguments, **change})


def all_pairs(x, y):
    pairs = np.array([(i, j) for i in range(len(x)) for j in range(i + 1, len(x))])
    distances = np.linalg.norm(
        np.float64(x)[pairs[:, 0]] - np.float64(x)[pairs[:, 1]], axis=1
    )
    return (
        pairs,
        np.float32(distances),
        np.asarray(y)[pairs[:, 0]] == np.asarray(y)[pairs[:, 1]],
    )


def of_scikit_learn(is_same, distances):
    far, tar, _ = sk.roc_curve(is_same, -distances, drop_intermediate=False)
    precision, recall, _ = sk.precision_recall_curve(is_same, -distances)
    i = np.argmax(far + tar - 1 >= 0)
    share = (1 - far[i - 1] - tar[i - 1]) / np.diff(far + tar)[i - 1]
    accuracies = [np.mean((distances <= t) == is_same) for t in np.unique(distances)]
    return {
        "auc": sk.roc_auc_score(is_same, -distances),
        "eer": far[i - 1] + share * (far[i] - far[i - 1]),
        "tar@0.1": tar[far <= 0.1].max(),
        "tar@0.01": tar[far <= 0.01].max(),
        "tar@0.001": tar[far <= 0.001].max(),
        "tar@0.0001": tar[far <= 0.0001].max(),
        "accuracy": max([np.mean(~is_same), *accuracies]),
        "f1": np.max(2 * precision * recall / np.maximum(precision + recall, 1e-9)),
    }


def separable(rng, n=90, classes=6):
    y = rng.integers(0, classes, n)
    return np.float32(rng.normal(size=(n, 4)) + rng.normal(size=(classes, 4))[y] * 2), y


class TestVerification:
    @pytest.mark.parametrize(
        "given", ["labels", "pairs and labels", "pairs and is_same"]
    )
    @pytest.mark.parametrize("decimals", [0, 7])
    def test_equals_scikit_learn(self, rng, given, decimals):
        # few distinct distances without decimals: many ties
        x, y = separable(rng)
        x = np.round(x, decimals)
        if not decimals:
            x[-1] -= x.sum(axis=0)  # of whole numbers around 0 GEMM rounds none
        pairs, distances, is_same = all_pairs(x, y)
        arguments = {
            "labels": {"labels": y},
            "pairs and labels": {"labels": y, "pairs": pairs},
            "pairs and is_same": {"pairs": pairs, "is_same": is_same},
        }[given]
        expected = of_scikit_learn(is_same, distances)
        got = verification_metrics(x, metrics=tuple(expected), **arguments)
        tolerance = 1e-6 if given == "labels" and decimals else 1e-12
        for word, value in expected.items():
            assert got[word] == pytest.approx(value, abs=tolerance), word
        assert got["same_pairs"] == is_same.sum()
        assert got["different_pairs"] == (~is_same).sum()

    def test_operating_points(self, rng):
        x, y = separable(rng)
        _, distances, is_same = all_pairs(x, y)
        curve = verification_curve(x, y)
        points = [curve.best("accuracy"), curve.best("f1"), curve.at_far(0.05)]
        for point in points:
            accepted = distances <= point.threshold * (1 + 1e-6)
            assert point.accuracy == pytest.approx((accepted == is_same).mean())
            assert point.precision == pytest.approx(is_same[accepted].mean())
            assert point.recall == pytest.approx(accepted[is_same].mean())
            assert point.far == pytest.approx(accepted[~is_same].mean())
            assert point.f1 == pytest.approx(sk.f1_score(is_same, accepted))
        assert points[2].far <= 0.05

    @pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine"])
    def test_the_histogram_agrees_with_sorting(self, rng, monkeypatch, distance):
        x, y = separable(rng, n=700, classes=20)
        x[5] = x[6] = x[7]
        sorted_ = verification_curve(x, y, distance=distance)
        monkeypatch.setattr(verification, "_SORTED", 0)
        counted = verification_curve(x, y, distance=distance)
        assert counted.same[-1] == sorted_.same[-1]
        assert counted.different[-1] == sorted_.different[-1]
        assert counted.auc == pytest.approx(sorted_.auc, abs=1e-7)
        assert counted.eer == pytest.approx(sorted_.eer, abs=1e-5)
        if distance != "euclidean":  # whose root rounds two floats to one
            at = np.searchsorted(sorted_.thresholds, counted.thresholds, side="right")
            np.testing.assert_array_equal(sorted_.same[at - 1], counted.same)
            np.testing.assert_array_equal(sorted_.different[at - 1], counted.different)
        assert (np.diff(counted.thresholds) > 0).all()

    def test_cells_of_floats_are_in_their_order(self, rng):
        values = np.float32(10.0) ** np.float32(rng.uniform(-45, 38, size=2000))
        values = np.sort(np.append(values, np.float32([0, 1e-45, 1, 2])))
        cells = verification._cell_of(values)
        assert (np.diff(cells) >= 0).all()
        largest = verification._largest_of(cells)
        assert (largest >= values).all()
        normal = values > 1e-37
        assert (largest[normal] <= values[normal] * (1 + 2.0**-17)).all()
        np.testing.assert_array_equal(verification._cell_of(largest), cells)
        beyond = np.nextafter(largest, np.float32(np.inf))
        np.testing.assert_array_equal(verification._cell_of(beyond), cells + 1)

    @pytest.mark.parametrize("sorted_pairs", [0, 10**6])
    def test_collapsed_and_perfect(self, monkeypatch, sorted_pairs):
        monkeypatch.setattr(verification, "_SORTED", sorted_pairs)
        y = np.arange(30) % 3
        words = ("auc", "eer", "tar@0.01", "accuracy")
        got = verification_metrics(np.full((30, 2), 0.7), y, metrics=words)
        assert (got["auc"], got["eer"], got["tar@0.01"]) == (0.5, 0.5, 0.0)
        assert got["accuracy"] == pytest.approx(1 - 135 / 435)
        perfect = verification_metrics(np.eye(3)[y], y, metrics=words)
        assert [perfect[word] for word in words] == [1.0, 0.0, 1.0, 1.0]

    def test_accepting_nothing_is_a_threshold(self):
        curve = verification_curve([[0.0], [1.0], [9.0], [10.0]], ["a", "b", "b", "a"])
        assert curve.best("accuracy").threshold == -np.inf
        assert curve.best("accuracy").precision == 0.0
        assert curve.at_far(0.0).recall == 0.0

    def test_folds_equal_loops(self, rng):
        x, y = separable(rng)
        pairs, distances, is_same = all_pairs(x, y)
        some = rng.permutation(len(pairs))[:900]
        pairs, distances, is_same = pairs[some], distances[some], is_same[some]
        fold_of = rng.integers(0, 5, 900)
        got = verification_folds(x, pairs, is_same, folds=fold_of)
        expected = []
        for fold in range(5):
            inside = fold_of == fold
            thresholds = np.unique(distances[~inside])
            best = max(
                thresholds,
                key=lambda t: np.mean((distances[~inside] <= t) == is_same[~inside]),
            )
            expected.append(np.mean((distances[inside] <= best) == is_same[inside]))
        np.testing.assert_allclose(got.accuracies, expected, atol=1e-12)
        assert got.accuracy == pytest.approx(np.mean(expected))
        assert got.standard_error == pytest.approx(np.std(expected, ddof=1) / 5**0.5)

    def test_folds_by_number_are_runs_of_either_kind(self, rng):
        # the layout of LFW: 3 folds, each 4 same pairs, then 4 different ones
        is_same = np.tile(np.repeat([True, False], 4), 3)
        x = rng.normal(size=(48, 3))
        pairs = np.arange(48).reshape(24, 2)
        own = verification_folds(x, pairs, is_same, folds=np.repeat(np.arange(3), 8))
        cut = verification_folds(x, pairs, is_same, folds=3)
        np.testing.assert_array_equal(own.accuracies, cut.accuracies)

    def test_pair_distances(self, rng):
        x = np.float32(rng.normal(size=(9, 3)))
        pairs = rng.integers(0, 9, size=(20, 2))
        a, b = np.float64(x[pairs[:, 0]]), np.float64(x[pairs[:, 1]])
        squares = ((a - b) ** 2).sum(axis=1)
        cosine = 1 - (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(
            b, axis=1
        )
        for distance, expected in (
            ("euclidean", np.sqrt(squares)),
            ("squared_euclidean", squares),
            ("cosine", cosine),
        ):
            got = pair_distances(x, pairs, distance=distance)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"labels": None}, "neither"),
            ({"pairs": [[0, 1]], "is_same": [1]}, "both"),
            ({"labels": None, "is_same": [True]}, "pairs"),
            ({"labels": [0, 0, 0]}, "0 different pairs"),
            ({"labels": [0, 1, 2]}, "0 same"),
            ({"pairs": [[0, 3]]}, "rows 0 ... 2"),
            ({"pairs": [0, 1]}, r"\(pairs, 2\)"),
            ({"pairs": [[0, 1]], "labels": None, "is_same": [1, 0]}, "1 booleans"),
            ({"pairs": [[0, 1]], "labels": None, "is_same": [2]}, "is_same"),
            ({"pairs": [[0, 1]], "labels": None, "is_same": [1]}, "1 same and 0"),
            ({"metrics": ("tar@2",)}, "tar@2"),
            ({"metrics": ("tar@x",)}, "tar@x"),
            ({"metrics": ("roc_auc",)}, "'auc'"),
            ({"distance": "angular"}, "distance"),
        ],
    )
    def test_bad_input(self, change, expected):
        arguments = {"embeddings": np.eye(3), "labels": [0, 0, 1]} | change
        with pytest.raises(ValueError, match=expected):
            verification_metrics(**arguments)

    def test_bad_points_and_folds(self):
        curve = verification_curve(np.eye(3), [0, 0, 1])
        with pytest.raises(ValueError, match="criterion"):
            curve.best("auc")
        with pytest.raises(ValueError, match="far"):
            curve.at_far(1.5)
        pairs, is_same = [[0, 1], [0, 2], [1, 2], [1, 0]], [1, 0, 0, 1]
        for folds in (1, 3, [0, 0, 0, 0], [0, 1]):
            with pytest.raises(ValueError, match="folds"):
                verification_folds(np.eye(3), pairs, is_same, folds=folds)
        with pytest.raises(TypeError, match="pairs"):
            pair_distances(np.eye(3), [[0.0, 1.0]])


class TestGalleryThatHoldsTheQueries:
    """Every query would find itself first: recall@1 of noise is 1.0."""

    def noise(self, rng):
        return np.float32(rng.normal(size=(60, 8))), np.arange(60) % 6

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("part", [slice(None), slice(20), slice(7, 50, 3)])
    def test_rows_of_the_same_memory_are_looked_up_without_themselves(self, rng, part):
        x, y = self.noise(rng)
        got = retrieval_metrics(x[part], y[part], gallery=x, gallery_labels=y)
        alone = []
        for i in np.arange(60)[part]:
            others = np.arange(60) != i
            alone.append(
                retrieval_metrics(
                    x[[i]], y[[i]], gallery=x[others], gallery_labels=y[others]
                )
            )
        for word in METRICS:
            assert got[word] == pytest.approx(np.mean([one[word] for one in alone]))
        assert got["recall@1"] < 0.5

    @pytest.mark.filterwarnings("error")
    def test_the_same_object_is_the_default(self, rng):
        x, y = self.noise(rng)
        expected = retrieval_metrics(x, y)
        assert retrieval_metrics(x, y, gallery=x, gallery_labels=y) == expected
        rows = x.tolist()
        assert retrieval_metrics(rows, y, gallery=rows, gallery_labels=y) == expected
        turned = retrieval_metrics(x, y, gallery=x[::-1], gallery_labels=y[::-1])
        assert turned == pytest.approx(expected)

    @pytest.mark.parametrize("distance", ["euclidean", "cosine"])
    def test_copies_are_counted_in_a_warning(self, rng, distance):
        x, y = self.noise(rng)
        order = rng.permutation(60)
        # A second forward pass rounds otherwise.
        again = x[order] * np.float32(1 + 1e-7)
        with pytest.warns(UserWarning, match="20 of 20 queries.*leave out `gallery`"):
            got = retrieval_metrics(
                x[:20],
                y[:20],
                gallery=again,
                gallery_labels=y[order],
                metrics=("recall@1",),
                distance=distance,
            )
        assert got["recall@1"] == 1.0  # left as it is: they may be other samples
        with pytest.warns(UserWarning, match="1 of 20 queries.*first is query 3"):
            retrieval_metrics(
                x[:20],
                y[:20],
                gallery=np.concatenate([x[20:], x[[3]]]),
                gallery_labels=np.append(y[20:], y[3]),
            )

    @pytest.mark.filterwarnings("error")
    def test_nothing_is_told_of_other_samples_and_of_points_on_one_spot(self, rng):
        x, y = self.noise(rng)
        other = np.float32(rng.normal(size=(300, 8)))
        for queries, gallery in (
            (x, other),
            (x * 0, other * 0),  # a collapsed model
            (np.eye(6)[y], np.eye(6)[np.arange(300) % 6]),  # data of few values
            (np.round(x[:, :1]), np.round(other[:, :1])),
        ):
            retrieval_metrics(
                queries, y, gallery=gallery, gallery_labels=np.arange(300) % 6
            )
        # The equal row has another label, so that it is another sample.
        retrieval_metrics(
            x[:9],
            y[:9],
            gallery=np.concatenate([other, x[:9]]),
            gallery_labels=np.append(np.arange(300) % 6, y[:9] + 1),
        )


@pytest.mark.parametrize(
    "function", [retrieval_metrics, verification_metrics], ids=lambda one: one.__name__
)
def test_masked_and_missing_entries_are_refused_by_name_and_position(rng, function):
    x, y = rng.normal(size=(12, 3)), np.repeat([0, 1, 2], 4)
    masked = np.ma.array(x, mask=np.arange(36).reshape(12, 3) == 17)
    with pytest.raises(ValueError, match=r"`embeddings`.*masked.*5, 2"):
        function(masked, y)
    assert function(np.ma.array(x), y) == function(x, y)
    with pytest.raises(ValueError, match=r"`labels`.*NaN at position 4"):
        function(x, np.where(y == 1, np.nan, y))
    with pytest.raises(ValueError, match=r"`labels`.*masked.*4"):
        function(x, np.ma.masked_equal(y, 1))


def test_masked_pairs_flags_and_folds_are_refused():
    x, pairs = np.float32(np.eye(4)), np.array([[0, 1], [2, 3], [0, 2], [1, 3]])
    same = np.array([True, True, False, False])
    masked = np.ma.array(pairs, mask=pairs == 2)
    with pytest.raises(ValueError, match=r"`pairs`.*masked.*1, 0"):
        verification_metrics(x, pairs=masked, is_same=same)
    with pytest.raises(ValueError, match=r"`pairs`.*masked"):
        pair_distances(x, masked)
    with pytest.raises(ValueError, match=r"`is_same`.*masked.*2"):
        verification_metrics(
            x, pairs=pairs, is_same=np.ma.array(same, mask=[0, 0, 1, 0])
        )
    with pytest.raises(ValueError, match=r"`folds`.*masked.*3"):
        verification_folds(
            x, pairs, same, folds=np.ma.array([0, 1, 0, 1], mask=[0, 0, 0, 1])
        )
    for missing in (np.nan, None):
        flags = np.array([True, True, False, missing], object)
        with pytest.raises(ValueError, match=r"`is_same`.*position 3"):
            verification_metrics(x, pairs=pairs, is_same=flags)
    with pytest.raises(ValueError, match=r"`folds`.*position 1"):
        verification_folds(x, pairs, same, folds=[0.0, np.nan, 0.0, 1.0])
