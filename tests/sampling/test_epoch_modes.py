"""Which classes a batch draws: the two schedules against plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kerastrip.sampling.epoch_modes import Balanced, Coverage, _fill_level


@st.composite
def groups_and_p(draw):
    """Classes of each group, and a P that none of them is too small for."""
    p = draw(st.integers(1, 7))
    sizes = st.integers(p, 3 * p + 3)
    return draw(st.lists(sizes, min_size=1, max_size=4)), p


def all_draws(schedule, p, epoch):
    """`(batches, P)` classes and draw numbers of an epoch."""
    return schedule.draws(epoch, np.arange(schedule.batches), np.arange(p))


def check_batches(classes, sizes):
    """Distinct classes of one group in each batch; the group of each batch."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    for batch in classes.tolist():
        assert len(set(batch)) == len(batch)
        assert len(set(group[batch].tolist())) == 1
    return group[classes[:, 0]]


@settings(max_examples=100, deadline=None)
@given(groups_and_p(), st.integers(1, 40), st.integers(0, 2**64 - 1))
def test_balanced_draws_every_class_equally_often(groups, batches, key):
    sizes, p = groups
    schedule = Balanced(np.array(sizes), p, batches, key)
    total = np.zeros(sum(sizes), int)
    turns = np.zeros(len(sizes), int)
    for epoch in range(4):
        classes, numbers = all_draws(schedule, p, epoch)
        for group in check_batches(classes, sizes):
            turns[group] += 1
            # Groups take turns in proportion to their classes, at any time.
            due = turns.sum() * np.array(sizes) / sum(sizes)
            assert np.abs(turns - due).max() < len(sizes)
        count = np.zeros(sum(sizes), int)
        for batch, draws in zip(classes.tolist(), numbers.tolist(), strict=True):
            for class_, number in zip(batch, draws, strict=True):
                # The numbers of a class count on, from one epoch to the next.
                assert number == total[class_] + count[class_]
                count[class_] += 1
        np.testing.assert_array_equal(schedule.draws_per_class(epoch), count)
        total += count
        for part, sums in zip(
            np.split(count, np.cumsum(sizes)[:-1]),
            np.split(total, np.cumsum(sizes)[:-1]),
            strict=True,
        ):
            assert np.ptp(part) <= 1
            assert np.ptp(sums) <= 1


@pytest.mark.parametrize("classes", [8, 9, 11, 14, 15, 16, 17, 24, 100])
def test_balanced_at_any_number_of_classes(classes):
    # C = P, C = P + 1, C < 2 (P - 1), and round numbers.
    schedule = Balanced(np.array([classes]), 8, 13, key=3)
    total = np.zeros(classes, int)
    orders = set()
    for epoch in range(20):
        drawn, _ = all_draws(schedule, 8, epoch)
        check_batches(drawn, [classes])
        total += np.bincount(drawn.ravel(), minlength=classes)
        assert np.ptp(total) <= 1
        orders.add(tuple(drawn.ravel().tolist()))
    assert len(orders) == 20


def test_balanced_reaches_far_epochs_in_closed_form():
    schedule = Balanced(np.array([10, 15]), 4, 1000, key=5)
    classes, numbers = schedule.draws(10**6, np.array([999, 3]), np.arange(4))
    check_batches(classes, [10, 15])
    due = 10**9 * 4 / 25
    assert np.abs(numbers[1] - due).max() <= 2
    assert (numbers[0] - numbers[1] > 100).all()


def test_groups_take_turns_evenly():
    schedule = Balanced(np.array([10, 30]), 5, 40, key=1)
    groups = check_batches(all_draws(schedule, 5, 0)[0], [10, 30])
    for start in range(0, 40, 4):
        assert sorted(groups[start : start + 4]) == [0, 1, 1, 1]


@settings(max_examples=100, deadline=None)
@given(groups_and_p(), st.data(), st.integers(0, 2**64 - 1))
def test_coverage_draws_enough_in_the_fewest_batches(groups, data, key):
    sizes, p = groups
    needs = st.integers(1, data.draw(st.sampled_from([1, 3, 40])))
    needed = np.array(
        data.draw(st.lists(needs, min_size=sum(sizes), max_size=sum(sizes)))
    )
    schedule = Coverage(np.array(sizes), needed, p, key)
    parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    lengths = [max(-(-needed[part].sum() // p), needed[part].max()) for part in parts]
    assert schedule.batches == sum(lengths)
    for epoch in (0, 7):
        classes, numbers = all_draws(schedule, p, epoch)
        assert np.bincount(check_batches(classes, sizes)).tolist() == lengths
        seen = [sorted(numbers[classes == c].tolist()) for c in range(sum(sizes))]
        assert seen == [list(range(len(draws))) for draws in seen]
        counts = np.array([len(draws) for draws in seen])
        np.testing.assert_array_equal(schedule.draws_per_class(epoch), counts)
        for part, length in zip(parts, lengths, strict=True):
            expected = spread(needed[part].tolist(), length * p)
            assert sorted(counts[part].tolist()) == expected
            assert (counts[part] >= needed[part]).all()


def spread(needed, slots):
    """Give spare slots one by one to a class drawn least; the sorted counts."""
    counts = sorted(needed)
    for _ in range(slots - sum(counts)):
        counts[0] += 1
        counts.sort()
    return counts


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 100))
def test_fill_level_is_the_highest_that_fits(needed, spare):
    needed = np.array(needed)
    slots = int(needed.sum()) + spare
    level = _fill_level(needed, slots)
    assert np.maximum(needed, level).sum() <= slots
    assert np.maximum(needed, level + 1).sum() > slots


def test_coverage_gives_spare_draws_to_others_each_epoch():
    # 2 batches of 6 for 7 classes that need one draw each: 5 are drawn twice.
    schedule = Coverage(np.array([7]), np.ones(7, int), 6, key=0)
    once = {tuple(np.flatnonzero(schedule.draws_per_class(e) == 1)) for e in range(40)}
    assert {len(pair) for pair in once} == {2}
    assert len(once) > 10


def test_coverage_keeps_the_tables_of_one_epoch_only():
    schedule = Coverage(np.array([5, 6]), np.ones(11, int), 2, key=0)
    expected = {epoch: all_draws(schedule, 2, epoch)[0] for epoch in range(3)}
    assert len(schedule._tables) == 2
    for epoch in (2, 0, 1, 0):
        np.testing.assert_array_equal(all_draws(schedule, 2, epoch)[0], expected[epoch])


def test_parts_of_a_batch_are_parts_of_the_whole():
    for schedule in (
        Balanced(np.array([9, 7]), 6, 20, key=2),
        Coverage(np.array([9, 7]), np.arange(1, 17), 6, key=2),
    ):
        whole = all_draws(schedule, 6, 3)
        steps, columns = np.array([5, 0, 5]), np.array([4, 1])
        part = schedule.draws(3, steps, columns)
        for some, every in zip(part, whole, strict=True):
            np.testing.assert_array_equal(some, every[steps][:, columns])
