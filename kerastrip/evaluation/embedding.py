"""Embeddings of data by a trained model, and the nearest of them.

`embed` runs on every Keras backend; `search` is NumPy.
"""

from __future__ import annotations

import itertools
import math
import numbers
import os
import time
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import keras
import numpy as np

from kerastrip import _checks
from kerastrip._outputs import Output, embedding_output
from kerastrip.distances import DISTANCES
from kerastrip.sources import as_source

__all__ = [
    "Space",
    "batches_of",
    "embed",
    "embed_with_targets",
    "embeddings_array",
    "is_batches",
    "is_sampler",
    "nearest",
    "progress",
    "row_distances",
    "search",
    "source_of",
    "unit_rows",
    "unusable_rows",
]

# A block of distances is at most so many rows, and at most so many numbers.
_ROWS, _NUMBERS = 512, 1 << 25
# Neighbours are picked from so many numbers at a time.
_PART = 1 << 21
# Seconds after which a progress bar is worth its line.
_LONG = 2.0
# Squares of larger numbers are near the end of float32.
_LARGE = 1e15


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
    """The embeddings of `x`, every sample once and in order.

    With `augmentation`, sample i is seen as `augmentation(sample, view, i)` for
    view = 0 ... views - 1, and for `views > 1` the embedding is the direction of
    the mean of the normalised embeddings of the views:

        e_i = normalise(1 / views * sum_v normalise(model(aug(x_i, v, i))))

    The model runs through `predict_on_batch` on batches of one size, the last one
    filled up, so that it is traced once, however often it is called.

    Args:
        model: a Keras model, compiled or not.
        x: what to embed: (n, ...) array; dict or tuple of arrays; a
            `kerastrip.sources` object; a sampler, whose source is read (no
            repeats, no augmentation); or batches, from a `tf.data.Dataset`, a
            `keras.utils.PyDataset` or a `DataLoader` of PyTorch, of inputs or of
            (inputs, targets, ...). Texts go to a model on TensorFlow.
        output: name or position of the embedding among the outputs of the model; its
            path where the outputs are dicts in one another: "head/embedding". None takes the output whose compiled loss has a `distance`, or the
            only output there is.
        batch_size: rows per call of the model, at least 1. Batches that come as
            batches keep their size. Default 128.
        augmentation: `kerastrip.Augmentation` for test-time views. Default None.
        views: augmented views per sample, at least 1. Default 1.
        verbose: whether to show a progress bar once it takes over two seconds.
            Default False.

    Returns:
        (n, dim) float32 array.

    Raises:
        TypeError, ValueError: if the arguments do not fit each other, `x` holds no
            samples or dicts without an input of the model, the output is left open, or
            it is not (batch, dim).

    Warns:
        UserWarning: for floats in [0, 1] that a `Rescaling` at the input of the model,
            by 1 / 100 or less, scales again.

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
    """`embed`, and the targets of the embedding where `x` are batches with targets.

    Returns:
        (n, dim) float32 embeddings, and the (n, ...) targets of the same output
        or None. Both come from one pass, so the order of a shuffled dataset
        does not matter.
    """
    batches, total = _batches(x, batch_size, augmentation, views)
    chosen = embedding_output(model, output)
    single = output is None and chosen.count == 1
    show = progress(total, "sample", verbose)
    rows: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    done = size = 0
    for inputs, target in batches:
        if not rows:
            _warn_of_scaled_twice(model, inputs[0])
        seen = [_run(model, chosen, one, size, single) for one in inputs]
        size = max(size, len(seen[0]))
        if views > 1:
            seen = [unit_rows(np.mean([unit_rows(one) for one in seen], axis=0))]
        rows.append(seen[0])
        if target is not None:
            targets.append(_array(chosen.take(_one_array(target)), "targets"))
        done += len(seen[0])
        show(done)
    if not rows:
        raise _checks.value_error("x", "at least one batch", x)
    return np.concatenate(rows), np.concatenate(targets) if targets else None


def progress(total: int | None, unit: str, verbose: bool) -> Callable[[int], None]:
    """A function to call with the number done: it draws a bar if the work is long."""
    bar, begun = keras.utils.Progbar(total, unit_name=unit), time.monotonic()

    def show(done: int) -> None:
        if verbose and time.monotonic() - begun >= _LONG:
            bar.update(done)

    return show


def is_batches(x: Any) -> bool:
    """Whether `x` gives batches (`tf.data.Dataset`, `PyDataset`), not samples.

    What can be gone through again and again, but not indexed, is taken for a loader of
    batches (PyTorch's `DataLoader`).
    """
    if is_sampler(x) or isinstance(x, Set):
        return False
    if hasattr(x, "as_numpy_iterator") or isinstance(x, keras.utils.PyDataset):
        return True
    return (
        hasattr(x, "__iter__")
        and hasattr(x, "__len__")
        and not (hasattr(x, "__getitem__") or hasattr(x, "take"))
    )


def is_sampler(x: Any) -> bool:
    """Whether `x` draws batches from a `source` with `labels`, and is none itself."""
    return hasattr(x, "source") and hasattr(x, "labels") and not hasattr(x, "take")


def source_of(x: Any) -> Any:
    """The source of a sampler, or of samples."""
    return as_source(x.source if is_sampler(x) else x)


def _batches(
    x: Any, batch_size: int, augmentation: Any, views: int
) -> tuple[Iterator[tuple[list[Any], Any]], int | None]:
    """The ([inputs of each view], targets or None) of x, and the number of samples."""
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
    """The batches of a dataset, in which tensors of TensorFlow are arrays."""
    if hasattr(x, "as_numpy_iterator"):
        return x.as_numpy_iterator()
    if hasattr(x, "__getitem__"):
        return (x[i] for i in range(len(x)))
    return iter(x)


def _read_batches(x: Any) -> Iterator[tuple[list[Any], Any]]:
    """The ([inputs], targets) of a dataset; targets None where there are none."""
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
    """The samples of a source in order, as a list of their views."""
    for first in range(0, len(source), batch_size):
        samples = source.take(np.arange(first, min(first + batch_size, len(source))))
        if augmentation is None:
            yield [samples], None
            continue
        yield [augmentation.batch(samples, v, first=first) for v in range(views)], None


def _run(
    model: Any, chosen: Output, inputs: Any, size: int, single: bool
) -> np.ndarray:
    """The embeddings of one batch, filled up to `size` rows for the call.

    Args:
        size: rows of the largest batch so far; 0 in the first call.
        single: whether the model seemed to have a single output.
    """
    _check_names(model, inputs)
    inputs = keras.tree.map_structure(_sample_array, inputs)
    arrays = keras.tree.flatten(inputs)
    _check_shape(model, arrays)
    count = len(arrays[0])

    def fill(array: np.ndarray) -> np.ndarray:
        if array.dtype == np.float64:
            array = array.astype(keras.config.floatx())
        if len(array) < size:
            array = np.concatenate([array, np.repeat(array[-1:], size - count, axis=0)])
        return array

    outputs = model.predict_on_batch(keras.tree.map_structure(fill, inputs))
    # A subclassed model tells of its outputs only now; the key of a loss with the mark
    # of a metric-learning loss tells which of them it is.
    marked = hasattr(chosen.loss, "distance") and isinstance(outputs, dict)
    single = single and not (marked and chosen.name in outputs)
    if single and isinstance(outputs, (list, tuple, dict)) and len(outputs) > 1:
        raise _checks.value_error(
            "output",
            "the position or name of the embedding",
            _checks.Told(f"None for a model with {len(outputs)} outputs"),
            "Give output=....",
        )
    rows = np.asarray(chosen.take(outputs))
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
    """`_array` of samples, which are texts on TensorFlow only."""
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
    """Refuses samples of another shape than the one input of the model has.

    A network that pools takes images of any size, and embeds them otherwise than those
    of its training.
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
    """Whether a shape is the expected one, of which None is any number."""
    pairs = zip(shape, expected, strict=True)
    return all(side in (None, given) for given, side in pairs)


def _no_batch(told: str) -> ValueError:
    return _checks.value_error(
        "x",
        "a batch of samples, or batches of (inputs, targets)",
        _checks.Told(told),
        "One sample alone goes in as a batch: x[None], a tf.data.Dataset of "
        "samples in batches: x.batch(64).",
    )


def _inputs(model: Any) -> list[Any]:
    """The symbolic inputs of a model; of one that is not built from them, none."""
    return list(getattr(model, "inputs", None) or ())


def _check_names(model: Any, inputs: Any) -> None:
    """Refuses a dict that lacks an input of the model."""
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
    """Warns of images in [0, 1] before a layer that scales 0 ... 255 to a range like it.

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
        source: Any = getattr(layer, "input", None)
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
    """A part of a batch as an array that every backend reads rightly."""
    if hasattr(value, "detach"):  # PyTorch: perhaps on another device, with a gradient
        value = value.detach().cpu()
    _checks.refuse_masked(name, value)
    return _checks.native(np.asarray(value))


def _one_array(target: Any) -> Any:
    """Targets, where a list of names or numbers is one target and not one per output."""
    if isinstance(target, (list, tuple)) and all(
        isinstance(one, (str, bytes, numbers.Number)) for one in target
    ):
        return np.asarray(target)
    return target


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros stays."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1.0)


def search(
    queries: Any, gallery: Any, k: int, *, distance: str = "euclidean"
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of the gallery for every query: exact, by brute force.

    A matrix product in float32, in blocks, finds the candidates; the mean of the
    gallery is taken off first, so that it is accurate relative to the *spread* of
    the embeddings. The distances returned are computed again from the rows, and
    equal ones stand in the order of the index.

    Candidates whose squared distances differ by less than float32 resolves
    (about 1e-7 of the squared radius of the gallery) count as equally near at
    the k-th place.

    Args:
        queries: (n, dim) embeddings.
        gallery: (m, dim) embeddings.
        k: neighbours per query, 1 ... m.
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`. The
            arrays do not tell what they were trained with: give that of the loss.

    Returns:
        (n, k) float32 distances, ascending, and (n, k) int64 rows of the gallery.

    Raises:
        TypeError, ValueError: if the arrays are not embeddings of one dimension,
            hold NaN or infinity, or k is not in 1 ... m.

    Example:

    >>> import numpy as np
    >>> gallery = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    >>> distances, indices = search(np.zeros((1, 2)), gallery, 2)
    >>> distances, indices
    (array([[0., 1.]], dtype=float32), array([[0, 2]]))
    """
    queries = embeddings_array("queries", queries)
    gallery = embeddings_array("gallery", gallery)
    k = _checks.integer("k", k, 1)
    if k > len(gallery):
        raise _checks.value_error(
            "k", f"at most the {len(gallery)} rows of the gallery", k
        )
    space = Space.of(queries, gallery, distance)
    indices = np.empty((len(queries), k), np.int64)
    distances = np.empty((len(queries), k), np.float32)
    # A few more than k: float32 may have ordered the last ones wrongly.
    taken = min(k + 8, len(gallery))
    step = max(1, _NUMBERS // (8 * taken * queries.shape[1]))
    for rows, block in space.blocks(clamp=False):
        candidates = nearest(block, taken)
        for low in range(rows.start, rows.stop, step):
            some = slice(low, min(low + step, rows.stop))
            chosen = candidates[some.start - rows.start : some.stop - rows.start]
            exact = row_distances(
                space.queries[some, None], space.gallery[chosen], distance
            )
            order = np.lexsort((chosen, exact), axis=-1)[:, :k]
            distances[some] = np.take_along_axis(exact, order, axis=1)
            indices[some] = np.take_along_axis(chosen, order, axis=1)
    return distances, indices


def nearest(block: np.ndarray, k: int) -> np.ndarray:
    """The columns of the k smallest numbers of every row, in order.

    Args:
        block: (rows, columns) float32; what is below 0 counts as 0.
        k: 1 ... columns.

    Returns:
        (rows, k) int64, ascending by number; equal numbers by column.
    """
    # NumPy lets go of the interpreter lock in all that is slow here.
    parts = np.array_split(block, min(len(block), block.size // _PART + 1))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.concatenate(list(pool.map(_nearest, parts, itertools.repeat(k))))


def _nearest(block: np.ndarray, k: int) -> np.ndarray:
    """`nearest` for some rows.

    The columns are dealt into groups. The least numbers of the groups are numbers of
    the row, so that the k-th smallest of them is a bound for its k smallest numbers,
    and only the few numbers within it are sorted. For k = 2 and three groups:

        column     0  1  2  3  4  5     groups (0, 3) (1, 4) (2, 5)
        number     7  4  9  8  5  1     least     7      4      1     bound 4
        within        4           1     sorted: columns 5 and 1

    (To find the k-th smallest number of all columns takes ten times as long.)
    """
    rows, columns = block.shape
    groups = columns // max(1, math.isqrt(columns // (2 * k)))  # about the fastest
    dealt = block[:, : columns // groups * groups].reshape(rows, -1, groups)
    least = dealt.min(axis=1)  # (rows, groups), k groups or more
    bound = np.maximum(np.partition(least, k - 1, axis=1)[:, k - 1, None], 0.0)
    row, column = np.divmod(np.flatnonzero(block <= bound), columns)
    # The numbers within move to the left, in their order; a row has k or more.
    first = np.searchsorted(row, np.arange(rows))
    place = np.arange(len(row)) - first[row]
    within = np.full((rows, place.max() + 1), np.inf, np.float32)
    within[row, place] = np.maximum(block[row, column], 0.0)
    order = np.argsort(within, axis=1, kind="stable")[:, :k]
    return column[first[:, None] + order]


def embeddings_array(name: str, value: Any) -> np.ndarray:
    """`value` as (n, dim) finite float32 rows, else an error that names it."""
    _checks.refuse_masked(name, value)
    rows = np.asarray(value)
    if rows.dtype.kind not in "fiub" and rows.dtype.name != "bfloat16":
        raise _checks.type_error(name, "(n, dim) numbers", value)
    if rows.ndim != 2 or 0 in rows.shape:
        raise _checks.value_error(
            name, "an array of shape (n, dim), n and dim at least 1", rows
        )
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(rows, dtype="float32")
    bad = unusable_rows(rows)
    if len(bad):
        raise _checks.value_error(
            name,
            f"finite numbers under {_LARGE:g}",
            _checks.Told(
                f"NaN, infinity or more in {len(bad)} of {len(rows)} rows, the "
                f"first is row {bad[0]}"
            ),
        )
    return rows


def unusable_rows(rows: np.ndarray) -> np.ndarray:
    """Which (n, dim) rows hold NaN, infinity or numbers whose squares may."""
    return np.flatnonzero(~(np.abs(rows) < _LARGE).all(axis=1))


class Space(NamedTuple):
    """Queries and gallery as two matrices whose product is the distance.

    With rows centred on the mean c of the gallery, half the squared distance is

        |q - g|^2 / 2 = |q|^2 / 2 + |g|^2 / 2 - q.g,

    so a query becomes (q, 1, |q|^2 / 2) and a gallery row (-g, |g|^2 / 2, 1). For
    the cosine distance 1 - q.g of normalised rows the two terms are -c.g and
    1 - |c|^2 - c.q, which holds for rows of zeros too (distance 1).

    Attributes:
        queries: (n, dim) float32 rows, normalised for the cosine distance.
        gallery: (m, dim) float32 rows, likewise.
        left: (n, dim + 2) float32.
        right: (dim + 2, m) float32.
        distance: the word.
    """

    queries: np.ndarray
    gallery: np.ndarray
    left: np.ndarray
    right: np.ndarray
    distance: str

    @classmethod
    def of(cls, queries: np.ndarray, gallery: np.ndarray, distance: str) -> Space:
        """The space of (n, dim) queries and an (m, dim) gallery, float32."""
        _checks.one_of("distance", distance, DISTANCES)
        if queries.shape[1] != gallery.shape[1]:
            raise _checks.value_error(
                "gallery",
                f"rows of {queries.shape[1]} numbers, as the queries have",
                gallery,
            )
        cosine = distance == "cosine"
        if cosine:
            queries, gallery = unit_rows(queries), unit_rows(gallery)
        centre = gallery.mean(axis=0, dtype="float64").astype("float32")
        left = np.empty((len(queries), queries.shape[1] + 2), np.float32)
        right = np.empty((gallery.shape[1] + 2, len(gallery)), np.float32)
        np.subtract(queries, centre, out=left[:, :-2])
        np.subtract(centre[:, None], gallery.T, out=right[:-2])
        left[:, -2] = right[-1] = 1.0
        if cosine:
            left[:, -1] = 1.0 - centre @ centre - left[:, :-2] @ centre
            right[-2] = centre @ right[:-2]
        else:
            left[:, -1] = np.einsum("nd,nd->n", left[:, :-2], left[:, :-2]) / 2
            right[-2] = np.einsum("dn,dn->n", right[:-2], right[:-2]) / 2
        return cls(queries, gallery, left, right, distance)

    def blocks(
        self, *, upper: bool = False, clamp: bool = True, verbose: bool = False
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Slices of the queries and their (rows, m) distances, in one buffer.

        The numbers are half the squared euclidean or the cosine distance.

        Args:
            upper: leave out the columns before the first row of a block.
            clamp: set what rounding took below 0 to 0, which is one more pass.
            verbose: draw a progress bar if it takes long.
        """
        columns = self.right.shape[1]
        step = max(1, min(_ROWS, _NUMBERS // columns, len(self.left)))
        buffer = np.empty(step * columns, np.float32)
        show = progress(len(self.left), "row", verbose)
        for low in range(0, len(self.left), step):
            rows = slice(low, min(low + step, len(self.left)))
            shape = rows.stop - low, columns - low * upper
            block = buffer[: shape[0] * shape[1]].reshape(shape)
            np.matmul(self.left[rows], self.right[:, columns - shape[1] :], out=block)
            if clamp:
                np.maximum(block, 0.0, out=block)
            yield rows, block
            show(rows.stop)

    def distances(self, numbers: np.ndarray) -> np.ndarray:
        """The distances that numbers of `blocks` stand for."""
        if self.distance == "cosine":
            return numbers
        return np.sqrt(2 * numbers) if self.distance == "euclidean" else 2 * numbers


def row_distances(starts: np.ndarray, ends: np.ndarray, distance: str) -> np.ndarray:
    """Distances along the last axis, from the differences: accurate near 0.

    Args:
        starts: (..., dim) float32, rows of length 1 or 0 for the cosine distance.
        ends: likewise, of the same shape or one that broadcasts with it.
        distance: the word.
    """
    differences = ends - starts
    squares = np.einsum("...d,...d->...", differences, differences)
    if distance == "euclidean":
        return np.sqrt(squares)
    if distance == "cosine":
        # 1 - s.e = (|s - e|^2 + (1 - |s|^2) + (1 - |e|^2)) / 2, the lengths 0 or 1
        zeros = (~starts.any(axis=-1)).astype("float32") + ~ends.any(axis=-1)
        return (squares + zeros) / 2
    return squares
