"""What every test shares: quiet backends, seeded generators, the golden files."""

import os
import pathlib
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if os.environ.get("KERAS_BACKEND") == "jax":
    # Most models here are alike: what was compiled for one serves the next.
    COMPILED = tempfile.TemporaryDirectory(prefix="kerastrip-jax-")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", COMPILED.name)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import numpy as np
import pytest
from harness import forking

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def triplet_golden():
    with np.load(GOLDEN / "triplet_golden.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def focal_golden():
    with np.load(GOLDEN / "focal_golden.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def run_fork():
    """A `run_script` for code that trains with TensorFlow, which is imported already."""
    with forking("keras, tensorflow, kerastrip") as run:
        yield run
