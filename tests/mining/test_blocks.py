"""The mining engine over several blocks of rows against the plain loops.

Up to 128 rows the engine works in one block, so everything here has blocks of 16 rows,
or more rows than fit one block.
"""

import numpy as np
import pytest
import reference
from keras import ops

from kerastrip import mining
from kerastrip.distances import DISTANCES
from kerastrip.mining import blocks


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 rows; what was compiled for others is left out."""
    monkeypatch.setattr(blocks, "block_rows", lambda padded: 16)
    blocks.compiled_on_tensorflow.cache_clear()
    yield
    blocks.compiled_on_tensorflow.cache_clear()


def ragged_batch(rng, large=0, size=72):
    """Classes of 1 to 8 rows, or beside them a large class; many distances are equal."""
    labels = np.repeat(np.arange(90), rng.integers(1, 9, 90))[:size]
    labels[:large] = 0
    rows = rng.integers(-2, 3, size=(size, 3)).astype(np.float32)
    # Ties of distances are exact; the nearest row of a tie is left open, so that the
    # gradient needs rows that do not tie.
    return rng.permutation(labels), rows


def smooth_batch(rng, **options):
    labels, rows = ragged_batch(rng, **options)
    return labels, rows + rng.normal(size=rows.shape).astype(np.float32) / 8


def compare(got, expected):
    values, gradient = got
    np.testing.assert_allclose(values, expected[0], atol=1e-4)
    np.testing.assert_allclose(gradient, expected[1], atol=1e-3)
    assert np.abs(gradient).max() > 0.01


WAYS = [
    {"mining": "semi_hard", "average_over": "active"},
    {"mining": "semi_hard_or_hard", "word": "squared_euclidean"},
    {"mining": "hard", "average_over": "active", "word": "cosine"},
    {"mining": "all", "average_over": "active"},
    {"mining": "semi_hard", "soft": True},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_triplet_losses_and_gradients(way, small_blocks, rng):
    labels, rows = smooth_batch(rng)
    options = {"margin": 0.7, **way}
    distance = options.pop("word", "euclidean")
    got = reference.value_and_gradient(
        lambda x: mining.triplet_losses(labels, x, distance=distance, **options), rows
    )
    compare(got, reference.triplet_loss(labels, rows, word=distance, **options))


@pytest.mark.parametrize("word", ["semi_hard", "semi_hard_or_hard"])
def test_a_class_beyond_the_table_of_pairs(word, small_blocks, rng):
    labels, rows = smooth_batch(rng, large=67, size=90)
    options = {"margin": 0.7, "mining": word, "average_over": "active"}
    got = reference.value_and_gradient(
        lambda x: mining.triplet_losses(labels, x, **options), rows
    )
    compare(got, reference.triplet_loss(labels, rows, **options))


@pytest.mark.parametrize("average_over", mining.AVERAGES)
def test_contrastive_losses_and_gradients(average_over, small_blocks, rng):
    labels, rows = smooth_batch(rng)
    options = {
        "positive_margin": 0.3,
        "negative_margin": 2.5,
        "average_over": average_over,
    }
    got = reference.value_and_gradient(
        lambda x: mining.contrastive_losses(labels, x, **options), rows
    )
    compare(got, reference.contrastive_loss(labels, rows, **options))


def assert_census(got, expected):
    for key, values in got._asdict().items():
        np.testing.assert_allclose(
            ops.convert_to_numpy(values),
            [row[key] for row in expected],
            rtol=1e-4,
            err_msg=key,
        )


@pytest.mark.parametrize("word", DISTANCES)
@pytest.mark.parametrize("large", [0, 67])
def test_census_with_ties(word, large, small_blocks, rng):
    labels, rows = ragged_batch(rng, large=large, size=90)
    if word == "cosine":  # what ties there differs in the last bit
        labels, rows = smooth_batch(rng, large=large, size=90)
    got = mining.triplet_census(labels, rows, margin=1.0, distance=word)
    assert_census(got, reference.census(labels, rows, 1.0, word))


def test_blocks_of_their_own_size(rng):
    """200 rows are four blocks of 64."""
    labels, rows = smooth_batch(rng, size=200)
    assert blocks.block_rows(blocks.padded_size(200)) < 200
    got = reference.value_and_gradient(
        lambda x: mining.triplet_losses(labels, x, margin=0.7), rows
    )
    compare(got, reference.triplet_loss(labels, rows, margin=0.7))
    census = mining.triplet_census(labels, rows, margin=0.7)
    assert_census(census, reference.census(labels, rows, 0.7))
