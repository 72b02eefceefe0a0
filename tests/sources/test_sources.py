"""Sources: every kind of input gives the same rows, and says what is wrong."""

import os
import pathlib
import pickle
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kerastrip.sources import RowSource, Subset, as_source

pytestmark = pytest.mark.backend

ROWS = [7, 0, 7, 3, 11]


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (12, 5, 4, 3), dtype="uint8")


class Samples:
    """A list of samples, as PyTorch data sets are, that notes what is read."""

    def __init__(self, rows):
        self.rows, self.read = rows, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.read.append(index)
        return self.rows[index]


class Bulk(Samples):
    """The same with the method that reads several samples at once."""

    def __getitems__(self, indices):
        self.read.append(list(indices))
        return [self.rows[index] for index in indices]


class Lazy:
    """An array on disk: increasing indices, each once, as h5py wants them."""

    def __init__(self, array):
        self._array, self.shape, self.dtype = array, array.shape, array.dtype
        self.calls = 0  # no `__len__`, as in zarr 3

    def __getitem__(self, indices):
        assert (np.diff(indices) > 0).all()
        self.calls += 1
        return self._array[indices]


@pytest.mark.parametrize(
    "kind", ["array", "memmap", "fortran", "list", "samples", "bulk", "lazy", "h5py"]
)
def test_every_kind_gives_fresh_rows_in_the_order_asked_for(images, kind, tmp_path):
    x = images
    if kind == "memmap":
        x = np.memmap(tmp_path / "x", "uint8", "w+", shape=images.shape)
        x[:] = images
    elif kind == "fortran":
        x = np.asfortranarray(images)
    elif kind == "h5py":
        h5py = pytest.importorskip("h5py")
        x = h5py.File(tmp_path / "x.h5", "w").create_dataset("x", data=images)
    elif kind != "array":
        x = {"list": list, "samples": Samples, "bulk": Bulk, "lazy": Lazy}[kind](images)
    source = as_source(x)
    assert len(source) == 12
    taken = source.take(np.array(ROWS))
    assert type(taken) is np.ndarray
    assert taken.dtype == np.uint8
    np.testing.assert_array_equal(taken, images[ROWS])
    taken[:] = 0
    np.testing.assert_array_equal(source.take(ROWS), images[ROWS])


def test_tensors_and_data_frames():
    import keras

    values = np.arange(12, dtype="float32").reshape(6, 2)
    tensor = keras.ops.convert_to_tensor(values)
    if keras.backend.backend() == "torch":
        tensor = tensor.cpu()
    np.testing.assert_array_equal(as_source(tensor).take([4, 1]), values[[4, 1]])

    class Frame:
        def to_numpy(self):
            return values

    np.testing.assert_array_equal(as_source(Frame()).take([4, 1]), values[[4, 1]])


def test_plain_arrays_are_indexed_once_and_lists_in_sorted_order(images):
    lazy, bulk, samples = Lazy(images), Bulk(images), Samples(images)
    as_source(lazy).take(ROWS)
    assert lazy.calls == 1
    as_source(bulk).take(ROWS)
    assert bulk.read == [[0], [0, 3, 7, 11]]
    as_source(samples).take(ROWS)
    assert samples.read == [0, 0, 3, 7, 11]


def test_dicts_tuples_and_structured_samples(images):
    age = list(range(12))
    taken = as_source({"image": images, "more": (age, Lazy(images))}).take(ROWS)
    assert taken["more"][0].tolist() == ROWS
    np.testing.assert_array_equal(taken["image"], images[ROWS])
    np.testing.assert_array_equal(taken["more"][1], images[ROWS])

    rows = [{"image": image, "age": i} for i, image in enumerate(images)]
    taken = as_source(Samples(rows)).take(ROWS)
    assert taken.keys() == {"image", "age"}
    assert taken["age"].tolist() == ROWS
    image, age = as_source([(image, i) for i, image in enumerate(images)]).take(ROWS)
    np.testing.assert_array_equal(image, images[ROWS])
    assert age.tolist() == ROWS


def test_a_source_is_taken_as_it_is(images):
    source = as_source(images)
    assert as_source(source) is source


def test_rows_of_differing_shape_are_named(images):
    rows = list(images)
    rows[7] = rows[7][:-1]
    for x in (rows, Bulk(rows), np.array([*rows[:7], None, *rows[8:]], dtype=object)):
        source = as_source(x, "pictures")
        source.take([0, 3, 11])
        with pytest.raises(ValueError, match=r"pictures\[7\].*\(5, 4, 3\).*uint8"):
            source.take([11, 7])
    with pytest.raises(ValueError, match=r"pictures\[7\].*\(4, 4, 3\)"):
        as_source(rows, "pictures").take([7])
    rows = [{"a": 1, "b": 2}, {"a": 1}]
    with pytest.raises(ValueError, match=r"x\[1\].*a dict of 2 entries"):
        as_source(rows).take([0, 1])
    with pytest.raises(ValueError, match=r"x\[1\].*int64.*float64"):
        as_source([1, 2.5]).take([1])


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ("folder", TypeError, "random access.*'folder'.*ImageFolder"),
        (iter([1, 2]), TypeError, "random access"),
        (None, TypeError, "random access.*None"),
        (3, TypeError, "random access.*3"),
        (np.zeros((0, 4)), ValueError, "at least one sample.*\\(0, 4\\)"),
        ([], ValueError, "at least one sample"),
        ({}, ValueError, "at least one input"),
        (np.array(1.0), ValueError, "first axis"),
        (np.array(1.0 + 0j).astype("U"), ValueError, "first axis"),
        (np.array(["2020-01-01"], "M8[D]"), TypeError, "numbers"),
        (["cat/1.jpg", "cat/2.PNG"], TypeError, "not paths.*ImageFiles"),
        (np.array(["cat/1.jpg", "cat/2.PNG"]), TypeError, "not paths.*ImageFiles"),
        (np.array([b"cat/1.jpg"], object), TypeError, "not paths.*ImageFiles"),
        ([__file__, "b.wav", "c/d.npy"], TypeError, "not paths.*`__getitem__`"),
        (np.array([["a.jpg"], ["b.jpg"]], object), TypeError, "not paths.*ImageFiles"),
        ([pathlib.Path("a")], TypeError, "not paths.*ImageFiles"),
        ([{"path": "cat/1.jpg"}], TypeError, r"x\['path'\]\[0\].*ImageFiles"),
        ("cat/1.jpg", TypeError, "ImageFiles"),
        (pathlib.Path("photos"), TypeError, "ImageFolder"),
        (np.ma.array([[1, 2], [3, 4]], mask=[[0, 0], [0, 1]]), ValueError, "1, 1"),
        (np.ma.array([None, 1], mask=[0, 1]), ValueError, "position 1"),
        (np.zeros(3, [("a", "f4")]), TypeError, "dict of its fields"),
        ({"a": np.zeros(3), "b": np.zeros(4)}, ValueError, "'a': 3, 'b': 4"),
        ((np.zeros(3), 5), TypeError, r"x\[1\].*random access"),
    ],
)
def test_what_is_no_source(x, error, words):
    with pytest.raises(error, match=words):
        as_source(x)


def test_a_stream_is_no_source():
    tf = pytest.importorskip("tensorflow")
    with pytest.raises(TypeError, match="random access"):
        as_source(tf.data.Dataset.range(5))


def test_an_array_that_does_not_index_by_rows_is_refused():
    class Sparse:
        shape, dtype = (4, 3), np.dtype("float32")

        def __len__(self):
            return 4

        def __getitem__(self, indices):
            return object()

    with pytest.raises(TypeError, match=r"shape \(2, 3\) for 2 rows.*NumPy array"):
        as_source(Sparse()).take([0, 2])


# -- numbers as they are meant ---------------------------------------------------


@pytest.mark.parametrize("kind", ["array", "list", "lazy", "dict", "user's", "subset"])
def test_rows_have_the_byte_order_of_this_machine(kind):
    values = np.arange(24, dtype="float32").reshape(12, 2)
    swapped = values.astype(values.dtype.newbyteorder("S"))
    x = {
        "array": swapped,
        "list": list(swapped),
        "lazy": Lazy(swapped),
        "dict": [{"a": row} for row in swapped],
        "user's": Own(lambda rows: swapped[rows]),
        "subset": Subset(swapped, np.arange(12)),
    }[kind]
    taken = as_source(x).take(ROWS)
    taken = taken["a"] if kind == "dict" else taken
    assert taken.dtype.isnative
    np.testing.assert_array_equal(taken, values[ROWS])


def test_masked_samples_are_refused_where_they_are_read():
    rows = [np.ma.array([1, 2], mask=[0, i == 3]) for i in range(12)]
    source = as_source(rows)
    np.testing.assert_array_equal(source.take([0]), [[1, 2]])
    with pytest.raises(ValueError, match=r"x\[3\].*masked.*position 1"):
        source.take(ROWS)
    lazy = Lazy(np.ma.array(np.zeros((12, 2)), mask=np.arange(24).reshape(12, 2) == 6))
    with pytest.raises(ValueError, match=r"x\[3\].*masked.*position 0"):
        as_source(lazy).take(ROWS)
    own = Own(lambda rows: {"a": np.ma.array(rows, mask=rows == 3)})
    with pytest.raises(ValueError, match=r"'a'.*masked"):
        as_source(own).take(np.array(ROWS))


def test_texts_are_rows_of_python_strings():
    texts = [f"text number {i}" * (i + 1) for i in range(12)]
    fixed = np.array(texts)
    for x in (texts, np.array(texts, object), Samples(texts), fixed):
        taken = as_source(x).take(ROWS)
        assert taken.dtype == (fixed.dtype if x is fixed else object)
        assert taken.tolist() == [texts[row] for row in ROWS]
    named = as_source([{"text": text, "n": 1} for text in texts]).take(ROWS)
    assert named["text"].tolist() == [texts[row] for row in ROWS]
    with pytest.raises(ValueError, match=r"x\[3\].*a text, as x\[0\].*None"):
        as_source([*texts[:3], None, *texts[4:]]).take(ROWS)


@pytest.mark.parametrize("mode", ["1", "P", "PA", "LA", "CMYK", "L", "RGB", "RGBA"])
def test_images_of_pillow_come_in_the_colours_that_they_show(mode):
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((6, 6, 3), "uint8")
    pixels[:3] = (255, 0, 0) if mode in ("P", "PA", "CMYK", "RGB") else 255
    shown = [image.fromarray(pixels).convert("P" if mode == "PA" else mode)]
    if mode == "P":
        shown[0].info["transparency"] = b"\0" * 4  # Pillow would warn
    shown = [shown[0].convert(mode)] * 12
    expected = pixels[..., 0] if mode in ("1", "LA", "L") else pixels
    taken = as_source(shown).take(ROWS)
    if mode == "RGBA":
        taken = taken[..., :3]
    assert taken.dtype == np.uint8
    np.testing.assert_array_equal(taken, np.stack([expected] * len(ROWS)))


class OneBuffer:
    """Samples that are all read into one buffer, as by a decoder."""

    def __init__(self, give):
        self.buffer, self.give = np.zeros((3, 2), "uint8"), give

    def __len__(self):
        return 12

    def __getitem__(self, index):
        self.buffer[:] = index
        return self.give(self.buffer)


class OneBufferInBulk(OneBuffer):
    """A part of it, as PyTorch's `Subset` reads several samples."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.mark.parametrize("kind", [OneBuffer, OneBufferInBulk])
@pytest.mark.parametrize(
    "give", [lambda a: a, lambda a: a[:2], lambda a: {"a": (a[0], 1)}]
)
def test_samples_that_are_read_into_one_buffer_stay_apart(kind, give):
    source = as_source(kind(give))
    first, taken = source.take([5]), source.take(ROWS)
    if isinstance(taken, dict):
        first, taken = first["a"][0], taken["a"][0]
    assert taken.reshape(len(ROWS), -1)[:, 0].tolist() == ROWS
    assert (first == 5).all()


def test_frames_of_one_image_object_stay_apart(tmp_path):
    image = pytest.importorskip("PIL.Image")
    frames = [image.fromarray(np.full((4, 4), i, "uint8")) for i in range(12)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    with image.open(tmp_path / "a.tif") as file:

        class Frames(Samples):
            def __getitem__(self, index):
                file.seek(index)
                return file

            def __getitems__(self, indices):
                return [self[index] for index in indices]

        assert as_source(Frames(frames)).take(ROWS)[:, 0, 0].tolist() == ROWS


def test_a_batch_of_a_users_source_stays_when_the_next_one_is_taken():
    buffer = np.zeros(2, int)

    def take(rows):
        buffer[:] = rows
        return {"a": buffer}

    source = as_source(Own(take))
    first, second = source.take(np.array([1, 2])), source.take(np.array([3, 4]))
    assert first["a"].tolist() == [1, 2]
    assert second["a"].tolist() == [3, 4]


def test_a_caption_that_ends_like_a_file_is_a_text():
    for texts in (
        ["how I made cat.jpg", "a dog"],
        ["cat.jpg", "a dog"],
        ["see cat.jpg", "see dog.jpg"],
    ):
        for x in (texts, Samples(texts), np.array(texts), np.array(texts, object)):
            assert as_source(x).take([1, 0]).tolist() == texts[::-1]
        assert as_source([{"a": text} for text in texts]).take([0])["a"][0] == texts[0]


def test_the_bytes_of_image_files_are_told_to_be_decoded():
    import cv2

    image = cv2.imencode(".jpg", np.zeros((8, 8, 3), "uint8"))[1].tobytes()
    for x in ([image] * 3, Samples([{"image": image, "label": 1}] * 3)):
        with pytest.raises(TypeError, match=r"bytes of image files.*read_image"):
            as_source(x)
    assert as_source([b"BMW is a car of Bavaria, not a picture"]).take([0]).shape == (
        1,
    )


# -- what keeps a file open ------------------------------------------------------


class Own:
    """A source that a user has written."""

    labels = tuple(range(12))

    def __init__(self, take):
        self.take_ = take

    def __len__(self):
        return 12

    def take(self, indices):
        return self.take_(indices)


class OneFile:
    """Samples in one file that stays open. It moves the position, then reads."""

    overlapped = False

    def __init__(self, path):
        path.write_bytes(np.repeat(np.arange(12, dtype="uint8"), 8).tobytes())
        self.file, self.readers = open(path, "rb", buffering=0), 0  # noqa: SIM115

    def __len__(self):
        return 12

    def __getitem__(self, index):
        self.readers += 1
        self.overlapped |= self.readers > 1
        self.file.seek(8 * index)
        time.sleep(1e-4)
        self.readers -= 1
        return np.frombuffer(self.file.read(8), "uint8")


class Half(OneFile):
    """A part of a data set, as `random_split` of PyTorch gives it."""

    def __init__(self, whole, rows):
        self.whole, self.rows = whole, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.whole[self.rows[index]]


def wrong(*sources):
    """Rows that are not the sample that was asked for, in four threads."""

    def count(i):
        source, rows = sources[i % len(sources)], np.roll(np.arange(6), i)
        return int((source.take(rows) != rows[:, None]).sum())

    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(count, range(24)))


def test_threads_take_turns_in_a_data_set_that_keeps_a_file_open(tmp_path):
    data = OneFile(tmp_path / "a")
    assert wrong(as_source(data), as_source(data)) == 0
    halves = [as_source(Half(data, range(12))) for _ in range(2)]
    parts = as_source({"a": data})
    assert wrong(*halves, Subset(data, range(12))) == 0
    own = Own(lambda rows: np.stack([data[row] for row in rows.tolist()]))
    assert wrong(as_source(own), as_source(data)) == 0
    assert (parts.take([3, 1])["a"][:, 0] == [3, 1]).all()
    assert not data.overlapped


def test_what_says_that_it_is_safe_is_read_side_by_side(tmp_path):
    meeting = threading.Barrier(2, timeout=10)

    class Meets:
        thread_safe = True

        def __len__(self):
            return 12

        def __getitem__(self, index):
            if index:
                meeting.wait()
            return index

    source = as_source(Meets())
    with ThreadPoolExecutor(2) as pool:
        assert [a.tolist() for a in pool.map(source.take, [[1], [2]])] == [[1], [2]]
        own = Own(lambda rows: meeting.wait() * 0 + rows)
        own.thread_safe = True
        taken = pool.map(as_source(own).take, [np.array([1])] * 2)
        assert [a.tolist() for a in taken] == [[1], [1]]


def test_a_source_may_read_another_in_its_turn(tmp_path):
    inner = as_source(OneFile(tmp_path / "a"))
    assert as_source(Own(inner.take)).take([3, 1])[:, 0].tolist() == [3, 1]
    assert as_source(Own(as_source(Own(inner.take)).take)).take([2])[0, 0] == 2


def test_a_source_of_the_user_keeps_what_it_has_and_is_pickled():
    source = as_source(Own(np.asarray))
    assert source.labels == tuple(range(12))
    assert not hasattr(source, "stamps")
    assert len(source) == 12
    copy = pickle.loads(pickle.dumps(source))
    assert copy.take([3, 1]).tolist() == [3, 1]
    assert RowSource([1, 2]).take([1]).tolist() == [2]


def test_a_forked_process_reads_an_open_file_at_its_own_position(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    from kerastrip.sources import _turns

    data = OneFile(tmp_path / "a")
    source = as_source(data)
    source.take([5])
    stop = threading.Event()

    def read_on():
        while not stop.is_set():
            source.take([1, 9])

    reader = threading.Thread(target=read_on)
    reader.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forks beside threads
            child = os.fork()
        if child == 0:
            bad = 1
            try:
                _turns.own_files()
                bad = wrong(source)
            finally:
                os._exit(bad > 0)
        assert wrong(source) == 0
        assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        reader.join()
