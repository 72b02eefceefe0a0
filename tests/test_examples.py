"""The examples run, from data to files."""

import csv
import json
import shutil

import cv2
import keras
import numpy as np
import pytest
from harness import load_example

import kerastrip
from kerastrip.callbacks._averages import lags
from kerastrip.evaluation.recalibration import compare_modes


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    load_example("digits").main(["--out", str(out), "--epochs", "2"])
    return out


def test_digits_trains_and_writes_its_files(digits):
    with open(digits / "figures.csv", newline="") as file:
        figures = {
            (row["embedding"], row["digits"]): float(row["map@r"])
            for row in csv.DictReader(file)
        }
    assert figures["trained", "seen"] > figures["untrained", "seen"] + 0.05
    assert figures["trained", "seen"] > figures["raw pixels", "seen"]
    assert {part for _, part in figures} == {"seen", "unseen"}
    for picture in ("mining.png", "embedding.png"):
        assert (digits / picture).read_bytes().startswith(b"\x89PNG")


def test_digits_logs_the_mining(digits):
    with open(digits / "history.csv", newline="") as file:
        epochs = list(csv.DictReader(file))
    assert len(epochs) == 2
    for prefix in ("", "val_"):
        for epoch in epochs:
            fractions = [
                float(epoch[prefix + key]) for key in ("easy", "semi_hard", "hard")
            ]
            np.testing.assert_allclose(sum(fractions), 1, atol=1e-5)
    assert float(epochs[1]["hard"]) < float(epochs[0]["hard"])
    assert float(epochs[1]["val_recall@1"]) > 0.5  # by chance it is below 0.2


def test_digits_can_be_used_from_disk(digits):
    model = keras.models.load_model(digits / "model.keras")
    augmentation = kerastrip.Augmentation.load(digits / "augmentation.json")
    images, _ = load_example("digits").load()
    views = kerastrip.embed(model, images[:5], augmentation=augmentation, views=2)
    np.testing.assert_allclose(np.linalg.norm(views, axis=1), 1, rtol=1e-5)


def test_digits_composes_classes_of_their_own():
    example = load_example("digits")
    images, names = example.load()
    seen = ~np.isin(names, [str(digit) for digit in example.UNSEEN])
    images, names = images[seen], names[seen]
    more, more_names = example.with_composed(images, names, seed=0)
    assert len(np.unique(more_names)) == 7 + 2 * 7 * 6
    np.testing.assert_array_equal(more[: len(images)], images)
    upper = {image[:4].tobytes() for image in images[names == "3"]}
    lower = {image[4:].tobytes() for image in images[names == "5"]}
    for image in more[more_names == "3 over 5"]:
        assert image[:4].tobytes() in upper
        assert image[4:].tobytes() in lower


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.slow
def test_image_folder_learns_from_any_folder_of_class_folders(tmp_path, capsys):
    images, names = load_example("digits").load()
    for row, (image, name) in enumerate(zip(images[:300], names[:300], strict=True)):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{row:03}.png"), image)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder.parent / "alone").mkdir()  # a class too small to be drawn
    cv2.imwrite(str(folder.parent / "alone" / "one.png"), images[0])
    photos, out = str(tmp_path / "photos"), tmp_path / "out"
    options = [
        "--size",
        "16",
        "--color",
        "gray",
        "--epochs",
        "10",
    ]
    figures = load_example("image_folder").main([photos, "--out", str(out), *options])
    assert "broken.png" in capsys.readouterr().out
    assert figures["trained"]["map@r"] > figures["untrained"]["map@r"] + 0.1
    with open(out / "history.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 10
    model = keras.models.load_model(out / "model.keras")
    augmentation = kerastrip.Augmentation.load(out / "augmentation.json")
    assert model.output_shape == [(None, 9), (None, 64)]
    # The embedding that was saved is the one that was trained, though steps were few.
    source = kerastrip.sources.ImageFolder(photos, size=16, color="gray")
    rows = source.take(np.arange(150))
    codes = np.unique(source.labels[:150], return_inverse=True)[1]
    assert not lags(*compare_modes(model, rows, codes, output=1))
    assert augmentation(np.zeros((16, 16, 1), "uint8"), 0).shape == (16, 16, 1)


def test_image_folder_runs_on_four_classes_and_not_on_three(tmp_path):
    for row in range(16):
        folder = tmp_path / "photos" / f"{row % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(row).integers(0, 256, (16, 16), "uint8")
        cv2.imwrite(str(folder / f"{row:03}.png"), image)
    options = ["--out", str(tmp_path), "--size", "16", "--epochs", "1"]
    example = load_example("image_folder")
    figures = example.main([str(tmp_path / "photos"), *options])
    assert {"untrained", "trained"} < set(figures)
    model = keras.models.load_model(tmp_path / "model.keras")
    assert model.output_shape[0] == (None, 2)  # the other two are held out
    shutil.rmtree(folder)
    with pytest.raises(SystemExit, match=r"photos has 3 classes.*at least four"):
        example.main([str(tmp_path / "photos"), *options])


@pytest.fixture
def seen_by_cameras(tmp_path):
    """`table.csv` of ten identities, three cameras and two or three photographs each.

    An identity is a pattern. A camera has a tint, a brightness and a noise of its own.
    """
    rng = np.random.default_rng(0)
    lines = ["path,identity,camera"]
    for identity in range(10):
        pattern = rng.integers(0, 2, (4, 4, 1)).repeat(4, 0).repeat(4, 1)
        for camera, tint in enumerate(np.array([(9, 9, 9), (5, 7, 9), (9, 7, 5)])):
            for photograph in range(2 + (identity + camera) % 2):
                image = (40 + 20 * pattern * tint) + rng.normal(0, 9, (16, 16, 3))
                name = f"{identity}-{camera}-{photograph}.png"
                cv2.imwrite(str(tmp_path / name), image.clip(0, 255).astype("uint8"))
                lines.append(f"{name},id {identity},camera {camera}")
    table = tmp_path / "table.csv"
    table.write_text("\n".join(lines))
    return table


def test_reidentification_finds_identities_across_cameras(seen_by_cameras, capsys):
    example, out = load_example("reidentification"), seen_by_cameras.parent / "out"
    options = {"test": 0.4, "epochs": 3, "classes-per-batch": 6}
    options = [f"--{name}={value}" for name, value in options.items()]
    figures = example.main(
        [str(seen_by_cameras), "--out", str(out), "--size", "16", "16", *options]
    )
    printed = capsys.readouterr().out
    for name in ("by distance", "re-ranked"):
        found = figures[name]
        assert f"{name}  map {found['map']:.3f}" in printed
        assert all(0 <= found[metric] <= 1 for metric in example.METRICS)
        # Four identities, each in three cameras; by chance every fourth is right.
        counts = ("queries", "lone_queries", "lone_across_groups")
        assert [found[count] for count in counts] == [12, 0, 0]
        assert found["map"] > 0.5
    assert (out / "neighbours.png").read_bytes().startswith(b"\x89PNG")
    model = keras.models.load_model(out / "model.keras")
    assert model.output_shape == [(None, 6), (None, 128)]
    rule = json.loads((out / "reading.json").read_text())
    image = kerastrip.sources.read_image(seen_by_cameras.parent / "0-0-0.png", **rule)
    assert image.shape == (16, 16, 3)


def test_reidentification_names_what_a_table_lacks(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("path,identity\na.png,7\n")
    with pytest.raises(SystemExit, match="path, identity, camera"):
        load_example("reidentification").main([str(table), "--out", str(tmp_path)])


def test_reidentification_asks_for_what_another_row_of_the_camera_answers():
    split = load_example("reidentification").split_queries
    identities = np.array(list("aaaabbbb"))
    cameras = np.array(list("11221112"))
    queries, gallery = split(np.array([0, 1, 2, 4, 5, 6, 7]), identities, cameras)
    # Row 3 is not held out, so rows 2 and 7 are alone in their cameras.
    assert queries.tolist() == [0, 4]
    assert gallery.tolist() == [1, 2, 5, 6, 7]


def rows_of_table(text):
    """{first cell: other cells} of Markdown tables."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line]
    return {first: rest for first, *rest in rows}


def test_scale_shows_that_hosts_share_nothing(capsys):
    example = load_example("benchmarks/scale")
    example.main(
        [
            "--samples",
            "20000",
            "--classes",
            "500",
            "--hosts",
            "4",
            "--classes-per-host",
            "8",
        ]
    )
    rows = rows_of_table(capsys.readouterr().out)
    assert rows["steps with a shared row"] == ["0", "0"]
    assert rows["steps with a shared class"] == ["0", "0"]
    assert rows["seen"][1] == "100.00%"
    least, most = map(int, rows["draws of a class"][0].split(" to "))
    assert most - least <= 1


def test_scale_sees_what_is_shared():
    hosts = np.array([[[1, 2], [3, 3]], [[2, 4], [5, 6]]])
    assert load_example("benchmarks/scale").shared(hosts) == 1


def test_spread_learns_from_one_style_and_two_rows_of_others():
    example = load_example("benchmarks/spread")
    labels = np.repeat([3, 5, 7], 10)
    styles = np.tile(list("aaaaabbbcc"), 3)
    rows = example.skewed(np.arange(30)[::-1], labels, styles, fewest=3)
    for label in (3, 5, 7):
        _, counts = np.unique(styles[rows[labels[rows] == label]], return_counts=True)
        assert counts.max() in (3, 5)  # all of "a" or all of "b"
        assert counts.sum() == counts.max() + 2


def test_spread_counts_the_cameras_of_a_batch():
    example = load_example("benchmarks/spread")
    labels, cameras = np.repeat([0, 1], 4), np.tile(list("xxyz"), 2)
    options = {"classes_per_batch": 2, "samples_per_class": 3}
    assert example.cameras_met(labels, cameras, **options, spread=cameras) == 3
    # Without `spread` a draw misses y or z in two of four cases.
    assert example.cameras_met(labels, cameras, **options) == pytest.approx(
        2.5, abs=0.2
    )


def test_gpu_runs_on_the_processor(capsys, monkeypatch):
    example = load_example("benchmarks/gpu")
    monkeypatch.setattr(example, "accelerator", lambda: None)
    example.main([])
    assert capsys.readouterr().out.startswith("no accelerator")
    options = "--cpu --sizes 8 --seconds 0 --models dense --jit off"
    example.main(options.split())
    line = capsys.readouterr().out.splitlines()[-1]
    name, *of, plain, triplet, census, _, _ = line.strip("| ").split(" | ")
    assert (name, of) == ("dense", ["off", "8"])
    assert min(float(plain), float(triplet), float(census)) > 0


def test_gpu_goes_on_where_memory_is_short():
    race = load_example("benchmarks/gpu").race

    def fail(words):
        raise RuntimeError(words)

    best = race({"large": lambda: fail("OOM when allocating"), "small": int}, 0)
    assert np.isnan(best["large"])
    assert best["small"] >= 0
    with pytest.raises(RuntimeError, match="shape"):
        race({"wrong": lambda: fail("shape")}, 0)


def style(rng, quote, indent, comment):
    """A file of code in one of the ways to write it."""
    lines = []
    for _ in range(60):
        one, two = (
            "".join(rng.choice(list("abcdefgh"), rng.integers(2, 6))) for _ in range(2)
        )
        lines += [
            f"def {one}({two}):",
            f"{indent}{comment} {one} {two}",
            f"{indent}return {quote}{two}{quote}",
        ]
    return "import os\n" + "\n".join(lines)


@pytest.mark.slow
def test_code_authorship_hears_style_and_no_words(tmp_path):
    example = load_example("code_authorship")
    text = (
        "# Licence\n\nimport os\nfrom a import (\n    b,\n)\n# Own\nif getItem2(x_1):\n"
    )
    assert example.blotted(text) == "# Xx\nif xXx(x_1):\n"
    rng = np.random.default_rng(0)
    ways = [(q, i, c) for q in "'\"" for i in ("  ", "    ", "\t") for c in ("#", "##")]
    for number, way in enumerate(ways * 2):
        folder = tmp_path / "packages" / f"p{number:02}"
        folder.mkdir(parents=True)
        for file in range(example.FEWEST if number < len(ways) else 4):
            (folder / f"m{file}.py").write_text(style(rng, *way))
    (tmp_path / "more").mkdir()
    options = {
        "packages": tmp_path / "packages",
        "more": tmp_path / "more",
        "out": tmp_path / "out",
        "epochs": 1,
        "classes-per-batch": 8,
        "batches-per-epoch": 4,
        "width": 8,
    }
    figures = example.main([f"--{name}={value}" for name, value in options.items()])
    assert all(figures[row]["AUC"] > 0.8 for row in figures)
    assert "<h1>Code authorship</h1>" in (tmp_path / "out/report.html").read_text()
    assert keras.models.load_model(tmp_path / "out/model.keras").count_params() > 0


@pytest.mark.slow
def test_code_authorship_beats_trigrams(tmp_path):
    figures = load_example("code_authorship").main(["--out", str(tmp_path)])
    for part in ("one window", "whole file"):
        trigrams, network = (figures[part, by] for by in ("trigrams", "network"))
        assert network["AUC"] > trigrams["AUC"] + 0.08
        assert network["EER"] < trigrams["EER"] - 0.06
        assert network["MAP@R"] > trigrams["MAP@R"] + 0.02
        assert network["recall@1"] > trigrams["recall@1"] - 0.01  # some files' noise
