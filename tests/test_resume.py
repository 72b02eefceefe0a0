"""A training that was killed ends with the weights of the one that was not."""

import json
import os
import shutil
import signal

import keras
import numpy as np
import pytest
from harness import tensorflow_only

from kerastrip import PKSampler, SparseCategoricalFocalLoss, TripletLoss
from kerastrip.callbacks import EpochSync, MiningStats

pytestmark = tensorflow_only  # one backend will do
EPOCHS, STEPS = 4, 5
WORKERS = {
    "0": {"workers": 0},
    "1": {"workers": 1},
    "2": {"workers": 2},
    "processes": {"workers": 2, "use_multiprocessing": True},
}


# -- the training, in a process of its own ----------------------------------------


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(keras.callbacks.Callback):
    """Ends the process after a batch, (epoch, step), or at "the end"."""

    def __init__(self, at):
        super().__init__()
        self.at, self.epoch = at, None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if [self.epoch, batch] == self.at:
            kill()

    def on_train_end(self, logs=None):
        if self.at == "the end":
            kill()


class Fragile(keras.layers.Layer):
    """An identity whose weights are saved `intact` times; then the process ends."""

    intact = None

    def build(self, _):
        self.weight = self.add_weight(shape=(4,))

    def call(self, x):
        return x

    def save_own_variables(self, store):
        if self.intact == 0:
            kill()
        super().save_own_variables(store)
        if self.intact:
            self.intact -= 1


def delete_half(backup):
    os.remove(os.path.join(backup, "training_metadata.json"))
    kill()


def kill_while_saving(model, part, intact):
    """Ends the process in a part of a backup, after `intact` whole ones."""
    if part == "weights":
        model.get_layer("fragile").intact = intact
        return
    if part == "deletion":
        shutil.rmtree = delete_half
        return
    if part == "between":
        owner, name = model, "save_weights"
    else:
        owner, name = json, "dumps"  # the file is open, and empty
    original, calls = getattr(owner, name), []

    def function(*arguments, **options):
        calls.append(None)
        last = len(calls) > intact
        if last and part == "metadata":
            kill()
        result = original(*arguments, **options)
        if last:
            kill()
        return result

    setattr(owner, name, function)


def jitter(row, rng):
    return row + rng.random(row.shape, "float32")


def build_model():
    layers = keras.layers
    x = inputs = keras.Input((16,))
    for size in (32, 16):
        x = layers.Dense(size, use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    x = Fragile(name="fragile")(layers.Dropout(0.2)(x))
    embedding = layers.UnitNormalization(name="embedding")(layers.Dense(8)(x))
    return keras.Model(inputs, [layers.Dense(8, name="logits")(x), embedding])


def train(folder, out, workers="0", at=None, part=None, **options):
    """One training; `out` receives weights, optimizer and history.

    With `at` it is killed after that (epoch, step), with `part` in that part of the
    backup at the end of epoch 2. `options` are those of the backup.
    """
    import tensorflow as tf

    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    tf.config.experimental.enable_op_determinism()
    labels = np.repeat(np.arange(8), 12)
    x = np.random.default_rng(0).random((96, 16), "float32") + np.eye(8, 16)[labels]
    sampler = PKSampler(
        x.astype("float32"),
        labels,
        classes_per_batch=4,
        samples_per_class=4,
        batches_per_epoch=STEPS,
        targets=("label", "label"),
        augment=jitter,
        **WORKERS[workers],
    )
    model = build_model()
    model.compile(
        "adam", loss=[SparseCategoricalFocalLoss(from_logits=True), TripletLoss()]
    )
    if part:
        kill_while_saving(model, part, intact=2)
    backup = keras.callbacks.BackupAndRestore(
        os.path.join(folder, "backup"), save_freq="epoch", **options
    )
    history = model.fit(
        sampler,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=[EpochSync(sampler), MiningStats(), backup]
        + ([KillAt(at)] if at else []),
    ).history
    variables = [*model.variables, *model.optimizer.variables]
    arrays = {f"{i} {v.path}": np.asarray(v) for i, v in enumerate(variables)}
    np.savez(out, **arrays, **{f"history {key}": v for key, v in history.items()})
    sampler.close()


# -- the tests --------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(run_fork):
    """A function: trainings one after the other in one new process."""

    def run(*trainings, exit_code=0):
        script = f"""
import json, test_resume
for each in json.loads({json.dumps(trainings)!r}):
    test_resume.train(**each)
"""
        return run_fork(script, exit_code=exit_code)

    return run


def killed(run, folder, **options):
    training = {"folder": str(folder), "out": str(folder / "killed.npz"), **options}
    run(training, exit_code=-signal.SIGKILL)


def finished(run, folder, **options):
    """The results of a training that is not killed, or goes on after it was."""
    out = folder / "finished.npz"
    process = run({"folder": str(folder), "out": str(out), **options})
    return dict(np.load(out)), process.stderr


def assert_same(results, whole):
    """Bit for bit; the history as far as it goes back."""
    assert list(results) == list(whole)
    for name, value in results.items():
        wanted = whole[name]
        if name.startswith("history"):
            wanted = wanted[-len(value) :]
        np.testing.assert_array_equal(value, wanted, name)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """What a training that nobody killed ends with."""
    results, _ = finished(run, tmp_path_factory.mktemp("whole"))
    assert len(results["history loss"]) == EPOCHS
    return results


def test_a_killed_training_ends_with_the_same_weights(run, tmp_path):
    killed(run, tmp_path, workers="processes", at=(2, 3))
    outs = tmp_path / "resumed.npz", tmp_path / "whole.npz"
    process = run(
        {"folder": str(tmp_path), "out": str(outs[0]), "workers": "processes"},
        {"folder": str(tmp_path / "whole"), "out": str(outs[1])},
    )
    resumed, whole = (dict(np.load(out)) for out in outs)
    assert len(resumed["history loss"]) == EPOCHS - 2
    assert len(whole["history loss"]) == EPOCHS
    assert_same(resumed, whole)
    assert "restored weights" not in process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_ten_kills_at_random_steps(run, tmp_path, whole, number):
    rng = np.random.default_rng(number)
    at = int(rng.integers(EPOCHS)), int(rng.integers(STEPS))
    workers = list(WORKERS)[number % len(WORKERS)]
    killed(run, tmp_path, workers=workers, at=at)
    results, _ = finished(run, tmp_path, workers=workers)
    assert len(results["history loss"]) == EPOCHS - at[0]
    assert_same(results, whole)


@pytest.mark.slow
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("part", ["weights", "between", "metadata"])
def test_a_kill_while_the_backup_is_written(run, tmp_path, whole, part, double):
    options = {"double_checkpoint": double}
    killed(run, tmp_path, part=part, **options)
    backup = tmp_path / "backup"
    assert len(list(backup.iterdir())) == (4 if double else 2)
    if part == "weights" and double:  # Keras takes the backup before by itself
        assert_same(finished(run, tmp_path, **options)[0], whole)
        return
    training = {"folder": str(tmp_path), "out": str(tmp_path / "out"), **options}
    process = run(training, exit_code=0 if part == "between" else 1)
    if part == "between":  # nothing that Keras could see
        assert f"restored weights are {STEPS} steps ahead of epoch 2" in process.stderr
        return
    error = {"weights": "OSError", "metadata": "JSONDecodeError"}[part]
    assert error in process.stderr
    if double:
        for file in backup.glob("*.bkp"):
            file.rename(file.with_suffix(""))
        assert_same(finished(run, tmp_path, **options)[0], whole)


@pytest.mark.slow
def test_a_kill_when_the_training_is_over(run, tmp_path, whole):
    kept = {"delete_checkpoint": False}
    killed(run, tmp_path, at="the end", **kept)
    results, _ = finished(run, tmp_path, **kept)
    # No epoch is left: there is no history, and no random number was drawn.
    kinds = "history", "seed_generator_state"
    assert_same(
        *(
            {k: v for k, v in found.items() if not any(kind in k for kind in kinds)}
            for found in (results, whole)
        )
    )

    killed(run, tmp_path, part="deletion")  # of the backup that was there
    process = run({"folder": str(tmp_path), "out": str(tmp_path / "out.npz")})
    assert f"weights are {EPOCHS * STEPS} steps ahead of epoch 0" in process.stderr
