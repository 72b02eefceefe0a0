"""The sampling plan of many hosts: what they share, what they read, what it costs.

    python examples/benchmarks/scale.py [--samples 10000000] [--classes 100000]
    python examples/benchmarks/scale.py --samples 30000000 --classes 10000000 --only-cost

Each host of a training has a `PKPlan` with a `shard` of its own: all of the labels,
and its part of every batch. Here one process plays all hosts for one epoch, in both
epoch modes, and looks at every row. The first table is what it sees:

- shared: steps in which a row or a class is on two hosts;
- samples of a host: distinct ones among its rows, least and most of all hosts;
- read again: share of the samples of host 0 that it reads in the next epoch as well;
- seen: share of all samples that the epoch shows;
- draws of a class: least and most of all classes.

The second is what a plan costs each host: measured, and for 10^9 samples in 10^7
classes, where memory and the time to build are a multiple if there are as many samples
in a class. Times are processor times of one core. The sizes of the classes are uneven:
the smallest have 4/5 of the mean, the largest ten times as much.
"""

from __future__ import annotations

import argparse
import copy
import time
import tracemalloc
import warnings

import numpy as np

from kerastrip.sampling.plan import EPOCH_MODES, PKPlan

LARGE = 10**9, 10**7


def random_labels(samples, classes):
    rng = np.random.default_rng(0)
    return (classes * rng.random(samples) ** 1.25).astype(np.int32)


def memory(make):
    """Bytes that a plan keeps, and takes at most while it is built."""
    tracemalloc.start()
    plan = make()
    plan.indices(0, 0)  # coverage makes tables for the epoch
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept, peak


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


def seconds_to_plan(plan):
    """The first step of an epoch, each of the next in order, and any step."""
    steps = np.random.default_rng(0).integers(1, len(plan), 200).tolist()
    clock = [time.process_time()]
    plan.indices(2, 0)
    clock.append(time.process_time())
    epoch_of(plan, epoch=2)
    clock.append(time.process_time())
    for step in steps:
        plan.indices(2, step)
    clock.append(time.process_time())
    return np.diff(clock) / (1, len(plan), len(steps))


def cost(make, labels):
    """Rows of the second table: name, here, at the large size."""
    begun = time.process_time()
    plan = make(labels)
    build = time.process_time() - begun
    kept, peak = memory(lambda: make(labels))
    first, following, any_step = 1e3 * seconds_to_plan(plan)
    samples, classes = len(labels), len(plan.classes_)
    alike = samples * LARGE[1] == classes * LARGE[0]

    def grown(value):
        return f"{value * LARGE[0] / samples:.1f}" if alike else "-"

    return [
        ("bytes per label", f"{kept / samples:.1f}", ""),
        ("plan, GB", f"{kept / 1e9:.2f}", grown(kept / 1e9)),
        ("peak of building it, GB", f"{peak / 1e9:.2f}", grown(peak / 1e9)),
        ("building it, s", f"{build:.1f}", grown(build)),
        ("first step of an epoch, ms", f"{first:.1f}", ""),
        ("next step, ms", f"{following:.2f}", ""),
        ("any step, ms", f"{any_step:.2f}", ""),
    ]


def hosts_of(make, labels, hosts):
    """The plans of all hosts on one index; the last is built anew to compare."""
    plan = make(labels)
    plans = [copy.copy(plan) for _ in range(hosts)]
    for host, each in enumerate(plans):
        each.shard = host, hosts
    last = copy.copy(plans[-1])
    if (make(labels, hosts - 1).indices(1, 0) != last.indices(1, 0)).any():
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
    parser.add_argument("--only-cost", action="store_true", help="no simulation")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # small classes are part of the game
    samples, classes, hosts = options.samples, options.classes, options.hosts
    labels = random_labels(samples, classes)
    seen, costs = {}, {}
    for mode in EPOCH_MODES:

        def make(labels, host=0, mode=mode):
            return PKPlan(
                labels,
                classes_per_batch=hosts * options.classes_per_host,
                samples_per_class=4,
                epoch_mode=mode,
                shard=(host, hosts),
            )

        if not options.only_cost:
            seen[mode] = simulate(hosts_of(make, labels, hosts), labels)
        costs[mode] = cost(make, labels)

    print(f"{hosts} hosts, {samples:,} samples in {classes:,} classes\n")
    if seen:
        print("One epoch:\n")
        names = seen[EPOCH_MODES[0]]
        table(["", *seen], [[name, *(seen[m][name] for m in seen)] for name in names])
    print("Each host:\n")
    rows = [
        (f"{mode}: {name}", *cells) for mode in costs for name, *cells in costs[mode]
    ]
    held = ("labels passed in, GB", f"{4e-9 * samples:.2f}", f"{4e-9 * LARGE[0]:.1f}")
    table(["", "here", "10^9 samples, 10^7 classes"], [held, *rows])


if __name__ == "__main__":
    main()
