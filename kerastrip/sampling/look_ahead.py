"""The next batches, under way while the caller works on the last one."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

__all__ = [
    "Ending",
    "InFlight",
    "LookAhead",
    "in_thread",
]

_IDLE = 5.0  # seconds for which a thread waits for work
# Objects whose threads or processes stay with the parent when this process is forked.
inherited: weakref.WeakSet = weakref.WeakSet()


def _forget_parent() -> None:
    """In a fork: forgets the threads and workers, which stay with the parent."""
    for each in list(inherited):
        each.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)


class LookAhead:
    """Has the next batches begun while the caller works on the last one.

    Keras has threads for this purpose. But when `stop_training` or an error ends an epoch
    early, these threads stay for ever, with the batches in their queue, and on JAX and
    PyTorch they put the first `fit` a batch ahead. The threads of `in_thread` end when
    they have no work.

    The next steps are known in two cases: the steps come in order, or Keras has shuffled
    them. Keras shuffles by the module `random`, straight after it has asked for the
    number of steps, so the same shuffle can be repeated here. In any other order each
    batch is made when it is asked for. The batches are the same; only speed is lost.

    Args:
        steps: length of an epoch.
        ahead: how many batches are under way or ready, beside the one asked for.
        endless: whether the epoch after this one has batches of its own.
    """

    def __init__(self, steps: int, ahead: int, endless: bool):
        self._ahead, self._endless = ahead, endless
        self._order: Sequence[int] = range(steps)  # of this epoch
        self._due = 0  # the place in `_order` whose step is expected next
        self._asked = 0  # steps asked for since Keras asked for the number of steps
        self._dice: Any = None  # the state of `random` when Keras asked for the number
        self.forget()
        inherited.add(self)

    def forget(self) -> None:
        """Begins with nothing under way: the threads of the parent do not run in a fork."""
        self._ready: dict[tuple[int, int], Any] = {}
        self._lock = threading.Lock()

    def expect_shuffle(self) -> None:
        """Notes the state of `random`; call it when Keras asks for the number of steps."""
        with self._lock:
            self._dice, self._asked = random.getstate(), 0

    def __call__(self, begin: Callable[..., Any], step: int, epoch: int) -> Any:
        """The batch of a step, as far as it is begun; begins the batches that follow.

        Args:
            begin: (step, epoch) -> a batch that is under way, or None if it cannot be
                begun now.
            step, epoch: of the batch that is needed.

        Returns:
            What `begin` returned for this step, now or earlier; None if the batch is not
            under way.
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
        """(step, epoch) of this step and of the steps that follow, as far as known.

        With 5 steps, two ahead, in order: step 3 of epoch 0 gives (3, 0), (4, 0), (0, 1).
        In an epoch that is shuffled to 4 1 3 0 2, step 3 gives (3, 0), (0, 0), (2, 0),
        and step 0 gives (0, 0), (2, 0), as the next epoch is shuffled anew.
        """
        steps, first = len(self._order), self._place(step)
        if first is None:
            return [(step, epoch)]
        self._due = (first + 1) % steps
        places = range(first, first + self._ahead + 1)
        if isinstance(self._order, list):
            places = range(first, min(places.stop, steps))
        return [
            (self._order[place % steps], epoch + place // steps * self._endless)
            for place in places
        ]

    def _place(self, step: int) -> int | None:
        """Where a step stands in the order of its epoch; None if that is not known."""
        steps, asked = len(self._order), self._asked
        self._asked += 1
        if step == self._order[self._due]:
            return self._due
        if step == 0:  # an epoch in order begins
            self._order = range(steps)
            return 0
        if self._dice is None or asked >= steps:
            return None
        # The same shuffle as Keras makes, from the state of `random` that Keras had.
        shuffled, chance = list(range(steps)), random.Random()
        chance.setstate(self._dice)
        chance.shuffle(shuffled)
        self._dice = None
        if step != shuffled[asked]:
            return None
        self._order = shuffled
        return asked


class _Threads:
    """Threads that are used again, and end when there has been no work for a while.

    OpenCV keeps memory for every thread that has ever resized or warped an image. So with
    a new thread for each batch some memory would be lost at each batch.

        started by `run` -> works <-> waits in `_free` -> ends after `_IDLE` seconds
    """

    def __init__(self) -> None:
        self.forget()
        inherited.add(self)

    def forget(self) -> None:
        """Begins without threads: a fork does not copy them."""
        self._lock = threading.Lock()
        self._free: list[queue.SimpleQueue] = []  # the queues of threads without work

    def run(self, task: Callable[[], None]) -> None:
        """Runs `task`, which raises nothing, in a thread that has nothing else to do."""
        with self._lock:
            tasks = self._free.pop() if self._free else None
        if tasks is None:
            # An executor would be joined at exit, however long a batch takes. A daemon
            # thread is not.
            tasks = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(tasks,), daemon=True).start()
        tasks.put(task)

    def _work(self, tasks: queue.SimpleQueue) -> None:
        while True:
            try:
                # No variable refers to the task: it would keep the batch alive.
                tasks.get(timeout=_IDLE)()
            except queue.Empty:
                with self._lock:
                    if tasks in self._free:
                        self._free.remove(tasks)
                        return
                continue  # `run` has taken this thread: a task is on its way
            with self._lock:
                self._free.append(tasks)


_threads = _Threads()


def in_thread(make: Callable[..., Any], *args: Any) -> Future:
    """`make(*args)`, in a thread that nobody waits for at exit."""
    future: Future = Future()

    def fulfil() -> None:
        try:
            future.set_result(make(*args))
        except BaseException as error:
            future.set_exception(error)

    _threads.run(fulfil)
    return future


class Ending(RuntimeError):
    """The process is ending, so nobody wants more batches."""


class InFlight:
    """Counts calls that are under way; at exit it stops new ones and waits.

    After Ctrl-C TensorFlow's prefetch thread asks for batches until the interpreter is
    gone, and a Python call from such a thread during finalisation hangs the process.
    """

    def __init__(self) -> None:
        self._used = self._closing = False
        self.forget()
        inherited.add(self)

    def forget(self) -> None:
        """Begins with no calls: in a fork the calls of other threads never end."""
        self._running = 0
        self._idle = threading.Condition()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Counts one call; raises `Ending` when the process is ending."""
        with self._idle:
            if self._closing:
                raise Ending("The process is ending: no more batches.")
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
