"""Image files: pixels, labels, and what happens where a file is broken."""

import errno
import io
import json
import multiprocessing
import os
import pickle
import struct
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import keras
import numpy as np
import pytest

import kerastrip
from kerastrip.sampling.plan import PKPlan
from kerastrip.sampling.sampler import PKSampler
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
    full = cv2.resize(decoding.decode_image(jpeg, None), (75, 75), None, 0, 0, 3)
    full, reduced = full.astype(int), decoded(jpeg, 75).astype(int)
    assert 0 < np.abs(full - reduced).max() < 12
    assert np.abs(full - reduced).mean() < 1
    for end in range(700):  # a header that is cut anywhere
        _headers.read_header(jpeg[:end])


FORMATS = [".bmp", ".gif", ".jpg", ".pgm", ".png", ".ppm", ".ras", ".tif", ".webp"]
FORMATS += [ending for ending in (".avif", ".jp2") if cv2.haveImageWriter(ending)]


@pytest.mark.parametrize("ending", FORMATS)
def test_the_size_stands_in_the_header_of_every_format(rng, ending):
    image = smooth(rng, 64, 72)
    data = encoded(image[..., 0] if ending == ".pgm" else image, ending)
    header = _headers.read_header(data)
    assert (header.height, header.width) == (64, 72)
    assert decoding.decode_image(data, None).shape == (64, 72, 3)
    with pytest.raises(ValueError, match=r"64 x 72 pixels are more than max_pixels=99"):
        decoding.decode_image(data, None, max_pixels=99)


def test_files_of_12_bits_come_out_black_from_no_format(rng):
    deep = rng.integers(0, 4096, (8, 8), dtype="uint16")
    deep[0, 0] = 4095
    for ending in (".png", ".tif"):
        data = encoded(deep, ending)
        with pytest.raises(BrokenSamples, match="4095 of 65535, so it would come out"):
            decoded(data, 8)
        with pytest.raises(BrokenSamples, match="more than bits=10 bits"):
            decoded(data, 8, bits=10)
        gray = decoded(data, 8, bits=12, color="gray")[..., 0]
        np.testing.assert_array_equal(gray, deep >> 4)
        gray = decoded(data, 8, bits=16, color="gray")[..., 0]
        np.testing.assert_array_equal(gray, deep >> 8)
        assert not decoded(encoded(deep * 0, ending), 8).any()
    # A PGM file says what is white.
    for white, kind in ((4095, ">u2"), (15, "u1")):
        level = np.minimum(deep[:, :8], white)
        data = b"P5 # gray\n8 8\n%d\n" % white + level.astype(kind).tobytes()
        gray = decoded(data, 8, color="gray")[..., 0]
        np.testing.assert_allclose(gray, level / white * 255, atol=0.51)


@pytest.mark.parametrize("ending", [".png", ".webp"])
def test_a_picture_that_is_in_the_alpha_channel_alone_is_a_drawing(ending):
    drawing = np.zeros((12, 10, 4), "uint8")
    drawing[3:7, 2:8, 3] = 255
    options = (cv2.IMWRITE_WEBP_QUALITY, 101) if ending == ".webp" else ()
    for ink, paper in ((0, 255), (250, 0)):
        drawing[..., :3] = ink
        for color in ("rgb", "gray"):
            image = decoded(encoded(drawing, ending, *options), (12, 10), color=color)
            expected = np.where(drawing[..., 3:], ink, paper)
            np.testing.assert_array_equal(image, np.broadcast_to(expected, image.shape))
    drawing[..., 3] = 7  # no picture in either
    assert (decoded(encoded(drawing, ending, *options), 8) == 250).all()


def test_palettes_are_colours(rng):
    pil = pytest.importorskip("PIL.Image")
    image = pil.fromarray(rng.integers(0, 256, (9, 7, 3), "uint8")).quantize(8)
    for kind in ("png", "gif", "bmp", "tiff"):
        decoded_ = decoding.decode_image(saved(image, kind), None)
        np.testing.assert_array_equal(decoded_, np.asarray(image.convert("RGB")))


def saved(image, kind):
    """A picture of Pillow as the bytes of a file."""
    with io.BytesIO() as file:
        image.save(file, kind)
        return file.getvalue()


def test_a_jpeg_that_was_cut_or_whose_header_lies_is_broken(rng):
    jpeg = with_orientation(encoded(smooth(rng, 90, 60), ".jpg"), 1)
    for end in (-1, -2, -100, len(jpeg) // 2):
        # Known without OpenCV, which before 4.11 put another image in what is missing.
        assert _headers.read_header(jpeg[:end]).least > end
        with pytest.raises(BrokenSamples, match="cut short"):
            decoded(jpeg[:end], 8)
        with pytest.raises(BrokenSamples, match="cut short"):
            decoded(jpeg[:end] + bytes(1000), 8)  # an unfinished download
    decoded(jpeg + b"what cameras put behind the end", 8)
    lie = bytearray(jpeg)
    at = jpeg.index(b"\xff\xc0") + 5
    lie[at : at + 4] = struct.pack(">HH", 5000, 5000)
    with pytest.raises(BrokenSamples, match="5,000 x 5,000 pixels in"):
        decoded(bytes(lie), 8)
    lie[at : at + 4] = struct.pack(">HH", 60000, 60000)
    with pytest.raises(BrokenSamples, match="more than max_pixels=200,000,000"):
        decoded(bytes(lie), 8)


def test_a_huge_picture_in_a_small_file_is_not_decoded(tmp_path):
    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    side = 30_000
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(side * (side // 8 + 1)), 1)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    png += chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(png)
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(10 << 30)
    begin = time.thread_time()
    for name, why in (("bomb", "30,000 x 30,000 pixels"), ("large", "10,737,418,240")):
        source = ImageFiles([tmp_path / f"{name}.png"], size=8)
        with pytest.raises(BrokenSamples, match=rf"{name}.png': its {why}.*max_pixels"):
            source.take([0])
    assert time.thread_time() - begin < 0.2


@pytest.mark.parametrize("ending", FORMATS)
def test_flipped_bits_give_an_image_or_a_value_error(ending):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), "uint8")
    data = encoded(image[..., 0] if ending == ".pgm" else image, ending)
    whole = np.frombuffer(data, "u1")
    for _ in range(60):
        data = whole.copy()
        at = rng.integers(0, min(len(data), rng.choice([64, 4096])), 3)
        data[at] ^= rng.integers(1, 256, 3).astype("u1")
        data = data[: rng.integers(0, len(data)) if rng.random() < 0.2 else None]
        try:
            image = decoding.decode_image(data.tobytes(), (8, 8), max_pixels=10**6)
        except ValueError:
            continue
        assert image.shape == (8, 8, 3)


def test_one_new_image_is_read_as_those_of_the_training(folder, rng):
    path = folder / "photo.jpg"
    path.write_bytes(with_orientation(encoded(smooth(rng, 300, 200), ".jpg"), 6))
    for options in (
        {"size": (30, 20)},
        {"size": 25, "color": "gray"},
        {"size": 8, "bits": 12},
    ):
        source = ImageFiles([path], **options)
        reading = json.loads(json.dumps(source.reading))
        for image in (path, str(path), path.read_bytes()):
            np.testing.assert_array_equal(
                read_image(image, **reading), source.take([0])[0]
            )
        again = ImageFiles([path], **reading)
        np.testing.assert_array_equal(again.take([0]), source.take([0]))
    never = {"reduce": "never"}
    for wrong in (
        never,
        {"resize": "crop"},
        {"turn": "none"},
        {"color": "grey"},
        {"bits": 8},
    ):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
            read_image(path, **{**reading, **wrong})
    with pytest.raises(FileNotFoundError):
        read_image(folder / "nowhere.jpg", **reading)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"photo\.jpg.*cut short"):
        read_image(path, **reading)


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


def test_what_is_left_out_by_its_ending_is_told_once(tmp_path):
    image = np.zeros((64, 64, 3), "uint8")
    files = {
        "cat/1.png": ".png",
        "dog/1.jfif": ".jpg",
        "dog/2.JPE": ".jpg",
        "fox/1.gif": ".gif",
        "owl/1.webp": ".webp",
    }
    files |= {f"ape/1{kind}": kind for kind in (".avif", ".jp2") if kind in FORMATS}
    for name, ending in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(image, ending))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "README").write_text("no image")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = ImageFolder(tmp_path, size=8)
    assert len(source) == len(files)
    assert not source.find_broken()
    for name in ("cat/2.heic", "eel/1.heic", "eel/2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match="Left out") as caught:
        source = ImageFolder(tmp_path, size=8)
    (warning,) = caught
    text = str(warning.message)
    assert "3 files by their ending (2 .heic, 1 without ending)" in text
    assert "the whole of 'eel' among them" in text
    assert warning.filename == __file__
    assert len(source) == len(files)


def test_links_and_pipes_give_every_real_file_once(tmp_path):
    root, other = tmp_path / "photos", tmp_path / "other"
    for name in (
        "photos/cat/1.png",
        "photos/dog/1.png",
        "other/2.png",
        "other/.s/3.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(np.zeros((9, 9))))
    for name, target in (
        ("cow", other),  # a class of its own
        ("dog/3.png", other / ".s" / "3.png"),
        ("dog/gone.png", "nowhere.png"),  # a row, broken when it is read
    ):
        (root / name).symlink_to(target)
    expected = ["cat/1.png", "cow/2.png", "dog/1.png", "dog/3.png", "dog/gone.png"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = ImageFolder(root, size=8)
    assert source.paths == [str(root / name) for name in expected]
    for name, target in (
        ("cat/up", ".."),
        ("dog/up", "../.."),
        ("dog/all", "/"),
        ("cat/dog", "../dog"),
        ("cat/x.png", "../dog/1.png"),
        ("dog/2.png", "../cow/2.png"),
        ("cat/ring.png", "ring.png"),
    ):
        (root / name).symlink_to(target)
    os.mkfifo(root / "cat" / "pipe.png")
    with pytest.warns(
        UserWarning, match=r"pipes or devices \('cat/pipe.png'\)"
    ) as caught:
        source = ImageFolder(root, size=8, on_error="skip")
    assert "links that lead to what is there already" in str(caught[0].message)
    expected.insert(1, "cat/ring.png")
    assert source.paths == [str(root / name) for name in expected]
    assert source.labels.tolist() == ["cat", "cat", "cow", "dog", "dog", "dog"]
    assert [*source.find_broken()] == [1, 5]
    pipe = ImageFiles([root / "cat" / "pipe.png"], size=8, on_error="skip")
    assert "pipe or device" in pipe.find_broken()[0]


def test_labels_that_are_missing_are_no_class(folder):
    paths = sorted(folder.glob("*/*.png"))
    labels = ["cat"] * 20 + [float("nan")] * 2 + ["dog"] * 3
    with pytest.raises(ValueError, match=r"`labels`: .* received NaN at position 20"):
        ImageFiles(paths, labels, size=8)
    table = {str(path.relative_to(folder)): 0 for path in paths[:20]}
    with pytest.raises(ValueError, match=r"`label_from`: .* NaN at position 20"):
        ImageFolder(folder, size=8, label_from=lambda p: table.get(p, float("nan")))
    with pytest.raises(TypeError, match="labels of one kind"):
        ImageFiles(paths, [1] * 20 + ["x"] * 5, size=8)


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
        ({"size": 8, "reduce": "never"}, "reduce"),
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


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "Permission denied"),
        ConnectionResetError("the network"),
        MemoryError(),
    ],
    ids=repr,
)
def test_an_error_of_the_system_breaks_no_image(folder, monkeypatch, error):
    def fails(*_):
        raise error

    source = skipping(folder)
    other = ImageFiles(source.paths, size=8, on_error="skip", read=fails)
    monkeypatch.setattr(decoding.os, "open", fails)
    for images_ in (source, other):
        with pytest.raises(type(error)):
            images_.take([0])
        with pytest.raises(type(error)):
            images_.find_broken()
    monkeypatch.undo()
    assert not source.find_broken()


def test_a_decoder_without_memory_breaks_no_image(folder, monkeypatch):
    source = skipping(folder)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    assert "damaged" in source.find_broken()[0]
    empty = np.empty

    def short(shape, *args):
        if np.prod(shape) == 12 * 10 * 8:  # what the picture may take
            raise MemoryError
        return empty(shape, *args)

    monkeypatch.setattr(decoding.np, "empty", short)
    with pytest.raises(MemoryError):
        source.take([0])


def test_what_a_function_of_the_user_says_of_an_image_counts(folder):
    for error in (
        FileNotFoundError(),
        OSError("no such key"),
        ValueError("no such key"),
    ):

        def read(path, error=error):
            raise error

        source = ImageFiles(["key"], size=8, on_error="skip", read=read)
        assert "'key'" in source.find_broken()[0]


def test_threads_take_turns_in_a_function_of_the_user(folder):
    busy, met = threading.Lock(), []

    def read(path):
        met.append(busy.acquire(blocking=False))
        time.sleep(0.001)
        busy.release()
        return images.read_file(path)

    source = ImageFiles(sorted(folder.glob("*/*.png")), size=8, read=read)
    assert not source.find_broken()  # with a thread for each core
    assert all(met)


def test_a_file_that_changes_has_another_stamp(folder):
    source = ImageFolder(folder, size=8)
    stamps = source.stamps()
    assert stamps.shape == (25, 2)
    np.testing.assert_array_equal(source.stamps(), stamps)
    os.utime(source.paths[2], ns=(0, 12345))
    os.unlink(source.paths[4])
    with open(source.paths[7], "ab") as file:
        file.write(b"x")
    changed = source.stamps()
    assert np.flatnonzero((changed != stamps).any(axis=1)).tolist() == [2, 4, 7]
    assert changed[2, 1] == 12345
    assert changed[4].tolist() == [-1, -1]
    assert ImageFiles(["x"], size=8, read=bytes).stamps() is None


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
    ours = os.path.dirname(kerastrip.__file__)
    assert not any(warning.filename.startswith(ours) for warning in caught)
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
    with pytest.raises(BrokenSamples, match="leave out the samples that `find_broken"):
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


def test_decode_image_is_still_found_where_it_was():
    assert (
        kerastrip.sources.images.decode_image is kerastrip.sources.decoding.decode_image
    )
