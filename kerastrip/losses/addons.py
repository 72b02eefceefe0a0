"""The triplet losses of TensorFlow Addons: its names, defaults and values."""

from __future__ import annotations

from typing import Any

import keras

from kerastrip import _checks
from kerastrip.losses.triplet import TripletLoss
from kerastrip.mining.engine import triplet_losses

__all__ = [
    "TripletHardLoss",
    "TripletSemiHardLoss",
    "triplet_hard_loss",
    "triplet_semihard_loss",
]

_TFA_DISTANCES = {
    "L2": "euclidean",
    "squared-L2": "squared_euclidean",
    "angular": "cosine",
}


def _tfa_distance(distance_metric: Any) -> str:
    """The distance word of a TensorFlow Addons `distance_metric`."""
    _checks.one_of("distance_metric", distance_metric, tuple(_TFA_DISTANCES))
    return _TFA_DISTANCES[distance_metric]


@keras.saving.register_keras_serializable(package="kerastrip")
def triplet_semihard_loss(
    y_true: Any,
    y_pred: Any,
    margin: float = 1.0,
    distance_metric: str = "L2",
) -> Any:
    """Triplet loss with semi-hard mining, under its TensorFlow Addons name.

    `TripletLoss(margin, mining="semi_hard")` as a function; the mean of what it
    returns is the value of `tfa.losses.triplet_semihard_loss`. Where the two differ:
    a batch without positives or without negatives gives 0 here, NaN there.

    Args:
        y_true: labels, (batch,) or (batch, 1) integers or (batch, classes) one-hot.
        y_pred: (batch, dim) embeddings.
        margin: > 0. Default 1.
        distance_metric: `"L2"` (euclidean), `"squared-L2"` (that of tf.contrib) or
            `"angular"` (1 - cos).

    Returns:
        (batch,) float32 values whose mean is the loss.

    Raises:
        ValueError, TypeError: as `TripletLoss`.

    Example:

    >>> from keras import ops
    >>> rows = [[0.0], [0.25], [0.5], [2.0]]
    >>> float(ops.mean(triplet_semihard_loss([0, 0, 1, 1], rows, margin=0.5)))
    0.5

    References:
        Schroff, Kalenichenko, Philbin, "FaceNet: a unified embedding for face
        recognition and clustering", 2015, equations 1 to 4.
    """
    return triplet_losses(
        y_true, y_pred, margin=margin, distance=_tfa_distance(distance_metric)
    )


@keras.saving.register_keras_serializable(package="kerastrip")
def triplet_hard_loss(
    y_true: Any,
    y_pred: Any,
    margin: float = 1.0,
    soft: bool = False,
    distance_metric: str = "L2",
) -> Any:
    """Batch-hard triplet loss, under its TensorFlow Addons name.

    `TripletLoss(margin, mining="hard", soft=soft)` as a function; the mean of what it
    returns is the value of `tfa.losses.triplet_hard_loss`. Where the two differ: an
    anchor without a positive is left out here; there it has a positive at distance 0
    and counts in the mean.

    Args:
        y_true: labels, (batch,) or (batch, 1) integers or (batch, classes) one-hot.
        y_pred: (batch, dim) embeddings.
        margin: > 0. Default 1. Not used with `soft=True`.
        soft: take the softplus instead of the hinge.
        distance_metric: `"L2"` (euclidean), `"squared-L2"` or `"angular"` (1 - cos).

    Returns:
        (batch,) float32 values whose mean is the loss.

    Raises:
        ValueError, TypeError: as `TripletLoss`.

    Example:

    >>> from keras import ops
    >>> rows = [[0.0], [0.25], [0.5], [2.0]]
    >>> float(ops.mean(triplet_hard_loss([0, 0, 1, 1], rows, margin=0.5)))
    0.6875

    References:
        Hermans, Beyer, Leibe, "In defense of the triplet loss for person
        re-identification", 2017, equation 5.
    """
    return triplet_losses(
        y_true,
        y_pred,
        margin=margin,
        mining="hard",
        soft=soft,
        distance=_tfa_distance(distance_metric),
    )


@keras.saving.register_keras_serializable(package="kerastrip")
class TripletSemiHardLoss(TripletLoss):
    """`TripletLoss(mining="semi_hard")` with the arguments of TensorFlow Addons.

    See `triplet_semihard_loss` for the formula, the corner cases and the paper.

    Args:
        margin: > 0. Default 1.
        distance_metric: `"L2"` (euclidean), `"squared-L2"` or `"angular"` (1 - cos).
        mining: as in `TripletLoss`, for a loss that a `MiningSchedule` has changed
            and that is loaded again.
        gather: as in `TripletLoss`.
        name: name of the loss.
        reduction: of the (batch,) values, as in `keras.losses.Loss`.
        dtype: as in `keras.losses.Loss`. Distances are float32 in any case.

    Returns:
        With `reduction=None` (batch,) values, one per anchor, whose mean is the loss.

    Raises:
        ValueError, TypeError: as `TripletLoss`.

    Example:

    >>> loss = TripletSemiHardLoss(margin=0.5)
    >>> float(loss([0, 0, 1, 1], [[0.0], [0.25], [0.5], [2.0]]))
    0.5
    """

    def __init__(
        self,
        margin: float = 1.0,
        distance_metric: str = "L2",
        *,
        mining: str = "semi_hard",
        gather: bool = False,
        name: str = "triplet_semihard_loss",
        reduction: str | None = "sum_over_batch_size",
        dtype: Any = None,
    ) -> None:
        super().__init__(
            margin,
            mining,
            _tfa_distance(distance_metric),
            gather=gather,
            name=name,
            reduction=reduction,
            dtype=dtype,
        )
        self.distance_metric = distance_metric

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return _tfa_config(self, super().get_config())


@keras.saving.register_keras_serializable(package="kerastrip")
class TripletHardLoss(TripletLoss):
    """`TripletLoss(mining="hard")` with the arguments of TensorFlow Addons.

    See `triplet_hard_loss` for the formula, the corner cases and the paper.

    Args:
        margin: > 0. Default 1. Not used with `soft=True`.
        soft: take the softplus instead of the hinge.
        distance_metric: `"L2"` (euclidean), `"squared-L2"` or `"angular"` (1 - cos).
        mining: as in `TripletLoss`, for a loss that a `MiningSchedule` has changed
            and that is loaded again.
        gather: as in `TripletLoss`.
        name: name of the loss.
        reduction: of the (batch,) values, as in `keras.losses.Loss`.
        dtype: as in `keras.losses.Loss`. Distances are float32 in any case.

    Returns:
        With `reduction=None` (batch,) values, one per anchor, whose mean is the loss.

    Raises:
        ValueError, TypeError: as `TripletLoss`.

    Example:

    >>> loss = TripletHardLoss(margin=0.5)
    >>> float(loss([0, 0, 1, 1], [[0.0], [0.25], [0.5], [2.0]]))
    0.6875
    """

    def __init__(
        self,
        margin: float = 1.0,
        soft: bool = False,
        distance_metric: str = "L2",
        *,
        mining: str = "hard",
        gather: bool = False,
        name: str = "triplet_hard_loss",
        reduction: str | None = "sum_over_batch_size",
        dtype: Any = None,
    ) -> None:
        super().__init__(
            margin,
            mining,
            _tfa_distance(distance_metric),
            soft,
            gather=gather,
            name=name,
            reduction=reduction,
            dtype=dtype,
        )
        self.distance_metric = distance_metric

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {**_tfa_config(self, super().get_config()), "soft": self.soft}


# Callbacks read the settings of a compiled loss. A function that is given to `compile`
# as it stands has its defaults.
for _function, _mining in (
    (triplet_semihard_loss, "semi_hard"),
    (triplet_hard_loss, "hard"),
):
    vars(_function).update(margin=1.0, distance="euclidean", mining=_mining)


def _tfa_config(loss: Any, config: dict[str, Any]) -> dict[str, Any]:
    """The config of a TripletLoss in the arguments that both names of TFA take."""
    for foreign in ("distance", "soft", "average_over"):
        del config[foreign]
    return {**config, "distance_metric": loss.distance_metric}
