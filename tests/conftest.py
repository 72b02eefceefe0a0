"""What every test shares: quiet backends, seeded generators, the golden files."""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest

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
