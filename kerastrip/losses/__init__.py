"""Metric-learning and focal losses: functions, and Keras losses over them."""

from kerastrip.losses.addons import (
    TripletHardLoss,
    TripletSemiHardLoss,
    triplet_hard_loss,
    triplet_semihard_loss,
)
from kerastrip.losses.contrastive import ContrastiveLoss
from kerastrip.losses.focal import (
    BinaryFocalLoss,
    CategoricalFocalLoss,
    SparseCategoricalFocalLoss,
    binary_focal_loss,
    categorical_focal_loss,
    class_balanced_alpha,
    sparse_categorical_focal_loss,
)
from kerastrip.losses.triplet import TripletLoss

__all__ = [
    "BinaryFocalLoss",
    "CategoricalFocalLoss",
    "ContrastiveLoss",
    "SparseCategoricalFocalLoss",
    "TripletHardLoss",
    "TripletLoss",
    "TripletSemiHardLoss",
    "binary_focal_loss",
    "categorical_focal_loss",
    "class_balanced_alpha",
    "sparse_categorical_focal_loss",
    "triplet_hard_loss",
    "triplet_semihard_loss",
]
