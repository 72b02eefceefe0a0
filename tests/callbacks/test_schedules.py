"""MarginSchedule and MiningSchedule: the loss really changes, on every backend."""

import warnings

import keras
import numpy as np
import pytest
from harness import tensorflow_only, tiny_model
from keras import ops
from reference import census_figures, triplet_loss

from kerastrip.callbacks.mining_stats import MiningStats
from kerastrip.callbacks.schedules import MarginSchedule, MiningSchedule
from kerastrip.losses import TripletLoss

Y = np.arange(24, dtype="int32") % 4
X = np.random.default_rng(2).normal(size=(24, 5)).astype("float32")


def build(loss=None, rate=0.0):
    loss = loss or TripletLoss(margin=0.2)
    return tiny_model(loss=loss, rate=rate), loss


def fit(model, *callbacks, epochs=3, **options):
    return model.fit(
        X,
        Y,
        batch_size=24,
        shuffle=False,
        verbose=0,
        epochs=epochs,
        callbacks=list(callbacks),
        **options,
    ).history


def expected(model, margin, mining="semi_hard"):
    """Loss and semi-hard fraction of the one batch, in plain loops."""
    rows = ops.convert_to_numpy(model(X))
    values, _ = triplet_loss(Y, rows, margin=margin, mining=mining)
    return values.mean(), census_figures([(Y, rows)], margin)["semi_hard"]


@pytest.mark.parametrize(
    ("stats_first", "schedule", "margins"),
    [
        # The change comes when the steps have been traced already.
        pytest.param(True, {1: 0.8}, [0.2, 0.8, 0.8], marks=pytest.mark.backend),
        (False, {0: 0.1, 2: 0.8}, [0.1, 0.1, 0.8]),
    ],
)
def test_the_margin_changes_the_loss_and_the_census(stats_first, schedule, margins):
    model, loss = build()
    callbacks = [MiningStats(), MarginSchedule(schedule)]
    callbacks = callbacks if stats_first else callbacks[::-1]
    history = fit(model, *callbacks, validation_data=(X, Y))
    for epoch, margin in enumerate(margins):
        value, semi_hard = expected(model, margin)
        for lead in ("", "val_"):
            assert history[f"{lead}loss"][epoch] == pytest.approx(value, rel=1e-4)
            assert history[f"{lead}semi_hard"][epoch] == pytest.approx(
                semi_hard, rel=1e-5
            )
    assert history["margin"] == margins
    assert loss.margin == 0.2
    value, _ = expected(model, 0.2)
    assert model.evaluate(X, Y, 24, verbose=0) == pytest.approx(value, rel=1e-4)


@pytest.mark.backend
def test_the_mining_changes_the_loss_and_the_gradient():
    model, loss = build(rate=0.1)
    start = model.get_weights()
    fit(model, MiningSchedule({0: "all"}), epochs=1)
    by_all = model.get_weights()
    model.set_weights(start)
    history = fit(model, MiningSchedule({0: "hard"}), epochs=1)
    assert loss.mining == "semi_hard"
    assert not np.allclose(model.get_weights()[0], by_all[0])
    model.set_weights(start)
    assert history["loss"][0] == pytest.approx(
        expected(model, 0.2, "hard")[0], rel=1e-4
    )


def test_a_function_gets_epoch_margin_and_logs():
    seen = []

    def grow(epoch, margin, logs):
        seen.append((epoch, margin, logs.get("semi_hard")))
        return margin * 2

    model, _ = build()
    history = fit(model, MiningStats(), MarginSchedule(grow))
    assert [margin for _, margin, _ in seen] == pytest.approx([0.2, 0.4, 0.8])
    assert [epoch for epoch, _, _ in seen] == [0, 1, 2]
    assert [value for _, _, value in seen] == [None, *history["semi_hard"][:2]]
    assert history["margin"] == pytest.approx([0.4, 0.8, 1.6])


def test_by_epoch_a_resumed_run_starts_where_it_belongs():
    model, _ = build()
    callbacks = MarginSchedule({1: 0.5, 4: 0.9}), MiningSchedule({0: "all", 3: "hard"})
    history = fit(model, *callbacks, initial_epoch=2, epochs=5)
    assert history["margin"] == [0.5, 0.5, 0.9]
    assert history["mining_stage"] == [0, 1, 1]


def test_before_the_first_entry_the_loss_keeps_its_own():
    model, loss = build()
    history = fit(model, MarginSchedule({5: 0.5}), MiningSchedule({5: "all"}))
    assert history["margin"] == [0.2] * 3
    assert loss.mining == "semi_hard"


def run_by_logs(schedule, values):
    """The mining of each epoch when `monitor` takes these values."""
    model, loss = build()
    schedule.set_model(model)
    schedule.on_train_begin()
    used = []
    for epoch, value in enumerate(values):
        schedule.on_epoch_begin(epoch)
        used.append(loss.mining)
        schedule.on_epoch_end(epoch, {schedule.monitor: value})
    return used


def test_by_logs_the_next_stage_begins_when_the_figure_stays_low():
    stages = ["all", "semi_hard", "hard"]
    used = run_by_logs(MiningSchedule(stages, below=0.1), [0.5, 0.05, 0.5, 0.05, 0, 0])
    assert used == ["all", "all", "semi_hard", "semi_hard", "hard", "hard"]
    used = run_by_logs(
        MiningSchedule(stages, below=0.1, patience=2), [0.05, 0.5, 0.05, 0.05, 0.05, 0]
    )
    assert used == ["all"] * 4 + ["semi_hard"] * 2


@pytest.mark.backend
def test_by_the_logs_of_a_real_fit():
    model, _ = build()
    schedule = MiningSchedule(["all", "semi_hard", "hard"], below=1.1)
    history = fit(model, MiningStats(), schedule)
    assert history["mining_stage"] == [0, 1, 2]
    for value, word in zip(history["loss"], schedule.words, strict=True):
        assert value == pytest.approx(expected(model, 0.2, word)[0], rel=1e-4)


@pytest.mark.parametrize("same_callback", [True, False])
def test_a_new_fit_begins_anew_and_initial_epoch_goes_on(same_callback):
    loss = TripletLoss(margin=0.2, mining="semi_hard")

    def callbacks():
        return (
            MarginSchedule(lambda epoch, margin, logs: margin * 2),
            MiningSchedule(["all", "hard"], monitor="loss", below=99.0),
        )

    model, _ = build(loss)
    used = callbacks()
    first = fit(model, *used, epochs=2)
    assert (loss.margin, loss.mining) == (0.2, "semi_hard")
    resumed = fit(model, *used, initial_epoch=2, epochs=3)
    assert resumed["margin"] == [1.6]
    assert resumed["mining_stage"] == [1]
    # The next fold: another model, the same loss, perhaps the same callbacks.
    model, _ = build(loss)
    second = fit(model, *(used if same_callback else callbacks()), epochs=2)
    for key, values in first.items():
        assert second[key] == pytest.approx(values, rel=1e-5), key
    loss.margin = 0.3  # what is set by hand is the loss's own
    assert fit(model, *used, epochs=1)["margin"] == [0.6]


@pytest.mark.backend
def test_the_next_fit_without_the_schedule_trains_as_if_there_had_been_none():
    model, _ = build()
    callbacks = MarginSchedule({0: 0.8}), MiningSchedule({0: "all"})
    fit(model, MiningStats(), *callbacks, epochs=1)
    assert fit(model, epochs=1)["loss"] == pytest.approx(
        [expected(model, 0.2)[0]], rel=1e-4
    )


def test_what_an_exception_has_left_is_given_back_by_the_next_fit():
    class Breaks(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            raise KeyboardInterrupt

    model, loss = build()
    schedule = MarginSchedule(lambda epoch, margin, logs: margin * 2)
    with pytest.raises(KeyboardInterrupt):
        fit(model, schedule, Breaks())
    assert fit(model, schedule, initial_epoch=1, epochs=2)["margin"] == [0.8]
    assert loss.margin == 0.2
    with pytest.raises(KeyboardInterrupt):
        fit(model, schedule, Breaks())
    assert fit(model, schedule, epochs=1)["margin"] == [0.4]


def test_nothing_is_changed_on_nan():
    asked = []

    def widen(epoch, margin, logs):
        asked.append(epoch)
        return margin if logs.get("active", 1) >= 0.1 else 2 * margin

    model, _ = build(rate=float("nan"))
    margins, stages = MarginSchedule(widen), MiningSchedule(["all", "hard"], below=9.0)
    history = fit(model, MiningStats(), margins, stages, epochs=4)
    assert np.isnan(history["semi_hard"][1:]).all()
    assert history["margin"] == [0.2] * 4
    assert asked == [0, 1]
    assert history["mining_stage"] == [0, 1, 1, 1]  # the first epoch was healthy


def test_a_margin_that_a_soft_loss_does_not_use():
    model, _ = build(TripletLoss(soft=True, mining="hard"))
    with pytest.raises(ValueError, match="soft=True"):
        fit(model, MarginSchedule({0: 0.1}))


def test_without_the_key_it_says_so_once():
    model, _ = build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, MiningSchedule(["all", "hard"]))
    told = [str(w.message) for w in caught if "MiningSchedule" in str(w.message)]
    assert len(told) == 1
    assert "MiningStats()" in told[0]
    assert "stays at 'all'" in told[0]


@tensorflow_only
def test_no_new_trace_without_a_change():
    traces = []

    class Counting(TripletLoss):
        def call(self, y_true, y_pred):
            traces.append(self.margin)
            return super().call(y_true, y_pred)

    model, _ = build(Counting(margin=0.2))
    fit(model, MarginSchedule({0: 0.2, 3: 0.4}), epochs=6)
    assert 0 < traces.count(0.2) == traces.count(0.4) < 3
    assert set(traces) == {0.2, 0.4}


def test_the_loss_must_have_what_is_scheduled():
    model, _ = build(keras.losses.MeanSquaredError())
    with pytest.raises(ValueError, match="`margin`"):
        fit(model, MarginSchedule({0: 0.1}))
    with pytest.raises(ValueError, match="`mining`"):
        fit(model, MiningSchedule(["all"]))


def test_a_margin_that_is_none():
    model, _ = build()
    with pytest.raises(TypeError, match="schedule"):
        fit(model, MarginSchedule(lambda epoch, margin, logs: None))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: MarginSchedule({}), ValueError, "schedule"),
        (lambda: MarginSchedule({0: -1.0}), ValueError, "schedule"),
        (lambda: MarginSchedule({-1: 0.1}), ValueError, "schedule"),
        (lambda: MarginSchedule(0.3), TypeError, "schedule"),
        (lambda: MiningSchedule("hard"), TypeError, "stages"),
        (lambda: MiningSchedule([]), ValueError, "stages"),
        (lambda: MiningSchedule(["semihard"]), ValueError, "semi_hard"),
        (lambda: MiningSchedule({0.5: "hard"}), TypeError, "stages"),
        (lambda: MiningSchedule(["hard"], patience=0), ValueError, "patience"),
        (lambda: MiningSchedule(["hard"], below="x"), TypeError, "below"),
        (lambda: MiningSchedule(["hard"], monitor=1), TypeError, "monitor"),
    ],
)
def test_bad_arguments(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_margin_values_stay_python_floats():
    """A tensor as margin would tie the loss to one backend and one graph."""
    model, _ = build()
    with pytest.raises(TypeError, match="schedule"):
        fit(model, MarginSchedule(lambda e, m, logs: ops.convert_to_tensor(0.5)))
