"""Speed, memory and promises of the sampling plan, beside MPerClassSampler.

    python examples/benchmarks/sampler.py [--full]

Batches of 32 classes x 4 samples; "spread" takes the 4 from different ones of 8 cameras
(`spread=`). One line for each set of labels and each sampler:

- build: time to index the labels, and the peak of memory in bytes per label beyond
  the labels themselves;
- cold: one batch of a random step, microseconds (median of 300);
- indices/s: batches asked for in order (best of three runs);
- seen: share of the samples that one epoch of as many rows as samples shows;
- repeats: share of the batches in which a row comes twice. Classes of two or three
  samples leave no choice; `small_classes="drop"` leaves them out.

`--full` adds 100,000,000 labels in 1,000,000 classes (5 GB of memory). The
MPerClassSampler of pytorch-metric-learning is measured if it is installed, up to
1,000,000 labels; it has no random access, and with many classes it is given a short
epoch. All times are processor times of one core; those of one run compare with one
another only.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import time
import tracemalloc
import warnings

import numpy as np

from kerastrip.sampling.plan import PKPlan

P, K, CAMERAS = 32, 4, 8
SETS = [(10**4, 10**2), (10**6, 10**3), (10**6, 10**5), (10**8, 10**6)]
# Batches looked at, at most: at 10**8 labels an epoch has 781,250.
MOST = 10**4


def random_labels(samples, classes):
    rng = np.random.default_rng(0)
    return rng.integers(0, classes, samples)


def timed(call):
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def built(make, samples):
    """What `make` returns, its time, and (of a second time) its peak per sample."""
    seconds, sampler = timed(make)
    tracemalloc.start()
    make()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return sampler, seconds, peak / samples


def repeats(batches):
    """Share of the batches in which a row comes twice."""
    ordered = np.sort(batches, axis=1)
    return (ordered[:, 1:] == ordered[:, :-1]).any(axis=1).mean()


def of_plan(labels, **options):
    plan, build, memory = built(
        lambda: PKPlan(labels, classes_per_batch=P, samples_per_class=K, **options),
        len(labels),
    )
    count = min(len(plan), MOST)
    plan.indices(1, 0)
    steps = np.random.default_rng(0).integers(1, len(plan), 300).tolist()
    cold = [timed(lambda step=step: plan.indices(1, step))[0] for step in steps]
    runs = [
        timed(lambda: [plan.indices(1, step) for step in range(count)])
        for _ in range(3)
    ]
    batches = np.stack(runs[0][1])
    if count == len(plan):
        seen = len(np.unique(batches)) / len(labels)
    else:
        seen = plan.report().samples_seen / len(labels)
    return {
        "build s": build,
        "bytes/label": memory,
        "cold us": 1e6 * float(np.median(cold)),
        "indices/s": batches.size / min(seconds for seconds, _ in runs),
        "seen %": 100 * seen,
        "repeats %": 100 * repeats(batches),
    }


def of_peer(labels, classes):
    from pytorch_metric_learning.samplers import MPerClassSampler

    length = min(len(labels), 10**9 // classes)
    sampler, build, memory = built(
        lambda: MPerClassSampler(
            labels, K, batch_size=P * K, length_before_new_iter=length
        ),
        len(labels),
    )
    seconds, rows = timed(lambda: np.array(list(sampler)))
    batches = rows.reshape(-1, P * K)
    return {
        "build s": build,
        "bytes/label": memory,
        "cold us": float("nan"),
        "indices/s": rows.size / seconds,
        "seen %": 100 * len(np.unique(rows)) / len(labels)
        if length == len(labels)
        else float("nan"),
        "repeats %": 100 * repeats(batches),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="add 100,000,000 labels")
    full = parser.parse_args().full
    warnings.simplefilter("ignore")  # small classes are part of the game
    peer = importlib.util.find_spec("pytorch_metric_learning") is not None
    if peer:
        import pytorch_metric_learning.samplers  # noqa: F401 (not part of its time)
    head = ["build s", "bytes/label", "cold us", "indices/s", "seen %", "repeats %"]
    print(f"{'labels':>12}{'classes':>11}  {'sampler':<25}", end="")
    print("".join(f"{word:>13}" for word in head))
    for samples, classes in SETS if full else SETS[:-1]:
        labels = random_labels(samples, classes)
        cameras = np.arange(samples, dtype=np.int32) % CAMERAS
        contestants = {
            f"PKPlan, {mode}{word}": functools.partial(
                of_plan, labels, epoch_mode=mode, spread=spread
            )
            for mode in ("balanced", "coverage")
            for word, spread in (("", None), (", spread", cameras))
        }
        if peer and samples <= 10**6:
            contestants["MPerClassSampler"] = lambda y=labels, c=classes: of_peer(y, c)
        rates = {}
        for name, measure in contestants.items():
            figures = measure()
            rates[name] = figures["indices/s"]
            print(f"{samples:>12,}{classes:>11,}  {name:<25}", end="")
            print("".join(f"{shown(word, figures[word]):>13}" for word in head))
        if "MPerClassSampler" in rates:
            base = rates.pop("MPerClassSampler")
            ratios = ", ".join(f"{name} {r / base:.1f} x" for name, r in rates.items())
            print(f"{'':25}indices/s against MPerClassSampler: {ratios}")


def shown(word, value):
    digits = {"build s": 2, "bytes/label": 1, "seen %": 1, "repeats %": 2}.get(word, 0)
    return "-" if np.isnan(value) else f"{value:,.{digits}f}"


if __name__ == "__main__":
    main()
