"""The label table: any labels in, codes 0..C-1 out."""

from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kerastrip._labels import LabelTable, label_array

KINDS = {
    "int8": np.array([-128, 127, 3, -128], np.int8),
    "uint8": np.array([255, 0, 7, 255], np.uint8),
    "beyond 2**31": np.array([2**40, 5, 2**40 + 1, 2**40]),
    "beyond 2**53": np.array([2**62, 2**62 + 1, -(2**62), 2**62]),
    "uint64": np.array([2**64 - 1, 2**63, 0, 2**64 - 1], np.uint64),
    "dense uint64": np.array([2**64 - 1, 2**64 - 2, 2**64 - 1], np.uint64),
    "negative": np.array([-7, -1, 0, -7]),
    "sparse": np.array([10**12, -(10**12), 0, 10**12]),
    "booleans": np.array([True, False, True]),
    "strings": np.array(["b", "a", "äöü", "b"]),
    "bytes": np.array([b"b", b"a", b"cc", b"b"]),
    "objects: strings": np.array(["b", "a", "longer", "b"], object),
    "objects: bytes": np.array([b"a\0", b"a", b"", b"a\0"], object),
    "objects: integers": np.array([3, -1, np.int64(5), 3], object),
    "objects: big integers": np.array([2**70, -(2**70), 5, 2**70], object),
    "list of integers": [5, -1, 5, 0],
    "list of strings": ["b", "a", "b"],
    "list of bytes": [b"a\0", b"a", b"a\0"],
    "list of big integers": [2**63, -1, 2**63],
    "nothing masked": np.ma.array([5, -1, 5], mask=False),
    "big-endian integers": np.array([5, -1, 5, 2**40], ">i8"),
    "big-endian uint64": np.array([2**64 - 1, 2**64 - 2, 2**64 - 1], ">u8"),
    "big-endian strings": np.array(["b", "a", "b"], ">U1"),
}


def plain_codes(labels):
    """Codes by a dict and `sorted`, the obvious way."""
    labels = list(labels)
    place = {label: code for code, label in enumerate(sorted(set(labels)))}
    return [place[label] for label in labels]


@pytest.mark.parametrize("kind", KINDS)
def test_any_labels_are_coded_in_sorted_order(kind):
    labels = KINDS[kind]
    table = LabelTable(labels)
    values = labels.tolist() if isinstance(labels, np.ndarray) else labels
    assert table.codes.dtype == np.int32
    assert table.codes.tolist() == plain_codes(values)
    assert table.decode(table.codes).tolist() == values
    assert table.classes.tolist() == sorted(set(values))
    np.testing.assert_array_equal(table.encode(labels), table.codes)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-(2**80), 2**80), min_size=1)
    | st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1)
    | st.lists(st.integers(0, 2**64 - 1), min_size=1)
    | st.lists(st.binary(max_size=3), min_size=1)
    | st.lists(st.text(st.characters(exclude_characters="\0"), max_size=3), min_size=1)
)
def test_lists_of_integers_strings_and_bytes(labels):
    table = LabelTable(labels)
    assert table.codes.tolist() == plain_codes(labels)
    assert table.decode(table.codes).tolist() == labels


@pytest.mark.parametrize("dtype", [np.float32, np.int64, bool, np.uint8])
def test_one_hot_rows_are_their_columns_even_the_empty_ones(dtype):
    rows = np.eye(5, dtype=dtype)[[3, 0, 3, 1]]
    table = LabelTable(rows)
    assert table.codes.tolist() == [3, 0, 3, 1]
    assert table.classes.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(table.encode(rows), table.codes)


@pytest.mark.parametrize("labels", [[5, 2**40, 5], ["x", "y", "x"], [b"x", b"y", b"x"]])
def test_a_shared_table_gives_the_same_codes(labels):
    train = LabelTable(sorted(set(labels)) + labels)
    validation = LabelTable(labels[1:], train.classes)
    assert validation.codes.tolist() == train.encode(labels[1:]).tolist()
    np.testing.assert_array_equal(validation.classes, train.classes)


def test_tables_of_other_integer_types_compare_exactly():
    # As floats 2**63 and 2**63 + 1 would be the same.
    table = LabelTable(np.array([2**63, 2**63 + 1], np.uint64))
    assert table.encode([2**63 + 1]).tolist() == [1]
    for other in (np.array([-1]), np.array([2**62]), [2**70], [-(2**70)]):
        with pytest.raises(ValueError, match="labels among the 2"):
            table.encode(other)
    big = LabelTable([2**70, 5, -1])
    assert big.encode(np.array([5, -1], np.int8)).tolist() == [1, 0]
    narrow = LabelTable(np.array([-128, 127], np.int8))
    assert narrow.encode(np.array([127, -128])).tolist() == [1, 0]
    with pytest.raises(ValueError, match="received 128"):
        narrow.encode([128])


def test_large_arrays_are_coded_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr("kerastrip._labels._CHUNK", 7)
    for labels in (np.arange(50) % 6 - 2, (np.arange(50) % 6) * 10**12):
        assert LabelTable(labels).codes.tolist() == plain_codes(labels.tolist())
    with pytest.raises(ValueError, match=r"received 99\. It stands at position 23"):
        LabelTable([1] * 23 + [99], classes=[1, 2])


@pytest.mark.parametrize(
    ("labels", "classes", "named"),
    [
        ([1, 2, 9], [1, 2], "received 9"),
        (["a", "zebra"], ["a", "b"], "received 'zebra'"),
        ([b"a", b"z"], [b"a"], "received b'z'"),
        ([1, 2], ["1", "2"], "received 1"),
        ([-(10**15), 1], [1, 2], "received -1000000000000000"),
        ([2**63, 1], [1, 2], "received 9223372036854775808"),
        ([2**70, 1], [1, 2], "received 1180591620717411303424"),
    ],
)
def test_an_unknown_label_is_named(labels, classes, named):
    with pytest.raises(ValueError, match=named) as error:
        LabelTable(labels, classes)
    assert f"among the {len(classes)} known ones" in str(error.value)
    assert "`labels`" in str(error.value)


@pytest.mark.parametrize(
    ("labels", "error", "fragments"),
    [
        ([], ValueError, ["at least one label", "shape (0,)"]),
        (np.empty((0, 3)), ValueError, ["one-hot", "shape (0, 3)"]),
        ([1.0, 2.0], TypeError, ["integers, strings", "float64", ".astype(int)"]),
        (np.array([1, 2], np.float32), TypeError, ["float32", ".astype(int)"]),
        ([1.0, np.nan], ValueError, ["label for every sample", "NaN at position 1"]),
        (
            np.array([1, None, 2]),
            ValueError,
            ["for every sample", "None at position 1"],
        ),
        (np.array([1, np.nan], object), ValueError, ["NaN at position 1"]),
        (["a", "b", float("nan")], ValueError, ["NaN at position 2"]),
        (["a", np.ma.masked], ValueError, ["masked at position 1"]),
        (np.ma.array([1, 2], mask=[0, 1]), ValueError, ["1 masked", "position 1"]),
        (np.ma.array(np.eye(2), mask=np.eye(2)), ValueError, ["position 0, 0"]),
        (["a", 1], TypeError, ["one kind", "int (1 at position 1), str ('a' at"]),
        (deque(["a", 1]), TypeError, ["one kind", "int (1 at position 1)"]),
        (["a", b"a"], TypeError, ["one kind", "bytes (b'a' at position 1), str"]),
        ([[1], [2]], ValueError, ["one-hot", "shape (2, 1)", ".ravel()"]),
        ([[0.5, 0.5]], ValueError, ["one-hot", "shape (1, 2)", "mixed or smoothed"]),
        ([[7, 1], [8, 1]], ValueError, ["one-hot", "Choose the column", "[:, 0]"]),
        ([True, 2, 3], TypeError, ["one kind", "bool (True at position 0), int (2 at"]),
        (np.array([2, True], object), TypeError, ["one kind", "bool (True at"]),
        ([2, np.True_], TypeError, ["one kind", "int (2 at position 0)"]),
        ([[0, 0], [1, 0]], ValueError, ["one-hot"]),
        ([[1, 1], [1, 0]], ValueError, ["one-hot"]),
        ([["a", "b"]], ValueError, ["one-hot"]),
        (np.zeros((2, 2, 2)), ValueError, ["(samples,) or", "(2, 2, 2)"]),
        (7, ValueError, ["(samples,) or"]),
        ("word", ValueError, ["(samples,) or"]),
        (None, ValueError, ["(samples,) or", "None"]),
        (np.array(["2020-01-01"], "M8[D]"), TypeError, ["integers", "datetime64"]),
        (np.array([1j, 2]), TypeError, ["integers", "complex128"]),
    ],
)
def test_bad_labels_are_refused_in_words(labels, error, fragments):
    with pytest.raises(error) as raised:
        LabelTable(labels)
    for fragment in ["Invalid value for `labels`", *fragments]:
        assert fragment in str(raised.value)


def test_bad_tables_and_codes_are_refused():
    with pytest.raises(ValueError, match=r"`classes`.*at least one label"):
        LabelTable([1], classes=[])
    with pytest.raises(TypeError, match="`classes`"):
        LabelTable([1], classes=[1.5])
    with pytest.raises(ValueError, match=r"`classes`.*one-dimensional"):
        LabelTable([1], classes=np.eye(3))
    table = LabelTable([4, 5, 6])
    with pytest.raises(TypeError, match="`codes`: expected integers"):
        table.decode([0.0])
    for codes in ([-1, 0], [3]):
        with pytest.raises(ValueError, match=r"integers in 0\.\.2"):
            table.decode(codes)
    assert table.decode(np.empty(0, int)).tolist() == []
    assert table.decode(2) == 6


def test_a_source_in_place_of_labels_is_told_where_they_are():
    class Photos:
        labels = (1, 2)

    with pytest.raises(ValueError, match="Pass the `labels` of the Photos"):
        LabelTable(Photos())


def test_pandas_labels_that_are_missing_are_named():
    pd = pytest.importorskip("pandas")
    for labels in (
        pd.Series([1, pd.NA, 2], dtype="Int64"),
        pd.Series(["a", pd.NA, "b"], dtype="string"),
        pd.Series(["a", None, "b"], dtype="category"),
        pd.Series(["a", pd.NaT, "b"], dtype=object),
        ["a", pd.NA, "b"],
    ):
        with pytest.raises(ValueError, match=r"`y`.*every sample.*at position 1"):
            LabelTable(labels, name="y")


def test_labels_that_are_all_booleans_are_two_classes():
    for labels in ([True, False], [np.True_, False], np.array([True, False], object)):
        assert LabelTable(labels).codes.tolist() == [1, 0]


@pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="NumPy before 2")
def test_numpys_texts_of_any_length_are_labels_and_missing_ones_are_named():
    names = ["b", "a", "a long name" * 9]
    for missing in ({}, {"na_object": None}, {"na_object": np.nan}):
        dtype = np.dtypes.StringDType(**missing)
        table = LabelTable(np.array(names, dtype))
        assert table.decode(table.codes).tolist() == names
        assert label_array(np.array(names, dtype)).tolist() == names
        if missing:
            gap = np.array(["a", missing["na_object"]], dtype)
            with pytest.raises(ValueError, match=r"for every sample.*at position 1"):
                LabelTable(gap)


def test_labels_are_checked_before_they_become_an_array():
    assert label_array(["b", "a"]).tolist() == ["b", "a"]
    np.testing.assert_array_equal(label_array(np.eye(2)), np.eye(2))
    given = np.arange(3)
    assert not np.shares_memory(label_array(given), given)
    with pytest.raises(ValueError, match=r"`labels`.*NaN at position 1"):
        label_array(["cat", float("nan")])
    with pytest.raises(TypeError, match="labels of one kind"):
        label_array([1, "x"])


def test_weights_by_label_become_weights_by_code():
    table = LabelTable([4, 1, 3, 2])
    assert table.class_weight({1: 5, 4: 0.5}) == {0: 5.0, 3: 0.5}
    assert LabelTable(["b", "a"]).class_weight({"b": np.float32(2)}) == {1: 2.0}
    with pytest.raises(ValueError, match=r"`class_weight`.*received 9"):
        table.class_weight({1: 1.0, 9: 2.0})
    with pytest.raises(ValueError, match=r"`class_weight\[1\]`.*received nan"):
        table.class_weight({1: np.nan})
    with pytest.raises(TypeError, match="a dict"):
        table.class_weight([1.0, 2.0])
