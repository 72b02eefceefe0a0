"""Embeddings of data sets, nearest neighbours, and metrics of the embeddings."""

from kerastrip.evaluation.auditing import Audit, LikeOne, LikeTwo, Misplaced, audit
from kerastrip.evaluation.comparison import Comparison, Difference, compare
from kerastrip.evaluation.embedding import embed
from kerastrip.evaluation.gallery import Gallery, Identification
from kerastrip.evaluation.identification import (
    IdentificationCurve,
    IdentificationPoint,
    identification_curve,
    identification_metrics,
)
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
    "Audit",
    "Comparison",
    "Difference",
    "FoldedAccuracy",
    "Gallery",
    "Identification",
    "IdentificationCurve",
    "IdentificationPoint",
    "LikeOne",
    "LikeTwo",
    "Misplaced",
    "OperatingPoint",
    "VerificationCurve",
    "audit",
    "compare",
    "embed",
    "identification_curve",
    "identification_metrics",
    "pair_distances",
    "recalibrate",
    "rerank",
    "retrieval_metrics",
    "search",
    "verification_curve",
    "verification_folds",
    "verification_metrics",
]
