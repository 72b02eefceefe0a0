"""Charts of a training, with matplotlib."""

from kerastrip.metrics import FRACTIONS as FRACTIONS
from kerastrip.plotting.figures import (
    COLOURS,
    DIFFERENT,
    LEFT_OUT,
    SAME,
    plot_batch,
    plot_confusions,
    plot_distances,
    plot_embeddings,
    plot_mining,
    plot_neighbours,
    plot_roc,
)

__all__ = [
    "COLOURS",
    "DIFFERENT",
    "FRACTIONS",
    "LEFT_OUT",
    "SAME",
    "plot_batch",
    "plot_confusions",
    "plot_distances",
    "plot_embeddings",
    "plot_mining",
    "plot_neighbours",
    "plot_roc",
]
