"""TFRecordSource: any record by its number, and no damage goes unnoticed."""

import os
import pickle
import struct
import threading

import cv2
import numpy as np
import pytest
import tensorflow as tf

from kerastrip import PKSampler
from kerastrip.sources import TFRecordSource, tfrecord

ROWS = [7, 0, 7, 3, 11]


def example(**values):
    kinds = {
        bytes: lambda v: tf.train.Feature(bytes_list=tf.train.BytesList(value=v)),
        int: lambda v: tf.train.Feature(int64_list=tf.train.Int64List(value=v)),
        float: lambda v: tf.train.Feature(float_list=tf.train.FloatList(value=v)),
    }
    features = {
        name: kinds[type(value[0])](value)
        for name, value in (
            (name, value if isinstance(value, list) else [value])
            for name, value in values.items()
        )
    }
    return tf.train.Example(
        features=tf.train.Features(feature=features)
    ).SerializeToString()


def write(path, records, **options):
    with tf.io.TFRecordWriter(str(path), **options) as writer:
        for record in records:
            writer.write(record)
    return path


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (12, 5, 4, 3), dtype="uint8")


@pytest.fixture
def paths(tmp_path, images):
    """12 records in two files, with an empty one between."""
    records = [
        example(image=cv2.imencode(".png", image[..., ::-1])[1].tobytes(), label=i // 3)
        for i, image in enumerate(images)
    ]
    return [
        write(tmp_path / "a.tfrecord", records[:7]),
        write(tmp_path / "b.tfrecord", []),
        write(tmp_path / "c.tfrecord", records[7:]),
    ]


@pytest.mark.parametrize("size", [0, 3, 8, 255, 256, 257, 5000])
def test_the_checksum_is_that_of_tensorflow(tmp_path, rng, size):
    data = rng.bytes(size)
    written = write(tmp_path / "x", [data]).read_bytes()
    assert struct.unpack("<I", written[-4:])[0] == tfrecord._masked_crc(data)


def test_fresh_rows_and_labels_in_the_order_asked_for(paths, images):
    source = TFRecordSource(paths)
    assert len(source) == 12
    assert source.labels.tolist() == [i // 3 for i in range(12)]
    taken = source.take(np.array(ROWS))
    np.testing.assert_array_equal(taken, images[ROWS])
    taken[:] = 0
    np.testing.assert_array_equal(source.take(ROWS), images[ROWS])
    for index in (12, -1):
        with pytest.raises(IndexError, match=f"sample {index} of 12"):
            source.take([index])


@pytest.mark.parametrize("processes", [False, True])
def test_threads_and_processes(paths, images, processes):
    """PKSampler needs no labels; what it gives are the rows of its plan."""
    sampler = PKSampler(
        TFRecordSource(paths),
        classes_per_batch=2,
        samples_per_class=2,
        workers=2,
        use_multiprocessing=processes,
    )
    failed = []

    def ask(step):
        x, _ = sampler.batch(step, epoch=1)
        if not np.array_equal(x, images[sampler.plan.indices(1, step)]):
            failed.append(step)

    threads = [threading.Thread(target=ask, args=(i % 3,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    sampler.close()
    assert not failed


def test_pickled_for_spawned_processes(paths, images):
    source = pickle.loads(pickle.dumps(TFRecordSource(paths)))
    np.testing.assert_array_equal(source.take(ROWS), images[ROWS])


def test_raw_bytes_numbers_and_own_records(tmp_path, images):
    names = ["ape", "bär"]
    path = write(
        tmp_path / "x",
        [
            example(raw=image.tobytes(), name=names[i % 2].encode(), v=[0.5, float(i)])
            for i, image in enumerate(images)
        ],
    )
    source = TFRecordSource(path, "raw", label="name", shape=(5, 4, 3))
    np.testing.assert_array_equal(source.take(ROWS), images[ROWS])
    assert source.labels[:3].tolist() == ["ape", "bär", "ape"]
    numbers = TFRecordSource(path, "v", label=None, shape=(2,), dtype="float32")
    assert numbers.labels is None
    assert numbers.take([9, 1]).tolist() == [[0.5, 9.0], [0.5, 1.0]]
    own = TFRecordSource(
        write(tmp_path / "y", [bytes([i, 10 + i]) for i in range(4)]),
        parse=lambda record: {"a": record[0], "b": np.array([record[1]])},
        label=lambda record: record[0] // 2,
    )
    assert own.take([3, 0])["b"].tolist() == [[13], [10]]
    assert own.labels.tolist() == [0, 0, 1, 1]


def test_gray_and_resized(tmp_path, images):
    records = [
        example(image=cv2.imencode(".png", image)[1].tobytes(), label=0)
        for image in (images[0], np.ascontiguousarray(images[0][:4]))
    ]
    path = write(tmp_path / "x", records)
    source = TFRecordSource(path, color="gray", size=(3, 2))
    assert source.take([0, 1]).shape == (2, 3, 2, 1)
    with pytest.raises(ValueError, match=r"record\[1\].*resize"):
        TFRecordSource(path).take([1])


# -- the index


def test_the_index_is_built_once_and_follows_the_file(paths, images, monkeypatch):
    TFRecordSource(paths)
    walked = []
    walk = tfrecord._walked
    monkeypatch.setattr(
        tfrecord,
        "_walked",
        lambda path, *rest: walked.append(path) or walk(path, *rest),
    )
    source = TFRecordSource(paths)
    np.testing.assert_array_equal(source.take(ROWS), images[ROWS])
    assert source.labels.tolist() == [i // 3 for i in range(12)]
    assert not walked
    write(paths[2], [example(image=b"", label=8)])
    assert TFRecordSource(paths).labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 8]
    assert walked == [paths[2]]
    index = paths[0].with_name("a.tfrecord.index.npz")
    index.write_bytes(index.read_bytes()[:40])  # damaged: one more walk
    assert len(TFRecordSource(paths)) == 8
    # Same size and another time of change.
    os.utime(paths[0], ns=(0, 0))
    TFRecordSource(paths)
    TFRecordSource(paths)
    assert walked == [paths[2], paths[0], paths[0]]
    assert len(list(paths[0].parent.iterdir())) == 6  # nothing else is left


def test_the_index_elsewhere_or_nowhere(paths, tmp_path, monkeypatch):
    TFRecordSource(paths, index=False)
    assert not list(tmp_path.glob("*.npz"))
    (tmp_path / "indices").mkdir()
    TFRecordSource(paths, index=tmp_path / "indices")
    assert len(list((tmp_path / "indices").iterdir())) == 3

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.warns(UserWarning, match="read-only.*index=") as caught:
        source = TFRecordSource(paths[:1])
    assert len(source) == 7
    assert caught[0].filename == __file__
    assert not list(tmp_path.glob("*.npz*"))


# -- what is wrong with a file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-1], "truncated record .record 6,"),
        (lambda data: data[: len(data) // 7 * 2 + 5], "truncated record"),
        (
            lambda data: data[:3] + b"\x01" + data[4:],
            "damaged length .record 0, at byte 0",
        ),
        (lambda data: data[:30] + b"?" + data[31:], "damaged data .record 0"),
        (lambda data: b"\x1f\x8b" + data, "damaged length .*compressed"),
    ],
)
def test_damage_is_found_when_the_index_is_built(paths, change, words):
    data = paths[0].read_bytes()
    paths[0].write_bytes(change(data))
    with pytest.raises(ValueError, match=f"a.tfrecord with a? ?{words}"):
        TFRecordSource(paths)


def test_a_broken_record_is_named(paths):
    records = [example(image=b"no picture", label=0)]
    source = TFRecordSource([paths[0], write(paths[2], records)])
    with pytest.raises(
        ValueError, match=r"Record 0 of .*c.tfrecord .*no picture.*shape="
    ):
        source.take([2, 7])
    paths[0].write_bytes(paths[0].read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a.tfrecord with a truncated .*record 6"):
        source.take([6])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"paths": []}, ValueError, "at least one file"),
        ({"paths": "missing.tfrecord"}, FileNotFoundError, "missing.tfrecord"),
        (
            {"feature": "pixels"},
            ValueError,
            r"Record 0 .*'pixels' but \['image', 'label'",
        ),
        ({"label": "class"}, ValueError, r"Record 0 .*a.tfrecord.*'class' but"),
        ({"feature": "label"}, ValueError, "no picture but numbers"),
        ({"shape": (5, 4)}, ValueError, "Record 0 of .*reshape"),
        ({"color": "bgr"}, ValueError, "'rgb', 'gray'"),
        ({"parse": "image"}, TypeError, "parse"),
        ({"label": lambda record: 0.5}, TypeError, "integer or one string.*float"),
    ],
)
def test_arguments_that_are_none(paths, options, error, words):
    with pytest.raises(error, match=words):
        TFRecordSource(**{"paths": paths, **options})
