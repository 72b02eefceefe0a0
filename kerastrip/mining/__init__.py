"""Mining inside a batch: exact triplet and contrastive losses, and an exact census."""

from kerastrip.mining.engine import (
    AVERAGES,
    MININGS,
    Census,
    contrastive_losses,
    triplet_census,
    triplet_losses,
)

__all__ = [
    "AVERAGES",
    "MININGS",
    "Census",
    "contrastive_losses",
    "triplet_census",
    "triplet_losses",
]
