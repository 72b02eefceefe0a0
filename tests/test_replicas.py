"""Several devices against one: the same weights and the same census.

Every strategy runs in a process of its own, this file as a script: logical devices
are made once per process, and a collective that fails leaves nothing to go on with.
"""

import contextlib
import json
import pathlib
import sys

import keras
import numpy as np
import pytest
from harness import BACKEND, run_script, tensorflow_only

import kerastrip
from kerastrip import metrics

on_jax = pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution")

STEPS, CLASSES, EACH = 10, 8, 2
LOSSES = {
    "semi_hard": ("TripletLoss", {}),
    "semi_hard_or_hard": ("TripletLoss", {"mining": "semi_hard_or_hard"}),
    "hard": ("TripletLoss", {"mining": "hard"}),
    "all": ("TripletLoss", {"mining": "all"}),
    "active": ("TripletLoss", {"average_over": "active"}),
    "hard active": ("TripletLoss", {"mining": "hard", "average_over": "active"}),
    "all active": ("TripletLoss", {"mining": "all", "average_over": "active"}),
    "soft cosine": ("TripletLoss", {"soft": True, "distance": "cosine"}),
    "TFA semi-hard": ("TripletSemiHardLoss", {}),
    "TFA hard": ("TripletHardLoss", {}),
    "contrastive": ("ContrastiveLoss", {"average_over": "active"}),
}


def trained(name, gather, scope=contextlib.nullcontext, quick=False):
    """After ten steps with a loss: weights and logs."""
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 12
    centres = rng.normal(size=(12, 6))
    x = (centres[labels] + rng.normal(size=(96, 6))).astype("float32")
    train = kerastrip.PKSampler(
        x,
        labels,
        classes_per_batch=CLASSES,
        samples_per_class=EACH,
        batches_per_epoch=STEPS // 2,
        seed=1,
    )
    keras.utils.set_random_seed(0)
    loss, options = LOSSES[name]
    with scope():
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(8, activation="tanh"),
                keras.layers.Dense(4),
                keras.layers.UnitNormalization(dtype="float32"),
            ]
        )
        model.compile(
            # With 0.5 "hard" carries a rounding of the first weights to 5e-5.
            keras.optimizers.SGD(0.1),
            getattr(kerastrip, loss)(**options, gather=gather),
        )
    callbacks = [kerastrip.EpochSync(train), kerastrip.MiningStats(margin=0.2)]
    history = model.fit(
        train,
        validation_data=None if quick else (x[:16], labels[:16].astype("int32")),
        epochs=2,
        shuffle=False,
        callbacks=callbacks,
        verbose=0,
    ).history
    weights = np.concatenate([np.ravel(w) for w in model.trainable_weights])
    logs = {key: values[-1] for key, values in history.items()}
    return weights.tolist(), logs


def mirrored(devices):
    """The scope of a MirroredStrategy over logical CPU devices."""
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * devices,
    )
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(devices)]).scope


@contextlib.contextmanager
def data_parallel():
    """All devices that JAX sees."""
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    yield
    # fit, which comes after, runs under it as well


def main(devices, *names, quick=False):
    """Prints, for every loss, one device, several that gather, several that do not."""
    scope = mirrored(int(devices)) if BACKEND == "tensorflow" else data_parallel
    alone = [trained(name, True, quick=quick) for name in names]
    for name, single in zip(names, alone, strict=True):
        results = [single, trained(name, True, scope, quick)]
        if not quick:
            results.append(trained(name, False, scope))
        sys.stdout.write(f"{json.dumps(results)}\n")


def run(devices, names, timeout=1500):
    flags = f"--xla_force_host_platform_device_count={devices}"
    script, arguments = pathlib.Path(__file__), (devices, *names)
    done = run_script(script, *arguments, env={"XLA_FLAGS": flags}, timeout=timeout)
    return dict(zip(names, printed(done), strict=True))


def printed(done):
    """What `main` printed in a process that ended."""
    return [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "["]


def difference(a, b):
    """Relative difference of two lists of weights."""
    return np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b)


def assert_same(found, single):
    """Weights and figures of several devices against those of one."""
    weights, logs = found
    assert difference(weights, single[0]) < 1e-5
    assert {"loss", *metrics.KEYS} <= set(logs) == set(single[1])
    for key, value in single[1].items():
        assert logs[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@tensorflow_only
@pytest.mark.slow
def test_two_replicas_that_gather_train_as_one_device(run_fork):
    script = "import test_replicas; test_replicas.main(2, 'active', quick=True)"
    [(single, gathered)] = printed(run_fork(script))
    assert_same(gathered, single)


@tensorflow_only
@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_every_loss_gathers(devices, record_property):
    for name, (single, gathered, *apart) in run(devices, list(LOSSES)).items():
        record_property(name, difference(gathered[0], single[0]))
        assert_same(gathered, single)
        for weights, logs in apart:
            assert difference(weights, single[0]) > 1e-3, name
            # Without gather every replica has whole classes.
            assert logs["anchors_without_positive"] == 0


@on_jax
@pytest.mark.slow
@pytest.mark.backend
@pytest.mark.parametrize("devices", [2, 4])
def test_data_parallel_trains_as_one_device(devices, record_property):
    """On JAX a loss sees the whole batch, whatever `gather` says."""
    for name, (single, gathered, plain) in run(devices, list(LOSSES)).items():
        record_property(name, difference(gathered[0], single[0]))
        assert_same(gathered, single)
        assert_same(plain, single)


if __name__ == "__main__":
    main(*sys.argv[1:])
