"""Focal losses that stay in log space: binary, categorical and sparse categorical.

The three share one formula. With p the probability of a class, y its target in
[0, 1] and a its weight, a class adds

    a * y * (1 - p)^gamma * (-log p)

and the binary loss is the same with the two classes p and 1 - p. From logits,
log p and log(1 - p) come straight from the logits, and the modulating factor is
exp(gamma * log(1 - p)): nothing saturates and no power of 0 is ever taken, so
value and gradient are right for any logit and any gamma >= 0, gamma < 1 too.
A logit of -inf masks a class that cannot be: the loss is that of the other classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kerastrip import _checks, _numerics
from kerastrip.losses._label_loss import LabelLoss

__all__ = [
    "BinaryFocalLoss",
    "CategoricalFocalLoss",
    "SparseCategoricalFocalLoss",
    "binary_focal_loss",
    "categorical_focal_loss",
    "class_balanced_alpha",
    "sparse_categorical_focal_loss",
]

Alpha = float | Sequence[float] | None
INFINITE = float("inf")


def class_balanced_alpha(counts: Sequence[int], beta: float = 0.999) -> np.ndarray:
    """Class weights by the effective number of samples.

        alpha_c = C * w_c / sum_j w_j,    w_c = (1 - beta) / (1 - beta^n_c)

    beta = 0 weighs all classes alike; beta -> 1 weighs them by 1 / n_c. The
    weights have mean 1, so they suit the categorical losses (a binary loss wants
    an alpha in [0, 1]).

    Args:
        counts: (classes,) number of training samples of each class, >= 1.
        beta: in [0, 1); the effective number of samples of a class never passes
            1 / (1 - beta). Defaults to 0.999.

    Returns:
        (classes,) float64 weights, for `alpha=`.

    Raises:
        TypeError: counts that are not numbers, or beta that is not one.
        ValueError: counts that are not one-dimensional, empty, below 1 or not
            finite; beta outside [0, 1).

    Example:

    >>> class_balanced_alpha([1000, 100, 10], beta=0.99).round(3)
    array([0.23 , 0.363, 2.407])

    References:
        Cui, Jia, Lin, Song, Belongie, "Class-Balanced Loss Based on Effective
        Number of Samples", 2019, equation 2 and section 4.
    """
    beta = _checks.number("beta", beta, minimum=0.0, below=1.0)
    n = np.asarray(counts)
    expected = "a one-dimensional sequence of sample counts, each at least 1"
    if n.dtype.kind not in "iuf":
        raise _checks.type_error("counts", expected, counts)
    if n.ndim != 1 or not n.size or not np.all(np.isfinite(n) & (n >= 1)):
        advice = "Leave classes without samples out, or count them as 1."
        raise _checks.value_error("counts", expected, counts, advice)
    if beta == 0.0:
        return np.ones(n.shape)
    weight = 1.0 / -np.expm1(n * np.log(beta))
    return weight * (n.size / weight.sum())


@keras.saving.register_keras_serializable(package="kerastrip")
def binary_focal_loss(
    y_true: Any,
    y_pred: Any,
    *,
    gamma: float = 2.0,
    alpha: Alpha = None,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
) -> Any:
    """Focal loss of independent yes/no targets, averaged over the last axis.

        mean_c [ -   alpha_c   *    y_c    * (1 - p_c)^gamma * log(p_c)
                 - (1 - alpha_c) * (1 - y_c) *    p_c^gamma    * log(1 - p_c) ]

    With `alpha=None` both weights are 1, and `gamma=0` is then
    `keras.losses.binary_crossentropy`. Like there, the last axis is averaged (the
    published code sums it).

    Args:
        y_true: (batch, ..., labels) targets in [0, 1]; (batch, ...) is taken too
            where `y_pred` has a last axis of 1. Masks of 0 and 255 want a division.
        y_pred: (batch, ..., labels) probabilities, or logits with `from_logits`.
        gamma: focusing parameter, >= 0; 0 is cross-entropy. Defaults to 2.
        alpha: weight in [0, 1] of the positive targets, a number or one per label;
            negative targets weigh 1 - alpha. None (default) weighs nothing.
        from_logits: whether `y_pred` are logits. Prefer logits: probabilities are
            clipped to [epsilon, 1 - epsilon], where the gradient ends. Defaults to
            False.
        label_smoothing: in [0, 1); moves the targets towards 0.5. Defaults to 0.

    Returns:
        (batch, ...) losses, `y_pred.shape[:-1]`, at least float32.

    Raises:
        TypeError: an argument that is not of its kind.
        ValueError: an argument out of range, or `alpha` of the wrong length; shapes
            that do not match, rank under 2, unknown rank or unknown last axis;
            targets or probabilities that are seen to be outside [0, 1]. While a
            function is traced nothing is seen: all values are NaN then.

    Example:

    >>> loss = binary_focal_loss([[1.0], [0.0]], [[2.0], [2.0]], from_logits=True)
    >>> keras.ops.convert_to_numpy(loss).round(4)
    array([0.0018, 1.6501], dtype=float32)

    References:
        Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection",
        2017, equations 4 and 5.
    """
    gamma, label_smoothing = _settings(gamma, label_smoothing, from_logits)
    alpha = _alpha(alpha, maximum=1.0)
    y_pred, shape = _predictions(y_pred, alpha)
    y_true = ops.convert_to_tensor(_numerics.plain("y_true", y_true))
    if shape[-1] == 1 and len(_shape("y_true", y_true)) == len(shape) - 1:
        y_true = ops.expand_dims(y_true, -1)
    _same_shape(y_true, shape, "Give one target for each prediction.")
    y_true = ops.cast(y_true, y_pred.dtype)
    targets = _targets_in_range(y_true)
    scores = _scores_in_range(y_pred, from_logits)
    # An infinite logit says that one of the two cannot be. Its target is not smoothed.
    smooth = y_true * (1.0 - label_smoothing) + 0.5 * label_smoothing
    y_true = ops.where(ops.isinf(y_pred), y_true, smooth)
    impossible = ops.logical_or(
        ops.logical_and(y_pred == -INFINITE, y_true > 0),
        ops.logical_and(y_pred == INFINITE, y_true < 1),
    )

    if from_logits:
        minus_log_p = _numerics.softplus(-y_pred)
        minus_log_q = _numerics.softplus(y_pred)
    else:
        p = _clip(y_pred)
        minus_log_p, minus_log_q = -ops.log(p), -ops.log1p(-p)
    positive = y_true * ops.exp(-gamma * minus_log_q)
    negative = (1.0 - y_true) * ops.exp(-gamma * minus_log_p)
    # The logarithm beside a factor 0 may be large, and infinite once it is scaled.
    positive = positive * ops.where(y_true > 0, minus_log_p, 0.0)
    negative = negative * ops.where(y_true < 1, minus_log_q, 0.0)
    if alpha is not None:
        weight = ops.convert_to_tensor(alpha, dtype=y_pred.dtype)
        positive, negative = weight * positive, (1.0 - weight) * negative
    values = ops.where(impossible, INFINITE, positive + negative)
    values = ops.mean(values, axis=-1)
    return _numerics.nan_unless(targets, _numerics.nan_unless(scores, values))


@keras.saving.register_keras_serializable(package="kerastrip")
def categorical_focal_loss(
    y_true: Any,
    y_pred: Any,
    *,
    gamma: float = 2.0,
    alpha: Alpha = None,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
) -> Any:
    """Focal loss of one-hot (or soft) targets.

        sum_c  -alpha_c * y_c * (1 - p_c)^gamma * log(p_c)

    `gamma=0` with `alpha=None` is `keras.losses.categorical_crossentropy`.

    Args:
        y_true: (batch, ..., classes) one-hot rows, or rows of probabilities.
        y_pred: (batch, ..., classes) probabilities, or logits with `from_logits`.
        gamma: focusing parameter, >= 0; 0 is cross-entropy. Defaults to 2.
        alpha: weight >= 0, a number or one per class (`class_balanced_alpha` makes
            them). None (default) weighs nothing.
        from_logits: whether `y_pred` are logits. Prefer logits: probabilities are
            divided by their sum and clipped to [epsilon, 1 - epsilon], where the
            gradient ends. Defaults to False.
        label_smoothing: in [0, 1); moves the targets towards 1 / classes. Defaults
            to 0.

    Returns:
        (batch, ...) losses, `y_pred.shape[:-1]`, at least float32.

    Raises:
        TypeError: an argument that is not of its kind.
        ValueError: an argument out of range, or `alpha` of the wrong length; shapes
            that do not match, rank under 2, unknown rank or unknown last axis;
            targets or probabilities that are seen to be outside [0, 1]. While a
            function is traced nothing is seen: all values are NaN then.

    Example:

    >>> loss = categorical_focal_loss([[0, 1], [1, 0]], [[0.4, 0.6], [0.4, 0.6]])
    >>> keras.ops.convert_to_numpy(loss).round(4)
    array([0.0817, 0.3299], dtype=float32)

    References:
        Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection",
        2017, equations 4 and 5, with one term per class.
    """
    gamma, label_smoothing = _settings(gamma, label_smoothing, from_logits)
    alpha = _alpha(alpha)
    y_pred, shape = _predictions(y_pred, alpha)
    y_true = ops.convert_to_tensor(_numerics.plain("y_true", y_true))
    _same_shape(y_true, shape, _one_hot_advice(_shape("y_true", y_true)))
    y_true = ops.cast(y_true, y_pred.dtype)
    targets = _targets_in_range(y_true)
    scores = _scores_in_range(y_pred, from_logits)
    values = _of_rows(y_true, y_pred, gamma, alpha, from_logits, label_smoothing)
    return _numerics.nan_unless(targets, _numerics.nan_unless(scores, values))


def _of_rows(
    y_true: Any,
    y_pred: Any,
    gamma: float,
    alpha: float | list[float] | None,
    from_logits: bool,
    label_smoothing: float,
) -> Any:
    """`categorical_focal_loss` of checked arguments, float32 or wider.

    A class whose logit is -inf cannot be: it adds nothing, and the smoothing moves the
    targets towards 1 / the number of the other classes. A target on it costs infinity.
    """
    masked = y_pred == -INFINITE
    left = ops.sum(ops.cast(~masked, y_pred.dtype), axis=-1, keepdims=True)
    impossible = ops.any(masked & (y_true > 0), axis=-1)
    smooth = label_smoothing / ops.maximum(left, 1.0)
    y_true = ops.where(masked, 0.0, y_true * (1.0 - label_smoothing) + smooth)

    if from_logits:
        log_p = _numerics.log_softmax(y_pred)
        log_q = _numerics.log_one_minus_softmax(log_p)
    else:
        total = ops.sum(y_pred, axis=-1, keepdims=True)
        p = _clip(y_pred / ops.maximum(total, keras.config.epsilon()))
        log_p, log_q = ops.log(p), ops.log1p(-p)
    # The logarithm beside a factor 0 may be large, and infinite once it is scaled.
    log_p = ops.where(y_true > 0, log_p, 0.0)
    terms = -y_true * ops.exp(gamma * log_q) * log_p
    if alpha is not None:
        terms = terms * ops.convert_to_tensor(alpha, dtype=y_pred.dtype)
    return ops.where(impossible, INFINITE, ops.sum(terms, axis=-1))


@keras.saving.register_keras_serializable(package="kerastrip")
def sparse_categorical_focal_loss(
    y_true: Any,
    y_pred: Any,
    *,
    gamma: float = 2.0,
    alpha: Alpha = None,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
    ignore_class: int | None = None,
) -> Any:
    """Focal loss of integer labels: `categorical_focal_loss` of their one-hot rows.

        -alpha_y * (1 - p_y)^gamma * log(p_y)

    Rows of `ignore_class` are 0, with gradient 0. A label outside 0 ... classes - 1
    that is not ignored gives NaN: under XLA nothing can be raised, and a wrong
    label must not pass as a loss of 0.

    Args:
        y_true: (batch, ...) or (batch, ..., 1) class indices, integers or whole
            numbers in floats.
        y_pred: (batch, ..., classes) probabilities, or logits with `from_logits`.
        gamma: focusing parameter, >= 0; 0 is cross-entropy. Defaults to 2.
        alpha: weight >= 0, a number or one per class (`class_balanced_alpha` makes
            them). None (default) weighs nothing.
        from_logits: whether `y_pred` are logits. Prefer logits: probabilities are
            divided by their sum and clipped to [epsilon, 1 - epsilon], where the
            gradient ends. Defaults to False.
        label_smoothing: in [0, 1); moves the targets towards 1 / classes. Defaults
            to 0.
        ignore_class: a label to leave out, such as -1 or 255 for "void" pixels.
            None (default) leaves none out.

    Returns:
        (batch, ...) losses, `y_pred.shape[:-1]`, at least float32.

    Raises:
        TypeError: an argument that is not of its kind.
        ValueError: an argument out of range, or `alpha` of the wrong length; shapes
            that do not match, rank under 2, unknown rank or unknown last axis;
            probabilities that are seen to be outside [0, 1], labels that are seen to
            be fractions. While a function is traced nothing is seen: all values are
            NaN then.

    Example:

    >>> logits = [[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]]
    >>> loss = sparse_categorical_focal_loss([1, 255], logits, from_logits=True,
    ...                                      ignore_class=255)
    >>> keras.ops.convert_to_numpy(loss).round(4)
    array([1.7879, 0.    ], dtype=float32)

    References:
        Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection",
        2017, equations 4 and 5.
    """
    ignore_class = _ignored(ignore_class)
    gamma, label_smoothing = _settings(gamma, label_smoothing, from_logits)
    alpha = _alpha(alpha)
    y_pred, shape = _predictions(y_pred, alpha)
    labels, whole = _labels(y_true, shape)
    scores = _scores_in_range(y_pred, from_logits)
    known = ops.logical_and(labels >= 0, labels < shape[-1])
    rows = ops.one_hot(ops.where(known, labels, 0), shape[-1], dtype=y_pred.dtype)
    values = _of_rows(rows, y_pred, gamma, alpha, from_logits, label_smoothing)
    values = ops.where(known, values, float("nan"))
    if ignore_class is not None:
        values = ops.where(labels == ignore_class, 0.0, values)
    return _numerics.nan_unless(whole, _numerics.nan_unless(scores, values))


@keras.saving.register_keras_serializable(package="kerastrip")
class BinaryFocalLoss(keras.losses.Loss):
    """Focal loss of independent yes/no targets: `binary_focal_loss` as a Keras loss.

        mean_c [ -   alpha_c   *    y_c    * (1 - p_c)^gamma * log(p_c)
                 - (1 - alpha_c) * (1 - y_c) *    p_c^gamma    * log(1 - p_c) ]

    Args:
        gamma: focusing parameter, >= 0; 0 is cross-entropy. Defaults to 2.
        alpha: weight in [0, 1] of the positive targets, a number or one per label;
            negative targets weigh 1 - alpha. None (default) weighs nothing.
        from_logits: whether `y_pred` are logits; prefer them. Defaults to False.
        label_smoothing: in [0, 1); moves the targets towards 0.5. Defaults to 0.
        reduction: Keras' word for the mean over the rows. Defaults to
            "sum_over_batch_size".
        name: name of the loss.
        dtype: dtype of the reduction; the loss itself is computed in float32 or
            wider. Defaults to `keras.config.floatx()`.

    Returns:
        From `call`, (batch, ...) values, `y_pred.shape[:-1]`; from the loss itself,
        their reduction.

    Raises:
        TypeError: an argument that is not of its kind.
        ValueError: an argument out of range. When called: see `binary_focal_loss`.

    Example:

    >>> loss = BinaryFocalLoss(gamma=2.0, alpha=0.25, from_logits=True)
    >>> round(float(loss([[1.0], [0.0]], [[2.0], [2.0]])), 4)
    0.619

    References:
        Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection",
        2017, equations 4 and 5.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: Alpha = None,
        *,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "binary_focal_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.gamma, self.label_smoothing = _settings(
            gamma, label_smoothing, from_logits
        )
        self.alpha = _alpha(alpha, maximum=1.0)
        self.from_logits = from_logits

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        return super().__call__(*_plain(y_true, y_pred), sample_weight)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Values of `y_pred.shape[:-1]`."""
        return binary_focal_loss(y_true, y_pred, **_formula(self))

    def get_config(self) -> dict[str, Any]:
        """Everything the constructor takes."""
        return {**super().get_config(), "dtype": self.dtype, **_formula(self)}


@keras.saving.register_keras_serializable(package="kerastrip")
class CategoricalFocalLoss(keras.losses.Loss):
    """Focal loss of one-hot targets: `categorical_focal_loss` as a Keras loss.

        sum_c  -alpha_c * y_c * (1 - p_c)^gamma * log(p_c)

    Args:
        gamma: focusing parameter, >= 0; 0 is cross-entropy. Defaults to 2.
        alpha: weight >= 0, a number or one per class (`class_balanced_alpha` makes
            them). None (default) weighs nothing.
        from_logits: whether `y_pred` are logits; prefer them. Defaults to False.
        label_smoothing: in [0, 1); moves the targets towards 1 / classes. Defaults
            to 0.
        reduction: Keras' word for the mean over the rows. Defaults to
            "sum_over_batch_size".
        name: name of the loss.
        dtype: dtype of the reduction; the loss itself is computed in float32 or
            wider. Defaults to `keras.config.floatx()`.

    Returns:
        From `call`, (batch, ...) values, `y_pred.shape[:-1]`; from the loss itself,
        their reduction.

    Raises:
        TypeError: an argument that is not of its kind.
        ValueError: an argument out of range. When called: see
            `categorical_focal_loss`.

    Example:

    >>> loss = CategoricalFocalLoss(alpha=class_balanced_alpha([90, 10], beta=0.99))
    >>> round(float(loss([[0, 1], [1, 0]], [[0.1, 0.9], [0.1, 0.9]])), 4)
    0.259

    References:
        Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection",
        2017, equations 4 and 5, with one term per class.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: Alpha = None,
        *,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        reduction: str | None = "sum_over_batch_size",
        name: str = "categorical_focal_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.gamma, self.label_smoothing = _settings(
            gamma, label_smoothing, from_logits
        )
        self.alpha = _alpha(alpha)
        self.from_logits = from_logits

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        return super().__call__(*_plain(y_true, y_pred), sample_weight)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Values of `y_pred.shape[:-1]`."""
        return categorical_focal_loss(y_true, y_pred, **_formula(self))

    def get_config(self) -> dict[str, Any]:
        """Everything the constructor takes."""
        return {**super().get_config(), "dtype": self.dtype, **_formula(self)}


@keras.saving.register_keras_serializable(package="kerastrip")
class SparseCategoricalFocalLoss(LabelLoss):
    """Focal loss of integer labels: `sparse_categorical_focal_loss` as a Keras loss.

        -alpha_y * (1 - p_y)^gamma * log(p_y)

    Labels reach the formula as integers, whatever the dtype of the loss. With
    `ignore_class` the reductions "sum_over_batch_size" and "mean" are over the rows
    that count, as in Keras: `call` then returns the values times rows / counted
    rows, and 0 everywhere where no row counts. The other reductions get the plain
    values.

    Args:
        gamma: focusing parameter, >= 0; 0 is cross-entropy. Defaults to 2.
        alpha: weight >= 0, a number or one per class (`class_balanced_alpha` makes
            them). None (default) weighs nothing.
        from_logits: whether `y_pred` are logits; prefer them. Defaults to False.
        label_smoothing: in [0, 1); moves the targets towards 1 / classes. Defaults
            to 0.
        ignore_class: a label to leave out, such as -1 or 255 for "void" pixels.
            None (default) leaves none out.
        reduction: Keras' word for the mean over the rows. Defaults to
            "sum_over_batch_size".
        name: name of the loss.
        dtype: dtype of the reduction; the loss itself is computed in float32 or
            wider. Defaults to `keras.config.floatx()`.

    Returns:
        From `call`, (batch, ...) values, `y_pred.shape[:-1]`; from the loss itself,
        their reduction.

    Raises:
        TypeError: an argument that is not of its kind.
        ValueError: an argument out of range. When called: see
            `sparse_categorical_focal_loss`.

    Example:

    >>> loss = SparseCategoricalFocalLoss(from_logits=True, ignore_class=255)
    >>> round(float(loss([1, 255], [[2.0, 0.0, 0.0], [2.0, 0.0, 0.0]])), 4)
    1.7879

    References:
        Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection",
        2017, equations 4 and 5.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: Alpha = None,
        *,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        ignore_class: int | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str = "sparse_categorical_focal_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.gamma, self.label_smoothing = _settings(
            gamma, label_smoothing, from_logits
        )
        self.alpha = _alpha(alpha)
        self.from_logits = from_logits
        self.ignore_class = _ignored(ignore_class)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Values of `y_pred.shape[:-1]`."""
        values = sparse_categorical_focal_loss(
            y_true, y_pred, ignore_class=self.ignore_class, **_formula(self)
        )
        if self.ignore_class is None or self.reduction not in (
            "sum_over_batch_size",
            "mean",
        ):
            return values
        labels, _ = _labels(y_true, (*values.shape, None))
        counted = labels != self.ignore_class
        share = ops.mean(ops.cast(counted, values.dtype))
        return _numerics.safe_divide(values, share)

    def get_config(self) -> dict[str, Any]:
        """Everything the constructor takes."""
        return {
            **super().get_config(),
            **_formula(self),
            "ignore_class": self.ignore_class,
        }


def _plain(y_true: Any, y_pred: Any) -> tuple[Any, Any]:
    """Both before Keras makes tensors of them, which drops masks."""
    return _numerics.plain("y_true", y_true), _numerics.plain("y_pred", y_pred)


def _formula(loss: Any) -> dict[str, Any]:
    """The arguments that every focal loss shares with its function."""
    return {
        "gamma": loss.gamma,
        "alpha": loss.alpha,
        "from_logits": loss.from_logits,
        "label_smoothing": loss.label_smoothing,
    }


def _settings(gamma: Any, label_smoothing: Any, from_logits: Any) -> tuple:
    """The checked gamma and label smoothing."""
    _checks.boolean("from_logits", from_logits)
    return (
        _checks.number("gamma", gamma, minimum=0.0),
        _checks.number("label_smoothing", label_smoothing, minimum=0.0, below=1.0),
    )


def _alpha(alpha: Any, maximum: float | None = None) -> float | list[float] | None:
    """The checked class weights: None, a number, or a list with one per class."""
    if alpha is None:
        return None
    bounds: dict[str, Any] = {"minimum": 0.0, "maximum": maximum}
    if isinstance(alpha, (list, tuple, np.ndarray)) and np.ndim(alpha):
        return [
            _checks.number(f"alpha[{position}]", weight, **bounds)
            for position, weight in enumerate(alpha)
        ]
    advice = "A list with one number per class works too."
    return _checks.number("alpha", alpha, **bounds, advice=advice)


def _ignored(ignore_class: Any) -> int | None:
    """The checked `ignore_class`."""
    if ignore_class is None:
        return None
    return _checks.integer("ignore_class", ignore_class)


def _shape(name: str, tensor: Any) -> tuple[int | None, ...]:
    """The static shape of a tensor, None where an axis is unknown."""
    try:
        return tuple(tensor.shape)
    except ValueError:  # TensorFlow's word for an unknown rank
        told = _checks.Told("a tensor of unknown rank")
        advice = "Set its shape before the loss."
        expected = "a tensor of known rank"
        raise _checks.value_error(name, expected, told, advice) from None


def _predictions(y_pred: Any, alpha: Any) -> tuple[Any, tuple[Any, ...]]:
    """The predictions in float32 or wider, and their static shape."""
    y_pred = _numerics.at_least_float32(
        ops.convert_to_tensor(_numerics.plain("y_pred", y_pred))
    )
    shape = _shape("y_pred", y_pred)
    if len(shape) < 2 or shape[-1] is None:
        raise _checks.value_error(
            "y_pred",
            "shape (batch, ..., classes) with a known number of classes",
            _checks.Told(f"shape {shape}"),
            "One score per row has shape (batch, 1).",
        )
    if isinstance(alpha, list) and len(alpha) != shape[-1]:
        expected = f"a number or {shape[-1]} numbers, one per class"
        raise _checks.value_error("alpha", expected, alpha)
    return y_pred, shape


def _labels(y_true: Any, shape: tuple[int | None, ...]) -> tuple[Any, Any]:
    """Integer labels of the shape (batch, ...) for predictions of static `shape`.

    With them None, or a () bool tensor: whether they are whole numbers.
    """
    y_true = _numerics.as_given("y_true", y_true)
    label_shape = _shape("y_true", y_true)
    if len(label_shape) == len(shape) and label_shape[-1] == 1:
        y_true = ops.squeeze(y_true, axis=-1)
    _same_shape(y_true, shape[:-1], "One-hot rows go to CategoricalFocalLoss.")
    labels, whole = _numerics.whole_numbers("y_true", y_true)
    dtype = keras.backend.standardize_dtype(labels.dtype)
    # A narrow dtype can be compared neither with -1 nor with 300.
    return labels if dtype == "int64" else ops.cast(labels, "int32"), whole


def _targets_in_range(y_true: Any) -> Any:
    """Whether all targets are in [0, 1], as from `_numerics.confirmed`."""
    return _in_range("y_true", "targets", y_true, "Divide masks of 0 and 255 by 255.")


def _scores_in_range(y_pred: Any, from_logits: bool) -> Any:
    """Likewise for probabilities; nothing is asked of logits."""
    advice = "Logits want from_logits=True."
    return None if from_logits else _in_range("y_pred", "probabilities", y_pred, advice)


def _in_range(name: str, noun: str, x: Any, advice: str) -> Any:
    # NaN is neither: it shows in the loss. A softmax in bfloat16 may round beyond 1.
    outside = ops.logical_or(x < -0.01, x > 1.01)

    def error() -> str:
        wrong = float(_numerics.seen(x)[_numerics.seen(outside)].flat[0])
        return _checks.message(name, f"{noun} in [0, 1]", wrong, advice)

    return _numerics.confirmed(~ops.any(outside), error)


def _same_shape(y_true: Any, expected: tuple[int | None, ...], advice: str) -> None:
    """ValueError unless the static shape of `y_true` can be `expected`."""
    shape = _shape("y_true", y_true)
    if len(shape) == len(expected) and all(
        a is None or b is None or a == b for a, b in zip(shape, expected, strict=True)
    ):
        return
    told = _checks.Told(f"shape {shape}")
    raise _checks.value_error("y_true", f"shape {expected}", told, advice)


def _one_hot_advice(shape: tuple[int | None, ...]) -> str:
    """What may be wrong with targets of `shape` that should be one-hot rows."""
    if len(shape) < 2 or shape[-1] == 1:
        return "Integer labels go to the sparse categorical focal loss."
    return (
        "Targets and losses go to the outputs of the model in their order, and a "
        "validation sampler needs the label table of the training: "
        "classes=train.classes_."
    )


def _clip(p: Any) -> Any:
    """Probabilities away from 0 and 1, as far as Keras keeps them."""
    epsilon = keras.config.epsilon()
    return ops.clip(p, epsilon, 1.0 - epsilon)
