"""Who may read at the same time: threads take turns, processes open files anew.

A data set that keeps a file open has a single offset in it. If one thread seeks while
another reads, the second gets a wrong sample, without any error. Two objects may share a
file (the halves of a random split do), so there is one lock for all objects that are not
known to be safe.

A forked process has a copy of every object but shares the offset of every open file
with its parent and siblings. The copy gets descriptions of its own:

    parent      fd 7 -> offset 512 (at the fork)        fd 7 -> offset 512
    child       fd 7 ----^                      becomes fd 7 -> offset 512 of its own
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from typing import Any

from kerastrip import _checks

_PATIENCE = 60.0  # seconds that a thread waits for its turn before it warns
_BEFORE_FORK = 5.0  # seconds that a fork waits for a read to end
_ACCESS = os.O_RDONLY | os.O_WRONLY | os.O_RDWR

_lock = threading.RLock()  # re-entrant: a source may read another
_taken = False  # whether anybody ever took a turn
_files: list[tuple[int, int, int]] = []  # (descriptor, access, offset) at the fork


def is_safe(x: Any) -> bool:
    """Whether threads may read `x` at the same time.

    zarr documents it for its arrays. Any object can state it by an attribute
    `thread_safe = True`. The sources of this package keep nothing between two calls.
    """
    if getattr(x, "thread_safe", False) is True:
        return True
    code = getattr(type(x), "take", x)  # a subclass may have one of its own
    module = getattr(code, "__module__", None) or ""
    return module.partition(".")[0] in ("kerastrip", "zarr")


@contextlib.contextmanager
def turn(safe: bool = False) -> Iterator[None]:
    """Within it, no other thread reads an object that is not known to be safe.

    Args:
        safe: True if the object is known to be safe: then the thread need not wait.
    """
    global _taken
    if safe:
        yield
        return
    lock, _taken = _lock, True  # the lock of this process, even if it forks meanwhile
    if not lock.acquire(timeout=_PATIENCE):
        _checks.warn(
            f"A thread has waited {_PATIENCE:.0f} s to read samples, because another "
            "thread reads a data set that is not known to be safe for threads. Where "
            "its reads may overlap, give the data set an attribute thread_safe = True.",
        )
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, called by one thread at a time unless it is safe; can be pickled."""
    return function if is_safe(function) else _Alone(function)


class _Alone:
    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        with turn():
            return self._function(*args)


# -- processes -------------------------------------------------------------------


def own_files() -> None:
    """Gives a forked process offsets of its own in the files that it inherited.

    Call it before the process reads anything. A spawned process inherits no files.
    """
    while _files:
        descriptor, access, offset = _files.pop()
        try:
            own = os.open(f"/proc/self/fd/{descriptor}", access)
            os.lseek(own, offset, os.SEEK_SET)
            os.dup2(own, descriptor, os.get_inheritable(descriptor))
            os.close(own)
        except OSError as error:
            _checks.warn(
                f"A worker process cannot open a file anew that is open in its parent "
                f"({error}). If the samples come from it, use threads: "
                "use_multiprocessing=False.",
            )


def _before_fork() -> None:
    """Waits for the thread that reads, so that no fork begins in the middle of a read."""
    global _files
    if _taken:
        _lock.acquire(timeout=_BEFORE_FORK)
        _files = _open_files()


def _in_parent() -> None:
    _files.clear()
    with contextlib.suppress(RuntimeError):  # `_before_fork` did not get the lock
        _lock.release()


def _in_child() -> None:
    global _lock
    # The thread that held the lock is not in this process: nobody would release it.
    _lock = threading.RLock()


def _open_files() -> list[tuple[int, int, int]]:
    """The regular files that this process has open for reading."""
    if not os.path.isdir("/proc/self/fd"):
        return []
    import fcntl

    files = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            descriptor = int(name)
            access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & _ACCESS
            regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            if descriptor > 2 and regular and access != os.O_WRONLY:
                offset = os.lseek(descriptor, 0, os.SEEK_CUR)
                files.append((descriptor, access, offset))
    return files


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child
    )
