"""MiningStats under fit and evaluate: what it reports, and that it leaves no trace."""

import copy
import csv
import inspect
import json
import pickle
import re
import threading
import warnings

import keras
import numpy as np
import pytest
from harness import tensorflow_only
from reference import census_figures

from kerastrip._outputs import embedding_output
from kerastrip.callbacks.collapse import CollapseGuard
from kerastrip.callbacks.mining_stats import MiningStats
from kerastrip.callbacks.schedules import MarginSchedule, MiningSchedule
from kerastrip.losses import TripletLoss
from kerastrip.metrics import KEYS, TripletCensus

ROWS, CLASSES = 48, 6
Y = np.arange(ROWS, dtype="int32") % CLASSES
X = np.random.default_rng(1).normal(size=(ROWS, 5)).astype("float32")
ONE_HOT = np.eye(CLASSES, dtype="float32")[Y]


@keras.saving.register_keras_serializable()
class Marked(keras.losses.Loss):
    """Has what tells a triplet loss, and is traced in no time."""

    margin, distance = 0.3, "euclidean"

    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_pred - 0.5), axis=-1)


def build(outputs="list", cls=keras.Model, normalise=True, loss=Marked, **options):
    """A small model with an embedding among its outputs, and its targets."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((5,))
    probs = keras.layers.Dense(CLASSES, activation="softmax", name="probs")(inputs)
    dense = keras.layers.Dense(4, name="dense")(inputs)
    emb = keras.layers.UnitNormalization(dtype="float32", name="emb")(dense)
    if not normalise:
        emb = keras.layers.Rescaling(30.0, name="emb")(dense)
    triplet = loss()
    outs, loss, targets = {
        "single": (emb, triplet, Y),
        "list": ([probs, emb], ["categorical_crossentropy", triplet], (ONE_HOT, Y)),
        "list by name": (
            [probs, emb],
            {"probs": "categorical_crossentropy", "emb": triplet},
            {"probs": ONE_HOT, "emb": Y},
        ),
        "dict": (
            {"head": probs, "body": emb},
            {"head": "categorical_crossentropy", "body": triplet},
            {"head": ONE_HOT, "body": Y},
        ),
        "partly trained": ([probs, emb], [None, triplet], (Y,)),
    }[outputs]
    model = cls(inputs, outs)
    options = {"optimizer": keras.optimizers.SGD(0.0), **options}
    model.compile(loss=loss, **options)
    return model, targets


def fit(model, targets, stats=None, **options):
    stats = stats if stats is not None else MiningStats()
    callbacks = [*options.pop("callbacks", []), stats]
    options = {"batch_size": 16, "verbose": 0, "shuffle": False, **options}
    return model.fit(X, targets, callbacks=callbacks, **options).history


def epoch_of(model, size=16, first=0, stop=ROWS, margin=0.3, distance="euclidean"):
    """The figures of batches of rows, from the embeddings of the model as it is."""
    embedding = keras.Model(model.input, model.get_layer("emb").output)
    rows = keras.ops.convert_to_numpy(embedding(X))
    slices = [slice(i, i + size) for i in range(first, stop, size)]
    return census_figures([(Y[i], rows[i]) for i in slices], margin, distance)


def assert_no_trace(model):
    assert "compute_metrics" not in model.__dict__
    assert not any(isinstance(metric, TripletCensus) for metric in model.metrics)


# --- what it reports -------------------------------------------------------------


@pytest.mark.parametrize(
    "outputs",
    [
        pytest.param("list", marks=pytest.mark.backend),
        pytest.param("dict", marks=pytest.mark.backend),
        "single",
        "list by name",
        "partly trained",
    ],
)
def test_reports_the_census_for_any_output_structure(outputs):
    model, targets = build(outputs)
    history = fit(model, targets, epochs=2, validation_data=(X, targets))
    wanted = epoch_of(model)  # the learning rate is 0: nothing moves
    for key in KEYS:
        assert history[key] == pytest.approx([wanted[key]] * 2, rel=1e-5, abs=1e-6), key
        assert history[f"val_{key}"] == pytest.approx(
            [wanted[key]] * 2, rel=1e-5, abs=1e-6
        )
    assert_no_trace(model)


@tensorflow_only
def test_subclassed_model_without_output_names():
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.body = keras.layers.Dense(4)
            self.head = keras.layers.Dense(CLASSES, activation="softmax")

        def call(self, x):
            return self.head(x), self.body(x)

    model = Two()
    model.compile("sgd", loss=["categorical_crossentropy", TripletLoss(margin=5.0)])
    history = fit(model, (ONE_HOT, Y))
    assert history["easy"][0] + history["active"][0] == pytest.approx(1)


def test_labels_may_come_one_hot():
    model, _ = build("single")
    assert fit(model, ONE_HOT)["easy"] == pytest.approx(fit(model, Y)["easy"])


@pytest.mark.parametrize(
    "options",
    [
        {"run_eagerly": True},
        {"jit_compile": True},
    ],
)
def test_however_the_step_is_run(options):
    if keras.backend.backend() == "torch" and "jit_compile" in options:
        pytest.skip("compiling takes torch a minute")
    model, targets = build(**options)
    wanted = epoch_of(model)
    history = fit(model, targets)
    assert {key: history[key][0] for key in KEYS} == pytest.approx(
        wanted, rel=1e-5, abs=1e-6
    )


@pytest.mark.backend
def test_steps_per_execution():
    if keras.backend.backend() == "torch":
        pytest.skip("not supported by torch")
    model, targets = build(steps_per_execution=2)
    history = fit(model, targets)
    wanted = epoch_of(model)
    assert {key: history[key][0] for key in KEYS} == pytest.approx(
        wanted, rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param("mixed_bfloat16", marks=pytest.mark.backend),
        pytest.param("mixed_float16", marks=pytest.mark.slow),
    ],
)
def test_mixed_precision(policy):
    before = keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_dtype_policy(policy)
    try:
        model, targets = build()
        history = fit(model, targets)
    finally:
        keras.mixed_precision.set_dtype_policy(before)
    wanted = epoch_of(model)
    assert {key: history[key][0] for key in KEYS} == pytest.approx(
        wanted, rel=1e-2, abs=1e-3
    )
    assert history["norm"] == pytest.approx([1.0], rel=1e-5, abs=1e-6)


@pytest.mark.backend
def test_evaluate_alone():
    model, targets = build()
    logs = model.evaluate(
        X,
        targets,
        verbose=0,
        return_dict=True,
        batch_size=16,
        callbacks=[MiningStats()],
    )
    assert {key: logs[key] for key in KEYS} == pytest.approx(
        epoch_of(model), rel=1e-5, abs=1e-6
    )
    assert_no_trace(model)
    again = model.evaluate(X, targets, verbose=0, return_dict=True)
    assert not set(KEYS) & set(again)


@pytest.mark.backend
def test_per_batch_shows_each_batch_and_keeps_the_epoch():
    class Keep(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seen = []

        def on_train_batch_end(self, batch, logs=None):
            self.seen.append(dict(logs))

    model, targets = build()
    running, single = Keep(), Keep()
    fit(model, targets, callbacks=[running])
    history = fit(model, targets, MiningStats(per_batch=True), callbacks=[single])
    for seen, first in zip(single.seen, range(0, ROWS, 16), strict=True):
        wanted = epoch_of(model, first=first, stop=first + 16)
        assert {key: seen[key] for key in KEYS} == pytest.approx(
            wanted, rel=1e-5, abs=1e-6
        )
    wanted = epoch_of(model)
    assert {key: history[key][0] for key in KEYS} == pytest.approx(
        wanted, rel=1e-5, abs=1e-6
    )
    assert running.seen[-1]["easy"] == pytest.approx(wanted["easy"], rel=1e-5, abs=1e-6)
    assert single.seen[-1]["easy"] != pytest.approx(wanted["easy"], rel=1e-5, abs=1e-6)


def test_margin_and_distance_of_ones_own():
    model, targets = build()
    history = fit(model, targets, MiningStats(margin=0.05, distance="cosine"))
    wanted = epoch_of(model, margin=0.05, distance="cosine")
    assert {key: history[key][0] for key in KEYS} == pytest.approx(
        wanted, rel=1e-5, abs=1e-6
    )


def test_another_output_can_be_watched():
    model, _ = build()
    stats = MiningStats(0.1, "euclidean", output="probs")
    history = fit(model, (ONE_HOT, Y), stats)
    assert 0 < history["norm"][0] < 1  # softmax rows, not unit rows


def test_all_ways_into_the_logs(tmp_path):
    model, targets = build()
    log = tmp_path / "log.csv"
    early = keras.callbacks.EarlyStopping("val_semi_hard", mode="max", patience=0)
    history = fit(  # EarlyStopping stands before the stats
        model,
        targets,
        epochs=3,
        validation_data=(X, targets),
        callbacks=[early, keras.callbacks.CSVLogger(log)],
    )
    assert len(history["easy"]) == 2  # nothing moves: stopped by val_semi_hard
    with open(log) as file:
        rows = list(csv.DictReader(file))
    assert [float(row["semi_hard"]) for row in rows] == pytest.approx(
        history["semi_hard"]
    )
    assert float(rows[0]["val_hard"]) == pytest.approx(history["val_hard"][0])


def test_the_progress_bar_shows_it(capsys):
    model, targets = build()
    fit(model, targets, verbose=2)
    assert "semi_hard: 0." in capsys.readouterr().out


def bar(capsys, *callbacks, **options):
    """The last line of the progress bar of a fit, as its keys, and the history."""
    model, targets = build()
    history = fit(
        model,
        targets,
        callbacks[0],
        callbacks=list(callbacks[1:]),
        verbose=2,
        validation_data=(X, targets),
        **options,
    )
    line = capsys.readouterr().out.strip().splitlines()[-1]
    return [part.split(":")[0] for part in line.split(" - ")[3:]], history


def test_the_progress_bar_shows_four_figures_and_the_logs_hold_all(capsys):
    class Behind(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            assert {*KEYS, *(f"val_{key}" for key in KEYS)} <= set(logs)
            logs["mine"] = 1.0

    keys, history = bar(capsys, Behind(), MiningStats(), Behind(), epochs=2)
    four = ["easy", "semi_hard", "hard", "spread"]
    assert keys[:4] == four
    assert [key for key in keys if key.startswith("val_")][:4] == [
        f"val_{key}" for key in four
    ]
    assert {"loss", "val_loss", "mine"} <= set(keys)
    assert not set(keys) & (set(KEYS) - set(four))
    assert {*KEYS, *(f"val_{key}" for key in KEYS)} <= set(history)
    keys, history = bar(capsys, MiningStats(prefix="a_", show=["norm"], per_batch=True))
    assert keys[0] == "a_norm"
    assert not set(keys) & {f"a_{key}" for key in KEYS if key != "norm"}
    assert {f"a_{key}" for key in KEYS} <= set(history)


def test_the_progress_bar_of_a_step_shows_them_in_order(capsys):
    model, targets = build()
    fit(model, targets, verbose=1)
    out = capsys.readouterr().out
    assert "easy: " in out
    assert "norm: " not in out
    assert out.index(" easy: ") < out.index(" semi_hard: ") < out.index(" hard: ")


@pytest.mark.backend
def test_no_triplets_are_told_once_for_training_and_for_validation():
    model, _ = build("single")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(
            X,
            np.arange(ROWS),  # every row a label of its own
            epochs=2,
            batch_size=16,
            verbose=0,
            validation_data=(X, np.zeros(ROWS, "int32")),
            callbacks=[MiningStats()],
        )
    told = [str(w.message) for w in caught if "triplet" in str(w.message)]
    assert len(told) == 2
    assert re.search("training.*no row met another row of its label", told[0])
    assert re.search("validation.*a row of another label", told[1])


def test_no_triplets_in_the_data():
    model, _ = build("single")
    history = model.fit(
        X, np.zeros(ROWS, "int32"), verbose=0, callbacks=[MiningStats()]
    ).history
    assert history["easy"] == history["hard"] == history["active"] == [0.0]
    assert not np.isnan([values[0] for values in history.values()]).any()


@pytest.mark.backend
def test_training_is_the_same_with_and_without():
    def weights(callbacks):
        model, targets = build(loss=TripletLoss, optimizer=keras.optimizers.SGD(0.5))
        model.fit(X, targets, epochs=2, verbose=0, shuffle=False, callbacks=callbacks)
        return [keras.ops.convert_to_numpy(weight) for weight in model.weights]

    for one, two in zip(weights([]), weights([MiningStats()]), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-7)


def test_no_second_forward_pass():
    model, targets = build(run_eagerly=True)
    layer, calls = model.get_layer("dense"), []
    original = layer.call
    layer.call = lambda x, **_: calls.append(1) or original(x)
    fit(model, targets)
    assert len(calls) == ROWS // 16  # once a step


# --- coming and going ------------------------------------------------------------


@pytest.mark.backend
def test_second_fit_with_and_without():
    model, targets = build()
    stats = MiningStats()
    first = fit(model, targets, stats)
    second = fit(model, targets, stats)
    assert second["easy"] == pytest.approx(first["easy"], rel=1e-6)
    third = model.fit(X, targets, verbose=0).history
    assert not set(KEYS) & set(third)
    assert_no_trace(model)


@pytest.mark.slow
def test_one_instance_serves_two_models():
    stats = MiningStats()
    for outputs in ("single", "dict"):
        model, targets = build(outputs)
        assert set(KEYS) <= set(fit(model, targets, stats))
        assert_no_trace(model)


@pytest.mark.backend
def test_two_at_once_with_prefixes_and_an_error_without():
    model, targets = build()
    history = fit(
        model,
        targets,
        MiningStats(margin=1.0, prefix="wide_"),
        callbacks=[MiningStats()],
    )
    assert history["wide_active"][0] > history["active"][0]
    assert history["wide_norm"] == pytest.approx(history["norm"])
    with pytest.raises(ValueError, match="`prefix`"):
        fit(model, targets, callbacks=[MiningStats()])
    # The failed run leaves one attached; the next one replaces it.
    assert set(KEYS) <= set(fit(model, targets))
    assert_no_trace(model)


def test_a_compiled_census_with_the_same_keys_is_an_error():
    model, targets = build(metrics=[None, [TripletCensus(margin=0.3)]])
    with pytest.raises(ValueError, match="`prefix`"):
        fit(model, targets)
    history = fit(model, targets, MiningStats(prefix="b_"))
    assert history["b_easy"] == pytest.approx(history["easy"], rel=1e-5, abs=1e-6)


class Boom(keras.callbacks.Callback):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def on_train_batch_end(self, batch, logs=None):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(KeyboardInterrupt(), marks=pytest.mark.backend),
        pytest.param(RuntimeError("boom"), marks=pytest.mark.slow),
    ],
)
def test_after_an_interruption(error):
    model, targets = build()
    stats = MiningStats()
    with pytest.raises(type(error)):
        fit(model, targets, stats, callbacks=[Boom(error)])
    assert "compute_metrics" in model.__dict__  # still there, and still of use:
    logs = model.evaluate(X, targets, verbose=0, return_dict=True)
    assert set(KEYS) <= set(logs)
    # Another instance replaces it: no error about the keys, no double counting.
    history = fit(model, targets, MiningStats())
    wanted = epoch_of(model)
    assert {key: history[key][0] for key in KEYS} == pytest.approx(
        wanted, rel=1e-5, abs=1e-6
    )
    assert_no_trace(model)
    with pytest.raises(type(error)):
        fit(model, targets, stats, callbacks=[Boom(error)])
    # So does an evaluation.
    logs = model.evaluate(
        X, targets, 16, verbose=0, return_dict=True, callbacks=[MiningStats()]
    )
    assert {key: logs[key] for key in KEYS} == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert_no_trace(model)
    with pytest.raises(type(error)):
        fit(model, targets, stats, callbacks=[Boom(error)])
    stats.detach()
    assert_no_trace(model)
    assert not set(KEYS) & set(model.evaluate(X, targets, verbose=0, return_dict=True))


@pytest.mark.slow
def test_interrupted_and_fitted_again_with_the_same_instance():
    model, targets = build()
    stats = MiningStats()
    with pytest.raises(RuntimeError):
        fit(model, targets, stats, callbacks=[Boom(RuntimeError())])
    assert set(KEYS) <= set(fit(model, targets, stats))
    assert_no_trace(model)


@pytest.mark.slow
def test_an_evaluation_inside_fit_does_not_end_it():
    class Evaluate(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.evaluate(X, targets, verbose=0, callbacks=[MiningStats()])

    model, targets = build()
    history = fit(model, targets, epochs=3, callbacks=[Evaluate()])
    assert len(history["easy"]) == 3
    assert_no_trace(model)


def test_a_patched_compute_metrics_is_kept():
    model, targets = build()
    calls = []
    original = model.compute_metrics

    def mine(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.__dict__["compute_metrics"] = mine
    assert set(KEYS) <= set(fit(model, targets))
    assert calls
    assert model.compute_metrics is mine


@pytest.mark.backend
def test_saved_in_the_middle_of_fit_nothing_of_it_is_stored(tmp_path):
    model, targets = build()
    path = tmp_path / "model.keras"
    fit(model, targets, callbacks=[keras.callbacks.ModelCheckpoint(path)])
    again = keras.saving.load_model(path)
    assert not set(KEYS) & set(again.evaluate(X, targets, verbose=0, return_dict=True))
    for one, two in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(two)
        )
    assert fit(again, targets)["easy"] == pytest.approx(
        fit(model, targets)["easy"], rel=1e-6
    )


def fits_and_traces(*fits, loss=TripletLoss):
    """The histories of some fits of one model, and how often the loss was traced."""
    traces = []

    class Counting(loss):
        def call(self, y_true, y_pred):
            traces.append(self.margin)
            return super().call(y_true, y_pred)

    model, targets = build("single", loss=Counting)
    told = []
    for callbacks in fits:
        if callable(callbacks):
            callbacks(model)
            continue
        before = len(traces)
        history = model.fit(
            X,
            targets,
            batch_size=16,
            verbose=0,
            shuffle=False,
            callbacks=callbacks,
            validation_data=(X, targets),
        ).history
        told.append((history, len(traces) - before))
    return model, told


@tensorflow_only
def test_what_was_traced_serves_again_while_nothing_changes():
    def widen(model):
        model.loss.margin = 0.6

    def recompile(model):
        model.compile(keras.optimizers.SGD(0.0), model.loss)

    _, told = fits_and_traces(
        [MiningStats()],
        [MiningStats()],
        [],
        [MiningStats(per_batch=True)],
        [],
        [MiningStats()],
        widen,
        [MiningStats()],
        recompile,
        [MiningStats()],
    )
    histories, traces = zip(*told, strict=True)
    assert [count > 0 for count in traces] == [1, 0, 1, 1, 0, 0, 1, 1]
    for index in (1, 5):
        assert histories[index] == histories[0]
    assert not set(KEYS) & {*histories[2], *histories[4]}
    assert histories[6]["active"] > histories[0]["active"]
    assert histories[7] == histories[6]


@tensorflow_only
def test_two_at_once_keep_their_traces_and_do_not_mix():
    wide = {"margin": 1.0, "prefix": "wide_"}
    _, told = fits_and_traces(
        [MiningStats(), MiningStats(**wide)],
        [MiningStats(), MiningStats(**wide)],
        [MiningStats(**wide), MiningStats()],
        [MiningStats(margin=1.0)],
        loss=Marked,
    )
    assert told[1] == (told[0][0], 0)
    assert told[2][0] == told[0][0]
    assert told[3][0]["active"] == told[0][0]["wide_active"]


@pytest.mark.parametrize("used", [False, True])
def test_copies_and_pickles_leave_the_model_behind(used):
    model, targets = build("single")
    callbacks = [
        MiningStats(per_batch=True, show=["easy"]),
        CollapseGuard(max_norm=7.0),
        MarginSchedule({0: 0.1}),
        MiningSchedule(["all", "hard"], patience=3),
    ]
    if used:
        fit(model, targets, callbacks[0], callbacks=callbacks[1:3])
    for callback in callbacks:
        for again in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
            assert again.model is None
            assert again.params is None
            for name in ("per_batch", "show", "max_norm", "schedule", "patience"):
                assert getattr(again, name, None) == getattr(callback, name, None)
    other, targets = build("single")
    assert set(KEYS) <= set(fit(other, targets, copy.deepcopy(callbacks[0])))


# --- models that go their own way ------------------------------------------------


class OwnStep(keras.Model):
    """A step of one's own that reports the loss alone."""

    def logs(self):
        return {"loss": keras.ops.zeros(())}

    def train_step(self, *given):  # JAX hands over the state, and wants it back
        return (self.logs(), given[0]) if len(given) == 2 else self.logs()


class OwnStepWithResults(OwnStep):
    """Reports all metrics, though it updates none."""

    def logs(self):
        return {m.name: m.result() for m in self.metrics} | super().logs()


class OwnLoop(keras.Model):
    """Updates every metric by hand with the whole structure."""

    def train_step(self, data):
        x, y = data
        for metric in self.metrics:
            if not metric.name.endswith("loss"):
                metric.update_state(y, self(x))
        return {metric.name: metric.result() for metric in self.metrics}


@pytest.mark.parametrize(
    "cls",
    [
        pytest.param(OwnStep, marks=pytest.mark.backend),
        pytest.param(OwnStepWithResults, marks=tensorflow_only),
    ],
)
def test_a_bypassed_compute_metrics_warns_once_and_shows_no_zeros(cls):
    model, targets = build(cls=cls)
    seen = []

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(set(logs))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stats, data = MiningStats(), (X, targets)
        history = fit(
            model, targets, stats, epochs=2, validation_data=data, callbacks=[Keep()]
        )
    told = [str(w.message) for w in caught if "MiningStats" in str(w.message)]
    assert len(told) == 1
    assert "`train_step`" in told[0]
    assert not set(KEYS) & set(history)
    assert {f"val_{key}" for key in KEYS} <= set(history)  # test_step is Keras' own
    assert_no_trace(model)


@tensorflow_only
def test_a_bypassing_test_step_is_told_too():
    class OwnTest(keras.Model):
        def test_step(self, data):
            return {m.name: m.result() for m in self.metrics}

    model, targets = build(cls=OwnTest)
    with pytest.warns(UserWarning, match="`test_step`"):
        history = fit(model, targets, validation_data=(X, targets))
    assert set(KEYS) <= set(history)
    assert not {f"val_{key}" for key in KEYS} & set(history)


@tensorflow_only
@pytest.mark.parametrize("outputs", ["single", "list"])
def test_metrics_updated_by_hand_are_counted(outputs):
    model, targets = build(outputs, cls=OwnLoop)
    history = fit(model, targets)
    wanted = epoch_of(model)
    assert {key: history[key][0] for key in KEYS} == pytest.approx(
        wanted, rel=1e-5, abs=1e-6
    )


@pytest.mark.backend
def test_a_late_batch_hook_raises_no_false_alarm():
    """JAX and torch run batch hooks beside later steps, even after validation began."""

    came = threading.Event()  # the hook itself may be late

    class Late(MiningStats):
        def on_train_batch_end(self, batch, logs=None):
            self.late = (batch, logs)
            came.set()

        def on_test_begin(self, logs=None):
            super().on_test_begin(logs)
            assert came.wait(60)
            super().on_train_batch_end(*self.late)

    model, targets = build()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="MiningStats|The embeddings")
        history = fit(model, targets, Late(), validation_data=(X, targets))
    assert {*KEYS, *(f"val_{key}" for key in KEYS)} <= set(history)


# --- warnings and errors ---------------------------------------------------------


@pytest.mark.backend
def test_warns_once_when_the_embedding_is_not_normalised():
    model, targets = build(normalise=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, targets, epochs=2, validation_data=(X, targets))
    told = [w for w in caught if "UnitNormalization" in str(w.message)]
    assert len(told) == 1
    assert "0.3" in str(told[0].message)
    assert told[0].filename == __file__


@pytest.mark.backend
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="it names the row")
def test_figures_that_are_nan_are_told_once_with_the_labels_as_a_cause():
    model, _ = build("single")
    mixed = 0.7 * ONE_HOT + 0.3 * ONE_HOT[::-1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = fit(model, mixed, epochs=2, validation_data=(X, mixed))
    assert np.isnan(history["easy"]).all()
    told = [w for w in caught if "NaN" in str(w.message)]
    assert len(told) == 1
    assert "not one-hot" in str(told[0].message)
    assert "run_eagerly=True" in str(told[0].message)
    assert told[0].filename == __file__


@pytest.mark.parametrize("mean", [0.7, 1.1])
def test_lengths_near_1_that_vary_are_not_normalised(mean):
    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Rescaling(1.0, name="emb")(inputs))
    model.compile("sgd", TripletLoss())
    x = X * (mean / np.linalg.norm(X, axis=1).mean())
    with pytest.warns(UserWarning, match=f"length of {mean:.1f}.*UnitNormalization"):
        model.fit(x, Y, ROWS, verbose=0, callbacks=[MiningStats()])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_unit_lengths_in_half_precision_raise_no_alarm(dtype):
    for dim in (2, 256):
        layer = keras.layers.UnitNormalization(dtype=dtype)
        rows = np.random.default_rng(0).normal(size=(256, dim)).astype("float32")
        census = TripletCensus()
        census.update_state(np.arange(256) % 8, layer(rows))
        assert float(census.result()["norm_std"]) < 0.004


@pytest.mark.parametrize(
    "stats",
    [MiningStats(margin=5.0), MiningStats(distance="cosine")],
    ids=["wide margin", "cosine"],
)
def test_no_warning_where_the_length_is_meant(stats):
    model, targets = build(normalise=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The embeddings")
        fit(model, targets, stats)


def test_no_warning_for_unit_length():
    model, targets = build()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The embeddings|MiningStats")
        fit(model, targets)
        # A `History` in front leaves the bar's figures alone: here nothing but zeros.
        stats = MiningStats(margin=1e-6, show=["semi_hard"])
        fit(model, targets, stats, callbacks=[keras.callbacks.History()])


def plain(loss):
    inputs = keras.Input((5,))
    a = keras.layers.Dense(3, name="a")(inputs)
    b = keras.layers.Dense(3, name="b")(inputs)
    model = keras.Model(inputs, [a, b])
    model.compile("sgd", loss=loss)
    return model


def test_which_output_is_left_open():
    for loss in (["mse", "mse"], [TripletLoss(), TripletLoss()], TripletLoss()):
        with pytest.raises(ValueError, match=r"`output`.*'a', 'b'"):
            embedding_output(plain(loss))
    with pytest.raises(ValueError, match=r"`output`.*'a', 'b'"):
        plain("mse").fit(X, (X, X), verbose=0, callbacks=[MiningStats()])
    model = plain([TripletLoss(margin=0.7), TripletLoss()])
    for wrong in ("c", 2, True):
        with pytest.raises(ValueError, match=r"`output`.*'a', 'b'"):
            embedding_output(model, wrong)
    for output in (0, "a"):
        found = embedding_output(model, output)
        assert (found.index, found.name, found.loss.margin) == (0, "a", 0.7)
        assert found.loss_key == "a_loss"


def test_what_an_output_takes():
    found = embedding_output(plain(["mse", TripletLoss()]))
    assert found.part_of("bare") == "bare"
    assert found.part_of(["x", "y"]) == found.part_of(("x", "y")) == "y"
    assert found.part_of({"a": "x", "b": "y"}) == "y"
    assert found.part_of({"P": "x", "Q": "y"}) == "y"  # Keras pairs by sorted keys
    with pytest.raises(ValueError, match="`output`"):
        found.part_of({"P": 1, "Q": 2, "R": 3})
    partly = embedding_output(plain([None, TripletLoss()]))
    assert partly.part_of(["y"]) == "y"
    assert partly.loss_key == "loss"


def test_a_loss_without_margin_asks_for_one():
    model, targets = build()
    model.compile("sgd", loss=["categorical_crossentropy", "mse"])
    with pytest.raises(ValueError, match=r"`margin`.*MiningStats\(margin="):
        fit(model, targets, MiningStats(output="emb"))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"margin": -1}, ValueError, "margin"),
        ({"margin": "wide"}, TypeError, "margin"),
        ({"distance": "l2"}, ValueError, "distance"),
        ({"output": 1.5}, TypeError, "output"),
        ({"prefix": None}, TypeError, "prefix"),
        ({"per_batch": 1}, TypeError, "per_batch"),
        ({"show": "easy"}, TypeError, "show"),
        ({"show": ["semihard"]}, ValueError, "show"),
    ],
)
def test_bad_arguments(options, error, says):
    with pytest.raises(error, match=f"`{says}`"):
        MiningStats(**options)


# --- in a process of its own -----------------------------------------------------


@pytest.fixture
def run_alone(run_fork):
    """Runs code that may hang or change the process; returns its last line as JSON."""
    return lambda code: json.loads(run_fork(code).stdout.strip().splitlines()[-1])


@tensorflow_only
@pytest.mark.skipif(
    "synchronization" not in inspect.signature(keras.Variable.__init__).parameters,
    reason="this Keras shares metric variables between replicas: each step doubles "
    "what was there, for its own metrics too",
)
def test_two_replicas(run_alone):
    """Under MirroredStrategy the triplets are those within each replica."""
    told = run_alone(
        """
        import json
        import numpy as np
        import tensorflow as tf
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * 2,
        )
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        import test_mining_stats as t
        with strategy.scope():
            model, targets = t.build()  # integer labels
        history = t.fit(model, targets, epochs=2, validation_data=(t.X, targets))
        t.assert_no_trace(model)
        again = t.fit(model, targets)
        halves = t.epoch_of(model, size=8)   # a batch of 16 is split in two
        print(json.dumps([history, again, halves], default=float))
        """
    )
    history, again, halves = told
    for key in KEYS:
        assert history[key] == pytest.approx([halves[key]] * 2, rel=1e-5, abs=1e-6), key
        assert again[key] == pytest.approx([halves[key]], rel=1e-5, abs=1e-6)
    assert f"val_{KEYS[0]}" in history


@pytest.mark.slow
@tensorflow_only
def test_ctrl_c(run_alone):
    """A real SIGINT in the middle of fit, then a second fit in the same process."""
    told = run_alone(
        """
        import gc, json, os, signal
        # A shell may have started the tests with Ctrl-C switched off.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import keras
        import test_mining_stats as t
        class Interrupt(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                os.kill(os.getpid(), signal.SIGINT)
        model, targets = t.build()
        try:
            t.fit(model, targets, epochs=50, callbacks=[Interrupt()])
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
        gc.collect()
        left = "compute_metrics" in model.__dict__
        history = t.fit(model, targets)
        t.assert_no_trace(model)
        easy = [history["easy"], float(t.epoch_of(model)["easy"])]
        print(json.dumps([interrupted, left, *easy]))
        """
    )
    interrupted, left, found, wanted = told
    assert interrupted
    assert left
    assert found == pytest.approx([wanted], rel=1e-5, abs=1e-6)
