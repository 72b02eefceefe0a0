"""TFRecordSource: any record by its number, and no damage goes unnoticed."""

import io
import os
import pickle
import struct
import subprocess
import sys
import textwrap
import threading
import zipfile
from functools import partial

import cv2
import numpy as np
import pytest
import tensorflow as tf

from kerastrip import PKSampler
from kerastrip.sources import ImageFiles, TFRecordSource, tfrecord

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


def test_numbers_keep_their_dtype(tmp_path):
    records = [
        example(floats=[1.5, 300.75, -3.0], ints=[1, 300, -3], whole=[1.0, 255.0, 0.0])
    ] * 2
    path = write(tmp_path / "x", records)
    read = partial(TFRecordSource, path, label=None, shape=(3,))
    for name, dtype, values in (
        ("floats", None, [1.5, 300.75, -3.0]),
        ("floats", "float64", [1.5, 300.75, -3.0]),
        ("floats", "float16", [1.5, 300.75, -3.0]),
        ("ints", None, [1, 300, -3]),
        ("ints", "int16", [1, 300, -3]),
        ("ints", "float32", [1, 300, -3]),
        ("whole", "uint8", [1, 255, 0]),
    ):
        taken = read(name, dtype=dtype).take([1])
        own = {"floats": "float32", "ints": "int64"}
        assert taken.dtype == (dtype or own[name])
        assert taken.tolist() == [values]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.5], "int32"),
        ([300.0], "uint8"),
        ([float("nan")], "int64"),
        ([3e9], "int32"),
        ([1e5], "float16"),
        ([300], "uint8"),
        ([-3], "uint8"),
        ([-3], "uint64"),
        ([2**24 + 1], "float32"),
        ([2**53 + 1], "float64"),
        ([2], "bool"),
    ],
)
def test_numbers_that_another_dtype_does_not_hold_are_refused(tmp_path, values, dtype):
    path = write(tmp_path / "x", [example(image=values, label=0)])
    with pytest.raises(ValueError, match=rf"Record 0 .*'image' holds .* no {dtype}\."):
        TFRecordSource(path, shape=(1,), dtype=dtype)


def test_bytes_of_another_kind_are_told_how_to_be_read(tmp_path):
    import tensorflow as tf

    numbers = np.arange(4, dtype="float32")
    raw, written = numbers.tobytes(), tf.io.serialize_tensor(numbers).numpy()
    for image, dtype in ((raw, None), (written, None), (written, "float32")):
        path = write(tmp_path / "x", [example(image=image, label=0)])
        with pytest.raises(ValueError, match=r"Record 0 .*dtype=, bytes .* parse="):
            TFRecordSource(path, shape=(4,), dtype=dtype)
        with pytest.raises(ValueError, match=r"no image.*shape=.* need parse="):
            TFRecordSource(path)


def test_several_byte_strings_are_no_numbers(tmp_path):
    path = write(tmp_path / "x", [example(image=[b"1", b"2"], label=0)])
    with pytest.raises(ValueError, match="'image' has 2 byte strings, not one"):
        TFRecordSource(path, shape=(2,))


@pytest.mark.parametrize(
    "label", [np.int64(7).tobytes(), np.int64(300).tobytes(), b"\x07", b"caf\xe9"]
)
def test_bytes_that_are_no_text_are_no_labels(tmp_path, label):
    """An integer written as raw bytes would become a class of zero characters."""
    path = write(tmp_path / "x", [example(image=b"ab", label=label)])
    with pytest.raises(ValueError, match=r"Record 0 .*are no text.*function label="):
        TFRecordSource(path, shape=(2,))
    own = TFRecordSource(path, shape=(2,), label=lambda record: 5)
    assert own.labels.tolist() == [5]


def test_labels_of_two_kinds_are_told_apart(tmp_path):
    ints, words = example(image=b"ab", label=3), example(image=b"ab", label=b"ape")
    both = write(tmp_path / "both", [ints, words])
    with pytest.raises(
        TypeError, match=r"int \(record 0\), str \(record 1\) in .*both"
    ):
        TFRecordSource(both, shape=(2,))
    paths = [write(tmp_path / "a", [ints]), write(tmp_path / "b", [words])]
    for _ in range(2):  # from the files, and from their indices
        with pytest.raises(TypeError, match=r"integers in .*a, strings in .*b"):
            TFRecordSource(paths, shape=(2,))


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


def test_pictures_are_read_as_image_files_are(paths, tmp_path, images):
    file = tmp_path / "one.png"
    cv2.imwrite(str(file), images[0][..., ::-1])
    source, files = TFRecordSource(paths, size=3), ImageFiles([file], size=3)
    assert source.reading == files.reading
    np.testing.assert_array_equal(source.take([0]), files.take([0]))
    assert TFRecordSource(paths).reading is None
    with pytest.raises(ValueError, match=r"Record 0 of .*a\.tfrecord .*19"):
        TFRecordSource(paths, max_pixels=19)
    assert len(TFRecordSource(paths, max_pixels=20)) == 12


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


def keep_time(path, data):
    """Other contents at the same time of change."""
    told = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))


def test_a_record_that_changes_later_is_an_error(paths, images):
    source = TFRecordSource(paths)
    source.take([0])
    data = bytearray(paths[0].read_bytes())
    data[-20] ^= 1
    keep_time(paths[0], bytes(data))
    for rows in (source, TFRecordSource(paths)):
        np.testing.assert_array_equal(rows.take([5, 11]), images[[5, 11]])
        for _ in range(2):
            with pytest.raises(ValueError, match=r"changed since.*\(record 6,"):
                rows.take([6])


def test_stamps_tell_records_apart(paths):
    stamps = TFRecordSource(paths).stamps()
    assert stamps.shape == (12, 2)
    assert len(np.unique(stamps[:, 1])) == 12


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: {name: kept[name][:4] for name in ("offsets", "checks", "labels")},
        lambda kept: {"offsets": np.delete(kept["offsets"], 3)},
        lambda kept: {"labels": kept["labels"][:-1]},
        lambda kept: {"labels": kept["labels"].astype("float32")},
        lambda kept: {"labels": kept["labels"][:, None]},
        lambda kept: {"checks": kept["checks"].astype("int64")},
        lambda kept: {"offsets": kept["offsets"][::-1]},
        lambda kept: {"offsets": np.r_[0, -99, kept["offsets"][2:]]},
        lambda kept: {"labels": np.array([None] * 7)},
        lambda kept: {"about": np.array([kept["about"]] * 2)},
    ],
)
def test_an_index_that_does_not_agree_is_made_anew(paths, images, change):
    TFRecordSource(paths)
    index = paths[0].with_name("a.tfrecord.index.npz")
    with np.load(index) as kept:
        kept = dict(kept)
    np.savez(index, **kept | change(kept))
    for _ in range(2):
        source = TFRecordSource(paths)
        assert source.labels.tolist() == [i // 3 for i in range(12)]
        np.testing.assert_array_equal(source.take(range(12)), images)


def huge(index):
    """An array of 8 GB, as zeros that are compressed to a few bytes."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "<i8", "fortran_order": False, "shape": (2**30,)}
    )
    with zipfile.ZipFile(index, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("about", "offsets", "checks", "labels"):
            file.writestr(f"{name}.npy", head.getvalue() + bytes(10**6))


def test_a_damaged_index_is_made_anew(paths, images, rng):
    TFRecordSource(paths)
    index = paths[0].with_name("a.tfrecord.index.npz")
    whole = index.read_bytes()
    np.save(paths[0].with_name("plain.npy"), np.arange(3))
    plain = paths[0].with_name("plain.npy").read_bytes()
    cases = [b"", b"PK", plain, pickle.dumps([1])]
    huge(index)
    cases.append(index.read_bytes())
    for _ in range(40):
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        cases.append(bytes(data[: rng.integers(len(data), 2 * len(data))]))
    for case in cases:
        index.write_bytes(case)
        source = TFRecordSource(paths)
        assert source.labels.tolist() == [i // 3 for i in range(12)]
        np.testing.assert_array_equal(source.take(range(12)), images)


@pytest.mark.slow  # a fresh interpreter
def test_indexing_leaves_tensorflow_unused(paths):
    """Its first operation takes hold of every GPU, and ends what may be configured."""
    script = f"""
        import tensorflow as tf
        from kerastrip.sources import TFRecordSource
        source = TFRecordSource({[str(path) for path in paths]}, index=False)
        source.take([3])
        halves = [tf.config.LogicalDeviceConfiguration()] * 2
        device = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(device, halves)
        print(len(source), len(tf.config.list_logical_devices("CPU")))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout == "12 2\n", done.stderr
    assert "deprecated" not in done.stderr


# -- what is wrong with a file


def masked_crc(data):
    """The masked CRC-32C of some bytes, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (crc & 1) * 0x82F63B78
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return struct.pack("<I", masked)


def test_the_checksums_of_these_tests_are_those_of_tensorflow(tmp_path, rng):
    data = rng.bytes(5000)
    written = write(tmp_path / "x", [data]).read_bytes()
    assert written[8:12] == masked_crc(written[:8])
    assert written[-4:] == masked_crc(data)


def test_no_damage_goes_unnoticed(paths, rng):
    whole = paths[0].read_bytes()
    for case in range(60):
        data = bytearray(whole)
        if case % 3 == 0:
            del data[rng.integers(1, len(data)) :]
        elif case % 3 == 1:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        else:
            length = struct.pack("<Q", 1 << int(rng.integers(20, 64)))
            data[:12] = length + masked_crc(length)  # huge, with its checksum
        paths[0].write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.tfrecord with .* \(record \d"):
            TFRecordSource(paths, index=False)


def test_records_that_are_no_examples_are_refused(tmp_path, rng):
    record = example(image=b"0123456789", label=3)
    for case in range(60):
        data = bytearray(record)
        data[rng.integers(len(data))] = rng.integers(256)
        if case % 2:
            del data[rng.integers(len(data)) :]
        path = write(tmp_path / "x", [bytes(data)])
        try:
            TFRecordSource(path, shape=(10,), index=False)
        except ValueError as error:
            told = str(error)
        except TypeError as error:  # a label of another kind
            told = str(error)
        else:
            continue
        assert str(path) in told
        assert "ecord 0" in told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[:-1], "truncated record, or .* .record 6,"),
        (lambda data: data[: len(data) // 7 * 2 + 5], "truncated record"),
        (
            lambda data: data[:3] + b"\x01" + data[4:],
            "truncated record, or a damaged length .record 0, at byte 0",
        ),
        (
            lambda data: bytes([data[0] - 1]) + data[1:],
            "damaged record .record 0, at byte 0",
        ),
        (lambda data: data[:30] + b"?" + data[31:], "damaged record .record 0"),
        (lambda data: b"\x1f\x8b" + data, "truncated record, .*compressed"),
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
        ValueError, match=r"Record 0 of .*c.tfrecord .*no image.*shape="
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
        ({"feature": "label"}, ValueError, "no image but numbers"),
        ({"shape": (5, 4)}, ValueError, "Record 0 of .*reshape"),
        ({"color": "bgr"}, ValueError, "'rgb', 'gray'"),
        ({"parse": "image"}, TypeError, "parse"),
        ({"feature": 3}, TypeError, "`feature`: expected a str, received 3"),
        ({"label": 3}, TypeError, "`label`: expected a str, received 3"),
        ({"label": lambda record: 0.5}, TypeError, "integer or one string.*float"),
    ],
)
def test_arguments_that_are_none(paths, options, error, words):
    with pytest.raises(error, match=words):
        TFRecordSource(**{"paths": paths, **options})
