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
from kerastrip._labels import LabelTable
from kerastrip.evaluation.search import (
    Space,
    embeddings_array,
    nearest,
    row_distances,
)

__all__ = [
    "METRICS",
    "check_metrics",
    "common_codes",
    "label_table",
    "lookup_figures",
    "retrieval_metrics",
    "self_match_warning",
    "shared_rows",
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
_CLUSTERING = ("nmi", "ami")
# A nearest row this much nearer than the second nearest is the query itself.
_ITSELF = 1e-4


def retrieval_metrics(
    embeddings: Any,
    labels: Any,
    *,
    gallery: Any = None,
    gallery_labels: Any = None,
    metrics: Sequence[str] = METRICS,
    distance: str = "euclidean",
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
    | `precision@k` | 1/k sum_{i<=k} hit(i) |
    | `r_precision` | 1/R sum_{i<=R} hit(i) |
    | `map@r` | 1/R sum_{i<=R} hit(i) precision@i |
    | `mrr` | 1 / rank of the first hit |
    | `knn@k` | 1 if the most frequent label of the first k neighbours is the query's; of equally frequent labels, that of the nearest neighbour counts |
    | `nmi`, `ami` | (not a mean) normalised and adjusted mutual information of the labels and a k-means clustering of the queries into as many clusters; needs scikit-learn |

    A query with R = 0, without a positive, is left out of the means and counted in
    `lone_queries`. Neighbours at equal distances stand in the order of the rows.

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
        metrics: metric words of the table, k at least 1. If there are fewer than k
            neighbours, `recall@k` and `knn@k` take all there are, and
            `precision@k` counts the missing ones as misses.
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`. The
            arrays do not tell which distance they were trained with: give the distance
            of the loss, which `RetrievalEvaluation` reads from the model.
        seed: seed of the k-means clustering behind `nmi` and `ami`. Default 0.
        verbose: whether to show a progress bar once it takes over two seconds.
            Default False.

    Returns:
        Dict with one float in [0, 1] (`ami` also below 0) per metric word, in the
        order of `metrics`, and the counts `"queries"` (queries in the means) and
        `"lone_queries"` (queries without a positive, left out of the means).

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

    References:
        Musgrave, Belongie, Lim, "A Metric Learning Reality Check", 2020,
        section 3.2 (R-precision and MAP@R).
    """
    if (gallery is None) != (gallery_labels is None):
        raise _checks.value_error(
            "gallery", "`gallery` and `gallery_labels` together", gallery
        )
    own = None if gallery is None else shared_rows(embeddings, gallery)
    results, met = lookup_figures(
        embeddings,
        labels,
        gallery,
        gallery_labels,
        own=own,
        metrics=metrics,
        distance=distance,
        seed=seed,
        verbose=verbose,
    )
    if len(met):
        _checks.warn(self_match_warning(met, len(embeddings)))
    return results


def lookup_figures(
    embeddings: Any,
    labels: Any,
    gallery: Any,
    gallery_labels: Any,
    *,
    own: np.ndarray | None,
    metrics: Sequence[str],
    distance: str,
    seed: int = 0,
    verbose: bool = False,
) -> tuple[dict[str, float], np.ndarray]:
    """The dict of `retrieval_metrics`, and the queries that seem to find themselves.

    Args:
        embeddings, labels, gallery, gallery_labels: as for `retrieval_metrics`.
        own: (n,) for each query the row of the gallery that is the query itself, which
            is left out of the neighbours; -1 where no such row is known. None if no
            such row is known for any query.
        metrics, distance, seed, verbose: as for `retrieval_metrics`.

    Returns:
        The dict of `retrieval_metrics`, and the numbers of the queries that seem to be
        in the gallery although `own` knows no row for them: their nearest row is equal
        to them and has their label.
    """
    metrics = check_metrics(metrics)
    lookup = _Lookup.of(embeddings, labels, gallery, gallery_labels, own)
    positives = lookup.positives()
    chosen = np.flatnonzero(positives > 0)
    if not len(chosen):
        where = "that occurs twice" if gallery is None else "of the gallery"
        received = _checks.Told(f"{len(positives)} labels without a positive")
        raise _checks.value_error("labels", f"a label {where}", received)
    # Queries of similar R stand together, so that each block looks at no more
    # neighbours than its own queries need.
    chosen = chosen[np.argsort(positives[chosen], kind="stable")]
    sums = dict.fromkeys(metrics, 0.0)
    met = [np.empty(0, np.int64)]  # numbers of the queries that meet themselves
    space = Space.of(lookup.queries[chosen], lookup.rows, distance)
    for span, numbers in space.blocks(verbose=verbose):
        who = chosen[span]  # numbers of the queries of this block
        depth = _depth(metrics, positives[who], len(lookup.rows))
        block = _Block.of(lookup, who, positives[who], numbers, depth)
        unknown = lookup.own[who] < 0
        if unknown.any():
            met.append(who[_meets_itself(space, span, block) & unknown])
        for metric in sums:
            if metric not in _CLUSTERING:
                sums[metric] += float(block.values(metric).sum())
    results = {metric: total / len(chosen) for metric, total in sums.items()}
    if not set(_CLUSTERING).isdisjoint(metrics):
        results |= _clustering(lookup.queries, lookup.codes, metrics, seed)
    results |= {"queries": len(chosen), "lone_queries": len(positives) - len(chosen)}
    return results, np.sort(np.concatenate(met))


class _Lookup(NamedTuple):
    """The queries, the rows to search in, and the labels of both.

    Attributes:
        queries: (n, dim) embeddings.
        rows: (m, dim) embeddings to search in.
        codes: (n,) labels of the queries as codes.
        row_codes: (m,) labels of the rows, by the same table.
        own: (n,) the row that is the query itself, -1 where no such row is known.
    """

    queries: np.ndarray
    rows: np.ndarray
    codes: np.ndarray
    row_codes: np.ndarray
    own: np.ndarray

    @classmethod
    def of(
        cls,
        embeddings: Any,
        labels: Any,
        gallery: Any,
        gallery_labels: Any,
        own: np.ndarray | None,
    ) -> _Lookup:
        """Checks the arguments of `lookup_figures`."""
        queries = embeddings_array("embeddings", embeddings)
        table = label_table("labels", labels, len(queries))
        if gallery is None:
            itself = np.arange(len(queries))
            return cls(queries, queries, table.codes, table.codes, itself)
        rows = embeddings_array("gallery", gallery)
        others = label_table("gallery_labels", gallery_labels, len(rows))
        own = np.full(len(queries), -1) if own is None else own
        return cls(queries, rows, *common_codes(table, others), own)

    def positives(self) -> np.ndarray:
        """(n,) R of every query: the number of rows of its label without itself."""
        size = self.codes.max() + 1
        counts = np.bincount(self.row_codes, minlength=size)[self.codes]
        return counts - ((self.own >= 0) & (self.row_codes[self.own] == self.codes))


class _Block(NamedTuple):
    """The queries of one block and their nearest rows. Here n counts these queries.

    Attributes:
        numbers: (n, m) distances to all rows, as `Space.blocks` gives them; infinity
            to the query itself.
        codes: (n,) labels of the queries.
        row_codes: (m,) labels of the rows.
        positives: (n,) R of the queries, at least 1.
        nearest_rows: (n, depth) numbers of the nearest rows.
        neighbours: (n, depth) labels of the nearest rows, -1 for the query itself,
            which comes last where `depth` is the number of all rows.
        hits: (n, depth) whether a neighbour has the label of the query.
    """

    numbers: np.ndarray
    codes: np.ndarray
    row_codes: np.ndarray
    positives: np.ndarray
    nearest_rows: np.ndarray
    neighbours: np.ndarray
    hits: np.ndarray

    @classmethod
    def of(
        cls,
        lookup: _Lookup,
        who: np.ndarray,
        positives: np.ndarray,
        numbers: np.ndarray,
        depth: int,
    ) -> _Block:
        """The block of the queries `who`; writes into the (n, m) `numbers`."""
        codes, own = lookup.codes[who], lookup.own[who]
        known = np.flatnonzero(own >= 0)
        numbers[known, own[known]] = np.inf
        rows = nearest(numbers, depth)  # (n, depth)
        neighbours = lookup.row_codes[rows]
        neighbours[rows == own[:, None]] = -1
        hits = neighbours == codes[:, None]
        return cls(numbers, codes, lookup.row_codes, positives, rows, neighbours, hits)

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
        if name == "recall":
            return self.hits[:, : int(k)].max(axis=1)
        if name == "precision":
            return self.hits[:, : int(k)].sum(axis=1) / int(k)
        if name == "knn":
            return _vote(self.neighbours[:, : int(k)]) == self.codes
        raise NotImplementedError(metric)

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


def shared_rows(queries: Any, gallery: Any) -> np.ndarray | None:
    """The row of `gallery` that lies in the same memory as each row of `queries`.

    Returns:
        (n,) int64, -1 where no row does; None if no row is shared.
    """
    if queries is gallery and np.ndim(queries):
        return np.arange(len(queries))
    # Lists become new arrays, which share nothing.
    queries, gallery = np.asarray(queries), np.asarray(gallery)
    if (
        not np.may_share_memory(queries, gallery)
        or queries.dtype != gallery.dtype
        or queries.shape[1:] != gallery.shape[1:]
        or queries.strides[1:] != gallery.strides[1:]
        or not (gallery.ndim and gallery.strides[0])
    ):
        return None
    begin, gallery_begin = (
        array.__array_interface__["data"][0] for array in (queries, gallery)
    )
    # A row of the queries is a row of the gallery if it begins a whole number of rows
    # after the beginning of the gallery.
    offsets = begin - gallery_begin + np.arange(len(queries)) * queries.strides[0]
    rows, rest = np.divmod(offsets, gallery.strides[0])
    rows[(rest != 0) | (rows < 0) | (rows >= len(gallery))] = -1
    return rows if (rows >= 0).any() else None


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
    same sample if it is `_ITSELF` times nearer than the second nearest row. Where many
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
    equal = (nearer <= _ITSELF * farther) & (farther > 0)
    return equal & np.take_along_axis(block.hits, first, axis=1)[:, 0]


def _depth(metrics: Sequence[str], positives: np.ndarray, available: int) -> int:
    """How many neighbours the metrics of one block look at."""
    # `_meets_itself` looks at two.
    wanted = [
        2,
        *(int(metric.partition("@")[2]) for metric in metrics if _has_k(metric)),
    ]
    if "map@r" in metrics or "r_precision" in metrics:
        wanted.append(int(positives.max()))
    return min(max(wanted), available)


def _vote(neighbours: np.ndarray) -> np.ndarray:
    """The most frequent code of every row; of equally frequent codes the first."""
    best = neighbours[:, 0].copy()
    most = np.zeros(len(neighbours), np.int64)
    # A later label must be more frequent to win, so of equals the nearest stays.
    for column in neighbours.T:
        count = (neighbours == column[:, None]).sum(axis=1)
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
        for metric, score in zip(_CLUSTERING, functions, strict=True)
        if metric in metrics
    }


def check_metrics(metrics: Any) -> tuple[str, ...]:
    """The metric words of `retrieval_metrics`, else an error for the first unknown word."""
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if not metrics:
        raise _checks.value_error("metrics", "at least one metric word", metrics)
    for metric in metrics:
        if not (isinstance(metric, str) and _has_k(metric)):
            _checks.one_of("metrics", metric, (*METRICS, "knn@5", *_CLUSTERING))
    return metrics


def _has_k(metric: str) -> bool:
    """Whether a metric word ends with a number of neighbours, as "recall@5" does."""
    return re.fullmatch(r"(recall|precision|knn)@[1-9][0-9]*", metric) is not None


def label_table(name: str, value: Any, length: int) -> LabelTable:
    """The table of `length` labels, else an error with the name of the argument."""
    table = LabelTable(value, name=name)
    if len(table.codes) != length:
        raise _checks.value_error(
            name, f"{length} labels", _checks.Told(f"{len(table.codes)} labels")
        )
    return table


def common_codes(own: LabelTable, others: LabelTable) -> tuple[np.ndarray, np.ndarray]:
    """The codes of two sets of labels by one common table of classes."""
    # In one array integers would become strings without a word.
    kinds = [table.classes.dtype.kind in "iu" for table in (own, others)]
    if kinds[0] != kinds[1]:
        raise _checks.type_error(
            "gallery_labels", "labels of the same kind as `labels`", others.classes
        )
    both = LabelTable(np.concatenate([own.classes, others.classes]))
    return both.encode(own.classes)[own.codes], both.encode(others.classes)[
        others.codes
    ]
