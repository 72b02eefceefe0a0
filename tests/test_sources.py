"""Sources: every kind of input gives the same rows, and says what is wrong."""

import numpy as np
import pytest

from kerastrip.sources import as_source

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
        ("folder", TypeError, "random access.*'folder'"),
        (iter([1, 2]), TypeError, "random access"),
        (None, TypeError, "random access.*None"),
        (3, TypeError, "random access.*3"),
        (np.zeros((0, 4)), ValueError, "at least one sample.*\\(0, 4\\)"),
        ([], ValueError, "at least one sample"),
        ({}, ValueError, "at least one input"),
        (np.array(1.0), ValueError, "first axis"),
        (np.array(["a", "b"]), TypeError, "numbers"),
        (["a", "b"], TypeError, "numbers"),
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
