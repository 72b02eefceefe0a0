"""Time of `kerastrip.search` against FAISS, and memory of the evaluation.

    python examples/benchmarks/retrieval.py [--rows 50000] [--dim 128] [--k 10]

Times are taken in turns within one run, the fastest of several counts: read the
ratio. FAISS (`pip install faiss-cpu`) is left out if it is not installed. Memory is
what the process grows by over the embeddings themselves.
"""

import argparse
import os
import resource
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from kerastrip.evaluation.retrieval import retrieval_metrics
from kerastrip.evaluation.search import search
from kerastrip.evaluation.verification import verification_metrics


def peak_memory() -> float:
    """Largest memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-search", action="store_true")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    labels = rng.integers(0, args.classes, args.rows)
    x = rng.normal(size=(args.rows, args.dim)).astype("float32")
    x += rng.normal(size=(args.classes, args.dim)).astype("float32")[labels]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    print(f"{args.rows} embeddings of {args.dim} numbers, {args.classes} classes")

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
