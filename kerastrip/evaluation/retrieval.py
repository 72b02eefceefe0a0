"""Retrieval figures of a set of embeddings: how good are the nearest neighbours?

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
    "shared_rows",
    "themselves",
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
    query's label, and hit(i) whether its i-th neighbour is one of them:

    | word | mean over the queries of |
    |---|---|
    | `recall@k` | 1 if one of the first k neighbours is a hit, else 0 |
    | `precision@k` | 1/k sum_{i<=k} hit(i) |
    | `r_precision` | 1/R sum_{i<=R} hit(i) |
    | `map@r` | 1/R sum_{i<=R} hit(i) precision@i |
    | `mrr` | 1 / rank of the first hit |
    | `knn@k` | 1 if most of the first k neighbours have the label; of labels with as many, the one met first wins |
    | `nmi`, `ami` | (not a mean) normalised and adjusted mutual information of the labels and a k-means clustering of the queries into as many clusters; needs scikit-learn |

    A query with R = 0 has no partner to be found. It is left out of the means and
    counted. Equal distances are in the order of the rows.

    A query that is in the gallery itself would find itself first. Where `gallery` is
    the same array, or a view of the same memory, every query is looked up without
    itself. Copies cannot be told for certain: a warning counts the queries that have
    an equal row of their label there.

    Args:
        embeddings: (n, dim) finite numbers.
        labels: (n,) integers or strings, or (n, classes) one-hot rows.
        gallery: (m, dim) embeddings to search in. Default: `embeddings`, each row
            without itself.
        gallery_labels: labels of `gallery`.
        metrics: words of the table, k at least 1. If there are fewer than k
            neighbours, `recall@k` and `knn@k` take all there are, and
            `precision@k` counts the missing ones as misses.
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`. The
            arrays do not tell what they were trained with: give that of the loss, which
            `RetrievalEvaluation` reads from the model.
        seed: of the k-means behind `nmi` and `ami`. Default 0.
        verbose: whether to show a progress bar once it takes over two seconds.
            Default False.

    Returns:
        Dict with one float in [0, 1] (`ami` also below 0) per word, in the order
        of `metrics`, and the counts `"queries"` (those in the means) and
        `"lone_queries"` (those left out).

    Raises:
        TypeError, ValueError: if arrays do not fit each other, a word is unknown,
            or no query has a partner.

    Example:

    >>> found = retrieval_metrics(
    ...     [[0.0], [1.0], [5.0], [7.0], [99.0]], ["a", "a", "b", "b", "c"],
    ...     metrics=("recall@1", "map@r"),
    ... )
    >>> found
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
        _checks.warn(themselves(met, len(embeddings)))
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
    """What `retrieval_metrics` returns, and the queries that seem to find themselves.

    Args:
        embeddings, labels, gallery, gallery_labels: as there.
        own: (n,) the row of the gallery that is the query itself, -1 where none is
            known; None for none at all. These rows are left out.
        metrics, distance, seed, verbose: as there.

    Returns:
        The dict, and the numbers of the queries without such a row whose nearest row
        is equal to them and of their label.
    """
    metrics = check_metrics(metrics)
    lookup = _Lookup.of(embeddings, labels, gallery, gallery_labels, own)
    partners = lookup.partners()
    chosen = np.flatnonzero(partners > 0)
    if not len(chosen):
        where = "that occurs twice" if gallery is None else "of the gallery"
        told = _checks.Told(f"{len(partners)} labels without a partner")
        raise _checks.value_error("labels", f"a label {where}", told)
    # Queries of like R together: each block then looks no further than it needs.
    chosen = chosen[np.argsort(partners[chosen], kind="stable")]
    sums = dict.fromkeys(metrics, 0.0)
    met = [np.empty(0, np.int64)]
    space = Space.of(lookup.queries[chosen], lookup.rows, distance)
    for part, numbers in space.blocks(verbose=verbose):
        who = chosen[part]
        depth = _depth(metrics, partners[who], len(lookup.rows))
        block = _Block.of(lookup, who, partners[who], numbers, depth)
        alone = lookup.own[who] < 0
        if alone.any():
            met.append(who[_meets_itself(space, part, block) & alone])
        for word in sums:
            if word not in _CLUSTERING:
                sums[word] += float(block.values(word).sum())
    results = {word: total / len(chosen) for word, total in sums.items()}
    if not set(_CLUSTERING).isdisjoint(metrics):
        results |= _clustering(lookup.queries, lookup.codes, metrics, seed)
    results |= {"queries": len(chosen), "lone_queries": len(partners) - len(chosen)}
    return results, np.sort(np.concatenate(met))


class _Lookup(NamedTuple):
    """What is looked up where.

    Attributes:
        queries: (n, dim) embeddings.
        rows: (m, dim) embeddings to search in.
        codes: (n,) labels of the queries as codes.
        row_codes: (m,) labels of the rows, by the same table.
        own: (n,) the row that is the query itself, -1 for none.
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

    def partners(self) -> np.ndarray:
        """(n,) R of every query: the rows of its label but itself."""
        size = self.codes.max() + 1
        counts = np.bincount(self.row_codes, minlength=size)[self.codes]
        return counts - ((self.own >= 0) & (self.row_codes[self.own] == self.codes))


class _Block(NamedTuple):
    """The queries of one block, and what they find.

    Attributes:
        numbers: (n, m) distances to all rows, infinity to the query itself.
        codes: (n,) labels of the queries.
        row_codes: (m,) labels of the rows.
        partners: (n,) R of the queries, at least 1.
        found: (n, depth) the nearest rows.
        neighbours: (n, depth) their labels. A query is no neighbour of its own, however
            far one looks: there, -1.
        hits: (n, depth) whether these are the labels of the queries.
    """

    numbers: np.ndarray
    codes: np.ndarray
    row_codes: np.ndarray
    partners: np.ndarray
    found: np.ndarray
    neighbours: np.ndarray
    hits: np.ndarray

    @classmethod
    def of(
        cls,
        lookup: _Lookup,
        who: np.ndarray,
        partners: np.ndarray,
        numbers: np.ndarray,
        depth: int,
    ) -> _Block:
        """The block of the queries `who`; writes into the (n, m) `numbers`."""
        codes, own = lookup.codes[who], lookup.own[who]
        known = np.flatnonzero(own >= 0)
        numbers[known, own[known]] = np.inf
        found = nearest(numbers, depth)
        neighbours = lookup.row_codes[found]
        neighbours[found == own[:, None]] = -1
        hits = neighbours == codes[:, None]
        return cls(numbers, codes, lookup.row_codes, partners, found, neighbours, hits)

    def values(self, word: str) -> np.ndarray:
        """(n,) what the metric `word` is the mean of."""
        name, _, k = word.partition("@")
        if word in ("map@r", "r_precision"):
            rank = np.arange(1, self.hits.shape[1] + 1)
            hits_within_r = self.hits & (rank <= self.partners[:, None])
            if word == "r_precision":
                return hits_within_r.sum(axis=1) / self.partners
            precision = np.cumsum(self.hits, axis=1) / rank
            return (precision * hits_within_r).sum(axis=1) / self.partners
        if word == "mrr":
            return 1.0 / self._first_rank()
        if name == "recall":
            return self.hits[:, : int(k)].max(axis=1)
        if name == "precision":
            return self.hits[:, : int(k)].sum(axis=1) / int(k)
        return _vote(self.neighbours[:, : int(k)]) == self.codes  # knn@k

    def _first_rank(self) -> np.ndarray:
        """(n,) rank, from 1, of the first hit of every query among all rows."""
        ranks = self.hits.argmax(axis=1) + 1
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
        (n,) int64, -1 where there is none; None if no row is shared.
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
    offsets = begin - gallery_begin + np.arange(len(queries)) * queries.strides[0]
    rows, rest = np.divmod(offsets, gallery.strides[0])
    rows[(rest != 0) | (rows < 0) | (rows >= len(gallery))] = -1
    return rows if (rows >= 0).any() else None


def themselves(met: np.ndarray, queries: int) -> str:
    """What to tell of queries that are in the gallery."""
    return (
        f"{len(met)} of {queries} queries have an equal row of their own label in "
        f"`gallery`, the first is query {met[0]}. If they are the same samples, they "
        "find themselves and the figures are too good: leave these samples out of the "
        "gallery, or leave out `gallery` to look up every sample among all others."
    )


def _meets_itself(space: Space, part: slice, block: _Block) -> np.ndarray:
    """Which queries of one block have the same sample, of their label, as nearest row.

    A second forward pass may round otherwise, so that equal means: much nearer than
    the row after it. Where many rows are equal (a collapsed model, data of few
    values) nothing can be told.
    """
    if block.found.shape[1] < 2:
        return np.zeros(len(block.found), bool)
    two = row_distances(
        space.queries[part, None], space.gallery[block.found[:, :2]], "euclidean"
    )
    first = two.argmin(axis=1)[:, None]
    nearer, farther = two.min(axis=1), two.max(axis=1)
    equal = (nearer <= _ITSELF * farther) & (farther > 0)
    return equal & np.take_along_axis(block.hits, first, axis=1)[:, 0]


def _depth(metrics: Sequence[str], partners: np.ndarray, available: int) -> int:
    """How many neighbours the metrics of one block look at."""
    wanted = [2, *(int(word.partition("@")[2]) for word in metrics if _has_k(word))]
    if "map@r" in metrics or "r_precision" in metrics:
        wanted.append(int(partners.max()))
    return min(max(wanted), available)


def _vote(neighbours: np.ndarray) -> np.ndarray:
    """The most frequent code of every row; of equally frequent ones the first."""
    best = neighbours[:, 0].copy()
    most = np.zeros(len(neighbours), np.int64)
    for column in neighbours.T:
        count = (neighbours == column[:, None]).sum(axis=1)
        better = count > most
        best[better], most[better] = column[better], count[better]
    return best


def _clustering(
    rows: np.ndarray, codes: np.ndarray, metrics: Sequence[str], seed: int
) -> dict[str, float]:
    """`nmi` and `ami` of a k-means clustering, those of them that are wanted."""
    try:
        from sklearn import cluster
        from sklearn import metrics as scores
    except ImportError as error:
        raise ImportError(
            "The metrics 'nmi' and 'ami' need scikit-learn: pip install scikit-learn."
        ) from error
    count = len(np.unique(codes))
    found = cluster.KMeans(count, n_init=1, random_state=seed).fit_predict(rows)
    functions = (
        scores.normalized_mutual_info_score,
        scores.adjusted_mutual_info_score,
    )
    return {
        word: float(score(codes, found))
        for word, score in zip(_CLUSTERING, functions, strict=True)
        if word in metrics
    }


def check_metrics(metrics: Any) -> tuple[str, ...]:
    """The words of `retrieval_metrics`, else an error that names the wrong one."""
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if not metrics:
        raise _checks.value_error("metrics", "at least one word", metrics)
    for word in metrics:
        if not (isinstance(word, str) and _has_k(word)):
            _checks.one_of("metrics", word, (*METRICS, "knn@5", *_CLUSTERING))
    return metrics


def _has_k(word: str) -> bool:
    return re.fullmatch(r"(recall|precision|knn)@[1-9][0-9]*", word) is not None


def label_table(name: str, value: Any, length: int) -> LabelTable:
    """The table of `length` labels, else an error that names them."""
    table = LabelTable(value, name=name)
    if len(table.codes) != length:
        raise _checks.value_error(
            name, f"{length} labels", _checks.Told(f"{len(table.codes)} labels")
        )
    return table


def common_codes(own: LabelTable, others: LabelTable) -> tuple[np.ndarray, np.ndarray]:
    """The codes of two sets of labels by one table."""
    kinds = [table.classes.dtype.kind in "iu" for table in (own, others)]
    if kinds[0] != kinds[1]:
        raise _checks.type_error(
            "gallery_labels", "labels of the same kind as `labels`", others.classes
        )
    both = LabelTable(np.concatenate([own.classes, others.classes]))
    return both.encode(own.classes)[own.codes], both.encode(others.classes)[
        others.codes
    ]
