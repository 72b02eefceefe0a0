"""`spread=` and `groups_per_batch=` keep their promises: any labels, words and groups."""

import pickle
from collections import Counter

import numpy as np
import pytest
from harness import epoch_of, histogram, planned
from hypothesis import given, settings
from hypothesis import strategies as st

from kerastrip.sampling.plan import PKPlan
from kerastrip.sampling.sampler import PKSampler

MODES = ("balanced", "coverage")


@st.composite
def cases(draw):
    """Labels and words of any histogram, P and K that fit them."""
    sizes = draw(st.lists(st.integers(1, 25), min_size=1, max_size=7))
    sizes.append(draw(st.integers(2, 25)))
    labels = histogram(sizes, draw(st.integers(0, 9)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    words = rng.integers(0, draw(st.integers(1, 9)), len(labels))
    if draw(st.booleans()):  # most samples of one camera
        words = np.minimum(words, rng.geometric(0.6, len(labels)) - 1)
    p = draw(st.integers(1, sum(size >= 2 for size in sizes)))
    return labels, words, p, draw(st.integers(2, 8))


def even_deal(sizes, rows):
    """Rows dealt to cameras one by one, to one that has given the fewest and has more."""
    given = dict.fromkeys(range(len(sizes)), 0)
    for _ in range(rows):
        having = [camera for camera in given if given[camera] < sizes[camera]]
        given[min(having, key=given.get)] += 1
    return sorted(given.values())


def of_cameras(rows, words, cameras):
    """How many distinct samples of each camera stand in some rows."""
    counts = Counter(words[np.unique(rows)].tolist())
    return [counts[camera] for camera in cameras]


@settings(max_examples=100, deadline=None)
@given(cases(), st.none() | st.integers(1, 12))
def test_balanced_rows_come_from_as_many_cameras_as_the_class_has(case, length):
    labels, words, p, k = case
    plan = planned(labels, p, k, spread=words, batches_per_epoch=length)
    assert len(plan) == len(planned(labels, p, k, batches_per_epoch=length))
    uses = np.zeros(len(labels), int)
    for epoch in range(3):
        rows = epoch_of(plan, epoch)
        for batch in rows:
            assert (labels[batch] == labels[batch[:, :1]]).all()
            assert len(set(labels[batch[:, 0]].tolist())) == p
            np.add.at(uses, batch.ravel(), 1)
            for of_class in batch:
                members = np.flatnonzero(labels == labels[of_class[0]])
                assert len(set(of_class.tolist())) == min(k, len(members))
                sizes = Counter(words[members].tolist())
                given_rows = of_cameras(of_class, words, sizes)
                assert sum(count > 0 for count in given_rows) == min(k, len(sizes))
                expected = even_deal(list(sizes.values()), min(k, len(members)))
                assert sorted(given_rows) == expected
                # Inside a camera every sample is used equally often, after each batch.
                for camera in sizes:
                    samples = members[words[members] == camera]
                    assert len(members) < k or np.ptp(uses[samples]) <= 1
    # Cameras that do not give all their samples are drawn equally often.
    for label in np.unique(labels):
        members = labels == label
        sizes = Counter(words[members].tolist())
        most = even_deal(list(sizes.values()), min(k, members.sum()))[-1]
        open_ = [camera for camera, size in sizes.items() if size >= max(most, 1)]
        drawn = [uses[members & (words == camera)].sum() for camera in open_]
        if members.sum() > k and all(sizes[camera] > most for camera in open_):
            assert np.ptp(drawn) <= 1


@settings(max_examples=100, deadline=None)
@given(cases(), st.none() | st.integers(1, 12))
def test_coverage_shows_every_sample_and_spreads_as_far_as_it_goes(case, limit):
    labels, words, p, k = case
    options = {"epoch_mode": "coverage", "max_per_class": limit}
    plan = planned(labels, p, k, spread=words, **options)
    assert len(plan) == len(planned(labels, p, k, **options))
    shown = np.zeros(len(labels), int)
    for epoch in range(3):
        rows = epoch_of(plan, epoch)
        seen = np.unique(rows)
        shown[seen] += 1
        for label, size in Counter(labels.tolist()).items():
            members = labels == label
            wanted = min(size, limit or size) if size >= 2 else 0
            assert members[seen].sum() == wanted
            draws = [of for batch in rows for of in batch if members[of[0]]]
            assert all(len(set(of.tolist())) == min(k, wanted) for of in draws)
            sizes = Counter(words[seen[members[seen]]].tolist())
            counts = np.array([of_cameras(of, words, sizes) for of in draws])
            if wanted >= k and len(draws) == -(-wanted // k):
                # A camera is spread over the draws evenly, ...
                assert (np.ptp(counts, axis=0) <= 1).all()
                # ... and draws miss as few cameras as the number of batches allows.
                least = [min(size, len(draws)) for size in sizes.values()]
                spare = len(draws) * k - wanted
                best = min(sum(least) + spare, len(draws) * min(k, len(sizes)))
                assert (counts > 0).sum() == best
                assert np.ptp((counts > 0).sum(axis=1)) <= 1
    if limit:
        # Each epoch takes other samples of a camera.
        for label in np.unique(labels):
            for camera in np.unique(words):
                of_camera = shown[(labels == label) & (words == camera)]
                assert not len(of_camera) or np.ptp(of_camera) <= 1


def test_covered_draws_miss_cameras_evenly():
    # 4 draws of 4 rows: the large cameras are in all of them, the small in 2 each.
    words = np.repeat([0, 1, 2, 3], [2, 2, 6, 6])
    labels = np.repeat([0, 1], 16)
    words = np.tile(words, 2)
    plan = planned(labels, 2, 4, epoch_mode="coverage", spread=words)
    for epoch in range(10):
        for batch in epoch_of(plan, epoch):
            assert [len(set(words[of].tolist())) for of in batch] == [3, 3]


def test_one_sample_per_camera_is_a_shuffled_cycle_of_the_class():
    # Then promise 4 holds for the class: numbers of uses differ by at most 1.
    labels, words = np.repeat(np.arange(4), 11), np.tile(np.arange(11), 4)
    plan = planned(labels, 2, 4, spread=words)
    uses = np.zeros(len(labels), int)
    for epoch in range(5):
        for batch in epoch_of(plan, epoch):
            np.add.at(uses, batch.ravel(), 1)
            assert max(np.ptp(uses[labels == label]) for label in range(4)) <= 1


def test_all_pairs_of_cameras_meet():
    labels, words = np.repeat(np.arange(3), 24), np.tile(np.repeat(np.arange(6), 4), 3)
    for mode in MODES:
        plan = planned(labels, 3, 2, spread=words, epoch_mode=mode)
        rows = np.concatenate([epoch_of(plan, epoch) for epoch in range(12)])
        pairs = Counter(
            tuple(sorted(pair)) for pair in words[rows].reshape(-1, 2).tolist()
        )
        # 432 draws for 15 pairs of cameras; 29 each on average.
        assert len(pairs) == 15
        assert min(pairs.values()) >= 10


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from(MODES), st.data())
def test_spread_batches_are_pure_and_cut_into_shards(case, mode, data):
    labels, words, p, k = case
    limit = data.draw(st.sampled_from([None, 5])) if mode == "coverage" else None
    options = {"epoch_mode": mode, "spread": words, "max_per_class": limit, "seed": 5}
    plan = planned(labels, p, k, **options)
    expected = [epoch_of(plan, epoch).reshape(len(plan), -1) for epoch in range(3)]
    count = data.draw(st.sampled_from([n for n in range(1, p + 1) if p % n == 0]))
    shards = [planned(labels, p, k, shard=(i, count), **options) for i in range(count)]
    steps = st.tuples(st.integers(0, 2), st.integers(0, len(plan) - 1))
    for epoch, step in data.draw(st.lists(steps, min_size=4, max_size=8)):
        copies = [pickle.loads(pickle.dumps(shard)) for shard in shards]
        joined = np.concatenate([copy.indices(epoch, step) for copy in copies])
        np.testing.assert_array_equal(joined, expected[epoch][step])


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from(MODES), st.none() | st.integers(1, 10))
def test_the_report_is_what_epoch_0_does(case, mode, number):
    labels, words, p, k = case
    name = "max_per_class" if mode == "coverage" else "batches_per_epoch"
    plan = planned(labels, p, k, epoch_mode=mode, spread=words, **{name: number})
    report, seen = plan.report(), np.unique(epoch_of(plan, 0))
    assert report.samples_seen == len(seen)
    kept = [label for label, size in Counter(labels.tolist()).items() if size >= 2]
    of_one = [len(set(words[labels == label].tolist())) == 1 for label in kept]
    assert report.classes_not_spread == sum(of_one)
    assert f"classes not spread  {sum(of_one)}" in str(report)
    assert "not spread" not in str(planned(labels, p, k).report())


def test_classes_of_groups_are_spread_too():
    labels = np.repeat(np.arange(8), 12)
    groups, words = np.repeat([0, 1], 48), np.arange(96) % 3
    for mode in MODES:
        plan = planned(labels, 4, 3, epoch_mode=mode, groups=groups, spread=words)
        for batch in epoch_of(plan, 0):
            assert len(set(groups[batch].ravel().tolist())) == 1
            assert (np.sort(words[batch]) == np.arange(3)).all()


def test_substitutes_of_the_same_camera_come_first():
    labels, words = np.repeat(np.arange(3), 200), np.arange(600) % 40 // 15
    for mode in MODES:
        plan = planned(labels, 2, 3, spread=words, epoch_mode=mode)
        for epoch, step, position in ((0, 0, 0), (0, 0, 4), (2, 1, 5)):
            row = plan.indices(epoch, step)[position]
            others = list(plan.substitutes(epoch, step, position))
            of_class = labels == labels[row]
            assert sorted(others) == np.flatnonzero(of_class).tolist()
            alike = np.flatnonzero(of_class & (words == words[row])).tolist()
            assert sorted(others[: len(alike)]) == alike
            assert others != sorted(others)


def test_a_sampler_spreads_and_tells_of_it(rng):
    images, labels = rng.integers(0, 255, (40, 4, 4, 1), "uint8"), np.repeat([5, 6], 20)
    cameras = np.array(["north", "south", "north", "west"] * 10)
    sampler = PKSampler(
        images, labels, classes_per_batch=2, samples_per_class=3, spread=cameras
    )
    rows = sampler.plan.indices(0, 0).reshape(2, 3)
    assert [sorted(row) for row in cameras[rows].tolist()] == [
        ["north", "south", "west"]
    ] * 2
    np.testing.assert_array_equal(sampler[0][0], images[rows.ravel()])
    assert sampler.report().classes_not_spread == 0
    np.testing.assert_array_equal(sampler.spread, cameras)


# ------------------------------------------------------------- several groups in a batch


@st.composite
def grouped(draw):
    """`(labels, groups of the classes, P, C)`: C groups can make up a batch."""
    shares = draw(st.integers(2, 4))
    per_share = draw(st.integers(1, 4))
    classes = st.integers(per_share, 4 * per_share + 5)
    parts = draw(st.lists(classes, min_size=shares, max_size=shares + 4))
    parts[0] *= draw(st.sampled_from([1, 5]))
    sizes = np.random.default_rng(draw(st.integers(0, 99))).integers(2, 9, sum(parts))
    labels = histogram(sizes, draw(st.integers(0, 9)))
    return labels, np.repeat(np.arange(len(parts)), parts), shares * per_share, shares


@settings(max_examples=60, deadline=None)
@given(grouped(), st.sampled_from(MODES), st.integers(2, 4))
def test_the_classes_of_a_batch_come_from_several_groups(case, mode, k):
    labels, group_of, p, shares = case
    plan = planned(
        labels, p, k, epoch_mode=mode, groups=group_of, groups_per_batch=shares, seed=8
    )
    total = np.zeros(len(group_of), int)
    for epoch in range(3):
        rows = epoch_of(plan, epoch)
        classes = labels[rows[..., 0]]
        assert all(len(set(batch)) == p for batch in classes.tolist())
        groups = group_of[classes].reshape(len(plan), shares, -1)
        assert (groups == groups[..., :1]).all()
        assert all(len(set(batch)) == shares for batch in groups[..., 0].tolist())
        drawn = np.bincount(classes.ravel(), minlength=len(group_of))
        total += drawn
        for group in np.unique(group_of):
            if mode == "balanced":
                assert np.ptp(drawn[group_of == group]) <= 1
                assert np.ptp(total[group_of == group]) <= 1
        if mode == "coverage":
            assert len(np.unique(rows)) == len(labels)
    if mode == "coverage":
        needed = -(-np.bincount(labels) // k)
        of_groups = [needed[group_of == group] for group in np.unique(group_of)]
        lengths = [max(-(-of.sum() * shares // p), of.max()) for of in of_groups]
        assert len(plan) == max(-(-sum(lengths) // shares), *lengths)


def test_groups_share_batches_in_proportion_to_their_classes():
    sizes = np.array([60, 30, 20, 10])
    group_of = np.repeat(np.arange(4), sizes)
    labels = np.repeat(np.arange(120), 4)
    plan = planned(
        labels, 8, 2, groups=group_of, groups_per_batch=2, batches_per_epoch=120
    )
    epochs = [group_of[labels[epoch_of(plan, e)[:, ::4, 0]]] for e in range(8)]
    # A table of turns: 8 orders of 120 batches. There the proportion is exact.
    exact = np.bincount(np.ravel(epochs), minlength=4)
    np.testing.assert_array_equal(exact, 8 * 240 * sizes / 120)
    for epoch in epochs:
        assert np.abs(np.bincount(epoch.ravel(), minlength=4) - 2 * sizes).max() <= 8
    # A group with more than half of the classes is in every batch, once.
    sizes = np.array([90, 20, 10])
    group_of = np.repeat(np.arange(3), sizes)
    plan = planned(
        labels, 8, 2, groups=group_of, groups_per_batch=2, batches_per_epoch=240
    )
    groups = group_of[labels[epoch_of(plan, 0)[:, ::4, 0]]]
    assert ((groups == 0).sum(axis=1) == 1).all()
    assert np.bincount(groups.ravel()).tolist() == [240, 160, 80]


def test_all_pairs_of_groups_meet():
    sizes = np.array([50, 40, 30, 30, 20, 20])
    group_of = np.repeat(np.arange(6), sizes)
    labels = np.repeat(np.arange(190), 4)
    for mode in MODES:
        plan = planned(
            labels, 6, 2, epoch_mode=mode, groups=group_of, groups_per_batch=3
        )
        groups = np.concatenate(
            [group_of[labels[epoch_of(plan, e)[:, ::2, 0]]] for e in range(4)]
        )
        pairs = {
            tuple(sorted(pair))
            for row in groups.tolist()
            for pair in ((row[0], row[1]), (row[0], row[2]), (row[1], row[2]))
        }
        assert len(pairs) == 15


# ------------------------------------------------------------------------- bad input


def test_words_that_no_samples_share_spread_nothing():
    with pytest.warns(UserWarning, match="nothing to spread"):
        PKPlan(LABELS, classes_per_batch=2, samples_per_class=2, spread=np.arange(24))


LABELS = np.repeat(np.arange(6), 4)


@pytest.mark.parametrize(
    ("options", "error", "fragments"),
    [
        ({"spread": [0, 1, 2]}, ValueError, ["one word for each of 24", "3 words"]),
        ({"spread": ["a"] * 23 + [None]}, ValueError, ["`spread`", "None", "23"]),
        ({"spread": [0.5] * 24}, TypeError, ["`spread`", "float64"]),
        ({"spread": ["a"] * 12 + [3] * 12}, TypeError, ["`spread`"]),
        ({"groups_per_batch": 2}, ValueError, ["1 without `groups`", "2"]),
        ({"groups_per_batch": 0}, ValueError, ["integer of at least 1"]),
        (
            {"groups": [0, 0, 1, 1, 2, 2], "groups_per_batch": 3},
            ValueError,
            ["divides classes_per_batch=4", "classes_per_batch=3 would do"],
        ),
        (
            {"groups": [0, 0, 0, 1, 1, 1], "groups_per_batch": 4},
            ValueError,
            ["`groups_per_batch`", "at most 2"],
        ),
        (
            {"groups": [0, 0, 0, 0, 0, 1], "groups_per_batch": 2},
            ValueError,
            ["groups_per_batch = 2 usable classes in every group", "received 1"],
        ),
        (
            {"groups": [0, 1] * 12, "groups_per_batch": 2},
            ValueError,
            ["one group for all samples of a class", "`spread=`"],
        ),
        ({"groups": [0, 0, 0, 1, 1, "1"]}, TypeError, ["`groups`"]),
        ({"groups": [0, 0, 0, 1, 1, None]}, ValueError, ["`groups`", "None"]),
    ],
)
def test_bad_options_are_refused_in_words(options, error, fragments):
    with pytest.raises(error) as raised:
        PKPlan(LABELS, classes_per_batch=4, samples_per_class=2, **options)
    text = str(raised.value)
    assert text.startswith("Invalid value for `")
    for fragment in fragments:
        assert fragment in text
