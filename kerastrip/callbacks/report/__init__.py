"""The report of a training: one HTML page, written anew after every epoch."""

from kerastrip.callbacks.report.callback import TrainingReport

__all__ = ["TrainingReport"]
