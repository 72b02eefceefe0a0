"""recalibrate, and the alarm for moving averages that lag behind."""

import gc
import warnings
import weakref

import keras
import numpy as np
import pytest

from kerastrip import (
    EpochSync,
    PKSampler,
    RetrievalEvaluation,
    TrainingReport,
    embed,
    recalibrate,
)
from kerastrip.callbacks import _averages
from kerastrip.evaluation.recalibration import Figures, compare_modes
from kerastrip.evaluation.retrieval import retrieval_metrics

pytestmark = pytest.mark.backend
layers = keras.layers


@pytest.fixture(scope="module")
def data():
    """Twelve classes of points, far from the origin and of small variance."""
    rng = np.random.default_rng(0)
    y = np.arange(96) % 12
    return np.float32(
        rng.normal(size=(96, 6)) * 0.1 + rng.normal(size=(12, 6))[y] + 3
    ), y


def network(momentum=0.99, dropout=0.0, inside=layers.ReLU):
    inputs = keras.Input((6,))
    x = layers.Dense(16)(inputs)
    x = layers.BatchNormalization(momentum=momentum, name="first")(x)
    x = layers.Dropout(dropout, seed=1)(inside()(x))
    x = layers.Dense(12)(x)
    inner = keras.Sequential([layers.BatchNormalization(momentum=momentum)], name="in")
    x = layers.Rescaling(5.0)(layers.UnitNormalization()(inner(x)))
    return keras.Model(inputs, x)


def variables(model):
    return [np.array(numpy(v)) for v in model.variables]


def fails(*arguments):
    raise ZeroDivisionError


def sampler(data, **options):
    return PKSampler(
        *data, classes_per_batch=8, samples_per_class=4, workers=0, **options
    )


def norms(model):
    return model.get_layer("first"), model.get_layer("in").layers[0]


def numpy(tensor):
    return keras.ops.convert_to_numpy(keras.ops.copy(tensor))


def test_the_averages_become_the_means_of_the_batch_statistics(data):
    model, train = network(), sampler(data)
    moved = recalibrate(model, train)
    first, _ = norms(model)
    batches = [numpy(model.layers[1](train[step][0])) for step in range(len(train))]
    mean = np.mean([batch.mean(axis=0) for batch in batches], axis=0)
    variance = np.mean([batch.var(axis=0) for batch in batches], axis=0)
    np.testing.assert_allclose(numpy(first.moving_mean), mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(numpy(first.moving_variance), variance, rtol=1e-3)
    assert moved.keys() == {"first", "in/" + norms(model)[1].name}
    assert min(moved.values()) > 0.3
    assert max(recalibrate(model, train).values()) < 1e-3


def test_nothing_but_the_averages_changes(data):
    model, train = network(dropout=0.5), sampler(data)
    before, momentum = variables(model), norms(model)[0].momentum
    recalibrate(model, train)
    averages = {id(v) for norm in norms(model) for v in norm.non_trainable_variables}
    for variable, old, new in zip(
        model.variables, before, variables(model), strict=True
    ):
        assert np.array_equal(old, new) == (id(variable) not in averages)
    assert (train.epoch, norms(model)[0].momentum) == (0, momentum)
    again = [np.array(numpy(v)) for v in norms(model)[0].non_trainable_variables]
    recalibrate(model, train)
    for old, new in zip(again, norms(model)[0].non_trainable_variables, strict=True):
        np.testing.assert_allclose(numpy(new), old, rtol=1e-6)


def test_frozen_layers_are_left_alone(data):
    model = network()
    norms(model)[0].trainable = False
    before = [np.array(numpy(v)) for v in norms(model)[0].variables]
    assert list(recalibrate(model, sampler(data))) == ["in/" + norms(model)[1].name]
    for old, new in zip(before, norms(model)[0].variables, strict=True):
        np.testing.assert_array_equal(numpy(new), old)
    model.trainable = False
    assert recalibrate(model, sampler(data)) == {}


def test_a_layer_that_is_called_twice_averages_both_calls():
    norm = layers.BatchNormalization(momentum=0.9)
    left, right = keras.Input((1,)), keras.Input((1,))
    model = keras.Model([left, right], layers.Add()([norm(left), norm(right)]))
    x = np.float32([[0.0], [2.0]])
    recalibrate(model, (x, x + 4))
    # 0.9 of the first, as the second comes after it
    assert numpy(norm.moving_mean)[0] == pytest.approx((0.9 * 1 + 5) / 1.9, rel=1e-4)
    assert numpy(norm.moving_variance)[0] == pytest.approx(1.0, rel=1e-3)


class Given(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


@pytest.mark.parametrize("kind", ["arrays", "PyDataset", "tf.data"])
def test_data_in_several_ways(data, kind):
    x, y = data
    if kind == "arrays":
        given = x
    elif kind == "PyDataset":
        given = Given([(x[:60], y[:60]), (x[60:], y[60:])])
    else:
        tf = pytest.importorskip("tensorflow")
        given = tf.data.Dataset.from_tensor_slices(data).batch(60).repeat()
    norm = layers.BatchNormalization()
    model = keras.Sequential([keras.Input((6,)), norm])
    recalibrate(model, given, batches=2, batch_size=96)
    np.testing.assert_allclose(numpy(norm.moving_mean), x.mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize("last", [np.nan, "broken"])
def test_after_an_error_the_averages_are_as_they_were(data, last):
    x, _ = data

    class Broken(Given):
        def __getitem__(self, index):
            if index and last == "broken":
                raise OSError("no such file")
            return np.where(index, np.float32("nan"), x[:8])

    model = network()
    before = variables(model)
    with pytest.raises((OSError, ValueError), match=r"no such file|finite statistics"):
        recalibrate(model, Broken([0, 1]))
    for old, new in zip(before, variables(model), strict=True):
        np.testing.assert_array_equal(old, new)


def test_arguments_that_do_not_fit(data):
    for options, words in (({"batches": 0}, "`batches`"), ({"batch_size": 1}, "_size")):
        with pytest.raises(ValueError, match=words):
            recalibrate(network(), data[0], **options)
    with pytest.raises(ValueError, match="a built Keras model"):
        recalibrate(keras.Sequential([layers.Dense(1)]), data[0])
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate(network(), Given([]))


def test_the_comparison_changes_nothing_and_knows_frozen_layers(data):
    model = network(dropout=0.5)
    before = variables(model)
    seen, used = compare_modes(model, *data)
    assert seen.spread > 2 * used.spread  # all points lie in one direction
    for old, new in zip(before, variables(model), strict=True):
        np.testing.assert_array_equal(old, new)
    again, _ = compare_modes(model, *data)  # Dropout is left out
    assert again == seen
    recalibrate(model, data[0], batches=20, batch_size=96)
    seen, used = compare_modes(model, *data)
    assert not _averages.lags(seen, used)
    model.trainable = False
    assert compare_modes(model, *data) is None
    plain = keras.Sequential([keras.Input((6,)), layers.Dense(2)])
    assert compare_modes(plain, *data) is None


def test_averages_may_lag_at_first_but_not_in_the_last_epoch(data):
    model, watch = network(), _averages.AveragesWatch()
    model.compile("sgd", "mse")
    assert [watch.look(model, None, data, e, last=False) for e in range(4)] == [""] * 4
    assert watch.look(model, None, data, 4, last=True).startswith("Epoch 5: ")
    assert [alarm.epoch for alarm in watch.alarms] == [4]
    model.optimizer.iterations.assign(100)
    watch = _averages.AveragesWatch()
    said = [watch.look(model, None, data, e, last=False) for e in range(4)]
    assert [bool(text) for text in said] == [False, False, True, False]
    # What is saved is told again.
    assert watch.look(model, None, data, 4, last=True).startswith("Epoch 5: ")


def test_when_figures_lag():
    seen = Figures(0.9, 0.3, 1.3)
    assert not _averages.lags(seen, Figures(0.8, 0.25, 1.2))
    assert _averages.lags(seen, Figures(0.03, 0.05, 0.22))
    assert _averages.lags(seen, Figures(0.62, 0.5, 1.0))
    assert _averages.lags(seen, Figures(0.0, 0.0, 0.0))


def test_rows_of_many_classes_are_chosen():
    codes = np.repeat(np.arange(20), 9)[::-1]
    rows = _averages.some_rows(codes)
    assert np.unique(codes[rows], return_counts=True)[1].tolist() == [4] * 16
    assert len(set(rows.tolist())) == 64
    few = _averages.some_rows(np.array([*range(8), *range(8), 8]))
    assert sorted(few.tolist()) == list(range(16))
    assert _averages.some_rows(np.arange(14) % 7) is None  # too few classes to tell
    assert _averages.some_rows(np.arange(14)) is None


def fitted(data, momentum, epochs=4, callbacks=(), steps=40):
    """(model, sampler, warnings of the averages) of a fit; `callbacks` stand first."""
    keras.utils.set_random_seed(1)
    model = network(momentum, dropout=0.2)
    # It takes less time to trace than a triplet loss.
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss)
    train = sampler(data, batches_per_epoch=steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(
            train,
            epochs=epochs,
            shuffle=False,
            verbose=0,
            callbacks=[*callbacks, EpochSync(train)],
        )
    told = [w for w in caught if "moving averages" in str(w.message)]
    return model, train, told


def test_averages_that_lag_are_told_and_recalibrate_mends_them(
    data, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    x, y = data
    report = TrainingReport(tmp_path / "report.html", x, y, every=5)
    evaluation, looks = RetrievalEvaluation(x, y), []

    def compare(model, inputs, labels, **options):
        looks.append(labels)
        return compare_modes(model, inputs, labels, **options)

    monkeypatch.setattr(_averages, "compare_modes", compare)
    model, train, told = fitted(data, 0.999, callbacks=[report, evaluation])
    assert len(looks) == 4  # one an epoch, for both callbacks
    assert [alarm.epoch for alarm in evaluation._evaluation.alarms] == [2, 3]
    warning, last = told
    text = str(warning.message)
    assert text.startswith("Epoch 3: ")
    assert str(last.message).startswith("Epoch 4: ")
    for words in ("same 64 rows", "momentum=0.9", "kerastrip.recalibrate(", "freeze"):
        assert words in text
    assert warning.filename == __file__
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Epoch 4: BatchNormalization&#x27;s moving averages lag behind" in page
    before = retrieval_metrics(embed(model, x), y)["map@r"]
    recalibrate(model, train)
    assert not _averages.lags(*compare_modes(model, x, y))
    assert retrieval_metrics(embed(model, x), y)["map@r"] >= before


def test_averages_that_follow_are_not_told(data):
    evaluation = RetrievalEvaluation(*data)
    _, _, told = fitted(data, 0.8, callbacks=[evaluation])
    assert not told
    assert evaluation._evaluation.alarms == []


def test_held_out_rows_serve_where_no_sampler_is_known(data):
    x, y = data
    evaluation = RetrievalEvaluation(x, y)
    model = network(0.999)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    sync, broken = EpochSync(sampler(data)), keras.callbacks.LambdaCallback(fails)
    with pytest.raises(ZeroDivisionError):
        model.fit(x, y, verbose=0, callbacks=[sync, evaluation, broken])
    # The `EpochSync` that the exception has left behind is none of this training.
    with pytest.warns(UserWarning, match="Epoch 1: .*of the same 60 rows"):
        model.fit(x, y, batch_size=96, verbose=0, callbacks=[evaluation])


def test_a_watch_is_shared_by_the_callbacks_of_one_training(data):
    model, other = network(), network()
    model.compile("sgd", "mse")
    watch = _averages.watch_of(model, None)
    assert _averages.watch_of(model, 0) is watch  # the same output
    assert _averages.watch_of(other, None) is not watch
    watch.look(model, None, data, epoch=0, last=True)
    assert watch.alarms
    again = _averages.watch_of(model, None)
    assert again is not watch
    assert not again.alarms
    reference = weakref.ref(other)
    del other
    gc.collect()
    assert reference() is None
