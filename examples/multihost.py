"""Train on several hosts: each makes its own classes of every batch.

    python examples/multihost.py [--processes 2] [--epochs 3]

starts that many JAX processes on this machine, each in the role of a host, and one
that trains alone with the whole batch, and compares what they have learnt. It is
equal up to the rounding of sums in another order: losses and `MiningStats` work on
the batch of all hosts, although each host makes only its own part of it.

`train` is what every host runs. On hosts of your own run it once on each, with
KERAS_BACKEND=jax and a free port of the first host as `address`. What to know:

- `DataParallel(auto_shard_dataset=False)`: the `shard` of the sampler has cut the
  batch already, Keras joins the parts of the processes to the global one.
- Samplers for validation get the `shard` too.
- `kerastrip.embed` and the callbacks that use it take the same samples on every host.
  `model.predict` fails: Keras 3.15 does not fetch the outputs of other processes.
- No two hosts may write one file: let one host save the model, and give each a folder
  of its own for `BackupAndRestore`.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np

P, K = 8, 6


def train(index, count, address, epochs):
    """What host `index` of `count` does; returns what it has learnt by name."""
    import jax

    if count > 1:
        # For processors; accelerators bring collectives of their own.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, num_processes=count, process_id=index)

    import keras
    from keras import layers
    from sklearn.datasets import load_digits

    import kerastrip
    from kerastrip.callbacks import EpochSync, MiningStats

    keras.utils.set_random_seed(0)  # the same first weights on every host
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(auto_shard_dataset=False)
    )
    digits = load_digits()
    x = digits.data.astype("float32")
    fit_rows, val_rows = kerastrip.split_samples(digits.target)
    sampler, validation = (
        kerastrip.PKSampler(
            x[rows],
            digits.target[rows],
            classes_per_batch=P,
            samples_per_class=K,
            shard=(index, count),
            fixed=rows is val_rows,
        )
        for rows in (fit_rows, val_rows)
    )
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Rescaling(1 / 16),
            layers.Dense(64, activation="relu"),
            layers.Dropout(0.1),
            layers.Dense(16),
            layers.UnitNormalization(dtype="float32"),
        ]
    )
    # With its own epsilon Adam makes whole steps of the rounding errors of gradients
    # that are next to 0.
    optimizer = keras.optimizers.Adam(epsilon=1e-5)
    model.compile(optimizer, loss=kerastrip.TripletLoss(margin=0.2))
    history = model.fit(
        sampler,
        validation_data=validation,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[EpochSync(sampler), MiningStats()],
    ).history
    print(
        f"process {index} of {count}: {len(sampler[0][1])} of the {P * K} rows of a "
        f"batch, loss {history['loss'][0]:.4f} -> {history['loss'][-1]:.4f}",
        flush=True,
    )
    return {
        **{variable.path: np.asarray(variable) for variable in model.weights},
        **{f"history: {key}": values for key, values in history.items()},
        "kerastrip.embed": kerastrip.embed(model, x[:100]),
    }


def start(count, epochs, timeout):
    """`train` in `count` processes at once; what each of them returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    end = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder) / f"{index}.npz" for index in range(count)]
        jobs = [
            subprocess.Popen(
                [sys.executable, __file__, "--epochs", str(epochs)]
                + ["--host", str(index), str(count), address, str(file)],
                env=environment,
            )
            for index, file in enumerate(files)
        ]
        try:
            # If one fails, the others would wait for it.
            while (codes := [job.poll() for job in jobs]) != [0] * count:
                if any(codes) or time.monotonic() > end:
                    sys.exit(f"{count} processes: exit codes {codes} (None: too slow)")
                time.sleep(0.1)
        finally:
            for job in jobs:
                job.kill()
                job.wait()
        return [dict(np.load(file)) for file in files]


def compare(alone, hosts):
    """Print the largest difference of everything; True if none is too large."""
    print(f"\n{'relative difference':40}{'to one process':>16}{'among hosts':>16}")
    equal = True
    for name, value in alone.items():
        parts = np.stack([host[name] for host in hosts])
        scale = np.abs(value).max() or 1.0
        apart = np.abs(parts - value).max() / scale
        among = np.ptp(parts, axis=0).max() / scale
        print(f"{name:40}{apart:16.1e}{among:16.1e}")
        # In the census a triplet next to a border may count on its other side.
        tolerance = 1e-3 if name.startswith("history") else 1e-5
        equal &= bool(apart <= tolerance and among <= tolerance)
    return equal


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=300.0, help="in seconds")
    parser.add_argument("--host", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.host:
        index, count, address, file = options.host
        np.savez(file, **train(int(index), int(count), address, options.epochs))
        return
    (alone,) = start(1, options.epochs, options.timeout)
    hosts = start(options.processes, options.epochs, options.timeout)
    if not compare(alone, hosts):
        sys.exit("The difference is too large.")
    print("\nEqual.")


if __name__ == "__main__":
    main()
