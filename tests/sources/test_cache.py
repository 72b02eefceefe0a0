"""cache_images: what is in the cache is what the source gave, or nothing."""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import sys
import threading
import time
from functools import partial

import keras
import numpy as np
import pytest

from kerastrip import Augmentation, PKSampler, cache_images, embed
from kerastrip.sources import CachedImages, cache

ROWS = [7, 0, 7, 3, 11]


class Pictures:
    """A source with labels, slow to read, that counts what is read."""

    def __init__(self, images, labels=None, fails=None):
        self._images, self.fails, self.read = images, fails, []
        self.labels = np.arange(len(images)) // 4 if labels is None else labels

    def __len__(self):
        return len(self._images)

    def take(self, indices):
        if self.fails is not None and self.fails in indices:
            raise OSError("no such picture")
        self.read += list(indices)
        return self._images[np.asarray(indices)]


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (12, 5, 4, 3), dtype="uint8")


@pytest.fixture
def small_steps(monkeypatch):
    """Two rows at a time, each saved."""
    monkeypatch.setattr(cache, "_ROWS", 2)
    monkeypatch.setattr(cache, "_SECONDS", 0.0)


def test_rows_and_labels_are_those_of_the_source(tmp_path, images):
    labels = np.array(["ape", "bär", "cat"]).repeat(4)
    source = Pictures(images, labels)
    cached = cache_images(source, tmp_path / "new" / "cache")
    assert sorted(source.read) == [0, *range(12)]  # the first one tells the shape
    taken = cached.take(np.array(ROWS))
    assert type(taken) is np.ndarray
    np.testing.assert_array_equal(taken, images[ROWS])
    taken[:] = 0
    np.testing.assert_array_equal(cached.take(ROWS), images[ROWS])
    assert cached.labels.tolist() == labels.tolist()
    source.read.clear()
    again = cache_images(source, tmp_path / "new" / "cache")
    assert len(source.read) <= 9
    np.testing.assert_array_equal(again.take(range(12)), images)
    plain = np.load(tmp_path / "new" / "cache" / "images.npy", mmap_mode="r")
    np.testing.assert_array_equal(plain, images)
    assert cache_images(images, tmp_path / "bare").labels is None


@pytest.mark.parametrize("dtype", ["float32", "bool", "int16"])
def test_any_dtype_and_shape(tmp_path, images, dtype):
    rows = images[:, 0, 0].astype(dtype)
    taken = cache_images(rows, tmp_path).take([2, 1])
    assert taken.dtype == dtype
    np.testing.assert_array_equal(taken, rows[[2, 1]])


def test_pickled_by_its_path(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = pickle.dumps(cache_images(Pictures(images), "cache"))
    monkeypatch.chdir("/")
    assert len(text) < 400
    copy = pickle.loads(text)
    np.testing.assert_array_equal(copy.take(ROWS), images[ROWS])
    assert copy.labels.tolist() == Pictures(images).labels.tolist()


def test_sampler_processes_and_embed(tmp_path, images):
    cached = cache_images(Pictures(images), tmp_path)
    sampler = PKSampler(
        cached,
        classes_per_batch=2,
        samples_per_class=2,
        workers=1,
        use_multiprocessing=True,
    )
    x, _ = sampler.batch(1, 2)
    sampler.close()
    np.testing.assert_array_equal(x, images[sampler.plan.indices(2, 1)])
    model = keras.Sequential([keras.Input((5, 4, 3)), keras.layers.Flatten()])
    np.testing.assert_array_equal(embed(model, cached), images.reshape(12, -1))


def test_the_progress_bar_is_shown_on_request(tmp_path, images, capsys):
    cache_images(images, tmp_path / "silent")
    assert capsys.readouterr().out == ""
    cache_images(images, tmp_path / "told", verbose=True)
    assert "12/12" in capsys.readouterr().out


# -- interrupted


def test_an_error_leaves_what_was_saved(tmp_path, images, small_steps):
    with pytest.raises(OSError, match="no such picture"):
        cache_images(Pictures(images, fails=9), tmp_path)
    assert json.loads((tmp_path / "cache.json").read_text())["rows"] == 8
    with pytest.raises(ValueError, match="unfinished one with 8 of 12 rows"):
        CachedImages(tmp_path)
    source = Pictures(images)
    cached = cache_images(source, tmp_path)
    np.testing.assert_array_equal(cached.take(range(12)), images)
    assert source.read[0] == 0  # for the shape
    assert sorted(source.read[1:9]) == list(range(8))  # compared
    assert sorted(source.read[9:]) == [8, 9, 10, 11]


@pytest.mark.parametrize("more", [0, 37, 400])
def test_rows_that_are_not_counted_are_not_believed(
    tmp_path, images, small_steps, more
):
    """Killed between the writing of rows and the counting of them."""
    with pytest.raises(OSError, match="no such picture"):
        cache_images(Pictures(images, fails=6), tmp_path)
    path = tmp_path / "images.npy"
    counted = path.stat().st_size
    with open(path, "ab") as file:
        file.write(b"?" * more)
    (tmp_path / "cache.json.part").write_text('{"about"')
    cached = cache_images(Pictures(images), tmp_path)
    np.testing.assert_array_equal(cached.take(range(12)), images)
    assert path.stat().st_size == counted + 6 * 60


def test_rows_are_on_the_disk_before_they_are_counted(
    tmp_path, images, small_steps, monkeypatch
):
    """Looked at when the counter is about to be written."""
    write, sync = cache._write_header, os.fsync
    counts, synced = [], []

    def check(path, about, rows):
        if rows:
            assert synced[-1].endswith(images[:rows].tobytes())
        counts.append(rows)
        write(path, about, rows)

    def fsync(file):
        sync(file)
        path = tmp_path / "images.npy"
        synced.append(path.read_bytes() if path.exists() else b"")

    monkeypatch.setattr(cache, "_write_header", check)
    monkeypatch.setattr(os, "fsync", fsync)
    cache_images(images, tmp_path)
    assert counts == [0, 2, 4, 6, 8, 10, 12]


class Slow:
    """1,000 rows of their own numbers, in about a second."""

    labels = np.arange(1000) // 4

    def __len__(self):
        return 1000

    def take(self, indices):
        time.sleep(0.001 * len(indices))
        return np.asarray(indices)[:, None].repeat(1500, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.slow
def test_killed_again_and_again(tmp_path, monkeypatch):
    """kill -9 at any moment: the work goes on, and every row is right in the end."""
    monkeypatch.setattr(cache, "_ROWS", 4)
    monkeypatch.setattr(cache, "_SECONDS", 0.02)
    rows, context = [], multiprocessing.get_context("fork")
    for attempt in itertools.count():
        process = context.Process(target=cache_images, args=(Slow(), tmp_path))
        process.start()
        process.join(0.08 + 0.013 * (attempt % 7))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        rows.append(cache._header(tmp_path)["rows"])
        assert attempt < 200
    assert process.exitcode == 0
    assert rows == sorted(rows)
    assert len(set(rows)) >= 4, rows
    expected = np.arange(1000)[:, None].repeat(1500, 1)
    np.testing.assert_array_equal(CachedImages(tmp_path).take(range(1000)), expected)


def test_two_at_once_wait_for_each_other(tmp_path, images, small_steps):
    class Slow(Pictures):
        def take(self, indices):
            time.sleep(0.01)
            return super().take(indices)

    sources = [Slow(images), Slow(images)]
    threads = [
        threading.Thread(target=cache_images, args=(source, tmp_path))
        for source in sources
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    np.testing.assert_array_equal(CachedImages(tmp_path).take(range(12)), images)
    # The second one compares, and writes nothing.
    assert sorted(len(source.read) for source in sources) == [9, 13]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_processes_at_once_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_ROWS", 16)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=cache_images, args=(Slow(), tmp_path)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    expected = np.arange(1000)[:, None].repeat(1500, 1)
    np.testing.assert_array_equal(CachedImages(tmp_path).take(range(1000)), expected)


def test_a_data_set_with_one_open_file_is_read_in_turns(tmp_path, monkeypatch):
    """As are an open archive, or images that are read when they are looked at."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    np.arange(2000, dtype="<i4").repeat(25).tofile(tmp_path / "rows.bin")

    class Rows:
        def __init__(self):
            self.file = io.FileIO(tmp_path / "rows.bin")

        def __len__(self):
            return 2000

        def __getitem__(self, row):
            self.file.seek(100 * row)
            time.sleep(1e-6)  # another thread's turn
            return np.frombuffer(self.file.read(100), "<i4")

    cached = cache_images(Rows(), tmp_path / "cache")
    expected = np.arange(2000)[:, None].repeat(25, 1)
    np.testing.assert_array_equal(cached.array, expected)


# -- damaged, or of something else


def truncate(path, by):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - by)


def edit(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def flip(path, place):
    """One bit of a byte."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def header(path, rows=12, **about):
    """Forges a header, with the checksum that belongs to it."""
    about = json.loads((path / "cache.json").read_text())["about"] | about
    cache._write_header(path, about, rows)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: truncate(p / "images.npy", 1), "images.npy of 847 bytes, not 848"),
        (lambda p: truncate(p / "images.npy", 800), "images.npy damaged"),
        (lambda p: (p / "images.npy").unlink(), "images.npy damaged"),
        (lambda p: edit(p / "images.npy", b"|u1", b"|i1"), "another shape or dtype"),
        (lambda p: edit(p / "cache.json", b"12", b"11"), "a damaged cache.json"),
        (lambda p: truncate(p / "cache.json", 5), "a damaged cache.json"),
        (lambda p: truncate(p / "labels.npy", 5), "labels.npy of .* bytes"),
        (lambda p: np.save(p / "labels.npy", np.zeros(12)), "labels.npy damaged"),
        (lambda p: flip(p / "labels.npy", -9), "labels.npy changed"),
        (lambda p: truncate(p / "checksums.npy", 4), "checksums.npy of .* bytes"),
    ],
)
def test_damage_is_refused(tmp_path, images, damage, words):
    cache_images(Pictures(images), tmp_path)
    damage(tmp_path)
    for call in (CachedImages, lambda path: cache_images(Pictures(images), path)):
        with pytest.raises(ValueError, match=rf"{words}.*Delete the directory"):
            call(tmp_path)


def test_a_flipped_bit_is_an_error_when_its_row_is_read(tmp_path, images):
    cached = cache_images(Pictures(images), tmp_path)
    flip(tmp_path / "images.npy", -60 - 5)  # of the last row but one
    again = CachedImages(tmp_path)
    for rows in (cached, again, pickle.loads(pickle.dumps(cached))):
        np.testing.assert_array_equal(rows.take([9, 11]), images[[9, 11]])
        for _ in range(2):
            with pytest.raises(ValueError, match="a damaged row 10 in"):
                rows.take([3, 10])
    for call in (CachedImages, partial(cache_images, Pictures(images))):
        with pytest.raises(ValueError, match=r"(damaged row|another sample) 10"):
            call(tmp_path, verify=True)


@pytest.mark.parametrize("augment", [None, Augmentation.none()])
def test_a_flipped_bit_does_not_reach_a_batch(tmp_path, images, augment):
    cached = cache_images(Pictures(images), tmp_path)
    sampler = PKSampler(
        cached,
        classes_per_batch=2,
        samples_per_class=2,
        augment=augment,
        workers=0,
    )
    first = sampler.plan.indices(0, 0)
    row = next(row for row in range(12) if row not in first)
    flip(tmp_path / "images.npy", 60 * row - 12 * 60)
    sampler.batch(0, epoch=0)
    epoch = next(n for n in range(1, 99) if row in sampler.plan.indices(n, 0))
    with pytest.raises(ValueError, match=f"damaged row {row} in"):
        sampler.batch(0, epoch=epoch)


class Files(Pictures):
    """With the stamps of their files, and how they are read."""

    reading = {"size": [5, 4], "color": "rgb"}  # noqa: RUF012

    def __init__(self, images, **options):
        super().__init__(images, **options)
        self.sizes = np.full((len(images), 2), 1234)

    def stamps(self):
        return self.sizes


def test_a_replaced_file_is_noticed(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(cache, "_ROWS", 16)
    images = rng.integers(0, 256, (100, 5, 4, 3), dtype="uint8")
    source = Files(images)
    cache_images(source, tmp_path)
    source.sizes[37:67] += 1  # touched: read once, found equal, and forgotten
    for expected in (9 + 28, 9):
        source.read.clear()
        cached = cache_images(source, tmp_path)
        assert len(source.read) == expected
    np.testing.assert_array_equal(cached.take(range(100)), images)
    changed = Files(np.where(np.arange(100)[:, None, None, None] == 40, 255, images))
    changed._images = changed._images.astype("uint8")
    changed.sizes = source.sizes.copy()
    changed.sizes[40] += 1
    with pytest.raises(ValueError, match=r"another sample 40 .*file has changed"):
        cache_images(changed, tmp_path)
    assert CachedImages(tmp_path).reading == Files.reading
    changed.reading = Files.reading | {"color": "gray"}
    with pytest.raises(ValueError, match=r"reading .*gray.*other parameters"):
        cache_images(changed, tmp_path)


def test_a_file_replaced_before_the_cache_was_finished(tmp_path, images, small_steps):
    with pytest.raises(OSError, match="no such picture"):
        cache_images(Files(images, fails=10), tmp_path)
    changed = Files(images.copy())
    changed._images[[5, 11]] ^= 1
    changed.sizes[[5, 11]] += 1
    with pytest.raises(ValueError, match="another sample 5 "):
        cache_images(changed, tmp_path)
    changed._images[5] ^= 1
    np.testing.assert_array_equal(
        cache_images(changed, tmp_path).array, changed._images
    )
    changed.read.clear()
    cache_images(changed, tmp_path)  # its stamps are the new ones
    assert len(changed.read) == 9


def nested(path):
    (path / "cache.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    "forge",
    [
        nested,
        partial(header, shape=[10**9, 10**9]),
        partial(header, samples=10**30, rows=10**30),
        partial(header, samples=10**12),
        partial(header, shape=None),
        partial(header, shape=[-5, -4, 3]),
        partial(header, shape=[[5], 4, 3]),
        partial(header, dtype="|O8"),
        partial(header, dtype="<u3"),
        partial(header, dtype=7),
        partial(header, dtype="<f" + "9" * 30),
        partial(header, labels=[1]),
        partial(header, labels={"shape": [], "dtype": "|O8", "digest": ""}),
        partial(header, labels={"shape": [], "dtype": "<U9999999999", "digest": ""}),
        partial(header, rows=True),
        partial(header, rows=1e9),
        partial(header, rows=-1),
        partial(header, reading=[]),
        partial(header, version={}),
    ],
)
def test_forged_headers_are_refused(tmp_path, images, forge):
    cache_images(Pictures(images), tmp_path)
    forge(tmp_path)
    for call in (CachedImages, partial(cache_images, Pictures(images))):
        with pytest.raises(ValueError, match="cache"):
            call(tmp_path)


def test_no_damage_goes_unnoticed(tmp_path, images, rng):
    """Any file, cut or with other bytes: an error, or the same rows."""
    cache_images(Pictures(images), tmp_path)
    whole = {p: p.read_bytes() for p in tmp_path.iterdir() if p.name != "cache.lock"}
    refused = 0
    for case in range(120):
        path = list(whole)[case % len(whole)]
        data = bytearray(whole[path])
        if case % 3 == 0:
            del data[rng.integers(len(data)) :]
        else:
            for _ in range(case % 3):
                data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(data)
        try:
            cached = CachedImages(tmp_path)
            np.testing.assert_array_equal(cached.take(range(12)), images)
            assert cached.labels.tolist() == Pictures(images).labels.tolist()
        except ValueError:
            refused += 1
        path.write_bytes(whole[path])
    assert refused > 90  # the stamps are not compared here


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights")
def test_planted_links_are_not_followed(tmp_path, images):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("cache.json.part", "cache.json", "images.npy", "stamps.npy"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).symlink_to(victim)
        with contextlib.suppress(ValueError, FileExistsError):
            cache_images(images, folder)
        assert victim.read_text() == "mine"
    folder = tmp_path / "lock"
    folder.mkdir()
    (folder / "cache.lock").symlink_to(tmp_path / "new")
    with pytest.raises(OSError, match="symbolic link"):
        cache_images(images, folder)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: Pictures(x[:8]), "samples 12, not 8,"),
        (lambda x: Pictures(x[:, :4]), r"shape \[5, 4, 3\], not \[4, 4, 3\]"),
        (lambda x: Pictures(x.astype("float32")), "dtype .u1, not <f4"),
        (lambda x: Pictures(x, np.arange(12)), "other labels"),
        (
            lambda x: Pictures(np.where(x > 9, x - 1, x).astype("u1")),
            "another sample 0",
        ),
    ],
)
def test_a_cache_of_another_source_is_refused(
    tmp_path, images, small_steps, change, words, unfinished
):
    if unfinished:
        with pytest.raises(OSError, match="no such picture"):
            cache_images(Pictures(images, fails=9), tmp_path)
    else:
        cache_images(Pictures(images), tmp_path)
    with pytest.raises(ValueError, match=rf"{words}.*another source"):
        cache_images(change(images), tmp_path)


def test_what_cannot_be_cached(tmp_path, images):
    with pytest.raises(TypeError, match="parts of a structure"):
        cache_images({"a": images}, tmp_path)
    with pytest.raises(TypeError, match=r"source\.labels"):
        cache_images(Pictures(images, np.array([None] * 12)), tmp_path)
    with pytest.raises(FileNotFoundError, match="no cache of images"):
        CachedImages(tmp_path)
    np.save(tmp_path / "images.npy", images)  # somebody's own
    with pytest.raises(FileExistsError, match="not of a cache"):
        cache_images(images, tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy"), images)
