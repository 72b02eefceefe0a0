"""PKPlan keeps its promises: any label histogram, any order of calls."""

import pickle
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from harness import epoch_of, histogram, planned
from hypothesis import given, settings
from hypothesis import strategies as st

from kerastrip.sampling import plan as plan_module
from kerastrip.sampling.plan import PKPlan

MODES = ("balanced", "coverage")


@st.composite
def cases(draw, smallest=1):
    """Labels of random class sizes, P and K that fit them, options."""
    sizes = draw(st.lists(st.integers(smallest, 25), min_size=2, max_size=12))
    usable = sum(size >= 2 for size in sizes)
    if not usable:
        sizes[0], usable = 2, 1
    p = draw(st.integers(1, usable))
    k = draw(st.integers(2, 7))
    return histogram(sizes, draw(st.integers(0, 9))), p, k


def check_rows(labels, rows):
    """P distinct classes, K rows each, distinct or all and then topped up."""
    sizes = Counter(labels.tolist())
    for batch in rows:
        of_rows = labels[batch]
        assert (of_rows == of_rows[:, :1]).all()
        assert len(set(of_rows[:, 0].tolist())) == len(batch)
        for row, label in zip(batch.tolist(), of_rows[:, 0].tolist(), strict=True):
            times = Counter(row)
            assert len(times) == min(sizes[label], len(row))
            assert max(times.values()) - min(times.values()) <= 1


# ------------------------------------------------------------------ the promises


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_balanced_epochs(case, data):
    labels, p, k = case
    length = data.draw(st.none() | st.integers(1, 12))
    plan = planned(labels, p, k, batches_per_epoch=length)
    sizes = np.bincount(labels)
    kept = np.flatnonzero(sizes >= 2)
    assert len(plan) == (length or -(-sizes[kept].sum() // (p * k)))
    members = [np.flatnonzero(labels == label) for label in range(len(sizes))]
    uses = np.zeros(len(labels), int)
    total = np.zeros(len(sizes), int)
    for epoch in range(3):
        rows = epoch_of(plan, epoch)
        assert rows.dtype == np.int64
        assert rows.shape == (len(plan), p, k)
        check_rows(labels, rows)
        draws = np.bincount(labels[rows[..., 0]].ravel(), minlength=len(sizes))
        assert np.ptp(draws[kept]) <= 1
        assert draws.sum() == draws[kept].sum()
        total += draws
        assert np.ptp(total[kept]) <= 1
        for batch in rows:
            np.add.at(uses, batch.ravel(), 1)
            for label in labels[batch[:, 0]]:
                assert np.ptp(uses[members[label]]) <= 1


@settings(max_examples=100, deadline=None)
@given(cases(), st.none() | st.integers(1, 12))
def test_coverage_epochs(case, limit):
    labels, p, k = case
    plan = planned(labels, p, k, epoch_mode="coverage", max_per_class=limit)
    sizes = np.bincount(labels)
    kept = sizes >= 2
    wanted = np.minimum(sizes, limit or sizes.max())
    groups = -(-wanted[kept] // k)
    assert len(plan) == max(-(-groups.sum() // p), groups.max())
    for epoch in range(3):
        rows = epoch_of(plan, epoch)
        if limit is None:
            check_rows(labels, rows)
        uses = np.bincount(rows.ravel(), minlength=len(labels))
        draws = np.bincount(labels[rows[..., 0]].ravel(), minlength=len(sizes))
        for label in np.flatnonzero(kept):
            of_class = uses[labels == label]
            # Each of the samples whose turn it is, and as evenly as K allows.
            assert (of_class > 0).sum() == wanted[label]
            assert np.ptp(of_class[of_class > 0]) <= 1
        assert not uses[~kept[labels]].any()
        # A class with a spare draw got it when no other had fewer.
        spare = draws[kept] > groups
        if spare.any():
            assert draws[kept][spare].max() - 1 <= draws[kept].min()


@pytest.mark.parametrize("limit", [3, 4, 5, 10])
def test_max_per_class_takes_other_samples_each_epoch(limit):
    labels = histogram([10, 3, 23])
    plan = planned(labels, 2, 2, epoch_mode="coverage", max_per_class=limit)
    uses = np.zeros(len(labels), int)
    for epoch in range(12):
        seen = np.unique(epoch_of(plan, epoch))
        uses[seen] += 1
        for label in range(3):
            assert (labels[seen] == label).sum() == min((labels == label).sum(), limit)
            assert np.ptp(uses[labels == label]) <= 1


@pytest.mark.parametrize("mode", MODES)
def test_long_tails(mode):
    zipf = (300 / np.arange(1, 41)).astype(int) + 2
    for sizes in (zipf, [500] + [2, 3, 5] * 30, [7] * 9 + [1000]):
        labels = histogram(sizes)
        plan = planned(labels, 6, 4, epoch_mode=mode)
        rows = epoch_of(plan, 0)
        check_rows(labels, rows)
        if mode == "coverage":
            assert len(np.unique(rows)) == len(labels)
            groups = -(-np.array(sizes) // 4)
            assert len(plan) == max(-(-groups.sum() // 6), groups.max())


def test_two_epochs_have_nothing_in_common():
    labels = histogram([20] * 30)
    for mode in MODES:
        plan = planned(labels, 5, 4, epoch_mode=mode)
        for other in (epoch_of(plan, 1), epoch_of(planned(labels, 5, 4, seed=1), 0)):
            rows = epoch_of(plan, 0)
            common = {tuple(sorted(draw)) for draw in rows.reshape(-1, 4).tolist()}
            common &= {tuple(sorted(draw)) for draw in other.reshape(-1, 4).tolist()}
            assert len(common) < 5
            together = {tuple(sorted(batch)) for batch in labels[rows[..., 0]].tolist()}
            assert len(together) > 25


def met_others(plan, labels, classes, epochs):
    """`(epochs, classes)` other classes met, and expected of random distinct P.

    The expectation takes the classes as often as they were drawn; the others of a
    batch are drawn at random in proportion to their own draws.
    """
    p = plan.classes_per_batch
    met, expected = np.zeros((2, epochs, classes))
    for epoch in range(epochs):
        drawn = labels[epoch_of(plan, epoch)[..., 0]]
        together = np.zeros((classes, classes), bool)
        for batch in drawn:
            together[np.ix_(batch, batch)] = True
        np.fill_diagonal(together, False)
        met[epoch] = together.sum(axis=1)
        draws = np.bincount(drawn.ravel(), minlength=classes)
        for one in range(classes):
            chance = draws * (p - 1) / (draws.sum() - draws[one])
            missed = (1 - np.minimum(chance, 1)) ** draws[one]
            expected[epoch, one] = classes - missed.sum() - (1 - missed[one])
    return met, expected


@pytest.mark.parametrize(
    ("classes", "p", "batches"),
    [(144, 8, None), (63, 8, None), (64, 8, 65), (100, 16, 30), (29, 16, None)],
)
def test_balanced_classes_mix(classes, p, batches):
    labels = np.repeat(np.arange(classes), 20)
    plan = planned(labels, p, 4, batches_per_epoch=batches)
    met, expected = met_others(plan, labels, classes, epochs=3)
    assert met.mean() >= 0.95 * expected.mean()
    assert (met.mean(axis=0) >= 0.8 * expected.mean(axis=0)).all()


LONG_TAIL = [964] + [20] * 143
ZIPF = (2000 / np.arange(1, 145)).astype(int) + 2


@pytest.mark.parametrize(
    ("sizes", "p"),
    [
        ([20] * 144, 8),
        (LONG_TAIL, 8),
        (LONG_TAIL, 32),
        (ZIPF, 8),
        ([964] * 9 + [9] * 99, 8),
        ([200] * 6 + [12] * 30, 4),
    ],
)
def test_covered_classes_mix(sizes, p):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    plan = planned(labels, p, 4, epoch_mode="coverage")
    met, expected = met_others(plan, labels, len(sizes), epochs=2)
    assert met.mean() >= 0.8 * expected.mean()
    assert (met >= 0.5 * expected).all()
    if sizes is LONG_TAIL:
        assert (met[:, 0] == 143).all()


# ------------------------------------------------- a pure function of (epoch, step)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(MODES), st.data())
def test_any_order_of_calls_gives_the_same_rows(case, mode, data):
    labels, p, k = case
    plan = planned(labels, p, k, epoch_mode=mode, seed=3)
    expected = [epoch_of(plan, epoch).reshape(len(plan), -1) for epoch in range(3)]
    fresh = planned(labels.copy(), p, k, epoch_mode=mode, seed=3)
    steps = st.tuples(st.integers(0, 2), st.integers(0, len(plan) - 1))
    for epoch, step in data.draw(st.lists(steps, min_size=5, max_size=20)):
        np.testing.assert_array_equal(fresh.indices(epoch, step), expected[epoch][step])
        copy = pickle.loads(pickle.dumps(fresh))
        np.testing.assert_array_equal(copy.indices(epoch, step), expected[epoch][step])


@pytest.mark.parametrize("mode", MODES)
def test_blocks_end_anywhere(mode, monkeypatch):
    labels = histogram([9, 4, 30, 2, 7, 7, 7])
    expected = None
    for block in (1, 12, 40, 90, 1 << 20):
        monkeypatch.setattr(plan_module, "_BLOCK", block)
        plan = planned(labels, 3, 4, epoch_mode=mode)
        rows = [epoch_of(plan, epoch) for epoch in range(3)]
        expected = rows if expected is None else expected
        for some, others in zip(rows, expected, strict=True):
            np.testing.assert_array_equal(some, others)


@pytest.mark.parametrize("mode", MODES)
def test_threads_get_the_same_rows(mode):
    labels = histogram([9, 4, 30, 2, 7, 7, 7])
    expected = [epoch_of(planned(labels, 3, 4, epoch_mode=mode), e) for e in range(4)]
    plan = planned(labels, 3, 4, epoch_mode=mode)
    start = threading.Barrier(8)

    def ask(thread):
        order = np.random.default_rng(thread % 3).permutation(4 * len(plan))
        start.wait(timeout=60)
        for at in order if thread % 2 else range(4 * len(plan)):
            epoch, step = divmod(int(at), len(plan))
            np.testing.assert_array_equal(
                plan.indices(epoch, step).reshape(3, 4), expected[epoch][step]
            )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))


def test_rows_belong_to_the_caller():
    plan = planned(histogram([5, 6, 7]), 2, 2)
    expected = plan.indices(0, 1)
    plan.indices(0, 1)[:] = -1
    np.testing.assert_array_equal(plan.indices(0, 1), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, object])
def test_labels_changed_later_do_not_change_the_plan(dtype):
    labels = histogram([5, 6, 7]).astype(dtype)
    groups = labels % 1
    plan = planned(labels, 2, 2, groups=groups)
    expected = epoch_of(planned(labels.copy(), 2, 2), 0)
    labels[:], groups[:] = 0, 1
    np.testing.assert_array_equal(epoch_of(plan, 0), expected)
    assert np.bincount(plan.codes).tolist() == [5, 6, 7]


def test_far_epochs_cost_no_more():
    plan = planned(histogram([5, 6, 7]), 2, 2)
    rows = plan.indices(10**12, 3)
    check_rows(plan.codes, rows.reshape(1, 2, 2))


@pytest.mark.parametrize("seed", [-1, 0, 2**40, 2**64, 2**64 + 1, -(2**100)])
def test_any_integer_is_a_seed_of_its_own(seed):
    labels = histogram([20] * 10)
    rows = epoch_of(planned(labels, 4, 2, seed=seed), 0)
    for other in (1, 5, 2**64 - 2):
        assert (rows != epoch_of(planned(labels, 4, 2, seed=other), 0)).mean() > 0.5


GOLDEN = {
    "balanced": (
        {"labels": list("abcabcabcab"), "p": 2, "k": 2, "seed": 0},
        [[7, 10, 9, 0], [2, 5, 3, 6], [7, 10, 3, 0], [5, 8, 9, 6]],
    ),
    "coverage in groups": (
        {
            "labels": [7, 7, 7, 7, 7, 8, 8, 9, 9, 9, 5, 5],
            "p": 2,
            "k": 2,
            "epoch_mode": "coverage",
            "groups": [0, 0, 1, 1],
            "seed": 2**70,
        },
        [[1, 0, 10, 11], [4, 0, 10, 11], [5, 6, 8, 7], [6, 5, 9, 8]],
    ),
    "few samples, last shard": (
        {
            "labels": [0, 1, 2, 3] * 3 + [3] * 4,
            "p": 4,
            "k": 5,
            "shard": (1, 2),
            "batches_per_epoch": 2,
            "seed": -3,
        },
        [
            [1, 5, 9, 1, 5, 2, 6, 10, 2, 6],
            [0, 4, 8, 8, 0, 2, 6, 10, 10, 6],
            [2, 6, 10, 2, 10, 1, 5, 9, 1, 9],
            [11, 12, 13, 15, 3, 2, 6, 10, 2, 6],
        ],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_rows_of_a_seed_do_not_change(name):
    options, expected = GOLDEN[name]
    plan = planned(**options)
    rows = [plan.indices(epoch, step).tolist() for epoch in (0, 1) for step in (0, 1)]
    assert rows == expected


# ------------------------------------------------------------------------ shards


@settings(max_examples=40, deadline=None)
@given(cases(smallest=2), st.sampled_from(MODES), st.data())
def test_shards_are_the_parts_of_the_global_batch(case, mode, data):
    labels, p, k = case
    count = data.draw(st.sampled_from([n for n in range(1, p + 1) if p % n == 0]))
    whole = planned(labels, p, k, epoch_mode=mode)
    shards = [
        planned(labels, p, k, epoch_mode=mode, shard=(index, count))
        for index in range(count)
    ]
    for epoch, step in ((0, 0), (1, len(whole) - 1), (1, 0)):
        rows = whole.indices(epoch, step)
        for shard in shards:
            assert len(shard) == len(whole)
            part = shard.indices(epoch, step)
            last = shard.first_row + len(part)
            np.testing.assert_array_equal(part, rows[shard.first_row : last])
        joined = [shard.indices(epoch, step) for shard in shards]
        np.testing.assert_array_equal(np.concatenate(joined), rows)
    assert shards[0].report() == whole.report()


# ------------------------------------------------------------------------ groups


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(MODES), st.booleans(), st.data())
def test_batches_of_one_group(mode, per_sample, data):
    p, k = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 4))
    sizes = st.lists(st.integers(2, 9), min_size=p, max_size=3 * p)
    parts = data.draw(st.lists(sizes, min_size=1, max_size=3))
    # Classes 0, 1, ... of each group; per sample, groups share these labels.
    group_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    label_of = np.concatenate([np.arange(len(part)) for part in parts])
    if not per_sample:
        label_of = label_of + 100 * group_of
    flat = np.concatenate(parts)
    order = np.random.default_rng(0).permutation(flat.sum())
    labels, groups = (np.repeat(of, flat)[order] for of in (label_of, group_of))
    names = np.array(["north", "south", "west"])
    given_groups = names[groups if per_sample else group_of]
    plan = planned(labels, p, k, epoch_mode=mode, groups=given_groups)
    turns = np.zeros(len(parts), int)
    for epoch in range(2):
        rows = epoch_of(plan, epoch)
        of_batch = groups[rows].reshape(len(plan), -1)
        assert (of_batch == of_batch[:, :1]).all()
        for group in range(len(parts)):
            mine = np.where(groups == group, labels, -1)
            check_rows(mine, rows[of_batch[:, 0] == group])
        turns += np.bincount(of_batch[:, 0], minlength=len(parts))
        if mode == "coverage":
            assert len(np.unique(rows)) == len(labels)
            lengths = []
            for part in parts:
                draws = -(-np.array(part) // k)
                lengths.append(max(-(-draws.sum() // p), draws.max()))
            assert turns.tolist() == [(epoch + 1) * length for length in lengths]
        else:
            share = np.array([len(part) for part in parts]) / len(flat)
            assert np.abs(turns - turns.sum() * share).max() < len(parts)


# ------------------------------------------- small classes, warnings and the report


def test_small_classes_repeat():
    labels = histogram([2, 3, 8, 1])
    plan = planned(labels, 3, 4)
    rows = epoch_of(plan, 0)
    check_rows(labels, rows)
    assert 3 not in labels[rows]
    assert plan.classes_.tolist() == [0, 1, 2, 3]


def test_small_classes_are_dropped():
    labels = histogram([2, 3, 8, 4, 5])
    plan = planned(labels, 2, 4, small_classes="drop")
    assert set(labels[epoch_of(plan, 0)].ravel().tolist()) == {2, 3, 4}
    plan = planned(labels, 2, 4, small_classes="drop", min_class_size=5)
    assert set(labels[epoch_of(plan, 0)].ravel().tolist()) == {2, 4}
    assert len(plan.classes_) == 5


def test_single_samples_may_be_kept():
    labels = histogram([1, 1, 5])
    plan = planned(labels, 3, 2, min_class_size=1)
    check_rows(labels, epoch_of(plan, 0))


def caught(labels, p, k, **options):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        PKPlan(labels, classes_per_batch=p, samples_per_class=k, **options)
    assert all(warning.filename == __file__ for warning in told)
    return [str(warning.message) for warning in told]


def test_nothing_to_warn_about():
    assert caught(histogram([4, 4, 9]), 2, 4) == []
    assert caught(histogram([4, 4, 5]), 2, 4, epoch_mode="coverage") == []


def test_one_warning_names_at_most_ten_classes():
    words = [f"class{number:02}" for number in range(20)]
    labels = [word for word in words for _ in range(1 if word < "class13" else 3)]
    (text,) = caught(labels + ["big"] * 9, 2, 4)
    assert "13 of 21 classes have fewer than 2 samples and are left out" in text
    assert "'class00', 'class01'" in text
    assert "'class09' and 3 more" in text
    assert "class10" not in text
    assert "7 of 21 classes have fewer than samples_per_class=4" in text
    assert "'class13', " in text
    assert "'class19'." in text
    _, text = caught(labels + ["big"] * 9, 1, 4, small_classes="drop")
    assert "20 of 21 classes" in text
    assert "repeat" not in text


def test_one_row_per_class_or_one_class_warns():
    (text,) = caught(histogram([4, 4]), 2, 1)
    assert "samples_per_class=1" in text
    assert "no positives" in text
    (text,) = caught(histogram([4, 4]), 1, 2)
    assert "classes_per_batch=1" in text
    assert "no negatives" in text


def test_one_class_is_too_few():
    with pytest.raises(ValueError, match=r"at most 1, .* A triplet takes two classes"):
        PKPlan([7] * 9, classes_per_batch=2, samples_per_class=4)


def test_a_long_coverage_epoch_warns():
    labels = histogram([100, 4, 4, 4])
    (text,) = caught(labels, 4, 4, epoch_mode="coverage")
    assert "400 rows for 112 samples" in text
    assert "(0, 100 samples) alone needs 25 batches" in text
    assert "`max_per_class`" in text
    assert caught(labels, 4, 4, epoch_mode="coverage", max_per_class=8) == []
    # Exactly twice is not more than twice.
    assert caught([0] * 6 + [1, 1, 2, 2, 3, 3], 4, 2, epoch_mode="coverage") == []


@settings(max_examples=80, deadline=None)
@given(cases(), st.sampled_from(MODES), st.data())
def test_the_report_is_what_epoch_0_does(case, mode, data):
    labels, p, k = case
    options = {}
    if mode == "coverage":
        options["max_per_class"] = data.draw(st.none() | st.integers(1, 10))
    else:
        options["batches_per_epoch"] = data.draw(st.none() | st.integers(1, 10))
    plan = planned(labels, p, k, epoch_mode=mode, **options)
    report = plan.report()
    rows = epoch_of(plan, 0)
    sizes = np.bincount(labels)
    kept = sizes >= 2
    draws = np.bincount(labels[rows[..., 0]].ravel(), minlength=len(sizes))[kept]
    assert report.classes_kept == kept.sum()
    assert report.classes_left_out == ((sizes > 0) & ~kept).sum()
    assert report.samples_kept == sizes[kept].sum()
    assert report.samples_left_out == sizes[~kept].sum()
    assert report.batches_per_epoch == len(plan) == len(rows)
    assert report.rows_per_epoch == rows.size
    assert report.samples_seen == len(np.unique(rows))
    assert report.coverage == len(np.unique(rows)) / sizes[kept].sum()
    assert report.repeats_per_epoch == rows.size - len(np.unique(rows))
    for (label, count), extreme in (
        (report.least_drawn, draws.min()),
        (report.most_drawn, draws.max()),
    ):
        assert count == extreme
        assert (labels[rows[..., 0]] == label).sum() == count


@pytest.mark.parametrize("groups", [False, True])
def test_substitutes_are_the_samples_of_the_class_shuffled_by_the_key(groups):
    labels = np.repeat(np.arange(3), 200)
    rooms = np.arange(600) % 2 if groups else np.zeros(600, int)
    plan = planned(labels, 2, 3, groups=rooms, seed=4)
    seen = set()
    for epoch, step, position in (
        (0, 0, 0),
        (0, 0, 1),
        (0, 0, 5),
        (0, 1, 0),
        (3, 0, 0),
    ):
        row = plan.indices(epoch, step)[position]
        others = list(plan.substitutes(epoch, step, position))
        unit = (labels == labels[row]) & (rooms == rooms[row])
        assert sorted(others) == np.flatnonzero(unit).tolist()
        seen.add(tuple(np.array(others) % 200))
    assert len(seen) == 5


def test_a_notebook_shows_the_report_as_a_table():
    report = planned(["<b>"] * 4 + ["c"] * 4, 2, 2).report()
    shown = report._repr_html_()
    assert shown.count("<tr>") == 12
    assert "<td>coverage</td><td>100.0%</td>" in shown
    assert "&lt;b&gt; (2 times)" in shown


def test_the_report_prints_as_a_table():
    report = planned(list("aaaabbbbbbc"), 2, 2).report()
    lines = [line.split(maxsplit=0)[0] for line in str(report).splitlines()]
    assert [line[:20].strip() for line in lines] == [
        "classes kept",
        "classes left out",
        "samples kept",
        "samples left out",
        "batches per epoch",
        "rows per epoch",
        "samples seen",
        "coverage",
        "repeats per epoch",
        "least drawn",
        "most drawn",
        "samples broken",
    ]
    values = [line[20:] for line in lines]
    assert values == [
        "2",
        "1",
        "10",
        "1",
        "3",
        "12",
        "10",
        "100.0%",
        "2",
        "a (3 times)",
        "a (3 times)",
        "0",
    ]


# --------------------------------------------------------------- labels and tables


@pytest.mark.parametrize(
    "of",
    [
        lambda codes: codes.astype(np.int16) - 100,
        lambda codes: codes.astype(np.int64) * 10**10,
        lambda codes: codes.astype(np.uint64) + np.uint64(2**63),
        lambda codes: np.array(["p", "q", "r", "s"])[codes],
        lambda codes: np.array([b"p", b"q", b"r", b"s"])[codes],
        lambda codes: [2**70 + code for code in codes.tolist()],
        lambda codes: np.eye(4)[codes],
        lambda codes: np.array(["p", "q", "r", "s"], object)[codes],
    ],
)
def test_only_the_codes_of_labels_matter(of):
    codes = histogram([4, 5, 6, 7])
    plan = planned(of(codes), 3, 2)
    np.testing.assert_array_equal(plan.codes, codes)
    assert plan.codes.dtype == np.int32
    np.testing.assert_array_equal(plan.encode(of(codes)), codes)
    np.testing.assert_array_equal(epoch_of(plan, 1), epoch_of(planned(codes, 3, 2), 1))
    decoded = plan.decode(plan.indices(0, 0) * 0 + 2)
    assert (decoded == plan.classes_[2]).all()


def test_a_validation_plan_shares_the_table():
    train = planned(list("abcd") * 3, 2, 2)
    validation = planned(list("bd") * 3, 2, 2, classes=train.classes_)
    assert validation.classes_.tolist() == list("abcd")
    assert set(validation.codes.tolist()) == {1, 3}
    assert set(validation.codes[validation.indices(0, 0)].tolist()) == {1, 3}
    with pytest.raises(ValueError, match="received 'e'"):
        planned(list("be") * 3, 2, 2, classes=train.classes_)


# ---------------------------------------------------------------------- bad input


LABELS = np.repeat(np.arange(6), 4)


@pytest.mark.parametrize(
    ("options", "error", "fragments"),
    [
        ({"classes_per_batch": 7}, ValueError, ["at most 6", "7", "Draw fewer"]),
        (
            {"min_class_size": 5},
            ValueError,
            ["classes_per_batch", "two classes of at least 5 samples"],
        ),
        ({"classes_per_batch": 0}, ValueError, ["integer of at least 1", "0"]),
        ({"classes_per_batch": 2.0}, TypeError, ["integer of at least 1", "2.0"]),
        ({"classes_per_batch": True}, TypeError, ["integer", "True"]),
        ({"samples_per_class": 0}, ValueError, ["integer of at least 1", "0"]),
        ({"samples_per_class": "4"}, TypeError, ["integer of at least 1", "'4'"]),
        ({"epoch_mode": "balance"}, ValueError, ["'balanced', 'coverage'", "mean"]),
        ({"small_classes": "keep"}, ValueError, ["'repeat', 'drop', 'error'"]),
        (
            {"small_classes": "error", "samples_per_class": 5},
            ValueError,
            ["'repeat' or 'drop'", "samples_per_class=5", "fewer: 0, 1, 2, 3, 4, 5."],
        ),
        ({"min_class_size": 0}, ValueError, ["integer of at least 1"]),
        ({"batches_per_epoch": 0}, ValueError, ["integer of at least 1", "0"]),
        ({"batches_per_epoch": -3}, ValueError, ["integer of at least 1", "-3"]),
        ({"batches_per_epoch": 2.5}, TypeError, ["integer", "2.5"]),
        (
            {"batches_per_epoch": 3, "epoch_mode": "coverage"},
            ValueError,
            ["None with epoch_mode='coverage'", "3", "`max_per_class`"],
        ),
        ({"max_per_class": 4}, ValueError, ["None with", "`batches_per_epoch`"]),
        (
            {"max_per_class": 0, "epoch_mode": "coverage"},
            ValueError,
            ["integer of at least 1"],
        ),
        ({"seed": 1.5}, TypeError, ["an integer", "1.5"]),
        ({"seed": None}, TypeError, ["an integer", "None"]),
        ({"shard": (2, 2)}, ValueError, ["an index in 0..1", "(2, 2)"]),
        ({"shard": (-1, 2)}, ValueError, ["at least 0", "-1"]),
        ({"shard": (0, 0)}, ValueError, ["at least 1"]),
        ({"shard": 1}, TypeError, ["(index, count)", "1"]),
        ({"shard": (0, 1, 2)}, TypeError, ["(index, count)"]),
        (
            {"shard": (0, 3)},
            ValueError,
            ["divides classes_per_batch=4", "classes_per_batch=3 would do"],
        ),
        (
            {"groups": [0, 0, 0, 1, 1, 1]},
            ValueError,
            ["classes_per_batch=4 usable classes in every group", "received 3"],
        ),
        (
            {"groups": [0, 0, 1]},
            ValueError,
            ["24 samples or of 6 classes", "received 3 groups"],
        ),
        ({"groups": [0.5] * 6}, TypeError, ["`groups`", "float64"]),
        ({"classes": [0, 1, 2]}, ValueError, ["`labels`", "received 3"]),
    ],
)
def test_bad_options_are_refused_in_words(options, error, fragments):
    allowed = {"classes_per_batch": 4, "samples_per_class": 2}
    with pytest.raises(error) as raised:
        PKPlan(LABELS, **{**allowed, **options})
    text = str(raised.value)
    assert text.startswith("Invalid value for `")
    assert any(
        f"`{name}`" in text for name in (*options, "classes_per_batch", "labels")
    )
    for fragment in fragments:
        assert fragment in text


def test_bad_labels_are_refused():
    for labels in ([], [1.5, 2.5], np.zeros((4, 2)), [1.0, np.nan]):
        with pytest.raises((ValueError, TypeError), match="`labels`"):
            planned(labels, 1, 2)


@pytest.mark.parametrize("step", [-1, 3, 10**6])
def test_there_is_no_such_step(step):
    plan = planned(LABELS, 4, 2)
    assert len(plan) == 3
    with pytest.raises(IndexError, match=rf"0\.\.2, received {step}"):
        plan.indices(0, step)


def test_there_is_no_such_epoch():
    plan = planned(LABELS, 4, 2)
    with pytest.raises(ValueError, match="`epoch`: expected an integer of at least 0"):
        plan.indices(-1, 0)
    with pytest.raises(TypeError, match="`epoch`"):
        plan.indices(0.0, 0)
    with pytest.raises(TypeError, match="`step`"):
        plan.indices(0, 1.0)
    rows = plan.indices(np.int64(1), np.int32(2))
    np.testing.assert_array_equal(rows, plan.indices(1, 2))
