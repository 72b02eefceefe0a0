"""Augmentation: the same view for a key everywhere, independent views for others."""

import itertools
import json
import pickle
import sys
import threading
import warnings

import albumentations as A
import keras
import numpy as np
import pytest
from harness import LIGHT, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

from kerastrip.augmentation import pipeline as pipeline_module
from kerastrip.augmentation.keyed_random import KeyedRandom
from kerastrip.augmentation.pipeline import Augmentation

KEYS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4).map(tuple)


def compose(**options):
    """Nested choices, warps, colour and noise: every kind of random draw."""
    return A.Compose(
        [
            A.RandomResizedCrop(size=(24, 24)),
            A.OneOf([A.HorizontalFlip(), A.VerticalFlip(), A.Transpose()], p=0.8),
            A.SomeOf([A.ColorJitter(), A.GaussNoise(), A.CoarseDropout()], n=2),
            A.Rotate(limit=30),
        ],
        **options,
    )


def draw(image, rng):
    return rng.integers(0, 2**32, 2, dtype="uint64")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(3).integers(0, 256, (12, 32, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def aug():
    return Augmentation(compose(), seed=11)


@pytest.fixture(scope="module")
def views(aug, images):
    return aug.batch(images, 4, 2)


def invert(image, **_):
    return 255 - image


# -- the scheme ------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "key", "expected"),
    [
        (0, (), [940848799, 3689535241]),
        (0, (0,), [3725549746, 1506746705]),
        (7, (1, 2, 3), [1040573533, 3875090622]),
        (-1, (2**63 - 1, -(2**63)), [3598790464, 203756032]),
    ],
)
def test_golden_numbers_of_the_scheme(seed, key, expected):
    assert Augmentation(draw, seed)(np.zeros(1), *key).tolist() == expected


class Draws:
    """A pipeline that is not of albumentations, and shows Python's generator."""

    def set_random_state(self, rng, python):
        self.rng, self.python = rng, python

    def __call__(self, image):
        python = self.python
        values = [
            *(python.random(), python.getrandbits(7), python.getrandbits(64)),
            *(python.gauss(0, 1), python.randint(1, 6)),
        ]
        return {"image": np.array(values, dtype=object)}


def test_golden_numbers_of_the_python_generator():
    drawn = Augmentation(Draws(), 3)(np.zeros((2, 2), "uint8"), 1, 2)
    expected = [0.49984111622836225, 66, 0xC4A4CE52F792F9BF, 0.36558676587157546, 6]
    assert drawn.tolist() == pytest.approx(expected, rel=1e-12)
    assert drawn[2] == expected[2]


def test_golden_pixels():
    """Flip, crop and look-up table are exact under any version of OpenCV."""
    aug = Augmentation(
        A.Compose(
            [
                A.HorizontalFlip(),
                A.RandomCrop(2, 2),
                A.Posterize(num_bits=(2, 6), p=1),
            ]
        ),
        seed=5,
    )
    image = np.arange(30, dtype="uint8").reshape(5, 6) * 8
    assert [aug(image, k).tolist() for k in range(4)] == [
        [[160, 144], [208, 192]],
        [[120, 112], [168, 160]],
        [[64, 64], [128, 96]],
        [[32, 40], [80, 88]],
    ]


@settings(max_examples=60, deadline=None)
@given(KEYS, KEYS)
def test_a_key_repeats_and_another_differs(a, b):
    aug, image = Augmentation(draw), np.zeros(1)
    first = aug(image, *a)
    other = aug(image, *b)
    assert np.array_equal(first, aug(image, *a))
    assert np.array_equal(first, other) == (a == b)


def test_the_python_generator_is_uniform_and_keeps_nothing():
    keyed = KeyedRandom()
    keyed.set([1, 2, 3, 4], [0.25, 0.5])
    rng, python = keyed.rng, keyed.python
    assert [python.random(), python.getrandbits(3)] == [0.25, 4]
    bits = [python.getrandbits(5) for _ in range(6400)]
    assert np.bincount(bits, minlength=32).min() > 130  # 200 expected, 5 sigma
    assert python.getrandbits(0) == 0
    assert python.getrandbits(200).bit_length() > 128
    state = rng.bit_generator.state
    first = [python.gauss(), python.sample(range(9), 4), python.uniform(1, 2)]
    rng.bit_generator.state = state
    assert first == [python.gauss(), python.sample(range(9), 4), python.uniform(1, 2)]


# -- pure ------------------------------------------------------------------


def test_any_order_of_calls(aug, images, views):
    for i in [5, 0, 11, 5, 3]:
        np.testing.assert_array_equal(aug(images[i], 4, 2, i), views[i])


def test_parts_of_a_batch_are_the_whole(aug, images, views):
    parts = [aug.batch(images[i : i + 5], 4, 2, first=i) for i in (0, 5, 10)]
    np.testing.assert_array_equal(np.concatenate(parts), views)


def test_rows_of_a_batch_are_taken_where_they_are(aug, images, views):
    rows = np.array([7, 7, 0])
    kept = images.copy()
    expected = aug.batch(images[rows], 4, 2, first=3)
    np.testing.assert_array_equal(aug.batch(images, 4, 2, first=3, rows=rows), expected)
    both = aug.batch({"image": images}, 4, 2, first=3, rows=rows)
    np.testing.assert_array_equal(both["image"], expected)
    np.testing.assert_array_equal(images, kept)


def test_other_seed_epoch_step_position_give_other_views(aug, images):
    image = images[0]
    keys = list(itertools.product(range(3), repeat=3))
    all_views = [aug(image, *key).tobytes() for key in keys]
    all_views += [Augmentation(compose(), seed=12)(image, *k).tobytes() for k in keys]
    assert len(set(all_views)) == len(all_views)


def test_a_callable_may_call_the_augmentation_it_is_part_of():
    def brighter(image, rng):
        noise = rng.integers(0, 100, image.shape, image.dtype)
        if image.flat[0] == 0:
            outer(np.ones_like(image), 7)  # disturbs nothing
        return noise + rng.integers(0, 100, image.shape, image.dtype)

    outer = Augmentation(brighter)
    images = np.zeros((3, 4, 4), np.uint8)
    views = outer.batch(images, 0)
    alone = [outer(image, 0, i) for i, image in enumerate(images)]
    plain = Augmentation(
        lambda image, rng: (
            rng.integers(0, 100, image.shape, image.dtype)
            + rng.integers(0, 100, image.shape, image.dtype)
        )
    )
    np.testing.assert_array_equal(views, alone)
    np.testing.assert_array_equal(views, plain.batch(images, 0))


def test_a_repeated_sample_gets_another_view(aug, images):
    a, b = aug.batch([images[0], images[0]], 4, 2)
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_threads(aug, images, views, count):
    results = {}

    def work(which):
        order = np.random.default_rng(which).permutation(len(images))
        results[which] = {i: aug(images[i], 4, 2, int(i)) for i in order}
        results[which]["batch"] = aug.batch(images, 4, 2)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert len(results) == count
    for result in results.values():
        np.testing.assert_array_equal(result.pop("batch"), views)
        for i, view in result.items():
            np.testing.assert_array_equal(view, views[i])


def test_pickle_json_and_the_pipeline_left_alone(images, views):
    pipeline = compose()
    aug = Augmentation(pipeline, seed=11)
    pipeline.transforms.clear()  # it was copied
    aug(images[0], 1)  # a clone of this thread does not travel
    for again in (
        pickle.loads(pickle.dumps(aug)),
        Augmentation.from_json(aug.to_json()),
    ):
        np.testing.assert_array_equal(again.batch(images, 4, 2), views)


PROCESSES = """
import os, socket, sys, threading

calls = []
socket.getaddrinfo = lambda *a, **k: calls.append(a) or []
os.environ.pop("NO_ALBUMENTATIONS_UPDATE", None)

from kerastrip.augmentation import pipeline

if __name__ == "__main__":
    assert "albumentations" not in sys.modules  # (Keras imports cv2 by itself)

import numpy as np


def views(aug):
    images = np.random.default_rng(3).integers(0, 256, (12, 32, 40, 3), dtype=np.uint8)
    assert not calls, calls
    return aug.batch(images, 4, 2).tobytes().hex()


if __name__ == "__main__":
    import multiprocessing

    text = sys.stdin.read()
    aug = pipeline.Augmentation.from_json(text)
    print(views(aug))
    holding, done = threading.Event(), threading.Event()

    def hold():
        with pipeline._turn:
            holding.set()
            done.wait()

    # A fork while another thread holds the lock must not leave it held.
    threading.Thread(target=hold, daemon=True).start()
    holding.wait()
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(pool.apply_async(views, (aug,)).get(90))
    done.set()
"""


def test_processes_and_no_network(tmp_path, aug, views):
    """Fork, also under a held lock, and spawn; no name is looked up on the way."""
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    # Two processes import Keras, fastest with this backend; an augmentation needs none.
    env = {"NO_ALBUMENTATIONS_UPDATE": None, **LIGHT}
    result = run_script(script, input=aug.to_json(), env=env)
    assert result.stdout.split() == [views.tobytes().hex()] * 3


# -- independent -----------------------------------------------------------


def correlation(a, b):
    return abs(np.corrcoef(a, b)[0, 1])


def test_flips_are_independent():
    """A Compose with a seed gives correlation 1 here; 0.022 is one sigma."""
    aug = Augmentation(A.Compose([A.HorizontalFlip(), A.VerticalFlip()]))
    image = np.arange(4, dtype="uint8").reshape(2, 2)
    corners = np.array([aug(image, k)[0, 0] for k in range(2000)])
    horizontal, vertical = corners % 2, corners // 2
    assert np.bincount(corners, minlength=4).min() > 420
    assert correlation(horizontal, vertical) < 0.09
    assert correlation(horizontal[1:], horizontal[:-1]) < 0.09


def test_a_nested_seed_has_no_say():
    flips = [A.HorizontalFlip(), A.VerticalFlip()]
    seeded = Augmentation(A.Compose([A.Compose(flips, seed=3)]))
    plain = Augmentation(A.Compose([A.Compose(flips)]))
    image = np.arange(4, dtype="uint8").reshape(2, 2)
    corners = [seeded(image, k)[0, 0] for k in range(400)]
    assert corners == [plain(image, k)[0, 0] for k in range(400)]
    assert np.bincount(corners, minlength=4).min() > 65  # 100 expected, 4 sigma


def test_rotation_and_brightness_are_independent():
    aug = Augmentation(
        A.Compose(
            [
                A.Rotate(limit=60, p=1),
                A.RandomBrightnessContrast(0.2, 0, p=1, brightness_by_max=True),
            ]
        )
    )
    y, x = np.mgrid[-10:11, -10:11]
    disc = x**2 + y**2 < 80
    image = (100 + 50 * np.sign(x) * disc).astype("uint8")
    drawn = [aug(image, k).astype(float) for k in range(800)]
    angle = [np.arctan2((v * y * disc).sum(), (v * x * disc).sum()) for v in drawn]
    brightness = [v[disc].mean() for v in drawn]
    assert np.std(angle) > 0.4
    assert np.std(brightness) > 20
    assert correlation(angle, brightness) < 0.14  # 4 sigma


def test_global_generators_are_neither_used_nor_moved(aug, images, views):
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    np.testing.assert_array_equal(aug.batch(images, 4, 2), views)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


# -- batches ---------------------------------------------------------------


def test_views(aug, images, views):
    three = aug.batch(images[:2], 4, 2, views=3)
    assert three.shape == (2, 3, 24, 24, 3)
    for i, v in itertools.product(range(2), range(3)):
        np.testing.assert_array_equal(three[i, v], aug(images[i], 4, 2, i, v))
    assert len({view.tobytes() for view in three.reshape(6, -1)}) == 6


def test_uint8_stays_and_floats_follow_the_pipeline(aug, images, views):
    assert views.dtype == np.uint8
    normalised = Augmentation(A.Compose([A.Normalize()])).batch(images, 0)
    assert normalised.dtype == np.float32
    small = (images / 255).astype("float32")
    assert aug.batch(small, 0).dtype == np.float32


def test_out_is_written_and_returned(aug, images, views):
    for dtype in (np.uint8, np.float32):
        out = np.empty((12, 24, 24, 3), dtype)
        assert aug.batch(images, 4, 2, out=out) is out
        np.testing.assert_array_equal(out, views)
    out = {"image": np.empty((12, 24, 24, 3), np.uint8)}
    result = aug.batch({"image": images}, 4, 2, out=out)
    assert result["image"] is out["image"]


def test_images_are_neither_changed_nor_shared():
    def erase(image, rng):
        image[:] = 0
        return image

    image = np.full((4, 4), 7, "uint8")
    assert not Augmentation(erase)(image, 0).any()
    assert not Augmentation(erase).batch([image], 0).any()
    for aug in (Augmentation.none(), Augmentation(A.Compose([A.NoOp()]))):
        result = aug(image, 0)
        assert not np.shares_memory(result, image)
        np.testing.assert_array_equal(result, image)
    Augmentation(A.AutoContrast(p=1))(image, 0)  # writes into its input
    assert (image == 7).all()
    image.setflags(write=False)
    assert not Augmentation(erase)(image, 0).any()


def test_without_copy_the_views_are_the_same(aug, images, views):
    def count(image, rng):
        image += 1
        return image

    np.testing.assert_array_equal(aug.batch(images.copy(), 4, 2, copy=False), views)
    zeros = np.zeros((2, 4, 4), "uint8")
    assert (Augmentation(count).batch(zeros, 0, views=3, copy=False) == 1).all()
    assert (Augmentation(count).batch(zeros, 0, copy=False) == 1).all()
    assert (zeros == 1).all()  # nothing was copied


def test_images_of_several_sizes(aug, images):
    mixed = [images[0], images[1, :30], images[2, :, :25]]
    assert aug.batch(mixed, 0).shape == (3, 24, 24, 3)
    gray = Augmentation(A.Compose([A.RandomCrop(8, 8)]))
    assert gray.batch(images[..., 0], 0).shape == (12, 8, 8)
    assert gray.batch(images[..., :1], 0).shape == (12, 8, 8, 1)


@pytest.mark.parametrize(("size", "taken"), [(64, 1), (512, 0)])
def test_small_images_take_turns(monkeypatch, size, taken):
    class Turn:
        count = 0

        def __enter__(self):
            self.count += 1

        def __exit__(self, *_):
            pass

    turn = Turn()
    monkeypatch.setattr(pipeline_module, "_turn", turn)
    Augmentation.none().batch(np.zeros((2, size, size), "uint8"), 0)
    assert turn.count == taken


# -- several targets -------------------------------------------------------


@pytest.fixture
def sample(images):
    image = images[0]
    return {
        "image": image,
        "mask": image[..., 0].copy(),
        "masks": [image[..., 1].copy(), image[..., 2].copy()],
        "depth": image[..., 0].copy(),
        "right": image.copy(),
        "bboxes": [[1, 2, 9, 12], [20, 5, 39, 30]],
        "names": ["cat", "dog"],
        "keypoints": [(3.0, 4.0), (30.0, 20.0)],
        "label": 3,
    }


TARGETS = {
    "bbox_params": A.BboxParams("pascal_voc", label_fields=["names"]),
    "keypoint_params": A.KeypointParams("xy"),
    "additional_targets": {"depth": "mask", "right": "image"},
}


def test_targets_are_transformed_alike(sample):
    aug = Augmentation(A.Compose([A.D4(p=1), A.RandomCrop(20, 20)], **TARGETS))
    for key in range(12):
        view = aug(sample, key)
        assert list(view) == list(sample)
        image = view["image"]
        np.testing.assert_array_equal(image, aug(sample, key)["image"])
        np.testing.assert_array_equal(view["mask"], image[..., 0])
        np.testing.assert_array_equal(view["depth"], image[..., 0])
        np.testing.assert_array_equal(view["right"], image)
        np.testing.assert_array_equal(view["masks"][0], image[..., 1])
        assert len(view["bboxes"]) == len(view["names"])
        assert view["label"] == 3
        for (x, y), (u, v) in zip(view["keypoints"], sample["keypoints"], strict=False):
            if len(view["keypoints"]) == 2:
                u, v = int(u), int(v)
                np.testing.assert_array_equal(
                    image[round(y), round(x)], sample["image"][v, u]
                )


@pytest.mark.parametrize("many", [None, 2])
def test_batches_stack_arrays_and_list_the_rest(sample, many):
    pipeline = A.Compose([A.RandomCrop(20, 20), A.HorizontalFlip()], **TARGETS)
    aug = Augmentation(pipeline, seed=1)
    columns = {name: [value] * 3 for name, value in sample.items()}
    columns["image"], columns["mask"] = (
        np.stack(columns["image"]),
        np.stack(columns["mask"]),
    )
    columns["label"] = np.array([3, 1, 2])
    batch = aug.batch(columns, 9, first=5, views=many)
    outer = (3,) if many is None else (3, many)
    assert batch["image"].shape == (*outer, 20, 20, 3)
    assert batch["mask"].shape == batch["depth"].shape == (*outer, 20, 20)
    assert batch["label"].shape == outer
    for name in ("masks", "bboxes", "names", "keypoints"):
        assert isinstance(batch[name], list)
        assert len(batch[name]) == 3
    for i in range(3):
        key = (9, 5 + i) if many is None else (9, 5 + i, 1)
        pick = (lambda c, i=i: c[i]) if many is None else (lambda c, i=i: c[i][1])
        one = aug({**sample, "label": columns["label"][i]}, *key)
        for name in sample:
            np.testing.assert_equal(pick(batch[name]), one[name])


def test_a_callable_gets_the_dict_it_is_given(images):
    def shift(sample, rng):
        return {**sample, "image": sample["image"] // rng.integers(2, 5)}

    result = Augmentation(shift).batch({"image": images, "label": np.arange(12)}, 0)
    assert result["image"].shape == images.shape
    assert result["label"].tolist() == list(range(12))
    untouched = Augmentation.none()({"image": images[0], "name": "a"}, 0)
    assert untouched["name"] == "a"


# -- tf.data ---------------------------------------------------------------


def test_tf_data(aug, images, views):
    tf = pytest.importorskip("tensorflow")
    labels = np.arange(12)
    single = tf.data.Dataset.from_tensor_slices((images, labels))
    spec = tf.TensorSpec((24, 24, 3), tf.uint8)
    for calls in (None, 4):
        mapped = aug.map(single, 4, 2, spec=spec, num_parallel_calls=calls)
        assert mapped.element_spec[0] == spec
        got, kept = zip(*mapped.as_numpy_iterator(), strict=True)
        np.testing.assert_array_equal(np.stack(got), views)
        np.testing.assert_array_equal(kept, labels)
    batched = tf.data.Dataset.from_tensor_slices(images).batch(5)
    spec = tf.TensorSpec((None, 24, 24, 3), tf.uint8)
    parts = list(aug.map(batched, 4, 2, batched=True, spec=spec, num_parallel_calls=4))
    assert [len(part) for part in parts] == [5, 5, 2]
    np.testing.assert_array_equal(np.concatenate(parts), views)


def test_tf_data_counts_on_over_repeats(images):
    tf = pytest.importorskip("tensorflow")
    aug = Augmentation(A.Compose([A.D4(p=1), A.GaussNoise(p=1)]))
    dataset = tf.data.Dataset.from_tensors({"image": images[0, :, :32], "y": 1})
    training = [
        e["image"].tobytes() for e in aug.map(dataset.repeat(4)).as_numpy_iterator()
    ]
    assert len(set(training)) == 4
    frozen = [
        e["image"].tobytes() for e in aug.map(dataset).repeat(2).as_numpy_iterator()
    ]
    assert frozen == training[:1] * 2


def test_tf_data_says_which_spec(aug, images):
    tf = pytest.importorskip("tensorflow")
    dataset = aug.map(tf.data.Dataset.from_tensor_slices(images))
    with pytest.raises(tf.errors.InvalidArgumentError, match="Pass spec="):
        list(dataset)


# -- check -----------------------------------------------------------------


class Own(A.ImageOnlyTransform):
    """What users write: pure, or wrong in one of three ways."""

    def __init__(self, how="pure", strength=3, p=0.05):
        super().__init__(p=p)
        self.how = how
        if how == "forgetful":
            self._strength = strength
        else:
            self.strength = strength
        self.calls = 0

    def apply(self, img, **params):
        self.calls += 1
        by = {
            "pure": lambda: self.py_random.randint(0, 9),
            "global": lambda: int(np.random.randint(99)),  # noqa: NPY002
            "stateful": lambda: self.calls,
            "forgetful": lambda: self._strength,
        }[self.how]()
        return img + np.uint8(by)


@pytest.mark.parametrize("how", ["global", "stateful", "forgetful"])
@pytest.mark.parametrize("nested", [False, True])
def test_check_names_the_culprit(how, nested):
    own = Own(how, strength=5)
    last = A.OneOf([A.Blur(), own]) if nested else own
    pipeline = A.Compose([A.HorizontalFlip(), Own(), last, A.VerticalFlip()])
    aug = Augmentation(pipeline)
    words = "JSON: Own" if how == "forgetful" else f"pure .*: Own.*how='{how}'"
    with pytest.raises(ValueError, match=words):
        aug.check(np.zeros((8, 8), "uint8"))


def test_check_is_content_with_pure_pipelines(aug, images, sample):
    aug.check(images[0])
    Augmentation(A.Compose([Own()])).check(images[0])
    Augmentation(A.Compose([A.RandomCrop(9, 9)], **TARGETS)).check(sample)
    lambdas = [A.Lambda(image=invert)]
    Augmentation(A.Compose(lambdas)).check(images[0])
    Augmentation.none().check(images[0])
    with pytest.raises(ValueError, match="Draw every number from the generators"):
        Augmentation(lambda image, rng: image * np.random.rand()).check(images[0])  # noqa: NPY002


# -- JSON ------------------------------------------------------------------


def test_json_is_self_contained(tmp_path, aug, images, views):
    path = tmp_path / "augmentation.json"
    aug.save(path)
    content = json.loads(path.read_text())
    assert content["scheme"] == 2
    assert content["seed"] == 11
    assert set(content["versions"]) == {"albumentations", "opencv"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Augmentation.load(path)
    np.testing.assert_array_equal(again.batch(images, 4, 2), views)
    assert again.to_json() == aug.to_json()
    assert repr(again) == repr(aug)


def test_saving_replaces_the_file_in_one_step_and_keeps_a_link(tmp_path, aug):
    path, other = tmp_path / "augmentation.json", tmp_path / "other"
    other.write_text("old")
    path.symlink_to(other)
    aug.save(path)
    assert other.read_text() == aug.to_json()
    assert path.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["augmentation.json", "other"]


def test_json_of_none_and_of_targets(sample):
    none = Augmentation.from_json(Augmentation.none().to_json())
    assert repr(none) == "Augmentation(none, seed=0)"
    aug = Augmentation(compose(**TARGETS), seed=4)
    np.testing.assert_equal(
        Augmentation.from_json(aug.to_json())(sample, 3), aug(sample, 3)
    )


def test_json_keeps_its_warnings_to_itself(images):
    """PadIfNeeded does not know on reloading what it has written."""
    aug = Augmentation(A.Compose([A.PadIfNeeded(64, 64), A.RGBShift(), A.SafeRotate()]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Augmentation.from_json(aug.to_json())
    np.testing.assert_array_equal(again(images[0], 1), aug(images[0], 1))


@pytest.mark.parametrize("name", ["albumentations", "opencv", "scheme"])
def test_another_version_warns(aug, name):
    content = json.loads(aug.to_json())
    (content if name == "scheme" else content["versions"])[name] = "0.1"
    with pytest.warns(UserWarning, match=f"written with {name} 0.1, here"):
        Augmentation.from_json(json.dumps(content))


def test_lambdas_come_by_name(images):
    named = A.Lambda(image=invert, name="invert", p=1)
    aug = Augmentation(A.Compose([named, A.HorizontalFlip()]))
    text = aug.to_json()
    again = Augmentation.from_json(text, lambdas={"invert": named})
    np.testing.assert_array_equal(again(images[0], 1), aug(images[0], 1))
    with pytest.raises(ValueError, match="lambdas"):
        Augmentation.from_json(text)
    with pytest.raises(ValueError, match="name"):
        Augmentation(A.Compose([A.Lambda(image=invert)])).to_json()


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", "augmentation.json", '{"seed": 3}', "null", "nan", "\0"),
        *(None, 3, b"\xff", "[" * 100_000, '{"a":' * 100_000),
        '{"scheme": 2, "seed": 0, "versions": 3, "transform": null}',
    ],
)
def test_another_text_is_refused(text):
    with pytest.raises(ValueError, match=r"to_json\(\), received"):
        Augmentation.from_json(text)


def described():
    """A pipeline as its JSON text describes it."""
    some = A.OneOf([A.HorizontalFlip(), A.Blur()])
    return json.loads(Augmentation(A.Compose([some, A.RandomCrop(8, 8)])).to_json())


def test_what_is_wrong_with_a_description_is_told_with_its_place():
    crop, blur = (
        r"transform\.transforms\[1\]",
        r"transform\.transforms\[0\]\.transforms\[1\]",
    )

    def refused(words, change):
        content = described()
        top = content["transform"]
        change(content, top["transforms"][1], top["transforms"][0]["transforms"][1])
        with pytest.raises(ValueError, match=words):
            Augmentation.from_json(json.dumps(content))

    kind = "__class_fullname__"
    refused(f"{blur}.*Blur takes, received 'bogus'", lambda c, _, b: b.update(bogus=3))
    refused(f"RandomCrop at {crop}: ", lambda c, r, _: r.update(height="x"))
    refused(f"{crop}.*with the key '{kind}'", lambda c, r, _: r.pop(kind))
    refused(f"{crop}.*with the key", lambda c, r, _: r.update({kind: [1]}))
    refused("`transform`.*received 'x'", lambda c, *_: c.update(transform="x"))
    refused("a list", lambda c, *_: c["transform"].update(transforms=None))
    refused(crop, lambda c, *_: c["transform"]["transforms"].__setitem__(1, 7))
    refused("`seed`.*an integer", lambda c, *_: c.update(seed="x"))
    refused("no keys but.*'sed'", lambda c, *_: c.update(sed=3))
    refused(f"{crop}.*`lambdas`", lambda c, r, _: r.update({kind: "Lambda"}))


@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.eval", "subprocess.Popen", "numpy.load", "BboxParams"],
)
def test_no_class_but_those_of_transforms_is_called(name):
    content = described()
    content["transform"] = {"__class_fullname__": name, "p": 1}
    with pytest.raises(ValueError, match=f"'{name}' is not known"):
        Augmentation.from_json(json.dumps(content))


def test_a_description_may_not_be_nested_without_end():
    content = described()
    node = {"__class_fullname__": "HorizontalFlip", "p": 1}
    for _ in range(150):
        node = {"__class_fullname__": "Sequential", "transforms": [node], "p": 1}
    content["transform"] = node
    with pytest.raises(ValueError, match="nested at most 50 deep"):
        Augmentation.from_json(json.dumps(content))


def test_a_transform_that_cannot_be_written_is_a_type_error():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        aug = Augmentation(A.Compose([A.HistogramMatching(metadata_key="other")]))
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        aug.to_json()


def test_unknown_transform_and_plain_callable(aug):
    with pytest.raises(ValueError, match="'Mine' is not known"):
        Augmentation.from_json(aug.to_json().replace("RandomResizedCrop", "Mine"))
    with pytest.raises(TypeError, match="ImageOnlyTransform"):
        Augmentation(draw).to_json()


# -- bad input -------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ([A.HorizontalFlip()], "Wrap a list .*Compose"),
        (keras.layers.RandomFlip(), "RandomFlip.* belong into the model"),
        (None, "None"),
        (3, "3"),
    ],
)
def test_pipelines_that_are_none(pipeline, words):
    with pytest.raises(TypeError, match=f"`pipeline`.*{words}"):
        Augmentation(pipeline)


def test_a_callable_is_called_with_an_image_and_a_generator():
    class Own:
        def __call__(self, image, rng, strength=1):
            return image

    for pipeline in (Own(), lambda *both: both[0], np.add, draw):
        Augmentation(pipeline)
    for wrong in (lambda image: image, lambda image, rng, more: image):
        with pytest.raises(
            TypeError, match=r"\(image, rng\) -> image.*lambda image, rng:"
        ):
            Augmentation(wrong)


def test_a_second_argument_that_is_no_generator_is_told_when_it_is_used(images):
    for function in (np.flip, np.roll, np.rot90):
        aug = Augmentation(function)
        for use in (lambda aug: aug(images[0], 0), lambda aug: aug.batch(images, 0)):
            with pytest.raises(TypeError, match="lambda image, rng:") as caught:
                use(aug)
            assert isinstance(caught.value.__cause__, TypeError)


@pytest.mark.parametrize("shape", [(3, 3, 103), (9, 9, 103), (1, 100, 6), (4, 30, 125)])
def test_patches_with_many_bands_and_signals_are_no_channels_first(shape):
    aug = Augmentation(A.Compose([A.HorizontalFlip(p=1)]))
    image = np.random.default_rng(0).random(shape, "float32")
    np.testing.assert_array_equal(aug(image, 0), image[:, ::-1])


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (4, 48, 64), (3, 30, 120)])
def test_channels_first_are_told(shape):
    with pytest.raises(ValueError, match="Channels come last"):
        Augmentation(A.Compose([A.HorizontalFlip()]))(np.zeros(shape, "uint8"), 0)


def test_seed_of_the_compose_warns_once():
    with pytest.warns(UserWarning, match=r"seed of the pipeline \(3\) is not used"):
        aug = Augmentation(compose(seed=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickle.loads(pickle.dumps(aug))
        aug.check(np.zeros((32, 32, 3), "uint8"))


@pytest.mark.parametrize(
    ("key", "error", "words"),
    [
        ((1.0,), TypeError, "`key`.*an integer, received 1.0"),
        (("0",), TypeError, "`key`.*received '0'"),
        (((1, 2),), TypeError, r"`key`.*received \(1, 2\)"),
        ((2**63,), ValueError, "`key`.*64 bits"),
    ],
)
def test_keys_that_are_none(aug, images, key, error, words):
    with pytest.raises(error, match=words):
        aug(images[0], *key)
    with pytest.raises(error, match=words.replace("key", "seed")):
        Augmentation(draw, *key)


def test_numpy_integers_are_keys(aug, images):
    np.testing.assert_array_equal(
        aug(images[0], np.int32(4), np.uint8(2)), aug(images[0], 4, 2)
    )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x: x.astype("float64"), TypeError, "of uint8, or of float32.*convert"),
        (lambda x: x.astype("int64"), TypeError, "of uint8, or of float32.*convert"),
        (
            lambda x: x.astype("float32"),
            ValueError,
            r"\[0, 1\], received values from 0 to 255",
        ),
        (lambda x: x.astype("float32") * np.nan, ValueError, "from nan"),
        (lambda x: x.astype("float32") / 127.5 - 1, ValueError, "from -1 to 1"),
        (lambda x: x[None], ValueError, r"one image.*aug.batch"),
        (lambda x: x[0, 0], ValueError, "one image"),
        (lambda x: x.transpose(2, 0, 1), ValueError, "Channels come last"),
        (lambda x: x.tolist(), TypeError, "a NumPy array"),
        (lambda x: {"image": x, "mask": x[..., 0] > 9}, TypeError, "`mask`.*uint8"),
        (
            lambda x: {"image": x, "mask": x[..., 0].astype("int64")},
            TypeError,
            "`mask`",
        ),
        (lambda x: {"image": x, "masks": [x[..., 0] > 9]}, TypeError, "`masks`"),
        (lambda x: {"image": x, "left": x}, ValueError, "`left`.*additional_targets"),
        (lambda x: {"image": x, "bboxes": [[0, 0, 9, 9]]}, ValueError, "bbox_params"),
        (lambda x: {"image": x, "keypoints": [[0, 0]]}, ValueError, "keypoint_params"),
        (lambda x: {"mask": x}, ValueError, "'image'"),
    ],
)
def test_images_that_are_none(aug, images, change, error, words):
    image = images[0].copy()
    image[0, 0] = [0, 255, 0]
    with pytest.raises(error, match=words):
        aug(change(image), 0)


def test_batches_that_are_none(aug, images):
    with pytest.raises(ValueError, match="at least one image"):
        aug.batch(images[:0], 0)
    with pytest.raises(ValueError, match="one length"):
        aug.batch({"image": images, "mask": images[:3, ..., 0]}, 0)
    with pytest.raises(ValueError, match="`views`"):
        aug.batch(images, 0, views=0)
    for shape, dtype in [((12, 24, 25, 3), "uint8"), ((12, 24, 24, 3), "int8")]:
        with pytest.raises(ValueError, match="`out`"):
            aug.batch(images, 0, out=np.empty(shape, dtype))
    with pytest.raises(ValueError, match=r"one size.*at position \d.*Resize"):
        Augmentation(A.Compose([A.Transpose()])).batch(images, 0)
    mixed = A.OneOf([A.ToFloat(p=1), A.NoOp(p=1)], p=1)
    with pytest.raises(ValueError, match=r"one size and dtype.*float32"):
        Augmentation(A.Compose([mixed])).batch(images, 0)


def test_results_that_are_no_arrays(images):
    with pytest.raises(TypeError, match="an array for an array"):
        Augmentation(lambda image, rng: image.tolist())(images[0], 0)
    with pytest.raises(TypeError, match="a dict for a dict"):
        Augmentation(lambda sample, rng: 0)({"image": images[0]}, 0)
