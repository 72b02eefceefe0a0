"""embed against `predict`, on every kind of input."""

import keras
import numpy as np
import pytest
from harness import tiny_model

from kerastrip.augmentation.pipeline import Augmentation
from kerastrip.evaluation import _progress
from kerastrip.evaluation.embedding import embed, embed_with_targets
from kerastrip.losses import TripletLoss
from kerastrip.sampling.sampler import PKSampler


def linear_model():
    return tiny_model((4,), 3, unit_length=False)


def two_headed(compiled=True):
    losses = ["categorical_crossentropy", TripletLoss()] if compiled else None
    model = tiny_model((4,), 3, classes=7, unit_length=False, loss=losses)
    return model, keras.Model(model.input, model.outputs[1])


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y=None, size=4):
        super().__init__()
        self.x, self.y, self.size = x, y, size

    def __len__(self):
        return -(-len(self.x) // self.size)

    def __getitem__(self, i):
        part = slice(i * self.size, (i + 1) * self.size)
        return (self.x[part],) if self.y is None else (self.x[part], self.y[part])


class Loader:
    """A loader, as PyTorch has, of the batches that it is given."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def rescaling_model(scale):
    """A model with a Rescaling at its input."""
    return keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            keras.layers.Rescaling(scale),
            keras.layers.Flatten(),
        ]
    )


@pytest.mark.backend
class TestEmbed:
    def test_equals_predict_in_order(self, rng):
        model, x = linear_model(), np.float32(rng.normal(size=(10, 4)))
        expected = model.predict(x, verbose=0)
        for batch_size in (1, 3, 10, 64):
            rows = embed(model, x, batch_size=batch_size)
            np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)
            assert rows.dtype == np.float32

    def test_dict_and_tuple_of_arrays(self, rng):
        a, b = keras.Input((2,), name="a"), keras.Input((2,), name="b")
        both = keras.layers.Dense(3)(keras.layers.Concatenate()([a, b]))
        x, y = np.float32(rng.normal(size=(2, 7, 2)))
        by_name = keras.Model({"a": a, "b": b}, both)
        expected = by_name.predict({"a": x, "b": y}, verbose=0)
        got = embed(by_name, {"b": y, "a": x}, batch_size=4)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        got = embed(keras.Model((a, b), both), (x, y), batch_size=4)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

    def test_batches_with_and_without_targets(self, rng):
        model, x = linear_model(), np.float32(rng.normal(size=(10, 4)))
        y = np.arange(10)
        expected = model.predict(x, verbose=0)
        np.testing.assert_allclose(embed(model, Batches(x)), expected, rtol=1e-5)
        rows, targets = embed_with_targets(model, Batches(x, y))
        np.testing.assert_allclose(rows, expected, rtol=1e-5)
        np.testing.assert_array_equal(targets, y)

    def test_a_sampler_is_read_by_its_source(self, rng):
        model, x = linear_model(), np.float32(rng.normal(size=(9, 4)))
        sampler = PKSampler(
            x,
            np.arange(9) % 4,
            classes_per_batch=2,
            samples_per_class=3,
            augment=lambda image, rng: image + 100,
        )
        np.testing.assert_allclose(
            embed(model, sampler), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6
        )

    def test_takes_the_output_with_the_metric_loss(self, rng):
        x = np.float32(rng.normal(size=(5, 4)))
        model, head = two_headed()
        expected = head.predict(x, verbose=0)
        for output in (None, "emb", 1):
            got = embed(model, x, output=output)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        assert embed(model, x, output="probs").shape == (5, 7)

    def test_uncompiled_model_with_several_outputs_asks(self, rng, tmp_path):
        model, head = two_headed()
        model.save(tmp_path / "m.keras")
        loaded = keras.models.load_model(tmp_path / "m.keras", compile=False)
        x = np.float32(rng.normal(size=(5, 4)))
        with pytest.raises(ValueError, match=r"'probs', 'emb'.*output="):
            embed(loaded, x)
        np.testing.assert_allclose(
            embed(loaded, x, output="emb"), head.predict(x, verbose=0), rtol=1e-5
        )
        with pytest.raises(ValueError, match="'probs', 'emb', received 'embedding'"):
            embed(loaded, x, output="embedding")

    def test_subclassed_model_with_several_outputs_asks(self):
        class Two(keras.Model):
            def call(self, x):
                return x, 2 * x

        with pytest.raises(ValueError, match=r"2 outputs.*output="):
            embed(Two(), np.ones((3, 2)))
        np.testing.assert_array_equal(embed(Two(), np.ones((3, 2)), output=1), 2)

    def test_one_trace_for_all_calls(self):
        class Counter(keras.layers.Layer):
            traces = 0

            def call(self, x):
                Counter.traces += 1
                return x

        model = keras.Sequential([keras.Input((4,)), Counter(), keras.layers.Dense(2)])
        embed(model, np.ones((10, 4)), batch_size=4)
        if keras.backend.backend() == "torch":
            pytest.skip("runs eagerly")
        first = Counter.traces
        for n in (4, 7, 8, 100):
            embed(model, np.ones((n, 4)), batch_size=4)
        assert Counter.traces == first

    @pytest.mark.parametrize("dtype", [">f4", ">f8", ">i2"])
    def test_arrays_of_foreign_byte_order(self, rng, dtype):
        model, x = linear_model(), np.round(rng.normal(size=(10, 4)) * 9)
        expected = embed(model, np.float32(x))
        foreign, y = x.astype(dtype), np.arange(10).astype(">i8")
        np.testing.assert_allclose(embed(model, foreign), expected, rtol=1e-5)
        rows, targets = embed_with_targets(model, Batches(foreign, y))
        np.testing.assert_allclose(rows, expected, rtol=1e-5)
        np.testing.assert_array_equal(targets, np.arange(10))

    def test_masked_batches_are_refused(self, rng):
        x, y = np.ones((8, 4), np.float32), np.arange(8)
        for name, batches in (
            ("x", Batches(np.ma.array(x, mask=x > 0), y)),
            ("targets", Batches(x, np.ma.array(y, mask=y == 2))),
        ):
            with pytest.raises(ValueError, match=f"`{name}`.*masked"):
                embed_with_targets(linear_model(), batches)

    def test_a_loader_of_pytorch(self, rng):
        data = pytest.importorskip("torch.utils.data")
        torch = pytest.importorskip("torch")
        model, x = linear_model(), np.float32(rng.normal(size=(10, 4)))
        y = np.arange(10)
        expected = embed(model, x)
        rows = torch.tensor(x, requires_grad=True)
        both = data.TensorDataset(rows, torch.tensor(y))
        got, targets = embed_with_targets(model, data.DataLoader(both, batch_size=4))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(targets, y)
        for alone in (data.TensorDataset(rows), list(x)):
            got = embed(model, data.DataLoader(alone, batch_size=4))
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

    def test_outputs_in_nested_dicts_have_paths(self, rng):
        class Nested(keras.Model):
            def call(self, x):
                return {"head": {"emb": 2 * x, "same": x}, "more": 3 * x}

        x = np.float32(rng.normal(size=(3, 4)))
        np.testing.assert_array_equal(embed(Nested(), x, output="head/emb"), 2 * x)
        for wrong in ("head", "emb"):
            with pytest.raises(ValueError, match=r"'head/emb', 'head/same', 'more'"):
                embed(Nested(), x, output=wrong)

    def test_samples_of_another_shape_are_refused(self):
        pooled = keras.layers.GlobalAveragePooling2D()
        model = keras.Sequential([keras.Input((8, 8, 3)), pooled])
        with pytest.raises(ValueError, match=r"\(8, 8, 3\).*received.*\(9, 8, 3\)"):
            embed(model, np.zeros((4, 9, 8, 3), "float32"))
        with pytest.raises(ValueError, match=r"as a batch: x\[None\]"):
            embed(model, np.zeros((8, 8, 3), "float32"))
        free = keras.Sequential([keras.Input((None, None, 3)), pooled])
        assert embed(free, np.zeros((4, 9, 8, 3), "float32")).shape == (4, 3)

    def test_samples_that_are_no_batch_are_refused(self):
        x, y = np.zeros((3, 8, 8, 3), "float32"), np.arange(3)
        pooled = keras.layers.GlobalAveragePooling2D()
        free = keras.Sequential([keras.Input((None, None, 3)), pooled])
        unbuilt = keras.Sequential([pooled])
        for model, batches in (
            (free, Loader(list(x))),
            (free, Loader(list(zip(x, y, strict=True)))),
            (unbuilt, Loader(list(zip(x, y, strict=True)))),
            (unbuilt, Loader(list(y))),
        ):
            with pytest.raises(ValueError, match=r"`x`: expected a batch.*batch\(64\)"):
                embed(model, batches)

    def test_dicts_without_the_inputs_of_the_model_are_refused(self, rng):
        x, y = np.float32(rng.normal(size=(6, 4))), np.arange(6)
        batch = {"image": x, "label": y}
        unnamed = linear_model()
        entry = keras.Input((4,), name="pixels")
        by_key = keras.Model({"pixels": entry}, keras.layers.Dense(2)(entry))
        for model, key in ((unnamed, unnamed.inputs[0].name), (by_key, "pixels")):
            told = rf"`x`.*'{key}'.*keys \['image', 'label'\].*x\.map\(lambda"
            with pytest.raises(ValueError, match=told):
                embed(model, Loader([batch]))
        entry = keras.Input((4,), name="image")
        named = keras.Model(entry, keras.layers.Dense(2)(entry))
        np.testing.assert_allclose(
            embed(named, Loader([batch])), embed(named, x), rtol=1e-5
        )

    def test_images_that_are_scaled_twice_are_told(self, rng):
        pixels = rng.integers(0, 256, size=(6, 4, 4, 1), dtype=np.uint8)
        model = rescaling_model(1 / 255)
        with pytest.warns(UserWarning, match=r"\[0, 1\].*Rescaling\(0\.00392\).*uint8"):
            embed(model, np.float32(pixels / 255), batch_size=2)
        with pytest.warns(UserWarning, match="scales them again"):
            embed(model, Loader([(pixels / 255, np.arange(6))]))

    def test_images_that_are_scaled_once_are_not_told(self, rng, recwarn):
        pixels = rng.integers(0, 256, size=(6, 4, 4, 1), dtype=np.uint8)
        shares = np.float32(pixels / 255)
        for scale, images in (
            (1 / 255, pixels),
            (1 / 255, np.float32(pixels)),
            (1 / 255, np.uint8(pixels > 99)),
            (1 / 255, np.zeros_like(shares)),
            (1 / 255, 2 * shares - 1),
            (5.0, shares),
        ):
            embed(rescaling_model(scale), images)
        entry = keras.Input((4, 4, 1))
        flat = keras.layers.Flatten()(keras.layers.Rescaling(255.0)(entry))
        inner = keras.layers.Rescaling(1 / 255)(flat)
        embed(keras.Model(entry, inner), shares)
        assert not [one for one in recwarn if "scaled" in str(one.message)]

    def test_texts_go_to_the_model(self):
        texts = np.array(["red fox", "blue whale", "fox"])
        kinds = [texts, texts.astype(object), texts.astype("S"), texts.tolist()]
        if keras.backend.backend() != "tensorflow":
            with pytest.raises(TypeError, match=r"`x`.*TensorFlow"):
                embed(linear_model(), texts)
            return
        import tensorflow as tf

        words = keras.layers.TextVectorization(
            vocabulary=["red", "fox"], output_sequence_length=2, output_mode="int"
        )
        model = keras.Sequential([keras.Input((), dtype="string"), words])
        expected = [[2, 3], [1, 1], [3, 0]]
        for kind in [*kinds, tf.constant(texts)]:
            np.testing.assert_array_equal(embed(model, kind, batch_size=2), expected)

    def test_batch_norm_is_not_disturbed_by_filling(self, rng):
        model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        x = np.float32(rng.normal(size=(7, 4)))
        np.testing.assert_allclose(
            embed(model, x, batch_size=4), embed(model, x, batch_size=7), rtol=1e-6
        )

    def test_views(self, rng):
        images = rng.integers(0, 255, size=(6, 4, 4, 3), dtype=np.uint8)
        model = keras.Sequential(
            [keras.Input((4, 4, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]
        )

        def noise(image, rng):
            return np.uint8(image // 2 + rng.integers(0, 100, size=image.shape))

        augmentation = Augmentation(noise, seed=3)
        got = embed(model, images, augmentation=augmentation, views=3, batch_size=4)
        total = np.zeros((6, 3))
        for view in range(3):
            seen = [augmentation(image, view, i) for i, image in enumerate(images)]
            rows = model.predict(np.stack(seen), verbose=0)
            total += rows / np.linalg.norm(rows, axis=1, keepdims=True)
        total /= np.linalg.norm(total, axis=1, keepdims=True)
        np.testing.assert_allclose(got, total, rtol=1e-4, atol=1e-5)
        one = embed(model, images, augmentation=augmentation)
        seen = [augmentation(image, 0, i) for i, image in enumerate(images)]
        np.testing.assert_allclose(
            one, model.predict(np.stack(seen), verbose=0), rtol=1e-4, atol=1e-4
        )

    def test_mixed_precision_gives_float32(self):
        x = keras.Input((4,))
        rows = keras.layers.Dense(3, dtype="mixed_bfloat16")(x)
        got = embed(keras.Model(x, rows), np.ones((5, 4)))
        assert got.dtype == np.float32
        assert np.isfinite(got).all()

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"batch_size": 0}, "batch_size"),
            ({"views": 0}, "views"),
            ({"views": 2}, "views.*augmentation"),
        ],
    )
    def test_bad_options(self, change, expected):
        with pytest.raises(ValueError, match=expected):
            embed(linear_model(), np.ones((2, 4)), **change)

    def test_bad_data(self):
        model = linear_model()
        with pytest.raises(ValueError, match="at least one"):
            embed(model, np.ones((0, 4)))
        with pytest.raises(ValueError, match="at least one batch"):
            embed(model, Batches(np.ones((0, 4))))
        with pytest.raises(ValueError, match="augmentation"):
            embed(model, Batches(np.ones((2, 4))), augmentation=lambda x: x)
        with pytest.raises(TypeError, match=r"augmentation.*Wrap"):
            embed(model, np.ones((2, 4)), augmentation=lambda x: x)
        image = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Conv2D(2, 3)])
        with pytest.raises(ValueError, match=r"\(batch, dim\).*\(2, 2, 2, 2\)"):
            embed(image, np.ones((2, 4, 4, 1)))

    def test_progress_bar_only_when_asked(self, capsys, monkeypatch):
        monkeypatch.setattr(_progress, "_LONG", 0.0)
        embed(linear_model(), np.ones((6, 4)), batch_size=2)
        assert capsys.readouterr().out == ""
        embed(linear_model(), np.ones((6, 4)), batch_size=2, verbose=True)
        assert "6/6" in capsys.readouterr().out


def test_tf_dataset(rng):
    tf = pytest.importorskip("tensorflow")
    model, x = linear_model(), np.float32(rng.normal(size=(10, 4)))
    y = np.arange(10, dtype=np.int32)
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(10).batch(4)
    rows, targets = embed_with_targets(model, data)
    np.testing.assert_allclose(
        rows, model.predict(x, verbose=0)[targets], rtol=1e-5, atol=1e-6
    )
    alone = tf.data.Dataset.from_tensor_slices(x).batch(4)
    np.testing.assert_allclose(
        embed(model, alone), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="repeat"):
        embed(model, alone.repeat())


def test_a_tf_dataset_of_samples_or_of_dicts_is_refused(rng):
    tf = pytest.importorskip("tensorflow")
    x, y = np.float32(rng.normal(size=(6, 4))), np.arange(6)
    model = linear_model()
    for parts in (x, (x, y), {"image": x, "label": y}):
        data = tf.data.Dataset.from_tensor_slices(parts)
        with pytest.raises(ValueError, match=r"`x`.*(batch\(64\)|x\.map\(lambda)"):
            embed(model, data)
    with pytest.raises(ValueError, match=r"\['image', 'label'\].*x\.map\(lambda"):
        embed(model, data.batch(2))
