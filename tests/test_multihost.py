"""Several JAX processes train as one: examples/multihost.py."""

import numpy as np
import pytest
from harness import ROOT, load_example, run_script


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_as_one(processes):
    pytest.importorskip("jax")
    example = ROOT / "examples" / "multihost.py"
    run = run_script(example, "--processes", processes, "--epochs", 2, timeout=540)
    made = f"{48 // processes} of the 48 rows"
    assert run.stdout.count(made) == processes
    for name in ("dense/kernel", "history: semi_hard", "kerastrip.embed"):
        assert name in run.stdout


def test_a_difference_is_seen(capsys):
    compare = load_example("multihost").compare
    alone = {"kernel": np.ones((2, 2)), "loss": np.zeros(3)}
    assert compare(alone, [alone, alone])
    for wrong in (1.1, np.nan):
        other = {**alone, "kernel": np.array([[1, 1], [1, wrong]])}
        assert not compare(alone, [alone, other])
        assert not compare(alone, [other, other])


def test_a_process_that_fails_ends_the_run(monkeypatch, tmp_path):
    script = tmp_path / "host.py"
    script.write_text(
        "import sys, time\n"
        "time.sleep(100) if sys.argv[sys.argv.index('--host') + 1] == '0' else sys.exit(3)"
    )
    example = load_example("multihost")
    monkeypatch.setattr(example, "__file__", str(script))
    with pytest.raises(SystemExit, match=r"exit codes \[None, 3\]"):
        example.start(2, epochs=1, timeout=60)
