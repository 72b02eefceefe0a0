import warnings

import keras
import numpy as np
import pytest
import reference
from keras import ops

from kerastrip import mining
from kerastrip.distances import DISTANCES
from kerastrip.losses.contrastive import ContrastiveLoss

pytestmark = pytest.mark.backend


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("average_over", mining.AVERAGES)
def test_values_and_gradient_agree_with_the_loops(distance, average_over, rng):
    labels = rng.integers(0, 6, 30)
    rows = rng.normal(size=(30, 4)).astype(np.float32) / 2
    weights = rng.uniform(0.5, 2, 30)
    options = {
        "positive_margin": 0.2,
        "negative_margin": 0.9,
        "average_over": average_over,
    }
    values, gradient = reference.value_and_gradient(
        lambda x: (
            ContrastiveLoss(distance=distance, reduction=None, **options)(labels, x)
            * ops.convert_to_tensor(weights, "float32")
        ),
        rows,
    )
    expected, slope = reference.contrastive_loss(
        labels, rows, word=distance, weights=weights, **options
    )
    np.testing.assert_allclose(values, expected * weights, atol=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=1e-4 * np.linalg.norm(slope))


def test_one_pair_by_hand():
    loss = ContrastiveLoss(positive_margin=0.5, negative_margin=2.0)
    assert float(loss([0, 0], [[0.0, 0.0], [1.5, 0.0]])) == pytest.approx(0.5)
    assert float(loss([0, 1], [[0.0, 0.0], [1.5, 0.0]])) == pytest.approx(0.125)


@pytest.mark.parametrize("size", [0, 1])
def test_batches_without_a_pair_have_value_and_gradient_0(size):
    rows = np.ones((size, 3), np.float32)
    value, gradient = reference.value_and_gradient(
        lambda x: ContrastiveLoss(reduction=None)(np.zeros(size, np.int32), x), rows
    )
    assert value.tolist() == [0.0] * size
    assert (gradient == 0).all()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_duplicates_and_large_rows_stay_finite(distance, scale):
    rows = np.full((4, 3), scale, np.float32)
    value, gradient = reference.value_and_gradient(
        lambda x: ContrastiveLoss(distance=distance)([0, 0, 1, 1], x), rows
    )
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_config_restores_everything():
    loss = ContrastiveLoss(0.1, 0.8, "cosine", "active", name="c", dtype="float64")
    again = ContrastiveLoss.from_config(loss.get_config())
    assert again.get_config() == loss.get_config()
    restored = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(loss)
    )
    assert restored.get_config() == loss.get_config()
    assert restored.dtype == "float64"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"positive_margin": -0.1}, "positive_margin"),
        ({"negative_margin": 0}, "negative_margin"),
        ({"distance": "l2"}, "distance"),
        ({"average_over": "pairs"}, "average_over"),
    ],
)
def test_bad_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        ContrastiveLoss(**options)


def test_bad_calls_are_named():
    with pytest.raises(ValueError, match="labels"):
        ContrastiveLoss()(np.full(4, 0.5), np.zeros((4, 2)))
    with pytest.raises(ValueError, match="embeddings"):
        ContrastiveLoss()([0, 0], np.zeros((2, 2, 2)))


def test_distances_of_pairs_are_met_with_a_warning():
    with pytest.warns(UserWarning, match="embed single samples") as told:
        ContrastiveLoss()([0, 1, 1], np.ones((3, 1), "float32"))
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ContrastiveLoss()([0, 1, 1], np.ones((3, 2), "float32"))
