"""Intervals over classes: against loops, by hand, and in simulation."""

import importlib.util
import warnings

import numpy as np
import pytest
from harness import ROOT

from kerastrip.evaluation import retrieval, verification
from kerastrip.evaluation.intervals import ClassScores, t_distribution, with_intervals
from kerastrip.evaluation.retrieval import retrieval_metrics
from kerastrip.evaluation.verification import verification_metrics

OF_ROWS = ("recall@1", "recall@3", "precision@3", "r_precision", "map@r", "knn@4")
OF_PAIRS = ("auc", "eer", "tar@0.1", "tar@0.01", "accuracy", "f1")
ROUGH = ("accuracy", "eer", "tar@0.1", "tar@0.01")


def draw(rng, classes=30, spread=1.0, sizes=None):
    sizes = rng.integers(1, 8, classes) if sizes is None else sizes
    y = np.repeat(np.arange(classes), sizes)
    own = np.exp(0.3 * rng.normal(size=classes))[y, None]
    x = spread * rng.normal(size=(classes, 4))[y] + own * rng.normal(size=(len(y), 4))
    return np.float32(x), y


def sum_of(figures, metric):
    return figures[metric] * figures["queries"]


class TestScoresOfQueries:
    """What is taken away with a class is its score, up to one number for all classes."""

    def left_out(self, scores, metrics, with_all, without):
        for metric in metrics:
            lost = [
                sum_of(with_all, metric) - sum_of(figures, metric)
                for figures in without
            ]
            beyond = scores.scores[metric] - lost
            np.testing.assert_allclose(beyond, beyond[0], atol=1e-9, err_msg=metric)
            total = sum_of(with_all, metric)
            assert scores.scores[metric].sum() == pytest.approx(total)

    @pytest.mark.parametrize("distance", ["euclidean", "cosine"])
    def test_leave_one_out(self, rng, distance):
        x, y = draw(rng)
        words = {"metrics": OF_ROWS, "distance": distance}
        scores = retrieval.class_scores(x, y, **words)
        without = [retrieval_metrics(x[y != c], y[y != c], **words) for c in range(30)]
        self.left_out(scores, OF_ROWS, retrieval_metrics(x, y, **words), without)
        assert len(set(np.round(scores.scores["recall@1"] % 1, 6))) == 1
        counted = np.bincount(y)
        np.testing.assert_array_equal(scores.sizes, np.where(counted > 1, counted, 0))

    def test_gallery_and_groups(self, rng):
        x, y = draw(rng, sizes=np.full(30, 6))
        group = np.arange(len(y)) % 3
        asked = group == 0

        def figures(kept):
            q, g = asked & kept, kept
            return retrieval_metrics(
                *(x[q], y[q]),
                gallery=x[g] + 0,
                gallery_labels=y[g],
                groups=group[q],
                gallery_groups=group[g],
                metrics=OF_ROWS,
            )

        scores = retrieval.class_scores(
            *(x[asked], y[asked], x + 0, y),
            groups=group[asked],
            gallery_groups=group,
            metrics=OF_ROWS,
            distance="euclidean",
        )
        without = [figures(y != c) for c in range(30)]
        self.left_out(scores, OF_ROWS, figures(y >= 0), without)

    def test_classes_of_the_gallery_alone_are_no_classes(self, rng):
        x, y = draw(rng, sizes=np.full(30, 4))
        asked = y < 10
        scores = retrieval.class_scores(
            *(x[asked], y[asked], x + 1e-3, y),
            metrics=OF_ROWS,
            distance="euclidean",
        )
        assert scores.sizes.tolist() == [4] * 10

    def test_first_rank_and_whole_ranking(self, rng):
        x, y = draw(rng, sizes=np.full(30, 4))
        words = {"metrics": ("mrr", "map", "minp"), "distance": "euclidean"}
        scores = retrieval.class_scores(x, y, **words)
        # All ranks are among the neighbours that are looked at, or nearly all.
        without = [retrieval_metrics(x[y != c], y[y != c], **words) for c in range(30)]
        all_of_them = retrieval_metrics(x, y, **words)
        lost = [sum_of(all_of_them, "mrr") - sum_of(one, "mrr") for one in without]
        beyond = scores.scores["mrr"] - lost
        assert np.ptp(beyond) < 0.02 < np.ptp(lost)
        for metric in ("map", "minp"):
            total = scores.scores[metric].sum()
            assert total == pytest.approx(sum_of(all_of_them, metric))


def weighted_figures(x, y, weights):
    """The figures of pairs by loops over thresholds; each class has a weight."""
    i, j = np.triu_indices(len(y), 1)
    d = np.sqrt(((np.float64(x)[i] - x[j]) ** 2).sum(axis=1))
    same = y[i] == y[j]
    weight = np.where(same, weights[y[i]], weights[y[i]] * weights[y[j]])
    order = np.argsort(d)
    s = np.cumsum(np.where(same, weight, 0)[order])
    d = np.cumsum(np.where(same, 0, weight)[order])
    tar, far = np.append(0, s / s[-1]), np.append(0, d / d[-1])
    return {
        "auc": (np.diff(far) * (tar[1:] + tar[:-1]) / 2).sum(),
        "eer": np.interp(0, far + tar - 1, far),
        "tar@0.1": np.interp(0.1, far, tar),
        "tar@0.01": np.interp(0.01, far, tar),
        "accuracy": ((s + d[-1] - d) / (s[-1] + d[-1])).max(),
        "f1": (2 * s / (s + d + s[-1])).max(),
    }


class TestScoresOfPairs:
    def test_is_the_slope_by_the_weight_of_a_class(self, rng):
        x, y = draw(rng, 40, spread=2.0, sizes=rng.integers(4, 9, 40))
        scores = verification.class_scores(x, y, metrics=OF_PAIRS)
        # The ROC is a staircase: where a threshold moves with the weights, the step is
        # large, and the slope is rough.
        steps = {metric: 0.3 if metric in ROUGH else 0.01 for metric in OF_PAIRS}
        slopes = {metric: [] for metric in OF_PAIRS}
        for c in range(40):
            own = np.arange(40) == c
            by_step = {
                step: [weighted_figures(x, y, 1 + s * own) for s in (step, -step)]
                for step in set(steps.values())
            }
            for metric, step in steps.items():
                more, less = by_step[step]
                slopes[metric].append((more[metric] - less[metric]) / (2 * step))
        figures = verification_metrics(x, y, metrics=OF_PAIRS)
        for metric in OF_PAIRS:
            slope = np.array(slopes[metric]) - np.mean(slopes[metric])
            shares = scores.shares(metric)
            close = 0.9 if metric in ROUGH else 0.999
            assert np.corrcoef(slope, shares)[0, 1] > close, metric
            assert np.std(shares) == pytest.approx(np.std(slope), rel=0.3), metric
            total = scores.scores[metric].sum() / scores.sizes.sum()
            assert total == pytest.approx(figures[metric]), metric

    def test_resampled_classes(self, rng):
        x, y = draw(rng, 60, spread=2.0)
        scores = verification.class_scores(x, y, metrics=("auc", "f1", "tar@0.1"))
        drawn, expected = [], []
        for _ in range(40):
            weights = rng.multinomial(60, np.full(60, 1 / 60)).astype(float)
            figures = weighted_figures(x, y, weights)
            expected.append([figures[metric] for metric in scores.scores])
            drawn.append([weights @ scores.shares(m) for m in scores.scores])
        for ours, loops in zip(
            np.transpose(drawn), np.transpose(expected), strict=True
        ):
            assert np.corrcoef(ours, loops)[0, 1] > 0.93
            assert np.std(ours) == pytest.approx(np.std(loops), rel=0.2)

    @pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine"])
    def test_a_list_of_all_pairs_gives_the_same(self, rng, distance):
        x, y = draw(rng)
        pairs = np.stack(np.triu_indices(len(y), 1), axis=1)
        words = {"metrics": OF_PAIRS, "distance": distance}
        first = verification.class_scores(x, y, **words)
        second = verification.class_scores(x, y, pairs=pairs, **words)
        np.testing.assert_array_equal(first.sizes, second.sizes)
        for metric in OF_PAIRS:
            one, other = first.shares(metric), second.shares(metric)
            np.testing.assert_allclose(one, other, atol=2e-4, err_msg=metric)

    def test_classes_without_a_pair_do_not_count(self, rng):
        x, y = draw(rng, sizes=np.full(30, 3))
        pairs = np.stack(np.triu_indices(60, 1), axis=1)  # of the first 20 classes
        scores = verification.class_scores(x, y, pairs=pairs, metrics="auc")
        assert scores.sizes.tolist() == [3] * 20


def of_classes(scores, sizes, keys=(), shared=()):
    keys, shared = np.array(keys, int), np.array(shared, float)
    return ClassScores({"recall@1": scores}, sizes, keys, {"recall@1": shared})


class TestEnds:
    @pytest.mark.parametrize(
        ("freedom", "t"),
        [(1, 12.706205), (2.5, 3.574655), (9, 2.262157), (30, 2.042272)],
    )
    def test_student(self, freedom, t):
        values, below = t_distribution(freedom)
        assert np.interp(0.975, below, values) == pytest.approx(t, rel=1e-5)
        assert np.interp(-t, values, below) == pytest.approx(0.025, rel=1e-5)
        assert np.interp(0.0, values, below) == pytest.approx(0.5, abs=1e-6)

    def test_many_classes_are_normal(self):
        values, below = t_distribution(1e7)
        assert np.interp(0.975, below, values) == pytest.approx(1.95996, abs=1e-3)

    def test_by_hand(self):
        # 25 classes of 4 and 25 of 2; half of them right: 75 of 150.
        sizes = np.repeat([4, 2], 25)
        right = np.tile([1.0, 0.0], 25)
        scores = of_classes(right * sizes, sizes)
        figure = (right * sizes).sum() / 150
        error = np.sqrt(50 / 49 * (((right - figure) * sizes / 150) ** 2).sum())
        assert scores.standard_error("recall@1") == pytest.approx(error)
        classes = 150**2 / (25 * 16 + 25 * 4)  # 45 classes of equal size
        assert scores.freedom == classes - 1 == 44
        ends = with_intervals({"recall@1": figure}, scores, 0.95)
        step = 2.0153676 * error / (figure * (1 - figure))
        low, high = (
            1 / (1 + np.exp(-(np.log(figure / (1 - figure)) + s)))
            for s in (-step, step)
        )
        assert list(ends) == ["recall@1", "recall@1_low", "recall@1_high"]
        assert ends["recall@1_low"] == pytest.approx(low, rel=1e-5)
        assert ends["recall@1_high"] == pytest.approx(high, rel=1e-5)

    def test_what_two_classes_share_counts_once(self):
        # Classes 0 and 1 take a hit from each other, and 2 and 3 two hits.
        scores, sizes = np.array([1.0, 1.0, 0.0, 0.0, 2.0]), np.full(5, 2)
        alone = of_classes(scores, sizes)
        apart = of_classes(scores, sizes, [0 * 5 + 1, 2 * 5 + 3], [-1.0, -2.0])
        squares = 5 / 4 * ((scores - 0.8) ** 2).sum()
        assert alone.standard_error("recall@1") == pytest.approx(squares**0.5 / 10)
        assert squares - 1 - 4 < squares / 2  # no more than a half is taken off
        half = (squares / 2) ** 0.5 / 10
        assert apart.standard_error("recall@1") == pytest.approx(half)
        apart = of_classes(scores, sizes, [0 * 5 + 1], [-1.0])
        assert apart.standard_error("recall@1") == pytest.approx(
            (squares - 1) ** 0.5 / 10
        )
        assert alone.minus(apart, "recall@1").shared["recall@1"].tolist() == [1.0]
        assert apart.minus(apart, "recall@1").shared["recall@1"].tolist() == [0.0]

    def test_all_right_and_all_wrong(self):
        right = of_classes(np.full(50, 3.0), np.full(50, 3))
        ends = with_intervals({"recall@1": 1.0}, right, 0.95)
        assert ends["recall@1_high"] == 1.0
        assert ends["recall@1_low"] == pytest.approx(1 / (1 + 2.009575**2 / 50))
        wrong = of_classes(np.zeros(50), np.full(50, 3))
        ends = with_intervals({"recall@1": 0.0}, wrong, 0.95)
        assert ends["recall@1_low"] == 0.0
        assert ends["recall@1_high"] == pytest.approx(1 - 1 / (1 + 2.009575**2 / 50))

    def test_narrower_and_wider(self, rng):
        x, y = draw(rng, 60)
        ends = [
            retrieval_metrics(x, y, interval=level)["map@r_low"]
            for level in (0.5, 0.9, 0.99)
        ]
        assert ends == sorted(ends, reverse=True)

    def test_every_figure_has_its_ends(self, rng):
        x, y = draw(rng, 60, sizes=np.full(60, 4))
        for function in (retrieval_metrics, verification_metrics):
            alone, whole = function(x, y), function(x, y, interval=0.95)
            assert {key: whole[key] for key in alone} == alone
            for key, figure in alone.items():
                if isinstance(figure, float):
                    low, high = whole[f"{key}_low"], whole[f"{key}_high"]
                    assert 0 <= low <= figure <= high <= 1, key
                    assert low < high or key == "accuracy"  # accepts no pair
            extra = len(whole) - len(alone)
            assert extra == 2 * sum(isinstance(f, float) for f in alone.values())

    def test_clusterings_have_none(self, rng):
        x, y = draw(rng, 40, sizes=np.full(40, 4))
        figures = retrieval_metrics(x, y, metrics=("nmi", "recall@1"), interval=0.9)
        assert [key for key in figures if key.startswith("nmi")] == ["nmi"]
        assert "recall@1_low" in figures


class TestRefused:
    @pytest.mark.parametrize("level", [0.0, 1.0, 95, -1, float("nan")])
    @pytest.mark.parametrize("function", [retrieval_metrics, verification_metrics])
    def test_level(self, rng, function, level):
        x, y = draw(rng)
        with pytest.raises(ValueError, match="interval"):
            function(x, y, interval=level)

    def test_one_class(self, rng):
        x = rng.normal(size=(5, 2))
        assert retrieval_metrics(x, np.zeros(5, int))["recall@1"] == 1.0
        with pytest.raises(ValueError, match="at least two classes"):
            retrieval_metrics(x, np.zeros(5, int), interval=0.95)
        with pytest.raises(ValueError, match="1 with two rows or more"):
            retrieval_metrics(x, [0, 0, 1, 2, 3], interval=0.95)

    def test_pairs_without_labels(self, rng):
        x = rng.normal(size=(4, 2))
        words = {"pairs": [[0, 1], [0, 2]], "is_same": [True, False]}
        verification_metrics(x, **words)
        with pytest.raises(ValueError, match="which pairs share a class"):
            verification_metrics(x, **words, interval=0.95)

    def test_few_classes(self, rng):
        x, y = draw(rng, 12, sizes=np.full(12, 4))
        for function in (retrieval_metrics, verification_metrics):
            with pytest.warns(UserWarning, match=r"12 classes.* worth 12\.0 classes"):
                function(x, y, interval=0.95)
        # Thirty classes, nearly all rows of two of them
        x, y = draw(rng, 30, sizes=np.array([100, 100, *[2] * 28]))
        with pytest.warns(UserWarning, match="30 classes"):
            retrieval_metrics(x, y, interval=0.95)
        x, y = draw(rng, 30, sizes=np.full(30, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            retrieval_metrics(x, y, interval=0.95)


def benchmark():
    path = ROOT / "examples" / "benchmarks" / "intervals.py"
    spec = importlib.util.spec_from_file_location("intervals_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestCoverage:
    def test_queries_are_no_independent_trials(self):
        """The interval holds the truth; one that counts queries does so seldom."""
        rng, found = np.random.default_rng(5), []
        for _ in range(80):
            y = np.repeat(np.arange(40), 12)
            own = np.exp(0.8 * rng.normal(size=40))[y, None]
            x = 2.5 * rng.normal(size=(40, 4))[y] + own * rng.normal(size=(480, 4))
            found.append(retrieval_metrics(x, y, metrics="recall@1", interval=0.95))
        figures, low, high = (
            np.array([one[f"recall@1{end}"] for one in found])
            for end in ("", "_low", "_high")
        )
        truth = figures.mean()
        by_class = ((low <= truth) & (truth <= high)).mean()
        reach = 1.96 * np.sqrt(figures * (1 - figures) / 480)
        by_query = (abs(figures - truth) <= reach).mean()
        assert 0.9 <= by_class <= 0.99
        assert by_query < 0.75

    @pytest.mark.slow
    def test_four_populations(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            table = list(benchmark().coverage(400))
        assert len(table) == 16
        for name, metric, row in table:
            # Measured: 89 to 97 %, of 100 sets where classes are many.
            assert 0.87 <= row["kerastrip"] <= 0.99, (name, metric, row)
        mean = np.mean([row["kerastrip"] for _, _, row in table])
        assert 0.935 <= mean <= 0.97
