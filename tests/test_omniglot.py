"""examples/omniglot.py on archives of made-up drawings, and against a local server."""

import contextlib
import hashlib
import http.server
import re
import threading
import zipfile

import cv2
import keras
import numpy as np
import pytest
from harness import load_example

import kerastrip

SETS = {"small1": {"Latin": 3, "Greek": 2}, "small2": {"Latin": 3, "Runes": 21}}
DRAWERS = 4


@pytest.fixture
def omniglot():
    return load_example("omniglot")


def drawing(seed):
    """A PNG of three strokes, black on white, as large as Omniglot's."""
    image = np.full((105, 105), 255, np.uint8)
    points = np.random.default_rng(seed).integers(10, 95, (4, 1, 2))
    cv2.polylines(image, [points.astype(np.int32)], False, 0, 3)
    return cv2.imencode(".png", image)[1].tobytes()


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.fixture
def data(tmp_path, omniglot, monkeypatch):
    """A folder with both archives; the example takes them for the published ones."""
    known = {}
    for name, sizes in SETS.items():
        file = f"images_background_{name}.zip"
        write_zip(
            tmp_path / file,
            {
                f"{file[:-4]}/{alphabet}/character{number:02}/{number:04}_{drawer:02}"
                ".png": drawing([ord(alphabet[0]), number])
                for alphabet, size in sizes.items()
                for number in range(1, size + 1)
                for drawer in range(1, DRAWERS + 1)
            },
        )
        content = (tmp_path / file).read_bytes()
        known[name] = file, len(content), hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(omniglot, "ARCHIVES", known)
    return tmp_path


# The data -----------------------------------------------------------------------------


def test_drawings_come_with_alphabet_and_character(omniglot, data):
    images, labels = omniglot.load(omniglot.fetch("small2", data))
    assert images.shape == (24 * DRAWERS, omniglot.SIZE, omniglot.SIZE, 1)
    assert labels[0] == "Latin/character01"
    assert set(omniglot.alphabets(labels)) == {"Latin", "Runes"}


def test_turned_drawings_are_classes_of_their_own(omniglot):
    images = np.arange(4 * 32 * 32).reshape(4, 32, 32, 1)
    labels = np.array(["A/a", "A/a", "A/b", "A/b"])
    more, names = omniglot.turned(images, labels, 8)
    assert len(np.unique(names)) == len({image.tobytes() for image in more}) / 2 == 16
    np.testing.assert_array_equal(more[names == "A/b turned 1"][0], np.rot90(images[2]))


def test_place_and_size_of_a_drawing_do_not_matter(omniglot):
    def drawn(left, top, size):
        image = np.full((105, 105, 1), 255, np.uint8)
        cv2.rectangle(image, (left, top), (left + size, top + 2 * size), 0, 3)
        return omniglot.centred(image)

    usual = drawn(30, 20, 30)
    assert usual.shape == (omniglot.SIZE, omniglot.SIZE, 1)
    assert usual.min() < 100
    assert usual.max() == 255
    np.testing.assert_array_equal(drawn(60, 5, 30), usual)
    rows, columns, _ = np.nonzero(drawn(10, 10, 40) < 200)
    assert abs(rows.mean() - omniglot.MIDDLE) < 0.5
    assert abs(columns.mean() - omniglot.MIDDLE) < 0.5
    for size in (25, 40):
        assert np.abs(drawn(10, 10, size).astype(int) - usual).mean() < 12
    dot = drawn(50, 50, 1)
    assert (dot < 200).mean() < 0.02


def test_other_hands_warp_a_drawing(omniglot):
    """Each part of the warp does what it is named after, within its bounds."""
    square = np.full((omniglot.SIZE, omniglot.SIZE, 1), 255, np.uint8)
    middle = omniglot.SIZE // 2
    square[middle - 6 : middle + 6, middle - 6 : middle + 6] = 0

    class Fixed:
        """Draws one of the six numbers, and no bends unless asked."""

        def __init__(self, which=0, value=0.0, bend=0.0):
            self.which, self.value, self.bend = which, value, bend

        def uniform(self, low, high, size):
            return self.value * (np.arange(size) == self.which)

        def normal(self, size):
            return np.full(size, self.bend)

    def ink(rng, strength=1.0):
        return 255.0 - omniglot.redrawn(square, rng, strength)[..., 0]

    def centre(picture):
        grid = np.mgrid[: omniglot.SIZE, : omniglot.SIZE]
        return (grid * picture).sum((1, 2)) / picture.sum()

    same = ink(Fixed())
    np.testing.assert_array_equal(same, 255.0 - square[..., 0])
    for sign in (-1, 1):
        assert ink(Fixed(2, sign)).sum() == pytest.approx(
            same.sum() * (1 + 0.2 * sign) ** 2, rel=0.05
        )
        stretched = ink(Fixed(5, sign))
        assert stretched.sum() == pytest.approx(same.sum(), rel=0.05)
        sides = [stretched.max(axis=axis).sum() for axis in (0, 1)]
        assert sides[1] / sides[0] == pytest.approx(np.exp(0.5 * sign), rel=0.05)
        turned = ink(Fixed(0, sign))
        assert turned.sum() == pytest.approx(same.sum(), rel=0.05)
        assert np.abs(turned - same).sum() > 0.1 * same.sum()
        for which, axis in ((3, 1), (4, 0)):
            moved = centre(same) - centre(ink(Fixed(which, sign)))
            assert moved[axis] == pytest.approx(0.1 * sign * omniglot.SIZE, abs=0.1)
            assert abs(moved[1 - axis]) < 0.1
    half = centre(same) - centre(ink(Fixed(3, 1), strength=0.5))
    assert half[1] == pytest.approx(0.05 * omniglot.SIZE, abs=0.1)
    bent = centre(same) - centre(ink(Fixed(bend=1.0)))
    np.testing.assert_allclose(bent, omniglot.SIZE / 40, atol=0.1)


def test_random_batches_are_of_the_size_of_the_sampler(omniglot):
    rng = np.random.default_rng(0)
    shape = 40, omniglot.SIZE, omniglot.SIZE, 1
    images, labels = rng.integers(0, 256, shape, "uint8"), np.repeat(list("abcde"), 8)
    sampler = kerastrip.PKSampler(
        images, labels, classes_per_batch=3, samples_per_class=4, batches_per_epoch=2
    )
    batches = omniglot.RandomBatches(sampler, images, kerastrip.Augmentation.none())
    assert len(batches) == 2
    seen = []
    for _ in range(2):
        for step in range(2):
            x, (one_hot, codes) = batches[step]
            rows = [int((images == one).all((1, 2, 3)).argmax()) for one in x]
            assert len(set(rows)) == 12
            np.testing.assert_array_equal(codes, sampler.labels[rows])
            np.testing.assert_array_equal(one_hot.argmax(1), codes)
            seen.append(tuple(rows))
        batches.on_epoch_end()
    assert len(set(seen)) == 4


# The download -------------------------------------------------------------------------

FILE = bytes(range(256)) * 1200


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` at any path and keeps the Range headers that it got."""

    content, ranges, cut, asked = FILE, True, None, None

    def do_GET(self):
        first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.asked.append(first)
        if not self.ranges:
            first = 0
        rest = self.content[first:]
        self.send_response(206 if self.ranges else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.cut])

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(**options):
    """The address of a server, and the list of the first bytes asked of it."""
    handler = type("Handler", (Server,), {**options, "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", handler.asked
        server.shutdown()
        thread.join()


@pytest.fixture
def one(omniglot, monkeypatch):
    """The example, knowing one archive of a few bytes."""
    digest = hashlib.sha256(FILE).hexdigest()
    monkeypatch.setattr(omniglot, "ARCHIVES", {"a": ("a.zip", len(FILE), digest)})
    return omniglot


def test_download_once(one, tmp_path):
    folder = tmp_path / "new" / "data"
    with serving() as (address, asked):
        for _ in range(2):
            path = one.fetch("a", folder, address)
            assert path.read_bytes() == FILE
    assert asked == [0]
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_where_it_broke_off(one, tmp_path, ranges):
    with (
        serving(cut=100_000) as (address, _),
        pytest.raises(SystemExit, match=r"ended after 100000 of 307200 .* this again"),
    ):
        one.fetch("a", tmp_path, address)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip.part"]
    with serving(ranges=ranges) as (address, asked):
        assert one.fetch("a", tmp_path, address).read_bytes() == FILE
    assert asked == [100_000]


@pytest.mark.parametrize("content", [FILE[::-1], FILE + b"more"])
def test_download_of_another_file_is_set_aside(one, tmp_path, content):
    with (
        serving(content=content) as (address, _),
        pytest.raises(SystemExit, match=r"not the published .* a\.damaged"),
    ):
        one.fetch("a", tmp_path, address)
    assert [path.name for path in tmp_path.iterdir()] == ["a.damaged"]
    with serving() as (address, asked):
        assert one.fetch("a", tmp_path, address).read_bytes() == FILE
    assert asked == [0]


def test_download_without_a_server(one, tmp_path):
    with serving() as (address, _):
        pass
    with pytest.raises(SystemExit, match=r"a\.zip could not be .* refused.* yourself"):
        one.fetch("a", tmp_path, address)


# The judging --------------------------------------------------------------------------


def labels_of(sizes, drawers=DRAWERS):
    return np.array(
        [
            f"{alphabet}/{number}"
            for alphabet, size in sizes.items()
            for number in range(size)
            for _ in range(drawers)
        ]
    )


def test_episodes_pair_two_drawers_of_twenty_characters_of_one_alphabet(omniglot):
    labels = labels_of({"Small": 19, "Just": 20, "Large": 30})
    rows = np.arange(len(labels))  # as if they were the drawings
    seen = set()
    for first, second in omniglot.episodes(rows, labels, 200, seed=0):
        characters = labels[first]
        assert len(np.unique(characters)) == len(first) == 20
        assert len(np.unique(omniglot.alphabets(characters))) == 1
        np.testing.assert_array_equal(labels[second], characters)
        drawers = np.unique(first % DRAWERS), np.unique(second % DRAWERS)
        assert [len(drawer) for drawer in drawers] == [1, 1]
        assert drawers[0] != drawers[1]
        seen.add((characters[0].split("/")[0], int(drawers[0][0])))
    assert seen == {(name, n) for name in ("Just", "Large") for n in range(DRAWERS)}


def test_episodes_are_those_of_their_seed(omniglot):
    labels = labels_of({"Large": 30})

    def drawn(seed):
        return np.array(
            list(omniglot.episodes(np.arange(len(labels)), labels, 5, seed))
        )

    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert (drawn(0) != drawn(1)).any()


def one_view(drawings):
    """As if the numbers of a drawing were its embedding, and it had one view."""
    return drawings.reshape(len(drawings), 1, -1).astype(float)


@pytest.mark.parametrize(("right", "expected"), [(1.0, 0.0), (0.0, 0.95), (0.5, None)])
def test_validation_error_of_embeddings_that_know_so_much(omniglot, right, expected):
    """Of a share of the characters the embedding is right, of the others random."""
    labels = labels_of({"Large": 30}, drawers=20)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(len(labels), 16))
    known = rng.permutation(30)[: int(30 * right)]
    for number in known:
        rows[labels == f"Large/{number}"] = 100 * rng.normal(size=16)
    error, half = omniglot.validation_error(one_view, rows, labels, 400, seed=0)
    if expected is None:  # between 10 random of 20, each wrong 9 times of 10, ...
        assert 0.4 < error < 0.5
        assert 0 < half < 0.02
    else:
        assert abs(error - expected) <= half
        assert half < 0.01


def test_settled_model_tells_apart_what_it_did_not_learn(omniglot):
    """Drawings of a character differ, much, in one number, characters in the others."""

    def drawings(seed):
        rng = np.random.default_rng(seed)
        labels = np.repeat(np.arange(20), 6)
        rows = rng.uniform(1, 1.1, (20, 300))[labels]
        rows[:, 0] = rng.uniform(0, 5, len(labels))
        return rows.astype("float32"), labels

    def error(model):
        rows = kerastrip.embed(model, drawings(1)[0], output=0)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-4)
        first, *others = (rows[n::6, None] for n in range(3))
        return np.mean([omniglot.one_shot_error(first, other) for other in others])

    inputs = keras.Input((300,))
    unit = keras.layers.UnitNormalization(name="embedding")
    model = keras.Model(inputs, unit(inputs))
    settled = omniglot.settled(model, *drawings(0), views=1, aug=None)
    assert error(settled) < error(model) / 2


def test_views_that_agree_decide(omniglot):
    """Of four views of a drawing one is that of its character; the mean tells less."""
    rng = np.random.default_rng(0)
    trained, tested = rng.normal(size=(2, 50, 4, 64))
    trained[:, 1] = tested[:, 3] = rng.normal(size=(50, 64))
    assert omniglot.one_shot_error(trained, tested) == 0
    means = (rows.mean(axis=1, keepdims=True) for rows in (trained, tested))
    assert omniglot.one_shot_error(*means) > 0.3
    assert omniglot.one_shot_error(trained, tested[:, :3]) > 0.8


def test_views_of_drawings_are_embedded_one_by_one(omniglot):
    drawings = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 1), "uint8")
    inputs = keras.Input((48, 48, 1))
    model = keras.Model(inputs, keras.layers.Flatten()(inputs))
    aug = omniglot.augmentation(1, seed=0)
    rows = omniglot.views_of(model, drawings, 4, aug)
    expected = kerastrip.embed(model, aug.batch(drawings, 0, views=4)[2])
    np.testing.assert_array_equal(rows[2], expected)
    assert len(np.unique(rows.reshape(12, -1), axis=0)) == 12


def official_archive(path, runs, top="", wrong=0):
    """Runs whose items are the drawings of their classes, but for the `wrong` first."""
    members = {}
    for run in range(1, runs + 1):
        order = np.random.default_rng(run).permutation(20) + 1
        lines = []
        for item in range(1, 21):
            of = order[item - 1]
            names = (
                f"run{run:02}/test/item{item:02}.png",
                (f"run{run:02}/training/class{of:02}.png"),
            )
            lines.append(" ".join(names))
            members[top + names[1]] = drawing([run, of])
            shown = order[(item + (item <= wrong)) % 20 - 1]
            members[top + names[0]] = drawing([run, shown])
        members[f"{top}run{run:02}/class_labels.txt"] = "\n".join(lines) + "\n"
        members[f"__MACOSX/{top}run{run:02}/._class_labels.txt"] = "x"
    write_zip(path, members)


@pytest.mark.parametrize(("runs", "top"), [(2, ""), (2, "all_runs/"), (1, "")])
def test_official_runs_are_read_wherever_the_archive_has_them(
    omniglot, tmp_path, runs, top
):
    official_archive(tmp_path / "all_runs.zip", runs, top)
    pairs = list(omniglot.official_runs(tmp_path / "all_runs.zip"))
    assert len(pairs) == runs
    for trained, tested in pairs:
        assert trained.shape == (20, omniglot.SIZE, omniglot.SIZE, 1)
        np.testing.assert_array_equal(trained, tested)


@pytest.mark.parametrize("wrong", [0, 3])
def test_official_error_is_the_share_of_wrong_matches(omniglot, tmp_path, wrong):
    official_archive(tmp_path / "all_runs.zip", 2, wrong=wrong)
    error = omniglot.official_error(one_view, tmp_path / "all_runs.zip")
    assert error == pytest.approx(wrong / 20)


def test_official_runs_that_are_none(omniglot, data):
    path = data / "images_background_small1.zip"
    with pytest.raises(SystemExit, match=r"small1\.zip holds no runNN/class_labels"):
        list(omniglot.official_runs(path))
    write_zip(
        data / "few.zip",
        {
            "run01/test/item01.png": drawing(0),
            "run01/training/class01.png": drawing(0),
            "run01/class_labels.txt": "run01/test/item01.png run01/training/class02.png",
        },
    )
    with pytest.raises(SystemExit, match=r"lacks run01/training/class02\.png"):
        list(omniglot.official_runs(data / "few.zip"))


# The whole ----------------------------------------------------------------------------


@pytest.mark.slow
def test_omniglot_from_archives_to_report(omniglot, data, capsys, monkeypatch):
    monkeypatch.setattr(omniglot, "BATCHES", 2)
    official_archive(data / "all_runs.zip", 1)
    options = {
        "data": data,
        "out": data / "out",
        "runs": data / "all_runs.zip",
        "epochs": 1,
        "episodes": 5,
        "classes-per-batch": 8,
        "samples-per-class": 2,
        "width": 8,
        "views": 2,
    }
    omniglot.main([f"--{name}={value}" for name, value in options.items()])
    shown = capsys.readouterr().out
    assert "views  1: validation error 0.0% +- 0.0%" in shown  # drawings are the same
    errors = re.search(
        r"^validation error: (\S+) %\nofficial error: (\S+) %\n\Z", shown, re.MULTILINE
    )
    assert max(map(float, errors.groups())) < 50  # of views; 95 by chance
    model = keras.models.load_model(data / "out" / "model.keras")
    drawings = np.zeros((2, omniglot.SIZE, omniglot.SIZE, 1), "uint8")
    rows = kerastrip.embed(model, drawings)
    assert rows.shape == (2, omniglot.FEW)
    assert "<h1>Omniglot</h1>" in (data / "out" / "report.html").read_text()
    assert len((data / "out" / "history.csv").read_text().splitlines()) == 2
