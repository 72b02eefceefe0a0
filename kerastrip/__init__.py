"""kerastrip: metric learning for Keras 3.

P×K batches that are guaranteed to hold positives, losses that mine them exactly,
and a view of what the mining does while the model trains. Pass a `PKSampler` to
`model.fit`, attach `MiningStats`, reuse the `Augmentation`.
"""

from kerastrip import distances, evaluation, mining, plotting, sources, verification
from kerastrip._version import __version__
from kerastrip.augmentation.pipeline import Augmentation
from kerastrip.callbacks import (
    CollapseGuard,
    EmbeddingProjector,
    EpochSync,
    MarginSchedule,
    MiningSchedule,
    MiningStats,
    RetrievalEvaluation,
    TrainingReport,
    VerificationEvaluation,
)
from kerastrip.evaluation.embedding import embed
from kerastrip.evaluation.gallery import Gallery
from kerastrip.evaluation.recalibration import recalibrate
from kerastrip.evaluation.reranking import rerank
from kerastrip.evaluation.search import search
from kerastrip.losses import (
    BinaryFocalLoss,
    CategoricalFocalLoss,
    ContrastiveLoss,
    SparseCategoricalFocalLoss,
    TripletHardLoss,
    TripletLoss,
    TripletSemiHardLoss,
    binary_focal_loss,
    categorical_focal_loss,
    class_balanced_alpha,
    sparse_categorical_focal_loss,
    triplet_hard_loss,
    triplet_semihard_loss,
)
from kerastrip.metrics import TripletCensus
from kerastrip.sampling.plan import PKPlan, SamplingReport
from kerastrip.sampling.sampler import PKSampler
from kerastrip.sampling.splits import split_classes, split_samples
from kerastrip.sources import cache_images

__all__ = [
    "Augmentation",
    "BinaryFocalLoss",
    "CategoricalFocalLoss",
    "CollapseGuard",
    "ContrastiveLoss",
    "EmbeddingProjector",
    "EpochSync",
    "Gallery",
    "MarginSchedule",
    "MiningSchedule",
    "MiningStats",
    "PKPlan",
    "PKSampler",
    "RetrievalEvaluation",
    "SamplingReport",
    "SparseCategoricalFocalLoss",
    "TrainingReport",
    "TripletCensus",
    "TripletHardLoss",
    "TripletLoss",
    "TripletSemiHardLoss",
    "VerificationEvaluation",
    "__version__",
    "binary_focal_loss",
    "cache_images",
    "categorical_focal_loss",
    "class_balanced_alpha",
    "distances",
    "embed",
    "evaluation",
    "mining",
    "plotting",
    "recalibrate",
    "rerank",
    "search",
    "sources",
    "sparse_categorical_focal_loss",
    "split_classes",
    "split_samples",
    "triplet_hard_loss",
    "triplet_semihard_loss",
    "verification",
]
