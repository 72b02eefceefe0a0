"""Retrieval metrics of a set of embeddings: how good are the nearest neighbours?

NumPy on the CPU, exact, in blocks of rows. Verification ("are these two the
same?") is in `kerastrip.verification`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kerastrip import _checks
from kerastrip._labels import LabelTable, counted
from kerastrip.evaluation.intervals import (
    ClassScores,
    check_interval,
    few_classes_warning,
    with_intervals,
)
from kerastrip.evaluation.ranking import hit_ranks
from kerastrip.evaluation.reranking import Reranking, settings
from kerastrip.evaluation.search import (
    Space,
    embeddings_array,
    equal_rows,
    nearest,
    row_distances,
    shared_rows,
)

__all__ = [
    "CLUSTERING",
    "ITSELF",
    "METRICS",
    "check_groups",
    "check_metrics",
    "class_scores",
    "common_codes",
    "label_table",
    "lookup_figures",
    "retrieval_metrics",
    "self_match_warning",
]

METRICS = (
    "recall@1",
    "recall@5",
    "recall@10",
    "precision@1",
    "r_precision",
    "map@r",
    "mrr",
)
_WHOLE = ("map", "minp")  # they need the whole ranking
# They are no means over the queries.
CLUSTERING = ("nmi", "ami")
# What `_Block.gains` returns.
_Gains = tuple[np.ndarray, dict[str, np.ndarray]]
_WORDS = (*METRICS, "cmc@1", "knn@5", *_WHOLE, *CLUSTERING)
# Up to so many distances are computed in float64, more in float32.
_EXACT = 1 << 24
# So many more neighbours are found where it counts how they would move up.
_SPARE = 32
# A nearest row this much nearer than the second nearest is the query itself.
ITSELF = 1e-4


def retrieval_metrics(
    embeddings: Any,
    labels: Any,
    *,
    gallery: Any = None,
    gallery_labels: Any = None,
    groups: Any = None,
    gallery_groups: Any = None,
    metrics: Sequence[str] = METRICS,
    distance: str = "euclidean",
    rerank: Any = False,
    interval: float | None = None,
    seed: int = 0,
    verbose: bool = False,
) -> dict[str, float]:
    """How well the nearest neighbours of every embedding have its label.

    Every row is a query. It is looked up among all other rows (leave-one-out), or
    in `gallery` where that is given. With R the number of rows there that have the
    query's label (its positives), and hit(i) whether its i-th neighbour is a positive:

    | metric word | mean over the queries of |
    |---|---|
    | `recall@k` | 1 if one of the first k neighbours is a hit, else 0 |
    | `cmc@k` | the same: cumulative matching characteristic, as re-identification calls it |
    | `precision@k` | 1/k sum_{i<=k} hit(i) |
    | `r_precision` | 1/R sum_{i<=R} hit(i) |
    | `map@r` | 1/R sum_{i<=R} hit(i) precision@i |
    | `mrr` | 1 / rank of the first hit |
    | `map` | 1/R sum over all hits of precision@(rank of the hit): average precision over the whole ranking |
    | `minp` | R / rank of the last hit: inverse negative penalty, how far down the hardest positive stands |
    | `knn@k` | 1 if the most frequent label of the first k neighbours is the query's; of equally frequent labels, that of the nearest neighbour counts |
    | `nmi`, `ami` | (not a mean) normalised and adjusted mutual information of the labels and a k-means clustering of the queries into as many clusters; needs scikit-learn |

    A query with R = 0, without a positive, is left out of the means and counted in
    `lone_queries`. Neighbours at equal distances stand in the order of the rows. Up to
    16 million distances are computed in float64, more in float32.

    Two images of one person from one camera are too easy a match. With `groups` (the
    camera, session or typeface of every row) the rows of the query's label *and* group
    are left out of its ranking: they are neither hits nor misses, and do not count in R.
    This is the protocol of Market-1501. A query whose positives are all of its own group
    is left out of the means and counted in `lone_across_groups`.

    With `interval` every figure comes with the interval that it would move in if the
    queries were of as many *other* classes. Queries of one class are no independent
    trials, so the classes are counted, not the queries: a class counts with all its
    queries, and with what the queries of other classes would gain if its rows were not
    there. (`map` and `minp` leave out the second part, as do rows behind the first
    neighbours.) `kerastrip.evaluation.intervals` has the formula. To compare two models
    use `kerastrip.evaluation.compare`: two intervals that overlap do not say that the
    models are equal.

    A query that is in the gallery itself would find itself first. Where `gallery` is
    the same array, or a view of the same memory, every query is looked up without
    itself. Copies cannot be recognised for certain: a warning counts the queries that
    have an equal row of their label in the gallery.

    Args:
        embeddings: (n, dim) finite numbers.
        labels: (n,) integers or strings, or (n, classes) one-hot rows.
        gallery: (m, dim) embeddings to search in. Default: `embeddings`, each row
            without itself.
        gallery_labels: labels of `gallery`.
        groups: (n,) integers or strings, the group of every row. Default None: no row
            is left out but the query itself.
        gallery_groups: (m,) groups of `gallery`, where both `gallery` and `groups` are
            given.
        metrics: metric words of the table, k at least 1. If there are fewer than k
            neighbours, `recall@k`, `cmc@k` and `knn@k` take all there are, and
            `precision@k` counts the missing ones as misses. `map` and `minp` look at
            the whole ranking, and take longer than the others.
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`. The
            arrays do not tell which distance they were trained with: give the distance
            of the loss, which `RetrievalEvaluation` reads from the model.
        rerank: True for the ranking by `kerastrip.rerank` in place of the distance, or
            a dict of its `k1`, `k2` and `original_weight`. Default False.
        interval: the level of the intervals of all figures but `nmi` and `ami`, such as
            0.95. Default None: figures alone.
        seed: seed of the k-means clustering behind `nmi` and `ami`. Default 0.
        verbose: whether to show a progress bar once it takes over two seconds.
            Default False.

    Returns:
        Dict with one float in [0, 1] (`ami` also below 0) per metric word, in the
        order of `metrics`, with `interval` each followed by the ends of its interval as
        `"recall@1_low"` and `"recall@1_high"`, and the counts `"queries"` (queries in the means),
        `"lone_queries"` (queries without another row of their label, left out of the
        means) and, with `groups`, `"lone_across_groups"` (queries all of whose positives
        are left out, and so left out of the means, too).

    Raises:
        TypeError, ValueError: if the arrays do not fit each other, a metric word is
            unknown, or no query has a positive.

    Example:

    >>> figures = retrieval_metrics(
    ...     [[0.0], [1.0], [5.0], [7.0], [99.0]], ["a", "a", "b", "b", "c"],
    ...     metrics=("recall@1", "map@r"),
    ... )
    >>> figures
    {'recall@1': 1.0, 'map@r': 1.0, 'queries': 4, 'lone_queries': 1}

    Persons a, b and c in two cameras. The first row of the gallery and its fourth are
    left out: they show the two queries in their own camera.

    >>> retrieval_metrics(
    ...     [[0.0], [5.0]], ["a", "b"], groups=[1, 1],
    ...     gallery=[[0.1], [1.0], [2.0], [5.2], [6.0]],
    ...     gallery_labels=["a", "c", "a", "b", "b"], gallery_groups=[1, 2, 2, 1, 2],
    ...     metrics=("cmc@1", "map"),
    ... )
    {'cmc@1': 0.5, 'map': 0.75, 'queries': 2, 'lone_queries': 0, 'lone_across_groups': 0}

    The figures, and where they would lie if the classes were others:

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(np.arange(50), 4)
    >>> embeddings = rng.normal(size=(50, 2))[labels] + 0.1 * rng.normal(size=(200, 2))
    >>> figures = retrieval_metrics(
    ...     embeddings, labels, metrics="recall@1", interval=0.95
    ... )
    >>> {name: round(figure, 2) for name, figure in figures.items()}
    {'recall@1': 0.74, 'recall@1_low': 0.64, 'recall@1_high': 0.82, 'queries': 200, 'lone_queries': 0}

    References:
        Musgrave, Belongie, Lim, "A Metric Learning Reality Check", 2020,
        section 3.2 (R-precision and MAP@R).

        Zheng, Shen, Tian, Wang, Wang, Tian, "Scalable Person Re-identification: A
        Benchmark", 2015 (Market-1501: CMC, mAP, and what is left out).

        Ye, Shen, Lin, Xiang, Shao, Hoi, "Deep Learning for Person Re-identification: A
        Survey and Outlook", 2021, section 4.1 (mINP).
    """
    own = _own_rows(embeddings, gallery, gallery_labels)
    results, met, few = lookup_figures(
        embeddings,
        labels,
        gallery,
        gallery_labels,
        own=own,
        groups=groups,
        gallery_groups=gallery_groups,
        metrics=metrics,
        distance=distance,
        rerank=rerank,
        interval=interval,
        seed=seed,
        verbose=verbose,
    )
    if len(met):
        _checks.warn(self_match_warning(met, len(embeddings)))
    if few:
        _checks.warn(few)
    return results


def _own_rows(embeddings: Any, gallery: Any, gallery_labels: Any) -> np.ndarray | None:
    """`shared_rows`, after the check that the gallery has labels; None without gallery."""
    if (gallery is None) != (gallery_labels is None):
        raise _checks.value_error(
            "gallery", "`gallery` and `gallery_labels` together", gallery
        )
    return None if gallery is None else shared_rows(embeddings, gallery)


def lookup_figures(
    embeddings: Any,
    labels: Any,
    gallery: Any,
    gallery_labels: Any,
    *,
    own: np.ndarray | None,
    groups: Any = None,
    gallery_groups: Any = None,
    metrics: Sequence[str],
    distance: str,
    rerank: Any = False,
    interval: float | None = None,
    seed: int = 0,
    verbose: bool = False,
) -> tuple[dict[str, float], np.ndarray, str]:
    """The dict of `retrieval_metrics`, and what it warns of.

    Args:
        embeddings, labels, gallery, gallery_labels: as for `retrieval_metrics`.
        own: (n,) for each query the row of the gallery that is the query itself, which
            is left out of the neighbours; -1 where no such row is known. None if no
            such row is known for any query.
        groups, gallery_groups: as for `retrieval_metrics`.
        metrics, distance, rerank, interval, seed, verbose: as for `retrieval_metrics`.

    Returns:
        The dict of `retrieval_metrics`; the numbers of the queries that seem to be in
        the gallery although `own` knows no row for them: their nearest row is equal to
        them and has their label; and `few_classes_warning`, "" without intervals.
    """
    metrics = check_metrics(metrics)
    check_groups(gallery, groups, gallery_groups)
    interval = check_interval(interval)
    lookup = _Lookup.of(
        embeddings,
        labels,
        groups,
        searched=(gallery, gallery_labels, gallery_groups),
        own=own,
    )
    reranked = settings(rerank)
    gains: list[_Gains] | None = None if interval is None else []
    values, met = _query_values(
        lookup, metrics, distance, reranked, verbose, gains=gains
    )
    found = {metric: float(np.nanmean(each)) for metric, each in values.items()}
    if not set(CLUSTERING).isdisjoint(metrics):
        found |= _clustering(lookup.queries, lookup.codes, metrics, seed)
    found, few = {metric: found[metric] for metric in metrics}, ""
    if interval is not None and gains is not None:
        scores = _class_scores(lookup, values, gains)
        found = with_intervals(found, scores, interval)
        few = few_classes_warning(scores)
    counts: dict[str, float] = {"queries": int((lookup.positives > 0).sum())}
    counts["lone_queries"] = int((lookup.same_label == 0).sum())
    if groups is not None:
        counts["lone_across_groups"] = len(lookup.codes) - sum(counts.values())
    return found | counts, met, few


def class_scores(
    embeddings: Any,
    labels: Any,
    gallery: Any = None,
    gallery_labels: Any = None,
    *,
    groups: Any = None,
    gallery_groups: Any = None,
    metrics: Sequence[str],
    distance: str,
    rerank: Any = False,
    verbose: bool = False,
) -> ClassScores:
    """The figures of `retrieval_metrics` as sums over the classes of the queries.

    Args:
        embeddings, labels, gallery, gallery_labels: as for `retrieval_metrics`.
        groups, gallery_groups: as for `retrieval_metrics`.
        metrics, distance, rerank, verbose: as for `retrieval_metrics`, but for `nmi`
            and `ami`.
    """
    own = _own_rows(embeddings, gallery, gallery_labels)
    check_groups(gallery, groups, gallery_groups)
    searched = gallery, gallery_labels, gallery_groups
    lookup = _Lookup.of(embeddings, labels, groups, searched=searched, own=own)
    gains: list[_Gains] = []
    parts = metrics, distance, settings(rerank), verbose
    values, _ = _query_values(lookup, *parts, gains=gains)
    return _class_scores(lookup, values, gains)


def _class_scores(
    lookup: _Lookup, values: dict[str, np.ndarray], gains: list[_Gains]
) -> ClassScores:
    """What each class of the queries does to the means over the queries.

    Its own queries count, and so do the queries of other classes, which would have
    better neighbours without it. The gains of the others are counted from their mean
    over the classes, so that the scores still add up to the sum over the queries.

    Args:
        lookup: the queries, and the rows to search in.
        values: (n,) for each metric word, from `_query_values`.
        gains: from `_query_values`.
    """
    counted = lookup.positives > 0
    present, codes = np.unique(lookup.codes, return_inverse=True)
    classes = len(present)
    sizes = np.bincount(codes[counted], minlength=classes)
    pairs = np.concatenate([pair for pair, _ in gains])
    # A class that is in the gallery alone is not among the classes that could be others.
    both = np.isin(pairs[:, 1], present)
    of, gone = np.searchsorted(present, pairs[both]).T
    keys = np.minimum(of, gone) * classes + np.maximum(of, gone)
    keys, at = np.unique(keys, return_inverse=True)
    scores, shared = {}, {}
    for word, each in values.items():
        own = np.bincount(codes[counted], each[counted], classes)
        gain = np.concatenate([sums[word] for _, sums in gains])[both]
        by_class = np.bincount(gone, gain, classes)
        scores[word] = own - (by_class - by_class.mean())
        shared[word] = np.bincount(at, -gain, len(keys))
    return ClassScores(scores, sizes, keys, shared)


def _query_values(
    lookup: _Lookup,
    metrics: Sequence[str],
    distance: str,
    reranked: dict[str, Any] | None,
    verbose: bool,
    *,
    gains: list[_Gains] | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The value of every metric for every query: the metrics are the means of them.

    Args:
        lookup: the queries, and the rows to search in.
        metrics, distance, reranked, verbose: as for `lookup_figures`.
        gains: a list, to which the `_Block.gains` of each block are added.

    Returns:
        (n,) float64 for each metric word but `nmi` and `ami`, NaN for a query without a
        positive; and the numbers of the queries that meet themselves.
    """
    positives = lookup.positives
    # Queries of similar R stand together, so that each block looks at no more
    # neighbours than its own queries need.
    chosen = np.flatnonzero(positives > 0)
    chosen = chosen[np.argsort(positives[chosen], kind="stable")]
    values = {
        metric: np.full(len(positives), np.nan)
        for metric in metrics
        if metric not in CLUSTERING
    }
    met = [np.empty(0, np.int64)]  # numbers of the queries that meet themselves
    few = len(chosen) * len(lookup.rows) <= _EXACT
    dtype = "float64" if few else "float32"
    space = Space.of(lookup.queries[chosen], lookup.rows, distance, dtype)
    # The product of matrices may round equal rows differently, by their columns.
    later, first = equal_rows(space.gallery)
    blocks = space.blocks(verbose=verbose)
    if reranked is not None:
        parts = lookup.queries, lookup.rows, lookup.own, distance
        blocks = Reranking.of(*parts, reranked).blocks(chosen, verbose=verbose)
    for span, numbers in blocks:
        who = chosen[span]  # numbers of the queries of this block
        if reranked is None and len(later):
            numbers[:, later] = numbers[:, first]
        block = _Block.of(lookup, who, numbers, metrics, spare=gains is not None)
        unknown = lookup.own[who] < 0
        if unknown.any():
            met.append(who[_meets_itself(space, span, block) & unknown])
        for metric, each in values.items():
            each[who] = block.values(metric)
        if gains is not None:
            gains.append(
                block.gains({word: each[who] for word, each in values.items()})
            )
    return values, np.sort(np.concatenate(met))


class _Lookup(NamedTuple):
    """The queries, the rows to search in, and which rows are left out for which query.

    A row is left out for a query that is the row itself, and for the queries of its
    label and its group.

    Attributes:
        queries: (n, dim) embeddings.
        rows: (m, dim) embeddings to search in.
        codes: (n,) labels of the queries as codes.
        row_codes: (m,) labels of the rows, by the same table.
        kinds: (n,) label and group of the queries as one code; -1 without groups.
        row_kinds: (m,) label and group of the rows, ascending with the label.
        own: (n,) the row that is the query itself, -1 where no such row is known.
        order: (m,) the rows ordered by kind, which orders them by label, too.
        same_label: (n,) the number of rows of the label of a query without itself.
        positives: (n,) R of every query.
    """

    queries: np.ndarray
    rows: np.ndarray
    codes: np.ndarray
    row_codes: np.ndarray
    kinds: np.ndarray
    row_kinds: np.ndarray
    own: np.ndarray
    order: np.ndarray
    same_label: np.ndarray
    positives: np.ndarray

    @classmethod
    def of(
        cls,
        embeddings: Any,
        labels: Any,
        groups: Any,
        *,
        searched: tuple[Any, Any, Any],
        own: np.ndarray | None,
    ) -> _Lookup:
        """Checks the arguments of `lookup_figures`.

        Args:
            embeddings, labels, groups: of the queries.
            searched: embeddings, labels and groups of the gallery, or None three times.
            own: as for `lookup_figures`.
        """
        gallery, gallery_labels, gallery_groups = searched
        queries = rows = embeddings_array("embeddings", embeddings)
        if gallery is None:
            own = np.arange(len(queries))
        else:
            rows = embeddings_array("gallery", gallery)
            own = np.full(len(queries), -1) if own is None else own
        lengths = len(queries), len(rows)
        codes, row_codes = _codes("labels", labels, gallery_labels, lengths)
        kinds, row_kinds = np.full(len(queries), -1), row_codes.astype(np.int64)
        if groups is not None:
            sides = _codes("groups", groups, gallery_groups, lengths)
            count = max(side.max() for side in sides) + 1
            kinds = codes * np.int64(count) + sides[0]
            row_kinds = row_codes * np.int64(count) + sides[1]
        order = np.argsort(row_kinds, kind="stable")
        itself = (own >= 0) & (row_codes[own] == codes)
        same_label = np.diff(_places(row_codes[order], codes))[:, 0] - itself
        left_out = np.diff(_places(row_kinds[order], kinds))[:, 0]
        # The query itself may be in another group, if there are two of its embedding.
        left_out -= itself & (row_kinds[own] == kinds)
        positives = same_label - left_out
        _check_positives(positives, same_label, gallery is not None, groups is not None)
        return cls(
            queries=queries,
            rows=rows,
            codes=codes,
            row_codes=row_codes,
            kinds=kinds,
            row_kinds=row_kinds,
            own=own,
            order=order,
            same_label=same_label,
            positives=positives,
        )

    def hits(self, who: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The positives of the queries `who`: places in `who`, ascending, and rows."""
        i, row = self._rows_of(self.row_codes, self.codes[who])
        left_out = self.row_kinds[row] == self.kinds[who][i]
        kept = ~(left_out | (row == self.own[who][i]))
        return i[kept], row[kept]

    def left_out(self, who: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows left out for the queries `who`: places in `who`, and rows."""
        i, row = self._rows_of(self.row_kinds, self.kinds[who])
        known = np.flatnonzero(self.own[who] >= 0)
        return np.append(i, known), np.append(row, self.own[who][known])

    def _rows_of(
        self, row_codes: np.ndarray, codes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows whose code is that of a query: places in `codes`, and rows."""
        places = _places(row_codes[self.order], codes)
        counts = np.diff(places)[:, 0]
        i = np.repeat(np.arange(len(codes)), counts)
        return i, self.order[places[i, 0] + counted(counts)]


def _places(ordered: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """(n, 2) the first place of each code in `ordered`, and the place after its last."""
    sides = [np.searchsorted(ordered, codes, side) for side in ("left", "right")]
    return np.stack(sides, axis=1)


class _Block(NamedTuple):
    """The queries of one block and their nearest rows. Here n counts these queries.

    Attributes:
        numbers: (n, m) distances to all rows, as `Space.blocks` gives them; infinity
            to the rows that are left out.
        codes: (n,) labels of the queries.
        row_codes: (m,) labels of the rows.
        positives: (n,) R of the queries, at least 1.
        nearest_rows: (n, depth) numbers of the nearest rows.
        neighbours: (n, depth) labels of the nearest rows, -1 for the rows that are left
            out, which come last where too few others are there.
        hits: (n, depth) whether a neighbour has the label of the query.
        ranks: (sum of R,) ranks of all hits, those of the first query before those of
            the second; empty if no metric needs the whole ranking.
    """

    numbers: np.ndarray
    codes: np.ndarray
    row_codes: np.ndarray
    positives: np.ndarray
    nearest_rows: np.ndarray
    neighbours: np.ndarray
    hits: np.ndarray
    ranks: np.ndarray

    @classmethod
    def of(
        cls,
        lookup: _Lookup,
        who: np.ndarray,
        numbers: np.ndarray,
        metrics: Sequence[str],
        *,
        spare: bool = False,
    ) -> _Block:
        """The block of the queries `who`; writes into the (n, m) `numbers`.

        With `spare` there are more neighbours than the metrics look at: those that move
        up where a class is taken away.
        """
        codes, positives = lookup.codes[who], lookup.positives[who]
        numbers[lookup.left_out(who)] = np.inf
        depth = _depth(metrics, positives)
        depth += spare * _SPARE
        rows = nearest(numbers, min(depth, len(lookup.rows)))
        neighbours = lookup.row_codes[rows]
        neighbours[np.isinf(np.take_along_axis(numbers, rows, axis=1))] = -1
        hits = neighbours == codes[:, None]
        ranks = np.empty(0, np.int64)
        if not set(_WHOLE).isdisjoint(metrics):
            ranks = hit_ranks(numbers, *lookup.hits(who))
        of_queries = numbers, codes, lookup.row_codes, positives
        return cls(*of_queries, rows, neighbours, hits, ranks)

    def values(self, metric: str) -> np.ndarray:
        """(n,) the value of a metric for every query; the metric is the mean of them."""
        name, _, k = metric.partition("@")
        if metric in ("map@r", "r_precision"):
            rank = np.arange(1, self.hits.shape[1] + 1)  # (depth,)
            hits_within_r = self.hits & (rank <= self.positives[:, None])
            if metric == "r_precision":
                return hits_within_r.sum(axis=1) / self.positives
            precision = np.cumsum(self.hits, axis=1) / rank  # (n, depth)
            return (precision * hits_within_r).sum(axis=1) / self.positives
        if metric == "mrr":
            return 1.0 / self._first_rank()
        if metric in _WHOLE:
            after = np.cumsum(self.positives)
            if metric == "minp":
                return self.positives / self.ranks[after - 1]
            first = after - self.positives
            nth = 1 + counted(self.positives)
            return np.add.reduceat(nth / self.ranks, first) / self.positives
        if name in ("recall", "cmc"):
            return self.hits[:, : int(k)].max(axis=1)
        if name == "precision":
            return self.hits[:, : int(k)].sum(axis=1) / int(k)
        if name == "knn":
            return _vote(self.neighbours[:, : int(k)]) == self.codes
        raise NotImplementedError(metric)

    def gains(
        self, values: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """What the queries of a class would gain if another class were not there.

        Each query is looked up again without each of the other classes among its
        neighbours. A query of class a with the neighbours

            b b a c a      has recall@1 = 0, without b: a c a, recall@1 = 1, gain 1,
                                             without c: b b a a, the same,   gain 0.

        What lies behind the last neighbour counts as a miss. `map` and `minp`, which
        look at the whole ranking, gain nothing.

        Args:
            values: (n,) for each metric word.

        Returns:
            (p, 2) codes of the queries' class and the other class, each pair once, and
            (p,) for each metric word the sum of the gains.
        """
        # Behind the last hit a class takes the place of none (but it has a vote).
        votes = any(word.startswith("knn") for word in values)
        depth = self.hits.shape[1]
        last = depth - self.hits[:, ::-1].argmax(axis=1) if not votes else depth
        reach = np.where(self.hits.any(axis=1) | votes, last, 0)  # (n,)
        other = (self.neighbours >= 0) & ~self.hits
        i, place = np.nonzero(other & (np.arange(depth) < reach[:, None]))
        classes = int(self.row_codes.max()) + 1
        each = np.unique(i * classes + self.neighbours[i, place])
        i, gone = np.divmod(each, classes)
        keys, at = np.unique(self.codes[i] * classes + gone, return_inverse=True)
        sums = {word: np.zeros(len(keys)) for word in values}
        step = max(1, (1 << 22) // depth)
        for low in range(0, len(i), step):
            some = slice(low, low + step)
            cut = self._without(i[some], gone[some])
            for word in set(values).difference(_WHOLE):
                before = values[word][i[some]]
                if word == "mrr":
                    rank = cut.hits.argmax(axis=1) + 1
                    gain = np.where(cut.hits.any(axis=1), 1 / rank - before, 0.0)
                else:
                    gain = cut.values(word) - before
                sums[word] += np.bincount(at[some], gain, len(keys))
        return np.stack(np.divmod(keys, classes), axis=1), sums

    def _without(self, i: np.ndarray, gone: np.ndarray) -> _Block:
        """The block of the queries `i`, each without the neighbours of one class."""
        neighbours = self.neighbours[i]
        row, column = np.nonzero(neighbours != gone[:, None])
        left = np.bincount(row, minlength=len(i))
        place = counted(left)
        moved = np.full_like(neighbours, -1)
        moved[row, place] = neighbours[row, column]
        codes = self.codes[i]
        return self._replace(
            codes=codes,
            positives=self.positives[i],
            neighbours=moved,
            hits=moved == codes[:, None],
        )

    def _first_rank(self) -> np.ndarray:
        """(n,) rank, from 1, of the first hit of every query among all rows."""
        ranks = self.hits.argmax(axis=1) + 1
        # Queries without a hit among their nearest rows: the nearest positive is sought
        # among all rows, and the rows nearer than it are counted.
        for i in np.flatnonzero(~self.hits.any(axis=1)):
            same = np.flatnonzero(self.row_codes == self.codes[i])
            first = same[self.numbers[i, same].argmin()]
            nearer = self.numbers[i] < self.numbers[i, first]
            equal_before = self.numbers[i, :first] == self.numbers[i, first]
            ranks[i] = nearer.sum() + equal_before.sum() + 1
        return ranks


def self_match_warning(met: np.ndarray, queries: int) -> str:
    """The warning for queries that seem to be in the gallery."""
    return (
        f"{len(met)} of {queries} queries have an equal row of their own label in "
        f"`gallery`, the first is query {met[0]}. If they are the same samples, they "
        "find themselves and the figures are too good: leave these samples out of the "
        "gallery, or leave out `gallery` to look up every sample among all others."
    )


def _meets_itself(space: Space, span: slice, block: _Block) -> np.ndarray:
    """(n,) whether the nearest row of a query is the same sample, with the same label.

    Two forward passes over one sample may differ by rounding. So a row counts as the
    same sample if it is `ITSELF` times nearer than the second nearest row. Where many
    rows are equal (a collapsed model, data of few values) no query counts.

    Args:
        space: the queries and rows.
        span: the rows of `space.queries` that are in the block.
        block: the block.
    """
    if block.nearest_rows.shape[1] < 2:
        return np.zeros(len(block.nearest_rows), bool)
    two = row_distances(
        space.queries[span, None], space.gallery[block.nearest_rows[:, :2]], "euclidean"
    )
    first = two.argmin(axis=1)[:, None]
    nearer, farther = two.min(axis=1), two.max(axis=1)
    equal = (nearer <= ITSELF * farther) & (farther > 0)
    return equal & np.take_along_axis(block.hits, first, axis=1)[:, 0]


def _depth(metrics: Sequence[str], positives: np.ndarray) -> int:
    """How many neighbours the metrics of one block look at."""
    # `_meets_itself` looks at two.
    wanted = [
        2,
        *(int(metric.partition("@")[2]) for metric in metrics if _has_k(metric)),
    ]
    if "map@r" in metrics or "r_precision" in metrics:
        wanted.append(int(positives.max()))
    return max(wanted)


def _vote(neighbours: np.ndarray) -> np.ndarray:
    """The most frequent code of every row; of equally frequent codes the first."""
    best = neighbours[:, 0].copy()
    most = np.zeros(len(neighbours), np.int64)
    # A later label must be more frequent to win, so of equals the nearest stays.
    for column in neighbours.T:
        count = (neighbours == column[:, None]).sum(axis=1)
        count[column < 0] = 0  # rows that are left out
        better = count > most
        best[better], most[better] = column[better], count[better]
    return best


def _clustering(
    rows: np.ndarray, codes: np.ndarray, metrics: Sequence[str], seed: int
) -> dict[str, float]:
    """`nmi` and `ami` of a k-means clustering, as far as `metrics` asks for them."""
    try:
        from sklearn import cluster
        from sklearn import metrics as scores
    except ImportError as error:
        raise ImportError(
            "The metrics 'nmi' and 'ami' need scikit-learn: pip install scikit-learn."
        ) from error
    count = len(np.unique(codes))
    clusters = cluster.KMeans(count, n_init=1, random_state=seed).fit_predict(rows)
    functions = (
        scores.normalized_mutual_info_score,
        scores.adjusted_mutual_info_score,
    )
    return {
        metric: float(score(codes, clusters))
        for metric, score in zip(CLUSTERING, functions, strict=True)
        if metric in metrics
    }


def check_metrics(metrics: Any) -> tuple[str, ...]:
    """The metric words of `retrieval_metrics`, else an error for the first unknown word."""
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if not metrics:
        raise _checks.value_error("metrics", "at least one metric word", metrics)
    for metric in metrics:
        if isinstance(metric, str) and _has_k(metric):
            continue
        # As others write it: mAP, mINP, Recall@1, rank-1, R@1.
        word = re.sub("^(rank[-_@ ]?|r@)", "cmc@", str(metric).lower())
        if word != metric and (word in _WORDS or _has_k(word)):
            expected, advice = "a metric word", f"Did you mean {word!r}?"
            raise _checks.value_error("metrics", expected, metric, advice)
        _checks.one_of("metrics", metric, _WORDS)
    return metrics


def _has_k(metric: str) -> bool:
    """Whether a metric word ends with a number of neighbours, as "recall@5" does."""
    return re.fullmatch(r"(recall|cmc|precision|knn)@[1-9][0-9]*", metric) is not None


def label_table(name: str, value: Any, length: int) -> LabelTable:
    """The table of `length` labels, else an error with the name of the argument."""
    table = LabelTable(value, name=name)
    if len(table.codes) != length:
        words = "groups" if name.endswith("groups") else "labels"
        raise _checks.value_error(
            name, f"{length} {words}", _checks.Told(f"{len(table.codes)} {words}")
        )
    return table


def common_codes(
    own: LabelTable, others: LabelTable, name: str = "labels"
) -> tuple[np.ndarray, np.ndarray]:
    """The codes of two sets of labels by one common table of classes.

    Args:
        own: `labels`, or the argument `name`.
        others: `gallery_labels`, or the argument `name` with "gallery_" before it.
        name: what errors call the two arguments.
    """
    if own.kind != others.kind:
        expected = f"{name} of the same kind as `{name}`, {own.kind}"
        example = f"{others.kind}, such as {others.classes.tolist()[0]!r}"
        raise _checks.type_error(f"gallery_{name}", expected, _checks.Told(example))
    tables = [own.classes, others.classes]
    if own.classes.dtype != others.classes.dtype:
        # NumPy would join int64 and uint64 as floats; Python integers are exact.
        tables = [classes.astype(object) for classes in tables]
    both = LabelTable(np.concatenate(tables), name=f"gallery_{name}")
    return both.encode(own.classes)[own.codes], both.encode(others.classes)[
        others.codes
    ]


def _codes(
    name: str, own: Any, others: Any, lengths: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The codes of the labels or groups of the queries, and of the rows to search in."""
    table = label_table(name, own, lengths[0])
    if others is None:
        return table.codes, table.codes
    return common_codes(table, label_table(f"gallery_{name}", others, lengths[1]), name)


def check_groups(gallery: Any, groups: Any, gallery_groups: Any) -> None:
    """An error if one of `gallery`, `groups` and `gallery_groups` lacks another one."""
    if groups is not None and gallery is not None and gallery_groups is None:
        raise _checks.value_error(
            "gallery_groups", "the groups of `gallery` beside `groups`", gallery_groups
        )
    if gallery_groups is not None and (gallery is None or groups is None):
        lacking = "gallery" if gallery is None else "groups"
        raise _checks.value_error(
            "gallery_groups", f"`{lacking}` with it", gallery_groups
        )


def _check_positives(
    positives: np.ndarray, same_label: np.ndarray, gallery: bool, groups: bool
) -> None:
    """An error if no query has a positive: for want of labels, or because of the groups."""
    if (positives > 0).any():
        return
    if not groups or not same_label.any():
        expected = "a label of the gallery" if gallery else "a label that occurs twice"
        told = _checks.Told(
            f"{len(positives)} queries without another row of their label"
        )
        raise _checks.value_error("labels", expected, told)
    where = "another group of the gallery" if gallery else "two groups"
    expected = f"a label that occurs in {where}"
    counts = (same_label > 0).sum(), (same_label == 0).sum()
    told = _checks.Told(
        f"{counts[0]} queries whose label occurs in their own group alone, and "
        f"{counts[1]} without another row of their label"
    )
    raise _checks.value_error("groups", expected, told)
