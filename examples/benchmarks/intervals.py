"""How often nominal 95 % intervals hold the truth, and how often equal models differ.

    python examples/benchmarks/intervals.py [--sets 500] [--only coverage]

Sets of classes are drawn from populations that are known. The truth is the mean of four
sets of 3,000 classes for pairs, and for retrieval, where a figure depends on the number of
classes, the mean over all sets. Beside the interval of kerastrip stand bootstraps over
classes: percentile, basic, BCa and studentised, each of 1,000 resamples.
"""

import argparse
import os
import statistics
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from kerastrip.evaluation import compare, retrieval_metrics, verification_metrics
from kerastrip.evaluation.intervals import with_intervals
from kerastrip.evaluation.retrieval import class_scores as retrieval_scores
from kerastrip.evaluation.verification import class_scores as pair_scores

# Classes, whether their sizes are 3 to 10 by Zipf's law or all 6, distance of the centres.
POPULATIONS = {
    "40 classes, even, near": (40, False, 1.3),
    "40 classes, Zipf, far": (40, True, 2.2),
    "300 classes, even, far": (300, False, 2.6),
    "300 classes, Zipf, near": (300, True, 1.5),
}
OF_ROWS, OF_PAIRS = ("recall@1", "map@r"), ("auc", "tar@0.01")
RESAMPLES, LEVEL = 1000, 0.95


def draw(rng, classes, zipf, spread):
    """Embeddings and labels of new classes, whose own spread differs, too."""
    sizes = np.full(classes, 6)
    if zipf:
        chance = 1.0 / np.arange(1, 9)
        sizes = rng.choice(np.arange(3, 11), size=classes, p=chance / chance.sum())
    labels = np.repeat(np.arange(classes), sizes)
    own = np.exp(0.3 * rng.normal(size=classes))
    x = spread * rng.normal(size=(classes, 8))[labels]
    x += own[labels, None] * rng.normal(size=(len(labels), 8))
    return x.astype("float32"), labels


def bootstraps(scores, metric, rng):
    """The ends by four bootstraps over classes, from the scores of the classes."""
    s, n = scores.scores[metric], scores.sizes
    count = len(s)
    figure = s.sum() / n.sum()
    weights = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    drawn = (weights @ s) / (weights @ n)
    squares = weights @ s**2 - 2 * drawn * (weights @ (s * n))
    squares += drawn**2 * (weights @ n**2)
    errors = np.sqrt(np.maximum(squares, 0) * count / (count - 1)) / (weights @ n)
    q = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    percentile = np.quantile(drawn, q)
    usable = errors > 1e-9
    t = np.quantile((drawn[usable] - figure) / errors[usable], q[::-1])
    shares = scores.shares(metric)
    bend = (shares**3).sum() / (6 * (shares**2).sum() ** 1.5)
    normal = statistics.NormalDist()
    bias = normal.inv_cdf(np.clip((drawn < figure).mean(), 0.001, 0.999))
    z = bias + np.array([normal.inv_cdf(one) for one in q])
    accelerated = [normal.cdf(bias + one / (1 - bend * one)) for one in z]
    return {
        "percentile": percentile,
        "basic": 2 * figure - percentile[::-1],
        "BCa": np.quantile(drawn, accelerated),
        "studentised": figure - t * scores.standard_error(metric),
    }


def coverage(sets, seed=0):
    """Yields population, metric, and the share of sets whose interval holds, by method.

    Of the large populations a quarter of the sets is drawn.
    """
    for number, (name, arguments) in enumerate(POPULATIONS.items()):
        rng = np.random.default_rng([seed, number])
        large = [
            verification_metrics(*draw(rng, 3000, *arguments[1:]), metrics=OF_PAIRS)
            for _ in range(4)
        ]
        truth = {m: statistics.mean(one[m] for one in large) for m in OF_PAIRS}
        found, ends = {}, {}
        for _ in range(sets if arguments[0] < 100 else sets // 4):
            x, labels = draw(rng, *arguments)
            for metrics, function in (
                (OF_ROWS, retrieval_scores),
                (OF_PAIRS, pair_scores),
            ):
                scores = function(x, labels, metrics=metrics, distance="euclidean")
                total = scores.sizes.sum()
                figures = {m: float(scores.scores[m].sum() / total) for m in metrics}
                whole = with_intervals(figures, scores, LEVEL)
                for m in metrics:
                    found.setdefault(m, []).append(figures[m])
                    both = bootstraps(scores, m, rng)
                    both["kerastrip"] = whole[f"{m}_low"], whole[f"{m}_high"]
                    ends.setdefault(m, []).append(both)
        for m in (*OF_ROWS, *OF_PAIRS):
            true = truth[m] if m in OF_PAIRS else np.mean(found[m])
            shares = {
                method: np.mean(
                    [one[method][0] <= true <= one[method][1] for one in ends[m]]
                )
                for method in ends[m][0]
            }
            yield name, m, {"truth": true} | shares


def rejected(runs, seed=0):
    """The share of comparisons of two equal models with p < 0.05, by metric."""
    rng = np.random.default_rng(seed)
    low = dict.fromkeys((*OF_ROWS, *OF_PAIRS), 0)
    for _ in range(runs):
        centres, labels = draw(rng, 100, True, 1.5)
        a, b = (centres + rng.normal(size=centres.shape) for _ in range(2))
        result = compare(a, b, labels, metrics=tuple(low))
        for metric in low:
            low[metric] += result[metric].p_value < 0.05
    return {metric: count / runs for metric, count in low.items()}


def times(rows=10_000, dim=64):
    """Seconds of the figures alone and with intervals, in turns."""
    for size in (4, 20, 100):
        rng = np.random.default_rng(0)
        labels = np.repeat(np.arange(rows // size), size)
        x = rng.normal(size=(rows // size, dim))[labels] + 1.3 * rng.normal(
            size=(rows, dim)
        )
        for function in (retrieval_metrics, verification_metrics):
            seconds = []
            for interval in (None, 0.95):
                start = time.perf_counter()
                function(x, labels, interval=interval)
                seconds.append(time.perf_counter() - start)
            told = "{:.1f} s alone, {:.1f} s with intervals".format(*seconds)
            print(f"{rows} rows, {size} of a class, {function.__name__}: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=500)
    parser.add_argument("--only", choices=("coverage", "tests", "times"))
    args = parser.parse_args()
    if args.only in (None, "coverage"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # few classes
            methods = "percentile | basic | BCa | studentised | kerastrip"
            print(f"| population | | truth | {methods} |\n" + "|---" * 8 + "|")
            for name, metric, row in coverage(args.sets):
                truth, *shares = row.values()
                cells = [f"{truth:.3f}", *(f"{100 * share:.1f}" for share in shares)]
                print(f"| {name} | {metric} | {' | '.join(cells)} |", flush=True)
    if args.only in (None, "tests"):
        print("equal models rejected:", rejected(args.sets))
    if args.only in (None, "times"):
        times()


if __name__ == "__main__":
    main()
