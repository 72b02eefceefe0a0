"""An alarm for moving averages of BatchNormalization that lag behind the weights."""

from __future__ import annotations

import weakref
from typing import Any

import keras
import numpy as np

from kerastrip._outputs import embedding_output
from kerastrip.callbacks.collapse import Alarm
from kerastrip.callbacks.epoch_sync import sampler_beside
from kerastrip.evaluation.recalibration import Figures, compare_modes

# About so many rows are compared. Held-out rows must have so many classes at least: the
# mean and variance of rows of two unseen classes would say more about these two classes
# than about the averages.
_ROWS, _CLASSES = 64, 8
# In trainings whose averages follow, `spread` differs by a factor of 0.75 to 1.3 and the
# ratio of the distances by 0.85 to 1.15; where they lag, by 0.02 to 0.65 or by 1.5 to 2.2.
_SPREAD, _RATIO = 2.0, 1.5
# In the first steps all averages lag: at momentum 0.9 their initial values count for
# nothing after some 60 steps.
_PATIENCE, _STEPS = 3, 100


class AveragesWatch:
    """Compares training mode and inference on some rows, after each evaluated epoch.

    There is one watch for each output of a model in a `fit`, see `watch_of`.

    Attributes:
        alarms: the alarms of this `fit`. There is an alarm when the averages have
            lagged in three evaluated epochs in a row and after 100 steps, a further
            alarm only after they had recovered, and an alarm if they lag in the last
            epoch.
        epoch: the latest epoch that was compared, None before the first.
    """

    def __init__(self) -> None:
        self.alarms: list[Alarm] = []
        self.epoch: int | None = None
        self._streak, self._warned = 0, False

    def look(
        self, model: Any, output: Any, rows: tuple[Any, Any], epoch: int, last: bool
    ) -> str:
        """The message of an alarm in this epoch, "" without alarm.

        Args:
            model, output: the model and its embedding, as for `embedding_output`.
            rows: inputs and labels of the rows to compare.
            epoch: number of the epoch.
            last: whether it is the last epoch of the `fit`.
        """
        self.epoch = epoch
        figures = compare_modes(model, *rows, output=output)
        if figures is None or not lags(*figures):
            self._streak, self._warned = 0, False
            return ""
        self._streak += 1
        steps = int(getattr(model.optimizer, "iterations", 0) + 0)  # or a tensor
        late = self._streak >= _PATIENCE and steps >= _STEPS and not self._warned
        if not (last or late):
            return ""
        self._warned = True
        seen, used = figures
        message = (
            f"Epoch {epoch + 1}: BatchNormalization's moving averages lag behind the "
            "weights, so evaluation and the saved model use another embedding than the "
            f"one that is trained: of the same {len(rows[1])} rows spread {used.spread:.2g}, "
            f"pos_dist {used.pos_dist:.2g} and neg_dist {used.neg_dist:.2g}, in training "
            f"mode {seen.spread:.2g}, {seen.pos_dist:.2g} and {seen.neg_dist:.2g}. Call "
            "kerastrip.recalibrate(model, sampler) after fit, or use "
            "BatchNormalization(momentum=0.9) or less, or train longer. In a network that "
            "was trained before, freeze BatchNormalization (layer.trainable = False)."
        )
        self.alarms.append(Alarm(epoch, "lagging", message))
        return message


def lags(seen: Figures, used: Figures) -> bool:
    """Whether the figures of the embedding in use differ from those in training mode."""
    factor = used.spread / seen.spread
    ratios = [one.pos_dist / max(one.neg_dist, 1e-12) for one in (seen, used)]
    return not 1 / _SPREAD <= factor <= _SPREAD or ratios[1] > _RATIO * ratios[0]


_watches: weakref.WeakKeyDictionary[Any, dict[tuple, AveragesWatch]]
_watches = weakref.WeakKeyDictionary()  # by model and output


def watch_of(model: Any, output: Any) -> AveragesWatch:
    """The watch of a training that begins, shared by all callbacks that ask for it.

    Shared, because every alarm is to be given once. All callbacks ask when the training
    begins, before any of them compares: a watch that has compared already belongs to an
    earlier training.
    """
    chosen = embedding_output(model, output)
    watches = _watches.setdefault(model, {})
    watch = watches.get((chosen.index, chosen.name))
    if watch is None or watch.epoch is not None:
        watch = watches[chosen.index, chosen.name] = AveragesWatch()
    return watch


def training_rows(
    callback: keras.callbacks.Callback, epoch: int
) -> tuple[Any, np.ndarray] | None:
    """Inputs and labels of the first batches of the sampler that `EpochSync` drives.

    None without such a sampler, and if the rows have a single label.
    """
    sampler = sampler_beside(callback)
    if not (hasattr(sampler, "batch") and hasattr(sampler, "plan")):
        return None
    size = len(sampler.plan.indices(epoch, 0))
    steps = range(min(-(-_ROWS // size), len(sampler)))
    inputs = [sampler.batch(step, epoch)[0] for step in steps]
    rows = [sampler.plan.indices(epoch, step) for step in steps]
    labels = sampler.labels[np.concatenate(rows)]
    if len(np.unique(labels)) < 2:
        return None
    return keras.tree.map_structure(_joined, *inputs), labels


def _joined(*parts: Any) -> np.ndarray:
    return np.concatenate(parts)


def some_rows(codes: np.ndarray) -> np.ndarray | None:
    """Rows of up to 16 classes, as many of each class; None for fewer than 8 classes."""
    rows = np.random.default_rng(0).permutation(len(codes))
    rows = rows[np.argsort(codes[rows], kind="stable")]
    _, first, counts = np.unique(codes[rows], return_index=True, return_counts=True)
    # Classes of a single row have no positives.
    first, counts = first[counts > 1], counts[counts > 1]
    if len(first) < _CLASSES:
        return None
    chosen = np.linspace(0, len(first) - 1, min(len(first), _ROWS // 4)).astype(int)
    each = min(_ROWS // len(chosen), int(counts[chosen].min()))
    return rows[(first[chosen, None] + np.arange(each)).ravel()]
