"""Triplet losses with mining inside the batch."""

from __future__ import annotations

from typing import Any

import keras

from kerastrip.losses._label_loss import LabelLoss
from kerastrip.mining import triplet_values

_TFA_DISTANCES = {
    "L2": "euclidean",
    "squared-L2": "squared_euclidean",
    "angular": "cosine",
}


@keras.saving.register_keras_serializable(package="kerastrip")
class TripletLoss(LabelLoss):
    def __init__(
        self,
        margin: float = 0.2,
        mining: str = "semi_hard",
        distance: str = "euclidean",
        soft: bool = False,
        average_over: str = "all",
        *,
        name: str = "triplet_loss",
        reduction: str = "sum_over_batch_size",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.margin, self.mining, self.distance = margin, mining, distance
        self.soft, self.average_over = soft, average_over

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return triplet_values(
            y_true,
            y_pred,
            margin=self.margin,
            mining=self.mining,
            distance=self.distance,
            soft=self.soft,
            average_over=self.average_over,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "margin": self.margin,
            "mining": self.mining,
            "distance": self.distance,
            "soft": self.soft,
            "average_over": self.average_over,
        }


def triplet_semihard_loss(
    y_true: Any, y_pred: Any, margin: float = 1.0, distance_metric: Any = "L2"
) -> Any:
    return triplet_values(
        y_true, y_pred, margin=margin, distance=_TFA_DISTANCES[distance_metric]
    )


def triplet_hard_loss(
    y_true: Any,
    y_pred: Any,
    margin: float = 1.0,
    soft: bool = False,
    distance_metric: Any = "L2",
) -> Any:
    return triplet_values(
        y_true,
        y_pred,
        margin=margin,
        mining="hard",
        soft=soft,
        distance=_TFA_DISTANCES[distance_metric],
    )


@keras.saving.register_keras_serializable(package="kerastrip")
class TripletSemiHardLoss(LabelLoss):
    mining = "semi_hard"
    soft = False

    def __init__(
        self,
        margin: float = 1.0,
        distance_metric: Any = "L2",
        *,
        name: str = "triplet_semihard_loss",
        reduction: str = "sum_over_batch_size",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.margin, self.distance_metric = margin, distance_metric
        self.distance = _TFA_DISTANCES[distance_metric]

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return triplet_semihard_loss(y_true, y_pred, self.margin, self.distance_metric)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "margin": self.margin,
            "distance_metric": self.distance_metric,
        }


@keras.saving.register_keras_serializable(package="kerastrip")
class TripletHardLoss(LabelLoss):
    mining = "hard"

    def __init__(
        self,
        margin: float = 1.0,
        soft: bool = False,
        distance_metric: Any = "L2",
        *,
        name: str = "triplet_hard_loss",
        reduction: str = "sum_over_batch_size",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.margin, self.soft = margin, soft
        self.distance_metric = distance_metric
        self.distance = _TFA_DISTANCES[distance_metric]

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return triplet_hard_loss(
            y_true, y_pred, self.margin, self.soft, self.distance_metric
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "margin": self.margin,
            "soft": self.soft,
            "distance_metric": self.distance_metric,
        }
