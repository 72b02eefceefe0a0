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
    ],
)
def test_labels_of_every_shape_become_a_vector_of_integers(labels):
    got = ops.convert_to_numpy(_numerics.integer_labels(labels))
    assert got.tolist() == [2, 0, 1]
    assert got.dtype.kind == "i"


def test_labels_beyond_float32_stay_apart():
    labels = np.arange(2**24, 2**24 + 4)
    got = ops.convert_to_numpy(_numerics.integer_labels(labels))
    assert got.tolist() == labels.tolist()


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_float_labels_are_a_type_error(shape):
    with pytest.raises(TypeError, match=r"labels.*integer.*float32.*int32"):
        _numerics.integer_labels(np.zeros(shape, np.float32))


@pytest.mark.parametrize("shape", [(), (2, 2, 2)])
def test_labels_of_another_rank_are_a_value_error(shape):
    with pytest.raises(ValueError, match=r"labels.*\(batch,\)"):
        _numerics.integer_labels(np.zeros(shape, np.int32))
