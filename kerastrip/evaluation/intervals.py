"""Intervals of figures that are sums over classes: what other classes would change.

The queries of one class are no independent trials, and neither are pairs of rows. The
classes are: so every figure is written as a sum over classes, and how much the classes
differ says how sure the figure is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kerastrip import _checks

__all__ = [
    "FEW_CLASSES",
    "ClassScores",
    "check_classes",
    "check_interval",
    "effective_number",
    "few_classes_warning",
    "t_distribution",
    "with_intervals",
]

# With fewer classes of equal size a warning says that the ends are rough.
FEW_CLASSES = 20


class ClassScores(NamedTuple):
    """Figures as sums over classes: figure = sum of scores / sum of sizes.

    Attributes:
        scores: (classes,) for each metric word.
        sizes: (classes,) the queries or the same pairs of each class; some may be 0.
        keys: (p,) pairs of classes i < j as i * classes + j, ascending.
        shared: (p,) for each metric word, what is in the scores of both classes of a
            pair: a hit of class i that class j prevents.
    """

    scores: dict[str, np.ndarray]
    sizes: np.ndarray
    keys: np.ndarray
    shared: dict[str, np.ndarray]

    @property
    def freedom(self) -> float:
        """The effective number of classes less 1, at least 1."""
        return max(effective_number(self.sizes) - 1.0, 1.0)

    def shares(self, metric: str) -> np.ndarray:
        """(classes,) what each class adds to a figure, in the mean nothing.

        A class of the size n and the score s adds (s - figure n) / (sum of n).
        """
        scores = self.scores[metric]
        total = self.sizes.sum()
        return (scores - scores.sum() / total * self.sizes) / total

    def standard_error(self, metric: str) -> float:
        """The standard error of a figure over sets of as many other classes.

        The squares of the shares of all classes are added up. What two classes share is
        in two shares, but comes about once, so that one of its two squares is taken off
        again: of the sum at most a half, which is there if all is shared.
        """
        shares = self.shares(metric)
        count, total = len(shares), self.sizes.sum()
        squares = count / (count - 1) * (shares**2).sum()
        twice = (self.shared[metric] / total) ** 2
        return float(np.sqrt(max(squares - twice.sum(), squares / 2)))

    def minus(self, others: ClassScores, metric: str) -> ClassScores:
        """The difference of a figure, of the same classes."""
        keys = np.concatenate([self.keys, others.keys])
        keys, at = np.unique(keys, return_inverse=True)
        shared = np.concatenate([self.shared[metric], -others.shared[metric]])
        shared = np.bincount(at, shared, len(keys))
        difference = self.scores[metric] - others.scores[metric]
        return ClassScores({metric: difference}, self.sizes, keys, {metric: shared})


def effective_number(sizes: np.ndarray) -> float:
    """How many classes of equal size would tell as much as classes of the sizes n.

    This is (sum n)^2 / sum n^2 (Kish, "Survey Sampling", 1965).
    """
    sizes = sizes.astype(np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def check_interval(value: Any) -> float | None:
    """None, or the level of the intervals, between 0 and 1."""
    if value is None:
        return None
    return _checks.number("interval", value, above=0.0, below=1.0)


def with_intervals(
    figures: dict[str, float], scores: ClassScores, level: float
) -> dict[str, float]:
    """The figures, each followed by the ends of its interval, "..._low" and "..._high".

    With the standard error e of the figure f over classes, and t the quantile of
    Student's distribution for the effective number of classes less 1, the ends are

        logit(f) -+ t e / (f (1 - f)),    logit(f) = log(f / (1 - f)),

    taken back by the inverse of the logit, so that they lie between 0 and 1. A figure
    of exactly 0 or 1 has e = 0, which tells nothing: it gets Wilson's interval for as
    many trials as there are effective classes, for 1 that from 1 / (1 + t^2 / classes).

    Nothing is drawn, so there is no seed. Where classes are few or figures near 1, the
    percentile, basic and BCa bootstraps over classes hold the truth of `auc` less often,
    and the studentised one hardly more often (examples/benchmarks/intervals.py).

    Args:
        figures: from metric words. Figures without scores stay alone.
        scores: of the same figures.
        level: between 0 and 1.

    References:
        Cameron, Gelbach, Miller, "Bootstrap-Based Improvements for Inference with
        Clustered Errors", 2008 (what few clusters do to intervals).

        Aronow, Samii, Assenova, "Cluster-Robust Variance Estimation for Dyadic Data",
        2015 (what two classes share).

        Efron, "Better Bootstrap Confidence Intervals", 1987 (BCa).

        Efron, Stein, "The Jackknife Estimate of Variance", 1981.
    """
    check_classes(scores)
    results = {}
    values, below = t_distribution(scores.freedom)
    t = float(np.interp((1 + level) / 2, below, values))
    for metric, figure in figures.items():
        results[metric] = figure
        if metric in scores.scores:
            error = scores.standard_error(metric)
            ends = _ends(figure, error, t, scores.freedom + 1)
            for word, end in zip(("low", "high"), ends, strict=True):
                results[f"{metric}_{word}"] = end
    return results


def _ends(figure: float, error: float, t: float, classes: float) -> tuple[float, float]:
    """The ends of the interval of one figure."""
    if not 0.0 < figure < 1.0:
        reach = 1.0 / (1.0 + t**2 / classes)
        return (reach, 1.0) if figure >= 1.0 else (0.0, 1.0 - reach)
    odds = np.log(figure / (1.0 - figure))
    step = t * error / (figure * (1.0 - figure))
    low, high = (
        float(1.0 / (1.0 + np.exp(-np.clip(odds + s, -700, 700))))
        for s in (-step, step)
    )
    return low, high


def check_classes(scores: ClassScores) -> None:
    """An error for one class, of which nobody knows how much classes differ."""
    counted = int((scores.sizes > 0).sum())
    if counted < 2:
        raise _checks.value_error(
            "labels",
            "at least two classes, since an interval tells what other classes would "
            "change",
            _checks.Told(f"{counted} with two rows or more"),
        )


def few_classes_warning(scores: ClassScores) -> str:
    """The warning for intervals that rest on few classes; "" for enough classes."""
    effective = scores.freedom + 1
    if effective >= FEW_CLASSES:
        return ""
    return (
        f"The intervals rest on {(scores.sizes > 0).sum()} classes, whose sizes make "
        f"them worth {effective:.1f} classes of equal size. How much classes differ is "
        f"hardly known from fewer than {FEW_CLASSES}: take the ends as rough, and expect "
        "that they miss the truth more often than they say. More classes help, more "
        "rows of the same classes do not."
    )


def t_distribution(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Student's distribution: values t, ascending, and the probability below each.

    With t = sqrt(freedom) tan(a) the density of the angle a is in proportion to
    cos(a)^(freedom - 1), which is summed on a grid of angles.
    """
    freedom = min(freedom, 1e5)  # from here on it is the normal distribution
    angles = np.linspace(-np.pi / 2, np.pi / 2, 100_002)
    middle = (angles[1:] + angles[:-1]) / 2
    below = np.cumsum(np.cos(middle) ** (freedom - 1))
    return np.sqrt(freedom) * np.tan(angles[1:-1]), below[:-1] / below[-1]
