"""The sampling plan of many hosts: what they share, what they read, what it costs.

    python examples/benchmarks/scale.py [--samples 10000000] [--classes 100000]

Each host of a training has a `PKPlan` with a `shard` of its own: all of the labels,
and its part of every batch. Here one process plays all hosts for one epoch, in both
epoch modes, and looks at every row. The first table is what it sees:

- shared: steps in which a row or a class is on two hosts;
- samples of a host: distinct ones among its rows, least and most of all hosts;
- read again: share of the samples of host 0 that it reads in the next epoch as well;
- seen: share of all samples that the epoch shows;
- draws of a class: least and most of all classes.

The second is what a plan costs, measured, and reckoned for 10^9 samples in 10^7
classes: linear in labels and classes. Times are those of one core. The sizes of the
classes are uneven: the smallest have 4/5 of the mean, the largest ten times as much.
"""

from __future__ import annotations

import argparse
import copy
import time
import tracemalloc

import numpy as np

from kerastrip.plan import EPOCH_MODES, PKPlan

LARGE = 10**9, 10**7


def random_labels(samples, classes):
    rng = np.random.default_rng(0)
    return (classes * rng.random(samples) ** 1.25).astype(np.int32)


def cost(make):
    """Seconds to make a plan, and the bytes that it keeps and takes at most."""
    begun = time.perf_counter()
    make()
    seconds = time.perf_counter() - begun
    tracemalloc.start()
    plan = make()
    plan.indices(0, 0)  # coverage has tables of the epoch
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return seconds, kept, peak


def epoch_of(plan, epoch=0):
    """(steps, rows) all batches of an epoch."""
    return np.stack([plan.indices(epoch, step) for step in range(len(plan))])


def shared(values):
    """In how many steps two hosts have one value; (hosts, steps, rows)."""
    hosts = len(values)
    count = 0
    for step in range(values.shape[1]):
        pairs = values[:, step].astype(np.int64) * hosts + np.arange(hosts)[:, None]
        owned = np.unique(pairs) // hosts
        count += bool((owned[1:] == owned[:-1]).any())
    return count


def simulate(plans, labels):
    """All hosts through an epoch; what they read, by name."""
    rows = np.stack([epoch_of(plan).astype(np.int32) for plan in plans])
    classes = labels[rows[..., :: plans[0].samples_per_class]]
    distinct = [np.unique(part) for part in rows]
    again = np.isin(distinct[0], epoch_of(plans[0], epoch=1)).mean()
    draws = np.bincount(classes.ravel(), minlength=len(plans[0].classes_))
    sizes = [len(part) for part in distinct]
    return {
        "steps": f"{rows.shape[1]:,}",
        "rows of a step": f"{rows[:, 0].size:,}",
        "steps with a shared row": f"{shared(rows):,}",
        "steps with a shared class": f"{shared(classes):,}",
        "rows of a host": f"{rows[0].size:,}",
        "samples of a host": f"{min(sizes):,} to {max(sizes):,}",
        "read again": f"{again:.1%}",
        "seen": f"{len(np.unique(rows)) / len(labels):.2%}",
        "draws of a class": f"{draws.min()} to {draws.max()}",
    }


def microseconds(plan):
    """Of a step in order, and of any step, of an epoch that has begun."""
    plan.indices(2, 0)
    begun = time.perf_counter()
    epoch_of(plan, epoch=2)
    in_order = (time.perf_counter() - begun) / len(plan)
    steps = np.random.default_rng(0).integers(1, len(plan), 200).tolist()
    begun = time.perf_counter()
    for step in steps:
        plan.indices(2, step)
    return 1e6 * in_order, 1e6 * (time.perf_counter() - begun) / len(steps)


def hosts_of(plan, make, hosts):
    """The plans of all hosts on one index; the last is built anew to compare."""
    plans = [copy.copy(plan) for _ in range(hosts)]
    for host, each in enumerate(plans):
        each.shard = host, hosts
    if (make(hosts - 1).indices(1, 0) != plans[-1].indices(1, 0)).any():
        raise RuntimeError("a plan that shares its index is not the plan of its shard")
    return plans


def table(head, rows):
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=10**7)
    parser.add_argument("--classes", type=int, default=10**5)
    parser.add_argument("--hosts", type=int, default=64)
    parser.add_argument("--classes-per-host", type=int, default=64)
    options = parser.parse_args(arguments)
    samples, classes, hosts = options.samples, options.classes, options.hosts
    labels = random_labels(samples, classes)
    fewer = random_labels(samples, classes // 10)
    seen, costs = {}, {}
    for mode in EPOCH_MODES:

        def make(host, mode=mode):
            return PKPlan(
                labels,
                classes_per_batch=hosts * options.classes_per_host,
                samples_per_class=4,
                epoch_mode=mode,
                shard=(host, hosts),
            )

        plan = make(0)
        seen[mode] = simulate(hosts_of(plan, make, hosts), labels)
        seconds, kept, peak = cost(lambda: make(0))
        # What a class costs, from a tenth of the classes.
        few = cost(
            lambda mode=mode: PKPlan(
                fewer, classes_per_batch=1, samples_per_class=4, epoch_mode=mode
            )
        )[1]
        per_class = (kept - few) / (classes - classes // 10)
        costs[mode] = (
            per_class,
            [(each - per_class * classes) / samples for each in (kept, peak)],
        )
        costs[mode] += seconds, *microseconds(plan)

    print(f"{hosts} hosts, {samples:,} samples in {classes:,} classes, one epoch:\n")
    names = next(iter(seen.values()))
    table(["", *seen], [[name, *(seen[m][name] for m in seen)] for name in names])
    large, many = LARGE
    rows = []
    for mode, (per_class, per_label, seconds, in_order, cold) in costs.items():
        of_large = [(each * large + per_class * many) / 1e9 for each in per_label]
        rows += [
            [f"{mode}: bytes per label", f"{per_label[0]:.1f}", ""],
            [f"{mode}: bytes per class", f"{per_class:.0f}", ""],
            [f"{mode}: plan, GB", "", f"{of_large[0]:.1f}"],
            [f"{mode}: peak, GB", "", f"{of_large[1]:.1f}"],
            [f"{mode}: build, s", f"{seconds:.1f}", f"{seconds * large / samples:.0f}"],
            [f"{mode}: next step, us", f"{in_order:.0f}", "same"],
            [f"{mode}: any step, us", f"{cold:.0f}", "same"],
        ]
    rows.append(
        ["labels passed in, GB", f"{labels.nbytes / 1e9:.2f}", f"{large * 4 / 1e9:.1f}"]
    )
    rows.append(
        ["rows read in an epoch", f"{samples // hosts:,}", f"{large // hosts:,}"]
    )
    print("Each host:\n")
    table(["", "here", "10^9 samples, 10^7 classes"], rows)


if __name__ == "__main__":
    main()
