"""Verification metrics of a set of embeddings: are two samples of the same class?

Two samples are taken for the same if their distance is at most a threshold. NumPy
on the CPU, every pair counted, in blocks of rows.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kerastrip import _checks
from kerastrip.distances import DISTANCES
from kerastrip.evaluation.intervals import (
    ClassScores,
    check_interval,
    few_classes_warning,
    with_intervals,
)
from kerastrip.evaluation.retrieval import label_table
from kerastrip.evaluation.search import (
    Space,
    embeddings_array,
    row_distances,
    unit_rows,
)

__all__ = [
    "METRICS",
    "FoldedAccuracy",
    "OperatingPoint",
    "VerificationCurve",
    "check_codes",
    "check_metrics",
    "class_scores",
    "flags_array",
    "pair_distances",
    "pairs_array",
    "verification_curve",
    "verification_folds",
    "verification_metrics",
]

METRICS = (
    "auc",
    "eer",
    "tar@0.1",
    "tar@0.01",
    "tar@0.001",
    "tar@0.0001",
    "accuracy",
    "f1",
)
# Up to `_SORTED` pairs are sorted, more pairs are counted in a histogram of `_CELLS`
# cells, 2^17 of which lie between one power of two and the next.
_SORTED = 1 << 22
_CELLS, _DROPPED_BITS = 1 << 22, 6
_FLAGS = (numbers.Real, np.bool_)
# Rows of a block that are flattened at a time, so that the copies stay small.
_ROWS = 64


class OperatingPoint(NamedTuple):
    """The decisions that one threshold makes on the pairs.

    Attributes:
        threshold: pairs at a distance of at most this are accepted as the same;
            -inf accepts no pair.
        accuracy: fraction of all pairs that are decided rightly.
        precision: fraction of the accepted pairs that are the same; 0 if no pair is
            accepted.
        recall: fraction of the same pairs that are accepted (TAR).
        f1: harmonic mean of precision and recall.
        far: fraction of the different pairs that are accepted.
    """

    threshold: float
    accuracy: float
    precision: float
    recall: float
    f1: float
    far: float


@dataclasses.dataclass(frozen=True, eq=False)
class VerificationCurve:
    """The accepted pairs at every threshold, and the metrics that follow from them.

    Attributes:
        thresholds: (m,) float64, ascending; the first, -inf, accepts no pair.
        same: (m,) int64, number of same pairs at a distance <= threshold.
        different: (m,) int64, number of different pairs at a distance <= threshold.
    """

    thresholds: np.ndarray
    same: np.ndarray
    different: np.ndarray

    @property
    def tar(self) -> np.ndarray:
        """(m,) true accept rates: the recall of the same pairs."""
        return self.same / self.same[-1]

    @property
    def far(self) -> np.ndarray:
        """(m,) false accept rates among the different pairs."""
        return self.different / self.different[-1]

    @property
    def auc(self) -> float:
        """Area under the ROC, P(d_same < d_different) + P(equal) / 2."""
        tar = self.tar
        return float((np.diff(self.far) * (tar[1:] + tar[:-1])).sum() / 2)

    @property
    def eer(self) -> float:
        """Equal error rate: where FAR = 1 - TAR on the straight lines of the ROC."""
        # FAR + TAR - 1 rises from -1 to 1 and passes 0 between the points i - 1 and i.
        far, excess = self.far, self.far + self.tar - 1.0
        i = int(np.searchsorted(excess, 0.0))
        share = -excess[i - 1] / (excess[i] - excess[i - 1])
        return float(far[i - 1] + share * (far[i] - far[i - 1]))

    def at_far(self, far: float) -> OperatingPoint:
        """The point of the highest recall whose FAR is at most `far`.

        Nothing is interpolated: with fewer than 1 / `far` different pairs the point
        has FAR = 0.
        """
        far = _checks.number("far", far, minimum=0.0, maximum=1.0)
        return self._point(int(np.searchsorted(self.far, far, side="right")) - 1)

    def best(self, criterion: str) -> OperatingPoint:
        """The point of the highest "accuracy" or "f1"; of equal ones the least threshold."""
        if _checks.one_of("criterion", criterion, ("accuracy", "f1")) == "f1":
            # F1 = 2 TP / (TP + FP + all same pairs)
            score = self.same / (self.same + self.different + self.same[-1])
        else:
            # accuracy = (TP + all different pairs - FP) / all pairs
            score = self.same - self.different
        return self._point(int(score.argmax()))

    def figures(self, metrics: Sequence[str] = METRICS) -> dict[str, float]:
        """The dict that `verification_metrics` returns."""
        results: dict[str, float] = {}
        for metric in check_metrics(metrics):
            if metric in ("auc", "eer"):
                results[metric] = getattr(self, metric)
            elif metric in ("accuracy", "f1"):
                results[metric] = getattr(self.best(metric), metric)
            else:
                results[metric] = self.at_far(float(metric.partition("@")[2])).recall
        return {
            **results,
            "same_pairs": int(self.same[-1]),
            "different_pairs": int(self.different[-1]),
        }

    def _point(self, i: int) -> OperatingPoint:
        taken, wrong = int(self.same[i]), int(self.different[i])
        same, different = int(self.same[-1]), int(self.different[-1])
        return OperatingPoint(
            threshold=float(self.thresholds[i]),
            accuracy=(taken + different - wrong) / (same + different),
            precision=taken / max(taken + wrong, 1),
            recall=taken / same,
            f1=2 * taken / (taken + wrong + same),
            far=wrong / different,
        )


def verification_curve(
    embeddings: Any,
    labels: Any = None,
    *,
    pairs: Any = None,
    is_same: Any = None,
    distance: str = "euclidean",
    verbose: bool = False,
) -> VerificationCurve:
    """Counts the accepted pairs of same and different label at every threshold.

    Without `pairs` all n (n - 1) / 2 pairs are counted. Up to four million pairs are
    sorted, and every distance is a threshold. More pairs are counted in a histogram
    whose cells are 2^-18 of the distance wide or less. A threshold is then the upper
    end of a cell, so that every point of the curve is exact; two distances of one cell,
    which float32 hardly tells apart, count as equal.

    Args:
        embeddings: (n, dim) finite numbers.
        labels: (n,) integers or strings, or (n, classes) one-hot rows.
        pairs: (pairs, 2) rows of `embeddings`. Default: all.
        is_same: (pairs,) booleans, in place of `labels`.
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`. The
            arrays do not tell which distance they were trained with: give the distance
            of the loss.
        verbose: whether to show a progress bar over all pairs once it takes over two
            seconds. Default False.

    Returns:
        A `VerificationCurve`.

    Raises:
        TypeError, ValueError: if the arrays do not fit each other, or there is no
            same pair or no different pair.

    Example:

    >>> curve = verification_curve([[0.0], [1.0], [5.0], [7.0]], [0, 0, 1, 1])
    >>> curve.auc, curve.best("accuracy").threshold
    (1.0, 2.0)
    """
    _checks.one_of("distance", distance, DISTANCES)
    rows = embeddings_array("embeddings", embeddings)
    if (labels is None) == (is_same is None):
        raise _checks.value_error(
            "labels",
            "either `labels`, or `pairs` with `is_same`",
            _checks.Told("neither" if labels is None else "both"),
        )
    if labels is not None:
        codes = label_table("labels", labels, len(rows)).codes
    if pairs is None:
        if labels is None:
            raise _checks.value_error("pairs", "the pairs of `is_same`", pairs)
        check_codes("labels", codes)
        return _curve_of_all(rows, codes, distance, verbose)
    pairs = pairs_array(pairs, len(rows))
    if labels is not None:
        is_same = codes[pairs[:, 0]] == codes[pairs[:, 1]]
    is_same = flags_array(is_same, len(pairs))
    return _curve(pair_distances(rows, pairs, distance=distance), is_same)


def verification_metrics(
    embeddings: Any,
    labels: Any = None,
    *,
    pairs: Any = None,
    is_same: Any = None,
    metrics: Sequence[str] = METRICS,
    distance: str = "euclidean",
    interval: float | None = None,
    verbose: bool = False,
) -> dict[str, float]:
    """How well a threshold on the distance tells same pairs from different pairs.

    | metric word | |
    |---|---|
    | `auc` | area under the ROC: P(d_same < d_different) + P(equal) / 2 |
    | `eer` | equal error rate, where the rate of false accepts equals the rate of false rejects |
    | `tar@f` | fraction of the same pairs that are accepted at the highest threshold that accepts at most a fraction f of the different pairs, 0 < f < 1 |
    | `accuracy`, `f1` | at the threshold where this metric is highest |

    The thresholds, with the precision and recall at each, come from
    `verification_curve(...).best("accuracy")`, `.best("f1")` and `.at_far(f)`.

    With `interval` every figure comes with the interval that it would move in if the
    rows were of as many *other* classes: the pairs of one class, and those that share a
    row, are no independent trials. What a class does to a figure is taken to first
    order; `kerastrip.evaluation.intervals` has the formula.

    Args:
        embeddings: (n, dim) finite numbers.
        labels: (n,) integers or strings, or (n, classes) one-hot rows.
        pairs: (pairs, 2) rows of `embeddings`. Default: all n (n - 1) / 2.
        is_same: (pairs,) booleans, in place of `labels`.
        metrics: metric words of the table. Default: all, f from 0.1 to 0.0001.
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`. The
            arrays do not tell which distance they were trained with: give the distance
            of the loss.
        interval: the level of the intervals of all figures, such as 0.95; needs
            `labels`. Default None: figures alone.
        verbose: as for `verification_curve`.

    Returns:
        Dict with one float in [0, 1] per metric word, with `interval` each followed by
        the ends of its interval as `"auc_low"` and `"auc_high"`, and the counts
        `"same_pairs"` and `"different_pairs"`.

    Raises:
        TypeError, ValueError: as `verification_curve`, and for an unknown metric
            word.

    Example:

    >>> verification_metrics(
    ...     [[0.0], [1.0], [5.0], [7.0]], [0, 0, 1, 1], metrics=("auc", "tar@0.01")
    ... )
    {'auc': 1.0, 'tar@0.01': 1.0, 'same_pairs': 2, 'different_pairs': 4}
    """
    metrics = check_metrics(metrics)
    interval = check_interval(interval)
    if interval is not None and labels is None:
        advice = "Without labels nobody knows which pairs share a class."
        raise _checks.value_error("labels", "labels, for `interval`", labels, advice)
    curve = verification_curve(
        embeddings,
        labels,
        pairs=pairs,
        is_same=is_same,
        distance=distance,
        verbose=verbose,
    )
    figures = curve.figures(metrics)
    if interval is None:
        return figures
    scores = _scores(curve, embeddings, labels, pairs, metrics, distance)
    figures = with_intervals(figures, scores, interval)
    if few := few_classes_warning(scores):
        _checks.warn(few)
    return figures


def class_scores(
    embeddings: Any,
    labels: Any,
    *,
    pairs: Any = None,
    metrics: Sequence[str] = METRICS,
    distance: str = "euclidean",
    verbose: bool = False,
    curve: VerificationCurve | None = None,
) -> ClassScores:
    """The figures of `verification_metrics` as sums over the classes.

    Args:
        embeddings, labels, pairs, metrics, distance, verbose: as for
            `verification_metrics`.
        curve: the curve of the pairs, for who has it already. Default None: it is
            computed here.
    """
    if curve is None:
        curve = verification_curve(
            embeddings, labels, pairs=pairs, distance=distance, verbose=verbose
        )
    return _scores(curve, embeddings, labels, pairs, check_metrics(metrics), distance)


def _scores(
    curve: VerificationCurve,
    embeddings: Any,
    labels: Any,
    pairs: Any,
    metrics: Sequence[str],
    distance: str,
) -> ClassScores:
    """The scores of each class, from its influence on each metric.

    The influence of a class is how fast a metric rises with the weight of the class,
    where a same pair weighs as its class and a different pair as the product of its two
    classes.
    """
    rows = embeddings_array("embeddings", embeddings)
    codes = label_table("labels", labels, len(rows)).codes
    points = [_operating_point(curve, metric) for metric in metrics]
    thresholds = np.array([point.threshold for point in points])
    if pairs is None:
        sums = _sums_of_all(rows, codes, curve, thresholds, distance)
    else:
        ends = pairs_array(pairs, len(rows))
        distances = pair_distances(rows, ends, distance=distance)
        sums = _sums_of_pairs(distances, codes[ends], curve, thresholds)
    sizes = sums.pairs[:, 1]
    scores = {}
    for t, (metric, point) in enumerate(zip(metrics, points, strict=True)):
        influence = _influence(curve, sums, metric, point, sums.within[:, :, t])
        figure = curve.figures(metric)[metric]
        scores[metric] = figure * sizes + sizes.sum() * (influence - influence.mean())
    # Two classes share too little to count: their different pairs are many.
    none = np.empty(0, np.int64)
    return ClassScores(scores, sizes, none, dict.fromkeys(scores, none))


class _Sums(NamedTuple):
    """Sums over the different pairs of each class, then over its same pairs.

    A different pair counts for both of its classes.

    Attributes:
        pairs: (classes, 2) the number of pairs.
        area: (classes, 2) sum over different pairs of the fraction of same pairs that
            are nearer, sum over same pairs of that of different pairs that are farther.
        within: (classes, 2, t) the number of pairs within each of t thresholds.
    """

    pairs: np.ndarray
    area: np.ndarray
    within: np.ndarray


def _influence(
    curve: VerificationCurve,
    sums: _Sums,
    metric: str,
    point: OperatingPoint,
    within: np.ndarray,
) -> np.ndarray:
    """(classes,) the influence of each class on a metric, up to a constant.

    Args:
        curve: of all pairs.
        sums: of the classes.
        metric: the metric word.
        point: the point of the curve that the metric is taken at.
        within: (classes, 2) the different and same pairs within its threshold.
    """
    total = np.array([curve.different[-1], curve.same[-1]])
    figure = curve.figures(metric)[metric]
    if metric == "auc":
        return ((sums.area - figure * sums.pairs) / total).sum(axis=1)
    # The threshold of "accuracy" and "f1" is at their top, where it does not matter
    # that the threshold moves.
    if metric == "accuracy":
        right = within[:, 1] + sums.pairs[:, 0] - within[:, 0]
        return (right - figure * sums.pairs.sum(axis=1)) / total.sum()
    if metric == "f1":  # = 2 accepted same pairs / (accepted pairs + same pairs)
        change = 2 * within[:, 1] - figure * (within.sum(axis=1) + sums.pairs[:, 1])
        return change / (total[1] * (point.recall + 1) + total[0] * point.far)
    rates = np.array([point.far, point.recall])
    far, tar = ((within - rates * sums.pairs) / total).T
    rise = _rise(curve, point.far)
    if metric == "eer":
        # The class moves the ROC by (far, tar), and the point where FAR + TAR = 1 moves
        # along the ROC in return: by x with far + tar + x + rise x = 0.
        return far - (far + tar) / (1 + rise)
    return tar - rise * far  # the ROC moves, and the FAR of the point stays


def _operating_point(curve: VerificationCurve, metric: str) -> OperatingPoint:
    """The point that a metric is taken at; for `auc`, which has none, any point."""
    if metric in ("accuracy", "f1"):
        return curve.best(metric)
    if metric in ("auc", "eer"):
        return curve._point(int(np.searchsorted(curve.far + curve.tar, 1.0)))
    return curve.at_far(float(metric.partition("@")[2]))


def _rise(curve: VerificationCurve, far: float) -> float:
    """The slope of the ROC at this FAR: true accepts more per false accepts more.

    It is taken from a quarter fewer to a quarter more false accepts, and at least four
    pairs away, because the ROC is a staircase.
    """
    step = max(far / 4, 4 / curve.different[-1])
    ends = np.clip([far - step, far + step], 0.0, 1.0)
    tar = np.interp(ends, curve.far, curve.tar)
    return float((tar[1] - tar[0]) / (ends[1] - ends[0]))


def _areas(curve: VerificationCurve, distances: np.ndarray) -> np.ndarray:
    """(2, ...) the fractions of same pairs nearer, and of different pairs farther.

    Same and different pairs at an equal distance count half.
    """
    within = np.searchsorted(curve.thresholds, distances, "right") - 1
    below = np.maximum(np.searchsorted(curve.thresholds, distances, "left") - 1, 0)
    nearer = (curve.tar[within] + curve.tar[below]) / 2
    return np.stack([nearer, 1.0 - (curve.far[within] + curve.far[below]) / 2])


def _sums_of_pairs(
    distances: np.ndarray,
    codes: np.ndarray,
    curve: VerificationCurve,
    thresholds: np.ndarray,
) -> _Sums:
    """The sums over a list of pairs.

    Args:
        distances: (pairs,) of the pairs.
        codes: (pairs, 2) the classes of both ends.
        curve: of the pairs.
        thresholds: (t,) distances.
    """
    same = codes[:, 0] == codes[:, 1]
    area = np.where(same, *_areas(curve, distances)[::-1])
    found = np.column_stack(
        [np.ones(len(same)), area, distances[:, None] <= thresholds]
    )
    sums = np.zeros((codes.max() + 1, 2, 2 + len(thresholds)))
    np.add.at(sums, (codes[:, 0], same.astype(int)), found)
    np.add.at(sums[:, 0], codes[~same, 1], found[~same])
    sums = sums[sums[:, :, 0].any(axis=1)]  # classes without a pair are left out
    return _Sums(sums[:, :, 0], sums[:, :, 1], sums[:, :, 2:])


def _sums_of_all(
    rows: np.ndarray,
    codes: np.ndarray,
    curve: VerificationCurve,
    thresholds: np.ndarray,
    distance: str,
) -> _Sums:
    """The sums over all pairs of rows, each pair met from both of its rows."""
    space = Space.of(rows, rows, distance)
    limits = _numbers_of(thresholds, distance)
    # The fraction of nearer same pairs, by the first 16 bits of a number: its exponent
    # and 7 bits of its mantissa, which are enough for a sum.
    cells = (np.arange(1 << 16, dtype=np.uint32) << 16 | 1 << 15).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity and NaN among them
        nearer = _areas(curve, space.distances(np.abs(cells)))[0].astype(np.float32)
    found = np.empty((len(rows), 2, 2 + len(limits)))
    for span, block in space.blocks():
        for low in range(0, len(block), _ROWS):
            part = block[low : low + _ROWS]
            who = np.arange(len(part)) + span.start + low
            own = np.arange(len(part)), who
            part[own] = np.inf  # a row and itself: within no threshold
            same = codes[who, None] == codes
            same[own] = False
            i, j = np.nonzero(same)
            values, area = part[i, j], nearer[part.view(np.uint32) >> 16]
            farther = _areas(curve, space.distances(values))[1]
            columns = [None, farther, area[i, j], *(values <= x for x in limits)]
            count, *of_same = (np.bincount(i, column, len(who)) for column in columns)
            found[who, 1] = np.column_stack([count, of_same[0], *of_same[2:]])
            # The different pairs are all pairs without the same pairs. A row and itself
            # are nearer than infinity: 1 in the area.
            within = [np.count_nonzero(part <= limit, axis=1) for limit in limits]
            found[who, 0] = np.column_stack(
                [len(rows) - 1.0 - count, area.sum(axis=1) - 1.0, *within]
            )
            found[who, 0, 1:] -= np.column_stack(of_same[1:])
    sums = np.zeros((codes.max() + 1, *found.shape[1:]))
    np.add.at(sums, codes, found)
    sums = sums[sums[:, :, 0].any(axis=1)]
    sums[:, 1] /= 2  # a same pair was met twice in its class
    return _Sums(sums[:, :, 0], sums[:, :, 1], sums[:, :, 2:])


def _numbers_of(thresholds: np.ndarray, distance: str) -> np.ndarray:
    """The numbers of `Space.blocks` that stand for these distances, -1 for -inf."""
    t = np.maximum(thresholds, 0.0)
    numbers = {"euclidean": t**2 / 2, "squared_euclidean": t / 2, "cosine": t}[distance]
    # A little more, because a number was rounded on its way to the threshold.
    return np.where(thresholds >= 0, numbers * (1 + 1e-6), -1.0).astype(np.float32)


class FoldedAccuracy(NamedTuple):
    """The accuracy on each fold, at a threshold that was chosen on the other folds.

    Attributes:
        accuracy: mean over the folds.
        standard_error: standard error of the mean, s / sqrt(folds).
        accuracies: (folds,) accuracy on each fold.
        thresholds: (folds,) threshold for each fold, chosen on the other folds.
    """

    accuracy: float
    standard_error: float
    accuracies: np.ndarray
    thresholds: np.ndarray


def verification_folds(
    embeddings: Any,
    pairs: Any,
    is_same: Any,
    *,
    folds: Any = 10,
    distance: str = "euclidean",
) -> FoldedAccuracy:
    """Cross-validated accuracy on a list of pairs, as for Labeled Faces in the Wild.

    Each fold is decided by the threshold that has the best accuracy on all other folds.

    Args:
        embeddings: (n, dim) finite numbers.
        pairs: (pairs, 2) rows of `embeddings`.
        is_same: (pairs,) booleans.
        folds: the number of folds, at least 2: the same pairs and the different
            pairs are each cut into this many runs, in their order. (With 10, the
            list of LFW is cut into its own ten folds.) Or (pairs,) integers, the fold
            of each pair. Default 10.
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`. The
            arrays do not tell which distance they were trained with: give the distance
            of the loss.

    Returns:
        A `FoldedAccuracy`.

    Raises:
        TypeError, ValueError: if the arrays do not fit each other, or a fold leaves
            no same or no different pair to the others.

    Example:

    >>> pairs = [[0, 1], [2, 3], [0, 2], [1, 3]]
    >>> verification_folds(
    ...     [[0.0], [1.0], [5.0], [7.0]], pairs, [True, True, False, False], folds=2
    ... ).accuracy
    0.75

    References:
        Huang, Ramesh, Berg, Learned-Miller, "Labeled Faces in the Wild", 2007,
        section 4 (View 2).
    """
    rows = embeddings_array("embeddings", embeddings)
    pairs = pairs_array(pairs, len(rows))
    is_same = flags_array(is_same, len(pairs))
    fold_of = _fold_of(folds, is_same)
    distances = pair_distances(rows, pairs, distance=distance)
    accuracies, thresholds = [], []
    for fold in np.unique(fold_of):
        held_out = fold_of == fold
        _check_both(int((~held_out).sum()), int(is_same[~held_out].sum()), "folds")
        curve = _curve(distances[~held_out], is_same[~held_out])
        thresholds.append(curve.best("accuracy").threshold)
        accepted = distances[held_out] <= thresholds[-1]
        accuracies.append((accepted == is_same[held_out]).mean())
    return FoldedAccuracy(
        accuracy=float(np.mean(accuracies)),
        standard_error=float(np.std(accuracies, ddof=1) / len(accuracies) ** 0.5),
        accuracies=np.array(accuracies),
        thresholds=np.array(thresholds),
    )


def pair_distances(
    embeddings: Any, pairs: Any, *, distance: str = "euclidean"
) -> np.ndarray:
    """The distances of pairs of rows.

    Args:
        embeddings: (n, dim) finite numbers.
        pairs: (pairs, 2) rows of `embeddings`.
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`. The
            arrays do not tell which distance they were trained with: give the distance
            of the loss.

    Returns:
        (pairs,) float32.

    Example:

    >>> pair_distances([[0.0, 0.0], [3.0, 4.0]], [[0, 1]])
    array([5.], dtype=float32)
    """
    _checks.one_of("distance", distance, DISTANCES)
    rows = embeddings_array("embeddings", embeddings)
    pairs = pairs_array(pairs, len(rows))
    if distance == "cosine":
        rows = unit_rows(rows)
    # In blocks, because all differences at once may be larger than the memory.
    step = max(1, (1 << 22) // rows.shape[1])
    parts = [pairs[low : low + step] for low in range(0, len(pairs), step)]
    return np.concatenate(
        [row_distances(rows[part[:, 0]], rows[part[:, 1]], distance) for part in parts]
    )


def _curve(distances: np.ndarray, is_same: np.ndarray) -> VerificationCurve:
    """The curve of pairs by sorting their distances."""
    order = np.argsort(distances)
    ascending = distances[order]
    # A threshold accepts all pairs at equal distances: only the last of them is a point.
    last = np.append(np.flatnonzero(ascending[1:] != ascending[:-1]), len(order) - 1)
    same = np.cumsum(is_same[order])[last]
    return _with_start(ascending[last], same, last + 1 - same)


def _with_start(thresholds: Any, same: Any, different: Any) -> VerificationCurve:
    """The curve of these counts, with the threshold that accepts no pair put first."""
    return VerificationCurve(
        np.concatenate([[-np.inf], thresholds]),
        np.concatenate([[0], same]),
        np.concatenate([[0], different]),
    )


def _curve_of_all(
    rows: np.ndarray, codes: np.ndarray, distance: str, verbose: bool
) -> VerificationCurve:
    """The curve of all pairs: sorted up to `_SORTED` pairs, beyond that in a histogram."""
    space = Space.of(rows, rows, distance)
    parts = _all_pairs(space, codes, verbose)
    if len(rows) * (len(rows) - 1) // 2 <= _SORTED:
        values, same = (np.concatenate(part) for part in zip(*parts, strict=True))
        return _curve(space.distances(values), same)
    # No number of a block is larger: half a squared distance is at most 4 times the
    # largest |row - mean|^2 / 2, and a cosine distance at most 2, up to rounding.
    largest = 5 * space.left[:, -1].max() if distance != "cosine" else 2.5
    base = int(_cell_of(np.float32(largest))) - _CELLS + 1
    counts, counts_same = np.zeros(_CELLS, np.int64), np.zeros(_CELLS, np.int64)
    for values, same in parts:
        # Values under 2^-32 of the largest possible one fall into the first cell.
        cells = np.maximum(_cell_of(np.abs(values)) - base, 0)
        np.add.at(counts, cells, 1)
        np.add.at(counts_same, cells[same], 1)
    filled = np.flatnonzero(counts)
    same = np.cumsum(counts_same[filled])
    return _with_start(
        space.distances(_largest_of(filled + base)),
        same,
        np.cumsum(counts[filled]) - same,
    )


def _cell_of(values: Any) -> np.ndarray:
    """The int64 cell of float32 values >= 0, larger values in no lower cells.

    The bits of a float are its exponent over its mantissa, so that the bits of floats
    >= 0 are integers in the order of the floats. Without their last `_DROPPED_BITS`
    bits they are the numbers of cells whose width grows with the value. For the floats
    from 1 to 2, if a mantissa had 4 bits and 2 of them were dropped:

        float      1.0    1.0625  1.1875   1.25   ...   1.9375
        mantissa   0000   0001    0011     0100         1111
        cell       00     00      00       01           11
    """
    return (values.view(np.uint32) >> _DROPPED_BITS).astype(np.int64)


def _largest_of(cells: np.ndarray) -> np.ndarray:
    """The largest float32 in each cell."""
    bits = ((cells + 1) << _DROPPED_BITS) - 1
    return bits.astype(np.uint32).view(np.float32)


def _all_pairs(
    space: Space, codes: np.ndarray, verbose: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Flat values of `space.blocks` above the diagonal, and whether each is a same pair.

    A block holds the columns from its first row on. Of its rows a few are taken at a
    time (here 2 of a block of 4 rows; "." is the diagonal and what lies below it):

        . a b b b b      a: `np.triu_indices` of the square at the diagonal
        . . b b b b      b: the columns to the right of the square, whole
    """
    for rows, block in space.blocks(upper=True, verbose=verbose):
        for low in range(0, len(block), _ROWS):
            some = block[low : low + _ROWS, low:]
            first = rows.start + low
            same = codes[first : first + len(some), None] == codes[first:]
            above = np.triu_indices(len(some), 1)
            yield tuple(  # type: ignore[misc]
                np.concatenate([array[above], array[:, len(some) :].ravel()])
                for array in (some, same)
            )


def check_codes(name: str, codes: np.ndarray) -> None:
    """An error unless two rows share a label and two rows do not."""
    sizes = np.bincount(codes)  # rows of each class
    same = int((sizes * (sizes - 1) // 2).sum())
    _check_both(len(codes) * (len(codes) - 1) // 2, same, name)


def _check_both(pairs: int, same: int, name: str) -> None:
    """An error unless there are same pairs and different pairs."""
    if same in (0, pairs):
        raise _checks.value_error(
            name,
            "pairs of the same class and pairs of different classes",
            _checks.Told(f"{same} same and {pairs - same} different pairs"),
        )


def pairs_array(value: Any, length: int) -> np.ndarray:
    """(pairs, 2) int64 rows of an array of `length` rows, else an error."""
    _checks.refuse_masked("pairs", value)
    pairs = np.asarray(value)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
        raise _checks.value_error("pairs", "an array of shape (pairs, 2)", pairs)
    if pairs.dtype.kind not in "iu":
        raise _checks.type_error("pairs", "row numbers", pairs)
    if pairs.min() < 0 or pairs.max() >= length:
        raise _checks.value_error(
            "pairs",
            f"rows 0 ... {length - 1}",
            _checks.Told(f"rows {pairs.min()} ... {pairs.max()}"),
        )
    return pairs.astype(np.int64)


def flags_array(value: Any, length: int) -> np.ndarray:
    """(length,) booleans with both values among them, else an error."""
    _checks.refuse_masked("is_same", value)
    flags = np.asarray(value)
    if flags.shape != (length,):
        raise _checks.value_error("is_same", f"{length} booleans", flags)
    if flags.dtype == object:  # None and pandas' NA compare with nothing
        known = np.array([isinstance(one, _FLAGS) and one in (0, 1) for one in flags])
    else:
        known = np.isin(flags, (0, 1))
    if not known.all():
        first = int(np.argmin(known))
        raise _checks.value_error(
            "is_same",
            "booleans, or 0 and 1",
            _checks.Told(f"{flags[first]!r} at position {first}"),
        )
    flags = flags.astype(bool)
    _check_both(length, int(flags.sum()), "is_same")
    return flags


def _fold_of(folds: Any, is_same: np.ndarray) -> np.ndarray:
    """The fold of every pair."""
    if np.ndim(folds):
        table = label_table("folds", folds, len(is_same))
        if len(table.classes) < 2:
            raise _checks.value_error(
                "folds", "at least two different fold numbers", folds
            )
        return table.codes
    folds = _checks.integer("folds", folds, 2)
    fewest = int(min(is_same.sum(), (~is_same).sum()))
    if folds > fewest:
        raise _checks.value_error(
            "folds", f"at most {fewest}, the pairs of the rarer kind", folds
        )
    fold_of = np.empty(len(is_same), np.int64)
    # The same and the different pairs are cut one after the other, so every fold has both.
    for kind in (is_same, ~is_same):
        members = np.flatnonzero(kind)
        fold_of[members] = np.arange(len(members)) * folds // len(members)
    return fold_of


def check_metrics(metrics: Any) -> tuple[str, ...]:
    """The metric words of `verification_metrics`, or an error for an unknown word."""
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if not metrics:
        raise _checks.value_error("metrics", "at least one metric word", metrics)
    for metric in metrics:
        if isinstance(metric, str) and metric.startswith("tar@"):
            try:
                far = float(metric[4:])
            except ValueError:
                far = -1.0  # which is refused below
            if not 0.0 < far < 1.0:
                raise _checks.value_error("metrics", "'tar@f' with 0 < f < 1", metric)
        else:
            _checks.one_of("metrics", metric, METRICS)
    return metrics
