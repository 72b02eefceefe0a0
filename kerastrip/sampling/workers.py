"""The persistent worker pool behind PKSampler, and a clean end of the process.

Processes are forked once, when the pool is made, and inherit the work and its data.
Where there is no safe fork (macOS, Windows) they are spawned, and the work is pickled
once. Results travel through shared memory of a fixed layout, which is several times
cheaper than a pipe: the worker writes a batch there, and the caller gets arrays over
the same memory. Each worker has three places for a batch. A place is in one of three
states, and these are all the ways between the states:

      ask()               receive(): the work is done
    +--------> has a task ----------------------------> lent to the caller
    |            |                                        |
    |            | receive(): the work failed, or its     | the last array over
    |            | answer was lost to Ctrl-C              | it has been freed
    |            v                                        v
    +--------- free <-------------------------------------+

A result is lent only while another place is free; otherwise the caller gets a copy, and
the place is free at once. So a caller that keeps every batch never stops a worker.

A worker is asked for its next batch before it has finished the last one. So the worker
never waits for the process that trains, and the process that trains needs no thread
that waits for the worker.

A fork copies only the thread that forks, but the locks of all threads: a lock that
another thread holds at that moment stays locked in the child for ever. Three things
guard against that. While it forks, the pool holds the locks that it knows: the locks of
`logging` handlers and of NumPy's global generator. The BLAS library of a worker has one
thread and needs no lock. A worker that does not answer and uses no processor time is
replaced by another fork; a batch is a pure function of its arguments, so only time is
lost.

The life of a pool (while the workers rest there are no processes; the next call forks
new ones):

    waits for its first call -> workers run <-> workers rest
                                     |               |
                                     +---> closed <--+
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import logging
import multiprocessing
import multiprocessing.process
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from kerastrip import _checks
from kerastrip.sampling.look_ahead import in_flight, inherited
from kerastrip.sources._turns import own_files

__all__ = [
    "WorkerPool",
]

_Layout = Sequence[tuple[tuple[int, ...], np.dtype]]
_Work = Callable[..., Sequence[np.ndarray]]

_ALIGN = 64
_PLACES = 3  # of each worker: one is lent, one is written, one is for the next batch
_PATIENCE = 60.0  # seconds of one batch, then a warning
_SILENCE = 10.0  # seconds without an answer and without processor time: it hangs
_FORKS = 3  # of a worker that hangs
_REST = 2.0  # seconds without a call, after which workers may make room for others
_PDEATHSIG = 1  # of prctl(2)
_START = "fork" if sys.platform.startswith("linux") else "spawn"


class WorkerPool:
    """Processes that run `work(*args, out=arrays)` and return the arrays.

    Calls may come from any number of threads; each call goes to the worker with the
    least to do. (The pools of the standard library are no use here: they wait for their
    workers when the process ends, so a worker that hangs would hang the process.)

    Keras never frees a sampler that has been through `fit`, and so never its pool.
    Therefore resting workers end when another pool starts its workers for the first
    time; they are forked again with the next call.

    Args:
        work: writes into arrays of `layout`; inherited by forked workers, pickled for
            spawned ones.
        layout: (shape, dtype) of each array.
        processes: number of workers.
        start: whether the workers start now. Default; else with the first call.

    Raises:
        RuntimeError: if the workers cannot be started.
    """

    def __init__(
        self, work: _Work, layout: _Layout, processes: int, *, start: bool = True
    ):
        self._work, self._layout, self._processes = work, layout, processes
        self._closed = self._started = False
        self._workers: list[_Worker] = []
        self.forget()
        inherited.add(self)
        if start:
            self._start()

    def forget(self) -> None:
        """Begins without workers: in a fork, the workers belong to the parent process."""
        for worker in self._workers:
            # `multiprocessing` would end the parent's workers when this process ends.
            multiprocessing.process._children.discard(worker.process)  # type: ignore
        self._workers = []
        self._death: _Died | None = None  # of any worker; all later calls raise it
        self._lock = threading.RLock()
        self._calls = 0  # under way
        self._last_call: float | None = None

    def _start(self) -> None:
        if not self._started:
            for other in list(inherited):
                if isinstance(other, WorkerPool) and other is not self:
                    other.rest()
        self._started = True
        context = multiprocessing.get_context(_START)
        make = partial(_Worker, context, self._work, self._layout)
        try:
            for _ in range(self._processes):
                self._workers.append(make())
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

    def rest(self) -> None:
        """Ends the workers if they have worked and nobody needs them now."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            last = self._last_call
            if not self._calls and last and time.monotonic() - last > _REST:
                workers, self._workers = self._workers, []
                for worker in workers:
                    worker.end()
        finally:
            self._lock.release()

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
        """Gives a worker a task without waiting for the result.

        Returns:
            A function that waits for the result, and returns or raises what a call of the
            pool would; call it at most once. None if the workers have enough to do.
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
        if not task.done():
            with self._alive():
                if worker not in self._workers:
                    return self(*task.args)  # the worker rested before it was done
                worker.wait(task.done)
        return task.result()

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        """Counts a call and starts resting workers; explains the death of a worker."""
        with self._lock:
            self._calls += 1
        try:
            with self._lock:
                if self._closed or self._death is not None:
                    raise self._death or _Died("closed")
                if not self._workers:
                    self._start()
            yield
        except _Died as error:
            self._death = error
            if self._closed:
                words = "The workers of the sampler were closed."
                raise RuntimeError(words) from None
            raise RuntimeError(f"A worker process of the sampler {error}") from error
        finally:
            with self._lock:
                self._calls -= 1
                self._last_call = time.monotonic()

    def close(self) -> None:
        """Ends the workers, whatever they do; calls after this fail."""
        self._closed = True
        for worker in self._workers:
            worker.process.kill()


class _Task(Future):
    """A batch that a worker was asked for; the result of the future are its arrays."""

    def __init__(self, place: int, args: Sequence[Any]):
        super().__init__()
        self.place, self.args = place, args


class _Worker:
    """One process, the pipe to it and its places in shared memory."""

    def __init__(self, context: Any, work: _Work, layout: _Layout):
        # Unnamed shared memory: nothing is left behind, however the process ends.
        self._context, self._work, self._layout = context, work, layout
        self._places = [context.RawArray("B", _size(layout)) for _ in range(_PLACES)]
        # The states of a place are drawn at the top of this file. `_spare` holds the free
        # places, `_tasks` the tasks by their numbers, each with its place; all other
        # places are lent. Never are all places lent, so whoever waits for one gets it.
        self._spare = list(range(_PLACES))
        self._tasks: dict[int, _Task] = {}
        self._asked = self._forks = 0  # how many tasks, and processes, there have been
        self._has_worked = False
        # Only one thread sends at a time, and only one receives. A thread may send while
        # another receives.
        self._asking, self._waiting = threading.Lock(), threading.Lock()
        self._start()

    def _start(self) -> None:
        """Starts the process and sends it all tasks that are not done yet."""
        self._forks += 1
        self._pipe, far_end = self._context.Pipe()
        # Linux tells a process of the end of the thread that forked it, and only the
        # main thread is sure to live as long as its process.
        watched = threading.current_thread() is threading.main_thread()
        args = self._work, self._layout, self._places, far_end, watched
        self.process = self._context.Process(target=_serve, args=args, daemon=True)
        with _locks_held(), warnings.catch_warnings():
            # Python and JAX warn of forks beside threads. The workers run NumPy, OpenCV
            # and the user's functions only; locks are treated at the top of this file.
            warnings.filterwarnings("ignore", ".*fork", RuntimeWarning)
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            self.process.start()
        far_end.close()
        for number, task in self._tasks.items():
            self._send(number, task)

    def _send(self, number: int, task: _Task) -> None:
        # The process may be gone. The thread that waits for the task finds that out.
        with contextlib.suppress(OSError):
            self._pipe.send((number, task.place, task.args))

    def end(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.join(1)

    @property
    def spare(self) -> int:
        """Places that nobody uses."""
        return len(self._spare)

    def load(self) -> tuple[int, int, int]:
        """Sorts workers: tasks not done, then places in use, then tasks ever given."""
        return len(self._tasks), _PLACES - self.spare, self._asked

    def ask(self, args: Sequence[Any], left: int = 0) -> _Task | None:
        """Sends a task; None if no more than `left` places are spare."""
        with self._asking:
            if len(self._spare) <= left:
                return None
            self._asked += 1
            task = self._tasks[self._asked] = _Task(self._spare.pop(), args)
            self._send(self._asked, task)
        return task

    def wait(self, condition: Callable[[], bool]) -> None:
        """Receives results until `condition` holds; _Died if the process ends before."""
        while not condition():
            with self._waiting:
                if not condition():  # threads before this one may have received it
                    self.receive()

    def collect(self) -> None:
        """Receives all results that are ready, so that their tasks count as done."""
        if self._waiting.acquire(blocking=False):  # else another thread receives
            try:
                while self._pipe.poll():
                    self.receive()
            finally:
                self._waiting.release()

    def receive(self) -> None:
        """Waits for one answer: the process is ready to work, or has done a task."""
        # `begun`: since when this call waits. `silent`: since when the process has used
        # no processor time.
        begun = silent = time.monotonic()
        used = _processor_time(self.process)
        while not (ready := self._ready()):
            now, before = time.monotonic(), used
            used = _processor_time(self.process)
            if used is None or used != before:
                silent = now
            elif now - silent >= _SILENCE * self._forks:
                self._replace()
                silent, used = now, _processor_time(self.process)
            if now - begun >= _PATIENCE:
                begun = now
                _checks.warn(
                    f"A worker process has been busy for {_PATIENCE} s with one batch. "
                    "TensorFlow, JAX and PyTorch hang in forked processes: sources and "
                    "augmentations must do without them, or use "
                    "use_multiprocessing=False.",
                )
        if self._pipe not in ready:
            raise self._died()
        try:
            number, failure = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        # Workers answer in order. If the answer to an earlier task is missing, Ctrl-C
        # interrupted this thread while it received that answer. (`list` is one step, so
        # it is safe while other threads add tasks.)
        for each in [each for each in list(self._tasks) if each <= number]:
            task = self._tasks.pop(each)
            if each == number and failure is None:
                task.set_result(self._arrays(task.place))
            else:
                lost = RuntimeError("A batch was lost to an interrupt.")
                self._spare.append(task.place)
                task.set_exception(_unpacked(*failure) if each == number else lost)
            self._has_worked = True

    def _ready(self) -> Sequence:
        """Waits a moment for an answer or the end of the process: what is ready."""
        seconds = min(_PATIENCE, _SILENCE / 4)
        return wait([self._pipe, self.process.sentinel], seconds)

    def _replace(self) -> None:
        """Forks a process in place of one that hangs: the lock may be free by now."""
        if self._forks < _FORKS:
            with self._asking:
                self.end()
                self._start()
        elif not self._has_worked:
            raise _Died(
                f"hangs: {_FORKS} forks in turn gave no batch and used no processor "
                "time. Most likely another thread holds a lock that sources or "
                "augmentations need. Make the sampler before such threads begin, or "
                "use use_multiprocessing=False."
            )

    def _arrays(self, place: int) -> list[np.ndarray]:
        """What the process wrote: lent if another place is free, otherwise copied."""
        memory = np.frombuffer(self._places[place], np.uint8)
        views = _views(memory, self._layout)
        # Every view, and every view of a view, keeps `memory` alive. When the last one is
        # gone the place is free again.
        weakref.finalize(memory, self._spare.append, place).atexit = False
        return views if self._spare else [view.copy() for view in views]

    def _died(self) -> _Died:
        self.process.join(1)
        return _Died(
            f"died (exit code {self.process.exitcode}): it was killed (often for want "
            "of memory) or crashed in native code. Make a new sampler, with fewer "
            "workers if memory was short, or with use_multiprocessing=False to see the "
            "cause."
        )


class _Died(Exception):
    """The process of a worker has ended, hangs, or was closed."""


class _InWorker(Exception):
    """The traceback of an error in a worker process."""


def _size(layout: _Layout) -> int:
    """Bytes of a place: the arrays, each rounded up to a whole number of `_ALIGN`."""
    sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout]
    return sum(size + _ALIGN for size in sizes) + _ALIGN


def _views(memory: np.ndarray, layout: _Layout) -> list[np.ndarray]:
    """Arrays of `layout` inside `memory`, one after the other."""
    views, offset = [], 0
    for shape, dtype in layout:
        size = int(np.prod(shape)) * dtype.itemsize
        views.append(memory[offset : offset + size].view(dtype).reshape(shape))
        offset += -(-size // _ALIGN) * _ALIGN
    return views


def _processor_time(process: Any) -> int | None:
    """Ticks of processor time that a process has used; None where /proc is missing."""
    try:
        with open(f"/proc/{process.pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[11]) + int(fields[12])  # in user and in system mode


@contextlib.contextmanager
def _locks_held() -> Iterator[None]:
    """Holds locks that a worker may need, so that nobody else does while it is forked.

    `logging` makes new locks for its handlers in a fork, but not for the streams that
    they write to. A stream is locked only while its handler is locked, so whoever holds
    the locks of all handlers knows that no stream is locked.
    """
    loggers = [logging.getLogger(), *list(logging.root.manager.loggerDict.values())]
    handlers = [
        handler for logger in loggers for handler in getattr(logger, "handlers", ())
    ]
    locks = [handler.lock for handler in dict.fromkeys(handlers) if handler.lock]
    with contextlib.ExitStack() as held:
        for lock in [*locks, _lock_of_numpy()]:
            if lock.acquire(timeout=1):
                held.callback(lock.release)
        yield


def _lock_of_numpy() -> Any:
    """The lock of the generator behind `np.random.rand` and its like."""
    return np.random.get_bit_generator().lock  # type: ignore[attr-defined]


def _serve(
    work: _Work, layout: _Layout, places: Sequence, pipe: Any, watched: bool
) -> None:
    """The main function of a worker process: it does tasks until it is killed."""
    own_files()
    # Ctrl-C reaches the whole process group; the parent decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if watched and sys.platform.startswith("linux"):
        # The kernel ends this process with its parent even while this one is stopped
        # (SIGSTOP), when the thread below does not run.
        with contextlib.suppress(Exception):
            ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with contextlib.suppress(RuntimeError):  # a spawned process does not hold it
        _lock_of_numpy().release()
    _have_one_thread()
    # The number 0 belongs to no task: it says that this process is ready.
    outs = [_views(np.frombuffer(place, np.uint8), layout) for place in places]
    number, failure = 0, None
    while True:
        pipe.send((number, failure))
        number, place, args = pipe.recv()
        try:
            work(*args, out=outs[place])
            failure = None
        except BaseException as error:
            failure = _packed(error)


def _have_one_thread() -> None:
    """Switches off threads of OpenCV and OpenBLAS, which do not survive a fork.

    The workers themselves are the parallelism.
    """
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "blas" in line}
        for path in paths:
            library = ctypes.CDLL(path)
            for before, after in itertools.product(("", "scipy_"), ("", "64_")):
                name = f"{before}openblas_set_num_threads{after}"
                if hasattr(library, name):
                    getattr(library, name)(1)


def _packed(error: BaseException) -> tuple[bytes, str, str]:
    """An error as bytes (empty if it cannot be pickled), as words, and its traceback."""
    try:
        packed = pickle.dumps(error)
    except Exception:
        packed = b""
    return packed, repr(error), traceback.format_exc()


def _unpacked(packed: bytes, words: str, trace: str) -> Exception:
    """The error that `_packed` took apart, or a RuntimeError with its words.

    A SystemExit becomes a RuntimeError too: a thread would end by it without a word.
    """
    error: Any = None
    with contextlib.suppress(Exception):
        error = pickle.loads(packed)
    if not isinstance(error, Exception):
        error = RuntimeError(f"A worker process of the sampler failed: {words}")
    error.__cause__ = _InWorker(trace)
    return error


def _leave_with_parent() -> None:
    """Ends this worker when its parent is gone, even if the parent was killed."""
    parent: Any = multiprocessing.parent_process()
    # The sentinel alone is not enough: forked siblings hold its other end open too. A
    # process whose parent is gone gets another parent, so that its number changes.
    while os.getppid() == parent.pid:
        if wait([parent.sentinel], timeout=1):
            break
    os._exit(1)


def _leave() -> None:
    """Waits for calls under way, then kills all workers.

    `multiprocessing` would wait at exit for a worker that is stopped (SIGSTOP).
    """
    in_flight.close()
    for each in list(inherited):
        if isinstance(each, WorkerPool):
            each.close()


atexit.register(_leave)
