import keras
import numpy as np
import pytest
import reference
from keras import ops

from kerastrip import _numerics

pytestmark = pytest.mark.backend


def test_safe_sqrt_has_gradient_0_at_0():
    x = np.array([4.0, 0.0, -1.0], np.float32)
    value, gradient = reference.value_and_gradient(_numerics.safe_sqrt, x)
    np.testing.assert_allclose(value, [2, 0, 0])
    np.testing.assert_allclose(gradient, [0.25, 0, 0])
    assert np.isnan(float(_numerics.safe_sqrt(ops.convert_to_tensor(np.nan))))


def test_safe_divide_is_0_where_the_divisor_is_0():
    x = np.array([6.0, 5.0], np.float32)
    value, gradient = reference.value_and_gradient(
        lambda x: _numerics.safe_divide(x, ops.convert_to_tensor([2.0, 0.0])), x
    )
    np.testing.assert_allclose(value, [3, 0])
    np.testing.assert_allclose(gradient, [0.5, 0])


@pytest.mark.parametrize(
    "labels",
    [
        np.array([2, 0, 1]),
        np.array([[2], [0], [1]], np.uint8),
        np.eye(3, dtype=np.float32)[[2, 0, 1]],
        np.eye(3, dtype=bool)[[2, 0, 1]],
        [2, 0, 1],
        np.array([2, 0, 1], np.float32),
        np.array([[2], [0], [1]], np.float16),
        np.array([2, 0, 1], np.float64),
    ],
)
def test_labels_of_every_shape_become_a_vector_of_integers(labels):
    got, known = _numerics.integer_labels(labels)
    got = ops.convert_to_numpy(got)
    assert known is None
    assert got.tolist() == [2, 0, 1]
    assert got.dtype.kind == "i"


def test_labels_beyond_float32_stay_apart():
    labels = np.arange(2**24, 2**24 + 4)
    got, _ = _numerics.integer_labels(labels)
    assert ops.convert_to_numpy(got).tolist() == labels.tolist()


@pytest.mark.parametrize("far", [2**32, -(2**40)])
def test_labels_that_the_backend_would_wrap_are_refused(far):
    labels = np.array([0, far])
    if keras.backend.backend() == "jax":
        with pytest.raises(ValueError, match=rf"labels.*int32.*{far}.*PKSampler"):
            _numerics.integer_labels(labels)
    else:
        got, _ = _numerics.integer_labels(labels)
        assert ops.convert_to_numpy(got).tolist() == labels.tolist()


NO_LABELS = {
    "fractions": np.array([0.0, 0.5]),
    "NaN": np.array([[0.0], [np.nan]]),
    "float32": np.array([0, 2**24], np.float32),
    "float16": np.array([0, -(2**11)], np.float16),
    "bfloat16": ops.cast(np.array([0.0, 2**8]), "bfloat16"),
}
NO_ONE_HOT = {
    "several labels": np.array([[1, 0, 0], [1, 1, 0]]),
    "class and camera": np.array([[0, 1], [3, 1]]),
    "mixed": np.array([[1, 0], [0.3, 0.7]], np.float32),
    "smoothed": 0.9 * np.eye(3, dtype=np.float32) + 0.1 / 3,
    "zeros": np.zeros((2, 3), np.uint8),
    "no booleans": np.array([[False, True], [False, False]]),
    "minus one": np.array([[1, 0, 0], [1, 1, -1]]),
    "NaN": np.array([[1, 0], [1, np.nan]]),
}


@pytest.mark.parametrize("labels", NO_LABELS.values(), ids=NO_LABELS)
def test_floats_that_are_no_labels_are_an_error(labels):
    with pytest.raises(ValueError, match=r"`labels`.*whole numbers below.*Keras casts"):
        _numerics.integer_labels(labels)


@pytest.mark.parametrize("labels", NO_ONE_HOT.values(), ids=NO_ONE_HOT)
def test_rows_that_are_not_one_hot_are_an_error(labels):
    with pytest.raises(ValueError, match=r"`labels`.*one class a row.*the row \["):
        _numerics.integer_labels(labels)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="traces nothing")
@pytest.mark.parametrize("kind", [NO_LABELS, NO_ONE_HOT])
def test_what_is_no_label_makes_nan_while_traced(kind):
    def values(labels):
        _, known = _numerics.integer_labels(labels)
        return _numerics.nan_unless(known, ops.ones(2))

    values = reference.traced(values)
    for labels in kind.values():
        assert np.isnan(ops.convert_to_numpy(values(labels))).all()
    assert ops.convert_to_numpy(values(np.eye(2))).tolist() == [1, 1]


def test_pytorch_builds_a_model_with_label_matrices_of_ones():
    ones = np.ones((2, 3), np.float32)
    if keras.backend.backend() == "torch":
        assert not _numerics.integer_labels(ones)[1]
    else:
        with pytest.raises(ValueError, match="one class a row"):
            _numerics.integer_labels(ones)


@pytest.mark.parametrize("shape", [(), (2, 2, 2)])
def test_labels_of_another_rank_are_a_value_error(shape):
    with pytest.raises(ValueError, match=r"labels.*\(batch,\)"):
        _numerics.integer_labels(np.zeros(shape, np.int32))


def test_arrays_are_read_without_masks_and_in_the_byte_order_of_the_machine():
    for dtype in (">i4", ">f4", ">u2", "<i4", "f2"):
        got = _numerics.plain("y", np.ma.array([1, 2], dtype=dtype, mask=False))
        assert type(got) is np.ndarray
        assert got.dtype.isnative
        assert got.tolist() == [1, 2]
        assert ops.convert_to_numpy(_numerics.as_given("y", got)).tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"`y`.*1 masked.*position 1"):
        _numerics.as_given("y", np.ma.array([1, 2], mask=[0, 1]))
    assert _numerics.plain("y", "any") == "any"
