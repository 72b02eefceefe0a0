"""TrainingReport: one whole, safe, self-contained page, and it tells the truth."""

import base64
import copy
import html.parser
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import warnings
from html import escape

import cv2
import keras
import numpy as np
import pytest
from harness import tiny_model

from kerastrip import plotting, sources
from kerastrip.callbacks import CollapseGuard, TrainingReport
from kerastrip.callbacks.collapse import Alarm
from kerastrip.callbacks.report import sections
from kerastrip.evaluation.embedding import embed
from kerastrip.evaluation.retrieval import retrieval_metrics
from kerastrip.evaluation.search import search
from kerastrip.evaluation.verification import verification_curve, verification_metrics
from kerastrip.losses import TripletLoss
from kerastrip.plotting.thumbnails import thumbnails_of

NASTY = "<script>alert('x')</script>&\" $\\frac$"
VOID = {"meta", "link", "img", "br", "wbr", "path"}
LOGS = [
    {
        "loss": 1.0 / n,
        "easy": 1 - 0.6 / n,
        "semi_hard": 0.4 / n,
        "hard": 0.2 / n,
        "val_loss": 2.0 / n,
        "a_nasty_<key>": 12345.0,
    }
    for n in (1, 2, 4)
]
LOSSES = [{"loss": one["loss"]} for one in LOGS]  # no charts of the mining


@pytest.fixture(scope="module")
def model():
    loss = TripletLoss(margin=0.25, distance="cosine")
    return tiny_model((5, 7), 3, unit_length=False, loss=loss)


@pytest.fixture
def data(rng):
    y = np.arange(24) % 4
    centres = rng.normal(size=(4, 5, 7))
    x = np.clip(128 + 20 * centres[y] + 30 * rng.normal(size=(24, 5, 7)), 0, 255)
    return x.astype("uint8"), y


def run(report, model, logs=LOGS, first=0, end=True):
    """The hooks of a training with these logs, without training."""
    report.set_model(model)
    report.set_params({"epochs": first + len(logs), "verbose": 0})
    report.on_train_begin()
    for epoch, figures in enumerate(logs, first):
        report.on_epoch_begin(epoch)
        report.on_epoch_end(epoch, dict(figures))
    if end:
        report.on_train_end()


class Page(html.parser.HTMLParser):
    """A parsed page; fails where tags do not match."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tags, self.open, self.text = [], [], []
        self.feed(self.source)
        assert not self.open
        assert self.source.endswith("</html>\n")

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def words(self):
        return " ".join(" ".join(self.text).split())


def decoded(source):
    kind, _, data = source.partition(",")
    assert kind == "data:image/webp;base64"
    image = np.frombuffer(base64.b64decode(data), np.uint8)
    return cv2.imdecode(image, cv2.IMREAD_UNCHANGED)


def test_the_page_is_self_contained_and_for_phones(model, data, tmp_path):
    path = tmp_path / "new" / "report.html"
    run(TrainingReport(path, *data), model)
    page = Page(path)
    metas = page.all("meta")
    assert {
        "name": "viewport",
        "content": "width=device-width, initial-scale=1",
    } in metas
    assert any("default-src 'none'" in meta["content"] for meta in metas[1:])
    assert not re.search(r"https?:|url\(|@import|<script", page.source)
    images = page.all("img")
    assert [image["class"] for image in images] == ["chart"] * 3 + ["photos"] * 2
    for image in images:
        assert image["alt"]
        assert decoded(image["src"]).shape[1] > 2 * 480  # sharp with two dots a pixel
    for drawing in page.all("svg"):
        assert drawing["role"] == "img"
        assert drawing["aria-label"]
    assert len(page.source) < 500_000
    assert os.listdir(path.parent) == ["report.html"]


def test_the_figures_are_those_of_the_model(model, data, tmp_path):
    x, y = data
    names = np.array(["ant", "bee", "cat", "dog"])[y]
    path = tmp_path / "report.html"
    run(TrainingReport(path, x, names, title="Insects?", k=3, queries=4), model)
    words = Page(path).words()
    embeddings = embed(model, x)
    figures = retrieval_metrics(embeddings, y, distance="cosine")
    curve = verification_curve(embeddings, y, distance="cosine")
    for name, value in (
        ("map@r", figures["map@r"]),
        ("mrr", figures["mrr"]),
        ("eer", curve.eer),
    ):
        assert f"{name} {value:.3g} {value:.3g} (1) {value:.3g}" in words
    assert words.startswith("Insects? Insects? Ended after 3 of 3 epochs")
    assert "5.0% of the triplets of the last epoch are hard and 85.0% easy" in words
    assert f"{figures['recall@1']:.1%} have a nearest neighbour" in words
    assert "loss 1 0.25 0.5" in words  # first, latest, validation

    _, nearest = search(embeddings, embeddings, 2, distance="cosine")
    assert (nearest[:, 0] == np.arange(24)).all()
    taken = y[nearest[:, 1]]
    wrong = taken != y
    assert wrong.any()
    told = set(re.findall(r"(\w+) taken for (\w+), (\d+) of 6", words))
    assert len(told) == min(6, len(set(zip(y[wrong], taken[wrong], strict=True))))
    for name, other, count in told:
        code, taken_for = (["ant", "bee", "cat", "dog"].index(n) for n in (name, other))
        assert int(count) == ((y == code) & (taken == taken_for)).sum()
    for row in range(4):  # a query of each class, with its neighbours
        _, others = search(embeddings[[row]], embeddings, 4, distance="cosine")
        right = (y[others[0, 1:]] == y[row]).sum()
        assert f"sample {row}: {names[row]}, {right} of 3 right" in words


def test_rows_of_the_class_and_group_are_left_out(model, data, tmp_path):
    x, y = data
    cameras = np.array(["door", "gate"])[np.arange(24) // 4 % 2]
    cameras[y == 2] = "gate"  # a class of one camera
    y = np.where(np.arange(24) == 11, 7, y)  # and a sample that is alone in its class
    path = tmp_path / "report.html"
    report = TrainingReport(path, x, y, groups=cameras, k=6)
    run(report, model, LOSSES[:1])
    words, embeddings = Page(path).words(), embed(model, x)
    expected = retrieval_metrics(
        embeddings,
        y,
        groups=cameras,
        metrics=("recall@1", "map@r", "map", "cmc@1", "minp"),
        distance="cosine",
    )
    plain = retrieval_metrics(embeddings, y, distance="cosine")
    assert expected["recall@1"] < plain["recall@1"]
    for name in ("recall@1", "map@r", "map", "cmc@1", "minp"):
        value = f"{expected[name]:.3g}"
        assert f"{name} {value} {value} (1) {value}" in words
    told = (
        "17 queries, and 1 without a positive and 6 with positives of their own group "
        "only, left out"
    )
    assert told in words
    assert f"map {expected['map']:.3g} " in words[: words.index("Held-out data")]
    assert f"{expected['recall@1']:.1%} have a nearest neighbour of their own " in words
    assert report._evaluation.results[0].items() >= expected.items()

    near = plotting.plot_neighbours(
        embeddings, y, groups=cameras, k=6, distance="cosine"
    )
    confused = plotting.plot_confusions(
        embeddings, y, groups=cameras, pairs=6, distance="cosine"
    )
    for figure in (near, confused):
        assert " ".join(figure.get_label().split()[5:]) in words
    assert near.get_label().count("⊘ left out") > 1
    assert "⊘ left out (dotted): of the class and group of the sample" in words

    run(TrainingReport(path, x, y, k=1, queries=1, pairs=1), model, LOSSES[:1])
    words = Page(path).words()
    assert "24 queries" not in words
    assert "23 queries, and 1 without a positive, left out" in words
    for absent in ("⊘", "left out (dotted)", "minp", "group"):
        assert absent not in words


def test_the_best_epoch_goes_by_map_where_there_are_groups():
    results = {0: {"map@r": 0.1, "map": 0.3}, 1: {"map@r": 0.2, "map": 0.25}}
    assert sections.best_epoch([0, 1], {}, results)[0] == 0
    plain = {epoch: {"map@r": one["map@r"]} for epoch, one in results.items()}
    assert sections.best_epoch([0, 1], {}, plain)[0] == 1


def test_thumbnails_show_the_samples(model, data, tmp_path):
    x, y = data
    np.testing.assert_array_equal(thumbnails_of(x, None).take([3, 0]), x[[3, 0]])
    colours = np.zeros((24, 300, 150, 3), np.float32)
    colours[..., 2] = np.arange(24)[:, None, None] - 23.0  # -23 is black, 0 white
    (image,) = thumbnails_of(x, colours).take([0])
    assert image.shape == (128, 64, 3)
    assert image[0, 0].tolist() == [255, 255, 0]

    path = tmp_path / "report.html"
    reds = np.zeros((24, 8, 8, 3), np.uint8)
    reds[..., 0] = 255
    run(TrainingReport(path, x, y, images=reds), model, LOSSES[:1])
    pixels = decoded(Page(path).all("img")[-1]["src"]).reshape(-1, 3).astype(int)
    assert (np.abs(pixels - [0, 0, 255]).max(axis=1) < 30).mean() > 0.2

    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    run(TrainingReport(path, embed(model, x), y), plain, LOSSES[:1])
    page = Page(path)
    assert len(page.all("img")) == 4  # names in the place of images
    assert "sample 1: 1, " in page.words()


def test_samples_have_the_names_of_their_files(data, tmp_path):
    x, y = data
    paths = [tmp_path / f"image_{row}.png" for row in range(24)]
    for path, image in zip(paths, x, strict=True):
        cv2.imwrite(str(path), image)
    files = sources.ImageFiles(paths, size=(5, 7), color="gray")
    for given in ((files, None), (files, x)):
        shown = thumbnails_of(*given)
        assert shown.paths == [path.name for path in paths]
    layers = keras.layers.Flatten(), keras.layers.Dense(2)
    path = tmp_path / "report.html"
    report = TrainingReport(path, files, y)
    run(report, keras.Sequential([keras.Input((5, 7, 1)), *layers]), LOSSES[:1])
    assert "image_0.png: 0, " in Page(path).words()


def test_the_settings_stand_at_the_top(model, tmp_path):
    path = tmp_path / "report.html"
    report = TrainingReport(path)
    report.set_params({"epochs": 3, "steps": 7})
    run(report, model)
    words = Page(path).words()
    assert "TripletLoss, margin 0.25, mining semi_hard, distance cosine" in words
    assert re.search(r"SGD, learning rate 0 · \d+ parameters · 3 epochs", words)
    two = keras.Model(model.inputs, [model.outputs[0], model.outputs[0]])
    two.compile("adam", ["mse", TripletLoss(mining="hard")])
    told = sections.settings(two, {"epochs": 2, "steps": 5})
    assert told.startswith("mse · TripletLoss, margin 0.2, mining hard, ")
    assert told.endswith(" · 2 epochs of 5 steps")


def test_the_best_epoch():
    def best(losses, results=None, **history):
        history = {"loss": losses, **history}
        return sections.best_epoch(range(len(losses)), history, results or {})

    assert best([1.0]) is None
    told = "Epoch 2 is the best (loss 0.5); the last one is worse (0.75)."
    assert best([1.0, 0.5, 0.75]) == (1, told)
    told = "The last epoch is the best so far (loss 0.5)."
    assert best([1.0, 0.5, 0.5]) == (2, told)
    told = "Epoch 1 is the best (val_loss 2); the last one is worse (nan)."
    assert best([1.0, 0.5], val_loss=[2.0, math.nan]) == (0, told)
    held_out = {0: {"map@r": 0.5}, 2: {"map@r": 0.25}}
    told = "Epoch 1 is the best (map@r 0.5); the last one is worse (0.25)."
    assert best([1.0, 0.5, 0.25], held_out) == (0, told)
    told = "Epoch 1 is the best (map@r 0.5); the last one is worse (nan)."
    assert best([1.0, 0.5], {0: {"map@r": 0.5}, 1: {}}) == (0, told)


def test_the_best_value_and_its_epoch():
    results = {
        epoch: dict.fromkeys((*sections._RETRIEVAL, "auc", "eer"), value)
        | {"queries": 9, "lone_queries": 2}
        for epoch, value in ((0, 0.5), (3, 0.25), (5, 0.75), (6, 0.625))
    }
    section = sections.held_out_section(
        sections.Look(results[6], "", "", "", ""), results
    )
    rows = re.findall(r'row">(.*?)</th>.*</td><td>(.*?) <small>\((.*?)\)', section)
    assert ("eer", "0.25", "4") in rows  # the least
    assert ("mrr", "0.75", "6") in rows  # the greatest
    assert "9 queries, and 2 without a positive, left out" in section


def test_text_of_the_user_is_escaped(model, data, tmp_path):
    x, y = data
    path = tmp_path / "report.html"
    guard = CollapseGuard()
    guard.alarms.append(Alarm(2, "collapsed", f"Epoch 3: {NASTY}"))
    names = np.array([NASTY, "b", "c", "d"])[y]
    run(TrainingReport(path, x, names, guard=guard, title=NASTY), model, LOGS[:1])
    page = Page(path)
    assert not page.all("script")
    assert f"Epoch 3: {NASTY}" in page.words()
    assert page.words().startswith(f"{NASTY} {NASTY} Ended")
    assert "a_nasty_<key>" in "".join(page.text)
    assert f"sample 0: {NASTY}, " in page.words()


def test_names_that_are_not_in_utf8_are_shown_as_escapes(model, data, tmp_path):
    x, y = data
    path = tmp_path / "report.html"
    names = np.array([os.fsdecode(b"caf\xe9"), "b", "c", "d"])[y]
    run(TrainingReport(path, x, names, title=names[0]), model, LOGS[:1])
    assert r"sample 0: caf\udce9, " in Page(path).words()


def test_a_page_that_cannot_be_written_does_not_end_the_training(
    model, tmp_path, monkeypatch
):
    path, fsync = tmp_path / "new" / "report.html", os.fsync
    report = TrainingReport(path)

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(2):  # once in every fit
        with pytest.warns(UserWarning, match="report.html .No space left") as caught:
            run(report, model, LOSSES)
        told = [one for one in caught if "cannot write" in str(one.message)]
        assert [one.filename for one in told] == [__file__]
    assert os.listdir(path.parent) == []
    monkeypatch.setattr(os, "fsync", fsync)
    shutil.rmtree(path.parent)
    run(report, model, LOSSES)
    assert "Ended after 3 of 3 epochs" in Page(path).words()
    path.parent.rename(tmp_path / "other")
    path.parent.write_text("a file where the folder was")
    with pytest.warns(UserWarning, match=r"cannot write .*report.html") as caught:
        run(report, model, LOSSES)
    assert len([one for one in caught if "cannot write" in str(one.message)]) == 1


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda report: pickle.loads(pickle.dumps(report))]
)
def test_a_copy_is_a_report_of_its_own(model, data, tmp_path, copied):
    path = tmp_path / "report.html"
    report = TrainingReport(path, *data, guard=CollapseGuard())
    run(report, model, LOSSES[:1])
    other = copied(report)
    assert other.model is None
    run(other, model, LOSSES[1:2])
    assert "loss 0.5 0.5" in Page(path).words()
    report.on_train_end()
    assert "loss 1 1" in Page(path).words()
    assert other._evaluation._callback is other
    if copied is copy.deepcopy:
        assert other._evaluation._data[0] is report._evaluation._data[0]
        assert other._images is report._images


def test_the_alarms_of_the_guard(model, tmp_path):
    path, guard = tmp_path / "report.html", CollapseGuard()
    report = TrainingReport(path, guard=guard)
    run(report, model, LOSSES, end=False)
    assert "Alarms None from CollapseGuard so far." in Page(path).words()
    guard.alarms.append(Alarm(2, "idle", "Epoch 3: nothing to learn."))
    report.on_train_end()
    assert "Epoch 3: nothing to learn." in Page(path).words()
    assert "alarms 1" in Page(path).words()


def test_logs_alone_without_mining(model, tmp_path):
    path = tmp_path / "report.html"
    run(TrainingReport(path), model, [{"loss": np.float32(0.5), "word": "x"}])
    words = Page(path).words()
    assert "loss 0.5 0.5" in words
    for absent in ("Mining", "Held-out", "Alarms", "Nearest", "word", "best"):
        assert absent not in words


def test_a_training_that_goes_on(model, data, tmp_path):
    path = tmp_path / "report.html"
    report = TrainingReport(path, *data, every=9)
    run(report, model, LOSSES[:2])
    run(report, model, LOSSES[2:], first=2)
    assert "Ended after 3 of 3 epochs" in Page(path).words()
    assert "loss 1 0.25" in Page(path).words()
    assert re.search(r"curve epoch 1 best epoch 3 recall@1", Page(path).words())
    run(report, model, LOSSES[2:])  # a new one
    assert re.search(r"curve epoch 1 best epoch 1 recall@1", Page(path).words())
    assert "Ended after 1 of 1 epochs" in Page(path).words()
    assert "loss 0.25 0.25" in Page(path).words()


def test_an_interrupted_training_leaves_the_last_page_whole(
    model, data, tmp_path, monkeypatch
):
    path = tmp_path / "report.html"

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    cheap = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    cheap.compile("sgd", "mse")
    with pytest.raises(KeyboardInterrupt):
        cheap.fit(
            np.ones((4, 2)),
            np.ones(4),
            epochs=5,
            verbose=0,
            callbacks=[TrainingReport(path), Interrupt()],
        )
    before = path.read_text("utf-8")
    assert "Running: 2 of 5 epochs" in Page(path).words()

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)  # all is written, nothing is in place
    with pytest.raises(KeyboardInterrupt):
        run(TrainingReport(path), cheap)
    assert path.read_text("utf-8") == before


def test_a_diverged_model_is_told(data, tmp_path):
    path = tmp_path / "report.html"
    model = tiny_model((5, 7), 3, unit_length=False)
    report = TrainingReport(path, *data)
    run(report, model, LOSSES[:1], end=False)
    model.set_weights([np.full_like(w, np.nan) for w in model.get_weights()])
    with pytest.warns(UserWarning, match="embeddings hold NaN"):
        report.on_epoch_end(1, LOSSES[1])
    words = Page(path).words()
    assert "After epoch 2 the embeddings were not finite" in words
    assert "recall@1" in words  # of the first epoch
    with pytest.warns(UserWarning, match="embeddings hold NaN"):
        run(report, model, LOSSES[:1])
    assert "recall@1" not in Page(path).words()


def test_held_out_data_every_few_epochs(model, data, tmp_path):
    path = tmp_path / "report.html"
    report = TrainingReport(path, *data, every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(report, model, LOSSES * 2)
    assert list(report._evaluation.results) == [0, 1, 3, 5]


def test_bad_arguments(data, tmp_path):
    x, y = data
    for arguments, error, words in (
        ({"y": y}, ValueError, "`y`.*`x` with it"),
        ({"images": x}, ValueError, "`images`.*`x` with it"),
        ({"groups": y}, ValueError, "`groups`.*`x` with it"),
        ({"x": x, "y": y, "groups": y[:9]}, ValueError, "`groups`.*24 groups"),
        ({"x": x, "y": y, "groups": y}, ValueError, "`groups`.*two groups"),
        ({"x": x}, ValueError, "`y`"),
        ({"x": x, "y": np.arange(24)}, ValueError, "`y`.*0 same"),
        ({"x": x, "y": y, "images": x[:4]}, ValueError, "`images`.*24 images"),
        ({"x": x, "y": y, "distance": "l2"}, ValueError, "`distance`"),
        ({"x": x, "y": y, "k": 0}, ValueError, "`k`"),
        ({"x": x, "y": y, "every": 0}, ValueError, "`every`"),
        ({"guard": []}, TypeError, "`guard`.*CollapseGuard"),
    ):
        with pytest.raises(error, match=words):
            TrainingReport(tmp_path / "report.html", **arguments)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PROBE = """<!doctype html><meta charset="utf-8">
<iframe id="phone" width="{width}" height="800" srcdoc="{report}"></iframe><pre></pre>
<script>
onload = () => {{
  const page = document.getElementById("phone").contentDocument;
  document.querySelector("pre").textContent = JSON.stringify({{
    images: [...page.images].map(image => image.naturalWidth),
    charts: [...page.querySelectorAll(".chart")].map(image => image.clientWidth),
    sheets: [...page.querySelectorAll(".photos")].map(image => image.clientWidth),
    curves: [...page.querySelectorAll(".spark")].map(curve => curve.clientHeight),
    width: page.documentElement.scrollWidth,
    font: parseFloat(getComputedStyle(page.body).fontSize),
  }});
}};
</script>
"""


def browse(path, profile, *options):
    """What Chromium prints of a page, and what it logs."""
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            *options,
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_it_opens_in_a_browser(model, data, tmp_path):
    path, guard = tmp_path / "report.html", CollapseGuard()
    guard.alarms.append(Alarm(2, "collapsed", "Epoch 3: " + "a long sentence " * 30))
    logs = [{**one, **{f"val_{k}": one[k] for k in list(one)[:4]}} for one in LOGS]
    run(TrainingReport(path, *data, guard=guard), model, logs)
    tree, console = browse(path, tmp_path / "profile", "--dump-dom")
    assert console == []
    assert "Nearest neighbours" in tree

    def look(path, width):
        wrapper, page = tmp_path / "wrapper.html", escape(path.read_text("utf-8"))
        wrapper.write_text(PROBE.format(report=page, width=width), "utf-8")
        tree, console = browse(wrapper, tmp_path / "profile", "--dump-dom")
        assert console == []
        return json.loads(re.search("<pre>(.*)</pre>", tree)[1])

    only_logs = tmp_path / "logs.html"
    run(TrainingReport(only_logs), model)
    (width,) = look(only_logs, 1280)["charts"]
    assert {width} == {*look(path, 1280)["charts"]}  # nothing is blown up
    assert width < 500
    seen = look(path, 390)
    assert min(seen["images"]) > 2 * 480  # every image was decoded, and is sharp
    assert len(seen["charts"]) == 4
    assert len(seen["sheets"]) == 2
    assert len({*seen["charts"], *seen["sheets"]}) == 1
    assert min(seen["charts"]) > 320
    assert len(seen["curves"]) == len(Page(path).all("svg"))
    assert min(seen["curves"]) > 10
    assert seen["width"] <= 390  # nothing to scroll sideways on a phone
    assert seen["font"] >= 16

    shot = tmp_path / "shot.png"
    browse(path, tmp_path / "profile", f"--screenshot={shot}", "--window-size=1200,900")
    colours = np.unique(cv2.imread(str(shot)).reshape(-1, 3), axis=0)
    for name in (plotting.COLOURS["semi_hard"], plotting.COLOURS["hard"]):
        bgr = [int(name[i : i + 2], 16) for i in (5, 3, 1)]
        assert (np.abs(colours.astype(int) - bgr).max(axis=1) <= 3).any()


def test_labels_that_look_wrong_have_a_section(rng, tmp_path):
    classes = np.arange(160) % 4
    x = 0.1 * rng.normal(size=(160, 5)) + np.eye(4, 5)[classes]
    y = np.array(["ann", "bob", "cy", "dee"], "U5")[classes]
    flat = keras.Sequential([keras.Input((5,)), keras.layers.Identity()])
    path = tmp_path / "report.html"

    run(TrainingReport(path, x, y), flat, LOSSES[:1])
    assert "Labels to look at" not in Page(path).words()

    images = np.zeros((160, 8, 8, 3), np.uint8)
    images[7, ..., 0] = 255
    y[7] = "ann"  # a "dee"
    y[np.flatnonzero(y == "bob")[::2]] = "bobby"
    run(TrainingReport(path, x, y, images=images), flat, LOSSES[:1])
    page = Page(path)
    assert "Labels to look at" in page.words()
    told = page.all("img")[-1]
    assert "Look mislabelled: 1 sample 7 ann → dee" in page.words()
    assert "bob and bobby look like one class" in page.words()
    pixels = decoded(told["src"]).reshape(-1, 3).astype(int)
    assert (np.abs(pixels - [0, 0, 255]).max(axis=1) < 30).mean() > 0.005

    # Embeddings that tell nothing apart say nothing about labels.
    noise = rng.normal(size=x.shape)
    run(TrainingReport(path, noise, y), flat, LOSSES[:1])
    assert "Labels to look at" not in Page(path).words()


def areas(source, kind):
    """The corners (n, 2) of each band of a kind in the order of the page."""
    paths = re.findall(f'<path class="band {kind}" d="M(.*?)Z"/>', source)
    return [
        np.array([point.split() for point in path.split("L")], float) for path in paths
    ]


def test_logs_with_ends_are_bands_around_their_curve(model, tmp_path):
    path = tmp_path / "report.html"
    logs = [
        {
            "loss": 1.0,
            "val_recall@1": 0.5 + n / 10,
            "val_recall@1_low": 0.4 + n / 10,
            "val_recall@1_high": 0.8,
            "other_low": 3.0,  # the end of nothing
        }
        for n in range(3)
    ]
    run(TrainingReport(path), model, logs)
    page = Page(path)
    (area,) = areas(page.source, "held")
    assert not areas(page.source, "train")
    # From 0.4 (y = 22) to 0.8 (y = 2): the lower ends, and the upper ones backwards.
    np.testing.assert_allclose(area[:, 0], [0, 50, 100, 100, 50, 0])
    np.testing.assert_allclose(area[:, 1], [22, 17, 12, 2, 2, 2])
    words = page.words()
    assert "recall@1 0.7 (0.6 – 0.8)" in words
    assert "with their intervals (shade, note)" in words
    assert "other_ low 3 3" in words
    assert "recall@1_ low" not in words

    logs[1]["val_recall@1_low"] = math.nan  # a gap parts the band
    run(TrainingReport(path), model, logs)
    (shape,) = re.findall(r'<path class="band held" d="(.*?)"/>', Page(path).source)
    assert shape.count("M") == shape.count("Z") == 2


def test_the_figures_of_the_report_have_intervals(model, data, tmp_path):
    x, y = np.tile(data[0], (5, 1, 1)), np.arange(120) % 60
    path = tmp_path / "report.html"
    report = TrainingReport(path, x, y, interval=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(report, model, LOSSES[:2])
    words, embeddings = Page(path).words(), embed(model, x)
    of_rows = retrieval_metrics(embeddings, y, distance="cosine", interval=0.9)
    of_pairs = verification_metrics(embeddings, y, distance="cosine", interval=0.9)
    for figures, name in ((of_rows, "map@r"), (of_pairs, "eer"), (of_pairs, "auc")):
        value = f"{figures[name]:.3g}"
        low, high = (f"{figures[f'{name}_{end}']:.3g}" for end in ("low", "high"))
        assert f"{name} {value} {value} (1) {value} ({low} – {high})" in words
    assert len(areas(Page(path).source, "train")) == 8
    assert "the 90 % interval, within which" in words
    assert "rough" not in words

    # 4 classes: the page says it, and no warning does. One class with a pair: none.
    for labels, told in ((data[1], "worth 4.0 classes"), ([0, 0, *range(1, 23)], "")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(TrainingReport(path, data[0], labels), model, LOSSES[:1])
        page = Page(path)
        assert ("is rough: the classes are" in page.words()) == bool(told)
        assert told in page.words()
        assert bool(areas(page.source, "train")) == bool(told)
    run(TrainingReport(path, *data, interval=None), model, LOSSES[:1])
    assert not areas(Page(path).source, "train")
    assert "interval" not in Page(path).words()
