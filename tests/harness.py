"""What many test files need: a fresh process, an example, a tiny model, a mark."""

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import time
import warnings

import keras
import numpy as np
import pytest

from kerastrip.sampling.plan import PKPlan

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
BACKEND = keras.config.backend()
# Variables of a process that needs no backend: Keras' own for NumPy needs JAX.
LIGHT = {"KERAS_BACKEND": "numpy"} if importlib.util.find_spec("jax") else {}
tensorflow_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow only")


def run_script(script, *arguments, exit_code=0, timeout=240, env=None, **options):
    """The finished process of a script in a fresh interpreter, which imports the tests.

    Args:
        script: The path of a file, or a string of code, indented or not.
        *arguments: What the script finds in `sys.argv[1:]`.
        exit_code: The test fails with what the script wrote to stderr unless it ends
            so. A negative one is the signal that killed it.
        timeout: Seconds after which a script that still runs fails the test.
        env: Variables to set in its environment; None as a value removes one.
        **options: Of `subprocess.run`, such as `input`.
    """
    try:
        done = subprocess.run(
            _command(script, arguments),
            env=_environment(env),
            capture_output=True,
            text=True,
            timeout=timeout,
            **options,
        )
    except subprocess.TimeoutExpired as error:
        written = (error.stderr or b"").decode(errors="replace")
        pytest.fail(f"the script still runs after {timeout} s:\n{written[-3000:]}")
    return _checked(done, exit_code)


# Forks for every script that it reads. A fork is a whole process with its own end.
FORKS = """
import json, os, signal, sys, tempfile
import {modules}

while line := sys.stdin.readline():
    script, timeout = json.loads(line)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            signal.alarm(timeout)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            exec(script, {{"__name__": "__main__"}})
            sys.exit()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = [file.seek(0) or file.read() for file in (out, err)]
    print(json.dumps([code, *texts]), flush=True)
"""


@contextlib.contextmanager
def forking(modules, env=None):
    """Gives a `run_script` for code that spares each script the same imports.

    Args:
        modules: What the one interpreter imports from which all scripts are forked,
            such as "keras, kerastrip". No thread of these modules goes along.
        env: As for `run_script`.
    """
    server = subprocess.Popen(
        _command(FORKS.format(modules=modules), ()),
        env=_environment(env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(script, *, exit_code=0, timeout=240):
        server.stdin.write(json.dumps([textwrap.dedent(script), timeout]) + "\n")
        server.stdin.flush()
        code, out, err = json.loads(server.stdout.readline())
        return _checked(subprocess.CompletedProcess(script, code, out, err), exit_code)

    with server:
        yield run
        server.stdin.close()


def _checked(done, exit_code):
    if done.returncode != exit_code:
        pytest.fail(
            f"the script ended with {done.returncode}, not with {exit_code}:\n"
            f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        )
    return done


def _command(script, arguments):
    is_path = isinstance(script, pathlib.Path)
    start = [str(script)] if is_path else ["-c", textwrap.dedent(script)]
    return [sys.executable, *start, *map(str, arguments)]


def _environment(changes):
    folders = sorted(path for path in TESTS.iterdir() if path.is_dir())
    path = os.pathsep.join(map(str, [ROOT, TESTS, *folders]))
    variables = {**os.environ, "PYTHONPATH": path, **(changes or {})}
    return {key: value for key, value in variables.items() if value is not None}


def until(reached, seconds=60):
    """Whether a state is reached in time; asks for it again and again."""
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def load_example(name):
    """A script of `examples/` as a module, such as "digits" or "benchmarks/gpu"."""
    path = ROOT / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_model(
    shape=(5,), dim=4, *, classes=None, unit_length=True, loss=None, rate=0.0
):
    """One dense layer that makes embeddings, the output "emb"; the same at every call.

    Args:
        shape: Of an input without the batch; what has more axes is made flat.
        dim: Length of an embedding.
        classes: How many there are for a softmax head, "probs", the first output
            then. None is a model without it.
        unit_length: Whether the embeddings have length 1.
        loss: The model is compiled with it and SGD, or not at all.
        rate: Learning rate; with 0 the weights stay as they are.
    """
    keras.utils.set_random_seed(0)
    inputs = keras.Input(shape)
    rows = keras.layers.Flatten()(inputs) if len(shape) > 1 else inputs
    emb = keras.layers.Dense(dim, name="dense" if unit_length else "emb")(rows)
    if unit_length:
        emb = keras.layers.UnitNormalization(dtype="float32", name="emb")(emb)
    outputs = emb
    if classes:
        head = keras.layers.Dense(classes, activation="softmax", name="probs")
        outputs = [head(rows), emb]
    model = keras.Model(inputs, outputs)
    if loss is not None:
        model.compile(keras.optimizers.SGD(rate), loss)
    return model


def histogram(sizes, seed=0):
    """Labels 0, 1, ... with these numbers of samples, in mixed order."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(seed).permutation(labels)


def planned(labels, p, k, **options):
    """A plan, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PKPlan(labels, classes_per_batch=p, samples_per_class=k, **options)


def epoch_of(plan, epoch):
    """`(batches, P, K)` rows of an epoch, in order."""
    rows = np.stack([plan.indices(epoch, step) for step in range(len(plan))])
    return rows.reshape(len(plan), -1, plan.samples_per_class)
