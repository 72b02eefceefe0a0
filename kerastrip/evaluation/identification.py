"""Open-set identification: whose embedding is this, if it is anybody's of the gallery?

A query is given the label of its nearest row of the gallery if the distance is at most
a threshold, and counts as unknown otherwise. The queries whose class has no row in the
gallery are the strangers. NumPy on the CPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kerastrip import _checks
from kerastrip._labels import LabelTable
from kerastrip.evaluation.retrieval import ITSELF, common_codes, label_table
from kerastrip.evaluation.search import embeddings_array, search

__all__ = [
    "IdentificationCurve",
    "IdentificationPoint",
    "curve_of_nearest",
    "identification_curve",
    "identification_metrics",
]


class IdentificationPoint(NamedTuple):
    """What one threshold does to the known queries and to the strangers.

    Attributes:
        threshold: queries whose nearest row is at most this far away get its label.
        dir: detection and identification rate, the fraction of the known queries that
            get their own label; NaN if there are none.
        far: fraction of the strangers that get a label.
    """

    threshold: float
    dir: float
    far: float


@dataclasses.dataclass(frozen=True, eq=False)
class IdentificationCurve:
    """The queries that get a label at every threshold, and what follows from them.

    Attributes:
        thresholds: (m,) float64, ascending; the first, -inf, gives no query a label.
        identified: (m,) int64, number of known queries that get their own label.
        accepted: (m,) int64, number of strangers that get a label.
        known: number of queries whose class is in the gallery.
        drawn: (classes,) float32, ascending: for each class of strangers the distance
            of one query, drawn at random, to its nearest row.
    """

    thresholds: np.ndarray
    identified: np.ndarray
    accepted: np.ndarray
    known: int
    drawn: np.ndarray

    @property
    def dir(self) -> np.ndarray:
        """(m,) fraction of the known queries that get their own label."""
        return self.identified / (self.known or np.nan)

    @property
    def far(self) -> np.ndarray:
        """(m,) fraction of the strangers that get a label."""
        return self.accepted / self.accepted[-1]

    def at_far(self, far: float) -> IdentificationPoint:
        """The point of the highest DIR whose FAR, on these strangers, is at most `far`."""
        far = _checks.number("far", far, minimum=0.0, maximum=1.0)
        i = int(np.searchsorted(self.far, far, side="right")) - 1
        return self._point(i, float(self.thresholds[i]))

    def certified(
        self, far: float = 0.01, confidence: float = 0.95
    ) -> IdentificationPoint:
        """The highest threshold that keeps the FAR of all strangers there are at `far`.

        The threshold of `at_far` suits the strangers at hand. On others its FAR is too
        high about every second time. Here the upper end of a one-sided confidence
        interval is at most `far`: whoever calibrates again and again, with other
        strangers each time, exceeds `far` in at most a share 1 - `confidence` of the
        cases. With n classes of strangers of which k may get a label, that end is the
        FAR p at which

            P(Bin(n, p) <= k) = 1 - confidence      (Clopper and Pearson).

        The classes are the trials, not their queries: the queries of one person are
        accepted or refused together, and a bound that takes them for independent is
        exceeded several times as often as it says. One query of each class, drawn at
        random, stands for its class, and nothing is assumed about how alike the others
        are. FAR is the chance of a query for which first the class is drawn at random,
        then the query. The other queries can only lower the threshold: the FAR of all
        queries at hand is at most `far`, too.

        The bound holds for this gallery: with more rows more strangers are accepted.

        Args:
            far: the wanted FAR, 0 < far < 1. Default 0.01.
            confidence: 0.5 <= confidence < 1. Default 0.95.

        Returns:
            An `IdentificationPoint`, with the DIR and FAR of the queries at hand.

        Raises:
            ValueError: if there are too few classes of strangers, so that the bound
                is above `far` even if none of them gets a label. At 0.95 a FAR of 0.1
                needs 29 classes, 0.01 needs 299, and 0.001 needs 2,995.

        References:
            Clopper, Pearson, "The use of confidence or fiducial limits illustrated in
            the case of the binomial", 1934. Bates, Angelopoulos, Lei, Malik, Jordan,
            "Distribution-free, risk-controlling prediction sets", 2021, theorem 1 (why
            a bound for one threshold serves when the threshold is sought).
        """
        far = _checks.number("far", far, above=0.0, below=1.0)
        confidence = _checks.number("confidence", confidence, minimum=0.5, below=1.0)
        may_pass = _most_accepted(len(self.drawn), far, 1.0 - confidence)
        if may_pass < 0:
            needed = math.ceil(math.log1p(-confidence) / math.log1p(-far))
            raise _checks.value_error(
                "far",
                f"{needed} classes of strangers for {far:g} at confidence {confidence:g}",
                _checks.Told(f"{len(self.drawn)} classes"),
                "A higher `far` or a lower `confidence` needs fewer.",
            )
        # Both are distances of strangers at which too many of them would be accepted.
        too_many = self.thresholds[np.searchsorted(self.far, far, side="right")]
        limit = min(np.float32(too_many), self.drawn[may_pass])
        i = int(np.searchsorted(self.thresholds, limit)) - 1
        return self._point(i, float(np.nextafter(limit, np.float32(-np.inf))))

    def _point(self, i: int, threshold: float) -> IdentificationPoint:
        return IdentificationPoint(threshold, float(self.dir[i]), float(self.far[i]))


def identification_curve(
    queries: Any,
    query_labels: Any,
    gallery: Any,
    gallery_labels: Any,
    *,
    distance: str = "euclidean",
    seed: int = 0,
) -> IdentificationCurve:
    """Counts the known queries and the strangers that get a label at every threshold.

    Args:
        queries: (n, dim) embeddings. Queries whose label is not in `gallery_labels` are
            the strangers.
        query_labels: (n,) integers or strings.
        gallery: (m, dim) embeddings to search in, without the queries themselves.
        gallery_labels: (m,) labels of the same kind.
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`. The
            arrays do not tell which distance they were trained with: give the distance
            of the loss.
        seed: of the draw of one query from each class of strangers, for the method
            `certified`. Default 0.

    Returns:
        An `IdentificationCurve`. Its method `at_far` finds the threshold for a FAR on
        these strangers, and `certified` the threshold for a FAR on all strangers.

    Raises:
        TypeError, ValueError: if the arrays do not fit each other, or if there is no
            known query or no stranger.

    Example:

    >>> curve = identification_curve(
    ...     [[0.1], [5.6], [2.0], [9.0]], ["ann", "bob", "cy", "dee"],
    ...     [[0.0], [5.0]], ["ann", "bob"],
    ... )
    >>> curve.at_far(0.0).dir, curve.at_far(0.5).dir
    (1.0, 1.0)
    """
    queries = embeddings_array("queries", queries)
    gallery = embeddings_array("gallery", gallery)
    labels = label_table("query_labels", query_labels, len(queries))
    enrolled = label_table("gallery_labels", gallery_labels, len(gallery))
    distances, rows = search(queries, gallery, min(2, len(gallery)), distance=distance)
    curve = curve_of_nearest(
        distances, rows, labels, enrolled, distance=distance, seed=seed
    )
    if not curve.known:
        raise _checks.value_error(
            "query_labels",
            "labels in `gallery_labels`, and others for the strangers",
            _checks.Told(f"{len(queries)} queries, all of them strangers"),
        )
    return curve


def identification_metrics(
    queries: Any,
    query_labels: Any,
    gallery: Any,
    gallery_labels: Any,
    *,
    far: Sequence[float] = (1e-1, 1e-2, 1e-3),
    distance: str = "euclidean",
) -> dict[str, float]:
    """How many known queries get their own label, if few strangers may get one.

    A query gets the label of its nearest row in the gallery if the distance is at most
    a threshold. Of the queries whose label is in the gallery, DIR is the fraction that
    get their own label; of all others, the strangers, FAR is the fraction that get one.

    | figure | |
    |---|---|
    | `dir@f` | DIR at the highest threshold whose FAR is at most f |
    | `recall@1` | DIR without a threshold |
    | `known`, `strangers` | numbers of queries |
    | `stranger_classes` | number of classes of the strangers |

    In the words of the tests of NIST, FAR is the false positive identification rate
    (FPIR), and 1 - DIR the false negative identification rate at rank 1 (FNIR).

    Args:
        queries: (n, dim) embeddings. Queries whose label is not in `gallery_labels` are
            the strangers.
        query_labels: (n,) integers or strings.
        gallery: (m, dim) embeddings to search in, without the queries themselves.
        gallery_labels: (m,) labels of the same kind.
        far: the f of the figures `dir@f`, each in 0 ... 1. With fewer than 1 / f
            strangers none of them may get a label.
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`. The
            arrays do not tell which distance they were trained with: give the distance
            of the loss.

    Returns:
        Dict with the figures of the table.

    Raises:
        TypeError, ValueError: as `identification_curve`.

    Example:

    >>> identification_metrics(
    ...     [[0.1], [5.6], [5.3], [9.0]], ["ann", "bob", "cy", "dee"],
    ...     [[0.0], [5.0]], ["ann", "bob"], far=(0.5, 0.01),
    ... )
    {'dir@0.5': 1.0, 'dir@0.01': 0.5, 'recall@1': 1.0, 'known': 2,
     'strangers': 2, 'stranger_classes': 2}

    References:
        Phillips, Grother, Micheals, "Evaluation Methods in Face Recognition", in
        "Handbook of Face Recognition", 2011 (open-set identification). Grother, Ngan,
        Hanaoka, "Face Recognition Vendor Test, Part 2: Identification", NISTIR 8271,
        2019 (FPIR and FNIR).
    """
    far = [_checks.number("far", value, minimum=0.0, maximum=1.0) for value in far]
    curve = identification_curve(
        queries, query_labels, gallery, gallery_labels, distance=distance
    )
    return {
        **{f"dir@{value:g}": curve.at_far(value).dir for value in far},
        "recall@1": float(curve.dir[-1]),
        "known": curve.known,
        "strangers": int(curve.accepted[-1]),
        "stranger_classes": len(curve.drawn),
    }


def curve_of_nearest(
    distances: np.ndarray,
    rows: np.ndarray,
    labels: LabelTable,
    enrolled: LabelTable,
    *,
    distance: str,
    seed: int,
) -> IdentificationCurve:
    """The curve of queries whose nearest rows are known.

    Args:
        distances: (n, 1 or 2) float32 distances to the nearest rows; infinity where no
            row was found.
        rows: as `distances`, the numbers of the nearest rows, -1 where no row was found.
        labels: the labels of the queries.
        enrolled: the labels of the rows.
        distance: one of `DISTANCES`.
        seed: of the queries that `IdentificationCurve.drawn` holds.
    """
    codes, row_codes = common_codes(labels, enrolled)
    is_known = np.isin(codes, row_codes)  # (n,)
    if is_known.all():
        raise _checks.value_error(
            "query_labels",
            "labels of strangers, which are not in the gallery, too",
            _checks.Told(f"{len(codes)} queries, all of classes of the gallery"),
        )
    hits = (rows[:, 0] >= 0) & (row_codes[rows[:, 0]] == codes)
    _warn_of_copies(distances, hits, distance)
    order = np.argsort(distances[:, 0])
    ascending = distances[order, 0]
    # A threshold accepts all queries at equal distances: only the last of them is a point.
    last = np.append(np.flatnonzero(ascending[1:] != ascending[:-1]), len(order) - 1)
    identified, accepted = (
        np.concatenate([[0], np.cumsum(of[order])[last]]) for of in (hits, ~is_known)
    )
    shuffled = np.random.default_rng(seed).permutation(np.flatnonzero(~is_known))
    one_each = shuffled[np.unique(codes[shuffled], return_index=True)[1]]
    return IdentificationCurve(
        thresholds=np.concatenate([[-np.inf], ascending[last]]),
        identified=identified,
        accepted=accepted,
        known=int(is_known.sum()),
        drawn=np.sort(distances[one_each, 0]),
    )


def _warn_of_copies(distances: np.ndarray, hits: np.ndarray, distance: str) -> None:
    """A warning if the nearest row of some queries seems to be the same sample."""
    if distances.shape[1] < 2:
        return
    # The other two distances grow with the square of the euclidean one.
    ratio = ITSELF if distance == "euclidean" else ITSELF**2
    nearer, farther = distances.T
    met = np.flatnonzero(hits & (nearer <= ratio * farther) & (farther > 0))
    if len(met):
        _checks.warn(
            f"{len(met)} of {len(hits)} queries have an equal row of their own label in "
            f"the gallery, the first is query {met[0]}. If they are the same samples, "
            "they find themselves and DIR is too good: leave them out of the gallery."
        )


def _most_accepted(classes: int, far: float, alpha: float) -> int:
    """The largest k with P(Bin(classes, far) <= k) <= alpha, or -1; alpha is at most 0.5.

    For 100 classes, far = 0.1 and alpha = 0.05 it is 4:

        k                            2      3      4      5
        P(Bin(classes, far) <= k)  0.002  0.008  0.024  0.058
    """
    k = np.arange(math.ceil(classes * far) + 1)  # the median is not beyond
    log_choose = np.cumsum(np.log((classes - k[1:] + 1) / k[1:]))
    log_terms = k * math.log(far) + (classes - k) * math.log1p(-far)
    log_terms[1:] += log_choose
    return int((np.logaddexp.accumulate(log_terms) <= math.log(alpha)).sum()) - 1
