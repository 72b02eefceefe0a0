"""The worker pool: right answers, and an end or an error in every bad case."""

import importlib.util
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kerastrip import _workers
from kerastrip._workers import InFlight, LookAhead, WorkerPool

pytestmark = pytest.mark.backend

LAYOUT = [((3, 4), np.dtype("float32")), ((5,), np.dtype("uint8"))]

# The pool needs no backend, and this one is there at once. Part of it needs JAX.
LIGHT = {"KERAS_BACKEND": "numpy"} if importlib.util.find_spec("jax") else {}


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def work(number, what=""):
    if what == "pid":
        number = os.getpid() % 251
    if what == "raise":
        raise ValueError(f"no batch for {number}")
    if what == "missing":
        raise FileNotFoundError("gone")
    if what == "awkward":
        raise Unpicklable("this", number)
    if what == "leave":
        sys.exit(3)
    if what == "shape":
        return [np.zeros((3, 5), "float32"), np.zeros(5, "uint8")]
    if what in ("slow", "hang"):
        time.sleep({"slow": 0.2, "hang": 1000}[what])
    return [np.full((3, 4), number, "float32"), np.arange(5, dtype="uint8") + number]


@pytest.fixture
def pool():
    pool = WorkerPool(work, LAYOUT, processes=2)
    yield pool
    pool.close()


def test_results_are_fresh_and_belong_to_their_call(pool):
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(pool, range(60)))
    for number, result in enumerate(results):
        for array, expected in zip(result, work(number), strict=True):
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)
    results[0][0][:] = -1
    np.testing.assert_array_equal(pool(1)[0], work(1)[0])
    np.testing.assert_array_equal(results[0][0], -1)


def test_the_work_is_done_elsewhere(pool):
    assert pool(0, "pid")[0][0, 0] != os.getpid() % 251


def test_spawned_workers_give_the_same(monkeypatch):
    for name, value in LIGHT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(_workers, "_START", "spawn")
    pool = WorkerPool(work, LAYOUT, processes=1)
    np.testing.assert_array_equal(pool(7)[1], work(7)[1])
    pool.close()


def test_work_that_cannot_be_sent_says_so(monkeypatch):
    monkeypatch.setattr(_workers, "_START", "spawn")
    with pytest.raises(RuntimeError, match=r"could not be started.*picklable"):
        WorkerPool(lambda: [], LAYOUT, processes=1)


def test_an_error_surfaces_and_the_pool_lives_on(pool):
    with pytest.raises(ValueError, match="no batch for 4") as raised:
        pool(4, "raise")
    assert "in work" in str(raised.value.__cause__)  # the worker's traceback
    with pytest.raises(
        RuntimeError, match=r"(?s)worker process.*Unpicklable.*this and 4"
    ):
        pool(4, "awkward")
    with pytest.raises(RuntimeError, match=r"worker process.*SystemExit\(3\)"):
        pool(4, "leave")
    with pytest.raises(ValueError, match="could not broadcast"):
        pool(4, "shape")
    np.testing.assert_array_equal(pool(1)[0], work(1)[0])


def test_a_worker_that_takes_for_ever_is_told_of(pool, monkeypatch):
    monkeypatch.setattr(_workers, "_PATIENCE", 0.02)
    with pytest.warns(UserWarning, match=r"busy for 0.02 s.*forked"):
        pool(1, "slow")


def run(script, timeout=120, **kwargs):
    """Runs a script in a fresh interpreter; it must end by itself."""
    root = pathlib.Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests")])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": path, **LIGHT},
        capture_output=True,
        text=True,
        timeout=timeout,
        **kwargs,
    )


def test_a_killed_worker_is_an_error_and_no_hang():
    done = run(
        """
        import os, signal, threading, time
        import multiprocessing
        from test_workers import LAYOUT, work
        from kerastrip._workers import WorkerPool

        pool = WorkerPool(work, LAYOUT, processes=2)
        victim = multiprocessing.active_children()[0].pid
        threading.Timer(0.05, os.kill, (victim, signal.SIGKILL)).start()
        for attempt in range(2):
            try:
                while True:
                    pool(1, "slow")
            except RuntimeError as error:
                print(error)
        """
    )
    assert done.stdout.count("sampler died (exit code -9)") == 2, done.stderr
    assert done.returncode == 0


def gone(pid, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()
        except FileNotFoundError:
            return True
        if state[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_workers_leave_with_a_killed_parent():
    done = run(
        """
        import multiprocessing, os, signal
        from test_workers import LAYOUT, work
        from kerastrip._workers import WorkerPool

        pools = [WorkerPool(work, LAYOUT, processes=2) for _ in range(2)]
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 4
    assert all(gone(pid) for pid in pids)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_close_ends_the_workers():
    pool = WorkerPool(work, LAYOUT, processes=2)
    pids = [worker.process.pid for worker in pool._workers]
    assert len(pids) == 2
    assert not gone(pids[0], 0.1)
    pool.close()
    assert all(gone(pid) for pid in pids)
    with pytest.raises(RuntimeError):
        pool(1)


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGINT)"])
def test_the_process_ends_beside_a_worker_that_hangs(end):
    done = run(
        f"""
        import os, signal, threading, time
        # A shell may have started the tests with Ctrl-C switched off.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from test_workers import LAYOUT, work
        from kerastrip._workers import WorkerPool

        pool = WorkerPool(work, LAYOUT, processes=1)
        for _ in range(2):
            threading.Thread(target=pool, args=(1, "hang"), daemon=True).start()
        time.sleep(1)
        {end}
        """
    )
    assert done.returncode == (-signal.SIGINT if end else 0), done.stderr


def test_close_frees_those_who_wait(pool):
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(pool, 1, "hang") for _ in range(3)]
        time.sleep(0.3)
        pool.close()
        for call in calls:
            with pytest.raises(RuntimeError, match="closed"):
                call.result(20)


def test_look_ahead_answers_like_the_function():
    calls = []

    def make(step, epoch):
        calls.append((step, epoch))
        if step == 5:
            raise ValueError("step 5")
        return step, epoch

    ahead = LookAhead(steps=50, ahead=2, endless=True)
    assert [ahead(make, step, 0) for step in range(5)] == [(s, 0) for s in range(5)]
    with pytest.raises(ValueError, match="step 5"):
        ahead(make, 5, 0)
    # In order nothing is made twice; out of order nothing is made ahead.
    time.sleep(0.1)
    assert len(calls) == len(set(calls))
    made = len(calls)
    assert ahead(make, 40, 0) == (40, 0)
    assert len(calls) == made + 1
    assert ahead(make, 0, 1) == (0, 1)


@pytest.mark.parametrize("endless", [True, False])
def test_look_ahead_is_ahead_of_order_and_shuffle(endless):
    """Every batch but the first is made elsewhere, and no more than are needed."""
    calls, here = [], threading.get_ident()

    def make(step, epoch):
        calls.append((step, epoch))
        assert threading.get_ident() != here
        return step, epoch

    ahead, chance = LookAhead(steps=9, ahead=2, endless=endless), random.Random(1)
    for epoch in (0, 1) if endless else (0, 0):
        for step in range(9):
            assert ahead(make, step, epoch) == (step, epoch)
    time.sleep(0.1)
    assert set(calls[-2:]) == {(0, 2 * endless), (1, 2 * endless)}
    calls.clear()
    random.seed(chance.random())
    for epoch in (4, 5):
        order = list(range(9))
        ahead.expect_shuffle()
        random.shuffle(order)
        assert [ahead(make, step, epoch)[0] for step in order] == order
    assert len(calls) == len(set(calls)) == 2 * 9


def test_look_ahead_may_be_asked_by_many_threads():
    ahead = LookAhead(steps=40, ahead=3, endless=True)
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ahead, lambda *key: key, s % 40, 0) for s in range(800)]
    assert [each.result() for each in asked] == [(s % 40, 0) for s in range(800)]


def test_in_flight_waits_for_calls_and_refuses_new_ones():
    in_flight, inside, leave = InFlight(), threading.Event(), threading.Event()

    def call():
        with in_flight.call():
            inside.set()
            leave.wait(600)

    thread = threading.Thread(target=call)
    thread.start()
    assert inside.wait(600)
    begun = time.monotonic()
    in_flight.close(timeout=0.2)
    assert time.monotonic() - begun >= 0.2
    leave.set()
    begun = time.monotonic()
    in_flight.close(timeout=600)
    assert time.monotonic() - begun < 300  # it waited for the call, not for the clock
    with pytest.raises(RuntimeError, match="ending"), in_flight.call():
        pass
    thread.join()
