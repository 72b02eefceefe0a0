"""The persistent worker pool behind PKSampler, and a clean end of the process.

Processes are forked once, when the pool is made, and inherit what they work on; where
there is no safe fork (macOS, Windows) they are spawned and it is pickled once. Results
travel through shared memory that was laid out beforehand, which is several times
cheaper than a pipe: the worker writes a batch there, and who asked for it gets it where
it lies. The place is used again when the last array over it is gone.

A worker is asked for its next batch before it has done the last, so that it need not
wait for the process that trains, nor that one for a thread of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from kerastrip.sources._turns import own_files

Layout = Sequence[tuple[tuple[int, ...], np.dtype]]
Work = Callable[..., Sequence[np.ndarray]]

_ALIGN = 64
_PLACES = 3  # of a worker for a batch: one lent, one written, one for the next
_PATIENCE = 60.0
# Tasks are done in order, so one that was left out was received when Ctrl-C came.
_LOST = RuntimeError("A batch was lost to an interrupt."), ""
_START = "fork" if sys.platform.startswith("linux") else "spawn"


class WorkerPool:
    """Processes that run `work(*args, out=arrays)` and return the arrays.

    Calls may come from any number of threads; each goes to the worker with the least to
    do. (The pools of the standard library join their workers when the process ends, and
    so hang with a worker that hangs.)

    Args:
        work: writes into arrays of `layout`; inherited by forked workers, pickled for
            spawned ones.
        layout: (shape, dtype) of each array.
        processes: number of workers.

    Raises:
        RuntimeError: if the workers cannot be started.
    """

    def __init__(self, work: Work, layout: Layout, processes: int):
        self._closed = False
        self._death: _Died | None = None  # of any of them, after which all is over
        self._workers: list[_Worker] = []
        context = multiprocessing.get_context(_START)
        try:
            with warnings.catch_warnings():
                # Python and JAX warn of forks beside threads: a lock may be held for
                # ever in the child. The workers run NumPy, OpenCV and the user's
                # functions only, and they are forked before training has threads.
                warnings.filterwarnings("ignore", ".*fork", RuntimeWarning)
                warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
                for _ in range(processes):
                    self._workers.append(_Worker(context, work, layout))
            for worker in self._workers:
                worker.receive()
        except Exception as error:
            self.close()
            raise RuntimeError(
                f"The worker processes could not be started: {error!r}. What they "
                "work on must be picklable where processes are spawned, and the "
                "script must guard its entry with `if __name__ == '__main__'`. "
                "Threads need neither: use_multiprocessing=False."
            ) from error

    def __call__(self, *args: Any) -> list[np.ndarray]:
        """The arrays that `work(*args, out=arrays)` wrote; they are the caller's.

        Raises:
            RuntimeError: if the worker died or the pool was closed.
            Exception: what `work` raised, with the traceback of the worker.
        """
        with self._alive():
            worker = self._idlest()[0]
            while (task := worker.ask(args)) is None:
                worker.wait(lambda: worker.spare > 0)
        return self._result(worker, task)

    def begin(self, *args: Any) -> Callable[[], list[np.ndarray]] | None:
        """Asks for what a call gives, without waiting for it.

        Returns:
            A function that waits, to be called once at most, and returns or raises what
            a call would; None if the workers have enough to do.
        """
        with self._alive():
            for worker in self._idlest():
                if task := worker.ask(args, left=1):
                    return partial(self._result, worker, task)
        return None

    def _idlest(self) -> list[_Worker]:
        """The workers, those with least to do first."""
        for worker in self._workers:
            worker.collect()
        return sorted(self._workers, key=_Worker.load)

    def _result(self, worker: _Worker, task: _Task) -> list[np.ndarray]:
        with self._alive():
            worker.wait(lambda: task.done)
        if task.failure is not None:
            raised, told = task.failure
            raise raised from _InWorker(told)
        return task.arrays

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        """Says what happened if a worker died."""
        try:
            if self._death is not None:
                raise self._death
            yield
        except _Died as error:
            self._death = error
            if self._closed:
                raise RuntimeError("The workers of the sampler were closed.") from error
            raise RuntimeError(
                f"A worker process of the sampler died ({error}): it was killed (often "
                "for want of memory) or crashed in native code. Make a new sampler, with fewer "
                "workers if memory was short, or with use_multiprocessing=False to see "
                "the cause."
            ) from error

    def close(self) -> None:
        """Ends the workers, whatever they do; calls after this fail."""
        self._closed = True
        for worker in self._workers:
            worker.process.kill()


class _Task:
    """What a worker was asked for, and what came of it."""

    def __init__(self, place: int):
        self.place = place
        self.done = False
        self.arrays: list[np.ndarray] = []
        self.failure: tuple[Exception, str] | None = None  # and its traceback


class _Worker:
    """One process, the pipe to it and its places in shared memory."""

    def __init__(self, context: Any, work: Work, layout: Layout):
        # Unnamed shared memory: nothing is left behind, however the process ends.
        self._layout = layout
        self._places = [context.RawArray("B", _size(layout)) for _ in range(_PLACES)]
        # A place is here, has a task or is lent. There is always one here or with a
        # task, so whoever wants one gets one.
        self._spare = list(range(_PLACES))
        self._tasks: dict[int, _Task] = {}
        self._asked = 0
        self._asking, self._waiting = threading.Lock(), threading.Lock()
        self._pipe, far_end = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(work, layout, self._places, far_end), daemon=True
        )
        self.process.start()
        far_end.close()

    @property
    def spare(self) -> int:
        """Places that nobody uses."""
        return len(self._spare)

    def load(self) -> tuple[int, int, int]:
        """Tasks that are not done, places in use, tasks that there have been."""
        return len(self._tasks), _PLACES - self.spare, self._asked

    def ask(self, args: Sequence[Any], left: int = 0) -> _Task | None:
        """Sends a task; None if no more than `left` places are spare."""
        with self._asking:
            if len(self._spare) <= left:
                return None
            self._asked += 1
            task = self._tasks[self._asked] = _Task(self._spare.pop())
            # If there is nobody to take it, who waits for it is told.
            with contextlib.suppress(OSError):
                self._pipe.send((self._asked, task.place, args))
        return task

    def wait(self, condition: Callable[[], bool]) -> None:
        """Receives what the process has done until `condition` holds; _Died if it ends."""
        while not condition():
            with self._waiting:
                if not condition():  # after those who waited before
                    self.receive()

    def collect(self) -> None:
        """Receives what the process has done already, needed or not."""
        if self._waiting.acquire(blocking=False):  # else somebody is about to
            try:
                while self._pipe.poll():
                    self.receive()
            finally:
                self._waiting.release()

    def receive(self) -> None:
        """Waits for one word of the process: that it can work, or what came of a task."""
        ready: Sequence = ()
        while self._pipe not in ready:
            ready = wait([self._pipe, self.process.sentinel], _PATIENCE)
            if not ready:
                warnings.warn(
                    f"A worker process has been busy for {_PATIENCE} s with one batch. "
                    "TensorFlow, JAX and PyTorch hang in forked processes: sources and "
                    "augmentations must do without them, or use "
                    "use_multiprocessing=False.",
                    stacklevel=5,
                )
            elif self._pipe not in ready:
                raise self._died()
        try:
            number, failure = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        for each in list(self._tasks):
            if each > number:
                break
            task = self._tasks.pop(each)
            task.failure = failure if each == number else _LOST
            if task.failure is None:
                task.arrays = self._arrays(task.place)
            else:
                self._spare.append(task.place)
            task.done = True

    def _arrays(self, place: int) -> list[np.ndarray]:
        """What was written, lent if there is another place to write, or copied."""
        memory = np.frombuffer(self._places[place], np.uint8)
        views = _views(memory, self._layout)
        # Every array over the memory keeps `memory` alive.
        weakref.finalize(memory, self._spare.append, place).atexit = False
        return views if self._spare else [view.copy() for view in views]

    def _died(self) -> _Died:
        self.process.join(1)
        return _Died(f"exit code {self.process.exitcode}")


class _Died(Exception):
    """The process of a worker is gone."""


class _InWorker(Exception):
    """The traceback of an error in a worker process."""


def _size(layout: Layout) -> int:
    sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout]
    return sum(size + _ALIGN for size in sizes) + _ALIGN


def _views(memory: np.ndarray, layout: Layout) -> list[np.ndarray]:
    """Arrays of `layout` inside `memory`, one after the other."""
    views, offset = [], 0
    for shape, dtype in layout:
        size = int(np.prod(shape)) * dtype.itemsize
        views.append(memory[offset : offset + size].view(dtype).reshape(shape))
        offset += -(-size // _ALIGN) * _ALIGN
    return views


def _serve(work: Work, layout: Layout, places: Sequence, pipe: Any) -> None:
    """What a worker process does all its life."""
    own_files()
    # Ctrl-C reaches the whole process group; the parent decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    if "cv2" in sys.modules:
        # OpenCV's threads do not survive a fork, and the workers are the parallelism.
        sys.modules["cv2"].setNumThreads(0)
    outs = [_views(np.frombuffer(place, np.uint8), layout) for place in places]
    number, failure = 0, None
    while True:
        pipe.send((number, failure))
        number, place, args = pipe.recv()
        try:
            work(*args, out=outs[place])
            failure = None
        except BaseException as error:
            failure = _portable(error), traceback.format_exc()


def _portable(error: BaseException) -> Exception:
    """The error, if it survives pickling and ends no thread in silence."""
    with contextlib.suppress(Exception):
        if isinstance(copy := pickle.loads(pickle.dumps(error)), Exception):
            return copy
    return RuntimeError(f"A worker process of the sampler failed: {error!r}")


def _leave_with_parent() -> None:
    """Ends this worker when its parent is gone, even if that was killed."""
    parent: Any = multiprocessing.parent_process()
    pid = os.getppid()
    # The sentinel alone is not enough: forked siblings hold its other end open too.
    while os.getppid() == pid:
        if wait([parent.sentinel], timeout=1):
            break
    os._exit(1)


class LookAhead:
    """Has the next batches begun while the caller works on the last one.

    Keras' own threads stay for ever, with the batches in their queue, when
    `stop_training` or an error ends an epoch early; on JAX and PyTorch they put the
    first `fit` a batch ahead. Those of `in_thread` end when their batch is made.

    Keras shuffles the steps by the module `random`, straight after it has asked for
    their number, so the order can be foreseen. Where it cannot, batches are made when
    they are asked for: nothing but speed depends on it.

    Args:
        steps: length of an epoch.
        ahead: batches under way or ready, beyond the one that was asked for.
        endless: whether the epoch after this one has batches of its own.
    """

    def __init__(self, steps: int, ahead: int, endless: bool):
        self._ahead, self._endless = ahead, endless
        self._ready: dict[tuple[int, int], Any] = {}
        self._lock = threading.Lock()
        self._order: Sequence[int] = range(steps)
        self._due = self._asked = 0
        self._dice: Any = None

    def expect_shuffle(self) -> None:
        """To be called when Keras asks for the number of steps."""
        with self._lock:
            self._dice, self._asked = random.getstate(), 0

    def __call__(self, begin: Callable[..., Any], step: int, epoch: int) -> Any:
        """What was begun for a step, and a beginning of what comes after it.

        Args:
            begin: (step, epoch) -> a batch that is under way, or None if it cannot be
                begun now.
            step, epoch: of the batch that is needed.

        Returns:
            What `begin` gave for it, now or earlier. None: nothing is under way.
        """
        with self._lock:
            run = self._run(step, epoch)
            if len(run) > 1:
                for key in self._ready.keys() - set(run):
                    del self._ready[key]
                for key in run:
                    if key not in self._ready:
                        begun = begin(*key)
                        if begun is None:
                            break
                        self._ready[key] = begun
            return self._ready.pop((step, epoch), None)

    def _run(self, step: int, epoch: int) -> list[tuple[int, int]]:
        """This step and those that follow it, as far as can be told."""
        steps, asked = len(self._order), self._asked
        self._asked += 1
        if step != self._order[self._due]:
            if step == 0:
                self._order, self._due = range(steps), 0
            elif self._dice is not None and asked < steps:
                shuffled, chance = list(range(steps)), random.Random()
                chance.setstate(self._dice)
                chance.shuffle(shuffled)
                self._dice = None
                if step != shuffled[asked]:
                    return [(step, epoch)]
                self._order, self._due = shuffled, asked
            else:
                return [(step, epoch)]
        places = range(self._due, self._due + self._ahead + 1)
        self._due = places[1] % steps
        if isinstance(self._order, list):  # the next epoch is shuffled anew
            places = range(places[0], min(places[-1] + 1, steps))
        return [
            (self._order[place % steps], epoch + place // steps * self._endless)
            for place in places
        ]


def in_thread(make: Callable[..., Any], *args: Any) -> Future:
    """`make(*args)`, in a thread that nobody waits for at exit."""
    future: Future = Future()

    def fulfil() -> None:
        try:
            future.set_result(make(*args))
        except BaseException as error:
            future.set_exception(error)

    # Not an executor: it would be joined at exit, however long a batch takes.
    threading.Thread(target=fulfil, daemon=True).start()
    return future


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
