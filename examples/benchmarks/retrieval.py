"""Time of `kerastrip.search` against FAISS; time and memory of the evaluation.

    python examples/benchmarks/retrieval.py [--rows 50000] [--dim 128] [--k 10]
    python examples/benchmarks/retrieval.py --only-whole-ranking [--classes 1000]

Times are taken in turns within one run, the fastest of several counts: read the
ratio. FAISS (`pip install faiss-cpu`) is left out if it is not installed. Memory is
what the process grows by over the embeddings themselves.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from kerastrip.evaluation.reranking import rerank
from kerastrip.evaluation.retrieval import retrieval_metrics
from kerastrip.evaluation.search import search
from kerastrip.evaluation.verification import verification_metrics


def peak_memory() -> float:
    """Largest memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def in_turns(jobs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The fastest of several runs of each job, in seconds; the jobs take turns."""
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def whole_ranking(x: np.ndarray, labels: np.ndarray, rounds: int) -> None:
    """`map` and `minp` beside recall@k alone, with and without groups; re-ranking."""
    recall = ("recall@1", "recall@5", "recall@10")
    whole = (*recall, "map", "minp")
    groups = np.arange(len(x)) % 6
    before = peak_memory()
    jobs = {
        "recall@k": lambda: retrieval_metrics(x, labels, metrics=recall),
        "with map and minp": lambda: retrieval_metrics(x, labels, metrics=whole),
        "the same in groups": lambda: retrieval_metrics(
            x, labels, metrics=whole, groups=groups
        ),
    }
    seconds = in_turns(jobs, rounds)
    for name, taken in seconds.items():
        print(f"{name:24s} {taken:7.2f} s, ratio {taken / seconds['recall@k']:.2f}")
    print(f"memory +{peak_memory() - before:.0f} MB over what came before")
    queries, gallery = x[:2000], x[2000:12_000].copy()
    before = peak_memory()
    jobs = {
        "search": lambda: search(queries, gallery, 100),
        "rerank": lambda: rerank(queries, gallery, 100),
    }
    print(f"{len(queries)} queries, {len(gallery)} rows to search in, 100 neighbours")
    for name, taken in in_turns(jobs, rounds).items():
        print(f"{name:24s} {taken:7.2f} s")
    print(f"memory +{peak_memory() - before:.0f} MB over what came before")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--spread", type=float, default=1.0, help="of the classes")
    parser.add_argument("--only-search", action="store_true")
    parser.add_argument("--only-whole-ranking", action="store_true")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    labels = rng.integers(0, args.classes, args.rows)
    x = rng.normal(size=(args.rows, args.dim)).astype("float32")
    centres = args.spread * rng.normal(size=(args.classes, args.dim))
    x += centres.astype("float32")[labels]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    print(f"{args.rows} embeddings of {args.dim} numbers, {args.classes} classes")

    if args.only_whole_ranking:
        whole_ranking(x, labels, args.rounds)
        return
    jobs = {"kerastrip.search": lambda: search(x, x, args.k)}
    if not args.only_search:
        jobs["retrieval_metrics"] = lambda: retrieval_metrics(x, labels)
        jobs["verification_metrics"] = lambda: verification_metrics(x, labels)
    for name, job in jobs.items():  # FAISS comes later: the peak never falls
        before = peak_memory()
        start = time.perf_counter()
        job()
        print(
            f"{name:24s} {time.perf_counter() - start:7.2f} s, "
            f"memory +{peak_memory() - before:.0f} MB over what came before"
        )

    try:
        import faiss
    except ImportError:
        print("FAISS is not installed")
        return
    index = faiss.IndexFlatL2(args.dim)
    index.add(x)
    contestants = {
        "FAISS IndexFlatL2": lambda: index.search(x, args.k)[1],
        "kerastrip.search": lambda: search(x, x, args.k)[1],
    }
    best, found = dict.fromkeys(contestants, float("inf")), {}
    for _ in range(args.rounds):
        for name, job in contestants.items():
            start = time.perf_counter()
            found[name] = job()
            best[name] = min(best[name], time.perf_counter() - start)
    for name, seconds in best.items():
        print(f"{name:24s} {seconds:7.2f} s")
    faiss_time, own_time = best.values()
    theirs, own = found.values()
    print(
        f"ratio {own_time / faiss_time:.2f}, same neighbours {(theirs == own).mean():.5f}"
    )


if __name__ == "__main__":
    main()
