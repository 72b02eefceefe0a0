"""Time of a training step on an accelerator, with and without mining.

    python examples/benchmarks/gpu.py [--sizes 256 1024 4096 8192 16384 32768] [--cpu]

Two models, each with `jit_compile` on and off: one dense layer, whose time is that of
the mining engine, and four convolutional blocks on images of 28 pixels. A step is one
`train_on_batch` on tensors of the device, its loss brought to the host:

- plain: with a loss that mines nothing, the mean of the embeddings;
- triplet: with `TripletLoss`;
- census: with `TripletLoss` and `MiningStats`.

Milliseconds, the fastest of the steps that fit into `--seconds`; the contestants take
turns. "-": not enough memory. Works on every backend of Keras; without an accelerator
it says so and ends, unless `--cpu` is given.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from kerastrip import TripletLoss
from kerastrip.callbacks import MiningStats

DIM = 128
OUT_OF_MEMORY = "OOM", "RESOURCE_EXHAUSTED", "out of memory"


def accelerator():
    """The device that Keras uses, None for a processor."""
    if keras.backend.backend() == "torch":
        import torch

        return "cuda" if torch.cuda.is_available() else None
    device = keras.distribution.list_devices()[0].lower()
    return None if "cpu" in device else device


def dense():
    return [keras.Input((DIM,))]


def four_blocks():
    layers = [keras.Input((28, 28, 1))]
    for _ in range(4):
        layers += [
            keras.layers.Conv2D(64, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(padding="same"),
        ]
    return [*layers, keras.layers.Flatten()]


MODELS = {"dense": (dense, (DIM,)), "four blocks": (four_blocks, (28, 28, 1))}


def plain(_, embeddings):
    return keras.ops.mean(embeddings, axis=-1)


def step(trunk, x, y, jit, loss, census=False):
    """A function that takes one training step."""
    keras.utils.set_random_seed(0)
    head = [keras.layers.Dense(DIM), keras.layers.UnitNormalization(dtype="float32")]
    model = keras.Sequential([*trunk(), *head])
    model.compile(keras.optimizers.SGD(1e-4), loss=loss, jit_compile=jit)
    if census:
        stats = MiningStats()
        stats.set_model(model)
        stats.on_train_begin()
    return lambda: model.train_on_batch(x, y)


def timed(call):
    begun = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begun)


def race(calls, seconds):
    """Least milliseconds of each; NaN for what does not fit into memory."""
    best = {}
    for name, call in calls.items():
        try:
            call()  # compiles
            best[name] = timed(call)
        except Exception as error:
            if not any(words in str(error) for words in OUT_OF_MEMORY):
                raise
            best[name] = float("nan")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name in best:
            if best[name] == best[name]:
                best[name] = min(best[name], timed(calls[name]))
    return best


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[256, 1024, 4096, 8192, 16384, 32768]
    )
    parser.add_argument("--mining", default="semi_hard", help="a word of TripletLoss")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=2.0, help="per line")
    parser.add_argument("--cpu", action="store_true", help="measure a processor too")
    options = parser.parse_args(arguments)
    device = accelerator() or ("cpu" if options.cpu else None)
    if device is None:
        print("no accelerator (--cpu measures the processor)")
        return
    print(
        f"{device}, {keras.backend.backend()}, Keras {keras.__version__}, mining "
        f"{options.mining!r}, 4 rows per class, {DIM} numbers; milliseconds\n"
    )
    print("| model | jit | batch | plain | triplet | census | mining | us per row |")
    print("|" + "---|" * 8)
    for name in options.models:
        trunk, shape = MODELS[name]
        for size in options.sizes:
            rng = np.random.default_rng(0)
            x = keras.ops.convert_to_tensor(rng.random((size, *shape), "float32"))
            y = keras.ops.convert_to_tensor(np.arange(size, dtype="int32") // 4)
            for jit in (True, False):
                mined = TripletLoss(mining=options.mining)
                best = race(
                    {
                        "plain": step(trunk, x, y, jit, plain),
                        "triplet": step(trunk, x, y, jit, mined),
                        "census": step(trunk, x, y, jit, mined, census=True),
                    },
                    options.seconds,
                )
                mining = best["triplet"] - best["plain"]
                figures = [*best.values(), mining, 1e3 * mining / size]
                shown = ["-" if ms != ms else f"{ms:.2f}" for ms in figures]
                print(
                    f"| {name} | {'on' if jit else 'off'} | {size:,} | "
                    + " | ".join(shown)
                    + " |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
