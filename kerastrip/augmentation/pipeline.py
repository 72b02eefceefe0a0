"""Image augmentation as a pure function of a key.

Every random number of an augmented image is a function of (seed, *key). No image draws
from a stream that other images draw from too, so the order of the calls, the thread and
the process do not matter.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import math
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import keras
import numpy as np

from kerastrip import _checks
from kerastrip._files import refuse_devices, write_whole
from kerastrip._version import __version__
from kerastrip.augmentation import pipeline_data, serialization
from kerastrip.augmentation.keyed_random import SCHEME, KeyedRandom

__all__ = [
    "Augmentation",
]

# albumentations asks the network for a newer version in every process that
# imports it, unless this variable is set. It is set when this module is imported, because
# a worker process imports albumentations already while it unpickles a pipeline.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

# Threads that augment small images at once spend their time handing the
# interpreter lock to each other: two are half as fast as one. So batches of
# small images take turns. Larger ones stay long enough inside OpenCV, which
# lets other threads run.
_SMALL = 160 * 160
_turn = threading.RLock()


def _new_turn() -> None:
    """A new lock after a fork: a thread that is not in the fork may hold the old one."""
    global _turn
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_turn)


def _unchanged(image: Any, rng: np.random.Generator) -> Any:
    return image


class Augmentation:
    """An augmentation pipeline as a pure function of (seed, *key).

        aug(image, *key) == aug(image, *key)

    holds for any order of calls, in any thread, in any process, after pickle
    and after JSON, and different keys give independent draws. In a sampler the
    key is (sampler seed, epoch, step, position in the batch), so that a sample
    which occurs twice in one batch gets two views.

    An image gives an image. A dict of targets (image, mask, boxes, keypoints, further
    images) gives a dict with the same keys, and all targets are transformed alike.
    uint8 stays uint8, unless the pipeline converts it. Scale in the model
    (`keras.layers.Rescaling(1 / 255)`), not in the pipeline, where scaling is slow.

    Args:
        pipeline: an albumentations `Compose` or transform (anything with
            `set_random_state`), which is copied, or any callable
            `(image, rng) -> image`, which is used as it stands. `rng` is a
            `numpy.random.Generator` of the key; a callable that draws every
            number from it, and keeps nothing, is pure.
        seed: integer of 64 bits. Default 0.

    Raises:
        TypeError: `pipeline` is neither a transform nor a callable, or a callable that
            does not take two arguments, or `seed` is not an integer.

    Warns:
        UserWarning: the Compose has a seed of its own. This seed is not used: a seeded
            Compose gives every transform the *same* random numbers, so that
            for example HorizontalFlip and VerticalFlip only ever occur
            together.

    NumPy's, Python's and TensorFlow's global generators are not touched. OpenCV has a
    generator for each thread. albumentations' noises (GaussNoise, ShotNoise, ...) set it
    by `cv2.setRNGSeed` in the thread that runs them. OpenCV cannot tell its state, so the
    state is not restored.

    Results are equal bit for bit under one version of albumentations and
    OpenCV; between OpenCV versions rotated and resized pixels may differ by a
    few grey levels.

    Example:
        >>> import albumentations as A
        >>> import numpy as np
        >>> aug = Augmentation(A.Compose([A.RandomCrop(24, 24), A.HorizontalFlip()]))
        >>> image = np.arange(32 * 32 * 3, dtype="uint8").reshape(32, 32, 3)
        >>> view = aug(image, 0, 5, 1)  # epoch 0, step 5, position 1
        >>> view.shape, view.dtype
        ((24, 24, 3), dtype('uint8'))
        >>> bool((view == aug(image, 0, 5, 1)).all())
        True
        >>> aug.batch([image, image], 0, 5).shape
        (2, 24, 24, 3)

        Any callable works in place of albumentations:

        >>> darker = Augmentation(lambda image, rng: image // rng.integers(2, 4))
        >>> darker(np.full((1, 2), 60), 0)
        array([[20, 20]])
    """

    def __init__(self, pipeline: Any, seed: int = 0):
        self.seed = _checks.integer64("seed", seed)
        self._seedable = hasattr(pipeline, "set_random_state")
        if self._seedable:
            pipeline = deepcopy(pipeline)
            if getattr(pipeline, "seed", None) is not None:
                _checks.warn(
                    f"The seed of the pipeline ({pipeline.seed}) is not used: a "
                    "seeded Compose gives all its transforms the same random "
                    "numbers, so that they are not independent. Leave it out of the "
                    "Compose and pass it to Augmentation.",
                )
                pipeline.seed = None
        else:
            _check_callable(pipeline)
        self._pipeline = pipeline
        self._idle: list[_Clone] = []

    @classmethod
    def none(cls) -> Augmentation:
        """An Augmentation that changes nothing.

        Example:
            >>> import numpy as np
            >>> Augmentation.none()(np.array([[3]]), 0)
            array([[3]])
        """
        return cls(_unchanged)

    def __repr__(self) -> str:
        name = "none" if self._pipeline is _unchanged else self._pipeline
        return f"Augmentation({name}, seed={self.seed})"

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_idle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._idle = []

    # -- one image ---------------------------------------------------------

    def __call__(self, image: Any, *key: int) -> Any:
        """The view of one image that belongs to a key.

        Args:
            image: array (height, width) or (height, width, channels), uint8 or
                float32 in [0, 1]; or a dict of targets, see `batch`. It is not
                modified and the result shares no memory with it. (A plain
                callable takes whatever it can work on.)
            *key: integers of 64 bits, any number of them, even none. Keys of
                different length are different keys.

        Returns:
            The augmented image, or a dict with the same keys.

        Raises:
            TypeError: a key that is no integer, an image that is no array or of
                another dtype, a bool mask.
            ValueError: an image of the wrong rank or range, a target that the
                pipeline does not know.
        """
        with self._clone(bare=not isinstance(image, dict)) as clone:
            (draws,) = clone.random.draws(self.seed, key, 1)
            return self._view(clone, draws, image)

    @contextlib.contextmanager
    def _clone(self, bare: bool) -> Iterator[_Clone]:
        """A clone of the pipeline that nobody else uses at the moment.

        Other threads have other clones, and so has a callable that calls this
        Augmentation again. `_idle` holds the clones that are free; a clone is made when
        there is none.

        Args:
            bare: True for images, False for dicts of targets.
        """
        try:
            clone = self._idle.pop()
        except IndexError:
            clone = _Clone(self._pipeline, self._seedable)
        if getattr(self._pipeline, "is_check_shapes", False):
            # The check compares the shapes of the targets: an image alone needs no check.
            clone.pipeline.is_check_shapes = not bare
        try:
            yield clone
        finally:
            self._idle.append(clone)

    def _view(self, clone: _Clone, draws: Any, image: Any, copy: bool = True) -> Any:
        """The view of an image.

        Args:
            clone: of the pipeline.
            draws: an item of `KeyedRandom.draws`.
            image: array or dict of targets.
            copy: False: the pipeline may write into the image, or return it.
        """
        run = clone.pipeline
        clone.random.set(*draws)
        own = _copied if copy else _same
        if not self._seedable:
            try:
                result = run(own(image), clone.random.rng)
            except TypeError as error:
                raise TypeError(
                    f"The pipeline failed: {error}. A callable is called with the image "
                    "and a numpy.random.Generator. If its second argument is something "
                    "else, write lambda image, rng: function(image)."
                ) from error
        elif isinstance(image, dict):
            pipeline_data.check_targets(run, image)
            result = run(**{name: own(value) for name, value in image.items()})
            result = {name: result[name] for name in image}
        else:
            pipeline_data.check_image("image", image)
            result = run(image=own(image))["image"]
        if not isinstance(result, dict if isinstance(image, dict) else np.ndarray):
            raise TypeError(
                "The pipeline must give an array for an array and a dict for a dict, "
                f"received {type(result).__name__} for {type(image).__name__}. "
                "Transforms to tensors have no place in it."
            )
        return result

    # -- many images -------------------------------------------------------

    def batch(
        self,
        images: Any,
        *key: int,
        first: int = 0,
        rows: Any = None,
        views: int | None = None,
        out: Any = None,
        copy: bool = True,
    ) -> Any:
        """A batch of views: image i under the key (*key, first + i).

        Args:
            images: array (batch, height, width[, channels]), or a list of images,
                which may differ in size if the pipeline makes them equal; or a
                dict of such arrays and lists by target (image, mask, ...), in
                which boxes and keypoints are lists.
            *key: the beginning of the keys of all images.
            first: position of the first image; not 0 for a piece of a larger batch.
            rows: which of `images` to take, integers (batch,). It costs less than to
                gather large images before the call. Default: all images.
            views: number of views of each image, at least 1; view v of image i
                has the key (*key, first + i, v). None, the default: one view
                with the key (*key, first + i).
            out: array (or dict of arrays) to write into, of the result's shape,
                any dtype that holds the result's. Default: a new one.
            copy: False if nobody needs `images` any more. A few transforms write
                into their input, so the input is copied by default. Several views are
                always made of copies. Default True.

        Returns:
            Array (batch, height, width[, channels]), with `views`
            (batch, views, height, width[, channels]). A dict gives a dict: boxes,
            keypoints, their labels and `masks` as lists, because their number may
            change, and everything else stacked.

        Raises:
            ValueError: no images, lists of different lengths, augmented images
                of different sizes or dtypes, an `out` that does not fit.

        Example:
            Two views of each image, and a mask that goes with its image:

            >>> import albumentations as A
            >>> import numpy as np
            >>> aug = Augmentation(A.Compose([A.RandomCrop(6, 6), A.D4()]), seed=1)
            >>> images = np.zeros((4, 8, 8, 3), "uint8")
            >>> aug.batch(images, 0, views=2).shape
            (4, 2, 6, 6, 3)
            >>> both = aug.batch({"image": images, "mask": images[..., 0]}, 0)
            >>> both["image"].shape, both["mask"].shape
            ((4, 6, 6, 3), (4, 6, 6))
        """
        samples = pipeline_data.samples(images, rows)
        shape: tuple[int, ...] = (len(samples),)
        if views is not None:
            shape += (_checks.integer("views", views, minimum=1),)
            copy = True
        bare = not isinstance(images, dict)
        collected = pipeline_data.CollectedViews(
            self._pipeline, shape, {"image": out} if bare else out
        )
        turn = _turn if _is_small(samples[0]) else contextlib.nullcontext()
        with turn, self._clone(bare) as clone:
            # An index is (image,) or (image, view), and the draws come in the same order.
            keyed = self._draws(clone.random, key, first, shape)
            indices = itertools.product(*map(range, shape))
            for index, draws in zip(indices, keyed, strict=True):
                view = self._view(clone, draws, samples[index[0]], copy)
                for name, value in ({"image": view} if bare else view).items():
                    collected.put(index, name, value)
        targets = collected.targets()
        return targets["image"] if bare else targets

    def _draws(
        self, random: KeyedRandom, key: tuple[int, ...], first: int, shape: Any
    ) -> Iterator[Any]:
        """An item of `KeyedRandom.draws` for each view, image after image.

        Args:
            random: makes the draws.
            key: the beginning of all keys.
            first: position of the first image.
            shape: (batch,) or (batch, views).
        """
        count, *views = shape
        if not views:
            return random.draws(self.seed, (*key, first), count)
        return itertools.chain.from_iterable(
            random.draws(self.seed, (*key, first + i, 0), *views) for i in range(count)
        )

    def map(
        self,
        dataset: Any,
        *key: int,
        batched: bool = False,
        spec: Any = None,
        num_parallel_calls: int | None = None,
    ) -> Any:
        """A `tf.data.Dataset` of views: image i under the key (*key, i).

        Images are counted, not batches: before or after `batch`, the views are
        the same. Every pass over the dataset begins at 0 and gives the same
        views, which suits validation. For training repeat first, then map, so
        that the count runs on: `aug.map(dataset.repeat(epochs))`, and
        `steps_per_epoch` in `fit`.

        Args:
            dataset: its elements are images, or tuples that begin with one, whose
                rest passes through; instead of an image a dict of targets.
            *key: the beginning of the keys of all images.
            batched: whether the elements are batches. Batches cost less, because
                one call from TensorFlow to Python takes 35 to 60 microseconds.
            spec: `tf.TensorSpec` of the augmented image (or batch, or a dict of
                specs). Default: the spec of the image, which is right unless the
                pipeline changes the size or the dtype.
            num_parallel_calls: as in `tf.data.Dataset.map`. More than one pays for
                large images only.

        Returns:
            The dataset, in the same order and structure.

        Raises:
            tf.errors.InvalidArgumentError: when iterated, if the pipeline gives
                another shape or dtype than `spec`.

        Example:
            >>> import albumentations as A
            >>> import numpy as np
            >>> import tensorflow as tf
            >>> images, labels = np.zeros((5, 8, 8, 3), "uint8"), np.arange(5)
            >>> dataset = tf.data.Dataset.from_tensor_slices((images, labels))
            >>> aug = Augmentation(A.Compose([A.RandomCrop(6, 6)]))
            >>> small = tf.TensorSpec((6, 6, 3), tf.uint8)
            >>> aug.map(dataset, spec=small).batch(5).element_spec[0].shape
            TensorShape([None, 6, 6, 3])
        """
        import tensorflow as tf

        element = dataset.element_spec
        paired = isinstance(element, tuple)
        given = element[0] if paired else element
        if spec is None:
            spec = given
        tf.nest.assert_same_structure(given, spec)
        specs = tf.nest.flatten(spec)

        def count(first: Any, element: Any) -> Any:
            # All leaves of an element have as many images as the first one.
            leaf = tf.nest.flatten(element)[0]
            size = tf.shape(leaf, tf.int64)[0] if batched else tf.ones((), tf.int64)
            return first + size, (first, element)

        def views(first: Any, *leaves: Any) -> list:
            images = tf.nest.pack_sequence_as(given, leaves)
            if batched:
                images = self.batch(images, *key, first=int(first))
            else:
                images = self(images, *key, int(first))
            results = [np.asarray(leaf) for leaf in tf.nest.flatten(images)]
            for leaf, expected in zip(results, specs, strict=True):
                _check_spec(expected, tf.TensorSpec(leaf.shape, leaf.dtype))
            return results

        def augment(first: Any, element: Any) -> Any:
            images = element[0] if paired else element
            leaves = tf.numpy_function(
                views,
                [first, *tf.nest.flatten(images)],
                [expected.dtype for expected in specs],
            )
            for leaf, expected in zip(leaves, specs, strict=True):
                leaf.set_shape(expected.shape)
            images = tf.nest.pack_sequence_as(spec, leaves)
            return (images, *element[1:]) if paired else images

        # `scan` runs in order, so the count does not depend on parallel calls of `map`.
        numbered = dataset.scan(tf.zeros((), tf.int64), count)
        return numbered.map(augment, num_parallel_calls)

    def check(self, image: Any) -> None:
        """Looks for transforms that are no pure functions, or change in JSON.

        A transform of your own is no pure function of the key if it draws from
        `np.random` or `random`, or if it keeps something from call to call. A transform
        that does not store its arguments under their own names loses them in JSON.
        64 keys are used twice, in another order the second time, and once more
        after JSON (if the pipeline can be written), with every transform applied.

        Args:
            image: an image or a dict of targets that the pipeline can work on.

        Raises:
            ValueError: a transform fails the test; the message names the first one.

        Example:
            >>> import numpy as np
            >>> Augmentation(lambda image, rng: image + rng.normal()).check(np.ones(3))
            >>> Augmentation(lambda image, rng: image + np.random.rand()).check(np.ones(3))
            Traceback (most recent call last):
            ...
            ValueError: Not a pure function of its key: ...
        """
        try:
            lambdas = {str(getattr(t, "name", "")): t for t in _leaves(self._pipeline)}
            reloaded = self.from_json(self.to_json(), lambdas=lambdas)
        except (TypeError, ValueError):
            reloaded = self
        keys = range(64)
        for (transform, part), (_, part_reloaded) in zip(
            self._prefixes(), reloaded._prefixes(), strict=True
        ):
            views = [part(image, key) for key in keys]
            if not _are_equal(views, [part(image, key) for key in keys[::-1]][::-1]):
                raise ValueError(
                    f"Not a pure function of its key: {transform!r} gave two results "
                    "for one key. Draw every number from the generators that it is "
                    "given (self.py_random and self.random_generator, or rng), and "
                    "keep nothing from call to call."
                )
            if not _are_equal(views, [part_reloaded(image, key) for key in keys]):
                raise ValueError(
                    f"Not the same after JSON: {transform!r}. Store each argument of "
                    "__init__ in an attribute of the same name."
                )

    def _prefixes(self) -> Iterator[tuple[Any, Augmentation]]:
        """The pipeline up to each of its transforms in turn, then as it is.

        Yields (last transform, pipeline). The last transform of the shortest pipeline
        that fails a test is the culprit. For the transforms A, B and C:

            A with p=1, B and C with p=0
            A and B with p=1, C with p=0
            A, B and C with p=1
            the pipeline with the probabilities that it has
        """
        if self._seedable:
            for last, transform in enumerate(_leaves(self._pipeline)):
                part = deepcopy(self._pipeline)
                for node in _nodes(part):
                    node.p = 1.0
                for leaf in _leaves(part)[last + 1 :]:
                    leaf.p = 0.0
                yield transform, Augmentation(part, self.seed)
        yield self._pipeline, self

    # -- as text -----------------------------------------------------------

    def to_json(self) -> str:
        """The pipeline, the seed and the versions as JSON text.

        Returns:
            Text for `from_json`. Beside a saved model it makes training and
            inference repeatable; `save` writes it to a file.

        Raises:
            TypeError: the pipeline is a plain callable, or holds a value that
                JSON cannot.
            ValueError: an albumentations Lambda without a name.
        """
        transform: Any = None
        if self._pipeline is not _unchanged:
            if not hasattr(self._pipeline, "to_dict"):
                raise TypeError(
                    f"A plain callable cannot be written as JSON: {self._pipeline!r}. "
                    "Write it as a subclass of albumentations.ImageOnlyTransform that "
                    "draws from self.random_generator, or as an "
                    "albumentations.Lambda(name=...); or pickle the Augmentation."
                )
            transform = serialization.written(self._pipeline)
        content = {
            "kerastrip": __version__,
            "scheme": SCHEME,
            "seed": self.seed,
            "versions": {} if transform is None else _versions(),
            "transform": transform,
        }
        return json.dumps(content, indent=1, default=serialization.plain) + "\n"

    @classmethod
    def from_json(
        cls, text: str, *, lambdas: Mapping[str, Any] | None = None
    ) -> Augmentation:
        """The Augmentation that `to_json` described.

        Args:
            text: the return value of `to_json`.
            lambdas: albumentations `Lambda` transforms by their names; their
                functions are not in the text. Transform classes of your own must have
                been imported.

        Raises:
            ValueError: the text is not from `to_json`; or a transform is not known, or
                does not take one of the arguments: the message names the place in the
                text. Only classes of transforms are ever called.

        Warns:
            UserWarning: written under another version of albumentations,
                OpenCV or of the key scheme: the views may differ.

        Example:
            >>> import albumentations as A
            >>> aug = Augmentation(A.Compose([A.HorizontalFlip(p=0.3)]), seed=7)
            >>> again = Augmentation.from_json(aug.to_json())
            >>> again.seed, again.to_json() == aug.to_json()
            (7, True)
        """
        scheme, seed, versions, transform = serialization.read(text)
        if transform is None:
            return cls(_unchanged, seed)
        current = {"scheme": SCHEME, **_versions()}
        written = {"scheme": scheme, **versions}
        changed = [
            f"{name} {written.get(name)}, here {current[name]}"
            for name in current
            if current[name] != written.get(name)
        ]
        if changed:
            _checks.warn(
                f"The augmentation was written with {'; '.join(changed)}: "
                "its views may differ from those it was trained with.",
            )
        return cls(serialization.pipeline(transform, lambdas or {}), seed)

    def save(self, path: str | os.PathLike) -> None:
        """Write `to_json()` to a file, such as augmentation.json beside a model.

        Args:
            path: the file; one that exists is replaced, in one step.

        Raises:
            TypeError, ValueError, OSError: as `to_json`; the file cannot be written.
        """
        write_whole(path, self.to_json())

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, lambdas: Mapping[str, Any] | None = None
    ) -> Augmentation:
        """`from_json` of a file that `save` wrote.

        Args:
            path: the file.
            lambdas: as in `from_json`.

        Raises:
            ValueError, OSError: as `from_json`; the file cannot be read.

        Example:
            >>> import albumentations as A, pathlib, tempfile
            >>> path = pathlib.Path(tempfile.mkdtemp(), "augmentation.json")
            >>> Augmentation(A.Compose([A.VerticalFlip()]), seed=3).save(path)
            >>> Augmentation.load(path).seed
            3
        """
        refuse_devices("path", path)
        return cls.from_json(
            pathlib.Path(path).read_text(encoding="utf-8"), lambdas=lambdas
        )


class _Clone:
    """A copy of a pipeline, and the random numbers from which all its transforms draw.

    Args:
        pipeline: the pipeline of an `Augmentation`.
        seedable: whether the pipeline takes generators by `set_random_state`. Other
            pipelines are callables, which are not copied.
    """

    def __init__(self, pipeline: Any, seedable: bool):
        self.random = KeyedRandom()
        self.pipeline = pipeline
        if seedable:
            self.pipeline = deepcopy(pipeline)
            # Not set_random_seed: it gives every transform the same numbers.
            self.pipeline.set_random_state(self.random.rng, self.random.python)


def _check_callable(function: Any) -> None:
    """TypeError unless `function` can be called with an image and a generator."""
    if isinstance(function, keras.Layer) or not callable(function):
        expected = "an albumentations transform or a callable (image, rng) -> image"
        advice = ""
        if isinstance(function, keras.Layer):
            advice = "Keras layers belong into the model."
        elif isinstance(function, Sequence):
            advice = "Wrap a list of transforms in albumentations.Compose."
        raise _checks.type_error("pipeline", expected, function, advice)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a builtin function without a signature
    try:
        signature.bind(None, None)
    except TypeError:
        name = getattr(function, "__name__", type(function).__name__)
        raise _checks.type_error(
            "pipeline",
            "a callable (image, rng) -> image",
            _checks.Told(f"{name}{signature}"),
            "It is called with the image and a numpy.random.Generator, whether it "
            "needs one or not: lambda image, rng: function(image).",
        ) from None


def _check_spec(expected: Any, received: Any) -> None:
    if not expected.is_compatible_with(received):
        advice = "Pass spec=tf.TensorSpec(shape, dtype) of what the pipeline gives."
        words = _checks.Told(f"{received} from the pipeline")
        raise _checks.value_error("spec", str(expected), words, advice)


def _is_small(row: Any) -> bool:
    image = row.get("image", ()) if isinstance(row, dict) else row
    return math.prod(np.shape(image)[:2]) <= _SMALL


def _copied(value: Any) -> Any:
    return np.array(value) if isinstance(value, np.ndarray) else value


def _same(value: Any) -> Any:
    return value


def _are_equal(a: Any, b: Any) -> bool:
    try:
        np.testing.assert_equal(a, b)
    except AssertionError:
        return False
    return True


def _nodes(pipeline: Any) -> Iterator[Any]:
    """A pipeline and all transforms in it."""
    yield pipeline
    for transform in getattr(pipeline, "transforms", ()):
        yield from _nodes(transform)


def _leaves(pipeline: Any) -> list:
    return [node for node in _nodes(pipeline) if not hasattr(node, "transforms")]


def _versions() -> dict[str, str]:
    import albumentations
    import cv2

    return {"albumentations": albumentations.__version__, "opencv": cv2.__version__}
