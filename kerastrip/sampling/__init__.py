"""P×K batches: which rows (`PKPlan`), and the batches that `fit` takes (`PKSampler`)."""

from kerastrip.sampling.plan import PKPlan, SamplingReport
from kerastrip.sampling.sampler import PKSampler
from kerastrip.sampling.splits import split_classes, split_samples

__all__ = ["PKPlan", "PKSampler", "SamplingReport", "split_classes", "split_samples"]
