"""Two models on the same rows: is one of them better, or is the difference noise?"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from typing import Any

import numpy as np

from kerastrip import _checks
from kerastrip._labels import LabelTable
from kerastrip.evaluation import retrieval, verification
from kerastrip.evaluation.intervals import (
    ClassScores,
    check_classes,
    check_interval,
    few_classes_warning,
    t_distribution,
)

__all__ = ["Comparison", "Difference", "compare"]

_NOTHING = 1e-12  # rounding


@dataclasses.dataclass(frozen=True)
class Difference:
    """What one figure is for two models.

    Attributes:
        a: the figure of the first model.
        b: the figure of the second model.
        difference: b - a.
        low: lower end of the interval of the difference.
        high: upper end of the interval of the difference.
        p_value: probability of a difference at least as large, up or down, in classes
            on which the two models are equally good.
        by_class: (classes,) what each class adds to the difference: the sum of all is
            the difference.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    p_value: float
    by_class: np.ndarray = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The figures of two models on the same rows; a table when printed or in a notebook.

    Attributes:
        figures: a `Difference` for each metric word.
        classes: (classes,) the labels, in the order of `Difference.by_class`.
        interval: the level of the intervals.
    """

    figures: dict[str, Difference]
    classes: np.ndarray = dataclasses.field(repr=False, compare=False)
    interval: float

    def __getitem__(self, metric: str) -> Difference:
        """The `Difference` of a metric word."""
        return self.figures[metric]

    def gained(self, metric: str, count: int = 3) -> list[tuple[Any, float]]:
        """The classes that add most to the difference: label and what it adds.

        Args:
            metric: a metric word.
            count: how many at most. Classes that add nothing are left out.
        """
        return self._ends(metric, count, 1)

    def lost(self, metric: str, count: int = 3) -> list[tuple[Any, float]]:
        """The classes that take most from the difference: label and what it adds.

        Args:
            metric: a metric word.
            count: how many at most. Classes that take nothing are left out.
        """
        return self._ends(metric, count, -1)

    def _ends(self, metric: str, count: int, sign: int) -> list[tuple[Any, float]]:
        added = self.figures[metric].by_class
        order = np.argsort(-sign * added, kind="stable")[:count]
        labels = self.classes.tolist()
        return [(labels[i], float(added[i])) for i in order if sign * added[i] > 0]

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(row[0]) for row in rows) + 2
        lines = [
            row[0].ljust(width)
            + f"{row[1]:>8}{row[2]:>8}{row[3]:>9}{row[4]:>20}{row[5]:>9}"
            for row in rows
        ]
        return "\n".join([*lines, *self._changes()])

    def _repr_html_(self) -> str:
        rows = (
            "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            for row in self._rows()
        )
        table = "".join(f"<tr>{row}</tr>" for row in rows)
        changes = "<br>".join(html.escape(line) for line in self._changes())
        return f"<table>{table}</table><p>{changes}</p>"

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            ("", "a", "b", "b - a", f"{self.interval:.4g} interval", "p")
        ]
        for metric, one in self.figures.items():
            ends = f"{one.low:+.4f} {one.high:+.4f}"
            p = f"{one.p_value:.4f}" if one.p_value >= 1e-4 else "<0.0001"
            rows.append(
                (
                    metric,
                    f"{one.a:.4f}",
                    f"{one.b:.4f}",
                    f"{one.difference:+.4f}",
                    ends,
                    p,
                )
            )
        return rows

    def _changes(self) -> list[str]:
        """Lines that name the classes of the largest changes of the first figure."""
        metric = next(iter(self.figures))
        lines = []
        for words, changes in (
            ("gained", self.gained(metric)),
            ("lost", self.lost(metric)),
        ):
            told = ", ".join(f"{label} ({added:+.4f})" for label, added in changes)
            lines.append(f"{metric} {words} most in: {told or 'no class'}")
        return lines


def compare(
    a: Any,
    b: Any,
    labels: Any,
    *,
    gallery: tuple[Any, Any] | None = None,
    gallery_labels: Any = None,
    groups: Any = None,
    gallery_groups: Any = None,
    metrics: Sequence[str] = ("recall@1", "map@r"),
    distance: Any = "euclidean",
    interval: float = 0.95,
    verbose: bool = False,
) -> Comparison:
    """Compares two models by their embeddings of the same rows, paired by class.

    Two models meet the same difficult classes, so that their figures go up and down
    together: the difference is much surer than each of them. It is a sum over the
    classes, b's score less a's, and with the standard error e of that sum over classes

        b - a -+ t e,       p = P(|T| >= |b - a| / e),

    where T has Student's distribution for the effective number of classes less 1, and t
    is its quantile. So p < 0.05 if and only if the interval of 0.95 leaves out 0. With
    several figures, or several models, the smallest of many p-values is small by chance:
    say beforehand which figure decides.

    The test says whether the two *embeddings* differ on other classes. Trained again
    with another seed, both models would be others.

    Args:
        a: (n, dim) embeddings of the first model.
        b: (n, other dim) embeddings of the same rows by the second model.
        labels: (n,) integers or strings, or (n, classes) one-hot rows.
        gallery: (embeddings by the first model, embeddings by the second model) to
            search in. Default: `a` and `b`, each row without itself.
        gallery_labels: labels of both galleries.
        groups, gallery_groups: as for `retrieval_metrics`.
        metrics: metric words of `retrieval_metrics` but `nmi` and `ami`, and of
            `verification_metrics` (all pairs; without a gallery).
        distance: a word for both, or two words; as for `retrieval_metrics`.
        interval: the level of the intervals, between 0 and 1. Default 0.95.
        verbose: as for `retrieval_metrics`.

    Returns:
        A `Comparison`.

    Raises:
        TypeError, ValueError: if the arrays do not fit each other, or there is only
            one class.

    Example:

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(np.arange(40), 5)
    >>> a = rng.normal(size=(40, 3))[labels] + 0.3 * rng.normal(size=(200, 3))
    >>> b = np.hstack([a, rng.normal(size=(40, 1))[labels]])  # knows one thing more
    >>> result = compare(a, b, labels, metrics=("recall@1", "auc"))
    >>> print(result)
                     a       b    b - a       0.95 interval        p
    recall@1    0.5200  0.8800  +0.3600     +0.2645 +0.4555  <0.0001
    auc         0.9588  0.9888  +0.0300     +0.0169 +0.0431  <0.0001
    recall@1 gained most in: 37 (+0.0369), 18 (+0.0319), 35 (+0.0319)
    recall@1 lost most in: 3 (-0.0081), 6 (-0.0031), 8 (-0.0031)
    >>> round(result["recall@1"].difference, 3)
    0.36

    References:
        Field, Welsh, "Bootstrapping Clustered Data", 2007 (the cluster as the unit).

        Cameron, Gelbach, Miller, "Bootstrap-Based Improvements for Inference with
        Clustered Errors", 2008.
    """
    level = check_interval(interval)
    if level is None:
        raise _checks.type_error("interval", "a number between 0 and 1", interval)
    if np.shape(a)[:1] != np.shape(b)[:1]:
        expected = f"the {np.shape(a)[0] if np.ndim(a) else 0} rows of `a`"
        raise _checks.value_error("b", expected, np.asarray(b))
    searched = _pair("gallery", gallery, (None, None))
    distances = _pair("distance", distance, (distance, distance))
    words = {
        "groups": groups,
        "gallery_labels": gallery_labels,
        "gallery_groups": gallery_groups,
        "verbose": verbose,
    }
    first, second = (
        _scores(side, labels, metrics, gallery=rows, distance=word, **words)
        for side, rows, word in zip((a, b), searched, distances, strict=True)
    )
    scores = next(iter(first.values()))
    check_classes(scores)
    if few := few_classes_warning(scores):
        _checks.warn(few)
    figures = {m: _difference(first[m], second[m], m, level) for m in first}
    table = LabelTable(labels)
    return Comparison(figures, table.classes[np.unique(table.codes)], level)


def _pair(name: str, value: Any, otherwise: tuple[Any, Any]) -> tuple[Any, Any]:
    """Two values, one for each model."""
    if value is None or isinstance(value, str):
        return otherwise
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise _checks.type_error(name, "a tuple of two, for `a` and for `b`", value)
    return value[0], value[1]


def _scores(
    embeddings: Any, labels: Any, metrics: Sequence[str], **words: Any
) -> dict[str, ClassScores]:
    """The scores of the classes for each metric word."""
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    of_pairs = [metric for metric in metrics if _is_of_pairs(metric)]
    others = [metric for metric in metrics if not _is_of_pairs(metric)]
    scores: dict[str, ClassScores] = {}
    if others or not of_pairs:
        for metric in retrieval.check_metrics(others):
            if metric in retrieval.CLUSTERING:
                expected = "metric words that are sums over classes"
                raise _checks.value_error("metrics", expected, metric)
        found = retrieval.class_scores(embeddings, labels, metrics=others, **words)
        scores |= dict.fromkeys(others, found)
    if of_pairs:
        for name in ("gallery", "groups"):
            if words[name] is not None:
                advice = f"{of_pairs[0]!r} is a metric of all pairs of the rows."
                raise _checks.value_error(name, "None", words[name], advice)
        found = verification.class_scores(
            embeddings,
            labels,
            metrics=of_pairs,
            distance=words["distance"],
            verbose=words["verbose"],
        )
        scores |= dict.fromkeys(of_pairs, found)
    return {metric: scores[metric] for metric in metrics}


def _is_of_pairs(metric: Any) -> bool:
    """Whether a metric word is one of `verification_metrics`."""
    return isinstance(metric, str) and (
        metric in verification.METRICS or metric.startswith("tar@")
    )


def _difference(
    a: ClassScores, b: ClassScores, metric: str, level: float
) -> Difference:
    """The difference of one figure."""
    both = b.minus(a, metric)
    added = both.scores[metric] / both.sizes.sum()
    difference, error = float(added.sum()), both.standard_error(metric)
    values, below = t_distribution(both.freedom)
    reach = float(np.interp((1 + level) / 2, below, values)) * error
    if error > _NOTHING:
        p_value = 2 * float(np.interp(-abs(difference) / error, values, below))
    else:
        # All classes agree: as likely as heads only, or tails only, from so many coins.
        p_value = 1.0 if abs(difference) <= _NOTHING else 2.0**-both.freedom
    first, second = (
        float(each.scores[metric].sum() / each.sizes.sum()) for each in (a, b)
    )
    ends = max(difference - reach, -1.0), min(difference + reach, 1.0)
    return Difference(first, second, difference, *ends, p_value, added)
