"""Numbers that stay whole or finite: integer labels, safe root and division.

Everything here is `keras.ops` on tensors and works on every backend.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerastrip import _checks


def safe_sqrt(x: Any) -> Any:
    """Square root of `max(x, 0)` whose gradient at 0 is 0; NaN stays NaN."""
    none = x <= 0
    return ops.where(none, 0.0, ops.sqrt(ops.where(none, 1.0, x)))


def safe_divide(x: Any, y: Any) -> Any:
    """`x / y`, and 0 with gradient 0 where `y` is 0."""
    zero = ops.equal(y, 0)
    return ops.where(zero, 0.0, x / ops.where(zero, 1.0, y))


def at_least_float32(x: Any) -> Any:
    """`x` in float64 if that is its dtype, else in float32."""
    wide = keras.backend.standardize_dtype(x.dtype) == "float64"
    return x if wide else ops.cast(x, "float32")


def log_one_minus_softmax(log_p: Any) -> Any:
    """`log(1 - p)` of every class from `log_p = log_softmax(logits)`.

    `log1p(-p)` is exact while p stays away from 1. At most one class of a row has
    p > 1/2; its 1 - p is the sum of the other classes, taken in log space. So the
    gradient is finite even where p rounds to 1.

    Args:
        log_p: (..., classes) logarithms of probabilities that sum to 1.

    Returns:
        (..., classes) tensor, negative and finite.
    """
    leads = log_p > -0.5  # p > 0.61, so never two of one row
    others = ops.where(leads, -1e30, log_p)  # finite: a row may have one class only
    log_rest = ops.logsumexp(others, axis=-1, keepdims=True)
    return ops.where(
        leads, log_rest, ops.log1p(-ops.exp(ops.where(leads, -1.0, log_p)))
    )


def whole_numbers(name: str, labels: Any) -> Any:
    """`labels` as a tensor of an integer (or bool) dtype; TypeError for floats."""
    labels = ops.convert_to_tensor(labels)
    dtype = keras.backend.standardize_dtype(labels.dtype)
    if "int" in dtype or dtype == "bool":
        return labels
    if _is_shape_only():
        return ops.cast(labels, "int32")
    raise TypeError(
        _checks.message(
            name,
            "an integer dtype",
            _checks.Told(f"dtype {dtype}"),
            "Cast class ids to int32; a float cannot hold every integer.",
        )
    )


def _is_shape_only() -> bool:
    """Whether Keras is building a model for several replicas.

    Before the first step of a `tf.distribute` strategy it traces the losses outside
    the replicas, on the mean of their batches: floats, of which only shapes are used.
    """
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return tf.distribute.in_cross_replica_context()


def integer_labels(labels: Any) -> Any:
    """Labels of shape (batch,), (batch, 1) or one-hot (batch, classes) as integers.

    Args:
        labels: an integer or boolean tensor; a one-hot matrix may be of any dtype.

    Returns:
        (batch,) integer tensor, in the integer dtype that came (one-hot: int32).

    Raises:
        TypeError: for float labels that are not a one-hot matrix.
        ValueError: for more than two axes, or none.
    """
    labels = ops.convert_to_tensor(labels)
    rank = len(labels.shape)
    if rank not in (1, 2):
        raise ValueError(
            _checks.message(
                "labels",
                "shape (batch,), (batch, 1) or one-hot (batch, classes)",
                _checks.Told(f"shape {tuple(labels.shape)}"),
            )
        )
    if rank == 2 and labels.shape[1] != 1:
        return ops.cast(ops.argmax(labels, axis=-1), "int32")
    labels = ops.reshape(whole_numbers("labels", labels), (-1,))
    dtype = keras.backend.standardize_dtype(labels.dtype)
    narrow = dtype in ("bool", "int8", "uint8", "int16", "uint16")
    return ops.cast(labels, "int32") if narrow else labels
