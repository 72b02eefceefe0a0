"""The embeddings of a data set by a trained model, on every Keras backend."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Set
from typing import Any

import keras
import numpy as np

from kerastrip import _checks
from kerastrip._outputs import Output, embedding_output
from kerastrip.evaluation._progress import progress
from kerastrip.evaluation.search import unit_rows
from kerastrip.sources import as_source

__all__ = [
    "batches_of",
    "embed",
    "embed_with_targets",
    "is_batches",
    "is_sampler",
    "source_of",
]


def embed(
    model: Any,
    x: Any,
    *,
    output: int | str | None = None,
    batch_size: int = 128,
    augmentation: Any = None,
    views: int = 1,
    verbose: bool = False,
) -> np.ndarray:
    """The embeddings of `x` by a model: every sample once, in order.

    With `augmentation`, sample i is seen as `augmentation(sample, view, i)` for
    view = 0 ... views - 1, and for `views > 1` the embedding is the direction of
    the mean of the normalised embeddings of the views:

        e_i = normalise(1 / views * sum_v normalise(model(aug(x_i, v, i))))

    The model runs through `predict_on_batch` on batches of one size. The last batch is
    filled up to that size, so that the model is traced once, however often `embed` is
    called.

    Args:
        model: a Keras model, compiled or not.
        x: the data to embed: an (n, ...) array; dict or tuple of arrays; a
            `kerastrip.sources` object; a sampler, whose source is read (no
            repeats, no augmentation); or batches from a `tf.data.Dataset`, a
            `keras.utils.PyDataset` or a `DataLoader` of PyTorch, of inputs or of
            (inputs, targets, ...). Only a model on TensorFlow takes texts.
        output: name or position of the embedding among the outputs of the model; where
            the outputs are nested dicts its path: "head/embedding". None takes the
            output whose compiled loss has a `distance`, or else the only output.
        batch_size: rows per call of the model, at least 1. Where `x` gives batches,
            they keep their size. Default 128.
        augmentation: `kerastrip.Augmentation` for test-time views. Default None.
        views: augmented views per sample, at least 1. Default 1.
        verbose: whether to show a progress bar once it takes over two seconds.
            Default False.

    Returns:
        (n, dim) float32 array.

    Raises:
        TypeError, ValueError: if the arguments do not fit each other, `x` holds no
            samples or holds dicts that lack an input of the model, several outputs may
            be the embedding, or the embedding is not (batch, dim).

    Warns:
        UserWarning: for images of floats in [0, 1], if a `Rescaling` by 1 / 100 or less at
            the input of the model scales them again.

    Example:

    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> embed(model, np.ones((5, 4))).shape
    (5, 2)
    """
    return embed_with_targets(
        model,
        x,
        output=output,
        batch_size=batch_size,
        augmentation=augmentation,
        views=views,
        verbose=verbose,
    )[0]


def embed_with_targets(
    model: Any,
    x: Any,
    *,
    output: int | str | None = None,
    batch_size: int = 128,
    augmentation: Any = None,
    views: int = 1,
    verbose: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """The embeddings of `x`, and the targets of the embedding if `x` gives targets.

    Returns:
        (n, dim) float32 embeddings, and the (n, ...) targets of the embedding output,
        or None. Both come from one pass over `x`, so a shuffled dataset may have
        another order in every pass.
    """
    batches, total = _batches(x, batch_size, augmentation, views)
    chosen = embedding_output(model, output)
    single = output is None and chosen.count == 1
    show = progress(total, "sample", verbose)
    rows: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    done = size = 0
    for inputs, target in batches:
        if not rows:  # the first batch
            _warn_of_scaled_twice(model, inputs[0])
        by_view = [_run(model, chosen, view, size, single) for view in inputs]
        size = max(size, len(by_view[0]))
        embeddings = by_view[0]  # (batch, dim)
        if views > 1:
            mean = np.mean([unit_rows(view) for view in by_view], axis=0)
            embeddings = unit_rows(mean)
        rows.append(embeddings)
        if target is not None:
            targets.append(_array(chosen.part_of(_one_array(target)), "targets"))
        done += len(embeddings)
        show(done)
    if not rows:
        raise _checks.value_error("x", "at least one batch", x)
    return np.concatenate(rows), np.concatenate(targets) if targets else None


def is_batches(x: Any) -> bool:
    """Whether `x` gives batches (`tf.data.Dataset`, `PyDataset`), not samples.

    An object that can be iterated and has a length, but cannot be indexed, counts as a
    loader of batches, such as PyTorch's `DataLoader`.
    """
    if is_sampler(x) or isinstance(x, Set):
        return False
    if hasattr(x, "as_numpy_iterator") or isinstance(x, keras.utils.PyDataset):
        return True
    # An array has `__getitem__`, a source has `take`, and a generator has no length.
    return (
        hasattr(x, "__iter__")
        and hasattr(x, "__len__")
        and not (hasattr(x, "__getitem__") or hasattr(x, "take"))
    )


def is_sampler(x: Any) -> bool:
    """Whether `x` draws batches from a source: has `source` and `labels`, but no `take`."""
    return hasattr(x, "source") and hasattr(x, "labels") and not hasattr(x, "take")


def source_of(x: Any) -> Any:
    """The source that a sampler reads, or a source of the samples `x`."""
    return as_source(x.source if is_sampler(x) else x)


def _batches(
    x: Any, batch_size: int, augmentation: Any, views: int
) -> tuple[Iterator[tuple[list[Any], Any]], int | None]:
    """The batches of `x`, and its number of samples (None if `x` gives batches).

    Each batch is ([inputs of view 0, inputs of view 1, ...], targets or None).
    """
    batch_size = _checks.integer("batch_size", batch_size, 1)
    views = _checks.integer("views", views, 1)
    if augmentation is None and views > 1:
        advice = "Without it every view is the same."
        raise _checks.value_error("views", "1 without `augmentation`", views, advice)
    if is_batches(x):
        if augmentation is not None:
            expected = "None for data that come in batches"
            advice = "Pass the images as an array or a source."
            raise _checks.value_error("augmentation", expected, augmentation, advice)
        return _read_batches(x), None
    if augmentation is not None and not hasattr(augmentation, "batch"):
        advice = "Wrap the pipeline: Augmentation(pipeline)."
        raise _checks.type_error(
            "augmentation", "an Augmentation", augmentation, advice
        )
    source = source_of(x)
    return _take_batches(source, batch_size, augmentation, views), len(source)


def batches_of(x: Any) -> Iterator[Any]:
    """The batches of a dataset; those of a `tf.data.Dataset` as NumPy arrays."""
    if hasattr(x, "as_numpy_iterator"):
        return x.as_numpy_iterator()
    if hasattr(x, "__getitem__"):
        return (x[i] for i in range(len(x)))
    return iter(x)


def _read_batches(x: Any) -> Iterator[tuple[list[Any], Any]]:
    """([inputs], targets or None) for each batch of a dataset."""
    if hasattr(x, "as_numpy_iterator") and int(x.cardinality()) == -1:
        advice = "Leave out its `.repeat()`."
        raise _checks.value_error("x", "a dataset that ends", x, advice)
    for batch in batches_of(x):
        if isinstance(batch, (tuple, list)):  # a list: PyTorch's loader
            target = batch[1] if len(batch) > 1 else None
            if getattr(target, "shape", None) == ():
                raise _no_batch("samples with one target each")
            yield [batch[0]], target
        else:
            yield [batch], None


def _take_batches(
    source: Any, batch_size: int, augmentation: Any, views: int
) -> Iterator[tuple[list[Any], None]]:
    """([inputs of each view], None) for each batch of the samples of a source, in order."""
    for first in range(0, len(source), batch_size):
        samples = source.take(np.arange(first, min(first + batch_size, len(source))))
        if augmentation is None:
            yield [samples], None
            continue
        yield [augmentation.batch(samples, v, first=first) for v in range(views)], None


def _run(
    model: Any, chosen: Output, inputs: Any, size: int, single: bool
) -> np.ndarray:
    """The embeddings of one batch, which is filled up to `size` rows for the model.

    Args:
        size: rows of the largest batch so far; 0 in the first call.
        single: whether the model seemed to have a single output.
    """
    _check_names(model, inputs)
    inputs = keras.tree.map_structure(_sample_array, inputs)
    arrays = keras.tree.flatten(inputs)
    _check_shape(model, arrays)
    count = len(arrays[0])  # rows before the batch is filled up

    def fill(array: np.ndarray) -> np.ndarray:
        if array.dtype == np.float64:
            array = array.astype(keras.config.floatx())
        if len(array) < size:
            array = np.concatenate([array, np.repeat(array[-1:], size - count, axis=0)])
        return array

    outputs = model.predict_on_batch(keras.tree.map_structure(fill, inputs))
    # A subclassed model shows its outputs only when it has run. If they are a dict, the
    # key of the compiled loss with a `distance` tells which of them is the embedding.
    marked = hasattr(chosen.loss, "distance") and isinstance(outputs, dict)
    single = single and not (marked and chosen.name in outputs)
    if single and isinstance(outputs, (list, tuple, dict)) and len(outputs) > 1:
        raise _checks.value_error(
            "output",
            "the position or name of the embedding",
            _checks.Told(f"None for a model with {len(outputs)} outputs"),
            "Give output=....",
        )
    rows = np.asarray(chosen.part_of(outputs))
    if rows.ndim != 2:
        raise _checks.value_error(
            "output",
            "an embedding of shape (batch, dim)",
            rows,
            "Flatten or pool it in the model, or name another output.",
        )
    # Under a distribution strategy every replica has returned all the rows.
    return rows[:count].astype("float32")


def _sample_array(value: Any) -> np.ndarray:
    """Samples as an array; an error for texts on JAX and PyTorch."""
    array = _array(value, "x")
    if array.dtype.kind in "OSUT" and keras.backend.backend() != "tensorflow":
        raise _checks.type_error(
            "x",
            "numbers, as only TensorFlow has tensors of texts",
            array,
            "Turn the texts into numbers before they come here.",
        )
    return array


def _check_shape(model: Any, arrays: list[np.ndarray]) -> None:
    """An error for samples of another shape than the only input of the model.

    Keras may not notice: a network with global pooling runs on images of any size, but
    its embeddings are worth something only for the size that it was trained with.
    """
    if any(array.ndim == 0 for array in arrays):
        raise _no_batch("numbers or texts without an axis")
    wanted = [tuple(one.shape) for one in _inputs(model)]
    if len(wanted) != 1 or len(arrays) != 1:
        return
    (expected,), shape = wanted, arrays[0].shape
    # Keras itself turns (n,) into (n, 1).
    single = len(shape) == len(expected) - 1 and expected[1:] != (1,)
    if single and _fits(shape[1:], expected[2:]):
        raise _no_batch(f"samples of shape {shape}")
    if len(shape) == len(expected) and not _fits(shape[1:], expected[1:]):
        raise _checks.value_error(
            "x",
            f"samples of shape {expected[1:]}, as the model has been built for",
            _checks.Told(f"samples of shape {shape[1:]}"),
        )


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether a shape is as expected, where None allows any number."""
    pairs = zip(shape, expected, strict=True)
    return all(side in (None, given) for given, side in pairs)


def _no_batch(received: str) -> ValueError:
    """The error for data that are not in batches."""
    return _checks.value_error(
        "x",
        "a batch of samples, or batches of (inputs, targets)",
        _checks.Told(received),
        "Give a single sample as a batch: x[None], and a tf.data.Dataset of "
        "samples in batches: x.batch(64).",
    )


def _inputs(model: Any) -> list[Any]:
    """The symbolic inputs of a model; [] for a subclassed model, which has none."""
    return list(getattr(model, "inputs", None) or ())


def _check_names(model: Any, inputs: Any) -> None:
    """An error for a dict that lacks an input of the model."""
    if not (isinstance(inputs, Mapping) and _inputs(model)):
        return
    own = getattr(model, "input", None)
    names = [*own] if isinstance(own, Mapping) else [one.name for one in _inputs(model)]
    if set(names) <= set(inputs):
        return
    raise _checks.value_error(
        "x",
        f"batches of (inputs, targets), or dicts with the inputs of the model, {names}",
        _checks.Told(f"a dict with the keys {[*inputs]}"),
        "Take the inputs out of the dict. For a tf.data.Dataset this is "
        "x.map(lambda d: (d['image'], d['label'])).",
    )


def _warn_of_scaled_twice(model: Any, inputs: Any) -> None:
    """Warns if images in [0, 1] meet a `Rescaling` that is meant for 0 ... 255.

    Args:
        inputs: the first batch.
    """
    given = inputs
    if not isinstance(inputs, Mapping):
        names = [one.name for one in _inputs(model)]
        given = dict(zip(names, keras.tree.flatten(inputs), strict=False))
    for layer in model.layers if _inputs(model) else ():
        if not isinstance(layer, keras.layers.Rescaling):
            continue
        scale = np.max(np.abs(layer.scale))
        source: Any = getattr(layer, "input", None)  # perhaps an input of the model
        images = [given.get(one.name) for one in _inputs(model) if one is source]
        if scale <= 0.01 and images and _is_scaled(images[0]):
            _checks.warn(
                "The images reach the model scaled to [0, 1] and its "
                f"Rescaling({scale:.3g}) scales them again: give uint8 (0 to 255), or "
                "take the layer away."
            )


def _is_scaled(images: Any) -> bool:
    """Whether images are floats in [0, 1], and not all black."""
    images = _array(images, "x")
    if not np.issubdtype(images.dtype, np.floating) or not images.size:
        return False
    return bool(images.min() >= 0 and 0 < images.max() <= 1)


def _array(value: Any, name: str) -> np.ndarray:
    """Inputs or targets of a batch as an array that every backend reads rightly."""
    if hasattr(value, "detach"):  # PyTorch: perhaps on another device, with a gradient
        value = value.detach().cpu()
    _checks.refuse_masked(name, value)
    return _checks.native(np.asarray(value))


def _one_array(target: Any) -> Any:
    """Targets; a list of names or numbers becomes the array of one output's targets.

    Otherwise a list is the targets of several outputs, and stays.
    """
    if isinstance(target, (list, tuple)) and all(
        isinstance(one, (str, bytes, numbers.Number)) for one in target
    ):
        return np.asarray(target)
    return target
