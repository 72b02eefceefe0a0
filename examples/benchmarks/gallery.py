"""Times of `kerastrip.Gallery` with many rows: enrol, save, load, identify.

    python examples/benchmarks/gallery.py [--rows 1000000] [--dim 128] [--queries 100]

The labels are integers, or strings with --strings. Beside each time stands a floor from
the same run: what NumPy takes to copy the rows, or to write and read them as an array.
"""

import argparse
import os
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from kerastrip import Gallery


def timed(job: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest of three turns, and what the last one returned."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = job()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--strings", action="store_true")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    rows = rng.standard_normal((args.rows, args.dim), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = rng.integers(0, max(1, args.rows // 10), args.rows)
    if args.strings:
        labels = np.array([f"person {label:07d}" for label in labels])
    queries = rows[rng.integers(0, args.rows, args.queries)] + np.float32(0.01)
    print(f"{args.rows} rows of {args.dim} numbers, labels {labels.dtype}")

    with tempfile.TemporaryDirectory() as folder:
        path, plain = pathlib.Path(folder, "gallery"), pathlib.Path(folder, "rows.npy")
        enrol, gallery = timed(lambda: Gallery(rows, labels, threshold=0.5))
        copy, _ = timed(rows.copy)
        print(f"enrol         {enrol:7.2f} s   a copy of the rows {copy:.2f}")
        save, _ = timed(lambda: gallery.save(path))
        write, _ = timed(lambda: np.save(plain, rows))
        print(f"save          {save:7.2f} s   np.save {write:.2f}")
        load, loaded = timed(lambda: Gallery.load(path))
        read, _ = timed(lambda: np.load(plain))
        print(f"load          {load:7.2f} s   np.load {read:.2f}")
        same = np.array_equal(loaded.embeddings, rows)
        same &= np.array_equal(loaded.labels, labels)
        print(f"loaded as it was saved: {same}, {path.stat().st_size / 1e6:.0f} MB")
    del loaded
    one, _ = timed(lambda: gallery.identify(queries[:1]))
    product, _ = timed(lambda: rows @ queries[0])
    print(f"identify    1 {one:7.2f} s   one product with all rows {product:.2f}")
    many, _ = timed(lambda: gallery.identify(queries))
    product, _ = timed(lambda: queries @ rows.T)
    print(f"identify {args.queries:4d} {many:7.2f} s   the product {product:.2f}")
    add, _ = timed(lambda: (gallery.add(queries[:1], labels[:1]), gallery.embeddings))
    remove, _ = timed(
        lambda: gallery.remove(gallery.labels[rng.integers(len(gallery))].item())
    )
    print(f"add a row     {add:7.2f} s,  remove a label {remove:.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"largest memory of the process {peak:.1f} GB")


if __name__ == "__main__":
    main()
