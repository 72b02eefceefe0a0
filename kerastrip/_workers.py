"""The persistent worker pool behind PKSampler, and a clean end of the process.

Processes are forked once, when the pool is made, and inherit what they work on; where
there is no safe fork (macOS, Windows) they are spawned and it is pickled once. Results
travel through shared memory that was laid out beforehand: a batch is written there by
the worker and copied out by the thread that asked for it, which is several times
cheaper than pickling it through a pipe.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

Layout = Sequence[tuple[tuple[int, ...], np.dtype]]
Work = Callable[..., Sequence[np.ndarray]]

_ALIGN = 64
_PATIENCE = 60.0
_START = "fork" if sys.platform.startswith("linux") else "spawn"


class WorkerPool:
    """Processes that run `work(*args)` and return its arrays.

    Calls may come from any number of threads. They wait for one of `slots` places in
    shared memory.

    Args:
        work: returns arrays of exactly the shapes and dtypes of `layout`; inherited by
            forked workers, pickled for spawned ones.
        layout: (shape, dtype) of each array.
        processes: number of workers.
        slots: calls that may be under way at the same time.

    Raises:
        RuntimeError: if the workers cannot be started.
    """

    def __init__(self, work: Work, layout: Layout, processes: int, slots: int):
        context = multiprocessing.get_context(_START)
        self._views: list[list[np.ndarray]] = []
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        buffers = []
        for slot in range(slots):
            # Unnamed shared memory: nothing is left behind, however the process ends.
            buffers.append(context.RawArray("B", _size(layout)))
            self._views.append(_views(buffers[-1], layout))
            self._free.put(slot)
        self._executor = ProcessPoolExecutor(
            processes,
            mp_context=context,
            initializer=_start,
            initargs=(work, layout, buffers),
        )
        with warnings.catch_warnings():
            # Python and JAX warn of forks beside threads: a lock may be held for ever
            # in the child. The workers run NumPy, OpenCV and the user's functions
            # only, and they are all forked here, before training starts its threads.
            warnings.filterwarnings("ignore", ".*fork", RuntimeWarning)
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            try:
                self._executor.submit(os.getpid).result()
            except Exception as error:
                raise RuntimeError(
                    f"The worker processes could not be started ({error!r}). What they "
                    "work on must be picklable where processes are spawned, and the "
                    "script must guard its entry with `if __name__ == '__main__'`. "
                    "Threads need neither: use_multiprocessing=False."
                ) from error

    def __call__(self, *args: Any) -> list[np.ndarray]:
        """Fresh copies of the arrays of `work(*args)`.

        Raises:
            RuntimeError: if a worker died, before or during this call.
            Exception: what `work` raised, with the traceback of the worker.
        """
        slot, task = self._free.get(), None
        try:
            task = self._executor.submit(_run, slot, args)
            if not wait([task], _PATIENCE).done:
                warnings.warn(
                    f"A worker process has been busy for {_PATIENCE} s with one batch. "
                    "TensorFlow, JAX and PyTorch hang in forked processes: sources and "
                    "augmentations must do without them, or use "
                    "use_multiprocessing=False.",
                    stacklevel=2,
                )
            task.result()
            return [view.copy() for view in self._views[slot]]
        except BrokenProcessPool as error:
            raise RuntimeError(
                "A worker process of the sampler died: it was killed (often for want "
                "of memory) or crashed in native code. No further batches come from "
                "this sampler; make a new one, with fewer workers if memory was short, "
                f"or with use_multiprocessing=False to see the cause. ({error})"
            ) from error
        finally:
            if task is None or task.done():
                self._free.put(slot)
            else:  # Ctrl-C while the worker still writes there
                task.add_done_callback(lambda _: self._free.put(slot))

    def close(self) -> None:
        """Ends the workers; calls after this fail."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _size(layout: Layout) -> int:
    sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout]
    return sum(size + _ALIGN for size in sizes) + _ALIGN


def _views(buffer: Any, layout: Layout) -> list[np.ndarray]:
    """Arrays of `layout` inside `buffer`, one after the other."""
    memory, views, offset = np.frombuffer(buffer, np.uint8), [], 0
    for shape, dtype in layout:
        size = int(np.prod(shape)) * dtype.itemsize
        views.append(memory[offset : offset + size].view(dtype).reshape(shape))
        offset += -(-size // _ALIGN) * _ALIGN
    return views


# What a worker process holds; set once by its initializer.
_work: Work
_slots: list[list[np.ndarray]]


def _start(work: Work, layout: Layout, buffers: Sequence[Any]) -> None:
    global _work, _slots
    _work, _slots = work, [_views(buffer, layout) for buffer in buffers]
    # Ctrl-C reaches the whole process group; the parent decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    if "cv2" in sys.modules:
        # OpenCV's threads do not survive a fork, and the workers are the parallelism.
        sys.modules["cv2"].setNumThreads(0)


def _leave_with_parent() -> None:
    """Ends this worker when its parent is gone, even if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    # The sentinel alone is not enough: forked siblings hold its other end open too.
    pid = os.getppid()
    while os.getppid() == pid:
        if multiprocessing.connection.wait([parent.sentinel], timeout=1):
            break
    os._exit(1)


def _run(slot: int, args: Sequence[Any]) -> None:
    try:
        for view, array in zip(_slots[slot], _work(*args), strict=True):
            view[...] = array
    except BaseException as error:
        # An exception that cannot travel would break the whole pool, and SystemExit
        # would end a thread of the parent in silence.
        try:
            travels = isinstance(pickle.loads(pickle.dumps(error)), Exception)
        except Exception:
            travels = False
        if travels:
            raise
        raise RuntimeError(
            f"A worker process of the sampler failed:\n{traceback.format_exc()}"
        ) from None


class LookAhead:
    """Threads that make the next results while the caller works on the last one.

    For a caller that asks from one thread: on JAX and PyTorch Keras takes batches in
    the training thread, between the steps, and its own threads put the first `fit` a
    batch ahead. What is asked for out of order is made on the spot.

    Args:
        threads: number of threads, and of results kept ready.
    """

    def __init__(self, threads: int):
        self._executor = ThreadPoolExecutor(threads, "kerastrip")
        self._ready: dict[Any, Future] = {}
        self._due: Any = None

    def __call__(self, make: Callable[..., Any], run: Sequence, start: bool) -> Any:
        """`make(*run[0])`, and a beginning of the rest of `run`.

        Args:
            make: pure function.
            run: what is asked for now and, most likely, after that.
            start: whether an orderly run begins here.
        """
        if not start and run[0] != self._due:
            return make(*run[0])
        self._due = run[1]
        for stale in self._ready.keys() - set(run):
            self._ready.pop(stale).cancel()
        for key in run:
            if key not in self._ready:
                self._ready[key] = self._executor.submit(make, *key)
        return self._ready.pop(run[0]).result()


class InFlight:
    """Counts calls that are under way; at exit it stops new ones and waits.

    After Ctrl-C TensorFlow's prefetch thread asks for batches until the interpreter is
    gone, and a Python call from such a thread during finalisation hangs the process.
    """

    def __init__(self) -> None:
        self._running = 0
        self._used = self._closing = False
        self._idle = threading.Condition()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """One call; RuntimeError when the process is ending."""
        with self._idle:
            if self._closing:
                raise RuntimeError("The process is ending: no more batches.")
            self._running += 1
            self._used = True
        try:
            yield
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def close(self, timeout: float = 5.0) -> None:
        """Stops new calls, waits for those under way and frees abandoned iterators."""
        with self._idle:
            self._closing = True
            self._idle.wait_for(lambda: self._running == 0, timeout)
        if not self._used:
            return
        # The traceback of an uncaught error holds the iterator of `fit`. Freed now, it
        # joins its threads while they can still run Python.
        for name in ("last_exc", "last_value", "last_traceback"):
            if hasattr(sys, name):
                setattr(sys, name, None)
        gc.collect()


in_flight = InFlight()
atexit.register(in_flight.close)
