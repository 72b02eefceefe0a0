"""Time and memory of the mining engine against a floor, and against its peers.

    python examples/benchmarks/mining.py [--sizes 128 512 1024 4096 16384] [--large]

The floor is the least anyone must do: the squared distance matrix, the minimum of
every row, and the gradient of that, compiled by XLA. The contestants are interleaved
and the minimum of the repetitions is shown; the ratios hold within one run only.
pytorch-metric-learning is timed if it is installed. TensorFlow Addons lives in
environments of its own: run this file with a Python that has it, and the table shows
the floor and TensorFlow Addons alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import numpy as np
import tensorflow as tf

DIM = 128


def batch_of(size, skewed=False):
    """Labels (4 rows per class; skewed: one class holds half) and unit rows."""
    rng = np.random.default_rng(0)
    labels = np.arange(size) // 4
    if skewed:
        labels[: size // 2] = 0
    rows = rng.normal(size=(size, DIM)) + rng.normal(size=(size, DIM))[labels]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return labels.astype(np.int32), rows.astype(np.float32)


@tf.function(jit_compile=True)
def floor(rows):
    with tf.GradientTape() as tape:
        tape.watch(rows)
        squares = tf.reduce_sum(tf.square(rows), axis=1)
        product = tf.matmul(rows, rows, transpose_b=True)
        distances = squares[:, None] + squares[None, :] - 2.0 * product
        value = tf.reduce_sum(tf.reduce_min(distances, axis=1))
    return value, tape.gradient(value, rows)


def with_gradient(function):
    """A step that returns a value, its gradient, and whatever else came."""

    def step(labels, rows):
        with tf.GradientTape() as tape:
            tape.watch(rows)
            value, rest = function(labels, rows)
            value = tf.reduce_mean(value)
        return value, tape.gradient(value, rows), rest

    return step


def traced(function, jit_compile):
    """A graph for any batch size."""
    signature = [
        tf.TensorSpec([None], tf.int32),
        tf.TensorSpec([None, DIM], tf.float32),
    ]
    return tf.function(function, input_signature=signature, jit_compile=jit_compile)


def engine():
    """The functions of this package: {name: function(labels, rows)}."""
    from kerastrip import mining

    return {
        "loss": with_gradient(lambda y, x: (mining.triplet_losses(y, x), ())),
        "both": with_gradient(
            lambda y, x: (mining.triplet_losses(y, x), mining.triplet_census(y, x))
        ),
        "census": lambda y, x: tuple(mining.triplet_census(y, x)),
    }


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def race(contestants, seconds):
    """Least time of each, in ms; they take turns until the time is up."""
    best = {name: float("inf") for name in contestants}
    for call in contestants.values():
        call()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        for name, call in contestants.items():
            best[name] = min(best[name], 1e3 * timed(call))
        rounds += 1
    return best


def extra_memory(call):
    """MB by which the call raises the peak of the process; None where not known."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status("VmRSS:")
        call()
        return (_status("VmHWM:") - before) / 1024
    except OSError:
        return None


def _status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def on_tensors(function, labels, rows):
    labels, rows = tf.constant(labels), tf.constant(rows)
    return lambda: tf.nest.flatten(function(labels, rows))[0].numpy()


def on_floor(rows):
    rows = tf.constant(rows)
    return lambda: floor(rows)[0].numpy()


def torch_peer(labels, rows):
    """pytorch-metric-learning: semi-hard miner and margin loss, with gradient."""
    import torch
    from pytorch_metric_learning import distances, losses, miners

    metric = distances.LpDistance(normalize_embeddings=False)
    miner = miners.TripletMarginMiner(
        margin=0.2, type_of_triplets="semihard", distance=metric
    )
    loss = losses.TripletMarginLoss(margin=0.2, distance=metric)
    labels = torch.tensor(labels, dtype=torch.long)

    def call():
        x = torch.tensor(rows, requires_grad=True)
        loss(x, labels, miner(x, labels)).backward()

    return call


def run_engine(sizes, seconds, peers):
    functions = {
        (name, mode): traced(function, mode == "xla")
        for name, function in engine().items()
        for mode in ("graph", "xla")
    }
    print(
        "| batch | mode | floor ms | loss ms | / floor | loss + census ms | / loss "
        "| census ms | / loss | loss extra MB |"
    )
    print("|" + "---|" * 10)
    measured = {}
    for size in sizes:
        labels, rows = batch_of(size)
        calls = {"floor": on_floor(rows)} if size <= 16384 else {}
        memory = {}
        for key, function in functions.items():
            calls[key] = on_tensors(function, labels, rows)
            if key[0] == "loss":
                memory[key] = extra_memory(calls[key])
        best = race(calls, seconds)
        measured[size] = best
        for mode in ("graph", "xla"):
            loss, both, census = (
                best[name, mode] for name in ("loss", "both", "census")
            )
            base, extra = best.get("floor", float("nan")), memory["loss", mode]
            print(
                f"| {size} | {mode} | {base:.2f} | {loss:.2f} | {loss / base:.2f} | "
                f"{both:.2f} | {both / loss:.2f} | {census:.2f} | "
                f"{census / loss:.2f} | {'?' if extra is None else f'{extra:.0f}'} |",
                flush=True,
            )
    if 1024 in sizes:
        skewed = {
            key: on_tensors(function, *batch_of(1024, skewed=True))
            for key, function in functions.items()
        }
        print("\nBatch 1024, one class holding half of it:")
        for (name, mode), ms in race(skewed, seconds).items():
            ratio = ms / measured[1024][name, mode]
            print(f"  {name} ({mode}): {ms:.1f} ms, {ratio:.1f} x the even classes")
    if peers:
        run_torch(sizes, measured)


def run_torch(sizes, measured):
    try:
        import pytorch_metric_learning
    except ImportError:
        print("\npytorch-metric-learning is not installed")
        return
    print(f"\npytorch-metric-learning {pytorch_metric_learning.__version__}:")
    for size in (size for size in sizes if size <= 1024):
        ms = race({"peer": torch_peer(*batch_of(size))}, 1.0)["peer"]
        ratio = ms / measured[size]["loss", "graph"]
        print(f"  batch {size}: {ms:.1f} ms, {ratio:.0f} x the loss (graph)")


def run_addons(sizes, seconds):
    import tensorflow_addons as tfa

    def loss(labels, rows):
        return tfa.losses.triplet_semihard_loss(labels, rows, margin=0.2), ()

    function = traced(with_gradient(loss), False)
    print(f"TensorFlow Addons {tfa.__version__} (graph):")
    for size in (size for size in sizes if size <= 1024):
        labels, rows = batch_of(size)
        best = race(
            {"floor": on_floor(rows), "peer": on_tensors(function, labels, rows)},
            seconds,
        )
        print(
            f"  batch {size}: floor {best['floor']:.2f} ms, loss {best['peer']:.1f} ms"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[128, 512, 1024, 4096, 16384]
    )
    parser.add_argument("--large", action="store_true", help="add batch 65,536")
    parser.add_argument("--seconds", type=float, default=3.0, help="per size")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    sizes = options.sizes + [65536] * options.large
    try:
        import tensorflow_addons  # noqa: F401
    except ImportError:
        run_engine(sizes, options.seconds, not options.no_peers)
    else:
        run_addons(sizes, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
