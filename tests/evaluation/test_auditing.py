"""The audit of labels against loops, and mistakes that were made on purpose."""

import dataclasses

import numpy as np
import pytest
import reference

from kerastrip.evaluation import audit, auditing
from kerastrip.evaluation.auditing import LikeOne


def clusters(rng, sizes, apart=20.0, dim=4):
    y = np.repeat(np.arange(len(sizes)), sizes)
    x = rng.normal(size=(len(y), dim)) + apart * rng.normal(size=(len(sizes), dim))[y]
    return np.float32(x), y


def overlapping(rng, distance="euclidean"):
    """Classes of 1 to 30 rows, some of them mixed, with flips; no distance is tied."""
    x, y = clusters(rng, [1, 2, 3, 5, 8, 13, 21, 30], apart=1.5)
    x += 3 * (distance == "cosine")
    y[rng.choice(len(y), 6, replace=False)] = 4
    return x, y


@pytest.fixture
def all_pairs(monkeypatch):
    """The pairs of classes that mix at all, and not only the suspicious ones."""
    monkeypatch.setattr(auditing, "_MIXED", 1e-9)


@pytest.fixture
def all_classes(monkeypatch):
    """The cuts of all classes that are not mixed entirely; no pairs."""
    monkeypatch.setattr(auditing, "_MIXED", 1 - 1e-9)


class TestAgainstLoops:
    @pytest.mark.usefixtures("all_classes")
    @pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine"])
    @pytest.mark.parametrize("k", [3, 10])
    def test_rows(self, rng, distance, k):
        x, y = overlapping(rng, distance)
        found = audit(x, y, k=k, distance=distance).rows
        expected = reference.misplaced(x, y, k, distance)
        assert len(expected) > 8
        assert [one[:3] for one in found] == [one[:3] for one in expected]
        np.testing.assert_allclose(
            [one[3:] for one in found], [one[3:] for one in expected], atol=1e-4
        )

    @pytest.mark.usefixtures("all_pairs")
    @pytest.mark.parametrize("k", [3, 10])
    def test_pairs(self, rng, k):
        x, y = overlapping(rng)
        found = audit(x, y, k=k).pairs
        expected = reference.mixed_pairs(x, y, k)
        assert len(expected) > 5
        assert {one[:2] for one in found} == set(expected)
        for one in found:
            np.testing.assert_allclose(one[2:], expected[one[:2]], rtol=1e-9)
        assert [one.low for one in found] == sorted(
            (one.low for one in found), reverse=True
        )

    @pytest.mark.usefixtures("all_classes")
    @pytest.mark.parametrize("distance", ["euclidean", "cosine"])
    def test_classes(self, rng, distance):
        x, y = overlapping(rng, distance)
        found = audit(x, y, distance=distance).classes
        assert len(found) > 1
        if distance == "cosine":
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
        for one in found:
            members = np.flatnonzero(y == one.label)
            np.testing.assert_array_equal(np.sort(np.concatenate(one.parts)), members)
            assert len(one.parts[0]) >= len(one.parts[1])
            # The cut is where it should be: across the longest direction.
            inside = np.float64(x[members]) - x[members].mean(axis=0, dtype="float64")
            along = inside @ np.linalg.svd(inside)[2][0]
            side = np.isin(members, one.parts[0])
            assert (along[side] > 0).all() or (along[side] <= 0).all()
            mixing, high = reference.mixing_of_parts(x[members], side)
            np.testing.assert_allclose((one.mixing, one.high), (mixing, high))
        assert [one.high for one in found] == sorted(one.high for one in found)


class TestPlanted:
    def test_flipped_rows_are_found_and_named(self, rng):
        x, y = clusters(rng, [30] * 12)
        flipped = rng.choice(len(y), 18, replace=False)
        wrong = y.copy()
        wrong[flipped] = (y[flipped] + rng.integers(1, 12, 18)) % 12
        found = audit(x, wrong)
        assert {one.row for one in found.rows} == set(flipped)
        for one in found.rows:
            assert (one.label, one.suggested) == (wrong[one.row], y[one.row])
            assert one.nearer > 0.5
            assert one.share < 0.2
        assert not found.pairs
        assert not found.classes

    def test_split_classes_of_all_sizes_come_first(self, rng):
        x, y = clusters(rng, [8, 16, 60, 300, 40, 40, 40, 40])
        wrong = y.copy()
        for code in range(4):  # a quarter of the class gets another name
            wrong[np.flatnonzero(y == code)[::4]] = 100 + code
        found = audit(x, wrong)
        pairs = [(one.first, one.second) for one in found.pairs]
        assert set(pairs) == {(code, 100 + code) for code in range(4)}
        assert pairs[0] == (3, 103)  # of the many rows we are surest
        assert all(0.7 < one.mixing < 1.3 for one in found.pairs)
        assert all(0 < one.low < one.mixing for one in found.pairs)
        assert not found.rows  # the pairs explain them

    @pytest.mark.parametrize("sizes", [(15, 15), (20, 10), (150, 90), (30, 12)])
    def test_merged_classes_are_found_with_their_parts(self, rng, sizes):
        x, y = clusters(rng, [*sizes, 30, 30, 30, 200])
        wrong = np.maximum(y, 1)
        found = audit(x, wrong)
        assert [one.label for one in found.classes] == [1]
        assert found.classes[0].mixing < 0.1
        for part, code in zip(found.classes[0].parts, (0, 1), strict=True):
            np.testing.assert_array_equal(part, np.flatnonzero(y == code))
        assert not found.rows
        assert not found.pairs

    def test_a_class_with_a_few_strange_rows_is_not_two(self, rng):
        x, y = clusters(rng, [30] * 5)
        x[:2] = x[-2:]
        assert not audit(x, y).classes

    def test_order_of_the_rows_and_names_do_not_matter(self, rng):
        x, y = overlapping(rng)
        order = rng.permutation(len(y))
        names = np.array([f"class {code}" for code in y])
        one, other = audit(x, y), audit(x[order], names[order])
        assert [f"class {a.label}" for a in one.rows] == [b.label for b in other.rows]
        assert [a.row for a in one.rows] == [order[b.row] for b in other.rows]
        assert [a[2:] for a in one.pairs] == [b[2:] for b in other.pairs]

    @pytest.mark.usefixtures("all_pairs")
    def test_mixing_of_random_parts_is_one_in_the_mean(self, rng):
        mixing = []
        for _ in range(60):
            x = rng.normal(size=(70, 5))
            y = np.r_[np.zeros(12, int), np.ones(28, int), np.full(30, 2)]
            x[40:] += 50
            mixing += [one.mixing for one in audit(x, y).pairs]
        assert len(mixing) == 60
        np.testing.assert_allclose(np.mean(mixing), 1, atol=0.05)


class TestCorners:
    def test_equal_rows(self):
        found = audit(np.ones((40, 3)), np.arange(40) % 2, k=5)
        assert not found.rows  # no class is nearer than the other
        assert not found.classes

    def test_a_row_on_top_of_another_class(self, rng):
        x, y = clusters(rng, [10, 10])
        x[:10] = x[0]
        x[10] = x[0]
        (one,) = audit(x, y).rows
        assert (one.row, one.suggested, one.nearer) == (10, 0, 1.0)

    def test_tiny_classes(self, rng):
        x, y = clusters(rng, [1, 1, 2, 3, 4])
        found = audit(x, y)
        assert (found.rows, found.pairs, found.classes) == ([], [], [])
        x[4] = x[8]  # a row of the class of three in the class of four
        found = audit(x, y)
        assert [one[:3] for one in found.rows] == [(4, 3, 4)]
        assert (found.pairs, found.classes) == ([], [])

    def test_classes_of_one_row_each(self, rng):
        found = audit(rng.normal(size=(6, 2)), np.arange(6))
        assert (found.rows, found.pairs, found.classes) == ([], [], [])

    def test_one_hot_labels_with_an_empty_class(self, rng):
        x, y = clusters(rng, [10, 10])
        y[3] = 1
        by_code, by_hot = audit(x, y), audit(x, np.eye(4)[2 * y])
        assert [one.row for one in by_code.rows] == [one.row for one in by_hot.rows]
        assert by_hot.rows[0].suggested == 0
        assert by_hot.rows[0].label == 2

    def test_bad_input(self, rng):
        x, y = clusters(rng, [10, 10])
        with pytest.raises(ValueError, match="two classes or more, received one class"):
            audit(x, np.zeros(20, int))
        with pytest.raises(ValueError, match="expected 20 labels, received 19 labels"):
            audit(x, y[1:])
        with pytest.raises(ValueError, match="k"):
            audit(x, y, k=2)
        with pytest.raises(ValueError, match="distance"):
            audit(x, y, distance="manhattan")
        x[4] = np.nan
        with pytest.raises(ValueError, match="the first is row 4"):
            audit(x, y)


class TestTable:
    def test_text_and_html(self, rng):
        x, y = clusters(rng, [50] * 6)
        wrong = np.array(["<a>", "b", "c", "d", "e", "f"])[y]
        wrong[::25] = "<a>"
        found = audit(x, wrong)
        lines = str(found).splitlines()
        assert lines[0] == f"rows that look mislabelled: {len(found.rows)}"
        assert len(found.rows) == 10
        assert len(lines) == 14
        wrong[1::25] = "<a>"  # ten more, and two rows beside them
        assert "  ... and 12 more" in str(audit(x, wrong)).splitlines()
        assert lines[1].split() == ["row", "label", "suggested", "nearer", "share"]
        html = found._repr_html_()
        assert "&lt;a&gt;" in html
        assert "<a>" not in html
        assert html.count("<table>") == html.count("</table>") == 3

    def test_it_is_frozen_and_plain(self, rng):
        found = audit(*overlapping(rng))
        with pytest.raises(dataclasses.FrozenInstanceError):
            found.rows = []
        one = found.rows[0]
        assert [type(value) for value in one] == [int, int, int, float, float]
        assert [type(value) for value in found.pairs[0]] == [int, int, float, float]
        assert isinstance(found.pairs[0], LikeOne)
