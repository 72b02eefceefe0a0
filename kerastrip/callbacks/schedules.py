"""MarginSchedule, MiningSchedule: change the triplet loss while the model trains.

The margin and the mining word of a loss are Python attributes that are read when a
step is traced. Both callbacks set them at the beginning of an epoch and let the model
trace again: one new trace per change, the same on every backend. Validation and
`MiningStats` use the new value, too. After the training the loss has its own value
again, so that a later `fit` without the callback does not train with a changed loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from kerastrip import _checks
from kerastrip._outputs import embedding_output
from kerastrip.callbacks._copies import without_model
from kerastrip.callbacks._traces import retrace
from kerastrip.metrics import FRACTIONS
from kerastrip.mining.engine import MININGS

__all__ = [
    "MarginSchedule",
    "MiningSchedule",
]


class MarginSchedule(keras.callbacks.Callback):
    """Set the margin of the compiled loss at the beginning of every epoch.

    The logs of the epoch get the key `margin`. After the training the loss has its own
    margin again, and a `fit` that begins at epoch 0 begins with its own margin; with
    `initial_epoch` the same callback continues with the margin at which it stopped.
    After an exception or Ctrl-C the loss keeps the changed margin until the next `fit`
    with the same callback.

    Args:
        schedule: a mapping {epoch: margin}, each margin being valid from its epoch
            on; or a function (epoch, margin, logs) -> margin that gets the number of the
            epoch, the margin so far and the logs of the epoch before ({} at first). If
            the loss or the figures of `MiningStats` in these logs are NaN, the function
            is not called and the margin stays.
        output: position or name of the embedding among the outputs. None takes the
            output whose loss has a `distance`.

    Raises:
        ValueError, TypeError: from the constructor for bad arguments; from `fit` if
            the loss has no `margin` or does not use it (`soft=True`), or the function
            returns none.

    Example:

    >>> ramp = MarginSchedule({0: 0.1, 5: 0.2, 10: 0.4})
    >>> on_demand = MarginSchedule(
    ...     lambda epoch, margin, logs: margin * (1.5 if logs.get("active", 1) < 0.1 else 1)
    ... )
    """

    def __init__(
        self,
        schedule: Mapping[int, float] | Callable[[int, float, dict[str, float]], float],
        *,
        output: int | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(schedule, Mapping):
            _check_epochs("schedule", schedule)
            for margin in schedule.values():
                _checks.number("schedule", margin, above=0)
        elif not callable(schedule):
            raise _checks.type_error(
                "schedule", "a mapping {epoch: margin} or a function", schedule
            )
        self.schedule = schedule
        self.output = output
        self._lent = _Lent("margin")
        self._logs: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return without_model(self)

    def on_train_begin(self, logs: Any = None) -> None:
        loss = self._lent.begin(self.model, self.output)
        if getattr(loss, "soft", False):
            raise _checks.value_error(
                "schedule",
                "a loss that uses its margin",
                _checks.Told("one with soft=True, which does not"),
                "Take the callback away, or compile the loss with soft=False.",
            )
        self._logs = {}

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        margin = self._lent.own
        if isinstance(self.schedule, Mapping):
            # The latest entry that has begun; before the first the loss's own margin.
            begun = [start for start in self.schedule if start <= epoch]
            margin = self.schedule[max(begun)] if begun else margin
        else:
            # Epoch 0 begins a new training, with the loss's own margin.
            if epoch > 0 and self._lent.latest is not None:
                margin = self._lent.latest
            if not _has_nan(self._logs):
                margin = self.schedule(epoch, margin, self._logs)
                margin = _checks.number("schedule(...)", margin, above=0)
        self._lent.change(margin)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._logs = dict(logs or {})
        if logs is not None:
            logs["margin"] = self._lent.latest

    def on_train_end(self, logs: Any = None) -> None:
        self._lent.give_back()


class MiningSchedule(keras.callbacks.Callback):
    """Change the mining of the compiled loss, by epoch or when a figure falls.

    `MiningSchedule(["all", "semi_hard", "hard"])` goes on to the next mining word when
    the figure `semi_hard` of `MiningStats` was under `below` for `patience` epochs in a
    row: then the present mining finds few triplets to learn from. A figure that is NaN
    is under no threshold. The logs of the epoch get the key `mining_stage`, the position
    of the present mining word.

    A `fit` that begins at epoch 0 begins with the first mining word (before the first
    entry of a mapping with the mining of the loss itself); with `initial_epoch` the same
    callback continues where it stopped. After the training the loss has its own mining
    again. After an exception or Ctrl-C the loss keeps the changed mining until the next
    `fit` with the same callback.

    Args:
        stages: mining words in order, or a mapping {epoch: mining word}, each word being
            valid from its epoch on.
        monitor: the key of the logs to watch; not used with a mapping.
        below: float, the threshold. Default 0.05.
        patience: int >= 1, epochs in a row under the threshold.
        output: position or name of the embedding among the outputs. None takes the
            output whose loss has a `distance`.

    Raises:
        ValueError, TypeError: from the constructor for bad arguments; from `fit` if
            the loss has no `mining`.

    Example:

    >>> by_epoch = MiningSchedule({0: "semi_hard", 10: "hard"})
    >>> by_figure = MiningSchedule(["all", "semi_hard", "hard"], below=0.1)
    """

    def __init__(
        self,
        stages: Sequence[str] | Mapping[int, str],
        *,
        monitor: str = "semi_hard",
        below: float = 0.05,
        patience: int = 1,
        output: int | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(stages, str) or not isinstance(stages, (Mapping, Sequence)):
            raise _checks.type_error(
                "stages", "a sequence of words or a mapping {epoch: word}", stages
            )
        if isinstance(stages, Mapping):
            _check_epochs("stages", stages)
            self.words = tuple(stages[epoch] for epoch in sorted(stages))
        else:
            self.words = tuple(stages)
        if not self.words:
            raise _checks.value_error("stages", "at least one word", stages)
        for word in self.words:
            _checks.one_of("stages", word, MININGS)
        self.stages = stages
        self.monitor = _checks.text("monitor", monitor)
        self.below = _checks.number("below", below)
        self.patience = _checks.integer("patience", patience, 1)
        self.output = output
        self.stage = 0
        self._lent = _Lent("mining")
        self._epochs_below = 0
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return without_model(self)

    def on_train_begin(self, logs: Any = None) -> None:
        self._lent.begin(self.model, self.output)
        self._warned = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 0:
            self.stage = self._epochs_below = 0
        if isinstance(self.stages, Mapping):
            # -1 before the first entry: then the loss has its own mining.
            self.stage = sum(start <= epoch for start in self.stages) - 1
        word = self.words[self.stage] if self.stage >= 0 else self._lent.own
        self._lent.change(word)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs = {} if logs is None else logs
        logs["mining_stage"] = self.stage
        if isinstance(self.stages, Mapping):
            return
        value = logs.get(self.monitor)  # NaN is not below any threshold
        if value is None:
            if not self._warned:
                self._warned = True
                _checks.warn(
                    f"MiningSchedule stays at {self.words[self.stage]!r}: the logs "
                    f"have no {self.monitor!r}, only {sorted(logs)}. Add MiningStats() "
                    "to the callbacks, or name another key in monitor=."
                )
            return
        self._epochs_below = self._epochs_below + 1 if value < self.below else 0
        if self._epochs_below >= self.patience and self.stage < len(self.words) - 1:
            self.stage += 1
            self._epochs_below = 0

    def on_train_end(self, logs: Any = None) -> None:
        self._lent.give_back()


class _Lent:
    """Changes an attribute of a loss while a model trains, and restores it afterwards.

        fit:  begin --> change --> change ... --> give_back
        loss:  own       value      value          own

    Attributes:
        own: the value that the loss had before the training.
        latest: the latest value in training; None before the first training. It is kept
            after `give_back`, so that another `fit` can continue with it.
    """

    def __init__(self, name: str) -> None:
        self.own: Any = None
        self.latest: Any = None
        self._name = name
        self._model: Any = None
        self._loss: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None, "_loss": None}

    def begin(self, model: Any, output: int | str | None) -> Any:
        """Finds the loss of the embedding in the model, and remembers its own value."""
        self.give_back()  # in case an interrupted training has not
        self._model, self._loss = model, _loss_with(model, self._name, output)
        self.own = getattr(self._loss, self._name)
        return self._loss

    def change(self, value: Any) -> None:
        """Sets the value; the model traces anew if the value changes."""
        self.latest = value
        if getattr(self._loss, self._name) != value:
            setattr(self._loss, self._name, value)
            retrace(self._model)

    def give_back(self) -> None:
        """Restores the loss's own value, unless the user has set another one meanwhile."""
        latest = self.latest
        if self._loss is not None and getattr(self._loss, self._name) == latest:
            self.change(self.own)
            self.latest = latest
        self._model = self._loss = None


def _check_epochs(name: str, schedule: Mapping[int, Any]) -> None:
    """An error unless the keys of a mapping are epochs."""
    if not schedule:
        raise _checks.value_error(name, "at least one epoch", schedule)
    for epoch in schedule:
        _checks.integer(name, epoch, 0, "The keys are epochs, counted from 0.")


def _loss_with(model: Any, attribute: str, output: int | str | None) -> Any:
    """The compiled loss of the embedding, which must have `attribute`."""
    loss = embedding_output(model, output).loss
    # A loss that is a function may have the attribute, but does not read it.
    if inspect.isfunction(loss) or not hasattr(loss, attribute):
        raise _checks.value_error(
            "output",
            f"an output whose loss has a `{attribute}`",
            _checks.Told(f"one with the loss {loss!r}"),
            "Compile the model with kerastrip.losses.TripletLoss for it.",
        )
    return loss


def _has_nan(logs: Mapping[str, float]) -> bool:
    """Whether a loss or a fraction of triplets in the logs is NaN."""
    return any(
        value != value and key.endswith(("loss", *FRACTIONS))
        for key, value in logs.items()
    )
