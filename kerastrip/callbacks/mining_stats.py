"""MiningStats: the state of the mining in the logs of fit and evaluate.

The way of the figures of a batch, from the step of the model to the logs:

    train_step, test_step (Keras)
        | call model.compute_metrics(x, y, y_pred) with all targets and all outputs
        v
    _Tap               stands in for `compute_metrics` while something is attached
        | census.update_state(y, y_pred), then the `compute_metrics` of the model
        v
    _OutputCensus      picks the embedding and its labels, and counts at the margin of
        |              the loss; it is one of `model.metrics`, so that Keras resets it
        |              and reads its result
        v
    logs               {"loss": ..., "easy": ..., "semi_hard": ...}, in this order to
        |-> the callbacks of the user, MiningStats among them: it warns
        |-> History     keeps all figures, then `_Bar` removes figures that are not in `show`
        `-> progress bar

The states of a `MiningStats`, and the hooks of Keras that lead from one to the next:

    detached -- on_train_begin --> training -- on_train_end --> detached
                                    |    ^
                      on_test_begin |    | on_test_end
                                    v    |
                                  validating

    detached -- on_test_begin --> evaluating -- on_test_end --> detached

After an exception Keras calls no hook, so the census stays attached. It is detached when
`set_model` announces another run of the same callback, when the `MiningStats` of another
run is attached to the model, or by `detach()`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

from kerastrip import _checks
from kerastrip._outputs import Output, embedding_output
from kerastrip.callbacks._copies import without_model
from kerastrip.callbacks._traces import Traces
from kerastrip.distances import DISTANCES
from kerastrip.metrics import FRACTIONS, KEYS, TripletCensus

__all__ = [
    "MiningStats",
]

# UnitNormalization in bfloat16 leaves the lengths within 0.4 % of 1.
_SAME_LENGTH = 0.01


class _Settings(NamedTuple):
    """The arguments of a `MiningStats` on which its census depends."""

    margin: float | None
    distance: str | None
    output: int | str | None
    prefix: str
    per_batch: bool


class _OutputCensus(TripletCensus):
    """The census of one output of a model, at the margin and distance of its loss.

    Every metric gets the targets and outputs of the whole model: from the tap, and from a
    `train_step` of the user that updates all of `self.metrics`.

    Args:
        output: the output whose triplets to count.
        settings: the settings of the `MiningStats`.
    """

    def __init__(self, output: Output, settings: _Settings) -> None:
        self.output, self.settings = output, settings
        super().__init__(
            *self.margin_and_distance(),
            gather=getattr(output.loss, "gather", False),
            prefix=settings.prefix,
            name=f"{settings.prefix}triplet_census",
        )

    def margin_and_distance(self) -> tuple[float, str]:
        """The arguments of the `MiningStats`, or else the present values of the loss."""
        loss, given = self.output.loss, self.settings
        return (
            _given_or_of_loss("margin", given.margin, loss),
            _given_or_of_loss("distance", given.distance, loss),
        )

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        # Read here, when a step is traced, because MarginSchedule changes the loss.
        margin, distance = self.margin_and_distance()
        part_of = self.output.part_of
        self._count(part_of(y_true), part_of(y_pred), margin, distance)

    def of_step(self) -> dict[str, Any]:
        """The figures for the logs of a step, in place of those of the epoch so far."""
        return self.of_latest_batch() if self.settings.per_batch else {}


def _given_or_of_loss(name: str, given: Any, loss: Any) -> Any:
    """The argument `name` of a `MiningStats`, or else the attribute of its loss."""
    value = getattr(loss, name, None) if given is None else given
    if value is None:
        loss = getattr(loss, "name", None) or getattr(loss, "__name__", loss)
        raise _checks.value_error(
            name,
            f"a loss with a {name}, as TripletLoss, or MiningStats({name}=...)",
            _checks.Told(f"the loss {loss!r}, which has none"),
        )
    return value


class _Tap:
    """Counts the batches of a model for every `MiningStats` that is attached to it.

    It is made once for a model and stays with the model, so that its traces can be used
    again. While a `MiningStats` is attached, the tap stands in for `compute_metrics`, the
    documented place to update metrics, which the steps of every backend call.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._traces = Traces(model)
        self._original: Any = None  # the model's `compute_metrics`, while attached
        self._shadowed: Any = (
            None  # an instance attribute of that name, set by the user
        )
        self.attached: dict[MiningStats, _OutputCensus] = {}

    @classmethod
    def of(cls, model: Any) -> _Tap:
        """The tap of a model."""
        # Written past Keras' tracking of attributes, so that it is never saved.
        return model.__dict__.setdefault("mining_stats_tap", cls(model))

    def __call__(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        for census in self.attached.values():
            census.update_state(y, y_pred)
        results = dict(self._original(x, y, y_pred, sample_weight))
        for census in self.attached.values():
            self._check_prefix(census)  # now the metrics of `compile` exist, too
            results.update(census.of_step())
        return results

    def attach(self, stats: MiningStats) -> _OutputCensus:
        """A census for the settings of a `MiningStats`, which counts from now on."""
        # Keras gives all callbacks of one run the same dict `params`. A `MiningStats` with
        # another dict is left over from a run that an exception has ended.
        for other in [one for one in self.attached if one.params is not stats.params]:
            self.detach(other)
        output = embedding_output(self._model, stats.output)
        census = self._census(output, stats.settings)
        self._check_prefix(census)
        if not self.attached:
            self._shadowed = self._model.__dict__.get("compute_metrics")
            self._original = self._model.compute_metrics
            self._model.__dict__["compute_metrics"] = self
        self.attached[stats] = census
        self._model._metrics.append(census)
        self._traces.use(list(self.attached.values()))
        return census

    def detach(self, stats: MiningStats) -> None:
        """Undo `attach`; without effect if the `MiningStats` is not attached."""
        census = self.attached.pop(stats, None)
        if census is None:
            return
        if not self.attached:
            del self._model.__dict__["compute_metrics"]
            if self._shadowed is not None:
                self._model.__dict__["compute_metrics"] = self._shadowed
        self._model._metrics.remove(census)
        self._traces.use(list(self.attached.values()))

    def _census(self, output: Output, settings: _Settings) -> _OutputCensus:
        """A census for an output and settings that is not in use.

        If possible the census of an earlier run, whose variables are part of the traces.
        """
        in_use = self.attached.values()
        for census in self._traces.metrics():
            if census.settings == settings and census not in in_use:
                return census
        strategy = getattr(self._model, "distribute_strategy", None)
        with contextlib.nullcontext() if strategy is None else strategy.scope():
            return _OutputCensus(output, settings)

    def _check_prefix(self, census: TripletCensus) -> None:
        """An error if another census of the model, or of `compile`, has the same prefix."""
        taken = [
            other.prefix
            for metric in self._model.metrics
            for other in (metric, *getattr(metric, "metrics", ()))
            if isinstance(other, TripletCensus) and other is not census
        ]
        if census.prefix in taken:
            raise _checks.value_error(
                "prefix",
                "one that no other census of this model has",
                census.prefix,
                f"Two would report {census.keys[0]!r}: give one of them "
                "prefix='second_'.",
            )


class _Bar:
    """Makes the progress bar of a `fit` show only some figures of the logs, in order.

    Keras passes one dict of logs from callback to callback: first to the callbacks of the
    user, then to its own `History`, at last to the progress bar. Only the progress bar
    shall miss figures, and no callback can be put between the last two. So two hooks of
    the `History` are wrapped: when they have run, they remove the hidden figures.

        callbacks of the user --> History --> (remove and sort) --> progress bar
              all figures           all                              `show` only
    """

    _HOOKS = ("on_train_batch_end", "on_epoch_end")

    def __init__(self, history: Any, shown: list[str], hidden: set[str]) -> None:
        self._history, self._shown, self._hidden = history, shown, hidden
        for name in self._HOOKS:
            hook = functools.partial(self._then_arrange, getattr(history, name))
            setattr(history, name, hook)

    def _then_arrange(self, hook: Any, number: int, logs: Any = None) -> None:
        hook(number, logs)
        if logs:
            _arrange(logs, self._shown, self._hidden)

    def remove(self) -> None:
        """Give the `History` its hooks back."""
        for name in self._HOOKS:
            vars(self._history).pop(name, None)


def _arrange(logs: dict[str, Any], shown: list[str], hidden: set[str]) -> None:
    """Sort logs in place: the keys `shown` first, and without the keys `hidden`.

    Both lists hold keys without `val_`. Figures of the validation come last.
    """

    def place(key: str) -> tuple[bool, int]:
        bare = key.removeprefix("val_")
        return key != bare, shown.index(bare) if bare in shown else len(shown)

    old = dict(logs)
    logs.clear()
    for key in sorted(old, key=place):
        if key.removeprefix("val_") not in hidden:
            logs[key] = old[key]


class MiningStats(keras.callbacks.Callback):
    """Report the easy, semi-hard and hard triplets in the batches of a compiled model.

    Pass it to `fit` or `evaluate`; nothing else is needed. For that run it attaches a
    `TripletCensus` to the model, whose figures appear in the progress bar, `History`,
    `CSVLogger`, TensorBoard and, for validation, under `val_` keys. It may stand
    anywhere among the callbacks; `EarlyStopping` and `ModelCheckpoint` can monitor
    its keys when given a `mode`. The logs hold all figures; the progress bar of `fit`
    shows only the figures in `show`, before other values and in their order.

    The figures are those of `TripletCensus`: `easy`, `semi_hard`, `hard`, `active`,
    `pairs_with_semi_hard`, `anchors_without_positive`, `pos_dist`, `neg_dist`,
    `norm`, `norm_std`, `spread`, `effective_dim`. They are computed from the embeddings
    of the training step itself, at the margin and distance of the compiled loss, also
    when a callback changes the margin. Under a `tf.distribute` strategy they count the
    triplets within each replica, or the triplets of the whole batch if the loss has
    `gather=True`.

    It warns, once in a run, if the embeddings are not normalised although the margin
    is meant for length 1, if no batch of the training or of the validation holds
    a triplet, and if the figures are NaN.

    The census is detached when the run ends. After an exception or Ctrl-C it stays
    until the next run with a `MiningStats` replaces it, or until `detach()`. A saved
    model contains nothing of it.

    Args:
        margin: float > 0. None reads the `margin` of the loss.
        distance: `"euclidean"`, `"squared_euclidean"` or `"cosine"`. None reads the
            `distance` of the loss.
        output: position or name of the embedding among the outputs. None takes the
            output whose loss has a `distance`.
        prefix: str before every key; needed if two `MiningStats` are used at once.
        show: the figures that the progress bar of `fit` shows, for the validation too,
            without `prefix`. `show=kerastrip.metrics.KEYS` shows all figures.
        per_batch: if True the logs of a step hold the figures of its batch, if False
            the figures of all batches of the epoch so far. The logs of an epoch are the
            same.

    Raises:
        ValueError, TypeError: from the constructor for bad arguments; from `fit` and
            `evaluate` if the embedding, its margin or its distance cannot be found,
            or if another census of the model has the same keys.

    Example:

    >>> import keras, numpy as np
    >>> from kerastrip.losses import TripletLoss
    >>> model = keras.Sequential([keras.layers.Dense(4), keras.layers.UnitNormalization()])
    >>> model.compile("sgd", TripletLoss(margin=0.2))
    >>> history = model.fit(
    ...     np.eye(8), np.arange(8) % 2, verbose=0, callbacks=[MiningStats()]
    ... )
    >>> sorted(history.history)[:4]
    ['active', 'anchors_without_positive', 'easy', 'effective_dim']
    """

    # Keras may run the batch hook late, beside later steps: the hook only reads the logs
    # that it is given.
    async_safe = True

    def __init__(
        self,
        margin: float | None = None,
        distance: str | None = None,
        *,
        output: int | str | None = None,
        prefix: str = "",
        show: Sequence[str] = (*FRACTIONS, "spread"),
        per_batch: bool = False,
    ) -> None:
        super().__init__()
        if margin is not None:
            _checks.number("margin", margin, above=0)
        if distance is not None:
            _checks.one_of("distance", distance, DISTANCES)
        if isinstance(output, bool) or not isinstance(output, (int, str, type(None))):
            raise _checks.type_error("output", "a position, a name or None", output)
        if isinstance(show, str) or not isinstance(show, Sequence):
            raise _checks.type_error("show", "a sequence of figures", show)
        for word in show:
            _checks.one_of("show", word, KEYS)
        self.margin = margin
        self.distance = distance
        self.output = output
        self.prefix = _checks.text("prefix", prefix)
        self.show = tuple(show)
        self.per_batch = _checks.boolean("per_batch", per_batch)
        self.census: Any = None
        self._bar: _Bar | None = None
        self._fitting = False
        self._checked: set[str] = set()  # checks that are done in this run

    def __getstate__(self) -> dict[str, Any]:
        run = {"census": None, "_bar": None, "_fitting": False}
        return {**without_model(self), **run}

    @property
    def settings(self) -> _Settings:
        """The arguments on which the census depends."""
        return _Settings(
            self.margin, self.distance, self.output, self.prefix, self.per_batch
        )

    def detach(self) -> None:
        """Detach the census from the model; without effect if none is attached."""
        if self.model is not None:
            _Tap.of(self.model).detach(self)

    def _attach(self) -> None:
        """Attach a census to the model, unless it is attached already."""
        if self not in _Tap.of(self.model).attached:
            self.census = _Tap.of(self.model).attach(self)

    def set_model(self, model: Any) -> None:
        # Keras calls this first in a new run: an interrupted run has ended by now.
        self._end()
        self._checked = set()
        super().set_model(model)

    def _end(self) -> None:
        """Leave the model and its `History` as they were before the run."""
        self._fitting = False
        self.detach()
        if self._bar is not None:
            self._bar.remove()
            self._bar = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._fitting = True
        self._attach()
        history = getattr(self.model, "history", None)
        if history is not None:
            shown = self._shown()
            self._bar = _Bar(history, shown, set(self.census.keys) - set(shown))

    def _shown(self) -> list[str]:
        """The keys of the logs that the progress bar shows."""
        return [f"{self.prefix}{word}" for word in self.show]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._attach()  # an evaluation between two epochs may have replaced it

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # In a thread beside the main one a warning could not show the user's line: there
        # it waits for the end of the epoch.
        if threading.current_thread() is threading.main_thread():
            self._check_once("train", logs)
        self._drop_zeros(logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._check_once("train", logs)
        for phase, lead in (("training", ""), ("validation", "val_")):
            self._drop_zeros(logs, lead)
            self._check_figures(phase, logs, lead)

    def on_train_end(self, logs: Any = None) -> None:
        self._end()

    def on_test_begin(self, logs: Any = None) -> None:
        self._attach()

    def on_test_end(self, logs: Any = None) -> None:
        self._check_once("test", logs)
        if not self._fitting:
            self._check_figures("evaluation", logs)
            self._end()
            if logs:  # hide none: callbacks that follow may read them
                _arrange(logs, self._shown(), set())

    def _figures(self, logs: Any, lead: str = "") -> dict[str, float]:
        """The figures of these logs by their keys in `KEYS`; {} if no batch was counted.

        All figures are 0 if a model has not updated the census. (The only batches whose
        figures are all 0 are rows of length 0 that all have one label.)
        """
        names = dict(zip(KEYS, self.census.keys, strict=True))
        figures = {
            key: logs[f"{lead}{name}"]
            for key, name in names.items()
            if f"{lead}{name}" in (logs or {})
        }
        # A `History` that the user lists before this callback has hidden some figures.
        some_hidden = 0 < len(figures) < len(KEYS)
        return figures if some_hidden or any(figures.values()) else {}

    def _drop_zeros(self, logs: Any, lead: str = "") -> None:
        """Remove the figures of a model that has not updated the census: all are 0."""
        if logs and not self._figures(logs, lead):
            for key in self.census.keys:
                logs.pop(f"{lead}{key}", None)

    def _check_once(self, phase: str, logs: Any) -> None:
        """Warns, once per run and phase, if nothing is counted or nothing normalised."""
        if phase in self._checked:
            return
        self._checked.add(phase)
        figures = self._figures(logs)
        if not figures:
            _checks.warn(
                f"MiningStats has nothing to report for {phase}ing: the "
                f"`{phase}_step` of this model calls neither `compute_metrics` nor "
                "the metrics of `self.metrics`. Let it return "
                "`self.compute_metrics(x, y, y_pred, sample_weight)`."
            )
            return
        norm, std = (figures.get(key, math.nan) for key in ("norm", "norm_std"))
        margin, distance = self.census.margin_and_distance()
        soft = getattr(self.census.output.loss, "soft", False)  # then no margin counts
        odd = norm < 0.5 or norm > 2 or std > _SAME_LENGTH * norm  # False for NaN
        if not odd or margin >= 2 or soft or distance == "cosine":
            return
        if "norm" not in self._checked:
            self._checked.add("norm")
            _checks.warn(
                f"The embeddings have a mean length of {norm:.3g} with a standard "
                f"deviation of {std:.2g}, while a margin of {margin:g} "
                f"with the {distance} distance is meant for length 1: end "
                'the embedding with keras.layers.UnitNormalization(dtype="float32"), '
                "or choose a margin of the size of the distances."
            )

    def _check_figures(self, phase: str, logs: Any, lead: str = "") -> None:
        """Warns of NaN, once per run, and of batches without triplets, once per phase."""
        figures = self._figures(logs, lead)
        easy, active, without_positive = (
            figures.get(key, 1.0)
            for key in ("easy", "active", "anchors_without_positive")
        )
        if easy != easy and "nan" not in self._checked:
            self._checked.add("nan")
            _checks.warn(
                f"The figures of MiningStats are NaN for the {phase}: an embedding is NaN "
                "or infinite, or a label names no class (rows that are not one-hot, "
                "fractions). Look for NaN in the inputs; compile with run_eagerly=True "
                "to have the row of a wrong label named."
            )
        if easy + active != 0 or phase in self._checked:
            return
        self._checked.add(phase)
        why = (
            "no row met another row of its label"
            if without_positive == 1
            else "no batch with two rows of one label held a row of another label"
        )
        split = (
            " (`validation_split` takes the last rows: if they are sorted, the last "
            "labels alone)"
        )
        _checks.warn(
            f"No batch of the {phase} holds a triplet: {why}. So its loss says nothing "
            "of the embedding. Draw batches of several rows of several labels with "
            f"PKSampler{'' if phase == 'training' else split}."
        )
