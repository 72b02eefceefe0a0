"""Contrastive loss over all pairs of the batch."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerastrip import _checks
from kerastrip.distances import DISTANCES
from kerastrip.losses._label_loss import LabelLoss
from kerastrip.mining.engine import AVERAGES, contrastive_losses

__all__ = [
    "ContrastiveLoss",
]


@keras.saving.register_keras_serializable(package="kerastrip")
class ContrastiveLoss(LabelLoss):
    """Contrastive loss of every pair of rows in the batch.

    With d the distance of two different rows, y = 1 if their labels agree and else 0,
    m+ the positive and m- the negative margin:

        y * max(0, d - m+)^2 / 2  +  (1 - y) * max(0, m- - d)^2 / 2

    averaged over all batch * (batch - 1) ordered pairs. With m+ = 0 this is the
    formula of Hadsell, Chopra and LeCun; a positive m+ stops pulling rows that are
    near enough, which keeps classes from collapsing to a point.

    The model embeds single samples, and the loss makes the pairs. A siamese model with
    two inputs, which returns their distance (batch, 1), is for other losses: predictions
    of dimension 1 are met with a warning.

    Corner cases: a batch of one row, or of no row, has no pair and value 0; two rows at
    distance 0 get gradient 0 (there is no direction to push them in).

    Args:
        positive_margin: m+, >= 0, in units of the distance. Pairs of one class nearer
            than this cost nothing. Default 0.
        negative_margin: m-, > 0. Pairs of two classes farther than this cost nothing.
            Default 1.
        distance: `"euclidean"`, `"squared_euclidean"` or `"cosine"` (1 - cos).
        average_over: `"all"` pairs, or the `"active"` pairs, whose loss is > 0.
        gather: under a `tf.distribute` strategy, take the pairs of the batch of all
            replicas, as in `TripletLoss`. Default False.
        name: name of the loss.
        reduction: of the (batch,) values, as in `keras.losses.Loss`.
        dtype: as in `keras.losses.Loss`. Distances are float32 in any case.

    Call arguments: `y_true` are labels, (batch,) or (batch, 1) integers or
    (batch, classes) one-hot, as in `TripletLoss`; `y_pred` are embeddings, (batch, dim).

    Returns:
        With `reduction=None` (batch,) values, one per row, whose mean is the loss.

    Raises:
        ValueError: for margins out of range or unknown words; when called, for labels
            that name no class (see `TripletLoss`).
        TypeError: for margins that are not numbers.

    Example:

    >>> loss = ContrastiveLoss(negative_margin=1.0)
    >>> rows = [[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]]
    >>> float(loss([0, 0, 1], rows))  # 2 of 6 pairs: 1/2 each
    0.1666...

    References:
        Hadsell, Chopra, LeCun, "Dimensionality reduction by learning an invariant
        mapping", 2006, equation 4.
    """

    def __init__(
        self,
        positive_margin: float = 0.0,
        negative_margin: float = 1.0,
        distance: str = "euclidean",
        average_over: str = "all",
        gather: bool = False,
        *,
        name: str = "contrastive_loss",
        reduction: str | None = "sum_over_batch_size",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.positive_margin = _checks.number(
            "positive_margin", positive_margin, minimum=0
        )
        self.negative_margin = _checks.number(
            "negative_margin", negative_margin, above=0
        )
        self.distance = _checks.one_of("distance", distance, DISTANCES)
        self.average_over = _checks.one_of("average_over", average_over, AVERAGES)
        self.gather = _checks.boolean("gather", gather)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """(batch,) values; see the class."""
        y_pred = ops.convert_to_tensor(y_pred)
        if y_pred.shape[-1] == 1:
            _checks.warn(
                "ContrastiveLoss got predictions of shape (batch, 1) and takes them for "
                "embeddings of dimension 1. If they are distances of pairs, as a siamese "
                "model with two inputs returns them, let the model embed single samples "
                "instead, give their classes as labels, and this loss makes all pairs of "
                "the batch.",
            )
        return contrastive_losses(
            y_true,
            y_pred,
            positive_margin=self.positive_margin,
            negative_margin=self.negative_margin,
            distance=self.distance,
            average_over=self.average_over,
        )

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "positive_margin": self.positive_margin,
            "negative_margin": self.negative_margin,
            "distance": self.distance,
            "average_over": self.average_over,
            "gather": self.gather,
        }
