"""Files that version 0.1 wrote still load: models, augmentations, caches, indexes.

What these files hold and how they were made: golden/version_0_1/README.md. No pickle is
among them: a pickle names the modules of the version that wrote it, and may not load.
"""

import os
import shutil
import warnings

import cv2
import keras
import numpy as np
import pytest
from harness import TESTS

import kerastrip
from kerastrip.sources import CachedImages, ImageFolder, TFRecordSource, tfrecord

SAVED = TESTS / "golden" / "version_0_1"
# When the images of the cache and the TFRecord file were changed last, in nanoseconds.
TIME = 1_700_000_000_000_000_000
LOSSES = {
    "semihard": (kerastrip.triplet_semihard_loss, {}),
    "hard": (kerastrip.TripletHardLoss, {"margin": 0.5, "soft": True}),
    "contrastive": (
        kerastrip.ContrastiveLoss,
        {"positive_margin": 0.1, "negative_margin": 0.8},
    ),
}


@pytest.fixture(scope="module")
def expected():
    with np.load(SAVED / "expected.npz") as archive:
        return dict(archive)


# -- models ------------------------------------------------------------------------


def check_loss(model, name, targets, expected):
    """The compiled loss of a loaded model gives the value that is stored with it."""
    results = model.evaluate(
        expected["rows"], targets, batch_size=12, verbose=0, return_dict=True
    )
    assert results["loss"] == pytest.approx(expected[f"{name}_loss"], abs=1e-5)
    return results


@pytest.mark.backend
@pytest.mark.parametrize("name", LOSSES)
def test_a_model_loads_with_its_loss(name, expected):
    model = keras.models.load_model(SAVED / f"{name}.keras")
    embeddings = model.predict(expected["rows"], verbose=0)
    np.testing.assert_allclose(embeddings, expected[f"{name}_embeddings"], atol=1e-6)
    kind, settings = LOSSES[name]
    assert model.loss is kind or type(model.loss) is kind
    assert {key: getattr(model.loss, key) for key in settings} == settings
    check_loss(model, name, expected["labels"], expected)
    model.fit(expected["rows"], expected["labels"], batch_size=12, verbose=0)


@pytest.mark.backend
def test_a_model_with_two_losses_and_a_metric_loads(expected):
    model = keras.models.load_model(SAVED / "two_heads.keras")
    outputs = model.predict(expected["rows"], verbose=0)
    embeddings = outputs["emb"]
    np.testing.assert_allclose(embeddings, expected["two_heads_embeddings"], atol=1e-6)
    triplet, focal = model.loss["emb"], model.loss["probs"]
    assert type(triplet) is kerastrip.TripletLoss
    assert (triplet.margin, triplet.mining) == (0.3, "hard")
    assert triplet.average_over == "active"
    assert "memory" not in triplet.get_config()
    assert type(focal) is kerastrip.CategoricalFocalLoss
    assert focal.get_config()["alpha"] == [0.2, 0.5, 0.3]
    labels = expected["labels"]
    targets = {"probs": np.eye(3, dtype="float32")[labels], "emb": labels}
    results = check_loss(model, "two_heads", targets, expected)
    for key in ("easy", "semi_hard", "hard"):  # of the metric, a TripletCensus
        assert results[key] == pytest.approx(expected[f"two_heads_{key}"], abs=1e-6)


# -- an augmentation ---------------------------------------------------------------


def test_an_augmentation_gives_the_same_views(expected):
    with warnings.catch_warnings():
        # OpenCV may be another one here. These transforms are exact under any.
        warnings.simplefilter("ignore", UserWarning)
        augmentation = kerastrip.Augmentation.load(SAVED / "augmentation.json")
    views = [augmentation(expected["image"], key) for key in range(4)]
    np.testing.assert_array_equal(views, expected["views"])


# -- a cache -----------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    return shutil.copytree(SAVED / "cache", tmp_path / "cache")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_cache_gives_its_rows(cache, expected):
    cached = CachedImages(cache, verify=True)
    np.testing.assert_array_equal(cached.take(range(4)), expected["cached"])
    assert cached.labels.tolist() == ["0", "0", "1", "1"]
    assert contents(cache) == contents(SAVED / "cache")


def test_cache_images_accepts_the_cache_of_its_images(cache, tmp_path, expected):
    """It compares the images with the cache, and writes nothing."""
    names = ("0/a", "0/b", "1/c", "1/d")
    for image, name in zip(expected["cached"], names, strict=True):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image[..., ::-1])
        os.utime(path, ns=(TIME, TIME))
    before = contents(cache)
    images = ImageFolder(tmp_path / "images", size=(5, 6))
    cached = kerastrip.cache_images(images, cache)
    np.testing.assert_array_equal(cached.take([3, 0]), expected["cached"][[3, 0]])
    assert contents(cache) == before


# -- TFRecord files ----------------------------------------------------------------


def test_an_index_is_used_and_not_made_anew(tmp_path, expected, monkeypatch):
    for name in ("rows.tfrecord", "rows.tfrecord.index.npz"):
        shutil.copy(SAVED / name, tmp_path)
    path = tmp_path / "rows.tfrecord"
    os.utime(path, ns=(TIME, TIME))
    monkeypatch.setattr(tfrecord, "_walked", None)  # it would make a new index
    source = TFRecordSource(path, shape=(2, 3))
    np.testing.assert_array_equal(source.take(range(6)), expected["records"])
    assert source.labels.tolist() == list("aabbcc")
    index = tmp_path / "rows.tfrecord.index.npz"
    assert index.read_bytes() == (SAVED / index.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
