"""The parts of a batch that replicas hold, gathered to the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

__all__ = [
    "gathered",
    "whole",
]


def whole(x: Any) -> Any:
    """`x` as it is."""
    return x


def _context() -> Any:
    """The context of a replica among several, or None."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    # None while Keras builds a model outside the replicas, for its shapes.
    context = tf.distribute.get_replica_context()
    return None if context is None or context.num_replicas_in_sync == 1 else context


def gathered(labels: Any, rows: Any) -> tuple[Any, Any, Callable[[Any], Any]]:
    """Labels and rows of all replicas, and what takes this replica's part of a result.

    The gradient of the rows flows back to the replica they came from. Only a replica
    of a `tf.distribute` strategy holds a part: anywhere else (one device; JAX, whose
    losses see the whole batch) everything comes back as it is.

    Args:
        labels: (part,) integers.
        rows: (part, dim) floats.

    Returns:
        Labels (batch,), rows (batch, dim), and a function from a (batch, ...) tensor
        to the (part, ...) of this replica.
    """
    context = _context()
    if context is None:
        return labels, rows, whole
    import tensorflow as tf

    rows = tf.convert_to_tensor(rows)
    part = tf.shape(rows)[0]
    parts = context.all_gather(part[None], axis=0)
    first = tf.reduce_sum(parts[: context.replica_id_in_sync_group])
    return (
        context.all_gather(labels, axis=0),
        context.all_gather(rows, axis=0),
        lambda x: x[first : first + part],
    )
