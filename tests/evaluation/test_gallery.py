"""Gallery: enrol, search, identify, calibrate, save and load."""

import importlib
import io
import os
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kerastrip import Gallery, search
from kerastrip.evaluation import identification_curve

DISTANCES = ("euclidean", "squared_euclidean", "cosine")
NAMES = ["ann", "bob", "ann", "cy"]
ROWS = np.float32([[0, 1], [3, 4], [0, 2], [9, 9]])


def state(gallery):
    """All that a gallery holds, comparable."""
    rows, labels = gallery.embeddings, gallery.labels
    settings = gallery.threshold, gallery.distance
    return rows.tobytes(), rows.shape, labels.dtype, labels.tolist(), settings


@pytest.fixture
def gallery():
    return Gallery(ROWS, NAMES, threshold=1.5)


# Enrolled rows


def test_what_was_enrolled_is_a_copy_that_nobody_changes(gallery):
    rows = ROWS.copy()
    own = Gallery(rows, NAMES)
    rows += 1
    own.add(rows, NAMES)
    rows += 1
    assert len(own) == 8
    np.testing.assert_array_equal(own.embeddings, np.concatenate([ROWS, ROWS + 1]))
    assert own.labels.tolist() == NAMES * 2
    for array in (gallery.embeddings, gallery.labels, own.embeddings, own.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = array[1]


@pytest.mark.parametrize("word", DISTANCES)
def test_rows_come_and_go(rng, word):
    rows, labels = rng.normal(size=(300, 7)), rng.integers(0, 40, 300)
    now = {}  # what a dict of the rows would hold

    def check():
        fresh = Gallery([rows[i] for i in now], list(now.values()), distance=word)
        assert state(gallery) == state(fresh)
        assert len(gallery) == len(now)
        found = gallery.search(rows[:50], 4)
        expected = search(rows[:50], fresh.embeddings, 4, distance=word)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)

    gallery = Gallery(rows[:7], labels[:7], distance=word)
    now |= dict(enumerate(labels[:7].tolist()))
    for low in range(7, 300, 23):
        gallery.add(rows[low : low + 23], labels[low : low + 23])
        now |= dict(enumerate(labels[low : low + 23].tolist(), low))
    check()
    for places in (5, [0, -1, 0], slice(100, 103)):
        gone = gallery.labels[places]
        gallery.remove(gone)
        now = {i: label for i, label in now.items() if label not in np.ravel(gone)}
        check()
    with pytest.raises(AttributeError):
        gallery.distance = "cosine"


@pytest.mark.parametrize(
    ("labels", "gone"),
    [
        (["ann", "bob", "zoë"], "bob"),
        ([b"a", b"a\0", b"b"], b"a\0"),
        (np.array([b"a", b"c", b"b"]), b"c"),
        ([1, 2, 3], 2),
        ([0, 2**63 + 1, 2**63], 2**63 + 1),
        ([10**30, 10**30 + 1, 3], 10**30 + 1),
        (np.int8([1, -2, 3]), -2),
        ([True, False, True], False),
    ],
)
def test_labels_of_every_kind(tmp_path, labels, gone):
    gallery = Gallery(np.eye(3), labels, threshold=0.5)
    expected = np.asarray(labels, object).tolist()
    gallery.save(tmp_path / "gallery")
    loaded = Gallery.load(tmp_path / "gallery")
    assert state(loaded) == state(gallery)
    for one in (gallery, loaded):
        assert one.labels.tolist() == expected
        assert one.identify(np.eye(3)).label.tolist() == expected
        one.remove(gone)
        assert one.labels.tolist() == [expected[0], expected[2]]
        one.add([[0.0, 1.0, 0.0]], [gone])
        assert one.labels.tolist() == [expected[0], expected[2], gone]


def test_one_hot_rows_are_labels():
    gallery = Gallery(np.eye(3), [[0, 0, 1], [1, 0, 0], [0, 0, 1]])
    assert gallery.labels.tolist() == [2, 0, 2]


def test_integers_of_several_dtypes_stay_what_they_are():
    large = 2**60 + 1  # no float64 holds it
    gallery = Gallery([[0.0]], np.int64([large]))
    gallery.add([[1.0]], np.uint64([2**63 + 1]))
    gallery.add([[2.0]], [7])
    assert gallery.labels.tolist() == [large, 2**63 + 1, 7]
    gallery.remove(2**63 + 1)
    assert gallery.labels.tolist() == [large, 7]


# Identify


def test_the_loop_that_a_user_writes(gallery):
    queries = np.float32([[0, 1.25], [6, 6], [9, 8]])
    assert [tuple(one) for one in gallery.identify(queries)] == [
        ("ann", 0.25, True),
        (None, pytest.approx(13**0.5), False),
        ("cy", 1.0, True),
    ]
    found = gallery.identify(queries)
    assert len(found) == 3
    assert found.label.tolist() == ["ann", None, "cy"]
    np.testing.assert_array_equal(found.known, [True, False, True])
    np.testing.assert_array_equal(found.known, found.distance <= gallery.threshold)


def test_the_threshold_itself_is_known_and_may_be_set(gallery):
    assert gallery.identify([[9.0, 7.5]]).known.tolist() == [True]
    gallery.threshold = 1.0
    assert gallery.identify([[9.0, 7.5]]).label.tolist() == [None]
    gallery.threshold = "near"
    with pytest.raises(TypeError, match="`threshold`"):
        gallery.identify([[9.0, 7.5]])


def test_nobody_is_named_without_a_threshold():
    with pytest.raises(ValueError, match=r"`threshold`.*`calibrate` finds one"):
        Gallery(ROWS, NAMES).identify(ROWS)


# Calibrate


def people(rng, count, first):
    """Three queries for each of some classes: embeddings and labels."""
    centres = np.repeat(rng.normal(size=(count, 6)), 3, axis=0)
    return centres + 0.05 * rng.normal(size=centres.shape), np.repeat(
        np.arange(first, first + count), 3
    )


@pytest.mark.parametrize("word", DISTANCES)
def test_calibrate_sets_the_certified_threshold(rng, word):
    rows, labels = people(rng, 50, 0)
    known = rows + 0.05 * rng.normal(size=rows.shape)
    strangers, their_labels = people(rng, 100, 50)
    queries = np.concatenate([known, strangers])
    query_labels = np.concatenate([labels, their_labels])
    gallery = Gallery(rows, labels, distance=word)
    point = gallery.calibrate(queries, query_labels, far=0.1)
    curve = identification_curve(queries, query_labels, rows, labels, distance=word)
    assert point == curve.certified(0.1)
    assert gallery.threshold == point.threshold
    found = gallery.identify(queries)
    assert found.known[150:].mean() == point.far
    assert 0 < point.far <= 0.1
    assert (found.label[:150] == labels).mean() == point.dir
    assert point.dir > 0.9
    again = gallery.calibrate(queries, query_labels, far=0.1, seed=1)
    assert again == identification_curve(
        queries, query_labels, rows, labels, distance=word, seed=1
    ).certified(0.1)


def test_calibrate_with_strangers_alone(rng):
    rows, labels = people(rng, 20, 0)
    gallery = Gallery(rows, labels)
    point = gallery.calibrate(*people(rng, 60, 20), far=0.2, confidence=0.9)
    assert np.isnan(point.dir)
    assert 0 <= point.far <= 0.2


def test_a_calibration_that_fails_changes_nothing(rng, gallery):
    strangers = rng.normal(size=(28, 2))
    names = [f"stranger {i}" for i in range(28)]
    with pytest.raises(ValueError, match=r"29 classes of strangers.*28"):
        gallery.calibrate(strangers, names, far=0.1)
    with pytest.raises(ValueError, match="strangers"):
        gallery.calibrate(ROWS + 0.1, NAMES)
    with pytest.raises(TypeError, match="same kind"):
        gallery.calibrate(strangers, np.arange(28))
    with pytest.raises(ValueError, match=r"`query_labels`.*28 labels"):
        gallery.calibrate(strangers, names[1:])
    assert gallery.threshold == 1.5


# Another index


class FaissLike:
    """Squared distances and rows, in no order; -1 for rows that it misses."""

    def __init__(self, rows, misses=()):
        assert rows.dtype == np.float32
        assert rows.flags.c_contiguous
        self.rows, self.misses = rows, misses

    def search(self, queries, k):
        assert queries.dtype == np.float32
        squared = ((queries[:, None] - self.rows) ** 2).sum(axis=2)
        keys = np.argsort(squared, axis=1)[:, :k][:, ::-1].copy()
        keys[np.isin(keys, self.misses)] = -1
        return np.take_along_axis(squared, keys, axis=1), keys


class UsearchLike(FaissLike):
    """An object of keys and counts; of one query an object of keys alone."""

    def search(self, queries, k):
        _, keys = super().search(queries, k)
        counts = (keys >= 0).sum(axis=1)
        full = np.zeros(keys.shape, np.uint64)
        for row, found in zip(full, keys, strict=True):
            row[: (found >= 0).sum()] = found[found >= 0]
        if len(queries) == 1:
            return types.SimpleNamespace(keys=full[0, : counts[0]])
        return types.SimpleNamespace(keys=full, counts=counts)


def faiss_index(rows):
    index = importlib.import_module("faiss").IndexFlatL2(rows.shape[1])
    index.add(rows)
    return index


def usearch_index(rows):
    module = importlib.import_module("usearch.index")
    index = module.Index(ndim=rows.shape[1], metric="l2sq", dtype="f32")
    index.add(np.arange(len(rows)), rows)
    return index


def if_installed(module, function):
    is_there = importlib.util.find_spec(module) is not None
    mark = pytest.mark.skipif(not is_there, reason=f"without {module}")
    return pytest.param(function, id=module, marks=mark)


INDICES = [
    pytest.param(FaissLike, id="like FAISS"),
    pytest.param(UsearchLike, id="like usearch"),
    if_installed("faiss", faiss_index),
    if_installed("usearch", usearch_index),
]


@pytest.mark.parametrize("word", DISTANCES)
@pytest.mark.parametrize("index", INDICES)
def test_an_index_takes_the_place_of_the_search(rng, index, word):
    rows, labels = rng.normal(size=(60, 4)), rng.integers(0, 9, 60)
    queries = rng.normal(size=(30, 4))
    made = []

    def make(given):
        made.append(len(given))
        return index(given)

    own = Gallery(rows, labels, threshold=0.6, distance=word)
    other = Gallery(rows, labels, threshold=0.6, distance=word, index=make)
    assert made == []  # nothing is made before it is needed
    for few in (queries, queries[:1]):
        for k in (1, 5, 60):
            found, expected = other.search(few, k), own.search(few, k)
            np.testing.assert_array_equal(found[1], expected[1])
            np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-7)
            assert [array.dtype for array in found] == [np.float32, np.int64]
    assert made == [60]
    other.add(queries[:1], [99])
    assert other.search(queries[:1], 1)[1].tolist() == [[60]]
    other.remove(99)
    assert list(other.identify(queries)) == list(own.identify(queries))
    assert made == [60, 61, 60]


@pytest.mark.parametrize("kind", [FaissLike, UsearchLike])
def test_rows_that_an_index_does_not_find(kind):
    gallery = Gallery(
        ROWS, NAMES, threshold=1e6, index=lambda rows: kind(rows, misses=[0, 2, 3])
    )
    for queries in ([[3.0, 4.0]], [[3.0, 4.0], [3.0, 5.0]]):
        distances, rows = gallery.search(queries, 4)
        assert rows.tolist() == [[1, -1, -1, -1]] * len(queries)
        assert np.isinf(distances[:, 1:]).all()
        assert distances[:, 0].tolist() == [0.0, 1.0][: len(queries)]
        found = gallery.identify([[0.0, 1.0]])  # its one row is not found
        assert list(found) == [(None, np.inf, False)]


def test_an_index_that_finds_nothing_accepts_no_stranger(rng):
    def index(rows):
        return FaissLike(rows, misses=range(4))

    gallery = Gallery(ROWS, NAMES, index=index)
    names = [f"stranger {i}" for i in range(40)]
    point = gallery.calibrate(rng.normal(size=(40, 2)), names, far=0.1)
    assert np.isfinite(point.threshold)
    assert point.far == 0.0


@pytest.mark.parametrize("keys", [[[4]], [[-2]], [[0, 1]]])
def test_an_index_of_other_rows_is_noticed(keys):
    index = types.SimpleNamespace(search=lambda queries, k: (None, np.array(keys)))
    gallery = Gallery(ROWS, NAMES, threshold=1.0, index=lambda rows: index)
    with pytest.raises(ValueError, match=r"`index`.*at most 1 of the rows 0 \.\.\. 3"):
        gallery.identify([[0.0, 0.0]])


def test_an_index_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"`index`.*function"):
        Gallery(ROWS, NAMES, index=FaissLike(ROWS))


# Files


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_was_saved_is_loaded(tmp_path_factory, data):
    count, dim = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    numbers = st.floats(-(2.0**40), 2.0**40, width=32)
    rows = data.draw(
        st.lists(
            st.lists(numbers, min_size=dim, max_size=dim),
            min_size=count,
            max_size=count,
        )
    )
    kind = data.draw(st.sampled_from([st.text(), st.binary(), st.integers()]))
    labels = data.draw(st.lists(kind, min_size=count, max_size=count))
    gallery = Gallery(
        rows,
        labels,
        threshold=data.draw(st.none() | st.floats(-1e300, 1e300)),
        distance=data.draw(st.sampled_from(DISTANCES)),
    )
    path = tmp_path_factory.mktemp("saved") / "gallery"
    gallery.save(path)
    content = path.read_bytes()
    loaded = Gallery.load(path)
    assert state(loaded) == state(gallery)
    loaded.save(path)
    assert path.read_bytes() == content


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "gallery"
    Gallery(ROWS, NAMES, threshold=1.5).save(path)
    return path


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_no_damaged_file_is_loaded(saved, data):
    content = bytearray(saved.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "drop", "insert"]))
    if how == "flip":
        content[place] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        del content[place:]
    elif how == "drop":
        del content[place : place + data.draw(st.integers(1, 40))]
    else:
        content[place:place] = data.draw(st.binary(min_size=1, max_size=40))
    damaged = saved.with_name("damaged")
    damaged.write_bytes(content)
    expected = "truncated" if how == "cut" else "damaged|truncated|no gallery|version"
    with pytest.raises(ValueError, match=expected):
        Gallery.load(damaged)


def an_archive():
    file = io.BytesIO()
    np.savez(file, ROWS)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "truncated"),
        (b"kerastrip", "truncated"),
        (b"kerastrip gallery 1 000", "truncated"),
        (b"kerastrip gallery one\n", "damaged"),
        (b"kerastrip gallery 2 and what a later version writes", "version 2"),
        (b"\x93NUMPY and so on, an array", "which is no gallery"),
        (an_archive(), "which is no gallery"),
        (b"k", "truncated"),
    ],
)
def test_foreign_files_are_told_apart(tmp_path, content, expected):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"`path`.*{expected}"):
        Gallery.load(path)


@pytest.mark.parametrize("broken", ["os.fsync", "os.replace", "numpy.save"])
def test_a_save_that_fails_loses_nothing(gallery, tmp_path, monkeypatch, broken):
    path = tmp_path / "gallery"
    gallery.save(path)
    before = path.read_bytes()
    gallery.add([[5.0, 5.0]], ["dee"])
    with monkeypatch.context() as patch:

        def fail(*args, **kwargs):
            raise OSError("No space left on device")

        patch.setattr(broken, fail)
        with pytest.raises(OSError, match="No space"):
            gallery.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["gallery"]
    assert Gallery.load(path).labels.tolist() == NAMES
    gallery.save(path)
    assert state(Gallery.load(path)) == state(gallery)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        Gallery.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        Gallery(ROWS, NAMES).save(tmp_path / "no folder" / "gallery")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_pipes_are_refused(gallery, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for use in (gallery.save, Gallery.load):
        with pytest.raises(ValueError, match="a pipe or device"):
            use(tmp_path / "pipe")


def test_an_index_is_given_again_when_loading(tmp_path):
    path = tmp_path / "gallery"
    Gallery(ROWS, NAMES, threshold=1.0, index=FaissLike).save(path)
    made = []
    loaded = Gallery.load(path, index=lambda rows: made.append(1) or FaissLike(rows))
    assert loaded.identify([[3.0, 4.0]]).label.tolist() == ["bob"]
    assert made == [1]


# Bad input


@pytest.mark.parametrize(
    ("embeddings", "labels", "error", "expected"),
    [
        (ROWS, NAMES[:3], ValueError, "`labels`.*4 labels.*3 labels"),
        (ROWS, [*NAMES[:3], None], ValueError, "`labels`.*position 3"),
        (ROWS, [0.5] * 4, TypeError, "`labels`"),
        (ROWS * np.float32([[1], [np.nan], [1], [1]]), NAMES, ValueError, "row 1"),
        (ROWS[:, 0], NAMES, ValueError, r"`embeddings`.*\(n, dim\)"),
        (ROWS[:0], [], ValueError, "`embeddings`"),
        ([["a"]], ["ann"], TypeError, "`embeddings`"),
    ],
)
def test_bad_rows_are_not_enrolled(gallery, embeddings, labels, error, expected):
    before = state(gallery)
    for enrol in (Gallery, gallery.add):
        with pytest.raises(error, match=expected):
            enrol(embeddings, labels)
    assert state(gallery) == before


def test_rows_of_another_length_and_labels_of_another_kind(gallery):
    before = state(gallery)
    for function in (
        lambda rows: gallery.add(rows, ["ann"]),
        gallery.identify,
        lambda rows: gallery.search(rows, 1),
        lambda rows: gallery.calibrate(rows, ["zed"]),
    ):
        with pytest.raises(ValueError, match="rows of 2 numbers, as the gallery has"):
            function([[1.0, 2.0, 3.0]])
        with pytest.raises(ValueError, match="NaN"):
            function([[1.0, np.nan]])
    with pytest.raises(TypeError, match="kind that is there, such as 'ann'"):
        gallery.add(ROWS, [1, 2, 3, 4])
    assert state(gallery) == before


@pytest.mark.parametrize("index", [None, FaissLike])
def test_k_beyond_the_gallery(index):
    gallery = Gallery(ROWS, NAMES, index=index)
    with pytest.raises(ValueError, match=r"`k`.*at most the 4 rows"):
        gallery.search(ROWS, 5)
    with pytest.raises(ValueError, match="`k`"):
        gallery.search(ROWS, 0)
    with pytest.raises(TypeError, match="`k`"):
        gallery.search(ROWS, 1.0)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("zed", "known ones, received 'zed'"),
        (["ann", "zed"], "'zed'"),
        (3, "received 3"),
        (["ann", "bob", "cy"], "leave a row.*all 3 labels"),
        ([], "at least one label"),
        (None, "a label for every sample"),
    ],
)
def test_a_removal_that_fails_removes_nothing(gallery, labels, expected):
    before = state(gallery)
    with pytest.raises(ValueError, match=expected):
        gallery.remove(labels)
    assert state(gallery) == before


def test_bad_settings():
    with pytest.raises(ValueError, match="euclidean"):
        Gallery(ROWS, NAMES, distance="euclidian")
    for threshold in (np.nan, np.inf):
        with pytest.raises(ValueError, match="`threshold`"):
            Gallery(ROWS, NAMES, threshold=threshold)
    with pytest.raises(TypeError, match="`threshold`"):
        Gallery(ROWS, NAMES, threshold="0.5")


@pytest.mark.slow
def test_a_million_rows(tmp_path, rng):
    """Saved and loaded byte for byte."""
    rows = rng.normal(size=(1_000_000, 128)).astype("float32")
    gallery = Gallery(rows, rng.integers(0, 10**12, len(rows)), threshold=0.3)
    gallery.save(tmp_path / "gallery")
    loaded = Gallery.load(tmp_path / "gallery")
    np.testing.assert_array_equal(loaded.embeddings, rows)
    assert state(loaded) == state(gallery)
