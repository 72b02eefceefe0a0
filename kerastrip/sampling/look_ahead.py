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
    """In a fork: the threads and workers of the parent are not here."""
    for each in list(inherited):
        each.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parent)


class LookAhead:
    """Has the next batches begun while the caller works on the last one.

    Keras has threads for that, but they stay for ever, with the batches in their queue,
    when `stop_training` or an error ends an epoch early, and on JAX and PyTorch they put
    the first `fit` a batch ahead. The threads of `in_thread` end when they have no work.

    The order of the steps is known in two cases: they come one after the other, or Keras
    has shuffled them. It shuffles by the module `random`, straight after it has asked
    for their number, so the same shuffle can be made here. In any other order a batch is
    made when it is asked for: only speed depends on it.

    Args:
        steps: length of an epoch.
        ahead: batches under way or ready, beyond the one that was asked for.
        endless: whether the epoch after this one has batches of its own.
    """

    def __init__(self, steps: int, ahead: int, endless: bool):
        self._ahead, self._endless = ahead, endless
        self._order: Sequence[int] = range(steps)  # of this epoch
        self._due = 0  # the place in it whose step is expected next
        self._asked = 0  # steps since Keras asked for their number
        self._dice: Any = None  # the state of `random` when it asked
        self.forget()
        inherited.add(self)

    def forget(self) -> None:
        """Begins with nothing under way: no thread of the parent works in a fork."""
        self._ready: dict[tuple[int, int], Any] = {}
        self._lock = threading.Lock()

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
        """This step and the steps that follow it, as far as they are known.

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
        # The same shuffle as Keras makes, from the state that it was about to use.
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

    OpenCV keeps memory for every thread that has ever resized or warped an image, so a
    thread for each batch would lose some of it with each.
    """

    def __init__(self) -> None:
        self.forget()
        inherited.add(self)

    def forget(self) -> None:
        """Begins without threads: a fork does not copy them."""
        self._lock = threading.Lock()
        self._free: list[queue.SimpleQueue] = []  # of each thread without work

    def run(self, task: Callable[[], None]) -> None:
        """Runs `task`, which raises nothing, in a thread that has nothing else to do."""
        with self._lock:
            tasks = self._free.pop() if self._free else None
        if tasks is None:
            # Not an executor: it would be joined at exit, however long a batch takes.
            tasks = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(tasks,), daemon=True).start()
        tasks.put(task)

    def _work(self, tasks: queue.SimpleQueue) -> None:
        while True:
            try:
                tasks.get(timeout=_IDLE)()  # in no variable: a task holds its batch
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
        """Begins with no calls: in a fork those of other threads never end."""
        self._running = 0
        self._idle = threading.Condition()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """One call; `Ending` when the process is ending."""
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
