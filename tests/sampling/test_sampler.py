"""PKSampler: what the model gets, in every mode of working."""

import copy
import gc
import itertools
import pickle
import random
import signal
import threading
import time
import warnings

import keras
import numpy as np
import pytest
from harness import run_script, tensorflow_only, until

from kerastrip import _checks
from kerastrip.augmentation.pipeline import Augmentation
from kerastrip.callbacks import EpochSync
from kerastrip.sampling import batch_parts
from kerastrip.sampling.plan import PKPlan
from kerastrip.sampling.sampler import PKSampler

P, K, SIZE = 4, 3, 6
SHAPE = {"classes_per_batch": P, "samples_per_class": K}
MODES = [
    {"workers": 0},
    {"workers": 1},
    {"workers": 2},
    {"workers": 2, "use_multiprocessing": True},
]
backend = pytest.mark.backend


@pytest.fixture
def labels(rng):
    return rng.permutation(
        np.repeat(np.array([3, 8, 1, 500, 7, 40]), [9, 5, 4, 8, 3, 7])
    )


@pytest.fixture
def images(labels):
    """Images that tell their row: pixel (0, 0) is the position in the source."""
    images = np.zeros((len(labels), SIZE, SIZE, 1), "uint8")
    images[:, 0, 0, 0] = np.arange(len(labels))
    return images


def noise(image, rng):
    """Augmentation that keeps the corner and makes every view unlike the others."""
    image = image.copy()
    image[1:] = rng.integers(0, 256, image[1:].shape)
    return image


def equal(one, other):
    keras.tree.assert_same_structure(one, other)
    for a, b in zip(keras.tree.flatten(one), keras.tree.flatten(other), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def go_through(epochs, x, y, **arguments):
    sampler = PKSampler(x, y, **SHAPE, **arguments)
    for epoch in range(epochs):
        for step in range(len(sampler)):
            sampler.batch(step, epoch)


# -- batches -------------------------------------------------------------------


@backend
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_batch_is_what_plan_source_and_augmentation_make(images, labels, mode):
    sampler = PKSampler(images, labels, **SHAPE, augment=noise, seed=5, **mode)
    plan, augment = PKPlan(labels, **SHAPE, seed=5), Augmentation(noise)
    for epoch, step in itertools.product((0, 3), range(len(sampler))):
        rows = plan.indices(epoch, step)
        x = [augment(images[row], 5, epoch, step, i) for i, row in enumerate(rows)]
        equal(sampler.batch(step, epoch), (np.stack(x), plan.codes[rows]))
    sampler.close()


def test_large_images_are_read_in_parts_and_the_batch_is_the_same(
    images, labels, monkeypatch
):
    class Source:
        labels, reads = None, ()

        def __len__(self):
            return len(images)

        def take(self, indices):
            self.reads += (len(indices),)
            return {"image": images[indices], "index": np.asarray(indices)}

    def batch():
        source = Source()
        sampler = PKSampler(source, labels, **SHAPE, augment={"image": noise}, seed=5)
        source.reads = ()
        return sampler.batch(1, 2), source.reads

    whole, reads = batch()
    assert reads == (P * K,)
    monkeypatch.setattr(batch_parts, "_AT_ONCE", 5 * (images[0].nbytes + 8))
    parts, reads = batch()
    assert reads == (5,) * (P * K // 5) + (P * K % 5,) * (P * K % 5 > 0)
    equal(whole, parts)


@pytest.mark.parametrize("source", [np.asarray, list], ids=["in place", "gathered"])
def test_a_pipeline_that_fails_runs_once_and_one_that_changes_size_is_told(
    images, labels, source
):
    calls, faults = [], []

    def pipeline(image, rng):
        calls.append(1)
        if "error" in faults:
            raise ValueError("what the user wrote")
        return image[:-1] if "size" in faults else image

    sampler = PKSampler(source(images), labels, **SHAPE, augment=pipeline, workers=0)
    faults.append("size")
    with pytest.raises(ValueError, match=r"inputs of step 1 of epoch 0 differ from"):
        sampler.batch(1)
    faults.append("error")
    calls.clear()
    with pytest.raises(ValueError, match="what the user wrote"):
        sampler.batch(1)
    assert len(calls) == 1


@backend
def test_batches_are_p_classes_of_k_rows_side_by_side(images, labels):
    sampler = PKSampler(images, labels, **SHAPE)
    for x, y in sampler:
        groups = y.reshape(P, K)
        assert (groups == groups[:, :1]).all()
        assert len(set(groups[:, 0])) == P
        np.testing.assert_array_equal(sampler.decode(y), labels[x[:, 0, 0, 0]])
    assert y.dtype == np.int32


@backend
def test_batches_are_fresh_and_repeatable(images, labels):
    weights = np.ones(len(labels))
    sampler = PKSampler(images, labels, **SHAPE, sample_weight=weights, augment=noise)
    first, again = sampler[1], sampler[1]
    equal(first, again)
    for array in keras.tree.flatten(first):
        array[:] = 77
    equal(sampler[1], again)
    assert images.max() < len(images)


@backend
def test_a_sampler_is_one_epoch_long_when_iterated(images, labels):
    sampler = PKSampler(images, labels, **SHAPE)
    assert len(list(sampler)) == len(sampler) == len(sampler.plan)
    for step in (-1, len(sampler)):
        with pytest.raises(IndexError, match="step"):
            sampler[step]


@backend
def test_attributes(images, labels):
    sampler = PKSampler(images, labels, **SHAPE, seed=9)
    assert isinstance(sampler.plan, PKPlan)
    np.testing.assert_array_equal(sampler.classes_, np.unique(labels))
    np.testing.assert_array_equal(sampler.classes_[sampler.labels], labels)
    assert sampler.labels.dtype == np.int32
    np.testing.assert_array_equal(sampler.decode(sampler.encode([500, 3])), [500, 3])
    np.testing.assert_array_equal(sampler.source.take([4]), images[[4]])
    assert sampler.epoch == 0
    assert str(sampler.report()) == str(sampler.plan.report())
    assert f"{P} classes x {K} samples, {len(sampler)} batches" in repr(sampler)


@backend
def test_labels_changed_afterwards_change_nothing(images, labels):
    sampler = PKSampler(images, labels, **SHAPE)
    before = sampler.batch(0)
    labels[:] = labels[0]
    equal(sampler.batch(0), before)


@backend
def test_labels_of_the_source_are_the_default(images, labels):
    class Folder:
        def __init__(self):
            self.labels = labels

        def __len__(self):
            return len(images)

        def take(self, indices):
            return images[indices]

    equal(PKSampler(Folder(), **SHAPE)[0], PKSampler(images, labels, **SHAPE)[0])


@backend
def test_inputs_keep_their_structure(images, labels):
    age = np.arange(len(labels), dtype="float32")
    rows = PKPlan(labels, **SHAPE).indices(0, 0)
    for mode in ({}, {"workers": 1, "use_multiprocessing": True}):
        named, _ = PKSampler({"image": images, "age": age}, labels, **SHAPE, **mode)[0]
        equal(named, {"image": images[rows], "age": age[rows]})
        both, _ = PKSampler((images, age.tolist()), labels, **SHAPE, **mode)[0]
        equal(both, (images[rows], age[rows].astype("float64")))


# -- targets and weights ---------------------------------------------------------


@backend
def test_targets(images, labels):
    plan, extra = PKPlan(labels, **SHAPE), np.random.default_rng(1).random((36, 2))
    rows = plan.indices(0, 0)
    codes = plan.codes[rows]
    one_hot = np.eye(len(plan.classes_), dtype="float32")[codes]
    for targets, expected in [
        ("label", codes),
        ("one_hot", one_hot),
        (extra, extra[rows]),
        (("label",), (codes,)),
        (("one_hot", "label"), (one_hot, codes)),
        ({"e": "label", "p": extra}, {"e": codes, "p": extra[rows]}),
    ]:
        _, y = PKSampler(images, labels, **SHAPE, targets=targets)[0]
        equal(y, expected)


@backend
def test_classes_left_out_keep_their_code_and_column(images, labels):
    labels[labels == 7] = 3
    labels[0] = 7  # a single sample
    with pytest.warns(UserWarning, match="7"):
        sampler = PKSampler(images, labels, **SHAPE, targets=("one_hot", "label"))
    for _, (one_hot, codes) in sampler:
        assert one_hot.shape == (P * K, 6)
        np.testing.assert_array_equal(one_hot.argmax(1), codes)
        assert sampler.encode([7]) not in codes


@backend
def test_validation_shares_the_label_table(images, labels):
    train = PKSampler(images, labels, **SHAPE)
    seen = labels != 1
    val = PKSampler(
        images[seen], labels[seen], **SHAPE, targets="one_hot", classes=train.classes_
    )
    x, y = val[0]
    assert y.shape == (P * K, 6)
    rows = np.flatnonzero(seen)[
        [list(np.flatnonzero(seen)).index(r) for r in x[:, 0, 0, 0]]
    ]
    np.testing.assert_array_equal(y.argmax(1), train.encode(labels[rows]))


@backend
def test_weights(images, labels):
    weights, rows = np.arange(36) / 4, PKPlan(labels, **SHAPE).indices(0, 0)
    expected = weights[rows].astype("float32")
    two = {"a": "label", "b": "one_hot"}
    for targets, given, found in [
        ("label", weights, expected),
        (("label", "one_hot"), weights, expected),
        (("label", "one_hot"), (weights, np.ones(36)), (expected, np.ones(12, "f"))),
        (two, {"b": weights, "a": weights}, {"b": expected, "a": expected}),
        (two, (weights, weights), (expected, expected)),
    ]:
        batch = PKSampler(
            images, labels, **SHAPE, targets=targets, sample_weight=given
        )[0]
        equal(batch[2], found)


@pytest.mark.parametrize(
    ("targets", "error", "words"),
    [
        ("labels", ValueError, "targets.*'label'.*Did you mean 'label'"),
        (("label", "onehot"), ValueError, r"targets\[1\].*'one_hot'"),
        ({"p": "onehot"}, ValueError, r"targets\['p'\].*Did you mean 'one_hot'"),
        (["one_hot", "label"], TypeError, "tuple"),
        ((), ValueError, "targets.*at least one"),
        (None, TypeError, "targets.*'label'.*None"),
        (("label", None), TypeError, r"targets\[1\].*None"),
        ((("label",), "label"), TypeError, r"targets\[0\]"),
        (np.zeros(35), ValueError, "targets.*36 rows.*35"),
        (("label", np.zeros((37, 2))), ValueError, r"targets\[1\].*36 rows.*37"),
        (np.array(["a"] * 36), TypeError, "targets.*numbers"),
    ],
)
@backend
def test_targets_that_do_not_work(images, labels, targets, error, words):
    with pytest.raises(error, match=words):
        PKSampler(images, labels, **SHAPE, targets=targets)


@pytest.mark.parametrize(
    ("targets", "weights", "error", "words"),
    [
        ("label", np.ones(35), ValueError, "36 finite weights.*35"),
        ("label", np.full(36, np.nan), ValueError, "finite"),
        ("label", -np.ones(36), ValueError, ">= 0"),
        ("label", ["a"] * 36, TypeError, "sample_weight"),
        ("label", 3.0, TypeError, "sample_weight"),
        ("label", np.array([1.0, None] * 18), TypeError, "None for sample 1"),
        ("label", (np.ones(36),), ValueError, "tuple of 1 for targets='label'"),
        ("label", {"a": np.ones(36)}, ValueError, "dict of ..a.. for targets='label'"),
        (("label", "label"), (np.ones(36),), ValueError, "tuple of 1.*tuple of 2"),
        (("label", "label"), (np.ones(36), None), ValueError, r"\[1\].*np.ones"),
        (("label", "label"), {"a": np.ones(36)}, ValueError, "a dict with the names"),
        ({"a": "label", "b": "label"}, {"a": np.ones(36)}, ValueError, "'a', 'b'"),
        (("label", "label"), [np.ones(36)] * 2, TypeError, "tuple"),
    ],
)
@backend
def test_weights_that_keras_cannot_take(images, labels, targets, weights, error, words):
    with pytest.raises(error, match=words):
        PKSampler(images, labels, **SHAPE, targets=targets, sample_weight=weights)


# -- augmentation ----------------------------------------------------------------


@backend
def test_a_repeated_sample_has_different_views(labels, images):
    sampler = PKSampler(
        images, labels, classes_per_batch=6, samples_per_class=9, augment=noise
    )
    x, _ = sampler[0]
    rows = x[:, 0, 0, 0]
    assert len(set(rows)) < len(rows)
    assert len({view.tobytes() for view in x}) == len(x)


@backend
def test_augmentation_by_input(images, labels):
    alone = PKSampler(images, labels, **SHAPE, augment=noise)[0][0]
    rows = PKPlan(labels, **SHAPE).indices(0, 0)
    age = np.arange(36.0)
    x = {"image": images, "age": age}
    named = PKSampler(x, labels, **SHAPE, augment={"image": Augmentation(noise)})[0][0]
    equal(named, {"image": alone, "age": age[rows]})
    tupled = PKSampler((age, images), labels, **SHAPE, augment=(None, noise))[0][0]
    equal(tupled, (age[rows], alone))


@backend
def test_one_pipeline_transforms_image_and_mask_alike(images, labels):
    A = pytest.importorskip("albumentations")
    turn, pair = A.Compose([A.D4(p=1)]), {"image": images, "mask": images}
    for augment in (turn, Augmentation(turn)):
        x, _ = PKSampler(pair, labels, **SHAPE, augment=augment)[0]
        np.testing.assert_array_equal(x["image"], x["mask"])
        assert (x["image"][:, 0, 0] == 0).any()


@backend
def test_a_bare_pipeline_is_enough(images, labels):
    A = pytest.importorskip("albumentations")
    pipeline = A.Compose([A.RandomCrop(4, 4), A.D4()])
    x, _ = PKSampler(images, labels, **SHAPE, augment=pipeline)[0]
    y, _ = PKSampler(images, labels, **SHAPE, augment=Augmentation(pipeline))[0]
    np.testing.assert_array_equal(x, y)
    assert x.shape == (P * K, 4, 4, 1)


@pytest.mark.parametrize(
    ("x", "augment", "words"),
    [
        ("array", {"image": noise}, "one augmentation, as `x` is one array"),
        ("dict", {"picture": noise}, r"dict of augmentations.*\['image', 'age'\]"),
        ("dict", noise, r"dict of augmentations.*\['image', 'age'\]"),
        ("dict", (noise, None), "dict of augmentations"),
        ("tuple", Augmentation(noise), r"tuple of augmentations.*\[0, 1\]"),
        ("array", [noise], "callable"),
        ("array", 3, "callable"),
    ],
)
@backend
def test_augmentations_that_do_not_fit(images, labels, x, augment, words):
    age = np.arange(36)
    x = {
        "array": images,
        "dict": {"image": images, "age": age},
        "tuple": (images, age),
    }[x]
    with pytest.raises((TypeError, ValueError), match=words):
        PKSampler(x, labels, **SHAPE, augment=augment)


@backend
@pytest.mark.parametrize("mode", [MODES[0], MODES[3]], ids=str)
def test_a_view_of_another_shape_is_refused(images, labels, mode):
    def shrink(image, rng):
        return image[: 5 if image[0, 0, 0] == 30 else 6]

    with pytest.raises(ValueError, match=r"\(5, 6, 1\)|\(12, 5, 6, 1\)"):
        go_through(20, images, labels, augment=shrink, **mode)


@backend
def test_a_batch_unlike_the_first_is_refused(images, labels):
    def cut(image, rng):
        return image[: cut.size]

    cut.size = 6
    sampler = PKSampler(images, labels, **SHAPE, augment=cut, workers=0)
    cut.size = 4
    with pytest.raises(
        ValueError, match=r"step 2 of epoch 1 differ.*\(12, 6, 6, 1\).*\(12, 4, 6, 1\)"
    ):
        sampler.batch(2, 1)


# -- bad input -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": np.zeros((30, 2))}, ValueError, "`x`.*36 samples.*30 samples"),
        ({"x": [np.zeros(36), np.zeros(36)]}, ValueError, "tuple or a dict"),
        ({"x": "folder"}, TypeError, "`x`.*random access"),
        ({"y": None}, ValueError, "`y`.*labels"),
        ({"classes_per_batch": 7}, ValueError, "classes_per_batch"),
        ({"classes_per_batch": 0}, ValueError, "classes_per_batch"),
        ({"batches_per_epoch": 0}, ValueError, "batches_per_epoch"),
        ({"seed": 2**63}, ValueError, "`seed`.*64 bits.*received 9223372036854775808"),
        ({"seed": "a"}, TypeError, "`seed`.*an integer"),
        ({"fixed": 1}, TypeError, "`fixed`.*True or False"),
        ({"use_multiprocessing": "no"}, TypeError, "`use_multiprocessing`.*True"),
        ({"epoch_mode": "cover"}, ValueError, "epoch_mode.*coverage"),
        ({"shard": (2, 2)}, ValueError, "shard"),
        ({"shard": (0, 3)}, ValueError, "shard|classes_per_batch"),
        ({"replicas": 3}, ValueError, "4.*3 replicas|3 replicas.*4"),
        ({"replicas": 0}, ValueError, "replicas.*at least 1"),
        ({"workers": -1}, ValueError, "workers.*at least 0"),
        (
            {"workers": 0, "use_multiprocessing": True},
            ValueError,
            "workers.*at least 1",
        ),
        ({"workers": 1.5}, TypeError, "workers"),
        ({"max_queue_size": 0}, ValueError, "max_queue_size"),
        ({"seed": "a"}, TypeError, "seed"),
    ],
)
@backend
def test_arguments_that_do_not_work(images, labels, change, error, words):
    arguments = {"x": images, "y": labels, **SHAPE, **change}
    with pytest.raises(error, match=words):
        PKSampler(**arguments)


@backend
def test_replicas_must_get_whole_classes(images, labels):
    assert PKSampler(images, labels, **SHAPE, replicas=2).check_replicas(4) is None
    with pytest.raises(
        ValueError, match=r"3 replicas.*received 4.*classes_per_batch=3"
    ):
        PKSampler(images, labels, **SHAPE, replicas=3)
    with pytest.raises(ValueError, match=r"4 replicas on each of 2 hosts.*=8"):
        PKSampler(images, labels, **SHAPE, shard=(0, 2)).check_replicas(4)


@backend
def test_a_row_of_another_shape_is_named(labels):
    rows = [np.zeros((4, 4)) for _ in labels]
    rows[20] = np.zeros((4, 5))
    with pytest.raises(ValueError, match=r"x\[20\].*\(4, 4\).*\(4, 5\)"):
        go_through(5, rows, labels)


# -- epochs ----------------------------------------------------------------------


@backend
def test_an_epoch_counts_when_it_was_begun(images, labels):
    sampler = PKSampler(images, labels, **SHAPE)
    fixed = PKSampler(images, labels, **SHAPE, fixed=True)
    for each in (sampler, fixed):
        each.on_epoch_end()  # as Keras does before the first epoch
    assert sampler.epoch == 0
    first = sampler[0]
    for _ in range(3):
        for each in (sampler, fixed):
            each.on_epoch_begin()
            each.on_epoch_end()
            each.on_epoch_end()
    assert sampler.epoch == 3
    equal(sampler[0], sampler.batch(0, 3))
    assert (sampler[0][0] != first[0]).any()
    assert fixed.epoch == 0
    sampler.set_epoch(0)
    equal(sampler[0], first)


@backend
def test_set_epoch_refuses_nonsense(images, labels):
    with pytest.raises(ValueError, match=r"epoch.*at least 0"):
        PKSampler(images, labels, **SHAPE).set_epoch(-1)
    with pytest.raises(ValueError, match="fixed=True"):
        PKSampler(images, labels, **SHAPE, fixed=True).set_epoch(1)


# -- shards ----------------------------------------------------------------------


@backend
def test_shards_are_the_parts_of_the_global_batch(images, labels):
    whole = PKSampler(images, labels, **SHAPE, augment=noise)
    parts = [
        PKSampler(images, labels, **SHAPE, augment=noise, shard=(i, 2)) for i in (0, 1)
    ]
    for step in range(len(whole)):
        x, y = zip(*(part.batch(step, 1) for part in parts), strict=True)
        equal((np.concatenate(x), np.concatenate(y)), whole.batch(step, 1))


@backend
def test_a_shard_raises_at_the_first_step_out_of_order(images, labels):
    sampler = PKSampler(
        images, labels, **SHAPE, shard=(0, 2), workers=0, batches_per_epoch=20
    )
    for step in [0, 1, *range(20), *range(20), 0, 1, 2]:
        sampler[step]
    with pytest.raises(RuntimeError, match=r"Step 4 .*step 3 was due.*shuffle=False"):
        sampler[4]
    sampler.batch(4)


@backend
def test_class_weight_counts_labels(images):
    names = np.repeat(["ant", "bee", "cat"], 12)
    train = PKSampler(images, names, classes_per_batch=3, samples_per_class=4)
    weights = train.class_weight({"bee": 5.0, "cat": 0})
    assert weights == {1: 5.0, 2: 0.0}
    model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(3)])
    model.compile(
        keras.optimizers.SGD(0.0), lambda y, p: 1.0 + 0.0 * keras.ops.sum(p, axis=-1)
    )
    history = model.fit(train, class_weight=weights, verbose=0).history
    assert history["loss"][0] == pytest.approx((1 + 5 + 0) / 3)
    with pytest.raises(ValueError, match=r"class_weight.*'dog'"):
        train.class_weight({"dog": 1.0})
    two = PKSampler(
        images,
        names,
        classes_per_batch=3,
        samples_per_class=4,
        targets=("one_hot", "label"),
    )
    with pytest.raises(ValueError, match=r"2 outputs.*sample_weight"):
        two.class_weight({"bee": 5.0})


# -- with fit ----------------------------------------------------------------------


class Watched(keras.Model):
    """A model that notes the batches it is trained on."""

    def train_step(self, *args):
        x, (_, labels) = args[-1][:2]
        self.seen.append((to_numpy(x), to_numpy(labels)))
        return super().train_step(*args)


def to_numpy(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor))


def watched(classes=6):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((SIZE, SIZE, 1))
    flat = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
    p = keras.layers.Dense(classes, activation="softmax", name="p")(flat)
    e = keras.layers.Dense(2, name="e")(flat)
    model = Watched(inputs, [p, e])
    model.seen = []
    model.compile(
        keras.optimizers.SGD(0.1),
        loss=["categorical_crossentropy", lambda y, e: keras.ops.mean(e * e, -1)],
        run_eagerly=True,
    )
    return model


class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = batch == 3


@backend
def test_a_stopped_fit_leaves_no_threads(images, labels):
    """Keras' own workers would stay, and the batches in their queue."""
    train = PKSampler(
        images, labels, **SHAPE, targets=("one_hot", "label"), batches_per_epoch=20
    )
    watched().fit(train, verbose=0, callbacks=[Stop()])
    before = threading.active_count()
    for _ in range(2):
        watched().fit(train, verbose=0, callbacks=[Stop()])
    assert until(lambda: threading.active_count() <= before)


@backend
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_fit_sees_exactly_the_batches_of_its_epochs(images, labels, mode):
    arguments = {**SHAPE, "targets": ("one_hot", "label"), "augment": noise, **mode}
    train = PKSampler(images, labels, **arguments)
    val = PKSampler(images, labels, **arguments, fixed=True)
    model = watched()
    history = model.fit(
        train,
        validation_data=val,
        epochs=4,
        initial_epoch=1,
        shuffle=False,
        verbose=0,
        callbacks=[EpochSync(train)],
    )
    keys = itertools.product((1, 2, 3), range(len(train)))
    for seen, (epoch, step) in zip(model.seen, keys, strict=True):
        x, (_, codes) = train.batch(step, epoch)
        equal(seen, (x.astype(seen[0].dtype), codes.astype(seen[1].dtype)))
    assert history.history["loss"][-1] < history.history["loss"][0]
    # With the weights standing still a fixed validation is always the same.
    assert model.evaluate(val, verbose=0) == model.evaluate(val, verbose=0)
    for sampler in (train, val):
        sampler.close()


@backend
@pytest.mark.parametrize("length", [1, 4])
def test_without_sync_the_first_epoch_is_0(images, labels, length):
    for workers in (0, 2):
        train = PKSampler(
            images,
            labels,
            **SHAPE,
            targets=("one_hot", "label"),
            batches_per_epoch=length,
            workers=workers,
        )
        model = watched()
        model.fit(train, epochs=2, shuffle=False, verbose=0)
        model.fit(train, epochs=1, shuffle=False, verbose=0)
        keys = itertools.product((0, 1, 2), range(length))
        for seen, (epoch, step) in zip(model.seen, keys, strict=True):
            np.testing.assert_array_equal(seen[1], train.batch(step, epoch)[1][1])


@backend
def test_shuffle_permutes_steps_and_not_their_content(images, labels):
    train = PKSampler(
        images, labels, **SHAPE, targets=("one_hot", "label"), batches_per_epoch=20
    )
    random.seed(0)
    model = watched()
    model.fit(train, epochs=1, verbose=0, callbacks=[EpochSync(train)])
    seen = [x.astype("uint8").tobytes() for x, _ in model.seen]
    due = [train.batch(step, 0)[0].tobytes() for step in range(20)]
    assert seen != due
    assert sorted(seen) == sorted(due)


@tensorflow_only
def test_a_shuffled_shard_stops_fit(images, labels):
    train = PKSampler(
        images,
        labels,
        **SHAPE,
        targets=("one_hot", "label"),
        shard=(1, 2),
        batches_per_epoch=20,
    )
    watched().fit(train, epochs=2, shuffle=False, verbose=0)
    random.seed(0)
    with pytest.raises(Exception, match="shuffle=False"):
        watched().fit(train, verbose=0)


@tensorflow_only
def test_sys_exit_surfaces(images, labels):
    def leave(image, rng):
        if leave.now:
            raise SystemExit(3)
        return image

    leave.now = False
    train = PKSampler(
        images, labels, **SHAPE, targets=("one_hot", "label"), augment=leave
    )
    leave.now = True
    with pytest.raises(Exception, match=r"sys.exit\(3\).*step . of epoch 0"):
        watched().fit(train, verbose=0)


@backend
def test_weights_reach_the_loss(images, labels):
    def loss_with(weights):
        train = PKSampler(
            images, labels, **SHAPE, targets=("one_hot", "label"), sample_weight=weights
        )
        return watched().evaluate(train, verbose=0, return_dict=True)["loss"]

    none, one, both = (
        loss_with(weights)
        for weights in (np.zeros(36), (np.ones(36), np.zeros(36)), np.ones(36))
    )
    assert none == 0
    assert 0 < one < both


LIFE = """
import os, signal, sys, threading, time
# A shell may have started the tests with Ctrl-C switched off.
signal.signal(signal.SIGINT, signal.default_int_handler)
import keras, numpy as np
from kerastrip.callbacks import EpochSync
from kerastrip.sampling.sampler import PKSampler

parent = os.getpid()

def augment(row, rng):
    if row[0] == fatal and os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.001)
    return row

def fit(**mode):
    x, y = np.arange(24.0)[:, None], np.repeat(np.arange(6), 4)
    train = PKSampler(x, y, classes_per_batch=4, samples_per_class=2, augment=augment,
                      batches_per_epoch=20000, **mode)
    model = keras.Sequential([keras.layers.Dense(6, activation="softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(train, callbacks=[EpochSync(train), Interrupt()], shuffle=False, verbose=0)

class Interrupt(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 20:
            threading.Timer(0.1, os.kill, (parent, signal.SIGINT)).start()

fatal = -1
"""
INTERRUPT = """
try:
    fit(**{mode})
except KeyboardInterrupt:
    print("interrupted", flush=True)
    raise
"""


@tensorflow_only
def test_a_killed_worker_ends_fit_and_ctrl_c_the_process():
    script = """
fatal = 7
try:
    fit(workers=2, use_multiprocessing=True)
except Exception as error:
    print("A worker process of the sampler died (exit code -9)" in str(error), flush=True)
fatal = -1
"""
    script = LIFE + script + INTERRUPT.format(mode={"workers": 1})
    done = run_script(script, exit_code=-signal.SIGINT)
    assert done.stdout.split() == ["True", "interrupted"], done.stderr


@pytest.mark.slow
@tensorflow_only
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_ctrl_c_ends_the_process_every_time(mode):
    for _ in range(8):
        script = LIFE + INTERRUPT.format(mode=mode)
        done = run_script(script, exit_code=-signal.SIGINT)
        assert done.stdout.split() == ["interrupted"], done.stderr


@pytest.mark.slow
@tensorflow_only
def test_replicas_of_a_mirrored_strategy_get_whole_classes():
    script = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration() for _ in range(2)]
)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
x, y = np.arange(24.0)[:, None], np.repeat(np.arange(6), 4)

def loss(labels, y):
    labels = tf.reshape(tf.cast(labels, tf.int32), (-1,))
    tf.print("labels", labels, output_stream=sys.stdout, summarize=-1)
    return tf.reduce_mean(y * y, axis=-1)

def fit(classes):
    with strategy.scope():
        model = keras.Sequential([keras.layers.Dense(6)])
        model.compile("sgd", loss)
    train = PKSampler(x, y, classes_per_batch=classes, samples_per_class=2,
                      workers=0, replicas=1)
    model.fit(train, callbacks=[EpochSync(train)], shuffle=False, verbose=0)

fit(4)
with strategy.scope():
    model = keras.Sequential([keras.layers.Dense(6)])
    model.compile("sgd", "sparse_categorical_crossentropy")
train = PKSampler(x, y, classes_per_batch=4, samples_per_class=2)
for epochs in (1, 3):
    model.fit(train, epochs=epochs, shuffle=False, verbose=0)
    print("epoch", train.epoch)
try:
    fit(5)
except ValueError as error:
    print(error)
"""
    done = run_script(LIFE + script)
    seen = [
        [int(code) for code in line[line.index("[") + 1 : -1].split()]
        for line in done.stdout.splitlines()
        if line.startswith("labels")
    ]
    assert len(seen) == 2 * 3, done.stdout + done.stderr
    assert "epoch 1\nepoch 4\n" in done.stdout
    for a, b, c, d in seen:
        assert a == b != c == d
    assert "2 replicas" in done.stdout
    assert "classes_per_batch=4" in done.stdout


@backend
def test_the_pool_ends_with_its_sampler(images, labels):
    sampler = PKSampler(images, labels, **SHAPE, workers=1, use_multiprocessing=True)
    sampler[0]
    worker = sampler._pool._workers[0].process
    del sampler
    gc.collect()
    worker.join(10)
    assert not worker.is_alive()


@backend
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_copies_have_workers_of_their_own_and_the_same_batches(images, labels, mode):
    arguments = {**SHAPE, "targets": ("one_hot", "label"), "augment": noise, **mode}
    train = PKSampler(images, labels, **arguments)
    train.set_epoch(3)
    train[0]
    for copied in (copy.deepcopy(train), pickle.loads(pickle.dumps(train))):
        assert copied.epoch == 3
        copied.set_epoch(2)
        for step in range(len(train)):
            equal(copied[step], train.batch(step, 2))
        copied.close()
    assert train.epoch == 3
    equal(train[1], train.batch(1, 3))
    assert copy.deepcopy(train).source is train.source  # the data are not copied
    train.close()


@backend
def test_a_closed_sampler_gives_no_batches(images, labels):
    sampler = PKSampler(images, labels, **SHAPE, workers=1, use_multiprocessing=True)
    sampler[0]
    sampler.close()
    sampler.close()
    with pytest.raises(RuntimeError, match="closed"):
        sampler[1]


# -- tf.data and figures -------------------------------------------------------------


def test_as_dataset_is_an_epoch_and_the_next_time_the_next(images, labels):
    sampler = PKSampler(
        {"image": images},
        labels,
        **SHAPE,
        targets=("one_hot", "label"),
        sample_weight=np.ones(36),
        augment={"image": noise},
    )
    dataset = sampler.as_dataset(2)
    assert dataset.element_spec[0]["image"].shape == (P * K, SIZE, SIZE, 1)
    assert dataset.element_spec[1][0].shape == (P * K, 6)
    assert int(dataset.cardinality()) == len(sampler)
    for epoch in (2, 3):
        batches = list(dataset.as_numpy_iterator())
        assert len(batches) == len(sampler)
        for step, batch in enumerate(batches):
            equal(batch, sampler.batch(step, epoch))
    sampler.set_epoch(9)
    equal(next(dataset.as_numpy_iterator()), sampler.batch(0, 9))
    with pytest.raises(ValueError, match="epoch"):
        sampler.as_dataset(-1)


def test_as_dataset_of_a_fixed_sampler_repeats(images, labels):
    sampler = PKSampler(images, labels, **SHAPE, augment=noise, fixed=True)
    dataset = sampler.as_dataset()
    for _ in range(2):
        for step, batch in enumerate(dataset.as_numpy_iterator()):
            equal(batch, sampler.batch(step, 0))


@tensorflow_only
@pytest.mark.parametrize("options", [{}, {"steps_per_epoch": True}], ids=str)
@pytest.mark.parametrize("synced", [True, False])
def test_fit_takes_the_dataset(images, labels, options, synced):
    train = PKSampler(
        images, labels, **SHAPE, targets=("one_hot", "label"), augment=noise
    )
    model = watched()
    model.fit(
        train.as_dataset(1),
        initial_epoch=1,
        epochs=4,
        shuffle=False,
        verbose=0,
        callbacks=[EpochSync(train)] if synced else [],
        **{name: len(train) for name in options},
    )
    keys = itertools.product((1, 2, 3), range(len(train)))
    for seen, (epoch, step) in zip(model.seen, keys, strict=True):
        np.testing.assert_array_equal(seen[0], train.batch(step, epoch)[0])


@backend
def test_plot_batch_draws_a_row_for_each_class(images, labels, tmp_path):
    pytest.importorskip("matplotlib")
    sampler = PKSampler({"age": labels, "image": images}, labels, **SHAPE)
    figure = sampler.plot_batch(1, epoch=2, path=tmp_path / "batch.png")
    assert (tmp_path / "batch.png").stat().st_size > 0
    codes = sampler.batch(1, 2)[1]
    names = [text.get_text() for text in figure.axes[0].texts[1:]]
    assert names == [str(name) for name in sampler.decode(codes[::K])]
    assert len(figure.axes[0].images) == P * K
    assert figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="images"):
        PKSampler(labels, labels, **SHAPE).plot_batch(0)


class Brighter:
    """A source of its own kind that happens to have an `array`."""

    def __init__(self, array):
        self.array = array

    def __len__(self):
        return len(self.array)

    def take(self, indices):
        return self.array[indices] + 100


def test_a_source_with_an_array_is_still_asked_for_its_samples():
    images = np.zeros((8, 4, 4, 1), "uint8")
    shape = {"classes_per_batch": 2, "samples_per_class": 2, "workers": 0}
    for x, value in ((images, 0), (Brighter(images), 100)):
        train = PKSampler(x, np.arange(8) % 2, augment=Augmentation.none(), **shape)
        assert (train[0][0] == value).all()


# -- inputs that are no images, and labels among them ------------------------------


TEXTS = [f"{name} {i}" for name in ("red fox", "old owl") for i in range(6)]
OF_TEXTS = {"classes_per_batch": 2, "samples_per_class": 3, "workers": 0}


def test_texts_reach_a_model_that_begins_with_text_vectorization():
    tf = pytest.importorskip("tensorflow")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("texts are for TensorFlow")
    vectorize = keras.layers.TextVectorization(output_sequence_length=4)
    vectorize.adapt(tf.constant(TEXTS))
    model = keras.Sequential(
        [
            keras.Input((), dtype="string"),
            vectorize,
            keras.layers.Embedding(20, 4),
            keras.layers.GlobalAveragePooling1D(),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    labels = np.arange(12) // 6
    for x in (TEXTS, np.array(TEXTS), np.array(TEXTS, object), tf.constant(TEXTS)):
        train = PKSampler(x, labels, **OF_TEXTS)
        texts, _ = train[0]
        rows = train.plan.indices(0, 0)
        assert [text.decode() for text in texts.numpy()] == [TEXTS[i] for i in rows]
        batch, _ = next(iter(train.as_dataset()))
        assert batch.numpy().tolist() == texts.numpy().tolist()
        history = model.fit(train, verbose=0, shuffle=False).history
    assert np.isfinite(history["loss"]).all()
    with pytest.raises(TypeError, match=r"`use_multiprocessing`.*texts"):
        PKSampler(TEXTS, labels, **{**OF_TEXTS, "workers": 1}, use_multiprocessing=True)
    with pytest.raises(TypeError, match=r"`targets\[1\]`.*numbers"):
        PKSampler(TEXTS, labels, **OF_TEXTS, targets=("label", np.array(TEXTS)))


@backend
def test_texts_are_refused_where_no_model_takes_them():
    if keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow has tensors of texts")
    with pytest.raises(TypeError, match=r"takes no texts.*tokens"):
        PKSampler(TEXTS, np.arange(12) // 6, **OF_TEXTS)


@backend
@pytest.mark.parametrize("kind", [dict, tuple])
def test_labels_among_the_samples_of_a_data_set_are_told(kind):
    labels = np.arange(24) % 6
    rows = [(np.zeros(2), 10 - label) for label in labels]
    age = [(np.zeros(2), i % 4) for i in range(24)]
    if kind is dict:
        rows, age = ([{"image": a, "n": b} for a, b in part] for part in (rows, age))
    shape = {"classes_per_batch": 2, "samples_per_class": 2, "workers": 0}
    with pytest.warns(UserWarning, match=r"Entry ('n'|1) of the samples") as caught:
        PKSampler(rows, labels, **shape)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PKSampler(age, labels, **shape)
        # Whoever names the inputs means them, as a layer with a margin needs labels.
        PKSampler((np.zeros((24, 2)), labels), labels, **shape)


def test_a_warning_of_a_thread_shows_no_line_of_the_package():
    def both():
        code = compile("_checks.warn('told')", "kerastrip/x.py", "exec")
        exec(code, {"__name__": "kerastrip.x", "_checks": _checks})
        thread = threading.Thread(target=_checks.warn, args=("told",))
        thread.start()
        thread.join()

    with pytest.warns(UserWarning, match="told") as caught:
        both()
    assert [w.filename for w in caught] == [__file__, "sys"]


@backend
def test_arrays_of_another_byte_order_give_the_same_batches(labels):
    values = np.arange(len(labels) * 2, dtype="float32").reshape(-1, 2)
    swapped = values.astype(values.dtype.newbyteorder("S"))
    noise = Augmentation(lambda image, rng: image)
    for augment in (None, noise):
        batches = [
            PKSampler(
                x.reshape(-1, 1, 2, 1),
                labels,
                **SHAPE,
                targets=("label", x),
                sample_weight=x[:, 0],
                augment=augment,
                workers=0,
            )[0]
            for x in (values, swapped)
        ]
        equal(*batches)
        arrays = keras.tree.flatten(batches[1])
        assert all(array.dtype.isnative for array in arrays)


@backend
@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (np.nan, "nan for sample 5"),
        (np.inf, "inf for sample 5"),
        (-1.0, "-1.0 for sample 5"),
        (np.ma.masked, "1 masked, the first at position 5"),
    ],
)
def test_weights_that_are_none_are_named(images, labels, weight, words):
    weights = (
        np.ma.ones(len(labels)) if weight is np.ma.masked else np.ones(len(labels))
    )
    weights[5] = weight
    with pytest.raises(ValueError, match=rf"`sample_weight`.*{words}"):
        PKSampler(images, labels, **SHAPE, sample_weight=weights)


class OneFile:
    """A data set that keeps one file open."""

    def __init__(self, path, rows):
        np.repeat(np.arange(rows, dtype="uint8"), 9000).tofile(path)
        self.rows, self.file = rows, open(path, "rb", 0)  # noqa: SIM115

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        self.file.seek(9000 * index)
        time.sleep(1e-4)
        return np.frombuffer(self.file.read(9000), "uint8")


@pytest.mark.parametrize("mode", MODES[2:])
def test_a_data_set_with_an_open_file_gives_the_rows_of_the_plan(
    labels, mode, tmp_path
):
    data = OneFile(tmp_path / "rows", len(labels))
    # Both at once, as validation runs while training looks ahead.
    train = PKSampler(data, labels, **SHAPE, **mode)
    val = PKSampler(data, labels, **SHAPE, workers=1, fixed=True)
    try:
        for epoch in range(8):
            train.set_epoch(epoch)
            for step in range(len(train)):
                for sampler in (train, val):
                    rows = sampler.plan.indices(sampler.epoch, step)
                    assert (sampler[step][0] == rows[:, None]).all()
    finally:
        train.close()
        val.close()
