import inspect

import keras
import numpy as np
import pytest
import reference
from harness import tensorflow_only
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from kerastrip import losses, mining
from kerastrip.distances import DISTANCES
from kerastrip.losses import (
    ContrastiveLoss,
    TripletHardLoss,
    TripletLoss,
    TripletSemiHardLoss,
    triplet_hard_loss,
    triplet_semihard_loss,
)


def weighted(labels, rows, weights, **options):
    """Values by row and the gradient of their sum with the given weights."""
    held = {}

    def total(x):
        held["values"] = mining.triplet_losses(labels, x, **options)
        return held["values"] * ops.convert_to_tensor(weights, "float32")

    value, gradient = reference.value_and_gradient(total, rows)
    return value / weights, gradient


def assert_like_the_loops(labels, rows, rng, atol=2e-5, **options):
    """Value of each row and gradient, with a different weight for every row."""
    weights = rng.uniform(0.5, 2.0, len(labels))
    values, gradient = weighted(labels, rows, weights, **options)
    word = options.pop("distance", "euclidean")
    expected, slope = reference.triplet_loss(
        labels, rows, word=word, weights=weights, **options
    )
    np.testing.assert_allclose(values, expected, atol=atol)
    error = np.linalg.norm(gradient - slope)
    assert error <= 1e-4 * np.linalg.norm(slope) + 1e-6


def batch(rng, histogram=(4, 4, 4, 4, 3, 1, 5), dim=6):
    labels = np.repeat(np.arange(len(histogram)) * 7 - 3, histogram)
    labels = rng.permutation(labels)
    return labels, rng.normal(size=(len(labels), dim)).astype(np.float32) / 2


# Values and gradients -----------------------------------------------------------------


@pytest.mark.backend
@pytest.mark.parametrize(
    ("case", "metric"),
    [(case, "L2") for case in (0, 1, 5, 7)]
    + [(1, "squared-L2"), (1, "angular")]
    + [pytest.param(case, "L2", marks=pytest.mark.slow) for case in (2, 3, 4, 6)]
    + [
        pytest.param(case, metric, marks=pytest.mark.slow)
        for case in (5, 7)
        for metric in ("squared-L2", "angular")
    ],
)
def test_golden_values_and_gradients(case, metric, triplet_golden):
    labels = triplet_golden[f"c{case}_labels"]
    rows = triplet_golden[f"c{case}_embeddings"]
    for margin in (0.2, 1.0):
        losses = {
            "semihard": TripletSemiHardLoss(margin, metric),
            "hard": TripletHardLoss(margin, False, metric),
            "hardsoft": TripletHardLoss(margin, True, metric),
        }
        if case == 5:
            # It has single rows: left out here, in TensorFlow Addons they count with
            # a positive at distance 0. The loops cover the meaning used here.
            losses = {"semihard": losses["semihard"]}
        for name, loss in losses.items():
            key = f"c{case}_{name}_{metric}_{margin}"
            value, gradient = reference.value_and_gradient(
                lambda x, loss=loss: loss(labels, x), rows
            )
            expected = triplet_golden[f"{key}_loss"]
            assert abs(value - expected) <= 1e-5 * max(1, abs(expected)), key
            error = np.linalg.norm(gradient - triplet_golden[f"{key}_grad"])
            assert error <= 1e-4 * np.linalg.norm(triplet_golden[f"{key}_grad"]), key


@pytest.mark.backend
@pytest.mark.parametrize("word", mining.MININGS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_every_word_and_distance_agrees_with_the_loops(word, distance, rng):
    assert_like_the_loops(*batch(rng), rng, mining=word, distance=distance)


@pytest.mark.parametrize("word", mining.MININGS)
@pytest.mark.parametrize(
    "options", [{"soft": True}, {"average_over": "active", "margin": 0.4}]
)
def test_soft_and_active_agree_with_the_loops(word, options, rng):
    assert_like_the_loops(*batch(rng), rng, mining=word, **options)


@pytest.mark.parametrize(
    ("word", "distance"),
    [
        ("semi_hard", "euclidean"),
        ("semi_hard_or_hard", "squared_euclidean"),
    ],
)
def test_a_class_too_large_for_the_table(word, distance, rng):
    labels, rows = batch(rng, (70, 4, 3, 1), dim=3)
    assert_like_the_loops(labels, rows, rng, mining=word, distance=distance)


@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=32),
    seed=st.integers(0, 2**16),
    word=st.sampled_from(mining.MININGS),
)
@settings(max_examples=20, deadline=None)
def test_any_histogram_agrees_with_the_loops(labels, seed, word):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(len(labels), 3)).astype(np.float32)
    assert_like_the_loops(np.array(labels), rows, rng, mining=word)


@pytest.mark.parametrize("word", mining.MININGS)
def test_gradient_is_that_of_the_value(word, rng):
    labels, rows = batch(rng, (3, 3, 2), dim=2)
    weights = rng.uniform(0.5, 2.0, len(labels))

    def total(x):
        values = mining.triplet_losses(labels, x.astype(np.float32), mining=word)
        return (ops.convert_to_numpy(values).astype(float) * weights).sum()

    _, gradient = weighted(labels, rows, weights, mining=word)
    step = 1e-3
    for place in np.ndindex(*rows.shape):
        shift = np.zeros(rows.shape)
        shift[place] = step
        slope = (total(rows + shift) - total(rows - shift)) / (2 * step)
        assert slope == pytest.approx(gradient[place], abs=0.02)


@pytest.mark.parametrize("word", mining.MININGS)
def test_values_follow_a_permutation_of_the_batch(word, rng):
    labels, rows = batch(rng)
    shuffle = rng.permutation(len(labels))
    straight = mining.triplet_losses(labels, rows, mining=word)
    shuffled = mining.triplet_losses(labels[shuffle], rows[shuffle], mining=word)
    np.testing.assert_allclose(
        ops.convert_to_numpy(straight)[shuffle],
        ops.convert_to_numpy(shuffled),
        atol=1e-6,
    )


# Limits -------------------------------------------------------------------------------


@pytest.mark.backend
@pytest.mark.parametrize("word", mining.MININGS)
@pytest.mark.parametrize("labels", [[], [3], [1, 1, 1], [1, 2, 3]])
def test_batches_without_triplets_have_value_and_gradient_0(word, labels):
    rows = np.random.default_rng(0).normal(size=(len(labels), 3)).astype(np.float32)
    values, gradient = reference.value_and_gradient(
        lambda x: mining.triplet_losses(np.array(labels, np.int32), x, mining=word),
        rows,
    )
    assert values.tolist() == [0.0] * len(labels)
    assert (gradient == 0).all()


@pytest.mark.backend
@pytest.mark.parametrize("word", mining.MININGS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_duplicates_and_large_rows_stay_finite(word, distance, scale, rng):
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    rows = np.full((7, 3), scale, np.float32)
    rows[4:] *= 1 + rng.normal(size=(3, 3))
    value, gradient = reference.value_and_gradient(
        lambda x: mining.triplet_losses(labels, x, mining=word, distance=distance), rows
    )
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()


def test_near_duplicates_far_from_the_origin_are_measured_by_their_rows():
    # The matrix product cannot see these distances; the rows can.
    rows = np.array([[1e4, 0], [1e4 + 0.5, 0], [1e4 + 400, 0], [1e4 + 403, 0]])
    rows = rows.astype(np.float32)
    values, gradient = reference.value_and_gradient(
        lambda x: TripletLoss(margin=500.0, reduction=None)([0, 0, 1, 1], x), rows
    )
    expected, slope = reference.triplet_loss([0, 0, 1, 1], rows, margin=500.0)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=1e-5)


@pytest.mark.parametrize("word", mining.MININGS)
@pytest.mark.parametrize("offset", [10.0, 100.0])
def test_rows_that_share_an_offset_are_measured_as_those_without(word, offset, rng):
    # In the squares of the lengths the distances would drown.
    labels, rows = batch(rng)
    rows = np.round(rows / 4, 2) + offset
    rows = rows.astype(np.float32)
    assert_like_the_loops(labels, rows, rng, mining=word, atol=1e-4)


@pytest.mark.backend
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_float_types_are_measured_in_float32(dtype, rng):
    labels, rows = batch(rng)
    x = ops.cast(rows, dtype)
    values = mining.triplet_losses(labels, x)
    expected = mining.triplet_losses(labels, ops.cast(x, "float32"))
    assert keras.backend.standardize_dtype(values.dtype) == "float32"
    np.testing.assert_allclose(
        ops.convert_to_numpy(values), ops.convert_to_numpy(expected), atol=1e-6
    )


def test_a_number_that_is_not_one_shows_in_the_loss(rng):
    labels, rows = batch(rng)
    rows[labels == labels[1]] = np.nan
    for word in mining.MININGS:
        assert np.isnan(float(TripletLoss(mining=word)(labels, rows))), word


# The Keras classes --------------------------------------------------------------------


@pytest.mark.backend
def test_labels_of_any_shape_and_size_reach_the_mining(rng):
    codes, rows = np.array([0, 0, 1, 1, 2, 2]), rng.normal(size=(6, 3))
    loss = TripletLoss(margin=1.0)
    expected = float(loss(codes, rows))
    large = codes + 2**24  # in float32 the first two classes would be one
    for labels in (codes[:, None], np.eye(3, dtype="float32")[codes], large):
        assert float(loss(labels, rows)) == pytest.approx(expected, rel=1e-6)


def test_sample_weight_and_reduction_are_those_of_keras(rng):
    labels, rows = batch(rng)
    weights = rng.uniform(size=len(labels)).astype(np.float32)
    by_row = ops.convert_to_numpy(TripletLoss(reduction=None)(labels, rows))
    assert by_row.shape == labels.shape
    assert float(TripletLoss()(labels, rows, weights)) == pytest.approx(
        (by_row * weights).mean(), rel=1e-5
    )
    assert float(TripletLoss(reduction="sum")(labels, rows)) == pytest.approx(
        by_row.sum(), rel=1e-5
    )


@pytest.mark.backend
@pytest.mark.parametrize(
    "loss",
    [
        TripletLoss(0.3, "hard", "cosine", True, name="t", dtype="float64"),
        TripletLoss(0.3, "all", average_over="active", reduction="sum"),
        TripletLoss(distance="squared_euclidean"),
        TripletSemiHardLoss(0.7, "angular", reduction=None, name="s"),
        TripletHardLoss(0.7, True, "squared-L2"),
    ],
)
def test_config_restores_everything(loss):
    config = loss.get_config()
    again = type(loss).from_config(config)
    assert again.get_config() == config
    assert again.dtype == loss.dtype
    restored = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(loss)
    )
    assert type(restored) is type(loss)
    assert restored.get_config() == config


@pytest.mark.backend
def test_functions_and_classes_of_the_old_names_agree(rng):
    labels, rows = batch(rng)
    for function, loss in (
        (triplet_semihard_loss, TripletSemiHardLoss()),
        (triplet_hard_loss, TripletHardLoss()),
    ):
        mean = float(ops.mean(function(labels, rows)))
        assert mean == pytest.approx(float(loss(labels, rows)), rel=1e-6)


def test_hard_leaves_anchors_without_a_positive_out(triplet_golden):
    labels, rows = triplet_golden["c5_labels"], triplet_golden["c5_embeddings"]
    values = ops.convert_to_numpy(TripletHardLoss(reduction=None)(labels, rows))
    single = [np.sum(labels == label) == 1 for label in labels]
    assert any(single)
    assert (values[single] == 0).all()
    expected, _ = reference.triplet_loss(labels, rows, margin=1.0, mining="hard")
    np.testing.assert_allclose(values, expected, atol=1e-5)


@tensorflow_only
@pytest.mark.parametrize("jit_compile", [False, True])
def test_margin_and_mining_changed_between_epochs_take_effect(jit_compile, rng):
    labels, rows = np.repeat(np.arange(4), 4), rng.normal(size=(16, 5))
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    loss = TripletLoss(margin=0.1)
    model.compile(keras.optimizers.SGD(0.0), loss, jit_compile=jit_compile)

    def logged():
        history = model.fit(rows, labels, batch_size=16, verbose=0, shuffle=False)
        return history.history["loss"][0]

    for margin, word in ((0.1, "semi_hard"), (2.0, "semi_hard"), (2.0, "hard")):
        loss.margin, loss.mining = margin, word
        model.make_train_function(force=True)
        expected, _ = reference.triplet_loss(
            labels, model.predict(rows, verbose=0), margin=margin, mining=word
        )
        assert logged() == pytest.approx(expected.mean(), rel=1e-4)


@pytest.mark.backend
def test_training_separates_the_classes(rng):
    labels = np.repeat(np.arange(4), 8)
    rows = rng.normal(size=(32, 6)).astype("float32")
    rows += 0.7 * rng.normal(size=(4, 6))[labels].astype("float32")
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8)])
    model.compile(keras.optimizers.Adam(0.05), TripletLoss(margin=1.0))
    history = model.fit(rows, labels, batch_size=32, epochs=15, verbose=0).history
    assert history["loss"][-1] < 0.8 * history["loss"][0]


# Attributes that a schedule changes ---------------------------------------------------

SCHEDULED = [
    kind
    for kind in map(vars(losses).get, losses.__all__)
    if isinstance(kind, type)
    and {"margin", "mining"} & set(inspect.signature(kind).parameters)
]


def test_every_loss_with_a_margin_is_looked_at():
    assert {TripletLoss, TripletSemiHardLoss, TripletHardLoss} <= set(SCHEDULED)


@pytest.mark.backend
@pytest.mark.parametrize("word", mining.MININGS)
@pytest.mark.parametrize("kind", SCHEDULED)
def test_what_a_schedule_changes_changes_the_loss_and_is_saved(kind, word, rng):
    labels, rows = np.arange(24) % 4, rng.normal(size=(24, 3)).astype("float32")
    loss = kind(0.7)
    loss.mining, loss.margin = word, 0.3
    expected = float(TripletLoss(0.3, word)(labels, rows))
    assert float(loss(labels, rows)) == pytest.approx(expected, rel=1e-6)
    loaded = kind.from_config(loss.get_config())
    assert float(loaded(labels, rows)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", [TripletSemiHardLoss, TripletHardLoss])
def test_a_configuration_saved_without_a_mining_word_is_read(kind):
    config = kind(0.5, distance_metric="angular").get_config()
    word = config.pop("mining")
    loss = kind.from_config(config)
    assert (loss.mining, loss.margin, loss.distance) == (word, 0.5, "cosine")


@pytest.mark.parametrize("kind", [TripletLoss, TripletSemiHardLoss, TripletHardLoss])
def test_a_configuration_of_version_0_1_is_read(kind):
    config = kind(0.5).get_config()
    assert kind.from_config({**config, "memory": None}).get_config() == config
    with pytest.raises(ValueError, match=r"memory.*'past'.*compile=False"):
        kind.from_config({**config, "memory": "past"})


# Errors -------------------------------------------------------------------------------


@pytest.mark.backend
def test_bad_arguments_are_named():
    for make, error, words in (
        (lambda: TripletLoss(margin=0), ValueError, "margin.*> 0"),
        (lambda: TripletLoss(margin="1"), TypeError, "margin"),
        (lambda: TripletLoss(mining="semihard"), ValueError, "mean 'semi_hard'"),
        (lambda: TripletLoss(distance="l2"), ValueError, "distance"),
        (lambda: TripletLoss(average_over="hard"), ValueError, "average_over"),
        (lambda: TripletLoss(soft=1), TypeError, "soft"),
        (lambda: TripletLoss(soft=True, average_over="active"), ValueError, "softplus"),
        (lambda: TripletSemiHardLoss(-1.0), ValueError, "margin"),
        (lambda: TripletSemiHardLoss(1.0, "l2"), ValueError, "distance_metric"),
        (lambda: TripletHardLoss(1.0, False, 3), ValueError, "distance_metric"),
        (
            lambda: TripletLoss(distance=np.linalg.norm),
            ValueError,
            "one of 'euclidean'",
        ),
    ):
        with pytest.raises(error, match=words):
            make()


@pytest.mark.backend
def test_bad_calls_are_named(rng):
    rows = rng.normal(size=(4, 3)).astype("float32")
    with pytest.raises(ValueError, match="labels"):
        TripletLoss()(np.full(4, 0.5), rows)
    with pytest.raises(ValueError, match="embeddings"):
        TripletLoss()([0, 0, 1, 1], rows[:, :, None])
    with pytest.raises(ValueError, match="4 embeddings"):
        TripletLoss()([0, 0, 1], rows)


LOSSES = {
    "TripletLoss": TripletLoss(),
    "ContrastiveLoss": ContrastiveLoss(),
    "triplet_hard_loss": triplet_hard_loss,
    "triplet_semihard_loss": triplet_semihard_loss,
    "triplet_census": lambda y, x: mining.triplet_census(y, x).pos_dist,
}


@pytest.mark.backend
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_masked_labels_and_embeddings_are_refused(rng, loss):
    y, x = np.arange(6) % 2, np.float32(rng.normal(size=(6, 3)))
    with pytest.raises(ValueError, match=r"1 masked.*position 4"):
        loss(np.ma.array(y, mask=np.arange(6) == 4), x)
    with pytest.raises(ValueError, match=r"3 masked.*position 2, 0"):
        loss(y, np.ma.array(x, mask=x == x[2]))


@pytest.mark.backend
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_labels_and_embeddings_of_foreign_byte_order_count_alike(rng, loss):
    y, x = np.arange(6) % 2, np.float32(rng.normal(size=(6, 3)))
    expected = ops.convert_to_numpy(loss(y, x))
    for labels in (y.astype(">i4"), y.astype(">i8"), y.astype(">f4")):
        got = ops.convert_to_numpy(loss(labels, x.astype(">f4")))
        np.testing.assert_allclose(got, expected, rtol=1e-6)
