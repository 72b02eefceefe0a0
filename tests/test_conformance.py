"""What every public loss, metric, callback and layer must do, whatever it computes.

The tables below hold one entry per public class. A new class without an entry fails
`test_every_public_class_has_an_entry`; a new argument that no entry sets to something
else than its default fails `test_every_argument_is_exercised`.
"""

import inspect
import itertools
import json
import operator
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest
from harness import BACKEND

import kerastrip

pytestmark = pytest.mark.backend

ROWS, CLASSES = 12, 3
LABELS = np.arange(ROWS) % CLASSES


@dataclass(frozen=True)
class Trained:
    """How to try a loss or a metric.

    Attributes:
        head: "logits" (batch, CLASSES) or "embedding" (batch, 4), unit length.
        targets: "label", "one_hot" or "multi_hot".
        settings: arguments, none at its default; the first ones are used in `fit`.
    """

    head: str
    targets: str
    settings: tuple[dict[str, Any], ...]


FOCAL = {
    "gamma": 0.5,
    "alpha": [0.2, 0.5, 0.3],
    "from_logits": True,
    "label_smoothing": 0.1,
}
LOSSES = {
    "BinaryFocalLoss": Trained("logits", "multi_hot", (FOCAL,)),
    "CategoricalFocalLoss": Trained("logits", "one_hot", (FOCAL,)),
    "SparseCategoricalFocalLoss": Trained(
        "logits", "label", ({**FOCAL, "ignore_class": 2},)
    ),
    "TripletLoss": Trained(
        "embedding",
        "label",
        (
            {"margin": 0.3, "mining": "hard", "distance": "cosine"},
            {"average_over": "active", "gather": True},
            {"soft": True},
        ),
    ),
    "ContrastiveLoss": Trained(
        "embedding",
        "label",
        (
            {
                "positive_margin": 0.1,
                "negative_margin": 0.8,
                "distance": "cosine",
                "average_over": "active",
                "gather": True,
            },
        ),
    ),
    "TripletSemiHardLoss": Trained(
        "embedding",
        "label",
        (
            {
                "margin": 0.5,
                "distance_metric": "squared-L2",
                "mining": "hard",
                "gather": True,
            },
        ),
    ),
    "TripletHardLoss": Trained(
        "embedding",
        "label",
        (
            {"margin": 0.5, "distance_metric": "angular", "gather": True},
            {"soft": True, "mining": "semi_hard"},
        ),
    ),
}
# Every function that can be given to `compile`, and the loss that computes the same.
FUNCTIONS = {
    "binary_focal_loss": ("BinaryFocalLoss", {}),
    "categorical_focal_loss": ("CategoricalFocalLoss", {}),
    "sparse_categorical_focal_loss": ("SparseCategoricalFocalLoss", {}),
    "triplet_semihard_loss": ("TripletSemiHardLoss", {}),
    "triplet_hard_loss": ("TripletHardLoss", {}),
    "mining.triplet_losses": ("TripletLoss", {}),
    "mining.contrastive_losses": ("ContrastiveLoss", {}),
}
METRICS = {
    "TripletCensus": Trained(
        "embedding",
        "label",
        ({"margin": 0.4, "distance": "cosine", "prefix": "emb_", "gather": True},),
    ),
}


@dataclass(frozen=True)
class Called:
    """How to try a callback.

    Attributes:
        build: makes it, and what it needs beside it, from a sampler and held-out
            data x, y.
        keys: what it must have put into the history.
        triplet: whether it needs a triplet loss, which takes longer to trace.
    """

    build: Callable[..., list[keras.callbacks.Callback]]
    keys: tuple[str, ...] = ()
    triplet: bool = False


CALLBACKS = {
    "CollapseGuard": Called(
        lambda sampler, x, y: [kerastrip.CollapseGuard(), kerastrip.MiningStats()],
        triplet=True,
    ),
    "EmbeddingProjector": Called(
        lambda sampler, x, y: [kerastrip.EmbeddingProjector(tempfile.mkdtemp(), x, y)]
    ),
    "EpochSync": Called(lambda sampler, x, y: [kerastrip.EpochSync(sampler)]),
    "MarginSchedule": Called(
        lambda sampler, x, y: [kerastrip.MarginSchedule({0: 0.3, 1: 0.2})],
        ("margin",),
        triplet=True,
    ),
    "MiningSchedule": Called(
        lambda sampler, x, y: [kerastrip.MiningSchedule({0: "all", 1: "hard"})],
        ("mining_stage",),
        triplet=True,
    ),
    "MiningStats": Called(
        lambda sampler, x, y: [kerastrip.MiningStats()],
        ("easy", "semi_hard", "hard", "val_easy", "val_semi_hard", "val_hard"),
        triplet=True,
    ),
    "RetrievalEvaluation": Called(
        lambda sampler, x, y: [kerastrip.RetrievalEvaluation(x, y)],
        ("val_recall@1", "val_map@r"),
    ),
    "TrainingReport": Called(
        lambda sampler, x, y: [
            kerastrip.TrainingReport(f"{tempfile.mkdtemp()}/report.html", x, y)
        ]
    ),
    "VerificationEvaluation": Called(
        lambda sampler, x, y: [kerastrip.VerificationEvaluation(x, y)],
        ("val_auc", "val_eer"),
    ),
}

TABLES = {
    keras.losses.Loss: LOSSES,
    keras.metrics.Metric: METRICS,
    keras.callbacks.Callback: CALLBACKS,
}
# The arguments that Keras gives to every loss and every metric.
SHARED = {
    keras.losses.Loss: {"name": "mine", "reduction": "sum", "dtype": "bfloat16"},
    keras.metrics.Metric: {"name": "mine", "dtype": "bfloat16"},
}
SERIALISABLE = [
    pytest.param(kind, name, case, id=name)
    for kind in SHARED
    for name, case in TABLES[kind].items()
]
# (dtype policy, jit_compile). JAX compiles by itself; PyTorch would take minutes.
MODES = [("mixed_bfloat16", "auto")]
if BACKEND == "tensorflow":
    MODES.append(("float32", True))
each_loss = pytest.mark.parametrize("name", LOSSES)
each_mode = pytest.mark.parametrize(("policy", "jit"), MODES)


@pytest.fixture
def set_policy():
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


def arguments(cls):
    """The parameters of a constructor, by name."""
    parameters = dict(inspect.signature(cls.__init__).parameters)
    del parameters["self"]
    return parameters


def targets_of(word, labels):
    if word == "label":
        return labels.astype("int32")
    rows = np.eye(CLASSES, dtype="float32")[labels]
    return rows if word == "one_hot" else np.maximum(rows, rows[::-1])


def data(case):
    """Inputs around one centre per class, and the targets of a case."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(CLASSES, 6))[LABELS] + 0.5 * rng.normal(size=(ROWS, 6))
    return x.astype("float32"), targets_of(case.targets, LABELS)


def network(head):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh")(inputs)
    if head == "logits":
        return keras.Model(inputs, keras.layers.Dense(CLASSES, name=head)(x))
    x = keras.layers.Dense(4)(x)
    x = keras.layers.UnitNormalization(dtype="float32", name=head)(x)
    return keras.Model(inputs, x)


def make(name, settings):
    return getattr(kerastrip, name)(**settings)


def cheap_loss():
    """A loss of an embedding that takes little time to trace."""
    return kerastrip.SparseCategoricalFocalLoss(from_logits=True)


def weights_of(model):
    return [np.array(weight) for weight in model.get_weights()]


def assert_trained(before, after):
    """Every weight is finite, and every matrix has moved."""
    for old, new in zip(before, after, strict=True):
        assert np.isfinite(new).all()
        assert new.ndim < 2 or np.abs(new - old).max() > 0


# The tables


@pytest.mark.parametrize("kind", TABLES, ids=lambda kind: kind.__name__)
def test_every_public_class_has_an_entry(kind):
    public = {name: getattr(kerastrip, name) for name in kerastrip.__all__}
    classes = {
        name
        for name, value in public.items()
        if isinstance(value, type) and issubclass(value, kind)
    }
    assert classes == set(TABLES[kind])


@pytest.mark.parametrize(("kind", "name", "case"), SERIALISABLE)
def test_every_argument_is_exercised(kind, name, case):
    parameters = arguments(getattr(kerastrip, name))
    given = [*case.settings, SHARED[kind]]
    used = {word for settings in given for word in settings}
    assert used == set(parameters)
    for settings in given:
        for word, value in settings.items():
            assert value != parameters[word].default, word


# Configuration


@pytest.mark.parametrize(("kind", "name", "case"), SERIALISABLE)
def test_config_round_trip(kind, name, case):
    cls = getattr(kerastrip, name)
    for settings in (*case.settings, SHARED[kind]):
        original = cls(**settings)
        config = json.loads(json.dumps(original.get_config()))
        assert set(config) == set(arguments(cls))
        assert {word: config[word] for word in settings} == settings
        clone = cls.from_config(config)
        assert clone.get_config() == original.get_config()
        for word in config:
            assert getattr(clone, word) == getattr(original, word), word


@pytest.mark.parametrize(("kind", "name", "case"), SERIALISABLE)
def test_keras_serialises_it_under_the_name_of_the_package(kind, name, case):
    module = keras.losses if kind is keras.losses.Loss else keras.metrics
    original = make(name, case.settings[0])
    packed = json.loads(json.dumps(module.serialize(original)))
    assert packed["registered_name"] == f"kerastrip>{name}"
    revived = module.deserialize(packed)
    assert type(revived) is type(original)
    assert revived.get_config() == original.get_config()


@pytest.mark.parametrize(("kind", "name", "case"), SERIALISABLE)
def test_a_saved_model_loads_without_custom_objects(kind, name, case, tmp_path):
    x, y = data(case)
    model = network(case.head)
    subject = make(name, case.settings[0])
    if kind is keras.losses.Loss:
        model.compile("sgd", loss=subject, run_eagerly=True)
    else:
        model.compile("sgd", cheap_loss(), metrics=[subject], run_eagerly=True)
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    model.save(tmp_path / "model.keras")

    loaded = keras.models.load_model(tmp_path / "model.keras")
    found = loaded.evaluate(x, y, verbose=0, return_dict=True)
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-5, atol=1e-7)
    if kind is keras.losses.Loss:
        assert loaded.loss.get_config() == subject.get_config()
    else:
        # Only the metric under test can tell its margin and distance by these keys.
        assert any(key.startswith(case.settings[0]["prefix"]) for key in found)


# Losses


@each_loss
def test_a_loss_has_one_float32_value_per_row(name):
    case = LOSSES[name]
    _, y = data(case)
    width = CLASSES if case.head == "logits" else 4
    y_pred = np.random.default_rng(1).normal(size=(ROWS, width)).astype("float32")
    y_pred = keras.ops.cast(y_pred, "bfloat16")  # as from a mixed-precision layer
    settings = case.settings[0]
    values = make(name, {**settings, "reduction": None})(y, y_pred)
    assert tuple(values.shape) == (ROWS,)
    assert keras.backend.standardize_dtype(values.dtype) == "float32"
    values = keras.ops.convert_to_numpy(values)
    assert np.isfinite(values).all()
    assert (values >= 0).all()
    assert values.max() > 0
    total = float(make(name, {**settings, "reduction": "sum"})(y, y_pred))
    np.testing.assert_allclose(total, values.sum(), rtol=1e-5)


@each_mode
@each_loss
def test_fit_with_a_loss(name, policy, jit, set_policy):
    set_policy(policy)
    case = LOSSES[name]
    x, y = data(case)
    model = network(case.head)
    model.compile(
        keras.optimizers.SGD(0.1), make(name, case.settings[0]), jit_compile=jit
    )
    before = weights_of(model)
    history = model.fit(x, y, batch_size=ROWS, epochs=2, shuffle=False, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert_trained(before, weights_of(model))


@each_loss
def test_gradient_is_finite_for_hostile_batches(name):
    case = LOSSES[name]
    width = CLASSES if case.head == "logits" else 4
    every_rows = {
        "equal": np.ones((ROWS, width)),
        "zero": np.zeros((ROWS, width)),
        "huge": 1e4 * np.random.default_rng(2).normal(size=(ROWS, width)),
    }
    every_labels = {
        "of one class": np.zeros(ROWS, int),
        "all different": np.arange(ROWS),
        "in pairs": np.arange(ROWS) // 2,
    }
    # The predictions are the weights: what a step of SGD takes off is the gradient.
    model = keras.Sequential(
        [keras.Input((ROWS,)), keras.layers.Dense(width, use_bias=False)]
    )
    x = np.eye(ROWS, dtype="float32")
    for settings in case.settings:
        loss = make(name, {**settings, "reduction": "sum"})
        eager = keras.config.backend() != "jax"  # which would compile every operation
        model.compile(keras.optimizers.SGD(1e-3), loss, run_eagerly=eager)
        for (rows, kernel), (labels, codes) in itertools.product(
            every_rows.items(), every_labels.items()
        ):
            if case.head == "logits":
                codes = codes % CLASSES
            model.set_weights([kernel.astype("float32")])
            value = model.train_on_batch(x, targets_of(case.targets, codes))
            told = f"{settings}, rows {rows}, labels {labels}"
            assert np.isfinite(value).all(), told
            assert np.isfinite(model.get_weights()[0]).all(), told


def ways_to_compile(function, loss):
    """A function as Keras' users give it: alone, in a function, in a Loss; its loss."""

    class Mine(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return function(y_true, y_pred)

    class Around(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return loss(y_true, y_pred)

    return {
        "alone": function,
        "in a function": lambda y, x: keras.ops.mean(function(y, x)),
        "in a loss": Mine(),
        "the loss in a function": lambda y, x: loss(y, x),
        "the loss in a loss": Around(),
    }


@pytest.mark.parametrize("column", [False, True], ids=["vector", "column"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_trains_as_the_loss_does(name, column):
    loss, settings = FUNCTIONS[name]
    case, loss = LOSSES[loss], make(loss, settings)
    x, y = data(case)
    if column and case.targets != "label":
        pytest.skip("only labels have two shapes")
    y = y[:, None] if column else y
    function = operator.attrgetter(name)(kerastrip)
    head = network(case.head)
    if case.head == "logits":
        head = keras.Sequential([head, keras.layers.Activation("sigmoid")])
    start = head.get_weights()
    expected = float(loss(y, head(x)))
    assert expected > 0
    for way, given in ways_to_compile(function, loss).items():
        head.set_weights(start)
        # One traced step is enough: compiling takes long.
        compiled = BACKEND == "jax" or (BACKEND == "tensorflow" and way == "alone")
        head.compile(keras.optimizers.SGD(0.1), given, run_eagerly=not compiled)
        found = head.train_on_batch(x, y)
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=way)
        assert_trained(start, weights_of(head))


def test_a_model_with_functions_tells_their_settings_and_is_saved(tmp_path):
    inputs = keras.Input((4,))
    p = keras.layers.Dense(CLASSES, activation="softmax")(inputs)
    e = keras.layers.UnitNormalization(dtype="float32", name="e")(inputs)
    model = keras.Model(inputs, [p, e])
    losses = [kerastrip.sparse_categorical_focal_loss, kerastrip.triplet_hard_loss]
    model.compile("sgd", loss=losses)
    x, y = np.eye(4, dtype="float32")[[0, 1, 2, 3] * 4], np.repeat([0, 1], 8)
    stats = kerastrip.MiningStats()
    evaluation = kerastrip.RetrievalEvaluation(x, y)
    logs = model.fit(x, [y, y], verbose=0, callbacks=[stats, evaluation]).history
    assert {"easy", "val_recall@1"} <= logs.keys()
    assert (stats.census.margin, stats.census.distance) == (1.0, "euclidean")
    schedule = kerastrip.MarginSchedule({0: 0.5})
    with pytest.raises(ValueError, match="whose loss has a `margin`"):
        model.fit(x, [y, y], verbose=0, callbacks=[schedule])
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.evaluate(x, [y, y], verbose=0) == model.evaluate(x, [y, y], verbose=0)


def test_every_loss_has_a_function():
    named = {loss for loss, _ in FUNCTIONS.values()}
    assert named == set(LOSSES)


@pytest.mark.parametrize("name", ["TripletLoss", "ContrastiveLoss", "TripletHardLoss"])
def test_labels_that_are_none_end_in_an_error_or_in_nan(name):
    """In a compiled step NaN, and the weights stay as they are."""
    x, _ = data(LOSSES[name])
    model = network("embedding")
    before = weights_of(model)
    model.compile(keras.optimizers.SGD(0.1), make(name, {}))
    several = np.ones((ROWS, CLASSES), "int32")
    several[0, 0] = 0
    if keras.config.backend() == "torch":
        with pytest.raises(ValueError, match="one class a row"):
            model.train_on_batch(x, several)
    else:
        assert np.isnan(model.train_on_batch(x, several))
    for old, new in zip(before, weights_of(model), strict=True):
        np.testing.assert_array_equal(old, new)


# Metrics


@each_mode
@pytest.mark.parametrize("name", METRICS)
def test_fit_with_a_metric(name, policy, jit, set_policy):
    set_policy(policy)
    case = METRICS[name]
    x, y = data(case)
    model = network(case.head)
    metric = make(name, case.settings[0])
    model.compile("sgd", cheap_loss(), metrics=[metric], jit_compile=jit)
    history = model.fit(x, y, epochs=2, verbose=0).history
    result = metric.result()
    keys = list(result) if isinstance(result, dict) else [metric.name]
    for key in keys:
        assert np.isfinite(history[key]).all()
    assert any(np.any(history[key]) for key in keys)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_forgets_when_it_is_reset(name):
    case = METRICS[name]
    _, y = data(case)
    y_pred = np.random.default_rng(1).normal(size=(ROWS, 4)).astype("float32")
    metric = make(name, case.settings[0])
    results = []
    for rows in (y_pred, -3 * y_pred, y_pred):
        metric.reset_state()
        metric.update_state(y, rows)
        results.append({key: float(v) for key, v in metric.result().items()})
    assert results[0] == results[2] != results[1]


# Callbacks


@pytest.mark.parametrize("name", CALLBACKS)
def test_fit_twice_with_a_callback(name, set_policy, tmp_path):
    case = CALLBACKS[name]
    set_policy("mixed_bfloat16")
    x, y = data(LOSSES["TripletLoss"])
    train = kerastrip.PKSampler(x, y, classes_per_batch=3, samples_per_class=2)
    callbacks, keys = case.build(train, x, y), case.keys
    model = network("embedding")
    model.compile("sgd", kerastrip.TripletLoss() if case.triplet else cheap_loss())
    validation = (x, y) if any(key.startswith("val_") for key in keys) else None
    for epochs in (2, 1):  # the same objects serve two runs
        history = model.fit(
            train,
            validation_data=validation,
            epochs=epochs,
            shuffle=False,
            callbacks=callbacks,
            verbose=0,
        ).history
        assert {"loss", *keys} <= set(history)
        for key in keys:
            assert len(history[key]) == epochs
            assert np.isfinite(history[key]).all()

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        loaded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-5
    )
