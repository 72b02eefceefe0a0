"""Augmentation: a pipeline of albumentations, or any function, as a pure function of a key."""

from kerastrip.augmentation.pipeline import Augmentation

__all__ = ["Augmentation"]
