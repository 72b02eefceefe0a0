"""The public names of `kerastrip.evaluation.verification` under their former path."""

from kerastrip.evaluation.verification import (
    FoldedAccuracy,
    OperatingPoint,
    VerificationCurve,
    pair_distances,
    verification_curve,
    verification_folds,
    verification_metrics,
)

__all__ = [
    "FoldedAccuracy",
    "OperatingPoint",
    "VerificationCurve",
    "pair_distances",
    "verification_curve",
    "verification_folds",
    "verification_metrics",
]
