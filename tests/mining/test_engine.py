import functools

import keras
import numpy as np
import pytest
import reference
from harness import tensorflow_only
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from kerastrip import mining
from kerastrip.distances import DISTANCES
from kerastrip.mining import dense
from kerastrip.mining.blocks import block_rows, compiled_on_tensorflow, padded_size
from kerastrip.mining.pairs import nearest_beyond


def census_of(labels, embeddings, **options):
    census = mining.triplet_census(labels, embeddings, **options)
    return {k: ops.convert_to_numpy(v) for k, v in census._asdict().items()}


def assert_census(got, labels, embeddings, margin=0.2, word="euclidean"):
    expected = reference.census(labels, embeddings, margin, word)
    for key, values in got.items():
        np.testing.assert_allclose(
            values, [row[key] for row in expected], rtol=1e-4, atol=1e-4, err_msg=key
        )


def skewed_batch(rng, large=70, size=90, dim=3):
    """A class too large for the table of pairs, small ones, and single rows."""
    labels = np.r_[np.zeros(large, int), np.arange(size - large) // 3 + 1]
    labels = rng.permutation(labels)
    return labels, rng.normal(size=(size, dim)).astype(np.float32) / 2


@pytest.mark.backend
@pytest.mark.parametrize("case", range(8))
@pytest.mark.parametrize("margin", [0.2, 1.0])
def test_census_equals_the_golden_one(case, margin, triplet_golden):
    labels = triplet_golden[f"c{case}_labels"]
    got = census_of(labels, triplet_golden[f"c{case}_embeddings"], margin=margin)
    keys = ("positives", "easy", "semi_hard", "hard", "pairs_with_semi_hard")
    assert [got[k].sum() for k in keys] == list(
        triplet_golden[f"c{case}_census_{margin}"]
    )


# Whole numbers make ties of distances exact, in float32 as in float64.
whole_rows = st.lists(
    st.tuples(st.integers(0, 4), *[st.integers(-2, 2)] * 2), min_size=0, max_size=32
)


@given(batch=whole_rows, margin=st.sampled_from([0.5, 1.0]))
@settings(max_examples=60, deadline=None)
def test_census_of_any_histogram_with_ties(batch, margin):
    labels = np.array([row[0] for row in batch], np.int32)
    rows = np.array([row[1:] for row in batch], np.float32).reshape(-1, 2)
    assert_census(census_of(labels, rows, margin=margin), labels, rows, margin)


@pytest.mark.backend
@pytest.mark.parametrize("word", DISTANCES)
def test_census_of_a_skewed_batch(word, rng):
    labels, rows = skewed_batch(rng)
    assert_census(census_of(labels, rows, distance=word), labels, rows, word=word)


def test_census_of_a_large_class_with_ties(rng):
    labels, _ = skewed_batch(rng)
    rows = rng.integers(-2, 3, size=(len(labels), 2)).astype(np.float32)
    got = census_of(labels, rows, margin=1.0)
    assert_census(got, labels, rows, margin=1.0)


def test_census_follows_a_permutation_of_the_batch(rng):
    labels, rows = skewed_batch(rng)
    shuffle = rng.permutation(len(labels))
    straight, shuffled = (
        census_of(labels, rows),
        census_of(labels[shuffle], rows[shuffle]),
    )
    for key, values in straight.items():
        np.testing.assert_allclose(values[shuffle], shuffled[key], rtol=1e-5)


def test_all_triplets_are_in_one_kind(rng):
    got = census_of(*skewed_batch(rng), margin=0.7)
    total = got["easy"] + got["semi_hard"] + got["hard"]
    np.testing.assert_array_equal(total, got["positives"] * got["negatives"])


@pytest.mark.backend
@pytest.mark.parametrize("size", [0, 1, 5])
@pytest.mark.parametrize("labels", ["one class", "all different"])
def test_census_without_triplets_is_0(size, labels):
    classes = np.zeros(size, int) if labels == "one class" else np.arange(size)
    got = census_of(classes, np.ones((size, 3), np.float32))
    for key in ("easy", "semi_hard", "hard", "pairs_with_semi_hard"):
        assert got[key].tolist() == [0] * size
    assert np.isfinite(got["pos_dist"]).all()


def test_census_at_the_same_distance_is_hard():
    got = census_of([0, 0, 1], np.zeros((3, 2), np.float32))
    assert got["hard"].tolist() == [1, 1, 0]


@given(
    size=st.sampled_from([32, 192, 1280]),
    seed=st.integers(0, 1000),
    bound=st.floats(-0.5, 1.5),
)
@settings(max_examples=20, deadline=None)
def test_nearest_beyond_is_the_least_larger_entry(size, seed, bound):
    d = np.random.default_rng(seed).random((4, size)).astype(np.float32)
    value, column = nearest_beyond(
        ops.convert_to_tensor(d), ops.full((4,), bound, "float32")
    )
    for row, v, c in zip(
        d, ops.convert_to_numpy(value), ops.convert_to_numpy(column), strict=True
    ):
        beyond = row[row > np.float32(bound)]
        if len(beyond):
            assert v == beyond.min() == row[c]
        else:
            assert v == np.inf


def test_padding_is_little_and_takes_few_values():
    sizes = range(5000)
    padded = [padded_size(n) for n in sizes]
    assert all(
        p >= max(n, 1) and p % block_rows(p) == 0
        for n, p in zip(sizes, padded, strict=True)
    )
    assert all(p - n < max(64, n / 8 + 1) for n, p in zip(sizes, padded, strict=True))
    assert len(set(padded)) < 50
    tensors = [int(padded_size(ops.convert_to_tensor(n, "int32"))) for n in sizes[::97]]
    assert tensors == padded[::97]


# Errors -------------------------------------------------------------------------------


@pytest.mark.backend
def test_bad_input_is_named():
    rows = np.zeros((4, 2), np.float32)
    with pytest.raises(ValueError, match="distance"):
        mining.triplet_census([0, 0, 1, 1], rows, distance="l2")
    with pytest.raises(ValueError, match=r"labels.*integers.*0\.5"):
        mining.triplet_census(np.full(4, 0.5, np.float32), rows)
    with pytest.raises(ValueError, match=r"labels.*4 embeddings.*3 labels"):
        mining.triplet_census([0, 0, 1], rows)
    with pytest.raises(ValueError, match=r"embeddings.*\(batch, dim\)"):
        mining.triplet_census([0, 0, 1, 1], rows[None])
    with pytest.raises(ValueError, match=r"margin.*> 0"):
        mining.triplet_census([0, 0, 1, 1], rows, margin=0.0)
    with pytest.raises(ValueError, match=r"Did you mean 'semi_hard'"):
        mining.triplet_losses([0, 0, 1, 1], rows, mining="semihard")
    with pytest.raises(ValueError, match=r"distance.*one of 'euclidean'.*function"):
        mining.triplet_losses([0, 0, 1, 1], rows, distance=lambda x: x @ x.T)
    with pytest.raises(ValueError, match=r"average_over"):
        mining.triplet_losses([0, 0, 1, 1], rows, soft=True, average_over="active")


@tensorflow_only
def test_bad_labels_make_nan_when_traced(rng):
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None]), tf.TensorSpec([None, 2])])
    def float_labels(y, x):
        census = mining.triplet_census(y, x)
        return mining.triplet_losses(y, x), census.pos_dist, census.neg_dist

    rows = rng.normal(size=(4, 2))
    for label, is_nan in ((0.5, True), (1.0, False)):
        for found in float_labels(np.array([0.0, 0.0, 1.0, label]), rows):
            assert np.isnan(found.numpy()).all() == is_nan


@pytest.mark.backend
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="compiles when called")
def test_jax_compiles_nothing_anew_for_a_call_like_the_one_before(rng):
    import jax

    labels, rows = np.arange(12) % 4, rng.normal(size=(12, 3)).astype(np.float32)
    calls = [
        lambda x: mining.contrastive_losses(labels, x),
        lambda x: mining.triplet_census(labels, x).pos_dist,
        *(
            functools.partial(mining.triplet_losses, labels, mining=word)
            for word in mining.MININGS
        ),
    ]
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append("backend_compile" in name)
    )
    for call in calls:
        slope = jax.grad(lambda x, call=call: ops.sum(call(x)))
        for _ in range(3):
            before = sum(compiled)
            call(rows)
            slope(rows)
        assert sum(compiled) == before
    assert sum(compiled) > 0


@tensorflow_only
def test_lengths_that_differ_at_run_time_fail():
    import tensorflow as tf

    @tf.function(
        input_signature=[tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, 2])]
    )
    def graph(y, x):
        return mining.triplet_census(y, x)

    with pytest.raises(tf.errors.InvalidArgumentError):
        graph(tf.zeros(3, tf.int32), tf.zeros((4, 2)))


@tensorflow_only
@pytest.mark.parametrize(
    "word", ["semi_hard", pytest.param("all", marks=pytest.mark.slow)]
)
def test_coefficients_made_again_give_the_gradient_of_those_kept(
    word, rng, monkeypatch
):
    import tensorflow as tf

    labels, rows = skewed_batch(rng)
    upstream = rng.random(len(labels)).astype(np.float32)

    def gradient():
        x = tf.Variable(rows)
        with tf.GradientTape() as tape:
            losses = mining.triplet_losses(labels, x, mining=word)
            total = tf.reduce_sum(losses * upstream)
        return tape.gradient(total, x).numpy()

    kept = gradient()
    monkeypatch.setattr(dense, "KEPT_ROWS", 0)
    compiled_on_tensorflow.cache_clear()
    again = gradient()
    compiled_on_tensorflow.cache_clear()
    assert np.abs(kept).max() > 0
    np.testing.assert_allclose(again, kept, atol=1e-5)


# One traced function, many sizes ------------------------------------------------------


def check_one_trace(sizes, jit_compile, oracle_up_to=130):
    import tensorflow as tf

    traces = []

    @tf.function(
        jit_compile=jit_compile,
        input_signature=[tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, 4])],
    )
    def graph(y, x):
        traces.append(1)
        with tf.GradientTape() as tape:
            tape.watch(x)
            values = mining.triplet_losses(y, x, margin=0.3)
            total = tf.reduce_mean(values)
        census = mining.triplet_census(y, x, margin=0.3)
        return total, tape.gradient(total, x), census

    for size in sizes:
        rng = np.random.default_rng(size)
        labels = rng.integers(0, max(size // 3, 1), size).astype(np.int32)
        rows = rng.normal(size=(size, 4)).astype(np.float32)
        value, gradient, census = graph(labels, rows)
        assert gradient.shape == rows.shape
        assert np.isfinite(gradient).all()
        total = census.easy + census.semi_hard + census.hard
        np.testing.assert_array_equal(total, census.positives * census.negatives)
        if size and size <= oracle_up_to:
            values, expected = reference.triplet_loss(labels, rows, margin=0.3)
            assert float(value) == pytest.approx(values.mean(), abs=1e-5)
            np.testing.assert_allclose(gradient * size, expected, atol=1e-3)
            got = {k: v.numpy() for k, v in census._asdict().items()}
            assert_census(got, labels, rows, margin=0.3)
    assert len(traces) == 1


@tensorflow_only
@pytest.mark.parametrize(
    "jit_compile", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_one_trace_serves_several_sizes(jit_compile):
    check_one_trace((0, 33), jit_compile)


@tensorflow_only
@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, True])
def test_one_trace_serves_a_dozen_sizes(jit_compile):
    sizes = (1, 2, 3, 4, 5, 31, 64, 127, 128, 129, 500, 1024, 2048)
    check_one_trace(sizes, jit_compile)


@pytest.mark.backend
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_embedding_of_nan_shows_in_the_distances_of_all_anchors(rng, bad):
    x = np.float32(rng.normal(size=(6, 3)))
    x[4, 1] = bad
    census = mining.triplet_census(np.arange(6) % 2, x)
    to_same, to_other = map(ops.convert_to_numpy, (census.pos_dist, census.neg_dist))
    assert not np.isfinite(to_same[::2]).any()
    assert not np.isfinite(to_other[1::2]).any()
    assert np.isfinite(to_same[1::2]).all()
