"""TripletCensus: what the mining sees, as a Keras metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from kerastrip import _checks
from kerastrip._numerics import integer_labels, nan_unless, plain
from kerastrip.distances import DISTANCES
from kerastrip.mining.blocks import choose
from kerastrip.mining.engine import Census, triplet_census
from kerastrip.mining.replicas import gathered, whole

__all__ = [
    "FRACTIONS",
    "KEYS",
    "TripletCensus",
]

# Every figure is the sum of its own name, over rows and batches, divided by another sum.
# Whoever adds one adds a line here, the two sums in `_counts` or `_measure`, and a line in
# the table of `TripletCensus`.
_DIVIDED_BY = {
    "easy": "triplets",
    "semi_hard": "triplets",
    "hard": "triplets",
    "active": "triplets",
    "pairs_with_semi_hard": "pairs",
    "anchors_without_positive": "rows",
    "pos_dist": "pairs",
    "neg_dist": "negative_pairs",
    "norm": "rows",
    "norm_std": "rows",
    "spread": "rows",
    "effective_dim": "batches",
}
KEYS = tuple(_DIVIDED_BY)
# The three kinds of triplets: their fractions sum to 1.
FRACTIONS = ("easy", "semi_hard", "hard")
# The places of the sums in the state of the metric.
_SUMS = tuple(dict.fromkeys((*KEYS, *_DIVIDED_BY.values())))


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


def _counts(census: Census) -> dict[str, Any]:
    """What is counted in every row: (batch,) int32 each."""
    return {
        "triplets": census.positives * census.negatives,
        "easy": census.easy,
        "semi_hard": census.semi_hard,
        "hard": census.hard,
        "active": census.semi_hard + census.hard,
        "pairs_with_semi_hard": census.pairs_with_semi_hard,
        "anchors_without_positive": ops.cast(ops.equal(census.positives, 0), "int32"),
        "pairs": census.positives,
        "negative_pairs": census.negatives,
        "rows": ops.ones_like(census.positives),
    }


def _exact_halves(counts: dict[str, Any]) -> list[dict[str, Any]]:
    """The sum of every count as two float32 scalars, which together are exact.

    An int32 sum would overflow and a float32 sum would round. So c = 65536 u + l is
    taken apart in every row: 3,000 rows of 10^9 = 65536 * 15258 + 51712 triplets have
    the halves 65536 * 45,774,000 and 155,136,000.
    """
    rows = ops.stack(list(counts.values()))  # (counts, batch)
    upper = ops.floor_divide(rows, 65536)
    halves = (
        65536.0 * ops.cast(ops.sum(upper, axis=1), "float32"),
        ops.cast(ops.sum(rows - 65536 * upper, axis=1), "float32"),
    )
    return [
        dict(zip(counts, ops.unstack(half, len(counts)), strict=True))
        for half in halves
    ]


def _cloud(embeddings: Any, own_part: Callable[[Any], Any]) -> dict[str, Any]:
    """Sums that tell where the rows of the batch lie, without their labels: scalars.

    Args:
        embeddings: (batch, dim) float32.
        own_part: takes the rows of this replica.
    """
    squares = ops.sum(ops.square(embeddings), axis=1)  # (batch,)
    lengths = ops.sqrt(squares)
    centred = embeddings - ops.mean(embeddings, axis=0, keepdims=True)
    apart = ops.sum(ops.square(centred), axis=1)  # (batch,)
    spread = ops.sum(apart)
    # Below the rounding of the mean the rows are one point, of no dimension.
    is_point = spread <= 1e-12 * ops.sum(squares)
    return {
        "norm": ops.sum(own_part(lengths)),
        "norm_std": ops.sum(own_part(ops.square(lengths - ops.mean(lengths)))),
        "spread": ops.sum(own_part(apart)),
        "effective_dim": ops.where(is_point, 0.0, _effective_dim(centred, spread)),
        "batches": ops.ones_like(spread),
    }


def _measure(
    labels: Any, embeddings: Any, margin: float, distance: str, gather: bool
) -> tuple[Any, Any]:
    """The sums of one batch as two float32 vectors whose sum is exact for counts.

    With `gather` the sums are over the anchors of this replica; their positives and
    negatives may be rows of any replica.
    """
    embeddings = ops.cast(plain("embeddings", embeddings), "float32")
    embeddings = ops.stop_gradient(embeddings)
    labels, valid = integer_labels(labels)
    embeddings = nan_unless(valid, embeddings)
    own_part: Callable[[Any], Any] = whole
    if gather:
        labels, embeddings, own_part = gathered(labels, embeddings)
    census = triplet_census(labels, embeddings, margin=margin, distance=distance)
    census = Census(*(own_part(field) for field in census))
    upper, lower = _exact_halves(_counts(census))
    sums = {
        **upper,
        **_cloud(embeddings, own_part),
        "pos_dist": ops.sum(census.pos_dist),
        "neg_dist": ops.sum(census.neg_dist),
    }
    value = ops.stack([sums[name] for name in _SUMS])
    rest = ops.stack([lower.get(name, ops.zeros(())) for name in _SUMS])
    # A comparison with NaN counts as false, so that the counts look like figures: one
    # number that is not finite makes NaN of all of them. (0 * x would not do: TensorFlow's
    # graph optimiser turns it into 0.)
    is_finite = ops.isfinite(ops.sum(value))
    return value + ops.where(is_finite, 0.0, float("nan")), rest


def _rounding_error(total: Any, value: Any) -> Any:
    """What float32 loses in `total + value` (Knuth's two-sum)."""
    new = total + value
    virtual = new - total
    return (total - (new - virtual)) + (value - virtual)


def _figures(totals: Any) -> dict[str, Any]:
    """The ratios from the summed vector."""
    value = dict(zip(_SUMS, ops.unstack(totals, len(_SUMS)), strict=True))
    figures = {
        key: value[key] / ops.maximum(value[name], 1.0)
        for key, name in _DIVIDED_BY.items()
    }
    figures["norm_std"] = ops.sqrt(figures["norm_std"])  # a mean of squares so far
    return figures


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
    | `anchors_without_positive` | fraction of rows without another row of their label |
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
        self.prefix = _checks.text("prefix", prefix)
        self._total, self._rest, self._latest = (
            self.add_variable((len(_SUMS),), "zeros", "float32", name=name)
            for name in ("total", "rest", "latest")
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of `result()`."""
        return tuple(f"{self.prefix}{key}" for key in KEYS)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Count one batch.

        Args:
            y_true: labels, integers (batch,), (batch, 1) or one-hot (batch, classes).
            y_pred: embeddings (batch, dim).
            sample_weight: ignored.
        """
        self._count(y_true, y_pred, self.margin, self.distance)

    def _count(
        self, labels: Any, embeddings: Any, margin: float, distance: str
    ) -> None:
        value, rest = _measure(labels, embeddings, margin, distance, self.gather)
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
        return dict(zip(self.keys, _figures(totals).values(), strict=True))

    def get_config(self) -> dict[str, Any]:
        """Everything the constructor takes."""
        return {
            **super().get_config(),
            "margin": self.margin,
            "distance": self.distance,
            "gather": self.gather,
            "prefix": self.prefix,
        }
