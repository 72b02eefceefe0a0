"""Callbacks for `Model.fit`."""

from kerastrip.callbacks.collapse import CollapseGuard
from kerastrip.callbacks.epoch_sync import EpochSync
from kerastrip.callbacks.mining_stats import MiningStats
from kerastrip.callbacks.projector import EmbeddingProjector
from kerastrip.callbacks.report import TrainingReport
from kerastrip.callbacks.retrieval import RetrievalEvaluation
from kerastrip.callbacks.schedules import MarginSchedule, MiningSchedule
from kerastrip.callbacks.verification import (
    VerificationEvaluation,
)

__all__ = [
    "CollapseGuard",
    "EmbeddingProjector",
    "EpochSync",
    "MarginSchedule",
    "MiningSchedule",
    "MiningStats",
    "RetrievalEvaluation",
    "TrainingReport",
    "VerificationEvaluation",
]
