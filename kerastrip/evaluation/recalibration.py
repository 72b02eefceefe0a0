"""The moving averages of BatchNormalization: bring them up to date, see if they lag.

A training step normalises by the mean and variance of its batch, inference by moving
averages of them, which follow by a share of `1 - momentum` a step. Where the averages
lag behind the weights, the embedding that is used is another than the one that is
trained, and nothing in the loss tells of it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np

from kerastrip import _checks
from kerastrip._outputs import embedding_output
from kerastrip.distances import DISTANCES
from kerastrip.evaluation.embedding import (
    batches_of,
    is_batches,
    is_sampler,
    source_of,
)
from kerastrip.evaluation.search import row_distances, unit_rows

__all__ = [
    "Figures",
    "compare_modes",
    "moving_averages",
    "recalibrate",
]

# What BatchNormalization calls its averages; the last is that of its `renorm`.
_AVERAGES = ("moving_mean", "moving_variance", "moving_stddev")
# An average that keeps more than this of itself in a step is frozen.
_KEEPS_ALL = 1 - 1e-6
# The spread, as a share of the mean square, at which a training has collapsed.
_POINT = 1e-5


def recalibrate(
    model: Any, x: Any, *, batches: int = 100, batch_size: int = 64
) -> dict[str, float]:
    """Bring the moving averages of BatchNormalization up to date with the weights.

    In a short training the averages lag behind: Keras' momentum of 0.99 needs some
    300 steps after the last large change of the weights, MobileNetV3's of 0.999 some
    3,000. The batches pass through the model in training mode, and each average
    becomes the mean of its batch statistics, every row counting alike:

        average = sum_b rows_b * statistic_b / sum_b rows_b

    Nothing else changes: not the weights, frozen BatchNormalization, the optimizer, the
    random state of Dropout, or the epoch of a sampler. After an error the averages are
    as they were. Call it after `fit`, before the model is evaluated and saved.

    Args:
        model: a built Keras model.
        x: what the model was trained on: a `PKSampler`, whose batches of the current
            epoch are taken, augmented as in training; batches, from a
            `tf.data.Dataset` or a `keras.utils.PyDataset`, of inputs or of (inputs,
            targets, ...); or samples, as `embed` takes them, which are mixed.
        batches: int >= 1, the largest number of batches to use. Default 100.
        batch_size: rows of a batch, at least 2, where x holds samples. Default 64.

    Returns:
        For each layer with moving averages that are not frozen, by its path, how far its
        averages moved: the root mean square difference, over inputs of mean 0 and
        variance 1 under the new averages, from what the old ones made of them. 0 means
        not at all, and 1 that the old averages were of no use.

    Raises:
        TypeError, ValueError: from bad arguments, a model that is not built, data
            without batches, or statistics that are not finite.

    Example:

    >>> import keras, numpy as np
    >>> norm = keras.layers.BatchNormalization(name="norm")
    >>> model = keras.Sequential([keras.Input((1,)), norm], name="net")
    >>> x = np.array([[2.0], [4.0]])
    >>> {name: round(moved) for name, moved in recalibrate(model, x).items()}
    {'net/norm': 3}
    >>> np.round(model.predict(x, verbose=0)).tolist()
    [[-1.0], [1.0]]
    """
    batches = _checks.integer("batches", batches, 1)
    batch_size = _checks.integer("batch_size", batch_size, 2)
    if not getattr(model, "built", False):
        raise _checks.value_error(
            "model", "a built Keras model", model, "Train it first."
        )
    inputs = itertools.islice(_inputs(x, batches, batch_size), batches)
    averages = moving_averages(model)
    with _restored(model):
        fresh = _statistics(model, inputs, averages)
    if not all(value is None or np.isfinite(value).all() for value in fresh):
        told = _checks.Told("NaN or infinity in what reaches a layer")
        raise _checks.value_error("x", "finite statistics", told)
    moved: dict[str, dict[str, tuple]] = {}
    for variable, value in zip(averages, fresh, strict=True):
        if value is not None:
            layer = variable.path.rpartition("/")[0]
            old = _values(variable)
            moved.setdefault(layer, {})[variable.name] = old, value
            variable.assign(value)
    return {layer: _moved(changes) for layer, changes in moved.items()}


def moving_averages(model: Any) -> list[Any]:
    """The variables of a model that are moving averages, frozen ones included."""
    return [v for v in model.non_trainable_variables if v.name in _AVERAGES]


class Figures(NamedTuple):
    """What tells one embedding of a set of rows from another.

    Attributes:
        spread: mean squared distance to the mean of the rows.
        pos_dist: mean distance of two rows of one label.
        neg_dist: mean distance of two rows of different labels.
    """

    spread: float
    pos_dist: float
    neg_dist: float


def compare_modes(
    model: Any, inputs: Any, labels: np.ndarray, *, output: int | str | None = None
) -> tuple[Figures, Figures] | None:
    """The embedding of some rows as a training step sees it, and as it is used.

    For the first, each BatchNormalization takes the mean and variance of these rows
    in place of its averages. Dropout and other noise of the training are left out of
    both, so they cannot pass for a difference. No variable is changed.

    Args:
        model: a built Keras model.
        inputs: what the model takes: arrays of n rows.
        labels: (n,) labels; two rows must share one, two must not. The distance is that
            of the compiled loss, euclidean without one.
        output: name or position of the embedding; None finds it.

    Returns:
        The figures by the statistics of the rows, and by the moving averages; None for
        a model without moving averages that are not frozen, for embeddings that are not
        finite, and where the training has made one point of all rows already.
    """
    chosen, averages = embedding_output(model, output), moving_averages(model)

    def rows() -> np.ndarray:
        return _values(chosen.part_of(model(inputs, training=False))).astype("float32")

    if not averages:
        return None
    with _restored(model):
        fresh = _statistics(model, iter([inputs]), averages)
    if all(value is None for value in fresh):
        return None
    with _restored(model):
        used = rows()
        for variable, value in zip(averages, fresh, strict=True):
            if value is not None:
                variable.assign(value)
        seen = rows()
    if not (np.isfinite(used).all() and np.isfinite(seen).all()):
        return None
    if seen.var(axis=0).sum() <= _POINT * np.mean(np.sum(seen**2, axis=1)):
        return None
    word = getattr(chosen.loss, "distance", None)
    word = word if word in DISTANCES else "euclidean"
    return _figures(seen, labels, word), _figures(used, labels, word)


def _values(tensor: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(keras.ops.copy(tensor)))


@contextlib.contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Leaves every variable that a forward pass may change as it was found."""
    variables = list(model.non_trainable_variables)
    values = [_values(variable) for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


def _inputs(x: Any, batches: int, batch_size: int) -> Iterator[Any]:
    """The inputs of the batches of x."""
    found: Iterator[Any]
    if is_sampler(x):
        found = map(x.batch, range(len(x)))
    elif is_batches(x):
        found = batches_of(x)
    else:
        source = source_of(x)
        count = min(batches, math.ceil(len(source) / batch_size))
        # Batches of rows in order would often be of one class each.
        rows = np.random.default_rng(0).permutation(len(source))[: count * batch_size]
        found = ((source.take(part),) for part in np.array_split(rows, max(count, 1)))
    for batch in found:
        yield batch[0] if isinstance(batch, (tuple, list)) else batch


def _statistics(
    model: Any, batches: Iterator[Any], averages: list[Any]
) -> list[np.ndarray | None]:
    """The means of the batch statistics that `averages` follow; None where frozen.

    A step makes an average v of its batch statistic s, with k the share that v keeps
    (the momentum, or its n-th power if the layer is called n times):

        step(v) = k v + (1 - k) s        s = step(0) / (1 - k)

    A second step of the first batch, from a large p, shows k without a look into
    layers, which wrappers and own classes may hide: step(p) - step(0) = k p.
    """

    def step(inputs: Any, starts: list[float]) -> list[np.ndarray]:
        for variable, start in zip(averages, starts, strict=True):
            variable.assign(np.full(variable.shape, start))
        model(inputs, training=True)
        return [_values(variable).astype("float64") for variable in averages]

    kept: list[float] = []
    sums: list[Any] = [0.0] * len(averages)
    rows = 0
    for inputs in batches:
        found = step(inputs, [0.0] * len(averages))
        if not kept:
            large = [1e3 * max(1.0, np.abs(one).max()) for one in found]
            kept = [
                float(np.median(after - before)) / start
                for after, before, start in zip(
                    step(inputs, large), found, large, strict=True
                )
            ]
        count = len(keras.tree.flatten(inputs)[0])
        sums = [total + count * one for total, one in zip(sums, found, strict=True)]
        rows += count
    if not rows:
        raise _checks.value_error("x", "at least one batch", _checks.Told("none"))
    return [
        None if share > _KEEPS_ALL else total / (rows * (1 - share))
        for total, share in zip(sums, kept, strict=True)
    ]


def _moved(changes: dict[str, tuple[np.ndarray, np.ndarray]]) -> float:
    """How far one layer's averages moved, from {name: (old, new)}."""
    tiny = 1e-3  # Keras' epsilon
    means = changes.get("moving_mean", (0.0, 0.0))
    if "moving_stddev" in changes:
        old, new = changes["moving_stddev"]
    else:
        old, new = (np.sqrt(v + tiny) for v in changes.get("moving_variance", (1, 1)))
    shift = (means[1] - means[0]) / old
    return float(np.sqrt(np.mean(shift**2 + (new / old - 1) ** 2)))


def _figures(rows: np.ndarray, labels: np.ndarray, distance: str) -> Figures:
    spread = float(rows.var(axis=0, dtype="float64").sum())
    if distance == "cosine":
        rows = unit_rows(rows)
    first, second = np.triu_indices(len(rows), 1)
    apart = row_distances(rows[first], rows[second], distance)
    same = labels[first] == labels[second]
    return Figures(spread, float(apart[same].mean()), float(apart[~same].mean()))
