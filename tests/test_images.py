"""Image files: pixels, labels, and what happens where a file is broken."""

import multiprocessing
import pickle
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import cv2
import keras
import numpy as np
import pytest

import kerastrip
from kerastrip.plan import PKPlan
from kerastrip.sampler import PKSampler
from kerastrip.sources import (
    BrokenSamples,
    ImageFiles,
    ImageFolder,
    Subset,
    _headers,
    decoding,
    images,
    read_image,
)

P, K = 3, 3
SHAPE = {"classes_per_batch": P, "samples_per_class": K}
MODES = [
    {"workers": 0},
    {"workers": 2},
    {"workers": 2, "use_multiprocessing": True},
]
CLASSES = {"ant": 6, "bee": 5, "cat": 4, "dog": 7, "größe 猫": 3}


def encoded(image, extension=".png", *options):
    return cv2.imencode(extension, image, list(options))[1].tobytes()


def smooth(rng, height, width):
    image = rng.integers(0, 256, (8, 6, 3), dtype="uint8")
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)


def decoded(data, size, **options):
    """The first row of a source whose files are given as bytes."""
    source = ImageFiles(["x"], size=size, read=lambda path: data, **options)
    return source.take([0])[0]


def told(images, row):
    """Where an image of `folder` tells its row: all of it has one grey level."""
    assert (images[row] == images[row, 0, 0, 0]).all()
    return int(images[row, 0, 0, 0])


@pytest.fixture
def folder(tmp_path):
    """Class folders of grey images; the grey level is the row."""
    row = 0
    for name, count in CLASSES.items():
        (tmp_path / name).mkdir()
        for number in range(count):
            image = np.full((12, 10, 3), row, "uint8")
            (tmp_path / name / f"{number}.png").write_bytes(encoded(image))
            row += 1
    return tmp_path


def break_some(folder):
    """Breaks files in several ways; their rows."""
    (folder / "ant" / "1.png").write_bytes(b"")
    (folder / "ant" / "4.png").write_bytes(b"no image")
    (folder / "cat" / "0.png").write_bytes(encoded(np.zeros((9, 9, 3)))[:-30])
    rows = [1, 4, 11]
    dog = folder / "dog"
    for number in range(5):  # of seven: fewer than K are left
        (dog / f"{number}.png").unlink()
        (dog / f"{number}.png").mkdir()  # found by its name, but not a file
    return [*rows, *range(15, 20)]


def skipping(folder, **options):
    """The folder as rows of files, broken ones among them."""
    paths = sorted(folder.glob("*/*.png"))
    labels = [path.parent.name for path in paths]
    return ImageFiles(paths, labels, size=8, on_error="skip", **options)


# -- pixels --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "16 bit", "alpha", "gray", "bmp", "tif"])
@pytest.mark.parametrize("color", ["rgb", "gray"])
def test_pixels_are_rgb_or_gray_uint8_whatever_the_file_holds(rng, kind, color):
    bgr = rng.integers(0, 256, (7, 5, 3), dtype="uint8")
    if kind == "gray":
        bgr = np.repeat(bgr[..., :1], 3, axis=2)
    data = {
        "png": lambda: encoded(bgr),
        "16 bit": lambda: encoded(bgr.astype("uint16") * 256 + 99),
        "alpha": lambda: encoded(np.dstack([bgr, bgr[..., 0]])),
        "gray": lambda: encoded(bgr[..., 0]),
        "bmp": lambda: encoded(bgr, ".bmp"),
        "tif": lambda: encoded(bgr, ".tif"),
    }[kind]()
    image = decoded(data, (7, 5), color=color)
    assert image.dtype == np.uint8
    if color == "rgb":
        np.testing.assert_array_equal(image, bgr[..., ::-1])
    else:
        assert image.shape == (7, 5, 1)
        expected = bgr @ [0.114, 0.587, 0.299]
        np.testing.assert_allclose(image[..., 0], expected, atol=1)


def test_size_is_height_and_width_by_a_filter_that_does_not_alias(rng):
    image = rng.integers(0, 256, (64, 32, 3), dtype="uint8")
    small = decoded(encoded(image), (16, 8))
    mean = image[..., ::-1].reshape(16, 4, 8, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(small, mean, atol=1)
    assert decoded(encoded(image), 96).shape == (96, 96, 3)


def with_orientation(jpeg, orientation):
    """A JPEG with the EXIF tag 274."""
    tiff = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 274, 3, 1, orientation, 0)
    exif = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


@pytest.mark.parametrize("size", [(120, 80), (30, 20), (15, 10)])
def test_exif_orientation_turns_the_image_upright(rng, size):
    turned = encoded(smooth(rng, 80, 120), ".jpg", cv2.IMWRITE_JPEG_QUALITY, 100)
    upright = np.rot90(decoded(turned, size[::-1]), k=-1)
    image = decoded(with_orientation(turned, 6), size)
    np.testing.assert_allclose(image.astype(int), upright, atol=8)


def test_reduced_decoding_never_falls_below_the_size(rng):
    image = smooth(rng, 600, 800)
    for options in ((), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)):
        jpeg = with_orientation(encoded(image, ".jpg", *options), 6)
        for least, factor in ((75, 8), (76, 4), (150, 4), (151, 2), (301, 1), (900, 1)):
            assert decoding._reduction(_headers.read_header(jpeg), least) == factor
    full, reduced = (
        decoded(jpeg, 75, reduce=word).astype(int) for word in ("never", "auto")
    )
    assert 0 < np.abs(full - reduced).max() < 12
    assert np.abs(full - reduced).mean() < 1
    for end in range(700):  # a header that is cut anywhere
        _headers.read_header(jpeg[:end])


def test_rows_come_fresh_in_the_order_asked_for(folder):
    source = ImageFolder(folder, size=8)
    assert len(source) == 25
    rows = [20, 3, 3, 24]
    taken = source.take(np.array(rows))
    assert [told(taken, place) for place in range(4)] == rows
    taken[:] = 0
    assert told(source.take([3]), 0) == 3
    assert "25 images, 8x8 rgb, 5 classes" in repr(source)


# -- folders -------------------------------------------------------------------


def test_a_folder_of_class_folders(folder):
    (folder / "ant" / "notes.txt").write_text("x")
    (folder / "ant" / ".hidden.png").write_bytes(b"x")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "x.png").write_bytes(b"x")
    (folder / "bee" / "9.PNG").write_bytes(encoded(np.zeros((5, 5))))
    source = ImageFolder(folder, size=8)
    assert dict(zip(*np.unique(source.labels, return_counts=True), strict=True)) == {
        **CLASSES,
        "bee": 6,
    }
    assert source.paths == sorted(source.paths)
    x, y = PKSampler(source, **SHAPE)[0]
    assert x.shape == (P * K, 8, 8, 3)
    assert y.shape == (P * K,)


PATHS = ["Greek/alpha/1.png", "Latin/alpha/2.png", "Latin/beta/3.jpg"]


@pytest.mark.parametrize(
    ("label_from", "expected"),
    [
        ("parent", ["alpha", "alpha", "beta"]),
        ("top", ["Greek", "Latin", "Latin"]),
        ("path", ["Greek/alpha", "Latin/alpha", "Latin/beta"]),
        (lambda path: int(path[-5]), [1, 2, 3]),
        (lambda path: path[0] if path < "Latin/b" else None, ["G", "L"]),
    ],
)
def test_nested_folders_make_labels(tmp_path, label_from, expected):
    for path in PATHS:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(encoded(np.zeros((4, 4)), path[-4:]))
    source = ImageFolder(tmp_path, size=4, label_from=label_from)
    assert source.labels.tolist() == expected
    assert len(source.take(range(len(source)))) == len(expected)


@pytest.mark.parametrize(
    ("paths", "label_from", "says"),
    [
        (["a/x.txt"], None, "expected images"),
        ([], "path", "expected images"),
        (["a/1.png", "a/2.png"], None, "at least two classes, received one, 'a'"),
        (["a/1.png", "2.png"], None, "folder of its class, received '2.png'"),
        (PATHS, None, "'alpha' with 'parent', 'Greek' with 'top', 'Greek/alpha' with"),
        (PATHS, "parents", "Did you mean 'parent'"),
        (PATHS, lambda path: None, "a label for some"),
    ],
)
def test_a_folder_that_does_not_work_says_why(paths, label_from, says):
    with pytest.raises(ValueError, match=says):
        images.labelled_images("directory", paths, label_from)


def test_arguments_that_do_not_work_say_why(folder):
    path = folder / "ant" / "0.png"
    for wrong, says in (
        ({"size": 0}, "size"),
        ({"size": 8.5}, "size"),
        ({"size": (8, 8, 3)}, "size"),
        ({"size": 8, "color": "grey"}, "Did you mean 'gray'"),
        ({"size": 8, "reduce": 2}, "reduce"),
        ({"size": 8, "on_error": "ignore"}, "on_error"),
        ({"size": 8, "labels": [1, 2]}, "1 labels"),
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            ImageFiles([path], **wrong)
    with pytest.raises(TypeError, match=r"ImageFolder\(directory\)"):
        ImageFiles(str(folder), size=8)
    with pytest.raises(ValueError, match="at least one path"):
        ImageFiles([], size=8)
    with pytest.raises(ValueError, match=r"nowhere.png'. 1 of 2 are not there"):
        ImageFiles([path, folder / "nowhere.png"], size=8)
    with pytest.raises(ValueError, match="expected a folder"):
        ImageFolder(path, size=8)


# -- broken files --------------------------------------------------------------


def test_a_broken_file_is_named(folder, rng):
    broken = break_some(folder)
    whole = encoded(smooth(rng, 60, 60), ".jpg")
    (folder / "bee" / "0.png").write_bytes(whole[: len(whole) // 2])
    for on_error in ("raise", "skip"):
        paths = sorted(folder.glob("*/*.png"))
        source = ImageFiles(paths, size=8, on_error=on_error, read=images.read_file)
        for row, why in ((1, "empty"), (4, "no image"), (6, "cut"), (15, "directory")):
            with pytest.raises(BrokenSamples, match=why) as caught:
                source.take([0, row, 2])
            assert f"Sample {row} cannot be read: {str(paths[row])!r}" in str(
                caught.value
            )
            again = pickle.loads(pickle.dumps(caught.value))
            assert str(again) == str(caught.value)
            assert again.skip == (on_error == "skip")
        assert sorted(source.find_broken()) == sorted([*broken, 6])
    with pytest.raises(BrokenSamples, match="and 1 more"):
        source.take([1, 0, 4, 1])


@pytest.mark.parametrize("cache", [None, "memory"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_skipping_gives_the_same_batches_in_any_order_and_mode(folder, mode, cache):
    broken = set(break_some(folder))
    names = np.array([name for name, count in CLASSES.items() for _ in range(count)])
    plan = PKPlan(names, **SHAPE, seed=1)
    order = [(epoch, step) for epoch in range(6) for step in range(len(plan))]
    expected = {}
    for at in order:
        rows = plan.indices(*at)
        good = [row for row in rows.tolist() if row not in broken]
        for place, row in enumerate(rows.tolist()):
            if row in broken:
                others = [
                    other
                    for other in plan.substitutes(*at, place)
                    if other not in broken
                ]
                rows[place] = next((o for o in others if o not in good), others[0])
                good.append(rows[place])
        expected[at] = rows
        for group in rows.reshape(P, K):
            assert len(set(names[group])) == 1
            kept = K if names[group[0]] != "dog" else 2
            assert len(set(group.tolist())) == kept
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler = PKSampler(
            skipping(folder, cache=cache),
            **SHAPE,
            seed=1,
            targets=("label", np.arange(len(names))),
            sample_weight=(np.ones(len(names)), np.arange(len(names))),
            **mode,
        )
        with ThreadPoolExecutor(3) as threads:
            made = threads.map(lambda at: sampler.batch(at[1], at[0]), order[::-1])
        for at, (x, (codes, rows), (_, weights)) in zip(order[::-1], made, strict=True):
            np.testing.assert_array_equal(rows, expected[at])
            np.testing.assert_array_equal(x[:, 0, 0, 0], rows)
            np.testing.assert_array_equal(weights, rows)
            np.testing.assert_array_equal(sampler.decode(codes), names[rows])
    texts = [
        str(warning.message) for warning in caught if "read" in str(warning.message)
    ]
    assert len(texts) == 1
    assert sampler.broken.keys() == broken
    assert sampler.report().samples_broken == len(broken)
    sampler.close()


def test_skipping_works_by_parts_of_the_input_of_the_batch_and_of_the_source(folder):
    break_some(folder)
    source = skipping(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = PKSampler(source, **SHAPE, seed=3)
        parts = [PKSampler(source, **SHAPE, seed=3, shard=(i, 3)) for i in range(3)]
        both = PKSampler(
            {"image": source, "row": np.arange(25)}, source.labels, **SHAPE, seed=3
        )
        for epoch in range(4):
            x, y = whole.batch(1, epoch)
            shards = [part.batch(1, epoch) for part in parts]
            np.testing.assert_array_equal(x, np.concatenate([s[0] for s in shards]))
            np.testing.assert_array_equal(y, np.concatenate([s[1] for s in shards]))
            inputs = both.batch(1, epoch)[0]
            np.testing.assert_array_equal(inputs["image"], x)
            np.testing.assert_array_equal(inputs["row"], x[:, 0, 0, 0])
        # A part without broken files has none to skip, and the same numbers.
        good = np.setdiff1d(np.arange(25), list(source.find_broken()))
        assert not Subset(source, good).take(range(len(good)))[0].any()


def test_a_class_without_any_readable_file_is_an_error(folder):
    break_some(folder)
    for number in (5, 6):
        (folder / "dog" / f"{number}.png").write_bytes(b"")
    with (
        pytest.raises(
            ValueError, match="No sample of class 'dog' can be read"
        ) as caught,
        pytest.warns(UserWarning, match="cannot be read"),
    ):
        PKSampler(skipping(folder), classes_per_batch=5, samples_per_class=2)
    assert str(folder / "dog") in str(caught.value)


def test_embeddings_line_up_with_the_samples_or_there_are_none(folder):
    break_some(folder)
    source = skipping(folder)
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()])
    with pytest.raises(BrokenSamples, match="leaves out those of `find_broken"):
        kerastrip.embed(model, source)
    good = np.setdiff1d(np.arange(25), list(source.find_broken()))
    embeddings = kerastrip.embed(model, Subset(source, good))
    np.testing.assert_array_equal(embeddings[:, 0], good)


# -- the cache in memory, threads and processes --------------------------------


def test_the_memory_reads_each_file_once(folder):
    reads = []

    def read(path):
        reads.append(path)
        return images.read_file(path)

    paths = sorted(folder.glob("*/*.png"))
    source = ImageFiles(paths, size=8, cache="memory", read=read)
    first = source.take(range(25))
    with ThreadPoolExecutor(4) as threads:
        rows = np.random.default_rng(0).integers(0, 25, (40, 16))
        for some, taken in zip(rows, threads.map(source.take, rows), strict=True):
            np.testing.assert_array_equal(taken, first[some])
            taken[:] = 0
    assert sorted(reads) == source.paths


def test_a_spawned_process_reads_the_same(folder):
    source = ImageFolder(folder, size=8, cache="memory")
    rows = [20, 3, 3]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(source.take, (rows,))
    np.testing.assert_array_equal(there, source.take(rows))


def test_the_cache_file_is_read_instead(folder):
    pytest.importorskip("kerastrip.sources.cache")
    path = folder.parent / "cache"
    source = ImageFolder(folder, size=8)
    cached = ImageFolder(folder, size=8, cache=path)
    for name in ("ant", "bee"):  # no longer needed
        (folder / name / "0.png").write_bytes(b"")
    rows = [20, 3, 3]
    np.testing.assert_array_equal(cached.take(rows), source.take(rows))
    assert told(pickle.loads(pickle.dumps(cached)).take([0]), 0) == 0
    with pytest.raises(BrokenSamples):
        source.take([0])
    with pytest.raises(BrokenSamples, match="find_broken"):
        skipping(folder, cache=folder.parent / "other")


# -- subsets -------------------------------------------------------------------


def test_a_subset_has_the_rows_labels_and_errors_of_its_source(folder):
    source = ImageFolder(folder, size=8)
    train, test = kerastrip.split_classes(source.labels, seed=0)
    part = Subset(source, test)
    assert len(part) == len(test)
    np.testing.assert_array_equal(part.labels, source.labels[test])
    np.testing.assert_array_equal(part.take([1, 0])[:, 0, 0, 0], test[[1, 0]])
    mask = np.isin(np.arange(25), train)
    np.testing.assert_array_equal(
        Subset(source, mask).take([0]), source.take(train[:1])
    )
    broken = break_some(folder)
    with pytest.raises(BrokenSamples) as caught:
        Subset(source, [3, 4, 5]).take([2, 1])
    assert list(caught.value.broken) == [1]
    assert broken[1] == 4
    assert Subset(np.eye(3), [1]).labels is None
    for rows, error in (
        ([25], ValueError),
        ([-1], ValueError),
        ([], (TypeError, ValueError)),
        ([0.5], TypeError),
        ([[1]], TypeError),
        ([True], TypeError),
    ):
        with pytest.raises(error, match=r"positions in 0\.\.24"):
            Subset(source, rows)
