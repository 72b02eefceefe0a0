"""RetrievalEvaluation and VerificationEvaluation in small trainings."""

import copy
import csv
import functools
import pickle
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from harness import tensorflow_only, tiny_model

from kerastrip.callbacks import (
    MiningStats,
    RetrievalEvaluation,
    TrainingReport,
    VerificationEvaluation,
)
from kerastrip.evaluation import _progress
from kerastrip.evaluation.embedding import embed
from kerastrip.evaluation.retrieval import retrieval_metrics
from kerastrip.evaluation.verification import verification_metrics
from kerastrip.losses import TripletLoss
from kerastrip.sampling.sampler import PKSampler
from kerastrip.sources import Subset

pytestmark = pytest.mark.backend


@pytest.fixture
def data(rng):
    y = np.arange(24) % 4
    x = np.float32(rng.normal(size=(24, 5)) + 2 * rng.normal(size=(4, 5))[y])
    return x, y


def small_model(rate=0.1):
    """Of a loss that takes little time to trace; it learns to tell the labels apart."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return tiny_model(unit_length=False, loss=loss, rate=rate)


class Recorder(keras.callbacks.Callback):
    """Figures of the model after each epoch, measured by hand."""

    def __init__(self, measure):
        super().__init__()
        self.measure, self.measured = measure, []

    def on_epoch_end(self, epoch, logs=None):
        self.measured.append(self.measure(self.model))


def fit(model, data, callbacks, epochs=3):
    return model.fit(
        *data, batch_size=12, epochs=epochs, verbose=0, callbacks=callbacks
    ).history


def test_retrieval_joins_the_logs_with_the_figures_of_that_epoch(data):
    x, y = data
    recorder = Recorder(lambda model: retrieval_metrics(embed(model, x), y))
    history = fit(small_model(), data, [RetrievalEvaluation(x, y), recorder])
    for word in ("recall@1", "map@r"):
        expected = [figures[word] for figures in recorder.measured]
        assert history[f"val_{word}"] == pytest.approx(expected)
    assert len(set(history["val_map@r"])) == 3  # the model has learned


def test_verification_joins_the_logs_with_the_figures_of_that_epoch(data):
    x, y = data
    recorder = Recorder(lambda model: verification_metrics(embed(model, x), y))
    callback = VerificationEvaluation(x, y, prefix="held_out_")
    history = fit(small_model(), data, [callback, recorder])
    for word in ("auc", "eer", "tar@0.01"):
        expected = [figures[word] for figures in recorder.measured]
        assert history[f"held_out_{word}"] == pytest.approx(expected)
    assert callback.results[0]["same_pairs"] == 4 * 15
    # the thresholds of the last epoch, with precision and recall there
    assert callback.curve.at_far(0.01).recall == history["held_out_tar@0.01"][-1]


def test_a_gallery_to_search_in(data):
    x, y = data
    names = np.array(["ant", "bee", "cat", "dog"])[y]
    near = {"gallery": x[10:], "gallery_labels": names[10:]}
    recorder = Recorder(
        lambda model: retrieval_metrics(
            embed(model, x[:10]),
            names[:10],
            gallery=embed(model, x[10:]),
            gallery_labels=names[10:],
        )
    )
    callback = RetrievalEvaluation(x[:10], names[:10], **near)
    history = fit(small_model(), data, [callback, recorder])
    expected = [figures["map@r"] for figures in recorder.measured]
    assert history["val_map@r"] == pytest.approx(expected)
    assert callback.results[0]["queries"] == 10
    for labels, error in ((["elk"] * 10, ValueError), (y[:10], TypeError)):
        with pytest.raises(error, match="gallery_labels"):
            RetrievalEvaluation(x[:10], labels, **near)
    with pytest.raises(ValueError, match="gallery_labels"):
        RetrievalEvaluation(x, y, gallery_labels=y)


def test_verification_of_a_list_of_pairs(data, rng):
    x, y = data
    pairs = rng.integers(0, 24, size=(50, 2))
    is_same = y[pairs[:, 0]] == y[pairs[:, 1]]
    by_label = VerificationEvaluation(x, y, pairs=pairs)
    by_flag = VerificationEvaluation(x, pairs=pairs, is_same=is_same, prefix="b_")
    history = fit(small_model(), data, [by_label, by_flag])
    assert history["val_auc"] == history["b_auc"]
    assert by_label.results[2]["same_pairs"] == is_same.sum()


def test_a_sampler_is_read_once_in_order_and_not_augmented(data):
    x, y = data
    sampler = PKSampler(
        x,
        y,
        classes_per_batch=2,
        samples_per_class=4,
        augment=lambda image, rng: image * 0,
    )
    first = RetrievalEvaluation(sampler)
    second = RetrievalEvaluation(x, y, prefix="again_")
    history = fit(small_model(), data, [first, second])
    assert history["val_map@r"] == history["again_map@r"]
    assert first.results[0]["queries"] == 24


class TwoTargets(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 3

    def __getitem__(self, i):
        part = slice(i * 8, (i + 1) * 8)
        return self.x[part], (np.float32(np.eye(4)[self.y[part]]), self.y[part])


def two_headed():
    losses = ["categorical_crossentropy", TripletLoss()]
    return tiny_model(classes=4, unit_length=False, loss=losses, rate=0.01)


def test_a_dataset_gives_the_labels_of_the_embedding_output(data):
    x, y = data
    one_hot = np.float32(np.eye(4)[y])
    rows = tf.data.Dataset.from_tensor_slices((x, (one_hot, y)))
    first = RetrievalEvaluation(TwoTargets(x, y))
    second = RetrievalEvaluation(x, one_hot, prefix="again_")
    third = RetrievalEvaluation(rows.shuffle(24).batch(10), prefix="mixed_")
    model = two_headed()
    history = model.fit(
        x, (one_hot, y), epochs=2, verbose=0, callbacks=[first, second, third]
    ).history
    assert history["val_map@r"] == history["again_map@r"]
    assert history["mixed_map@r"] == pytest.approx(history["val_map@r"])


def test_monitors_listed_after_it_work(data, tmp_path):
    x, y = data
    path = str(tmp_path / "best.keras")
    callbacks = [
        RetrievalEvaluation(x, y),
        VerificationEvaluation(x, y),
        keras.callbacks.ModelCheckpoint(
            path, monitor="val_recall@1", mode="max", save_best_only=True
        ),
        keras.callbacks.EarlyStopping(monitor="val_auc", mode="max", patience=1),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        history = fit(small_model(rate=0.0), data, callbacks, epochs=9)
    assert len(history["loss"]) == 2  # never better: stopped by patience
    keras.models.load_model(path)
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_recall@1"]) for row in rows] == pytest.approx(
        history["val_recall@1"]
    )


def test_keras_warns_of_a_monitor_listed_before_it(data):
    early = keras.callbacks.EarlyStopping(monitor="val_recall@1", mode="max")
    with pytest.warns(UserWarning, match="`val_recall@1` which is not available"):
        fit(small_model(), data, [early, RetrievalEvaluation(*data)], epochs=1)


def test_every_repeats_the_last_figures_in_between(data, tmp_path):
    x, y = data
    callback = RetrievalEvaluation(x, y, every=3)
    log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = fit(small_model(), data, [callback, log], epochs=8)
    assert list(callback.results) == [0, 2, 5, 7]  # the first and the last too
    measured = [callback.results[e]["map@r"] for e in (0, 0, 2, 2, 2, 5, 5, 7)]
    assert history["val_map@r"] == measured
    assert "NA" not in (tmp_path / "log.csv").read_text()


def test_resumed_training_begins_with_a_measurement(data):
    x, y = data
    callback = RetrievalEvaluation(x, y, every=4)
    model = small_model()
    model.fit(*data, epochs=2, verbose=0, callbacks=[callback])
    callback.results.clear()
    model.fit(*data, initial_epoch=5, epochs=9, verbose=0, callbacks=[callback])
    assert list(callback.results) == [5, 7, 8]


@pytest.mark.parametrize("kind", [RetrievalEvaluation, VerificationEvaluation])
@pytest.mark.parametrize("weight", [np.nan, 1e30])
def test_a_diverged_model_is_reported_not_raised(data, kind, weight):
    x, y = data
    model = small_model(rate=0.0)
    model.set_weights([np.full_like(w, weight) for w in model.get_weights()])
    with pytest.warns(UserWarning, match="24 of 24 embeddings.*class.*rate"):
        history = fit(model, data, [kind(x, y)], epochs=1)
    figures = [v for key, v in history.items() if key.startswith("val_")]
    assert len(figures) >= 2
    assert np.isnan(figures).all()


def test_an_unknown_output_fails_before_the_first_epoch(data):
    x, y = data
    model = two_headed()
    begun = Recorder(lambda model: None)
    with pytest.raises(ValueError, match="'probs', 'emb'"):
        model.fit(
            x,
            (np.float32(np.eye(4)[y]), y),
            verbose=0,
            callbacks=[begun, RetrievalEvaluation(x, y, output="embedding")],
        )
    assert begun.measured == []


@pytest.mark.parametrize("kind", [RetrievalEvaluation, VerificationEvaluation])
def test_progress_bars_for_long_work(data, capsys, monkeypatch, kind):
    x, y = data

    def bars(shown, verbose=None):
        callback = kind(x, y, verbose=verbose)
        small_model().fit(x, y, batch_size=12, verbose=shown, callbacks=[callback])
        return capsys.readouterr().out.count("24/24")

    assert bars(1) == 0  # it was done at once
    monkeypatch.setattr(_progress, "_LONG", 0.0)
    assert bars(1) == 2  # one for the samples, one for their distances
    assert bars(0) == 0
    assert bars(0, verbose=True) == 2
    assert bars(1, verbose=False) == 0


@pytest.mark.parametrize("kind", [RetrievalEvaluation, VerificationEvaluation])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"y": [0, 0]}, "`y`.*4 labels"),
        ({"y": None}, "`y`.*label"),
        ({"y": [0, 1, 2, 3]}, "`y`"),
        ({"x": np.ones((0, 5))}, "at least one"),
        ({"every": 0}, "every"),
        ({"batch_size": 0}, "batch_size"),
        ({"metrics": ("recal@1",)}, "metrics"),
        ({"metrics": ()}, "metrics"),
        ({"distance": "l2"}, "distance"),
    ],
)
def test_bad_arguments(kind, change, expected):
    with pytest.raises(ValueError, match=expected):
        kind(**({"x": np.ones((4, 5)), "y": [0, 0, 1, 1]} | change))


def test_bad_pairs():
    x, y = np.ones((4, 5)), [0, 0, 1, 1]
    for change, expected in (
        ({"pairs": [[0, 4]], "y": y}, "rows 0"),
        ({"is_same": [True]}, "is_same"),
        ({"pairs": [[0, 1]], "is_same": [True], "y": y}, "is_same"),
        ({"pairs": [[0, 1]], "is_same": [True, False]}, "1 booleans"),
        ({"y": [0, 0, 0, 0]}, "0 different"),
    ):
        with pytest.raises(ValueError, match=expected):
            VerificationEvaluation(x, **change)
    with pytest.raises(ValueError, match="`y`"):
        RetrievalEvaluation(TwoTargets(x, np.array(y)), y)


@tensorflow_only
@pytest.mark.slow
def test_a_mirrored_model_is_embedded_once_per_sample(run_fork):
    code = """
import keras, numpy as np, tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
from kerastrip.callbacks import RetrievalEvaluation
from kerastrip.evaluation.embedding import embed
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
x, y = np.float32(np.random.default_rng(0).normal(size=(24, 5))), np.arange(24) % 4
callback = RetrievalEvaluation(x, y)
model.fit(x, np.zeros((24, 3)), batch_size=8, verbose=0, callbacks=[callback])
kernel, bias = model.get_weights()
np.testing.assert_allclose(embed(model, x, batch_size=5), x @ kernel + bias, rtol=1e-4)
assert callback.results[0]["queries"] == 24
"""
    run_fork(code)


both = pytest.mark.parametrize("kind", [RetrievalEvaluation, VerificationEvaluation])


class Marked(keras.losses.MeanSquaredError):
    """A loss with a distance, as the metric losses have; it takes no time to trace."""

    def __init__(self, distance):
        super().__init__()
        self.distance = distance


def still_model(loss="mse"):
    """It maps the rows to themselves and stays as it is."""
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(5, use_bias=False)])
    model.compile(keras.optimizers.SGD(0.0), loss, run_eagerly=True)
    model.set_weights([np.eye(5)])
    return model


def measure_once(callbacks, loss="mse", epochs=1, **options):
    """The logs of the first epoch of a short training."""
    history = still_model(loss).fit(
        np.ones((2, 5)), np.ones((2, 5)), verbose=0, epochs=epochs, callbacks=callbacks,
        **options,
    )  # fmt: skip
    return {key: values[0] for key, values in history.history.items()}


def test_the_distance_is_that_of_the_compiled_loss(data, rng):
    x, y = data
    x = x * np.float32(rng.uniform(0.01, 9, size=(24, 1)))  # lengths mislead
    expected = {
        distance: {
            f"val_{key}": value
            for figures in (retrieval_metrics, verification_metrics)
            for key, value in figures(x, y, distance=distance).items()
        }
        for distance in ("euclidean", "cosine")
    }
    assert expected["euclidean"]["val_map@r"] != expected["cosine"]["val_map@r"]
    for loss, given, distance in (
        ("mse", None, "euclidean"),
        (Marked("cosine"), None, "cosine"),
        (Marked("cosine"), "euclidean", "euclidean"),
    ):
        logs = measure_once(
            [kind(x, y, distance=given) for kind in (RetrievalEvaluation, VerificationEvaluation)],
            loss,
        )  # fmt: skip
        for key in ("val_recall@1", "val_map@r", "val_auc", "val_eer"):
            assert logs[key] == pytest.approx(expected[distance][key]), (loss, given)


@both
def test_a_distance_that_it_does_not_know_is_told_at_the_line_of_the_user(data, kind):
    with pytest.warns(UserWarning, match="'manhattan'.*Give it distance=") as caught:
        measure_once([kind(*data)], Marked("manhattan"))
    assert [w.filename for w in caught if "manhattan" in str(w.message)] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        measure_once([kind(*data, distance="cosine")], Marked("manhattan"))


def own_loss(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_true - y_pred), axis=-1)


class OwnLoss(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return own_loss(y_true, y_pred)


@both
def test_that_a_loss_of_the_user_tells_no_distance_is_told_once(data, kind):
    for loss in (own_loss, OwnLoss(), functools.partial(own_loss)):
        with pytest.warns(UserWarning, match="tells no `distance`.*euclid") as caught:
            measure_once([kind(*data)], loss, epochs=2)
        ours = [w for w in caught if "tells no" in str(w.message)]
        assert [w.filename for w in ours] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        measure_once([kind(*data, distance="cosine")], own_loss)
        for known in (
            "mse",
            keras.losses.mean_squared_error,
            keras.losses.MeanSquaredError(),
        ):
            measure_once([kind(*data)], known)


@both
def test_a_key_that_was_in_the_logs_already_is_told_once(data, kind):
    key = kind_key(kind)
    twice = [kind(*data), kind(*data, prefix="other_"), kind(*data)]
    for callbacks, taken in (
        (twice, f"'val_{key}'"),
        ([kind(*data, prefix="", names={key: "loss"})], "'loss'"),
    ):
        with pytest.warns(UserWarning, match="The logs had") as caught:
            measure_once(callbacks, epochs=2)
        ours = [w for w in caught if "The logs had" in str(w.message)]
        assert [w.filename for w in ours] == [__file__]
        assert taken in str(ours[0].message)
        assert "other_" not in str(ours[0].message)


def galleries_of_the_same_samples(x, y):
    """(x, y) as the callback gets them, gallery and its labels; where 24 rows are all."""
    source = Subset(x, np.arange(24))  # reads the array, as any other source would
    sampler = PKSampler(source, y, classes_per_batch=2, samples_per_class=2, workers=0)
    batches = TwoTargets(x, y)
    order = np.random.default_rng(1).permutation(24)
    return {
        "the same array": (x, y, x, y),
        "another list of the same labels": (x, y, x, y.tolist()),
        "the array turned round": (x, y, x[::-1], y[::-1]),
        "the same list": (rows := x.tolist(), y, rows, y),
        "the same dataset": (batches, None, batches, None),
        "a sampler and its source": (sampler, None, source, y),
        "a sampler and its array": (sampler, None, x, y),
        "a subset in another order": (source, y, Subset(source, order), y[order]),
    }


@pytest.mark.filterwarnings("error::UserWarning")
def test_samples_of_the_gallery_are_looked_up_without_themselves(data):
    x, y = np.float32(np.random.default_rng(5).normal(size=(24, 5))), data[1]
    expected = retrieval_metrics(x, y)["map@r"]
    for name, (x_, y_, gallery, labels) in galleries_of_the_same_samples(x, y).items():
        callback = RetrievalEvaluation(x_, y_, gallery=gallery, gallery_labels=labels)
        logs = measure_once([callback])
        assert logs["val_map@r"] == pytest.approx(expected), name
    part = RetrievalEvaluation(x[3:9], y[3:9], gallery=x, gallery_labels=y)
    chosen = np.arange(3, 9)
    other = RetrievalEvaluation(
        Subset(x, chosen), y[3:9], gallery=x, gallery_labels=y, prefix="b_"
    )
    logs = measure_once([part, other])
    by_hand = retrieval_metrics(x[3:9], y[3:9], gallery=x, gallery_labels=y)
    assert logs["val_map@r"] == logs["b_map@r"] == by_hand["map@r"] < 0.5


def test_copies_in_the_gallery_are_told_once_in_a_training(data):
    x, y = np.float32(np.random.default_rng(5).normal(size=(24, 5))), data[1]
    callback = RetrievalEvaluation(x[:9].copy(), y[:9], gallery=x, gallery_labels=y)
    for _ in range(2):
        with pytest.warns(UserWarning, match="9 of 9 queries") as caught:
            measure_once([callback], epochs=2)
        ours = [w for w in caught if "9 of 9" in str(w.message)]
        assert [w.filename for w in ours] == [__file__]


@both
def test_a_new_training_begins_with_no_results(data, kind):
    callback = kind(*data)
    measure_once([callback], epochs=3)
    first = callback.results
    measure_once([callback], epochs=1)
    assert list(callback.results) == [0]
    assert list(first) == [0, 1, 2]  # whoever kept it still has it
    measure_once([callback], epochs=4, initial_epoch=2)
    assert list(callback.results) == [0, 2, 3]
    measure_once([callback], epochs=4, initial_epoch=1)
    assert list(callback.results) == [0, 1, 2, 3]


@both
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))]
)
def test_callbacks_can_be_copied_before_and_after_a_training(data, kind, copied):
    x, y = data
    callback = kind(x, y, names={kind_key(kind): "renamed"})
    before = copied(callback)
    expected = measure_once([callback])
    measured = copy.deepcopy(callback.results)
    after = copied(callback)
    assert after.results == measured
    for clone in (before, after):
        assert clone.model is None
        assert measure_once([clone]) == expected
    assert callback.results == measured
    if kind is VerificationEvaluation:
        assert before.curve is not callback.curve


def kind_key(kind):
    return "map@r" if kind is RetrievalEvaluation else "tar@0.01"


@both
def test_a_copy_shares_the_data(data, kind):
    class Kept:
        """Samples that nobody may copy."""

        def __len__(self):
            return 24

        def __getitem__(self, i):
            return data[0][i]

        def __deepcopy__(self, memo):
            raise AssertionError("the data were copied")

    clone = copy.deepcopy(kind(Kept(), data[1]))
    assert measure_once([clone]) == measure_once([kind(*data)])


@both
def test_log_keys_of_another_name(data, kind, tmp_path):
    key, x, y = kind_key(kind), *data
    plain = measure_once([kind(x, y)])
    callback = kind(x, y, names={key: "renamed"})
    kept = keras.callbacks.ModelCheckpoint(
        str(tmp_path / "{val_renamed:.3f}.keras"), monitor="val_renamed", mode="max",
        save_best_only=True,
    )  # fmt: skip
    logs = measure_once([callback, kept])
    assert logs.pop("val_renamed") == plain[f"val_{key}"]
    assert f"val_{key}" not in logs
    assert key in callback.results[0]
    assert [path.stem for path in tmp_path.iterdir()] == [f"{plain[f'val_{key}']:.3f}"]


def test_bad_log_names(data):
    for names, error, expected in (
        ({"recal@1": "r"}, ValueError, "names.*Did you mean 'recall@1'"),
        ({"tar@0.1": "t"}, ValueError, "names.*'map@r'"),
        ({"map@r": "recall@1"}, ValueError, "names.*of its own.*'recall@1'"),
        ({"map@r": 3}, TypeError, "names"),
        (["map"], TypeError, "names"),
    ):
        with pytest.raises(error, match=expected):
            RetrievalEvaluation(*data, names=names)


def test_a_loader_of_pytorch(data):
    torch = pytest.importorskip("torch")
    x, y = data
    names = np.array(["ant", "bee", "cat", "dog"])[y]
    loaders = [
        torch.utils.data.DataLoader(rows, batch_size=7, shuffle=True)
        for rows in (
            torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y)),
            list(zip(x, names.tolist(), strict=True)),
        )
    ]
    plain = measure_once([RetrievalEvaluation(x, y)])
    for loader in loaders:
        got = measure_once([RetrievalEvaluation(loader, gallery=loader)], epochs=2)
        assert got == pytest.approx(plain)


def test_the_key_of_the_loss_names_the_output_of_a_subclassed_model(data):
    x, y = data

    class Two(keras.Model):
        def call(self, rows):
            return {"copy": -3 * rows, "emb": rows}

    for loss in (Marked("euclidean"), keras.losses.MeanSquaredError()):
        model = Two()
        model.compile("sgd", {"emb": loss}, run_eagerly=True)
        callback = RetrievalEvaluation(x, y, output=None)
        if isinstance(loss, Marked):
            model.fit(x, {"emb": x}, verbose=0, callbacks=[callback])
            np.testing.assert_array_equal(embed(model, x), x)
        else:  # it may be any output
            with pytest.raises(ValueError, match="model with 2 outputs"):
                embed(model, x)


def test_nested_outputs(data):
    x, y = data
    rows = keras.Input((5,))
    emb = keras.layers.Dense(3)(rows)
    probs = keras.layers.Dense(4, activation="softmax")(rows)
    model = keras.Model(rows, {"head": {"probs": probs, "emb": emb}, "copy": rows})
    expected = retrieval_metrics(embed(keras.Model(rows, emb), x), y)
    targets = {"head": {"emb": np.ones((24, 3)), "probs": np.eye(4)[y]}, "copy": x}
    losses = {"head": {"emb": Marked("euclidean"), "probs": "mse"}, "copy": "mse"}
    model.compile(keras.optimizers.SGD(0.0), losses, run_eagerly=True)
    by_path = RetrievalEvaluation(x, y, output="head/emb", prefix="b_")
    history = model.fit(
        x, targets, verbose=0, callbacks=[RetrievalEvaluation(x, y), by_path]
    ).history
    assert history["val_map@r"] == history["b_map@r"] == [expected["map@r"]]
    with pytest.raises(
        ValueError,
        match=r"'copy', 'head/emb', 'head/probs'|'head/probs', 'head/emb', 'copy'",
    ):
        embed(model, x, output="emb")


@both
def test_masked_data_are_refused(data, kind):
    x, y = data
    with pytest.raises(ValueError, match=r"`y`.*masked.*position 3"):
        kind(x, np.ma.array(y, mask=np.arange(24) == 3))
    with pytest.raises(ValueError, match=r"`x`.*masked.*position 2, 1"):
        kind(np.ma.array(x, mask=np.arange(120).reshape(24, 5) == 11), y)


WORDS = ("recall@1", "map@r")
ACROSS = ("map", "cmc@1", "minp", "recall@1", "map@r")


@pytest.fixture
def cameras():
    """Of the 24 rows of `data`; one camera alone has seen the class 3."""
    names = np.array(["door", "gate", "yard"])[np.arange(24) // 4 % 3]
    names[3::4] = "gate"
    return names


def test_groups_are_left_out_of_the_figures_of_every_epoch(data, cameras):
    x, y = data
    recorder = Recorder(
        lambda model: retrieval_metrics(
            embed(model, x), y, groups=cameras, metrics=ACROSS
        )
    )
    callback = RetrievalEvaluation(x, y, groups=cameras, metrics=ACROSS)
    plain = RetrievalEvaluation(x, y, prefix="plain_", metrics=ACROSS)
    history = fit(small_model(), data, [callback, plain, recorder])
    for word in ACROSS:
        expected = [figures[word] for figures in recorder.measured]
        assert history[f"val_{word}"] == pytest.approx(expected)
        assert history[f"val_{word}"] != history[f"plain_{word}"]
    counts = {"queries": 18, "lone_queries": 0, "lone_across_groups": 6}
    assert counts.items() <= callback.results[2].items()
    assert "lone_across_groups" not in plain.results[2]


def test_groups_of_queries_and_gallery(data, cameras):
    x, y = data
    near = {"gallery": x[8:], "gallery_labels": y[8:], "gallery_groups": cameras[8:]}
    callback = RetrievalEvaluation(
        x[:8], y[:8], groups=cameras[:8], metrics=ACROSS, **near
    )
    expected = retrieval_metrics(
        x[:8], y[:8], groups=cameras[:8], metrics=ACROSS, **near
    )
    assert expected["lone_across_groups"] == 2
    logs = measure_once([callback])
    assert {word: logs[f"val_{word}"] for word in ACROSS} == pytest.approx(
        {word: expected[word] for word in ACROSS}
    )
    assert callback.results[0] == pytest.approx(expected)
    # The same samples in the gallery, by another array: each is looked up without itself.
    turned = RetrievalEvaluation(
        x, y, groups=cameras, gallery=x[::-1], gallery_labels=y[::-1],
        gallery_groups=cameras[::-1], metrics=ACROSS,
    )  # fmt: skip
    itself = RetrievalEvaluation(
        x, y, groups=cameras, gallery=x, gallery_groups=cameras, metrics=ACROSS,
        prefix="b_",
    )  # fmt: skip
    logs = measure_once([turned, itself])
    assert logs["b_map"] == pytest.approx(logs["val_map"])
    plain = retrieval_metrics(x, y, groups=cameras, metrics=ACROSS)
    assert itself.results[0] == pytest.approx(plain)


def test_groups_beside_a_sampler_and_a_dataset_are_in_their_order(data, cameras):
    x, y = data
    sampler = PKSampler(x, y, classes_per_batch=2, samples_per_class=2, workers=0)
    rows = tf.data.Dataset.from_tensor_slices((x, y)).batch(10)
    callbacks = [
        RetrievalEvaluation(*given, groups=cameras, metrics=ACROSS, prefix=prefix)
        for prefix, given in (("a_", (x, y)), ("b_", (sampler,)), ("c_", (rows,)))
    ]
    logs = measure_once(callbacks, epochs=2)
    for word in ACROSS:
        assert logs[f"a_{word}"] == logs[f"b_{word}"] == logs[f"c_{word}"]
    assert [one.results[1]["queries"] for one in callbacks] == [18] * 3


def test_groups_that_are_not_those_of_the_rows_of_a_dataset(data, cameras):
    x, y = data
    rows = tf.data.Dataset.from_tensor_slices((x, y))
    queries = {"groups": cameras, "gallery_groups": cameras[:9]}
    for callback, expected in (
        (RetrievalEvaluation(rows.batch(9), groups=cameras[:9]), "`groups`.*24 groups"),
        (
            RetrievalEvaluation(x, y, gallery=rows.batch(9), **queries),
            "`gallery_groups`.*24 groups",
        ),
    ):
        with pytest.raises(ValueError, match=expected):
            measure_once([callback])
    mixed = rows.shuffle(24, seed=3).batch(9)
    # The figures of one reading cannot be told from those of a dataset in this order.
    for copied in (lambda one: one, copy.deepcopy):
        callback = RetrievalEvaluation(mixed, groups=cameras)
        measure_once([callback])
        with pytest.raises(ValueError, match=r"`x`.*`groups`.*another order.*shuffle"):
            measure_once([copied(callback)])
    measure_once([RetrievalEvaluation(mixed)], epochs=2)  # no groups, no order


def test_a_diverged_model_has_no_figures_across_groups(data, cameras):
    model = still_model()
    model.set_weights([np.full((5, 5), np.nan)])
    callback = RetrievalEvaluation(*data, groups=cameras, metrics=ACROSS)
    with pytest.warns(UserWarning, match="24 of 24 embeddings"):
        logs = model.fit(
            np.ones((2, 5)), np.ones((2, 5)), verbose=0, callbacks=[callback]
        ).history
    assert np.isnan([logs[f"val_{word}"] for word in ACROSS]).all()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))]
)
def test_a_copy_has_the_groups(data, cameras, copied):
    callback = RetrievalEvaluation(*data, groups=cameras, metrics=ACROSS)
    clone = copied(callback)
    assert measure_once([clone]) == measure_once([callback])
    assert clone.results == callback.results


def test_bad_groups(data, cameras):
    x, y = data
    missing = cameras.astype(object)
    missing[5] = None
    near = {"gallery": x[8:], "gallery_labels": y[8:]}
    near_groups = {**near, "gallery_groups": cameras[8:]}
    alone = np.array(["door", "gate", "yard", "roof"])[y]
    for options, error, expected in (
        ({"groups": cameras[:9]}, ValueError, "`groups`.*24 groups.*9 groups"),
        ({"groups": missing}, ValueError, "`groups`.*position 5"),
        ({"groups": ["door", 1] * 12}, TypeError, "`groups`.*one kind"),
        ({"groups": alone}, ValueError, "`groups`.*two groups"),
        ({"groups": np.arange(24) % 4}, ValueError, "`groups`.*two groups"),
        ({"gallery_groups": cameras}, ValueError, "`gallery_groups`.*`gallery`"),
        ({"groups": cameras, **near}, ValueError, "`gallery_groups`"),
        (near_groups, ValueError, "`gallery_groups`.*`groups`"),
        ({"groups": alone, **near, "gallery_groups": alone[8:]}, ValueError,
         "`groups`.*another group of the gallery"),
        ({"groups": cameras, **near, "gallery_groups": cameras}, ValueError,
         "`gallery_groups`.*16 groups.*24 groups"),
        ({"groups": np.arange(24), **near_groups}, TypeError,
         "`gallery_groups`.*same kind as `groups`"),
    ):  # fmt: skip
        with pytest.raises(error, match=expected):
            RetrievalEvaluation(x, y, **options)
    # One row of a label in another group is enough.
    alone[0] = "gate"
    assert RetrievalEvaluation(x, y, groups=alone)


@pytest.fixture
def many(rng):
    """25 classes of 4 rows, enough for intervals, and no class apart from all others."""
    y = np.arange(100) % 25
    return np.float32(rng.normal(size=(100, 5)) + rng.normal(size=(25, 5))[y]), y


def with_ends(*words):
    return [f"{word}{end}" for word in words for end in ("", "_low", "_high")]


@both
def test_intervals_in_the_logs_are_those_of_the_function(many, kind, tmp_path, capsys):
    x, y = many
    words = {
        RetrievalEvaluation: ("recall@1", "nmi", "map@r"),
        VerificationEvaluation: ("auc", "tar@0.01"),
    }[kind]
    measure = {
        RetrievalEvaluation: retrieval_metrics,
        VerificationEvaluation: verification_metrics,
    }[kind]
    callback = kind(
        x, y, metrics=words, interval=0.9, names={words[-1]: "last"}, every=2
    )
    columns = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        history = still_model().fit(
            x, x, verbose=2, epochs=3, callbacks=[callback, columns]
        )
    expected = measure(x, y, metrics=words, interval=0.9)
    assert callback.results[0] == pytest.approx(expected)
    logged = [word for word in expected if word.partition("_")[0] in words]
    keys = [f"val_{word.replace(words[-1], 'last')}" for word in logged]
    assert [key for key in history.history if key != "loss"] == keys
    assert set(keys) >= {"val_last", "val_last_low", "val_last_high"}
    for word, key in zip(logged, keys, strict=True):
        assert history.history[key] == pytest.approx([expected[word]] * 3)
        low, high = (history.history.get(f"{key}_{end}") for end in ("low", "high"))
        assert (low is None) == (word == "nmi" or word.endswith(("_low", "_high")))
        assert low is None or low[0] < history.history[key][0] < high[0]
    with open(tmp_path / "log.csv") as file:
        assert next(csv.reader(file)) == ["epoch", *sorted(["loss", *keys])]
    # The progress bar has the figures alone, and the next training its own `History`.
    out = capsys.readouterr().out
    assert "val_last:" in out
    assert "_low" not in out
    assert "_high" not in out
    assert "on_epoch_end" not in vars(history)


def test_the_bar_of_mining_stats_leaves_the_ends_out_as_well(many, capsys):
    x, y = many
    model = tiny_model(unit_length=True, loss=TripletLoss())
    callbacks = [
        RetrievalEvaluation(x, y, interval=0.95),
        MiningStats(show=["easy"]),
        VerificationEvaluation(x, y, interval=0.95),
    ]
    history = model.fit(x, y, verbose=2, epochs=2, callbacks=callbacks)
    out = capsys.readouterr().out
    keys = [
        part.split(":")[0] for part in out.strip().splitlines()[-1].split(" - ")[3:]
    ]
    figures = ["recall@1", "map@r", "auc", "eer", "tar@0.01"]
    assert keys == ["easy", "loss", *(f"val_{figure}" for figure in figures)]
    for key in with_ends(*figures):
        assert len(history.history[f"val_{key}"]) == 2
    assert "hard" in history.history


@both
def test_few_classes_are_told_once_in_a_training(data, kind):
    callback = kind(*data, interval=0.95)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logs = measure_once([callback], epochs=3)
        told = [w for w in caught if "4 classes" in str(w.message)]
        assert [w.filename for w in told] == [__file__]
        assert sum(key.endswith("_low") for key in logs) >= 2


@both
def test_a_diverged_model_has_intervals_of_nan(many, kind):
    model = still_model()
    model.set_weights([np.full((5, 5), np.nan)])
    with pytest.warns(UserWarning, match="100 of 100 embeddings"):
        logs = model.fit(
            np.ones((2, 5)), np.ones((2, 5)), verbose=0,
            callbacks=[kind(*many, interval=0.95)],
        ).history  # fmt: skip
    key = kind_key(kind)
    assert np.isnan([logs[f"val_{word}"] for word in with_ends(key)]).all()


def test_intervals_of_queries_and_gallery_of_a_list_of_pairs_and_of_a_dataset(many):
    x, y = many
    near = {"gallery": x[50:], "gallery_labels": y[50:], "interval": 0.95}
    queries = RetrievalEvaluation(x[:50], y[:50], **near)
    pairs = np.random.default_rng(1).integers(0, 100, size=(900, 2))
    pairs = np.concatenate([pairs, [[row, row + 25] for row in range(75)]])
    listed = VerificationEvaluation(x, y, pairs=pairs, interval=0.95)
    rows = tf.data.Dataset.from_tensor_slices((x, y)).batch(30)
    read = RetrievalEvaluation(rows, interval=0.95, prefix="read_")
    measure_once([queries, listed, read])
    for callback, expected in (
        (queries, retrieval_metrics(x[:50], y[:50], metrics=WORDS, **near)),
        (listed, verification_metrics(x, y, pairs=pairs, interval=0.95)),
        (read, retrieval_metrics(x, y, metrics=WORDS, interval=0.95)),
    ):
        found = callback.results[0]
        assert sum(key.endswith("_low") for key in found) >= 2
        assert found == pytest.approx({key: expected[key] for key in found})


def test_bad_intervals(data):
    x, y = data
    one, flags = np.array([0, 0, *range(1, 23)]), [True, False]
    pairs = [[0, 4], [0, 1]]
    for make, error, expected in (
        (lambda: RetrievalEvaluation(x, y, interval=95), ValueError, "interval.*< 1"),
        (lambda: VerificationEvaluation(x, y, interval=True), TypeError, "interval"),
        (lambda: TrainingReport("x.html", x, y, interval=0.0), ValueError, "interval"),
        (lambda: RetrievalEvaluation(x, one, interval=0.9), ValueError,
         "interval.*two classes.*0.9 with 1"),
        (lambda: VerificationEvaluation(x, one, interval=0.9), ValueError,
         "interval.*two classes"),
        (lambda: VerificationEvaluation(x, y, pairs=pairs, interval=0.9), ValueError,
         "interval.*two classes"),
        (lambda: VerificationEvaluation(x, pairs=pairs, is_same=flags, interval=0.9),
         ValueError, "interval.*is_same.*labels as y"),
        (lambda: RetrievalEvaluation(x, y, interval=0.9, names={"map@r": "recall@1_low"}),
         ValueError, "names.*of its own.*'recall@1_low'"),
        (lambda: RetrievalEvaluation(x, y, interval=0.9, names={"recall@1_low": "a"}),
         ValueError, "names"),
    ):  # fmt: skip
        with pytest.raises(error, match=expected):
            make()
