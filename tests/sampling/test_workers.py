"""The worker pool: right answers, and an end or an error in every bad case."""

import contextlib
import gc
import logging
import os
import pathlib
import random
import signal
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from harness import LIGHT, forking, until

from kerastrip.sampling import look_ahead, workers
from kerastrip.sampling.look_ahead import InFlight, LookAhead, in_thread
from kerastrip.sampling.workers import WorkerPool

pytestmark = pytest.mark.backend

LAYOUT = [((3, 4), np.dtype("float32")), ((5,), np.dtype("uint8"))]

MATRIX = np.random.default_rng(0).random((300, 300))
LOG = logging.getLogger("kerastrip.tests.workers")


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


PARENT = os.getpid()


class Moody(Exception):
    """Unpickles in worker processes only."""

    def __reduce__(self):
        return revived, (self.args[0],)


def revived(told):
    if os.getpid() == PARENT:
        raise TypeError("not here")
    return Moody(told)


LOCK = threading.Lock()


def work(number, what="", out=None):
    if what == "moody":
        raise Moody("not here")
    if what == "lock":
        with LOCK:
            pass
    if what == "random":
        np.random.rand()  # noqa: NPY002
    if what == "product":
        np.linalg.inv(MATRIX)
    if what == "log":
        LOG.info("batch")
    if what == "pid":
        number = os.getpid()
    if what == "raise":
        raise ValueError(f"no batch for {number}")
    if what == "missing":
        raise FileNotFoundError("gone")
    if what == "awkward":
        raise Unpicklable("this", number)
    if what == "leave":
        sys.exit(3)
    if what in ("slow", "hang"):
        time.sleep({"slow": 0.2, "hang": 1000}[what])
    made = [np.full((3, 4), number, "float32"), (np.arange(5) + number).astype("uint8")]
    for array, target in zip(made, out or made, strict=True):
        target[...] = array
    return made


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


def test_arrays_are_lent_while_there_is_another_place_to_write(pool):
    kept = [pool(number) for number in range(8)]  # of each worker two are lent
    for number, arrays in enumerate(kept):
        np.testing.assert_array_equal(arrays[0], work(number)[0])
    lent = [arrays[1][2:] for arrays in kept if arrays[1].base is not None]
    assert len(lent) == 4
    expected = [part.copy() for part in lent]
    del kept, arrays  # a view of a view keeps its place
    assert pool(9)[1].base is None
    np.testing.assert_array_equal(lent, expected)
    lent.clear()
    assert all(pool(number)[1].base is not None for number in range(8))


def test_each_worker_is_asked_for_two_ahead(pool):
    begun = [pool.begin(number, "slow") for number in range(6)]
    assert [each is None for each in begun] == [False] * 4 + [True] * 2
    direct = pool(4)  # a call finds a place beside them
    for number, each in enumerate(begun[:4]):
        np.testing.assert_array_equal(each()[1], work(number)[1])
    np.testing.assert_array_equal(direct[1], work(4)[1])


def test_what_was_begun_and_given_up_makes_room(pool):
    kept = []
    for number in range(40):
        pool.begin(number)
        kept.append(pool(number))  # what is kept has room of its own
    for number, arrays in enumerate(kept):
        np.testing.assert_array_equal(arrays[1], work(number)[1])
    del kept, arrays
    assert until(lambda: [w.load()[:2] for w in pool._idlest()] == [(0, 0)] * 2)


def test_many_threads_begin_and_call(pool):
    def both(number):
        begun = pool.begin(number, "raise" if number % 7 == 0 else "")
        called = pool(number + 1)[0][0, 0]
        if begun is None or number % 5 == 0:
            return number, called
        try:
            return begun()[0][0, 0], called
        except ValueError:
            return number, called

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(both, range(200), timeout=300))
    assert results == [(number, number + 1) for number in range(200)]


def test_a_batch_whose_receipt_was_interrupted_is_lost_and_no_other(pool):
    worker = pool._workers[0]
    lost, next_one = worker.ask((1,)), worker.ask((2,))
    worker._pipe.recv()  # and here came Ctrl-C
    np.testing.assert_array_equal(pool._result(worker, next_one)[1], work(2)[1])
    with pytest.raises(RuntimeError, match="lost to an interrupt"):
        pool._result(worker, lost)
    del next_one
    assert worker.load()[:2] == (0, 0)


def test_an_error_that_unpickles_in_the_worker_only_is_told(pool):
    with pytest.raises(RuntimeError, match=r"worker process.*Moody.*not here"):
        pool(4, "moody")
    np.testing.assert_array_equal(pool(1)[0], work(1)[0])


def test_the_work_is_done_elsewhere(pool):
    assert pool(0, "pid")[0][0, 0] != os.getpid()


def test_spawned_workers_give_the_same(monkeypatch):
    for name, value in LIGHT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(workers, "_START", "spawn")
    pool = WorkerPool(work, LAYOUT, processes=1)
    np.testing.assert_array_equal(pool(7)[1], work(7)[1])
    pool.close()


def test_work_that_cannot_be_sent_says_so(monkeypatch):
    monkeypatch.setattr(workers, "_START", "spawn")
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
    begun = pool.begin(4, "raise")
    with pytest.raises(ValueError, match="no batch for 4"):
        begun()
    np.testing.assert_array_equal(pool(1)[0], work(1)[0])


def test_a_worker_that_takes_for_ever_is_told_of(pool, monkeypatch):
    monkeypatch.setattr(workers, "_PATIENCE", 0.02)
    with pytest.warns(UserWarning, match=r"busy for 0.02 s.*forked"):
        pool(1, "slow")


@pytest.fixture(scope="module")
def run():
    with forking("test_workers", env=LIGHT) as run:
        yield run


def test_a_killed_worker_is_an_error_and_no_hang(run):
    done = run(
        """
        import os, signal, threading, time
        import multiprocessing
        from test_workers import LAYOUT, work
        from kerastrip.sampling.workers import WorkerPool

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
    assert done.stdout.count("sampler died (exit code -9)") == 2


def gone(pid):
    """Whether a process has ended, though nobody may have asked how."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()
    except FileNotFoundError:
        return True
    return state[0] == "Z"


def all_gone(pids):
    return until(lambda: all(gone(pid) for pid in pids))


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_workers_leave_with_a_killed_parent(run):
    done = run(
        """
        import multiprocessing, os, signal
        from test_workers import LAYOUT, work
        from kerastrip.sampling.workers import WorkerPool

        pools = [WorkerPool(work, LAYOUT, processes=2) for _ in range(2)]
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        exit_code=-signal.SIGKILL,
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 4
    assert all_gone(pids)


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
def test_close_ends_the_workers():
    pool = WorkerPool(work, LAYOUT, processes=2)
    pids = [worker.process.pid for worker in pool._workers]
    assert len(pids) == 2
    assert not gone(pids[0])
    pool.close()
    assert all_gone(pids)
    with pytest.raises(RuntimeError):
        pool(1)


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGINT)"])
def test_the_process_ends_beside_a_worker_that_hangs(run, end):
    run(
        f"""
        import os, signal, threading
        # A shell may have started the tests with Ctrl-C switched off.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from harness import until
        from test_workers import LAYOUT, work
        from kerastrip.sampling.workers import WorkerPool

        pool = WorkerPool(work, LAYOUT, processes=1)
        for _ in range(2):
            threading.Thread(target=pool, args=(1, "hang"), daemon=True).start()
        assert until(lambda: pool._workers[0].load()[0] == 2)
        {end}
        """,
        exit_code=-signal.SIGINT if end else 0,
    )


forks = pytest.mark.skipif(workers._START != "fork", reason="needs fork")


@contextlib.contextmanager
def held(lock):
    """A lock that another thread holds."""
    taken, leave = threading.Event(), threading.Event()

    def hold():
        with lock:
            taken.set()
            leave.wait(600)

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(600)
    try:
        yield leave
    finally:
        leave.set()
        thread.join()


@forks
def test_a_worker_forked_beside_a_held_lock_is_forked_again(monkeypatch):
    monkeypatch.setattr(workers, "_SILENCE", 0.5)
    with held(LOCK) as leave:
        pool = WorkerPool(work, LAYOUT, processes=1)
        threading.Timer(0.2, leave.set).start()
        np.testing.assert_array_equal(pool(3, "lock")[1], work(3)[1])
    begun = pool.begin(4), pool.begin(5)
    assert [each()[1][0] for each in begun] == [4, 5]
    pool.close()


@forks
def test_a_worker_that_always_hangs_is_told_of(monkeypatch):
    monkeypatch.setattr(workers, "_SILENCE", 0.2)
    with held(LOCK):
        pool = WorkerPool(work, LAYOUT, processes=1)
        with pytest.raises(RuntimeError, match=r"hangs.*holds a lock.*multiprocessing"):
            pool(3, "lock")
        pool.close()


@forks
def test_locks_of_logging_and_of_the_global_generator_are_free_in_workers(tmp_path):
    """Other threads hold them nearly always."""
    handler, stop = logging.FileHandler(tmp_path / "log"), threading.Event()
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False

    def busy():
        while not stop.is_set():
            LOG.info("x" * 500)
            np.random.rand(5000)  # noqa: NPY002

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            pool = WorkerPool(work, LAYOUT, processes=2)
            for number, what in enumerate(("log", "random") * 3):
                np.testing.assert_array_equal(pool(number, what)[1], work(number)[1])
            assert [worker._forks for worker in pool._workers] == [1, 1]
            pool.close()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        LOG.removeHandler(handler)
        handler.close()


@forks
@pytest.mark.slow
@pytest.mark.parametrize("what", ["product", "lock", "log", "random"])
def test_a_pool_answers_beside_busy_threads(run, what):
    run(
        f"""
        import os, threading, time
        from test_workers import LAYOUT, work
        from kerastrip.sampling.workers import WorkerPool

        def busy():
            while True:
                work(0, {what!r})
                time.sleep(0.002)

        threading.Thread(target=busy, daemon=True).start()
        time.sleep(0.2)
        for _ in range(5):
            pool = WorkerPool(work, LAYOUT, processes=2)
            assert [pool(n, {what!r})[1][0] for n in range(6)] == list(range(6))
            pool.close()
        os._exit(0)
        """
    )


def test_workers_rest_when_others_start_and_come_back(monkeypatch):
    monkeypatch.setattr(workers, "_REST", 0.1)
    train = WorkerPool(work, LAYOUT, processes=2)
    val = WorkerPool(work, LAYOUT, processes=1)
    assert [len(pool._workers) for pool in (train, val)] == [2, 1]  # val is yet to work
    train(1)
    begun = train.begin(7)
    time.sleep(0.2)
    other = WorkerPool(work, LAYOUT, processes=1)
    assert [len(pool._workers) for pool in (train, val, other)] == [0, 1, 1]
    np.testing.assert_array_equal(begun()[1], work(7)[1])
    np.testing.assert_array_equal(train(2)[0], work(2)[0])
    time.sleep(0.2)
    other(1)
    assert [len(pool._workers) for pool in (train, val, other)] == [2, 1, 1]
    for pool in (train, val, other):
        pool.close()


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
@pytest.mark.slow
def test_workers_of_samplers_that_are_never_freed_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(workers, "_REST", 0.0)
    kept = []
    for _ in range(6):
        kept.append(WorkerPool(work, LAYOUT, processes=2))
        kept[-1](1)
    assert sum(len(pool._workers) for pool in kept) == 2
    kept[-1].close()


@forks
def test_a_fork_leaves_the_workers_to_its_parent(run):
    done = run(
        """
        import os, sys
        from test_workers import LAYOUT, work
        from kerastrip.sampling.look_ahead import in_thread
        from kerastrip.sampling.workers import WorkerPool

        pool = WorkerPool(work, LAYOUT, processes=2)
        pool(1)
        in_thread(work, 1).result(60)
        pid = os.fork()
        if pid == 0:
            # It has workers and threads of its own, if it needs them.
            assert pool(3)[1][0] == 3
            assert in_thread(work, 4).result(60)[1][0] == 4
            pool.close()
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        if os.fork() == 0:
            sys.exit(0)
        os.wait()
        print([pool(number)[1][0] for number in range(6)])
        """
    )
    assert "Traceback" not in done.stderr  # TensorFlow may log what it likes
    assert done.stdout.split("[")[1].count(",") == 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs prctl")
def test_a_stopped_worker_leaves_with_its_parent(run):
    done = run(
        """
        import os, signal
        from test_workers import LAYOUT, work
        from kerastrip.sampling.workers import WorkerPool

        pool = WorkerPool(work, LAYOUT, processes=1)
        pid = pool._workers[0].process.pid
        pool(1)
        os.kill(pid, signal.SIGSTOP)
        print(pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        exit_code=-signal.SIGKILL,
    )
    assert all_gone([int(done.stdout)])


def test_close_frees_those_who_wait(pool):
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(pool, 1, "hang") for _ in range(3)]
        assert until(lambda: sum(w.load()[0] for w in pool._workers) == 3)
        pool.close()
        for call in calls:
            with pytest.raises(RuntimeError, match="closed"):
                call.result(20)


def test_look_ahead_gives_what_was_begun():
    calls = []

    def begin(step, epoch):
        calls.append((step, epoch))
        return None if step == 5 else (step, epoch)

    ahead = LookAhead(steps=50, ahead=2, endless=True)
    assert [ahead(begin, step, 0) for step in range(5)] == [(s, 0) for s in range(5)]
    assert ahead(begin, 5, 0) is None
    # In order nothing is begun twice, nor before its turn; out of order nothing at all.
    assert [calls.count((step, 0)) for step in (4, 5, 6)] == [1, 3, 0]
    made = len(calls)
    assert ahead(begin, 40, 0) is None
    assert len(calls) == made
    assert ahead(begin, 0, 1) == (0, 1)


def test_look_ahead_asks_again_for_what_could_not_be_begun():
    calls, full = [], True

    def begin(step, epoch):
        calls.append(step)
        return None if full and len(calls) > 1 else step

    ahead = LookAhead(steps=50, ahead=3, endless=True)
    assert ahead(begin, 0, 0) == 0
    assert calls == [0, 1]  # no later one before it
    full = False
    assert ahead(begin, 1, 0) == 1
    assert calls == [0, 1, 1, 2, 3, 4]


@pytest.mark.parametrize("endless", [True, False])
def test_look_ahead_is_ahead_of_order_and_shuffle(endless):
    """Every batch is begun, each once, and no more than are needed."""
    calls = []

    def begin(step, epoch):
        calls.append((step, epoch))
        return step, epoch

    ahead, chance = LookAhead(steps=9, ahead=2, endless=endless), random.Random(1)
    for epoch in (0, 1) if endless else (0, 0):
        for step in range(9):
            assert ahead(begin, step, epoch) == (step, epoch)
            assert len(calls) == len(set(calls)) or not endless
    assert calls[-2:] == [(0, 2 * endless), (1, 2 * endless)]
    calls.clear()
    random.seed(chance.random())
    for epoch in (4, 5):
        order = list(range(9))
        ahead.expect_shuffle()
        random.shuffle(order)
        assert [ahead(begin, step, epoch)[0] for step in order] == order
    assert len(calls) == len(set(calls)) == 2 * 9


def test_look_ahead_may_be_asked_by_many_threads():
    ahead = LookAhead(steps=40, ahead=3, endless=True)

    def ask(step):
        begun = ahead(partial(in_thread, lambda *key: key), step, 0)
        return (step, 0) if begun is None else begun.result()

    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask, s % 40) for s in range(800)]
    assert [each.result() for each in asked] == [(s % 40, 0) for s in range(800)]


def test_a_thread_hands_over_what_it_made_or_raised():
    assert in_thread(threading.get_ident).result(60) != threading.get_ident()
    with pytest.raises(ValueError, match="no batch for 4"):
        in_thread(work, 4, "raise").result(60)
    with pytest.raises(SystemExit):
        in_thread(sys.exit, 3).result(60)


def test_threads_are_used_again_and_end_without_work(monkeypatch):
    monkeypatch.setattr(look_ahead, "_IDLE", 0.3)
    before = threading.active_count()
    seen = set()
    for _ in range(50):
        both = [in_thread(threading.get_ident) for _ in range(2)]
        seen |= {each.result(60) for each in both}
        time.sleep(0.001)
    assert len(seen) < 10
    assert until(lambda: threading.active_count() <= before)


def test_a_thread_keeps_nothing_of_what_it_made(monkeypatch):
    monkeypatch.setattr(look_ahead, "_IDLE", 30)

    class Batch:
        pass

    batch = in_thread(Batch).result(60)
    kept = weakref.ref(batch)
    del batch
    assert until(lambda: gc.collect() >= 0 and kept() is None, seconds=10)


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
