"""Focal losses: golden values, closed forms in loops, identities, limits, bad input."""

import math

import keras
import numpy as np
import pytest
import reference
from harness import tensorflow_only
from keras import ops

from kerastrip.losses import (
    BinaryFocalLoss,
    CategoricalFocalLoss,
    SparseCategoricalFocalLoss,
    binary_focal_loss,
    categorical_focal_loss,
    class_balanced_alpha,
    sparse_categorical_focal_loss,
)

GAMMAS = (0.0, 0.5, 2.0, 5.0)
backend = pytest.mark.backend


def as_numpy(x):
    return ops.convert_to_numpy(x)


def gradient(function, x):
    return reference.value_and_gradient(function, x)[1]


def binary_oracle(y, x, gamma, alpha):
    """Value and derivative of one element in float64 (Lin et al. 2017, appendix B)."""
    sign, weight = (1.0, alpha) if y else (-1.0, 1.0 - alpha)
    p = 1.0 / (1.0 + math.exp(-sign * x))
    q = 1.0 / (1.0 + math.exp(sign * x))
    log_p = -math.log1p(math.exp(-sign * x))
    value = -weight * q**gamma * log_p
    return value, sign * weight * q**gamma * (gamma * p * log_p - q)


def categorical_oracle(y, x, gamma, alpha):
    """Value and gradient of one row in float64, class by class."""
    e = [math.exp(value - max(x)) for value in x]
    total = sum(e)
    value, grad = 0.0, np.zeros(len(x))
    for c in range(len(x)):
        p = e[c] / total
        q = sum(e[j] for j in range(len(x)) if j != c) / total
        log_p = x[c] - max(x) - math.log(total)
        value -= alpha[c] * y[c] * q**gamma * log_p
        for k in range(len(x)):
            # (1 - p_c) / q is 1; (0 - p_k) / q stays below 1: no 0 ** (gamma - 1)
            share = 1.0 if k == c else -(e[k] / total) / q
            slope = gamma * p * log_p - q
            grad[k] += alpha[c] * y[c] * q**gamma * share * slope
    return value, grad


def one_hot(labels, classes):
    return np.eye(classes, dtype="float32")[labels]


# Golden values


@backend
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("case", range(3))
def test_categorical_golden(focal_golden, case, gamma):
    logits, probs, labels, alpha = (
        focal_golden[f"cat{case}_{name}"]
        for name in ("logits", "probs", "labels", "alpha")
    )
    targets = one_hot(labels, logits.shape[1])
    expected = focal_golden[f"cat{case}_exact_g{gamma}_vec"]
    for values in (
        categorical_focal_loss(
            targets, logits, gamma=gamma, alpha=alpha, from_logits=True
        ),
        sparse_categorical_focal_loss(
            labels, logits, gamma=gamma, alpha=alpha, from_logits=True
        ),
        categorical_focal_loss(targets, probs, gamma=gamma, alpha=alpha),
        sparse_categorical_focal_loss(labels, probs, gamma=gamma, alpha=alpha),
    ):
        np.testing.assert_allclose(as_numpy(values), expected, atol=1e-5)
    published = f"cat{case}_ug_g{gamma}"
    for weights, name in ((alpha, "_vec"), (0.25, "_scalar0.25")):
        loss = CategoricalFocalLoss(gamma, weights)(targets, probs)
        np.testing.assert_allclose(
            as_numpy(loss), focal_golden[published + name], atol=1e-5
        )


@backend
@pytest.mark.parametrize("alpha", [0.25, 0.75])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("case", range(3))
def test_binary_golden(focal_golden, case, gamma, alpha):
    logits, probs, targets = (
        focal_golden[f"bin{case}_{name}"] for name in ("logits", "probs", "targets")
    )
    exact = focal_golden[f"bin{case}_exact_g{gamma}_a{alpha}"]
    published = focal_golden[f"bin{case}_ug_g{gamma}_a{alpha}"]
    for y_pred, from_logits in ((logits, True), (probs, False)):
        values = binary_focal_loss(
            targets, y_pred, gamma=gamma, alpha=alpha, from_logits=from_logits
        )
        np.testing.assert_allclose(as_numpy(values), exact.mean(axis=1), atol=1e-5)
        loss = BinaryFocalLoss(gamma, alpha, from_logits=from_logits)(targets, y_pred)
        columns = targets.shape[1]  # the published code sums over them
        np.testing.assert_allclose(
            as_numpy(loss) * columns, published, atol=1e-5 * columns
        )


# Limits: value and gradient far out


@backend
@pytest.mark.parametrize("gamma", GAMMAS)
def test_binary_value_and_gradient_at_extreme_logits(gamma):
    x = np.array([-100, -50, -20, -5, 0, 5, 20, 50, 100], "float32")
    logits = np.repeat(x, 2).reshape(-1, 1)
    targets = np.tile([0.0, 1.0], len(x)).astype("float32").reshape(-1, 1)
    expected = [
        binary_oracle(y, z, gamma, 0.3)
        for y, z in zip(targets[:, 0], logits[:, 0].tolist(), strict=True)
    ]

    def loss(z):
        return binary_focal_loss(targets, z, gamma=gamma, alpha=0.3, from_logits=True)

    values, slopes = np.array(expected).T
    np.testing.assert_allclose(as_numpy(loss(logits)), values, rtol=1e-4, atol=1e-30)
    np.testing.assert_allclose(
        gradient(loss, logits)[:, 0], slopes, rtol=1e-4, atol=1e-30
    )


@backend
@pytest.mark.parametrize("gamma", GAMMAS)
def test_categorical_value_and_gradient_at_extreme_logits(gamma):
    rows = [
        [100, -100, 0],
        [-100, 100, 100],
        [30, 0, 0],
        [-20, 0, 1],
        [2, 2, 2],
        [0.7, 0.6, -1],
    ]
    logits = np.repeat(np.array(rows, "float32"), 3, axis=0)
    targets = np.tile(np.eye(3, dtype="float32"), (len(rows), 1))
    targets[-1] = [0.2, 0.5, 0.3]
    alpha = [0.5, 1.0, 2.0]
    expected = [
        categorical_oracle(y, x, gamma, alpha)
        for y, x in zip(targets.tolist(), logits.tolist(), strict=True)
    ]

    def loss(x):
        return categorical_focal_loss(
            targets, x, gamma=gamma, alpha=alpha, from_logits=True
        )

    np.testing.assert_allclose(
        as_numpy(loss(logits)), [v for v, _ in expected], rtol=1e-4, atol=2e-7
    )
    np.testing.assert_allclose(
        gradient(loss, logits), [g for _, g in expected], rtol=1e-4, atol=2e-7
    )


@backend
@pytest.mark.parametrize("gamma", GAMMAS)
def test_saturated_probabilities_stay_finite(gamma):
    probs = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], "float32")
    targets = one_hot([1, 1, 1], 3)
    for function in (categorical_focal_loss, binary_focal_loss):

        def loss(p, function=function):
            return function(targets, p, gamma=gamma)

        values = as_numpy(loss(probs))
        assert values[0] < 1e-5 < values[1] < 20
        assert np.isfinite(values).all()
        assert np.isfinite(gradient(loss, probs)).all()


@backend
def test_one_class_only_is_no_loss():
    y = np.ones((4, 1), "float32")
    logits = np.full((4, 1), 3.0, "float32")
    for gamma in GAMMAS:

        def loss(x, gamma=gamma):
            return categorical_focal_loss(y, x, gamma=gamma, from_logits=True)

        np.testing.assert_array_equal(as_numpy(loss(logits)), 0.0)
        np.testing.assert_array_equal(gradient(loss, logits), 0.0)


# Identities


@backend
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("from_logits", [True, False])
def test_gamma_zero_is_keras_cross_entropy(rng, from_logits, smoothing):
    logits = (3 * rng.normal(size=(6, 5))).astype("float32")
    labels = rng.integers(0, 5, 6)
    targets = one_hot(labels, 5)
    keras_words = {"from_logits": from_logits, "label_smoothing": smoothing}

    probs = as_numpy(ops.softmax(logits))
    y_pred = logits if from_logits else probs
    expected = as_numpy(
        keras.losses.categorical_crossentropy(targets, y_pred, **keras_words)
    )
    for function, y in (
        (categorical_focal_loss, targets),
        (sparse_categorical_focal_loss, labels),
    ):
        values = as_numpy(function(y, y_pred, gamma=0, **keras_words))
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)

    y_pred = logits if from_logits else as_numpy(ops.sigmoid(logits))
    np.testing.assert_allclose(
        as_numpy(binary_focal_loss(targets, y_pred, gamma=0, **keras_words)),
        as_numpy(keras.losses.binary_crossentropy(targets, y_pred, **keras_words)),
        rtol=1e-5,
        atol=1e-6,
    )


@backend
def test_rows_of_probabilities_are_normalised_as_keras_does(rng):
    probs = rng.uniform(0.1, 1.0, (4, 3)).astype("float32")  # rows do not sum to 1
    targets = one_hot([0, 1, 2, 0], 3)
    np.testing.assert_allclose(
        as_numpy(categorical_focal_loss(targets, probs, gamma=0)),
        as_numpy(keras.losses.categorical_crossentropy(targets, probs)),
        rtol=1e-5,
    )


@backend
@pytest.mark.parametrize("gamma", GAMMAS)
def test_binary_is_categorical_with_two_classes(rng, gamma):
    x = (4 * rng.normal(size=(8, 1))).astype("float32")
    y = rng.uniform(size=(8, 1)).astype("float32")  # soft targets too
    words = {"gamma": gamma, "from_logits": True, "label_smoothing": 0.1}
    np.testing.assert_allclose(
        as_numpy(binary_focal_loss(y, x, alpha=0.25, **words)),
        as_numpy(
            categorical_focal_loss(
                np.hstack([1 - y, y]),
                np.hstack([np.zeros_like(x), x]),
                alpha=[0.75, 0.25],
                **words,
            )
        ),
        rtol=1e-4,
        atol=1e-6,
    )


@backend
def test_alpha_weighs_each_label_of_a_binary_loss(rng):
    x = rng.normal(size=(4, 3)).astype("float32")
    y = rng.integers(0, 2, (4, 3)).astype("float32")
    alpha = [0.1, 0.5, 0.9]
    expected = [
        np.mean([binary_oracle(y[i, c], x[i, c], 2.0, alpha[c])[0] for c in range(3)])
        for i in range(4)
    ]
    values = binary_focal_loss(y, x, alpha=np.array(alpha), from_logits=True)
    np.testing.assert_allclose(as_numpy(values), expected, rtol=1e-4)


@backend
def test_smoothing_is_the_same_as_smoothed_targets(rng):
    x = rng.normal(size=(5, 4)).astype("float32")
    y = one_hot([0, 1, 2, 3, 0], 4)
    for function, floor in (
        (categorical_focal_loss, 0.2 / 4),
        (binary_focal_loss, 0.2 / 2),
    ):
        np.testing.assert_allclose(
            as_numpy(function(y, x, from_logits=True, label_smoothing=0.2)),
            as_numpy(function(0.8 * y + np.float32(floor), x, from_logits=True)),
            rtol=1e-5,
        )


# Shapes and dtypes of labels


@backend
@pytest.mark.parametrize("dtype", ["int64", "uint8"])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (2, 3, 2), (2, 3, 2, 1)])
def test_sparse_labels_of_every_shape(rng, shape, dtype):
    rows = shape[:-1] if shape[-1] == 1 else shape
    logits = rng.normal(size=(*rows, 7)).astype("float32")
    labels = rng.integers(0, 7, shape)
    values = sparse_categorical_focal_loss(
        labels.astype(dtype), logits, from_logits=True
    )
    expected = categorical_focal_loss(
        one_hot(labels.reshape(rows), 7), logits, from_logits=True
    )
    assert tuple(values.shape) == rows
    np.testing.assert_allclose(as_numpy(values), as_numpy(expected), rtol=1e-6)
    loss = SparseCategoricalFocalLoss(from_logits=True)(labels.astype(dtype), logits)
    np.testing.assert_allclose(as_numpy(loss), as_numpy(values).mean(), rtol=1e-5)


@backend
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_labels_survive_a_loss_of_low_precision(dtype):
    logits = one_hot([2049], 3000) * 20.0
    loss = SparseCategoricalFocalLoss(from_logits=True, dtype=dtype)
    assert float(loss([2049], logits)) < 1e-3
    assert float(loss([2048], logits)) > 10.0  # the two are one number in bfloat16


@backend
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_predictions_are_computed_in_float32(dtype):
    logits = ops.cast(np.array([[9.0, -9.0, 1.0]]), dtype)
    values = sparse_categorical_focal_loss([1], logits, gamma=0.5, from_logits=True)
    assert keras.backend.standardize_dtype(values.dtype) == "float32"
    expected, _ = categorical_oracle([0, 1, 0], [9.0, -9.0, 1.0], 0.5, [1, 1, 1])
    np.testing.assert_allclose(as_numpy(values), [expected], rtol=1e-5)


@backend
def test_one_target_per_row_fits_one_column():
    y, x = np.array([0.0, 1.0, 1.0], "float32"), np.array([[0.5], [-1.0], [2.0]])
    flat = binary_focal_loss(y, x, from_logits=True)
    column = binary_focal_loss(y[:, None], x, from_logits=True)
    assert tuple(flat.shape) == (3,)
    np.testing.assert_array_equal(as_numpy(flat), as_numpy(column))


@backend
def test_empty_batch():
    for function, y in (
        (binary_focal_loss, np.zeros((0, 3), "float32")),
        (categorical_focal_loss, np.zeros((0, 3), "float32")),
        (sparse_categorical_focal_loss, np.zeros(0, "int32")),
    ):
        assert tuple(function(y, np.zeros((0, 3), "float32")).shape) == (0,)


@backend
def test_labels_of_a_narrow_dtype(rng):
    logits = rng.normal(size=(3, 300)).astype("float32")
    labels = np.array([250, 255, 0])
    words = {"from_logits": True, "ignore_class": -1}  # neither fits into uint8
    for loss in (
        SparseCategoricalFocalLoss(**words),
        lambda y, x: sparse_categorical_focal_loss(y, x, **words),
    ):
        np.testing.assert_array_equal(
            as_numpy(loss(labels.astype("uint8"), logits)),
            as_numpy(loss(labels, logits)),
        )


# Ignored and impossible labels


@backend
@pytest.mark.parametrize("void", [-1, 255, 2])
def test_ignored_rows_are_zero_and_the_mean_is_over_the_others(rng, void):
    logits = rng.normal(size=(2, 3, 5)).astype("float32")
    labels = np.array([[0, void, 1], [void, void, 4]], "int32")
    counted = labels != void
    words = {"from_logits": True, "ignore_class": void}
    values = as_numpy(sparse_categorical_focal_loss(labels, logits, **words))
    plain = as_numpy(
        sparse_categorical_focal_loss(
            np.where(counted, labels, 0), logits, from_logits=True
        )
    )
    np.testing.assert_allclose(values, np.where(counted, plain, 0.0), rtol=1e-6)

    def loss(x):
        return sparse_categorical_focal_loss(labels, x, **words)

    rows_with_gradient = np.abs(gradient(loss, logits)).sum(axis=-1) > 0
    np.testing.assert_array_equal(rows_with_gradient, counted)

    for reduction, expected in (
        ("sum_over_batch_size", plain[counted].mean()),
        ("sum", plain[counted].sum()),
    ):
        result = SparseCategoricalFocalLoss(**words, reduction=reduction)(
            labels[..., None], logits
        )
        np.testing.assert_allclose(as_numpy(result), expected, rtol=1e-5)

    theirs = keras.losses.SparseCategoricalCrossentropy(**words)(labels, logits)
    ours = SparseCategoricalFocalLoss(gamma=0, **words)(labels, logits)
    np.testing.assert_allclose(as_numpy(ours), as_numpy(theirs), rtol=1e-5)


@backend
def test_a_batch_of_ignored_rows_is_zero(rng):
    logits = rng.normal(size=(4, 3)).astype("float32")
    loss = SparseCategoricalFocalLoss(from_logits=True, ignore_class=-1)
    labels = np.full(4, -1)

    def value(x):
        return loss(labels, x)

    assert float(value(logits)) == 0.0
    np.testing.assert_array_equal(gradient(value, logits), 0.0)


@backend
@pytest.mark.parametrize("label", [-1, 3, 2**20])
def test_an_impossible_label_is_nan_and_not_zero(label):
    values = as_numpy(
        sparse_categorical_focal_loss(
            [1, label, 0], np.zeros((3, 3)), from_logits=True, ignore_class=0
        )
    )
    np.testing.assert_array_equal(np.isnan(values), [False, True, False])
    assert values[2] == 0.0


# Logits that mask, and logits as large as floats get


def softmax_losses(labels, **options):
    """The categorical and the sparse loss of integer labels, by name."""
    rows = one_hot(labels, 5)
    return {
        "categorical": lambda x: categorical_focal_loss(
            rows, x, from_logits=True, **options
        ),
        "sparse": lambda x: sparse_categorical_focal_loss(
            labels, x, from_logits=True, **options
        ),
    }


@backend
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_masked_class_is_a_class_that_is_not_there(rng, gamma, smoothing):
    x = rng.normal(size=(6, 5)).astype("float32")
    x[:, 3] = -np.inf
    labels, left = np.array([0, 1, 2, 4, 0, 1]), [0, 1, 2, 4]
    alpha = [0.5, 1.0, 2.0, 3.0, 1.5]
    options = {"gamma": gamma, "label_smoothing": smoothing}

    def without(x):
        return categorical_focal_loss(
            one_hot(labels, 5)[:, left],
            x,
            from_logits=True,
            alpha=[alpha[c] for c in left],
            **options,
        )

    for name, loss in softmax_losses(labels, alpha=alpha, **options).items():
        expected = as_numpy(without(x[:, left]))
        np.testing.assert_allclose(as_numpy(loss(x)), expected, rtol=1e-5, err_msg=name)
        # As large an upstream gradient as the loss scaling of float16 begins with.
        slope = gradient(lambda x, loss=loss: loss(x) * 2.0**15, x) / 2.0**15
        np.testing.assert_array_equal(slope[:, 3], 0.0)
        expected = gradient(without, x[:, left])
        np.testing.assert_allclose(slope[:, left], expected, rtol=1e-4, atol=1e-6)


@backend
def test_a_label_on_a_masked_class_costs_infinity():
    x = np.array([[0.0, -np.inf, 0.0, 1.0, 2.0]], "float32")
    for loss in softmax_losses(np.array([1])).values():
        assert as_numpy(loss(x)) == np.inf
    assert as_numpy(binary_focal_loss([[1]], x[:, 1:2], from_logits=True)) == np.inf
    assert as_numpy(binary_focal_loss([[0]], -x[:, 1:2], from_logits=True)) == np.inf


@backend
def test_an_ignored_row_may_mask_any_class():
    x = np.array([[-np.inf, 0.0, 1.0]], "float32")
    loss = SparseCategoricalFocalLoss(from_logits=True, ignore_class=255)
    assert float(loss([255], x)) == 0.0
    np.testing.assert_array_equal(gradient(lambda x: loss([255], x), x), 0.0)


@backend
def test_a_row_of_masked_classes_alone_is_not_finite():
    x = np.full((1, 5), -np.inf, "float32")
    for loss in softmax_losses(np.array([1])).values():
        assert not np.isfinite(as_numpy(loss(x)))


@backend
@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_largest_logits_have_the_value_and_gradient_of_cross_entropy(gamma):
    x = np.array([[3e38, 0, 1, -1, 0], [0, 3e38, -3e38, 0, 1]], "float32")
    p = np.eye(5)[[0, 1]]
    for labels in ([0, 1], [1, 0], [3, 2]):
        right = np.array(labels) == [0, 1]
        expected = np.where(right, 0.0, 3e38)
        for loss in softmax_losses(np.array(labels), gamma=gamma).values():
            found = as_numpy(loss(x))
            slope = gradient(loss, x)
            assert np.isfinite(slope).all()
            if labels == [3, 2]:  # a difference of 6e38 is no float
                expected = [3e38, np.finfo("float32").max]
            np.testing.assert_allclose(found, expected, rtol=1e-6)
            np.testing.assert_allclose(slope, p - np.eye(5)[labels], atol=1e-6)


@backend
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_extreme_logits_in_the_binary_loss(gamma, smoothing):
    x = np.array([[-np.inf], [np.inf], [-3e38], [3e38]], "float32")
    loss = BinaryFocalLoss(
        gamma, from_logits=True, label_smoothing=smoothing, reduction=None
    )
    y = np.array([[0.0], [1.0], [0.0], [1.0]], "float32")
    beside = 0.5 * smoothing * 3e38
    np.testing.assert_allclose(as_numpy(loss(y, x)), [0, 0, beside, beside], rtol=1e-5)
    slope = gradient(lambda x: loss(y, x) * 2.0**15, x) / 2.0**15
    expected = [0, 0, -0.5 * smoothing, 0.5 * smoothing]
    np.testing.assert_allclose(slope[:, 0], expected, atol=1e-6)
    wrong = as_numpy(loss(1.0 - y, x))
    np.testing.assert_allclose(wrong[2:], (1 - 0.5 * smoothing) * 3e38, rtol=1e-5)
    slope = gradient(lambda x: loss(1.0 - y, x), x)[2:, 0]
    np.testing.assert_allclose(np.abs(slope), 1 - 0.5 * smoothing, rtol=1e-5)


# Targets and probabilities out of range

OUT_OF_RANGE = {
    "a mask of 0 and 255": (BinaryFocalLoss(), [[0], [255]], [[0.1], [0.9]], "y_true"),
    "a mask in bytes": (
        BinaryFocalLoss(),
        np.array([[0], [255]], np.uint8),
        [[0.1], [0.9]],
        "y_true",
    ),
    "binary logits": (BinaryFocalLoss(), [[0], [1]], [[0.5], [3.0]], "from_logits"),
    "class rows": (CategoricalFocalLoss(), [[0, 2]], [[0.5, 0.5]], "y_true"),
    "logits": (CategoricalFocalLoss(), [[0, 1]], [[-2.0, 3.0]], "from_logits"),
    "sparse": (SparseCategoricalFocalLoss(), [0], [[-2.0, 3.0]], "from_logits"),
}


@backend
@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_targets_and_probabilities_outside_0_and_1_do_not_pass(case):
    loss, y, x, words = OUT_OF_RANGE[case]
    x = np.array(x, "float32")
    with pytest.raises(ValueError, match=rf"in \[0, 1\].*{words}|{words}.*in \[0, 1\]"):
        loss(y, x)
    if keras.config.backend() != "torch":
        assert np.isnan(reference.traced(loss)(np.array(y), x))


@backend
def test_soft_targets_and_rounded_probabilities_pass():
    y = np.array([[0.25, 0.75]], "float32")
    for loss in (BinaryFocalLoss(), CategoricalFocalLoss()):
        assert np.isfinite(float(loss(y, np.array([[0.0, 1.004]], "float32"))))


# Reductions


@backend
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", None])
def test_reduction_and_sample_weight_are_keras(rng, reduction):
    x = rng.normal(size=(5, 3)).astype("float32")
    labels = np.array([0, 2, 1, 1, 0])
    weights = np.array([1.0, 0.0, 2.0, 0.5, 3.0], "float32")
    rows = {
        BinaryFocalLoss: (binary_focal_loss, one_hot(labels, 3)),
        CategoricalFocalLoss: (categorical_focal_loss, one_hot(labels, 3)),
        SparseCategoricalFocalLoss: (sparse_categorical_focal_loss, labels),
    }
    reduce = {"sum_over_batch_size": np.mean, "sum": np.sum, None: np.asarray}
    for loss, (function, y) in rows.items():
        values = as_numpy(function(y, x, from_logits=True)) * weights
        result = loss(from_logits=True, reduction=reduction)(y, x, weights)
        np.testing.assert_allclose(
            as_numpy(result), reduce[reduction](values), rtol=1e-5
        )


# TensorFlow graphs


@tensorflow_only
def test_xla_with_unknown_batch(rng):
    import tensorflow as tf

    row = tf.TensorSpec((None, 4), tf.float32)
    sparse = tf.TensorSpec((None,), tf.int32)
    for function, label_spec in (
        (binary_focal_loss, row),
        (categorical_focal_loss, row),
        (sparse_categorical_focal_loss, sparse),
    ):

        def run(y, x, function=function):
            with tf.GradientTape() as tape:
                tape.watch(x)
                values = function(y, x, gamma=0.5, from_logits=True)
            return values, tape.gradient(values, x)

        compiled = tf.function(run, jit_compile=True, input_signature=(label_spec, row))
        for batch in (0, 1, 5):
            x = tf.constant(rng.normal(size=(batch, 4)) * 20, tf.float32)
            labels = rng.integers(0, 4, batch)
            y = tf.constant(labels if label_spec is sparse else one_hot(labels, 4))
            y = tf.cast(y, label_spec.dtype)
            for ours, eager in zip(compiled(y, x), run(y, x), strict=True):
                np.testing.assert_allclose(ours, eager, rtol=1e-5, atol=1e-6)


@tensorflow_only
@pytest.mark.parametrize(
    ("label_shape", "shape", "words"),
    [
        ((None, 3), None, "y_pred.*unknown rank"),
        (None, (None, 3), "y_true.*unknown rank"),
        ((None, 3), (None, None), "y_pred.*known number of classes"),
    ],
)
def test_unknown_shapes_are_refused_when_traced(label_shape, shape, words):
    import tensorflow as tf

    spec = [tf.TensorSpec(s, tf.float32) for s in (label_shape, shape)]
    for function in (binary_focal_loss, categorical_focal_loss):
        with pytest.raises(ValueError, match=words):
            tf.function(function).get_concrete_function(*spec)


# Class-balanced weights


def test_class_balanced_alpha_is_the_effective_number():
    counts, beta = [5000, 120, 7, 1], 0.99
    weights = []
    for n in counts:
        effective = sum(beta**i for i in range(n))  # equation 2 as a series
        weights.append(1.0 / effective)
    expected = [w * len(counts) / sum(weights) for w in weights]
    np.testing.assert_allclose(class_balanced_alpha(counts, beta), expected, rtol=1e-9)


def test_class_balanced_alpha_limits():
    counts = np.array([100, 10, 1])
    np.testing.assert_array_equal(class_balanced_alpha(counts, 0.0), 1.0)
    inverse = 1.0 / counts
    np.testing.assert_allclose(
        class_balanced_alpha(counts, 1 - 1e-12), 3 * inverse / inverse.sum(), rtol=1e-3
    )


# Bad input


@pytest.mark.parametrize(
    "loss", [BinaryFocalLoss, CategoricalFocalLoss, SparseCategoricalFocalLoss]
)
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"gamma": -0.1}, ValueError, "`gamma`.*>= 0.*-0.1"),
        ({"gamma": math.nan}, ValueError, "`gamma`.*nan"),
        ({"gamma": "2"}, TypeError, "`gamma`.*'2'"),
        ({"gamma": True}, TypeError, "`gamma`"),
        ({"alpha": -1.0}, ValueError, "`alpha`.*-1.0"),
        ({"alpha": math.inf}, ValueError, "`alpha`.*inf"),
        ({"alpha": "balanced"}, TypeError, "`alpha`.*one number per class"),
        ({"alpha": [0.1, math.nan]}, ValueError, r"`alpha\[1\]`.*nan"),
        ({"alpha": [0.1, -0.2]}, ValueError, r"`alpha\[1\]`.*-0.2"),
        ({"alpha": [[0.1, 0.2]]}, TypeError, r"`alpha\[0\]`"),
        ({"label_smoothing": 1.0}, ValueError, "`label_smoothing`.*< 1"),
        ({"label_smoothing": -0.1}, ValueError, "`label_smoothing`"),
        ({"from_logits": "yes"}, TypeError, "`from_logits`.*True or False"),
    ],
)
def test_bad_settings(loss, arguments, error, words):
    with pytest.raises(error, match=words):
        loss(**arguments)


def test_bad_settings_of_one_loss():
    with pytest.raises(ValueError, match=r"`alpha`.*<= 1.*1\.5"):
        BinaryFocalLoss(alpha=1.5)
    with pytest.raises(TypeError, match=r"`ignore_class`.*an integer"):
        SparseCategoricalFocalLoss(ignore_class="void")


@backend
@pytest.mark.parametrize(
    ("function", "label_shape", "shape", "words"),
    [
        (binary_focal_loss, (4,), (4,), r"`y_pred`.*\(4,\).*\(batch, 1\)"),
        (binary_focal_loss, (4,), (4, 2), r"`y_true`.*\(4, 2\).*\(4,\)"),
        (categorical_focal_loss, (4,), (4, 2), "`y_true`.*sparse"),
        (
            categorical_focal_loss,
            (4, 3),
            (4, 2),
            r"`y_true`.*\(4, 2\).*\(4, 3\).*order.*classes=",
        ),
        (
            sparse_categorical_focal_loss,
            (4, 2),
            (4, 2),
            "`y_true`.*One-hot rows go to CategoricalFocalLoss",
        ),
        (sparse_categorical_focal_loss, (3,), (4, 2), r"`y_true`.*\(4,\).*\(3,\)"),
        (sparse_categorical_focal_loss, (), (2,), "`y_pred`"),
    ],
)
def test_bad_shapes(function, label_shape, shape, words):
    with pytest.raises(ValueError, match=words):
        function(np.ones(label_shape, "int32"), np.ones(shape, "float32"))


@backend
def test_alpha_of_the_wrong_length():
    x, labels = np.zeros((2, 3), "float32"), np.array([0, 1])
    for function, y in (
        (binary_focal_loss, one_hot(labels, 3)),
        (categorical_focal_loss, one_hot(labels, 3)),
        (sparse_categorical_focal_loss, labels),
    ):
        for alpha in ([0.5, 0.5], [0.5], []):
            with pytest.raises(ValueError, match=r"`alpha`.*3 numbers, one per class"):
                function(y, x, alpha=alpha)


@backend
def test_fractions_as_labels_are_refused():
    x = np.zeros((2, 3), "float32")
    for loss in (sparse_categorical_focal_loss, SparseCategoricalFocalLoss()):
        with pytest.raises(ValueError, match=r"`y_true`.*integers.*float32.*0\.5"):
            loss(np.array([0.0, 0.5], "float32"), x)


@pytest.mark.parametrize(
    ("counts", "beta", "error", "words"),
    [
        ([10, 0], 0.9, ValueError, "`counts`.*at least 1"),
        ([], 0.9, ValueError, "`counts`"),
        ([[1, 2]], 0.9, ValueError, "`counts`"),
        ([1.0, math.nan], 0.9, ValueError, "`counts`"),
        (["a", "b"], 0.9, TypeError, "`counts`"),
        ([1, 2], 1.0, ValueError, "`beta`.*< 1"),
        ([1, 2], "high", TypeError, "`beta`"),
    ],
)
def test_bad_counts(counts, beta, error, words):
    with pytest.raises(error, match=words):
        class_balanced_alpha(counts, beta)


FOCAL = {
    "binary object": (BinaryFocalLoss(), np.eye(3)),
    "categorical object": (CategoricalFocalLoss(), np.eye(3)),
    "sparse object": (SparseCategoricalFocalLoss(), np.arange(3)),
    "binary": (binary_focal_loss, np.eye(3)),
    "categorical": (categorical_focal_loss, np.eye(3)),
    "sparse": (sparse_categorical_focal_loss, np.arange(3)),
}


@backend
@pytest.mark.parametrize(("loss", "y"), FOCAL.values(), ids=FOCAL)
def test_masks_are_refused_and_foreign_byte_order_is_read(loss, y):
    x = np.float32(np.eye(3) * 0.4 + 0.2)
    with pytest.raises(ValueError, match=r"`y_true`.*1 masked"):
        loss(np.ma.array(y, mask=np.arange(y.size).reshape(y.shape) == 1), x)
    with pytest.raises(ValueError, match=r"`y_pred`.*3 masked"):
        loss(y, np.ma.array(x, mask=x > 0.5))
    expected = ops.convert_to_numpy(loss(y, x))
    for labels in (y.astype(">i4"), y.astype(">f4")):
        got = ops.convert_to_numpy(loss(labels, x.astype(">f4")))
        np.testing.assert_allclose(got, expected, rtol=1e-6)
