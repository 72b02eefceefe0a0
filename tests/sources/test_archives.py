"""Zip archives: the same images as from files, safe in threads and processes."""

import pickle
import struct
import tracemalloc
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from harness import ROOT

from kerastrip.sampling.sampler import PKSampler
from kerastrip.sources import BrokenSamples, ImageFolder, ZipImages

OMNIGLOT = ROOT.parent / "shared/data/omniglot/images_background_small1.zip"
NAMES = [
    f"{alphabet}/{character}/{number}.png"
    for alphabet in ("Greek", "Ελληνικά")
    for character in ("α", "b")
    for number in range(4)
]


def png(level):
    rng = np.random.default_rng(level)
    image = rng.integers(0, 256, (9, 9, 3), dtype="uint8")
    return cv2.imencode(".png", image)[1].tobytes()


@pytest.fixture
def archive(tmp_path):
    """Some members stored, some deflated, one folder round them all."""
    path = tmp_path / "letters.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("letters/", b"")
        file.writestr("letters/.DS_Store", b"x")
        file.writestr("__MACOSX/letters/Greek/b/._0.png", b"x")
        file.writestr("letters/readme.txt", b"x")
        for level, name in enumerate(NAMES):
            way = zipfile.ZIP_DEFLATED if level % 2 else zipfile.ZIP_STORED
            file.writestr(f"letters/{name}", png(level), way)
    return path


def test_the_images_are_those_of_the_unpacked_folder(archive, tmp_path):
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "out")
    options = {"size": 7, "label_from": "path"}
    packed = ZipImages(archive, **options)
    folder = ImageFolder(tmp_path / "out" / "letters", **options)
    np.testing.assert_array_equal(packed.labels, folder.labels)
    np.testing.assert_array_equal(packed.take(range(16)), folder.take(range(16)))
    assert packed.paths[0] == f"{archive}/letters/{NAMES[4]}"
    whole = ZipImages(archive, size=7, label_from=lambda path: path)
    assert whole.labels.tolist() == sorted(NAMES)


def test_threads_and_processes_read_the_same(archive):
    source = ZipImages(archive, size=7, label_from="path")
    expected = source.take(range(16))
    with ThreadPoolExecutor(8) as threads:
        for row, taken in enumerate(
            threads.map(source.take, np.arange(160)[:, None] % 16)
        ):
            np.testing.assert_array_equal(taken[0], expected[row % 16])
    sent = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(sent.take(range(16)), expected)
    shape = {"classes_per_batch": 4, "samples_per_class": 4}
    here = PKSampler(source, **shape, workers=0)
    there = PKSampler(source, **shape, workers=2, use_multiprocessing=True)
    with ThreadPoolExecutor(4) as threads:
        for epoch, (x, _) in enumerate(threads.map(there.batch, [0] * 40, range(40))):
            np.testing.assert_array_equal(x, here.batch(0, epoch)[0])
    there.close()


def test_backslashes_are_folders_too(tmp_path):
    path = tmp_path / "windows.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("data\\cat\\1.png", "data\\dog\\1.png"):
            file.writestr(name, png(0))
    source = ZipImages(path, size=9)
    assert source.labels.tolist() == ["cat", "dog"]
    assert len(source.take([0, 1])) == 2


def test_damaged_members_are_named(archive):
    source = ZipImages(archive, size=7, label_from="path")
    with zipfile.ZipFile(archive) as file:
        members = [file.getinfo(f"letters/{name}") for name in sorted(NAMES)]
    data = bytearray(archive.read_bytes())
    for row, (place, says) in enumerate(
        ((80, "damaged"), (80, "damaged"), (0, "begins"))
    ):
        data[members[row].header_offset + place] ^= 0xFF
        archive.write_bytes(data)
        with pytest.raises(BrokenSamples, match=says) as caught:
            source.take([5, row])
        assert repr(f"{archive}/{members[row].filename}") in str(caught.value)
    archive.write_bytes(data[:600])
    with pytest.raises(BrokenSamples, match="Sample 15"):
        source.take([15])


def test_archives_that_do_not_work_say_why(archive, tmp_path):
    text = tmp_path / "text.zip"
    text.write_text("no archive")
    for path in (text, tmp_path / "nowhere.zip", tmp_path):
        with pytest.raises(ValueError, match="expected a zip archive"):
            ZipImages(path, size=8)
    with pytest.raises(ValueError, match="'Greek/b' with 'path'"):
        ZipImages(archive, size=8)
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_BZIP2) as file:
        file.writestr("a/1.png", png(0))
        file.writestr("b/1.png", png(1))
    with pytest.raises(ValueError, match=r"'a/1.png' \(method 12\)"):
        ZipImages(packed, size=8)
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("a/1.png", png(0))
        file.writestr("a/2.png", png(1))
    with pytest.raises(ValueError, match="at least two classes, received one, 'a'"):
        ZipImages(packed, size=8)


def directory_entry(path, name):
    """Where the table of contents of an archive tells of a member."""
    return path.read_bytes().rindex(name.encode()) - 46


def test_a_member_that_unpacks_to_more_than_it_tells_is_broken(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/1.png", bytes(50_000_000))
        file.writestr("b/1.png", png(0))
    data = bytearray(path.read_bytes())
    for told, says in (
        (100, "100 bytes, but there are more"),
        (2**31, "2,147,483,648"),
    ):
        struct.pack_into("<I", data, directory_entry(path, "a/1.png") + 24, told)
        path.write_bytes(data)
        source = ZipImages(path, size=8)
        tracemalloc.start()
        with pytest.raises(BrokenSamples, match=f"a/1.png'.*{says}"):
            source.take([0])
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
        tracemalloc.stop()
        assert source.take([1]).shape == (1, 8, 8, 3)
    with pytest.raises(BrokenSamples, match="9 x 9 pixels are more than max_pixels=80"):
        ZipImages(path, size=8, max_pixels=80).take([1])


def test_a_large_member_that_is_no_image_is_not_unpacked(tmp_path, rng):
    path = tmp_path / "bomb.zip"
    start = png(0)[:16] + struct.pack(">II", 20_000, 20_000)
    pixels = rng.integers(0, 256, (700, 700, 3), "uint8")
    large = cv2.imencode(".bmp", pixels)[1].tobytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/1.png", bytes(50_000_000))
        file.writestr("a/2.png", start + bytes(50_000_000))
        file.writestr("b/1.bmp", large)
    source = ZipImages(path, size=700)
    for row, says in ((0, "no image that is read"), (1, "20,000 x 20,000 pixels")):
        tracemalloc.start()
        with pytest.raises(BrokenSamples, match=says):
            source.take([row])
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
        tracemalloc.stop()
    assert (source.take([2])[0] == pixels[..., ::-1]).all()


def test_an_archive_with_flipped_bits_reads_or_gives_a_value_error(archive):
    rng, whole = np.random.default_rng(0), np.frombuffer(archive.read_bytes(), "u1")
    table = whole.tobytes().index(b"PK\x01\x02")
    read = 0
    for _ in range(300):
        data = whole.copy()
        at = rng.integers(table if rng.random() < 0.8 else 0, len(data), 2)
        data[at] ^= rng.integers(1, 256, 2).astype("u1")
        archive.write_bytes(
            data[: rng.integers(0, 9999) if rng.random() < 0.1 else None]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what was left out
            try:
                source = ZipImages(
                    archive, size=7, label_from="parent", on_error="skip"
                )
            except ValueError:
                continue
        read += len(source) - len(source.find_broken())
    assert read > 300


def test_the_stamps_are_the_checksums_of_the_members(archive):
    stamps = ZipImages(archive, size=7, label_from="path").stamps()
    with zipfile.ZipFile(archive) as file:
        infos = [file.getinfo(f"letters/{name}") for name in sorted(NAMES)]
    assert stamps.tolist() == [[info.file_size, info.CRC] for info in infos]


@pytest.mark.skipif(not OMNIGLOT.exists(), reason="Omniglot is not here")
def test_omniglot():
    source = ZipImages(OMNIGLOT, size=28, color="gray", label_from="path")
    names, counts = np.unique(source.labels, return_counts=True)
    assert len(names) == 136
    assert (counts == 20).all()
    taken = source.take(range(0, len(source), 17))
    assert taken.shape == (160, 28, 28, 1)
    assert (taken.min(axis=(1, 2, 3)) < 128).all()  # ink
    assert (taken.mean(axis=(1, 2, 3)) > 128).all()  # on paper
