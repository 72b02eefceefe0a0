"""EpochSync: the epoch of `fit`, replicas, and training that was killed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import types

import keras
import numpy as np
import pytest

from kerastrip.callbacks import EpochSync
from kerastrip.sampler import PKSampler

LABELS = np.repeat(np.arange(6), 6)
SHAPE = {"classes_per_batch": 4, "samples_per_class": 2, "batches_per_epoch": 5}
MODES = {
    "0": {"workers": 0},
    "1": {"workers": 1},
    "2": {"workers": 2},
    "processes": {"workers": 2, "use_multiprocessing": True},
}


def sampler(**arguments):
    x = np.random.default_rng(0).random((36, 3), "float32")
    return PKSampler(x, LABELS, **SHAPE, augment=jitter, **arguments)


def jitter(row, rng):
    return row + rng.random(row.shape, "float32")


@pytest.mark.backend
def test_every_sampler_follows():
    one, two = sampler(), sampler(seed=1)
    sync = EpochSync(one, two)
    for epoch in (4, 0, 9):
        sync.on_epoch_begin(epoch)
        assert one.epoch == two.epoch == epoch


@pytest.mark.backend
@pytest.mark.parametrize(
    ("samplers", "error", "words"),
    [
        ((), TypeError, "at least one sampler"),
        ((np.zeros(3),), TypeError, "set_epoch"),
        ((sampler(fixed=True),), ValueError, "fixed=True.*leave it out"),
    ],
)
def test_what_cannot_follow(samplers, error, words):
    with pytest.raises(error, match=words):
        EpochSync(*samplers)


@pytest.mark.backend
def test_replicas_are_checked_when_training_begins():
    for replicas in (1, 2, 4, 3):
        strategy = types.SimpleNamespace(num_replicas_in_sync=replicas)
        sync = EpochSync(sampler())
        sync.set_model(types.SimpleNamespace(distribute_strategy=strategy))
        if replicas != 3:
            sync.on_train_begin()
        else:
            with pytest.raises(ValueError, match=r"3 replicas.*received 4.*=3"):
                sync.on_train_begin()
    model = keras.Sequential([keras.layers.Dense(6)])
    model.compile(loss="sparse_categorical_crossentropy")
    model.fit(sampler(), callbacks=[EpochSync(sampler())], shuffle=False, verbose=0)


def run(arguments, timeout=240):
    root = pathlib.Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


EPOCHS, KILLED_IN = 4, 2


def main(mode, folder, kill):
    """Trains, noting each batch; with `kill` it ends in the middle of an epoch."""

    class Model(keras.Model):
        def train_step(self, data):
            with open(folder / "log", "a") as log:
                log.write(json.dumps([part.numpy().tolist() for part in data]) + "\n")
            return super().train_step(data)

    class Kill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

        def on_train_batch_end(self, batch, logs=None):
            if kill and (self.epoch, batch) == (KILLED_IN, 2):
                os.kill(os.getpid(), signal.SIGKILL)

    train = sampler(**MODES[mode])
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    model = Model(inputs, keras.layers.Dense(6, activation="softmax")(inputs))
    model.compile("adam", "sparse_categorical_crossentropy", run_eagerly=True)
    backup = keras.callbacks.BackupAndRestore(folder / "backup", save_freq="epoch")
    model.fit(
        train,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=[EpochSync(train), backup, Kill()],
    )


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="one backend will do"
)
@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(mode, marks=() if mode == "processes" else pytest.mark.slow)
        for mode in MODES
    ],
)
def test_a_killed_training_goes_on_with_the_same_batches(tmp_path, mode):
    killed = run([mode, tmp_path, "kill"])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = (tmp_path / "log").read_text().splitlines()
    assert len(before) == KILLED_IN * 5 + 3
    resumed = run([mode, tmp_path, ""])
    assert resumed.returncode == 0, resumed.stderr
    after = (tmp_path / "log").read_text().splitlines()[len(before) :]
    assert len(after) == (EPOCHS - KILLED_IN) * 5
    train = sampler()
    for lines, first in ((before, 0), (after, KILLED_IN)):
        for index, line in enumerate(lines):
            x, y = train.batch(index % 5, first + index // 5)
            seen_x, seen_y = json.loads(line)
            np.testing.assert_array_equal(np.float32(seen_x), x)
            assert seen_y == y.tolist()


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]), bool(sys.argv[3]))
