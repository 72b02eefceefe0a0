"""The moving averages of BatchNormalization: update them, and find out if they lag.

A training step normalises by the mean and variance of its batch. Inference normalises by
moving averages of them, which move by a share of `1 - momentum` in each step. If the
averages lag behind the weights, the embedding in use differs from the embedding that is
trained, and the loss does not show it.
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

# The names of the averages of BatchNormalization; the last belongs to its `renorm`.
_AVERAGES = ("moving_mean", "moving_variance", "moving_stddev")
# An average that keeps a larger share of itself in a step is frozen.
_KEEPS_ALL = 1 - 1e-6
# All embeddings are at one point if their spread is a smaller share of the mean square.
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
    random state of Dropout, or the epoch of a sampler. An error leaves the averages
    unchanged. Call it after `fit`, before the model is evaluated and saved.

    Args:
        model: a built Keras model.
        x: the data that the model was trained on: a `PKSampler`, whose batches of the
            current epoch are used, augmented as in training; batches from a
            `tf.data.Dataset` or a `keras.utils.PyDataset`, of inputs or of (inputs,
            targets, ...); or samples, as `embed` takes them, in a random order.
        batches: int >= 1, the largest number of batches to use. Default 100.
        batch_size: rows of a batch, at least 2; used if x holds samples. Default 64.

    Returns:
        {path: change} of each layer whose moving averages are not frozen. The change is
        the root mean square difference between the outputs of the layer (without scale
        and offset) by the old and by the new averages, for inputs that the new averages
        normalise to mean 0 and variance 1. 0 means that the averages did not move, and
        1 that the old averages were of no use.

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
        received = _checks.Told("NaN or infinity in what reaches a layer")
        raise _checks.value_error("x", "finite statistics", received)
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
    """Numbers that show whether two embeddings of the same rows differ.

    Attributes:
        spread: mean squared distance to the mean of the rows.
        pos_dist: mean distance of positive pairs.
        neg_dist: mean distance of negative pairs.
    """

    spread: float
    pos_dist: float
    neg_dist: float


def compare_modes(
    model: Any, inputs: Any, labels: np.ndarray, *, output: int | str | None = None
) -> tuple[Figures, Figures] | None:
    """Figures of the embedding in training mode and in inference, for the same rows.

    In training mode each BatchNormalization normalises by the mean and variance of these
    rows in place of its averages. Dropout and other noise of the training are left out
    of both, so that they cannot pass for a difference. No variable is changed.

    Args:
        model: a built Keras model.
        inputs: inputs of the model: arrays of n rows.
        labels: (n,) labels, with at least one positive and one negative pair. Their
            distance is the `distance` of the compiled loss, euclidean if it has none.
        output: name or position of the embedding; None finds it.

    Returns:
        The figures by the statistics of the rows, and by the moving averages. None if
        all moving averages of the model are frozen or it has none, if embeddings are
        not finite, and if the embedding has collapsed to a point in training mode.
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
        used = rows()  # by the moving averages
        for variable, value in zip(averages, fresh, strict=True):
            if value is not None:
                variable.assign(value)
        seen = rows()  # by the statistics of these rows
    if not (np.isfinite(used).all() and np.isfinite(seen).all()):
        return None
    if seen.var(axis=0).sum() <= _POINT * np.mean(np.sum(seen**2, axis=1)):
        return None
    word = getattr(chosen.loss, "distance", None)
    word = word if word in DISTANCES else "euclidean"
    return _figures(seen, labels, word), _figures(used, labels, word)


def _values(tensor: Any) -> np.ndarray:
    """A NumPy copy of a tensor or variable, which later assignments do not change."""
    return np.array(keras.ops.convert_to_numpy(keras.ops.copy(tensor)))


@contextlib.contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Restores every variable that a forward pass may change, after an error too."""
    variables = list(model.non_trainable_variables)
    values = [_values(variable) for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


def _inputs(x: Any, batches: int, batch_size: int) -> Iterator[Any]:
    """The inputs of the batches of x."""
    drawn: Iterator[Any]
    if is_sampler(x):
        drawn = map(x.batch, range(len(x)))
    elif is_batches(x):
        drawn = batches_of(x)
    else:
        source = source_of(x)
        count = min(batches, math.ceil(len(source) / batch_size))
        # Batches of rows in order would often be of one class each.
        rows = np.random.default_rng(0).permutation(len(source))[: count * batch_size]
        drawn = ((source.take(some),) for some in np.array_split(rows, max(count, 1)))
    for batch in drawn:
        yield batch[0] if isinstance(batch, (tuple, list)) else batch


def _statistics(
    model: Any, batches: Iterator[Any], averages: list[Any]
) -> list[np.ndarray | None]:
    """The mean of the batch statistics that each average follows; None if it is frozen.

    A step makes an average v of its batch statistic s, with k the share that v keeps
    (the momentum, or its n-th power if the layer is called n times):

        step(v) = k v + (1 - k) s        s = step(0) / (1 - k)

    A second step on the first batch, from a large v = p, shows k: step(p) - step(0) =
    k p. So nobody has to find the layers, which wrappers and the user's own classes may
    hide, and read their momentum.
    """

    def step(inputs: Any, starts: list[float]) -> list[np.ndarray]:
        for variable, start in zip(averages, starts, strict=True):
            variable.assign(np.full(variable.shape, start))
        model(inputs, training=True)
        return [_values(variable).astype("float64") for variable in averages]

    shares: list[float] = []  # k of each average
    sums: list[Any] = [0.0] * len(averages)
    rows = 0
    for inputs in batches:
        from_zero = step(inputs, [0.0] * len(averages))
        if not shares:
            large = [1e3 * max(1.0, np.abs(one).max()) for one in from_zero]
            shares = [
                float(np.median(after - before)) / start
                for after, before, start in zip(
                    step(inputs, large), from_zero, large, strict=True
                )
            ]
        count = len(keras.tree.flatten(inputs)[0])
        sums = [total + count * one for total, one in zip(sums, from_zero, strict=True)]
        rows += count
    if not rows:
        raise _checks.value_error("x", "at least one batch", _checks.Told("none"))
    return [
        None if share > _KEEPS_ALL else total / (rows * (1 - share))
        for total, share in zip(sums, shares, strict=True)
    ]


def _moved(changes: dict[str, tuple[np.ndarray, np.ndarray]]) -> float:
    """The change of one layer, see `recalibrate`, from {name: (old, new)} averages."""
    tiny = 1e-3  # Keras' epsilon
    means = changes.get("moving_mean", (0.0, 0.0))
    if "moving_stddev" in changes:
        old, new = changes["moving_stddev"]
    else:
        old, new = (np.sqrt(v + tiny) for v in changes.get("moving_variance", (1, 1)))
    shift = (means[1] - means[0]) / old
    return float(np.sqrt(np.mean(shift**2 + (new / old - 1) ** 2)))


def _figures(rows: np.ndarray, labels: np.ndarray, distance: str) -> Figures:
    """The figures of (n, dim) rows and (n,) labels, over all pairs."""
    spread = float(rows.var(axis=0, dtype="float64").sum())
    if distance == "cosine":
        rows = unit_rows(rows)
    first, second = np.triu_indices(len(rows), 1)  # the two rows of every pair
    apart = row_distances(rows[first], rows[second], distance)
    same = labels[first] == labels[second]
    return Figures(spread, float(apart[same].mean()), float(apart[~same].mean()))
