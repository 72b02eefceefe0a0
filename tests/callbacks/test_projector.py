"""EmbeddingProjector writes what TensorBoard reads; MiningStats gets there too."""

import copy
import os
import pickle

import cv2
import keras
import numpy as np
import pytest
from harness import tensorflow_only, tiny_model

from kerastrip.callbacks import EmbeddingProjector, MiningStats, projector
from kerastrip.evaluation.embedding import embed
from kerastrip.sampling.sampler import PKSampler


@pytest.fixture(scope="module")
def model():
    return tiny_model((6, 4), 3, unit_length=False)


@pytest.fixture
def data(rng):
    return rng.integers(0, 256, (10, 6, 4), dtype=np.uint8), np.arange(10) % 2


def write(callback, model, epochs=1):
    callback.set_model(model)
    callback.on_train_begin()
    for epoch in range(epochs):
        callback.on_epoch_end(epoch)
    callback.on_train_end()


def lines(path):
    return [line.split("\t") for line in path.read_text("utf-8").splitlines()]


def test_the_files_belong_together(model, data, tmp_path):
    x, y = data
    names = np.array(["a\tb", "zoé"])[y]
    write(EmbeddingProjector(tmp_path / "new" / "run", x, names), model)
    folder = tmp_path / "new" / "run"
    tensors = np.float32(lines(folder / "tensors.tsv"))
    np.testing.assert_allclose(tensors, embed(model, x), rtol=1e-5, atol=1e-5)
    # One column has no header, and a label is one cell.
    assert lines(folder / "metadata.tsv") == [["a b"], ["zoé"]] * 5
    sprite = cv2.imread(str(folder / "sprite.png"), cv2.IMREAD_GRAYSCALE)
    assert sprite.shape == (4 * 6, 4 * 4)
    for i, image in enumerate(x):
        row, column = divmod(i, 4)
        cell = sprite[6 * row : 6 * row + 6, 4 * column : 4 * column + 4]
        np.testing.assert_array_equal(cell, image)
    config = " ".join((folder / "projector_config.pbtxt").read_text().split())
    assert config == (
        'embeddings { tensor_name: "embedding" tensor_path: "tensors.tsv" '
        'metadata_path: "metadata.tsv" sprite { image_path: "sprite.png" '
        "single_image_dim: 4 single_image_dim: 6 } }"
    )
    assert len(list(folder.iterdir())) == 4


def test_further_columns_have_a_header(model, data, tmp_path):
    x, y = data
    more = {"weight": np.arange(10.0), "note": np.array([b""] * 10)}
    write(EmbeddingProjector(tmp_path, x, y, metadata=more), model)
    table = lines(tmp_path / "metadata.tsv")
    assert table[:2] == [["label", "weight", "note"], ["0", "0.0", "-"]]
    assert len(table) == 11


def test_the_sprite_keeps_to_its_limit(model, rng, tmp_path, monkeypatch):
    assert projector._SPRITE == 8192
    monkeypatch.setattr(projector, "_SPRITE", 100)
    x = rng.normal(size=(10, 6, 4))
    colours = np.float32(rng.normal(size=(10, 60, 30, 3)))
    write(EmbeddingProjector(tmp_path, x, images=colours), model)
    sprite = cv2.imread(str(tmp_path / "sprite.png"))
    assert sprite.shape == (4 * 25, 4 * 12, 3)
    assert (
        "12 single_image_dim: 25" in (tmp_path / "projector_config.pbtxt").read_text()
    )
    assert not (tmp_path / "metadata.tsv").exists()


def test_colours_and_large_images(model, data, tmp_path):
    colours = np.zeros((10, 200, 100, 3), np.uint8)
    colours[..., 0] = 255
    write(EmbeddingProjector(tmp_path, *data, images=colours), model)
    sprite = cv2.imread(str(tmp_path / "sprite.png"))
    assert sprite.shape == (4 * 64, 4 * 32, 3)
    assert sprite[0, 0].tolist() == [0, 0, 255]  # OpenCV reads BGR: it is red


def test_every_few_epochs_and_from_the_source_of_a_sampler(model, data, tmp_path):
    x, y = data
    sampler = PKSampler(
        x,
        y,
        classes_per_batch=2,
        samples_per_class=2,
        augment=lambda image, rng: image * 0,
    )
    callback = EmbeddingProjector(tmp_path, sampler, every=2)
    callback.set_model(model)
    written = []
    for epoch in range(4):
        callback.on_epoch_end(epoch)
        written.append((tmp_path / "tensors.tsv").exists())
        if written[-1]:
            tensors = np.float32(lines(tmp_path / "tensors.tsv"))
            np.testing.assert_allclose(tensors, embed(model, x), rtol=1e-5, atol=1e-5)
            (tmp_path / "tensors.tsv").unlink()
    assert written == [False, True, False, True]
    assert lines(tmp_path / "metadata.tsv") == [[str(label)] for label in y]


def test_names_that_are_not_in_utf8_are_written_as_escapes(model, data, tmp_path):
    names = np.array([os.fsdecode(b"caf\xe9"), "b"])[data[1]]
    write(EmbeddingProjector(tmp_path, data[0], names), model)
    assert lines(tmp_path / "metadata.tsv") == [[r"caf\udce9"], ["b"]] * 5


def test_files_that_cannot_be_written_do_not_end_the_training(model, data, tmp_path):
    path = tmp_path / "run"
    path.write_text("a file where the folder shall be")
    callback = EmbeddingProjector(path, *data, every=1)
    for _ in range(2):  # once in every fit
        with pytest.warns(UserWarning, match=r"cannot write into .*run") as caught:
            write(callback, model, epochs=3)
        told = [one for one in caught if "cannot write" in str(one.message)]
        assert [one.filename for one in told] == [__file__]
    path.unlink()
    write(callback, model)
    assert len(list(path.iterdir())) == 4


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))]
)
def test_a_copy_writes_as_well(model, data, tmp_path, copied):
    callback = EmbeddingProjector(tmp_path, *data)
    write(callback, model)
    before = (tmp_path / "tensors.tsv").read_bytes()
    (tmp_path / "tensors.tsv").unlink()
    other = copied(callback)
    assert other.model is None
    write(other, model)
    assert (tmp_path / "tensors.tsv").read_bytes() == before
    if copied is copy.deepcopy:
        assert other._data is callback._data
        assert other._thumbnails is callback._thumbnails


def test_bad_arguments(data, tmp_path):
    x, y = data
    batches = keras.utils.PyDataset()
    for arguments, error, words in (
        ({"x": x, "y": y[:3]}, ValueError, "`y`.*10 labels"),
        ({"x": x, "every": 0}, ValueError, "every"),
        ({"x": x, "images": x[:3]}, ValueError, "`images`.*10 images"),
        ({"x": x, "images": y}, ValueError, "`images`.*height"),
        ({"x": x, "metadata": {"age": [1, 2]}}, ValueError, "`metadata`.*10.*'age'"),
        ({"x": np.broadcast_to(0, (100_001, 2))}, ValueError, "`x`.*100000.*100001"),
        ({"x": batches, "images": x}, ValueError, "`images`.*None"),
    ):
        with pytest.raises(error, match=words):
            EmbeddingProjector(tmp_path, **arguments)


@tensorflow_only  # its summaries write
def test_mining_stats_reach_tensorboard(tmp_path, monkeypatch):
    import tensorflow as tf
    import tensorflow.summary as summary

    try:
        import tensorboard  # noqa: F401
    except ImportError:  # TensorFlow then lacks this one function
        monkeypatch.setattr(
            summary,
            "scalar",
            lambda name, data, step: summary.write(name, float(data), step=step),
        )
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    x, y = np.random.default_rng(0).normal(size=(12, 4)), np.arange(12)[:, None] % 3
    history = model.fit(
        x,
        y,
        validation_data=(x, y),
        epochs=2,
        verbose=0,
        callbacks=[
            keras.callbacks.TensorBoard(tmp_path),
            MiningStats(2.0, "euclidean"),
        ],
    ).history
    for folder, prefix in (("train", ""), ("validation", "val_")):
        (path,) = (tmp_path / folder).glob("events*")
        found = {}
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(tf.make_ndarray(value.tensor))
        for key in ("easy", "semi_hard", "hard", "pos_dist", "effective_dim"):
            np.testing.assert_allclose(
                np.float32(found[f"epoch_{key}"]), history[prefix + key], rtol=1e-6
            )
