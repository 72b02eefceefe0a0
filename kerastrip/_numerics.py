"""Numbers that stay whole or finite: integer labels, safe root and division.

Everything here is `keras.ops` on tensors and works on every backend.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
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
    gradient is finite even where p rounds to 1. Where p is 0 in any dtype, the gradient
    is 0 whatever comes from above, infinity too.

    Args:
        log_p: (..., classes) logarithms of probabilities that sum to 1, all finite.

    Returns:
        (..., classes) tensor, finite and not above 0.
    """
    leads = log_p > -0.5  # p > 0.61, so never two of one row
    others = ops.where(leads, -1e30, log_p)  # finite: a row may have one class only
    log_rest = ops.logsumexp(others, axis=-1, keepdims=True)
    none = log_p < NOTHING
    log_q = ops.log1p(-ops.exp(ops.where(leads | none, -1.0, log_p)))
    return ops.where(leads, log_rest, ops.where(none, 0.0, log_q))


def softplus(x: Any) -> Any:
    """`log(1 + exp(x))`, finite for any x but NaN.

    The gradient is 0 below `NOTHING` whatever comes from above, infinity too, and at
    infinity, where the value is the largest float.
    """
    largest = float(np.finfo(keras.backend.standardize_dtype(x.dtype)).max)
    none = x < NOTHING
    x = ops.where(none, 0.0, ops.where(x == float("inf"), largest, x))
    return ops.where(none, 0.0, ops.softplus(x))


def log_softmax(logits: Any) -> Any:
    """Logarithms of the softmax over the last axis, all finite, with exact gradients.

    Logits may be as large as floats get: the difference of two is held at the largest
    float where it would be infinite. A logit of -inf makes a class of probability 0,
    whose logarithm is the least float and whose gradient is 0.
    """
    least = float(np.finfo(keras.backend.standardize_dtype(logits.dtype)).min)
    logits = ops.where(logits == -float("inf"), least, logits)
    top = ops.max(logits, axis=-1, keepdims=True, initial=least)  # of no rows, too
    top = ops.stop_gradient(top)
    half = 0.5 * logits - 0.5 * top  # cannot overflow, and halves are exact
    half = half + ops.stop_gradient(ops.maximum(half, 0.5 * least) - half)
    return ops.log_softmax(2.0 * half, axis=-1)


NOTHING = -1000.0  # exp of less is 0 in float32 and in float64

# The least whole number that a float shares with a neighbour is 2 to this power.
_EXACT_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}


def seen(x: Any) -> Any:
    """The values of a tensor as an array, or None while a function is traced."""
    try:
        return ops.convert_to_numpy(x)
    except (NotImplementedError, TypeError):  # what the backends raise then
        return None


def confirmed(valid: Any, error: Callable[[], str]) -> Any:
    """A condition on values, which are seen or not yet.

    Args:
        valid: () bool tensor.
        error: makes the text of the ValueError for a condition that is seen to fail.

    Returns:
        None where the condition is seen to hold; while a function is traced `valid`
        itself, for `nan_unless`, since a compiled step cannot raise.
    """
    value = seen(valid)
    if value is None:
        return valid
    if not value:
        raise ValueError(error())
    return None


def nan_unless(valid: Any, x: Any) -> Any:
    """`x`; where the scalar `valid` is neither None nor true, NaN with gradient 0."""
    return x if valid is None else ops.where(valid, x, float("nan"))


def with_gradient(rows: Any, values: Any, needed: Any, gradient: Callable) -> Any:
    """`values`, with a gradient of one's own with respect to `rows`.

    Args:
        rows: what the gradient is for.
        values: (batch,).
        needed: a structure of all tensors that `gradient` works with.
        gradient: from `needed` and weights (batch,) to the gradient of
            sum(weights * values) for `rows`.
    """
    # On JAX all tensors that the gradient works with go in as arguments: a custom gradient
    # inside of a compiled function may not read them from outside. TensorFlow and PyTorch
    # read them from outside, so that they get no gradient themselves.
    leaves = keras.tree.flatten((values, needed))
    on_jax = keras.backend.backend() == "jax"
    passed = [on_jax and ops.is_tensor(leaf) for leaf in leaves]

    @ops.custom_gradient
    def attach(rows: Any, *tensors: Any) -> Any:
        given = iter(tensors)
        refilled = [
            next(given) if is_passed else leaf
            for leaf, is_passed in zip(leaves, passed, strict=True)
        ]
        result, state = keras.tree.pack_sequence_as((values, needed), refilled)

        def grad(*args: Any, upstream: Any = None) -> Any:
            # PyTorch gives the rows as well, and the weights by name.
            slope = gradient(state, args[0] if upstream is None else upstream)
            return (slope, *(None for _ in tensors)) if tensors else slope

        return result, grad

    return attach(rows, *itertools.compress(leaves, passed))


def plain(name: str, value: Any) -> Any:
    """`value`; an array of NumPy as every backend reads it rightly.

    ValueError for masked entries, whose mask the backends would drop.
    """
    _checks.refuse_masked(name, value)
    if not isinstance(value, np.ndarray):
        return value
    return _checks.native(np.asarray(value))


def as_given(name: str, labels: Any) -> Any:
    """`labels` as a tensor; ValueError for masked entries.

    ValueError, too, for integers that the backend would wrap.
    """
    tensor = ops.convert_to_tensor(plain(name, labels))
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu" and labels.size:
        # JAX makes int32 of int64: the classes 0 and 2^32 would be one.
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        limits = np.iinfo(dtype)
        for label in (int(labels.min()), int(labels.max())):
            if not limits.min <= label <= limits.max:
                expected = f"class ids that fit {dtype}, the widest integer at hand"
                advice = "Number the classes from 0 on, as PKSampler does."
                raise _checks.value_error(name, expected, label, advice)
    return tensor


def whole_numbers(name: str, labels: Any) -> tuple[Any, Any]:
    """Labels in an integer (or bool) dtype, and whether they are whole numbers.

    Keras casts the targets of a loss function, and of a loss class that a user writes,
    to floats. So whole numbers in a float tensor are labels, as long as the cast cannot
    have made one class of two.

    Args:
        name: the argument, for errors.
        labels: numbers of any shape.

    Returns:
        The labels, and None or a () bool tensor as from `confirmed`.

    Raises:
        TypeError: for labels that are no numbers.
        ValueError: for integers that the backend cannot hold; for floats that are
            seen to be fractions, or too large for their dtype.
    """
    labels = as_given(name, labels)
    dtype = keras.backend.standardize_dtype(labels.dtype)
    if "int" in dtype or dtype == "bool":
        return labels, None
    if dtype not in _EXACT_BITS:
        told = _checks.Told(f"dtype {dtype}")
        raise _checks.type_error(name, "an integer dtype", told)
    bits = _EXACT_BITS[dtype]
    whole = ops.equal(labels, ops.floor(labels)) & (ops.abs(labels) < 2.0**bits)

    def error() -> str:
        wrong = seen(labels)[~seen(whole)].flat[0]
        return _checks.message(
            name,
            f"integers, or whole numbers below 2^{bits} in {dtype}",
            float(wrong),
            f"Keras casts what a plain loss function gets as targets to {dtype}. "
            "Number the classes from 0 on, or compile with a loss object, whose "
            "integer labels stay as they are.",
        )

    valid = confirmed(ops.all(whole), error)
    return ops.cast(labels, "int64" if dtype == "float64" else "int32"), valid


def integer_labels(labels: Any) -> tuple[Any, Any]:
    """Labels of shape (batch,), (batch, 1) or one-hot (batch, classes) as integers.

    Args:
        labels: integers or booleans, or whole numbers in floats; a one-hot matrix may
            be of any dtype.

    Returns:
        (batch,) integer tensor, in the integer dtype that came (one-hot: int32), and
        None or a () bool tensor as from `confirmed`: whether they are labels.

    Raises:
        TypeError: for labels that are no numbers.
        ValueError: for more than two axes, or none; for a matrix that is seen not to
            be one-hot; for numbers that are no labels, see `whole_numbers`.
    """
    labels = as_given("labels", labels)
    rank = len(labels.shape)
    if rank not in (1, 2):
        raise _checks.value_error(
            "labels",
            "shape (batch,), (batch, 1) or one-hot (batch, classes)",
            _checks.Told(f"shape {tuple(labels.shape)}"),
        )
    if rank == 2 and labels.shape[1] != 1:
        return ops.cast(ops.argmax(labels, axis=-1), "int32"), _one_hot(labels)
    labels, valid = whole_numbers("labels", labels)
    labels = ops.reshape(labels, (-1,))
    dtype = keras.backend.standardize_dtype(labels.dtype)
    narrow = dtype in ("bool", "int8", "uint8", "int16", "uint16")
    return ops.cast(labels, "int32") if narrow else labels, valid


def _one_hot(rows: Any) -> Any:
    """Whether every row (batch, classes) is one-hot, as from `confirmed`."""
    one = ops.equal(rows, 1)
    binary = ops.all(one | ops.equal(rows, 0))
    single = ops.equal(ops.sum(ops.cast(one, "int32"), axis=-1), 1)
    valid = binary & ops.all(single)
    # Keras builds a model on PyTorch with ones for all that it does not know.
    if keras.backend.backend() == "torch" and seen(ops.all(one)):
        return valid

    def error() -> str:
        values = seen(rows)
        counts = (values != 0).sum(axis=-1), (values == 1).sum(axis=-1)
        at = int(np.argmax((counts[0] != 1) | (counts[1] != 1)))
        return _checks.message(
            "labels",
            "one class a row: integers (batch,), or a one-hot matrix",
            _checks.Told(f"the row {values[at].tolist()} at position {at}"),
            "Rows with several labels, with a class and a camera, mixed or smoothed "
            "ones are of no single class: give the column, or the class, that the "
            "embedding has to tell apart.",
        )

    return confirmed(valid, error)
