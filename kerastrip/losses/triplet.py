"""Triplet losses that mine their triplets inside the batch."""

from __future__ import annotations

from typing import Any

import keras

from kerastrip import _checks
from kerastrip.distances import DISTANCES
from kerastrip.losses._label_loss import LabelLoss
from kerastrip.mining.engine import check_choice, triplet_losses

__all__ = ["TripletLoss"]


@keras.saving.register_keras_serializable(package="kerastrip")
class TripletLoss(LabelLoss):
    """Triplet loss with mining inside the batch.

    With the distance d, margin m, anchor a, positive p and negative n, a triplet costs

        max(0, d(a,p) - d(a,n) + m),    with soft=True  log(1 + exp(d(a,p) - d(a,n)))

    and `mining` says which triplets are taken:

    | mining | unit | what is taken |
    |---|---|---|
    | `"semi_hard"` | pair (a, p) | the nearest n with d(a,n) > d(a,p); if there is none, the farthest n of a |
    | `"semi_hard_or_hard"` | pair (a, p) | the nearest n with d(a,p) < d(a,n) < d(a,p) + m; if there is none, the nearest n of a |
    | `"hard"` | anchor a | its farthest p and its nearest n |
    | `"all"` | triplet | every (a, p, n) |

    The loss is the mean over these units. Units without a positive or without a
    negative are left out of the mean; a batch without any unit has value 0 and
    gradient 0. The selection itself carries no gradient.

    Corner cases: rows at distance 0 get a finite gradient (0 for that distance: it
    has no direction). Negatives at exactly the distance of the positive are hard, not
    semi-hard. Of equally near rows one is taken. Batches work best with several rows
    per class (`PKSampler`). `"all"` takes time in proportion to the triplets, and so
    do the two semi-hard words up to 64 positives of an anchor; beyond they sort the row.

    Args:
        margin: m, > 0, in units of the distance. Default 0.2, meant for embeddings of
            length 1. May be changed between epochs; a compiled model then needs
            `model.make_train_function(force=True)`. With `soft=True` the loss does
            not use it, except to choose in `"semi_hard_or_hard"`.
        mining: one of the words of the table. Default `"semi_hard"`. May be changed
            as `margin` may.
        distance: `"euclidean"`, `"squared_euclidean"` or `"cosine"` (1 - cos).
        soft: take the softplus instead of the hinge. Default False.
        average_over: `"all"` units, or the `"active"` units, whose loss is > 0.
            The softplus is always > 0, so `soft=True` wants `"all"`.
        gather: under a `tf.distribute` strategy, mine over the batch of all replicas;
            the update is then that of one device with the whole batch. False mines
            within each replica. Elsewhere (one device, `keras.distribution` on JAX)
            the loss sees the whole batch anyway. Default False.
        name: name of the loss.
        reduction: of the (batch,) values, as in `keras.losses.Loss`.
        dtype: as in `keras.losses.Loss`. Distances are float32 in any case.

    Call arguments: `y_true` are labels, (batch,) or (batch, 1) integers or
    (batch, classes) one-hot; `y_pred` are embeddings, (batch, dim). Integers stay as
    they are: Keras' cast of targets to floats does not reach them. Whole numbers in
    floats, which Keras makes of the targets of a loss function or class of one's own,
    are labels where the cast is exact: below 2^24 in float32, 2^11 in float16, 2^8 in
    bfloat16. Fractions, and rows that are not one-hot (several labels, a class and a
    camera, mixed or smoothed rows, zeros), are no labels: an error where their values
    are seen, else NaN with gradient 0, since a compiled step cannot raise.

    Returns:
        With `reduction=None` (batch,) values, one per anchor, whose mean is the loss:
        the sum over the anchor's units times batch / number of units.

    Raises:
        ValueError: for a margin that is not > 0, unknown words, `soft` with
            `"active"`; when called, for embeddings that are not 2-D, lengths that
            differ, or labels that are seen to name no class.
        TypeError: for a margin that is no number.

    Example:

    >>> loss = TripletLoss(margin=0.5)
    >>> float(loss([0, 0, 1, 1], [[0.0], [0.25], [0.5], [2.0]]))
    0.5

    References:
        Schroff, Kalenichenko, Philbin, "FaceNet: a unified embedding for face
        recognition and clustering", 2015, equations 1 to 4 (with squared distances).
        Hermans, Beyer, Leibe, "In defense of the triplet loss for person
        re-identification", 2017, equation 5 ("hard"), equation 7 ("all"), section 2
        (softplus).
    """

    def __init__(
        self,
        margin: float = 0.2,
        mining: str = "semi_hard",
        distance: str = "euclidean",
        soft: bool = False,
        average_over: str = "all",
        gather: bool = False,
        *,
        name: str = "triplet_loss",
        reduction: str | None = "sum_over_batch_size",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.margin = _checks.number("margin", margin, above=0)
        check_choice(mining, soft, average_over)
        self.mining = mining
        self.distance = _checks.one_of("distance", distance, DISTANCES)
        self.soft = soft
        self.average_over = average_over
        self.gather = _checks.boolean("gather", gather)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """(batch,) values; see the class."""
        return triplet_losses(
            y_true,
            y_pred,
            margin=self.margin,
            mining=self.mining,
            distance=self.distance,
            soft=self.soft,
            average_over=self.average_over,
        )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TripletLoss:
        """The loss of a saved configuration, of version 0.1 too."""
        known = {key: value for key, value in config.items() if key != "memory"}
        if config.get("memory") is not None:
            raise _checks.value_error(
                "memory",
                "None: this version has no embedding memory",
                config["memory"],
                "Load the model with compile=False and compile it anew.",
            )
        return cls(**known)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "margin": self.margin,
            "mining": self.mining,
            "distance": self.distance,
            "soft": self.soft,
            "average_over": self.average_over,
            "gather": self.gather,
        }
