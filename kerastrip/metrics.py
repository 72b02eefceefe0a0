"""TripletCensus: what the mining sees, as a Keras metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from kerastrip import _checks
from kerastrip._mining_blocks import choose
from kerastrip._numerics import integer_labels, nan_unless, plain
from kerastrip._replicas import gathered, whole
from kerastrip.distances import DISTANCES
from kerastrip.mining import Census, triplet_census

Others = Any

KEYS = (
    "easy",
    "semi_hard",
    "hard",
    "active",
    "pairs_with_semi_hard",
    "anchors_without_positive",
    "pos_dist",
    "neg_dist",
    "norm",
    "norm_std",
    "spread",
    "effective_dim",
)

# What is summed over rows and batches; every figure is a ratio of two of these.
_COUNTS = (
    "triplets",
    "easy",
    "semi_hard",
    "hard",
    "pairs",
    "pairs_with_semi_hard",
    "negative_pairs",
    "lonely",
    "rows",
    "from_memory",
)
_SUMS = (
    *_COUNTS,
    "pos_dist",
    "neg_dist",
    "norm",
    "norm_apart",
    "spread",
    "dimensions",
    "batches",
)


def _effective_dim(rows: Any, total: Any) -> Any:
    """Participation ratio tr(C)^2 / tr(C^2) of the centred rows.

    Args:
        rows: (batch, dim) float32, centred.
        total: sum of the squares of `rows`.
    """
    unit = rows / ops.sqrt(ops.maximum(total, 1e-30))
    size, dim = ops.shape(unit)
    # Both Gram matrices have the same sum of squares: take the smaller one.
    squares = choose(
        size < dim,
        lambda: ops.sum(ops.square(ops.matmul(unit, ops.transpose(unit)))),
        lambda: ops.sum(ops.square(ops.matmul(ops.transpose(unit), unit))),
    )
    return 1.0 / ops.maximum(squares, 1e-30)


def _triplets_within(labels: Any) -> Any:
    """(batch,) int32: triplets of every anchor with rows of the batch alone."""
    ordered = ops.sort(labels)
    first, stop = (
        ops.cast(ops.searchsorted(ordered, labels, side), "int32")
        for side in ("left", "right")
    )
    return (stop - first - 1) * (ops.shape(labels)[0] - (stop - first))


def _measure(
    labels: Any,
    embeddings: Any,
    margin: float,
    distance: str,
    gather: bool,
    others: Others | None,
) -> tuple:
    """The sums of one batch as two float32 vectors whose sum is exact for counts.

    With `gather` they are sums over the rows of this replica, whose triplets are those
    with all rows of the batch.
    """
    embeddings = ops.cast(plain("embeddings", embeddings), "float32")
    embeddings = ops.stop_gradient(embeddings)
    labels, known = integer_labels(labels)
    embeddings = nan_unless(known, embeddings)
    own_part: Callable[[Any], Any] = whole
    if gather:
        labels, embeddings, own_part = gathered(labels, embeddings)
    census = triplet_census(labels, embeddings, margin=margin, distance=distance)
    census = Census(*(own_part(field) for field in census))
    triplets = census.positives * census.negatives
    within = triplets if others is None else _triplets_within(labels)
    counts = ops.stack(
        [
            triplets,
            census.easy,
            census.semi_hard,
            census.hard,
            census.positives,
            census.pairs_with_semi_hard,
            census.negatives,
            ops.cast(ops.equal(census.positives, 0), "int32"),
            ops.ones_like(census.positives),
            triplets - within,
        ]
    )
    # An int32 sum would overflow and a float32 sum would round: sum the two halves.
    upper = ops.floor_divide(counts, 65536)
    lower = ops.cast(ops.sum(counts - 65536 * upper, axis=1), "float32")
    upper = 65536.0 * ops.cast(ops.sum(upper, axis=1), "float32")

    squares = ops.sum(ops.square(embeddings), axis=1)
    lengths = ops.sqrt(squares)
    lengths_apart = ops.square(lengths - ops.mean(lengths))
    centred = embeddings - ops.mean(embeddings, axis=0, keepdims=True)
    apart = ops.sum(ops.square(centred), axis=1)
    spread = ops.sum(apart)
    # Below the rounding of the mean the rows are one point, of no dimension.
    is_point = spread <= 1e-12 * ops.sum(squares)
    dimension = ops.where(is_point, 0.0, _effective_dim(centred, spread))
    sums = ops.stack(
        [
            ops.sum(census.pos_dist),
            ops.sum(census.neg_dist),
            ops.sum(own_part(lengths)),
            ops.sum(own_part(lengths_apart)),
            ops.sum(own_part(apart)),
            dimension,
            ops.ones_like(spread),
        ]
    )
    # A comparison with NaN counts as false, so that the counts look like figures: one
    # number that is not finite makes NaN of all of them. (0 * x would not do: TensorFlow's
    # graph optimiser turns it into 0.)
    is_finite = ops.isfinite(ops.sum(squares) + ops.sum(sums[:2]))
    upper = upper + ops.where(is_finite, 0.0, float("nan"))
    sums = sums + ops.where(is_finite, 0.0, float("nan"))
    zeros = ops.zeros_like(sums)
    return ops.concatenate([upper, sums]), ops.concatenate([lower, zeros])


def _rounding_error(total: Any, value: Any) -> Any:
    """What float32 loses in `total + value` (Knuth's two-sum)."""
    new = total + value
    virtual = new - total
    return (total - (new - virtual)) + (value - virtual)


def _figures(totals: Any) -> dict[str, Any]:
    """The ratios from the summed vector."""
    value = dict(zip(_SUMS, ops.unstack(totals, len(_SUMS)), strict=True))

    def ratio(part: Any, whole: str) -> Any:
        return part / ops.maximum(value[whole], 1.0)

    return {
        "easy": ratio(value["easy"], "triplets"),
        "semi_hard": ratio(value["semi_hard"], "triplets"),
        "hard": ratio(value["hard"], "triplets"),
        "active": ratio(value["semi_hard"] + value["hard"], "triplets"),
        "pairs_with_semi_hard": ratio(value["pairs_with_semi_hard"], "pairs"),
        "anchors_without_positive": ratio(value["lonely"], "rows"),
        "pos_dist": ratio(value["pos_dist"], "pairs"),
        "neg_dist": ratio(value["neg_dist"], "negative_pairs"),
        "norm": ratio(value["norm"], "rows"),
        "norm_std": ops.sqrt(ratio(value["norm_apart"], "rows")),
        "spread": ratio(value["spread"], "rows"),
        "effective_dim": ratio(value["dimensions"], "batches"),
        "from_memory": ratio(value["from_memory"], "triplets"),
    }


@keras.saving.register_keras_serializable(package="kerastrip")
class TripletCensus(keras.metrics.Metric):
    """Exact census of the triplets of every batch, reported as one dict.

    With d the distance and m the margin, a triplet (anchor, positive, negative) is
    *hard* if d(a,n) <= d(a,p), *semi-hard* if d(a,p) < d(a,n) < d(a,p) + m, else
    *easy*. Over all triplets of the batches seen since the last reset:

    | key | meaning |
    |---|---|
    | `easy`, `semi_hard`, `hard` | fractions of all triplets; they sum to 1 |
    | `active` | fraction with a hinge loss above 0 = `semi_hard` + `hard` |
    | `pairs_with_semi_hard` | fraction of (anchor, positive) pairs that have a semi-hard negative |
    | `anchors_without_positive` | fraction of rows that are alone with their label |
    | `pos_dist`, `neg_dist` | mean distance of pairs of one label / of different labels |
    | `norm` | mean euclidean length of the embeddings |
    | `norm_std` | standard deviation of that length within a batch; 0 behind a `UnitNormalization` |
    | `spread` | mean squared distance to the batch mean; 0 when all are one point |
    | `effective_dim` | tr(C)^2 / tr(C^2) of the batch covariance C, mean over batches: 1 for a line, 0 for a point |

    Counts are exact per batch for the float32 distances used; across batches they
    are added with compensation, so that an epoch may hold any number of triplets.
    Without any triplet every fraction is 0. As soon as one embedding is NaN or infinite
    every figure is NaN, until the next reset. Sample weights are ignored. Under a
    `tf.distribute` strategy the triplets are those within each replica, or with
    `gather=True` those of the whole batch.

    Args:
        margin: float > 0, in units of `distance`. Default 0.2.
        distance: `"euclidean"`, `"squared_euclidean"` or `"cosine"`.
        gather: take the rows of all replicas together, as `TripletLoss` does.
        prefix: str put before every key, to tell two of them apart.
        name: name of the metric.
        dtype: a dtype or policy, kept for Keras; the sums are float32 whatever it is.

    Raises:
        ValueError, TypeError: from the constructor, for bad arguments.

    Example:

    >>> import numpy as np
    >>> census = TripletCensus(margin=0.5)
    >>> census.update_state([0, 0, 1], np.array([[0.0], [1.0], [1.25]], "float32"))
    >>> {key: round(float(value), 2) for key, value in census.result().items()}
    {'easy': 0.0, 'semi_hard': 0.5, 'hard': 0.5, ...}
    """

    def __init__(
        self,
        margin: float = 0.2,
        distance: str = "euclidean",
        *,
        gather: bool = False,
        prefix: str = "",
        name: str = "triplet_census",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.margin = _checks.number("margin", margin, above=0)
        self.distance = _checks.one_of("distance", distance, DISTANCES)
        self.gather = _checks.boolean("gather", gather)
        if not isinstance(prefix, str):
            raise TypeError(_checks.message("prefix", "a str", prefix))
        self.prefix = prefix
        # Takes this metric's part from whole targets and outputs: MiningStats sets
        # it, because training steps hand every metric all of them.
        self.take: Callable[[Any], Any] = whole
        # Set by MiningStats, too, for a loss that mines in a memory and reports it.
        self.with_memory = False
        self._total, self._rest, self._latest = (
            self.add_variable((len(_SUMS),), "zeros", "float32", name=name)
            for name in ("total", "rest", "latest")
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of `result()`."""
        keys = (*KEYS, "from_memory") if self.with_memory else KEYS
        return tuple(f"{self.prefix}{key}" for key in keys)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Count one batch.

        Args:
            y_true: labels, integers (batch,), (batch, 1) or one-hot (batch, classes).
            y_pred: embeddings (batch, dim).
            sample_weight: ignored.
        """
        self._count(self.take(y_true), self.take(y_pred), self.gather)

    def update_with(self, labels: Any, embeddings: Any, others: Others) -> None:
        """Count one batch, gathered already, with remembered rows beside it.

        Args:
            labels: (batch,) integers.
            embeddings: (batch, dim).
            others: the rows beside the batch.
        """
        self._count(labels, embeddings, False, others)

    def _count(
        self, labels: Any, embeddings: Any, gather: bool, others: Others | None = None
    ) -> None:
        value, rest = _measure(
            labels, embeddings, self.margin, self.distance, gather, others
        )
        error = _rounding_error(self._total, value)
        self._total.assign_add(value)
        self._rest.assign_add(error + rest)
        self._latest.assign(value + rest)

    def result(self) -> dict[str, Any]:
        """The figures over all batches since the last reset, a dict of scalars."""
        return self._report(self._total + self._rest)

    def of_latest_batch(self) -> dict[str, Any]:
        """The figures of the last batch alone, a dict of scalars."""
        return self._report(self._latest + 0.0)

    def _report(self, totals: Any) -> dict[str, Any]:
        figures = _figures(totals)
        return {key: figures[key.removeprefix(self.prefix)] for key in self.keys}

    def get_config(self) -> dict[str, Any]:
        """Everything the constructor takes."""
        return {
            **super().get_config(),
            "margin": self.margin,
            "distance": self.distance,
            "gather": self.gather,
            "prefix": self.prefix,
        }
