"""CollapseGuard: alarms on what really collapses, silence on what is healthy."""

import io
import re
import warnings
import zipfile

import keras
import numpy as np
import pytest
from harness import ROOT, tiny_model
from sklearn.datasets import load_digits

from kerastrip.callbacks.collapse import CollapseGuard
from kerastrip.callbacks.mining_stats import MiningStats
from kerastrip.losses import TripletLoss
from kerastrip.sampling.sampler import PKSampler

OMNIGLOT = ROOT.parent / "shared" / "data" / "omniglot"

HEALTHY = {
    "easy": 0.6,
    "semi_hard": 0.3,
    "hard": 0.1,
    "active": 0.4,
    "pairs_with_semi_hard": 0.8,
    "anchors_without_positive": 0.0,
    "pos_dist": 0.5,
    "neg_dist": 1.2,
    "norm": 1.0,
    "norm_std": 0.0,
    "spread": 0.7,
    "effective_dim": 5.0,
    "loss": 0.1,
}
POINT = {"spread": 1e-5, "pos_dist": 3e-3, "neg_dist": 5e-3, "loss": 0.199, "easy": 0.0}
LINE = {"effective_dim": 1.02, "easy": 0.2, "active": 0.8}
STUCK = {"spread": 0.4, "hard": 0.99, "easy": 0.0, "active": 1.0, "loss": 0.203}
CHANCE = {"hard": 0.505, "pos_dist": 1.0, "neg_dist": 1.01, "easy": 0.3, "active": 0.7}
IDLE = {"easy": 1.0, "semi_hard": 0.0, "hard": 0.0, "active": 0.0, "loss": 0.0}
NONE = {**IDLE, "easy": 0.0}


def told(epochs, guard=None, loss=None, dim=8, rate=0.01):
    """The alarms over the logs of some epochs, without training anything."""
    loss = loss or TripletLoss(margin=0.2)
    model = tiny_model((3,), dim, unit_length=False, loss=loss, rate=rate)
    guard = guard or CollapseGuard()
    guard.set_model(model)
    model.stop_training = False
    guard.on_train_begin()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch, figures in enumerate(epochs):
            logs = {guard.prefix + k: v for k, v in {**HEALTHY, **figures}.items()}
            logs["loss"] = logs.pop(guard.prefix + "loss")
            guard.on_epoch_end(epoch, logs)
    given = [str(w.message) for w in caught if w.category is UserWarning]
    assert given == [alarm.message for alarm in guard.alarms]
    return guard.alarms


@pytest.mark.parametrize(
    ("figures", "kind", "after", "says"),
    [
        (POINT, "collapsed", 3, "one point.*spread 1e-05.*for 3 epochs"),
        (LINE, "collapsed", 3, "one line.*1.02 of 8"),
        (STUCK, "collapsed", 3, r"sits at the margin \(0.203\).*99%"),
        ({"norm": 2e4}, "exploded", 1, r"2e\+04"),
        (
            dict.fromkeys(HEALTHY, float("nan")),
            "not_finite",
            1,
            "NaN.*inputs.*one-hot.*float16",
        ),
        (CHANCE, "at_chance", 5, "50.5%"),
        (IDLE, "idle", 10, "are easy"),
        (NONE, "no_triplets", 1, "no batch holds a triplet"),
    ],
)
def test_each_alarm_at_its_time_and_once(figures, kind, after, says):
    alarms = told([{}] + [figures] * (after + 5))
    assert [(alarm.epoch, alarm.kind) for alarm in alarms] == [(after, kind)]
    assert "in this order: " in alarms[0].message
    assert alarms[0].message.startswith(f"Epoch {after + 1}: ")
    assert re.search(says, alarms[0].message)
    # One healthy epoch in between, and the count begins anew.
    if after > 1:
        assert told(([figures] * (after - 1) + [{}]) * 3) == []


@pytest.mark.parametrize(
    "figures",
    [
        {},
        {"spread": 5e-3, "loss": 0.195, "neg_dist": 0.07, "pos_dist": 0.03},
        {"effective_dim": 1.0, "easy": 0.99},  # two classes, separated
        {"hard": 0.5, "pos_dist": 0.8, "neg_dist": 1.0},
        {"loss": 0.2, "hard": 0.5},
        {"active": 2e-4, "easy": 0.9998},
        {"norm": 30.0, "spread": 390.0, "pos_dist": 7.0, "neg_dist": 29.0},
        {"norm": 500.0, "spread": 5.0, "pos_dist": 0.4, "neg_dist": 3.0},  # far off
    ],
)
def test_silent_where_nothing_is_wrong(figures):
    assert told([figures] * 20) == []


def test_a_line_is_all_that_two_dimensions_can_be():
    assert told([LINE] * 5, dim=2) == []


def test_the_soft_loss_is_stuck_at_ln_2():
    soft = TripletLoss(margin=0.2, mining="hard", soft=True)
    at_ln_2 = {**STUCK, "loss": 0.6931}
    assert [a.kind for a in told([at_ln_2] * 3, loss=soft)] == ["collapsed"]
    assert "ln 2" in told([at_ln_2] * 3, loss=soft)[0].message
    assert told([at_ln_2] * 3) == []  # with a hinge that is no special value


def test_collapse_to_zero_without_normalisation():
    tiny = {"norm": 1e-3, "spread": 5e-7, "pos_dist": 1e-3, "neg_dist": 1e-3}
    alarms = told([{**tiny, "loss": 0.2, "hard": 0.5, "easy": 0.0}] * 3)
    assert [alarm.kind for alarm in alarms] == ["collapsed"]


def test_stop():
    guard = CollapseGuard("stop")
    told([POINT] * 3, guard)
    assert guard.model.stop_training
    assert guard.alarms[0].message.endswith("Training stops here.")


def test_reduce_lr_as_often_as_needed():
    guard = CollapseGuard("reduce_lr", factor=0.5)
    alarms = told([POINT] * 7, guard, rate=0.4)
    assert [alarm.epoch for alarm in alarms] == [2, 5]
    assert float(guard.model.optimizer.learning_rate) == pytest.approx(0.1)
    assert "rate is now 0.2." in alarms[0].message
    idle = CollapseGuard("reduce_lr", idle_patience=2)
    assert len(told([IDLE] * 9, idle, rate=0.4)) == 1
    assert float(idle.model.optimizer.learning_rate) == pytest.approx(0.4)


def test_reduce_lr_leaves_a_schedule_alone():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    alarms = told([POINT] * 3, CollapseGuard("reduce_lr"), rate=schedule)
    assert "follows a schedule" in alarms[0].message


def test_prefix():
    assert told([POINT] * 3, CollapseGuard(prefix="a_"))


def test_without_mining_stats_it_says_so_once():
    loss = keras.losses.SparseCategoricalCrossentropy()
    model = tiny_model((3,), 2, unit_length=False, loss=loss)
    x, y = np.ones((8, 3), "float32"), np.arange(8) % 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, y, epochs=3, verbose=0, callbacks=[CollapseGuard()])
    found = [str(w.message) for w in caught if "CollapseGuard" in str(w.message)]
    assert len(found) == 1
    assert "MiningStats()" in found[0]


@pytest.mark.backend
def test_alarms_and_their_remedy_under_fit():
    """From real batches on every backend; the weights hardly move."""
    y = np.arange(12, dtype="int32") % 3
    for x, alarms, rate in (
        (np.ones((12, 3)), [(0, "collapsed"), (1, "collapsed")], 1e-8),
        (
            np.arange(12)[:, None] * np.ones(3),
            [(0, "collapsed"), (1, "collapsed")],
            1e-8,
        ),
        (np.eye(3)[y] * 5000, [(0, "exploded"), (1, "exploded")], 1e-8),
        (np.eye(3)[y], [(1, "idle")], 1e-6),  # every triplet is easy
        (np.random.default_rng(0).normal(size=(12, 3)), [], 1e-6),
    ):
        model = keras.Sequential(
            [keras.Input((3,)), keras.layers.Dense(3, kernel_initializer="identity")]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(1e-6), loss)
        guard = CollapseGuard("reduce_lr", patience=1, idle_patience=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(
                x.astype("float32"),
                y,
                epochs=2,
                verbose=0,
                callbacks=[guard, MiningStats(0.2, "euclidean")],
            )
        assert [(alarm.epoch, alarm.kind) for alarm in guard.alarms] == alarms
        assert float(model.optimizer.learning_rate) == pytest.approx(rate)


def test_weights_that_are_nan_keep_their_learning_rate():
    guard = CollapseGuard("reduce_lr")
    nan = dict.fromkeys(HEALTHY, float("nan"))
    assert [alarm.kind for alarm in told([nan] * 3, guard, rate=0.4)] == ["not_finite"]
    assert float(guard.model.optimizer.learning_rate) == pytest.approx(0.4)


def test_a_warning_shows_no_line_of_the_package():
    model = tiny_model((3,), 2, loss=TripletLoss())
    x, y = np.full((8, 3), np.nan, "float32"), np.arange(8) % 2
    with pytest.warns(UserWarning, match="NaN") as caught:
        model.fit(x, y, verbose=0, callbacks=[CollapseGuard(), MiningStats()])
    files = [w.filename for w in caught if "NaN" in str(w.message)]
    assert files == [__file__] * 2  # of CollapseGuard, and of MiningStats


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"action": "halt"}, ValueError, "action"),
        ({"patience": 0}, ValueError, "patience"),
        ({"chance_patience": 1.5}, TypeError, "chance_patience"),
        ({"idle_patience": 0}, ValueError, "idle_patience"),
        ({"max_norm": -1}, ValueError, "max_norm"),
        ({"factor": 1.0}, ValueError, "factor"),
        ({"prefix": None}, TypeError, "prefix"),
    ],
)
def test_bad_arguments(options, error, says):
    with pytest.raises(error, match=f"`{says}`"):
        CollapseGuard(**options)


# --- real trainings on real images -----------------------------------------------


class Batches(keras.utils.PyDataset):
    """Seven classes of eight digits."""

    def __init__(self, permuted=False, seed=0):
        super().__init__()
        digits = load_digits()
        seen = digits.target < 7
        self.x = (digits.images[seen][..., None] / 16).astype("float32")
        self.y = digits.target[seen].astype("int32")
        self.seed, self.epoch = seed, 0
        if permuted:
            self.y = np.random.default_rng(seed).permutation(self.y)

    def __len__(self):
        return 20

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, self.epoch, i))
        rows = [
            rng.choice(np.flatnonzero(self.y == c), 8, replace=False) for c in range(7)
        ]
        return self.x[np.concatenate(rows)], self.y[np.concatenate(rows)]

    def on_epoch_end(self):
        self.epoch += 1


def train(loss, rate, *, epochs=5, seed=0, permuted=False, normalise=True, guard=None):
    keras.utils.set_random_seed(seed)
    layers = [
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
        keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Flatten(),
        keras.layers.Dense(64, activation="relu"),
        keras.layers.Dense(32),
    ]
    if normalise:
        layers.append(keras.layers.UnitNormalization(dtype="float32"))
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.Adam(rate), loss=loss)
    guard = guard or CollapseGuard()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = model.fit(
            Batches(permuted, seed),
            epochs=epochs,
            verbose=0,
            shuffle=False,
            callbacks=[guard, MiningStats()],
        ).history
    return guard.alarms, history


def test_a_real_collapse():
    """Hard mining from scratch with a large learning rate."""
    guard = CollapseGuard("stop")
    alarms, history = train(
        TripletLoss(margin=0.2, mining="hard"), 0.3, epochs=10, guard=guard
    )
    assert [alarm.kind for alarm in alarms] == ["collapsed"]
    assert len(history["loss"]) < 10
    assert history["loss"][-1] == pytest.approx(0.2, abs=0.01)


@pytest.mark.slow
def test_a_healthy_training_is_left_alone():
    alarms, history = train(TripletLoss(margin=0.2), 1e-3)
    assert alarms == []
    assert history["easy"][-1] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("soft", [False, True])
def test_real_collapses(soft, seed):
    loss = TripletLoss(margin=0.2, mining="hard", soft=soft)
    alarms, _ = train(loss, 0.3, seed=seed)
    assert "collapsed" in [alarm.kind for alarm in alarms]
    alarms, _ = train(loss, 0.1, seed=seed, epochs=8, normalise=False)
    assert {"collapsed", "exploded"} & {alarm.kind for alarm in alarms}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_permuted_labels_are_told_from_true_ones(seed):
    loss = TripletLoss(margin=0.2)
    alarms, _ = train(loss, 1e-3, seed=seed, permuted=True, epochs=10)
    assert [alarm.kind for alarm in alarms] == ["at_chance"]
    for rate in (1e-3, 1e-4, 1e-5):
        assert train(loss, rate, seed=seed, epochs=10)[0] == []


@pytest.mark.slow
@pytest.mark.parametrize("mining", ["semi_hard", "hard", "all"])
@pytest.mark.parametrize("rate", [1e-3, 1e-4])
def test_healthy_trainings(mining, rate):
    assert train(TripletLoss(margin=0.2, mining=mining), rate, epochs=10)[0] == []


@pytest.mark.slow
@pytest.mark.skipif(
    not OMNIGLOT.is_dir(), reason="needs Omniglot beside the repository"
)
@pytest.mark.parametrize(
    ("mining", "rate", "permuted"),
    [
        ("semi_hard", 1e-3, False),
        ("semi_hard", 1e-4, False),
        ("hard", 1e-3, False),
        ("semi_hard", 1e-3, True),
    ],
)
def test_omniglot(mining, rate, permuted):
    """136 classes of 20 drawings, 32 x 4 a batch."""
    image = pytest.importorskip("PIL.Image")
    x, y = [], []
    with zipfile.ZipFile(OMNIGLOT / "images_background_small1.zip") as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".png"):
                drawing = image.open(io.BytesIO(archive.read(name))).convert("L")
                x.append(1 - np.float32(drawing.resize((28, 28), image.BOX)) / 255)
                y.append(name.rpartition("/")[0])
    if permuted:
        y = np.random.default_rng(0).permutation(y)
    keras.utils.set_random_seed(0)
    layers = [keras.Input((28, 28, 1))]
    for _ in range(3):
        layers += [
            keras.layers.Conv2D(32, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(padding="same"),
        ]
    layers += [keras.layers.Flatten(), keras.layers.Dense(64)]
    layers += [keras.layers.UnitNormalization(dtype="float32")]
    model = keras.Sequential(layers)
    loss = TripletLoss(margin=0.2, mining=mining)
    model.compile(keras.optimizers.Adam(rate), loss)
    x = np.stack(x)[..., None]
    train = PKSampler(x, y, classes_per_batch=32, samples_per_class=4, seed=0)
    guard = CollapseGuard()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(
            train, epochs=10, verbose=0, shuffle=False, callbacks=[guard, MiningStats()]
        )
    kinds = [alarm.kind for alarm in guard.alarms]
    assert kinds == (["at_chance"] if permuted else [])
