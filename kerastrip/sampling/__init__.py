"""P×K batches: which rows (`PKPlan`), and the batches that `fit` takes (`PKSampler`)."""

from kerastrip.sampling.plan import (
    PKPlan,
    SamplingReport,
    split_classes,
    split_samples,
)
from kerastrip.sampling.sampler import PKSampler

__all__ = ["PKPlan", "PKSampler", "SamplingReport", "split_classes", "split_samples"]
