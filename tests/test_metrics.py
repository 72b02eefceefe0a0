"""TripletCensus against the golden counts, plain NumPy and exact integers."""

import keras
import numpy as np
import pytest
from harness import tiny_model
from keras import ops
from reference import census_figures

from kerastrip import metrics
from kerastrip.metrics import KEYS, TripletCensus
from kerastrip.mining.engine import Census

# Few shapes in all that runs on every backend: JAX compiles for each anew.
backend = pytest.mark.backend


def figures(census):
    return {key: float(value) for key, value in census.result().items()}


def count(labels, embeddings, **options):
    census = TripletCensus(**options)
    census.update_state(np.asarray(labels), np.asarray(embeddings, "float32"))
    return figures(census)


@pytest.mark.parametrize("margin", [0.2, 1.0])
@pytest.mark.parametrize("case", [*range(7), pytest.param(7, marks=backend)])
def test_counts_equal_the_golden_census(case, margin, triplet_golden):
    labels = triplet_golden[f"c{case}_labels"]
    embeddings = triplet_golden[f"c{case}_embeddings"]
    pairs, easy, semi_hard, hard, with_semi_hard = triplet_golden[
        f"c{case}_census_{margin}"
    ]
    triplets = easy + semi_hard + hard
    found = count(labels, embeddings, margin=margin)
    for key, exact, whole in (
        ("easy", easy, triplets),
        ("semi_hard", semi_hard, triplets),
        ("hard", hard, triplets),
        ("active", semi_hard + hard, triplets),
        ("pairs_with_semi_hard", with_semi_hard, pairs),
    ):
        # Far closer than one triplet: the count itself is exact.
        assert found[key] == np.float32(exact / whole), key


@backend
@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine"])
def test_every_figure_equals_the_loops(distance, rng):
    labels = np.array([3, 3, 3, 7, 7, 1, 9, 9, 9, 9, -2])
    embeddings = rng.normal(size=(11, 5)).astype("float32")
    found = count(labels, embeddings, margin=0.6, distance=distance)
    wanted = census_figures([(labels, embeddings)], 0.6, distance)
    assert list(found) == list(KEYS)
    for key in KEYS:
        assert found[key] == pytest.approx(wanted[key], rel=1e-5), key


@backend
def test_ties_fall_on_the_side_the_words_say():
    # On a line with integer places the distances are exact: ties are real ties.
    labels = np.array([0, 0, 1, 1, 2, 2, 2])
    places = np.array([0, 2, 2, 4, 3, 6, 0])[:, None] * np.eye(5)[0]
    found = count(labels, places, margin=2.0)
    wanted = census_figures([(labels, places)], 2.0)
    for key in ("easy", "semi_hard", "hard", "pairs_with_semi_hard"):
        assert found[key] == np.float32(wanted[key]), key
    assert found["easy"] + found["semi_hard"] + found["hard"] == pytest.approx(1)


def test_the_order_of_the_rows_does_not_matter(rng):
    labels = rng.integers(0, 5, 40)
    embeddings = rng.normal(size=(40, 6))
    order = rng.permutation(40)
    one, two = count(labels, embeddings), count(labels[order], embeddings[order])
    assert one == pytest.approx(two, rel=1e-5)


@backend
@pytest.mark.parametrize(
    ("labels", "without_positive"),
    [(np.arange(7), 1.0), (np.full(7, 4), 0.0), ([5], 1.0)],
    ids=["no pair", "one class", "one row"],
)
def test_no_triplets_give_zeros_not_nan(labels, without_positive):
    found = count(labels, np.eye(7, 5)[: len(labels)])
    for key in ("easy", "semi_hard", "hard", "active", "pairs_with_semi_hard"):
        assert found[key] == 0
    assert found["anchors_without_positive"] == without_positive
    assert np.isfinite(list(found.values())).all()


@backend
@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_embedding_that_is_not_finite_makes_nan_of_every_figure(distance, bad, rng):
    census = TripletCensus(margin=0.6, distance=distance)
    labels = np.array([3, 3, 3, 7, 7, 1, 9, 9, 9, 9, -2])
    good = rng.normal(size=(11, 5)).astype("float32")
    broken = good.copy()
    broken[4, 2] = bad
    census.update_state(labels, good)
    healthy = figures(census)
    census.update_state(labels, broken)
    assert np.isnan(list(figures(census).values())).all()
    latest = [float(value) for value in census.of_latest_batch().values()]
    assert np.isnan(latest).all()
    census.update_state(labels, good)
    assert np.isnan(list(figures(census).values())).all()
    assert float(census.of_latest_batch()["hard"]) == pytest.approx(healthy["hard"])
    census.reset_state()
    census.update_state(labels, good)
    assert figures(census) == healthy


def test_a_distance_sum_that_is_nan_makes_nan_of_every_figure(monkeypatch):
    reply = fake_census(2, 2, 1, 4)
    reply = reply._replace(neg_dist=reply.neg_dist + float("nan"))
    monkeypatch.setattr(metrics, "triplet_census", lambda *_, **__: reply)
    assert np.isnan(list(count([0, 0, 1, 1], np.eye(4)).values())).all()


def test_before_any_batch_all_is_zero():
    assert set(figures(TripletCensus()).values()) == {0.0}


@backend
def test_batches_add_up_as_ratios_of_sums(rng):
    census = TripletCensus(margin=0.5)
    batches = [
        (rng.integers(0, 3, size), rng.normal(size=(size, 5)).astype("float32"))
        for size in (11, 7, 11)
    ]
    for batch in batches:
        census.update_state(*batch)
    wanted = census_figures(batches, 0.5)
    assert figures(census) == pytest.approx(wanted, rel=1e-4)
    census.reset_state()
    assert set(figures(census).values()) == {0.0}


@pytest.mark.parametrize("label_shape", ["column", "one_hot", "float_one_hot"])
def test_labels_in_every_shape(label_shape, rng):
    labels = rng.integers(0, 4, 20)
    embeddings = rng.normal(size=(20, 3))
    shaped = {
        "column": labels[:, None],
        "one_hot": np.eye(4, dtype="int32")[labels],
        "float_one_hot": np.eye(4, dtype="float32")[labels],
    }[label_shape]
    assert count(shaped, embeddings) == count(labels, embeddings)


@backend
def test_half_precision_embeddings_are_counted_in_float32(rng):
    embeddings = rng.normal(size=(11, 5)).astype("float16")
    labels = np.arange(11) % 4
    census = TripletCensus()
    census.update_state(labels, embeddings)
    assert figures(census) == count(labels, embeddings.astype("float32"))
    assert all(
        keras.backend.standardize_dtype(value.dtype) == "float32"
        for value in census.result().values()
    )


# --- exactness over an epoch -----------------------------------------------------


def fake_census(positives, negatives, hard, rows):
    """A census of any size, as a batch of `rows` equal anchors."""

    def row(value, dtype="int32"):
        return ops.full((rows,), value, dtype=dtype)

    return Census(
        positives=row(positives),
        negatives=row(negatives),
        easy=row(positives * negatives - hard),
        semi_hard=row(0),
        hard=row(hard),
        pairs_with_semi_hard=row(0),
        pos_dist=row(0.1 * positives, "float32"),
        neg_dist=row(0.3 * negatives, "float32"),
    )


@backend
def test_one_batch_beyond_int32_is_exact(monkeypatch):
    # 3000 anchors with 10^9 triplets each: 3 * 10^12, an int32 sum would wrap.
    monkeypatch.setattr(
        metrics, "triplet_census", lambda *_, **__: fake_census(10**4, 10**5, 7, 3000)
    )
    found = count(np.zeros(3000, "int32"), np.ones((3000, 2)))
    assert found["hard"] == pytest.approx(7e-9, rel=2e-7)
    assert found["easy"] == pytest.approx(1 - 7e-9, rel=2e-7)


@backend
def test_an_epoch_of_more_than_2_31_triplets_keeps_its_small_parts(monkeypatch):
    # After a batch of 4 * 10^12 triplets, 100 batches of 10^5: each alone is under
    # half the float32 resolution of the total (2^18), a plain sum would lose it.
    batches = [fake_census(10**4, 10**5, 1, 4000)] + [
        fake_census(100, 100, 9, 10)
    ] * 100
    replies = iter(batches)
    monkeypatch.setattr(metrics, "triplet_census", lambda *_, **__: next(replies))
    census = TripletCensus()
    for batch in batches:
        rows = len(ops.convert_to_numpy(batch.hard))
        census.update_state(np.zeros(rows, "int32"), np.ones((rows, 1), "float32"))
    hard, triplets = 4000 + 100 * 90, 4 * 10**12 + 100 * 10**5
    assert figures(census)["hard"] == pytest.approx(hard / triplets, rel=2e-7)
    assert (4 * 10**12) / triplets != pytest.approx(1, rel=2e-6)


@backend
def test_compensation_survives_the_compiler(rng):
    """XLA must not simplify (a + b) - a: run the update compiled."""

    def sum_up(values):
        def step(i, total, rest):
            error = metrics._rounding_error(total, values[i])
            return i + 1, total + values[i], rest + error

        start = (0, ops.zeros(()), ops.zeros(()))
        _, total, rest = ops.while_loop(lambda i, *_: i < 2000, step, start)
        return total, rest

    values = rng.uniform(0, 1, 2000).astype("float32")
    values[0] = 2.0**31
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        compiled = tf.function(sum_up, jit_compile=True)
        values = tf.constant(values)
    elif keras.backend.backend() == "jax":
        import jax

        compiled = jax.jit(sum_up)
        values = ops.convert_to_tensor(values)
    else:
        compiled = sum_up
        values = ops.convert_to_tensor(values)
    total, rest = (float(part) for part in compiled(values))
    exact = ops.convert_to_numpy(values).astype("float64").sum()
    assert total + rest == pytest.approx(exact, rel=1e-10)
    assert total != pytest.approx(exact, rel=1e-8)


# --- spread and effective dimension ----------------------------------------------


@backend
@pytest.mark.parametrize(("rows", "dim"), [(11, 5), (7, 20)])
def test_effective_dim_is_the_participation_ratio(rows, dim, rng):
    embeddings = rng.normal(size=(rows, dim)) * rng.uniform(0.1, 3, dim)
    eigenvalues = np.linalg.svd(embeddings - embeddings.mean(0), compute_uv=False) ** 2
    found = count(np.arange(rows) % 3, embeddings)
    wanted = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert found["effective_dim"] == pytest.approx(wanted, rel=1e-4)
    assert found["spread"] == pytest.approx(eigenvalues.sum() / rows, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_effective_dim_does_not_depend_on_the_scale(scale):
    cross = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]) * scale
    assert count([0, 0, 1, 1], cross)["effective_dim"] == pytest.approx(2, rel=1e-5)
    line = np.arange(4)[:, None] * np.array([[3.0, -4.0]]) * scale
    assert count([0, 0, 1, 1], line)["effective_dim"] == pytest.approx(1, rel=1e-5)


@backend
@pytest.mark.parametrize("point", [[0.0], [0.1, 0.7, -0.3], [1e5, 0.1, 3.0]])
def test_a_point_has_no_spread_and_no_dimension(point):
    found = count([0, 0, 1, 1, 2, 2, 3], np.tile(np.resize(point, 5), (7, 1)))
    assert found["effective_dim"] == 0
    assert found["spread"] == pytest.approx(0, abs=1e-6 * np.square(point).sum())
    assert found["hard"] == 1


# --- as a Keras metric -----------------------------------------------------------


def two_outputs(metric):
    model = tiny_model((6,), 3, classes=4)
    model.compile(
        "sgd",
        loss=["sparse_categorical_crossentropy", None],
        metrics={"emb": [metric]},
    )
    return model


@backend
def test_compiled_saved_and_reloaded(rng, tmp_path):
    prefix = "emb_"
    x = rng.normal(size=(40, 6)).astype("float32")
    y = np.arange(40, dtype="int32") % 4
    model = two_outputs(TripletCensus(0.4, "cosine", prefix=prefix))
    before = model.evaluate(x, (y, y), verbose=0, return_dict=True, batch_size=40)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    after = again.evaluate(x, (y, y), verbose=0, return_dict=True, batch_size=40)

    def flat(logs):
        return {k: v for log in logs.values() if isinstance(log, dict) for k, v in log.items()} | {
            k: v for k, v in logs.items() if not isinstance(v, dict)
        }  # fmt: skip

    assert flat(after) == pytest.approx(flat(before), rel=1e-5)
    embeddings = model.predict(x, verbose=0)[1]
    wanted = census_figures([(y, embeddings)], 0.4, "cosine")
    assert flat(after)[f"{prefix}semi_hard"] == pytest.approx(wanted["semi_hard"])


def test_config_round_trip():
    census = TripletCensus(1.5, "squared_euclidean", prefix="a_", name="census")
    again = TripletCensus.from_config(census.get_config())
    assert again.get_config() == census.get_config()
    assert again.keys == tuple(f"a_{key}" for key in KEYS)
    assert (again.margin, again.distance, again.name) == (
        1.5,
        "squared_euclidean",
        "census",
    )


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"margin": 0}, ValueError, "margin"),
        ({"margin": "0.2"}, TypeError, "margin"),
        ({"distance": "l2"}, ValueError, "distance"),
        ({"prefix": 3}, TypeError, "prefix"),
    ],
)
def test_bad_arguments(options, error, says):
    with pytest.raises(error, match=f"`{says}`"):
        TripletCensus(**options)


def test_float_labels_are_refused():
    with pytest.raises(ValueError, match="labels"):
        TripletCensus().update_state(np.array([0.5, 1.5]), np.eye(2))


@pytest.mark.backend
def test_masks_are_refused_and_foreign_byte_order_is_read():
    y, x = np.array([0, 0, 1]), np.array([[0.0], [1.0], [1.25]], "float32")
    census, other = TripletCensus(), TripletCensus()
    with pytest.raises(ValueError, match=r"`labels`.*1 masked.*position 2"):
        census.update_state(np.ma.array(y, mask=y == 1), x)
    with pytest.raises(ValueError, match=r"`embeddings`.*1 masked.*position 1, 0"):
        census.update_state(y, np.ma.array(x, mask=x == 1))
    census.update_state(y, x)
    other.update_state(y.astype(">i4"), x.astype(">f4"))
    for key, value in census.result().items():
        assert float(other.result()[key]) == float(value)
