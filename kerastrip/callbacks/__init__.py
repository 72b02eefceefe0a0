"""Callbacks for `Model.fit`."""

from kerastrip.callbacks.collapse import CollapseGuard as CollapseGuard
from kerastrip.callbacks.epoch_sync import EpochSync as EpochSync
from kerastrip.callbacks.mining_stats import MiningStats as MiningStats
from kerastrip.callbacks.projector import EmbeddingProjector as EmbeddingProjector
from kerastrip.callbacks.report import TrainingReport as TrainingReport
from kerastrip.callbacks.retrieval import RetrievalEvaluation as RetrievalEvaluation
from kerastrip.callbacks.schedules import MarginSchedule as MarginSchedule
from kerastrip.callbacks.schedules import MiningSchedule as MiningSchedule
from kerastrip.callbacks.verification import (
    VerificationEvaluation as VerificationEvaluation,
)
