"""What `MiningStats` costs: steps with it and without it, in turn, in one run.

    python examples/benchmarks/telemetry.py [--steps 30] [--classes 16] [--samples 8]

Two models are timed: one dense layer, where the difference is the cost itself (wanted:
at most 1 ms at a batch of 128), and four convolutional blocks of 64 channels on images
of 28 pixels, where the ratio counts (wanted: at most 1.03). A step is one
`train_on_batch` with its figures brought to the host, as `fit` does. Every round times
one step of each contestant, in an order that turns. Shown are the fastest, the median
and, beside the median without it, the median of the differences within a round, which
other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import statistics
import time

import keras
import numpy as np

from kerastrip.callbacks import MiningStats
from kerastrip.losses import TripletLoss


def small() -> list:
    return [keras.Input((28, 28, 1)), keras.layers.Flatten()]


def four_blocks() -> list:
    layers: list = [keras.Input((28, 28, 1))]
    for _ in range(4):
        layers += [
            keras.layers.Conv2D(64, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(padding="same"),
        ]
    return [*layers, keras.layers.Flatten()]


def build(trunk: list, dim: int) -> keras.Model:
    keras.utils.set_random_seed(0)
    head = [keras.layers.Dense(dim), keras.layers.UnitNormalization(dtype="float32")]
    model = keras.Sequential([*trunk, *head])
    model.compile(keras.optimizers.SGD(1e-4), loss=TripletLoss(margin=0.2))
    return model


def compare(make_trunk, x, y, dim: int, steps: int) -> dict[str, list[float]]:
    """Milliseconds of every step, with and without the callback."""
    models = {"without": build(make_trunk(), dim), "with": build(make_trunk(), dim)}
    stats = MiningStats()
    stats.set_model(models["with"])
    stats.on_train_begin()
    times: dict[str, list[float]] = {name: [] for name in models}
    for step in range(-3, steps):
        for name in list(models)[:: 1 if step % 2 else -1]:
            begun = time.perf_counter()
            models[name].train_on_batch(x, y, return_dict=True)
            if step >= 0:
                times[name].append(1e3 * (time.perf_counter() - begun))
    stats.detach()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    options = parser.parse_args()
    rows = options.classes * options.samples
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 28, 28, 1)).astype("float32")
    y = np.repeat(np.arange(options.classes, dtype="int32"), options.samples)
    print(
        f"{keras.backend.backend()}, batch {options.classes} x {options.samples}, "
        f"dim {options.dim}; milliseconds a step"
    )
    print(f"{'model':12} {'':8} {'without':>9} {'with':>9} {'more':>7} {'ratio':>7}")
    for name, trunk, steps in (
        ("dense", small, 5 * options.steps),
        ("four blocks", four_blocks, options.steps),
    ):
        times = compare(trunk, x, y, options.dim, steps)
        median = statistics.median
        before, after = times["without"], times["with"]
        more = median(b - a for a, b in zip(before, after, strict=True))
        for how, a, b in (
            ("fastest", min(before), min(after)),
            ("median", median(before), median(after)),
            ("paired", median(before), median(before) + more),
        ):
            print(f"{name:12} {how:8} {a:9.2f} {b:9.2f} {b - a:7.2f} {b / a:7.3f}")


if __name__ == "__main__":
    main()
