"""Embeddings of data sets, nearest neighbours, and metrics of the embeddings."""

from kerastrip.evaluation.comparison import Comparison, Difference, compare
from kerastrip.evaluation.embedding import embed
from kerastrip.evaluation.recalibration import recalibrate
from kerastrip.evaluation.reranking import rerank
from kerastrip.evaluation.retrieval import retrieval_metrics
from kerastrip.evaluation.search import search
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
    "Comparison",
    "Difference",
    "FoldedAccuracy",
    "OperatingPoint",
    "VerificationCurve",
    "compare",
    "embed",
    "pair_distances",
    "recalibrate",
    "rerank",
    "retrieval_metrics",
    "search",
    "verification_curve",
    "verification_folds",
    "verification_metrics",
]
