"""Splits keep classes whole, or every class in both parts."""

import numpy as np
import pytest
from harness import histogram
from hypothesis import given, settings
from hypothesis import strategies as st

from kerastrip.sampling.splits import split_classes, split_samples


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=15),
    st.floats(0.01, 0.99),
    st.integers(-5, 5),
)
def test_split_classes_keeps_classes_whole(sizes, share, seed):
    labels = histogram(sizes) * 10
    train, test = split_classes(labels, test=share, seed=seed)
    assert train.dtype == test.dtype == np.int64
    assert sorted([*train, *test]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(test) > 0).all()
    held_out = set(labels[test].tolist())
    assert not held_out & set(labels[train].tolist())
    assert len(held_out) == min(max(round(share * len(sizes)), 1), len(sizes) - 1)
    again = split_classes(labels, test=len(held_out), seed=seed)
    np.testing.assert_array_equal(again[1], test)


def test_split_classes_by_name_and_by_seed():
    labels = np.array(list("abcabd"))
    train, test = split_classes(labels, test=["d", "a"])
    assert train.tolist() == [1, 2, 4]
    assert test.tolist() == [0, 3, 5]
    many = np.repeat(np.arange(50), 2)
    chosen = {tuple(split_classes(many, seed=seed)[1]) for seed in range(10)}
    assert len(chosen) == 10
    # Columns of one-hot rows that never occur are no classes to hold out.
    train, test = split_classes(np.eye(9)[[2, 2, 5]], test=0.5)
    assert sorted(map(len, (train, test))) == [1, 2]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 12), min_size=1, max_size=10),
    st.floats(0.01, 0.99),
    st.integers(-5, 5),
)
def test_split_samples_keeps_every_class_in_both(sizes, share, seed):
    labels = histogram(sizes) * 10
    train, test = split_samples(labels, test=share, seed=seed)
    assert sorted([*train, *test]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(test) > 0).all()
    for label, size in enumerate(sizes):
        held_out = (labels[test] == label * 10).sum()
        assert held_out == min(max(round(share * size), 1), size - 1)
    least = min(sizes)
    if least > 2:
        _, test = split_samples(labels, test=2, seed=seed)
        assert (np.bincount(labels[test] // 10) == 2).all()
    np.testing.assert_array_equal(
        split_samples(labels, test=share, seed=seed)[0], train
    )


def test_split_samples_takes_others_with_another_seed():
    labels = histogram([10] * 5)
    chosen = {tuple(split_samples(labels, seed=seed)[1]) for seed in range(10)}
    assert len(chosen) == 10


@pytest.mark.parametrize("split", [split_classes, split_samples])
@pytest.mark.parametrize(
    ("test", "error"),
    [
        (0.0, ValueError),
        (1.0, ValueError),
        (-0.5, ValueError),
        (float("nan"), ValueError),
        (0, ValueError),
        (6, ValueError),
        (True, TypeError),
        (None, TypeError),
    ],
)
def test_bad_shares_are_refused(split, test, error):
    labels = np.repeat(np.arange(6), 6)
    with pytest.raises(error, match="`test`"):
        split(labels, test=test)
    with pytest.raises(TypeError, match="`seed`"):
        split(labels, seed=0.5)


def test_splits_that_cannot_be():
    with pytest.raises(ValueError, match="at least 2 classes to split, received 1"):
        split_classes([3, 3, 3])
    with pytest.raises(ValueError, match="not all of them"):
        split_classes([3, 4], test=[3, 4])
    with pytest.raises(ValueError, match=r"`test`.*received 5"):
        split_classes([3, 4], test=[5])
    for labels, first in (
        ([3, 3, 4, 5, 5, 6], "4"),
        ([b"a", b"b\0", b"b\0"], "b'a'"),
        ([2**70, 5, 5], str(2**70)),
    ):
        with pytest.raises(ValueError, match=f"The first is {first}"):
            split_samples(labels)
