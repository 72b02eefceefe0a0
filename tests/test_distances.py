import numpy as np
import pytest
import reference
from keras import ops

from kerastrip import distances

pytestmark = pytest.mark.backend
WORDS = distances.DISTANCES


@pytest.mark.parametrize("word", WORDS)
def test_matrix_agrees_with_loops(word, rng):
    x = rng.normal(size=(7, 5)).astype(np.float32)
    got = ops.convert_to_numpy(distances.pairwise_distances(x, distance=word))
    np.testing.assert_allclose(got, reference.distance_matrix(x, word), atol=2e-6)
    assert (np.diag(got) == 0).all()


@pytest.mark.parametrize("word", WORDS)
def test_distances_to_others(word, rng):
    x, y = (rng.normal(size=(n, 5)).astype(np.float32) for n in (3, 4))
    got = distances.pairwise_distances(x, distance=word, others=y)
    expected = reference.distance_matrix(np.concatenate([x, y]), word)[:3, 3:]
    np.testing.assert_allclose(ops.convert_to_numpy(got), expected, atol=2e-6)


@pytest.mark.parametrize("word", WORDS)
def test_gradient_agrees_with_loops(word, rng):
    x = rng.normal(size=(5, 3)).astype(np.float32)
    _, gradient = reference.value_and_gradient(
        lambda x: distances.pairwise_distances(x, distance=word), x
    )
    expected = np.zeros(x.shape)
    for i in range(5):
        for j in range(5):
            if i != j:
                _, to_i, to_j = reference.distance_and_slopes(x[i], x[j], word)
                expected[i] += to_i
                expected[j] += to_j
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4, 1e-20])
def test_duplicates_zero_rows_and_extreme_lengths_stay_finite(word, scale):
    x = np.full((3, 4), scale, np.float32)
    value, gradient = reference.value_and_gradient(
        lambda x: distances.pairwise_distances(x, distance=word), x
    )
    assert np.isfinite(value).all()
    assert (value >= 0).all()
    assert np.isfinite(gradient).all()


def test_half_precision_is_measured_in_float32(rng):
    x = rng.normal(size=(4, 3)).astype(np.float16)
    got = ops.convert_to_numpy(distances.pairwise_distances(x))
    assert got.dtype == np.float32
    np.testing.assert_allclose(
        got, reference.distance_matrix(x, "euclidean"), atol=1e-5
    )


def test_unknown_word_suggests_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'euclidean'"):
        distances.pairwise_distances(np.zeros((2, 2)), distance="euclidian")
