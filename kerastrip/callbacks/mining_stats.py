"""MiningStats: the state of the mining in the logs of fit and evaluate."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import keras

from kerastrip import _checks
from kerastrip._outputs import embedding_output
from kerastrip.callbacks import _attach
from kerastrip.callbacks._copies import without_model
from kerastrip.distances import DISTANCES
from kerastrip.metrics import KEYS

# UnitNormalization in bfloat16 leaves the lengths within 0.4 % of 1.
_SAME_LENGTH = 0.01


class MiningStats(keras.callbacks.Callback):
    """Report what the mining finds in every batch of a compiled model.

    Pass it to `fit` or `evaluate` and nothing else: for that run it attaches a
    `TripletCensus` to the model, whose figures show in the progress bar, `History`,
    `CSVLogger`, TensorBoard and, for validation, as `val_` keys. It may stand
    anywhere among the callbacks; `EarlyStopping` and `ModelCheckpoint` can monitor
    its keys when given a `mode`. The logs hold all figures; the progress bar of `fit`
    shows those in `show`, first and in their order.

    The figures are those of `TripletCensus`: `easy`, `semi_hard`, `hard`, `active`,
    `pairs_with_semi_hard`, `anchors_without_positive`, `pos_dist`, `neg_dist`,
    `norm`, `norm_std`, `spread`, `effective_dim`. They are computed from the embeddings of the
    training step itself, at the margin and distance of the compiled loss, which
    they follow when a callback changes it. Under a `tf.distribute` strategy they are
    those within each replica, or those of the whole batch if the loss has
    `gather=True`. With a loss that mines in an `EmbeddingMemory` the remembered rows
    count as the loss sees them, and `from_memory` is the share of the triplets whose
    positive or negative is one of them.

    It warns, once in a run, when the embeddings are not normalised although the margin
    is meant for length 1, when no batch of the training or of the validation holds
    a triplet, and when the figures are NaN.

    It is detached when the run ends; after an exception or Ctrl-C it stays until
    the next run with a `MiningStats` replaces it, or until `detach()`. Saving the
    model stores nothing of it.

    Args:
        margin: float > 0. None reads the `margin` of the loss.
        distance: `"euclidean"`, `"squared_euclidean"` or `"cosine"`. None reads the
            `distance` of the loss.
        output: position or name of the embedding among the outputs. None takes the
            output whose loss has a `distance`.
        prefix: str put before every key, needed when two are used at once.
        show: the figures that the progress bar of `fit` shows, for the validation too,
            without `prefix`. `show=kerastrip.metrics.KEYS` shows all of them.
        per_batch: if True the logs of a step are those of that batch alone. False:
            of all batches of the epoch so far. The logs of an epoch are the same.

    Raises:
        ValueError, TypeError: from the constructor for bad arguments; from `fit` and
            `evaluate` if the embedding, its margin or its distance cannot be told,
            or if the keys are taken.

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

    # Keras may run the batch hook late, beside later steps: it reads only what the
    # first step has left behind.
    async_safe = True

    def __init__(
        self,
        margin: float | None = None,
        distance: str | None = None,
        *,
        output: int | str | None = None,
        prefix: str = "",
        show: Sequence[str] = ("easy", "semi_hard", "hard", "spread"),
        per_batch: bool = False,
    ) -> None:
        super().__init__()
        if margin is not None:
            _checks.number("margin", margin, above=0)
        if distance is not None:
            _checks.one_of("distance", distance, DISTANCES)
        if isinstance(output, bool) or not isinstance(output, (int, str, type(None))):
            raise TypeError(
                _checks.message("output", "a position, a name or None", output)
            )
        if not isinstance(prefix, str):
            raise TypeError(_checks.message("prefix", "a str", prefix))
        if isinstance(show, str) or not isinstance(show, Sequence):
            raise TypeError(_checks.message("show", "a sequence of figures", show))
        for word in show:
            _checks.one_of("show", word, (*KEYS, "from_memory"))
        _checks.boolean("per_batch", per_batch)
        self.margin = margin
        self.distance = distance
        self.output = output
        self.prefix = prefix
        self.show = tuple(show)
        self.per_batch = per_batch
        self.census: Any = None
        self._where: Any = None  # the output it watches
        self._target: Any = None  # the model it is attached to
        self._bar: _attach.Bar | None = None
        self._fitting = False
        self._phase = "train"
        self._counted: set[str] = set()
        self._checked: set[str] = set()
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        run = dict.fromkeys(("census", "_where", "_target", "_bar"))
        return {**without_model(self), **run, "_fitting": False}

    @property
    def settings(self) -> tuple[Any, ...]:
        """What of it is fixed in a trace."""
        return self.margin, self.distance, self.output, self.per_batch

    def feed(self, y: Any, y_pred: Any) -> dict[str, Any]:
        """Count one batch, inside the step; returns what to show for it."""
        if not self.census.with_memory:  # else the loss has called `hear`
            self._follow()
            self.census.update_state(y, y_pred)
        return self.census.of_latest_batch() if self.per_batch else {}

    def hear(self, labels: Any, embeddings: Any, others: Any) -> None:
        """Count one batch and what its loss remembers; the loss calls it."""
        self._counted.add(self._phase)
        self._follow()
        self.census.update_with(labels, embeddings, others)

    def _follow(self) -> None:
        self.census.margin = self._setting("margin")
        self.census.distance = self._setting("distance")

    def detach(self) -> None:
        """Take the census off the model; without effect where none is attached."""
        model, self._target = self._target, None
        if model is not None:
            _attach.detach(model, self)
            if self.census.with_memory:
                self._where.loss.listeners.remove(self.hear)

    def _attach(self) -> None:
        self.detach()
        model = self.model
        _attach.end_other_runs(model, self)
        self._where = embedding_output(model, self.output)
        loss = self._where.loss
        # Only while it computes does a loss see what it has remembered.
        memory = getattr(loss, "memory", None) is not None
        self.census, self._counted = _attach.census_for(
            model,
            self._setting("margin"),
            self._setting("distance"),
            getattr(loss, "gather", False),
            self.prefix,
            memory,
        )
        self._follow()
        self.census.take = self._take
        _attach.attach(model, self)
        self._target = model
        if memory:
            loss.listeners.append(self.hear)
        self._checked = set()

    def _take(self, structure: Any) -> Any:
        """The embedding's part; runs whenever a batch is counted or that is traced."""
        self._counted.add(self._phase)
        return self._where.take(structure)

    def _setting(self, name: str) -> Any:
        """The argument `name`, or else the attribute of that name of the loss."""
        given = getattr(self, name)
        value = getattr(self._where.loss, name, None) if given is None else given
        if value is None or callable(value):
            loss = self._where.loss
            loss = getattr(loss, "name", None) or getattr(loss, "__name__", loss)
            has = "none" if value is None else "a callable"
            raise ValueError(
                _checks.message(
                    name,
                    f"a loss with a {name}, as TripletLoss, or MiningStats({name}=...)",
                    _checks.Told(f"the loss {loss!r}, which has {has}"),
                )
            )
        return value

    def set_model(self, model: Any) -> None:
        # Keras calls this first in a new run: what an interrupted one left is over.
        self._end()
        self._told = set()
        super().set_model(model)

    def _end(self) -> None:
        self._fitting = False
        self.detach()
        if self._bar is not None:
            self._bar.remove()
            self._bar = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._fitting, self._phase = True, "train"
        self._attach()
        history = getattr(self.model, "history", None)
        if history is not None:
            self._bar = _attach.Bar(history, *self._shown_and_hidden())

    def _shown_and_hidden(self) -> tuple[list[str], set[str]]:
        shown = [f"{self.prefix}{word}" for word in self.show]
        return shown, set(self.census.keys) - set(shown)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._target is None:  # an evaluation between two epochs replaced it
            self._attach()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # In a thread beside the main one a warning could not show the user's line: there
        # it waits for the end of the epoch.
        if threading.current_thread() is threading.main_thread():
            self._check("train", logs)
        self._drop_zeros("train", logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._check("train", logs)
        self._drop_zeros("train", logs)
        self._drop_zeros("test", logs, "val_")
        self._check_figures("training", logs)
        self._check_figures("validation", logs, "val_")

    def on_train_end(self, logs: Any = None) -> None:
        self._end()

    def on_test_begin(self, logs: Any = None) -> None:
        if not self._fitting or self._target is None:
            self._attach()
        self._phase = "test"

    def on_test_end(self, logs: Any = None) -> None:
        self._phase = "train"
        self._check("test", logs)
        if not self._fitting:
            self._check_figures("evaluation", logs)
            self.detach()
            if logs:  # keep all: what stands behind it may want them
                _attach.arrange(logs, self._shown_and_hidden()[0], set())

    def _check(self, phase: str, logs: Any) -> None:
        """Once per run and phase: was anything counted, is it normalised?"""
        if phase in self._checked:
            return
        self._checked.add(phase)
        if phase not in self._counted:
            _checks.warn(
                f"MiningStats has nothing to report for {phase}ing: the "
                f"`{phase}_step` of this model calls neither `compute_metrics` nor "
                "the metrics of `self.metrics`. Let it return "
                "`self.compute_metrics(x, y, y_pred, sample_weight)`."
            )
            return
        logs = logs or {}
        norm, std = (logs.get(f"{self.prefix}{key}") for key in ("norm", "norm_std"))
        soft = getattr(self._where.loss, "soft", False)  # then no margin counts
        if norm is None or self.census.distance == "cosine" or soft:
            return
        odd = norm < 0.5 or norm > 2 or std > _SAME_LENGTH * norm  # False for NaN
        if self.census.margin < 2 and odd and "norm" not in self._told:
            self._told.add("norm")
            _checks.warn(
                f"The embeddings have a mean length of {norm:.3g} with a standard "
                f"deviation of {std:.2g}, while a margin of {self.census.margin:g} "
                f"with the {self.census.distance} distance is meant for length 1: end "
                'the embedding with keras.layers.UnitNormalization(dtype="float32"), '
                "or choose a margin of the size of the distances."
            )

    def _check_figures(self, phase: str, logs: Any, lead: str = "") -> None:
        """Once per run: NaN; and per phase: a loss of 0 out of nothing."""
        easy, active, alone = (
            (logs or {}).get(f"{lead}{self.prefix}{key}", 1.0)
            for key in ("easy", "active", "anchors_without_positive")
        )
        if easy != easy and "nan" not in self._told:
            self._told.add("nan")
            _checks.warn(
                f"The figures of MiningStats are NaN for the {phase}: an embedding is NaN "
                "or infinite, or a label names no class (rows that are not one-hot, "
                "fractions). Look for NaN in the inputs; compile with run_eagerly=True "
                "to have the row of a wrong label named."
            )
        if easy + active != 0 or phase in self._told:
            return
        self._told.add(phase)
        why = (
            "no row met another row of its label"
            if alone == 1
            else "no batch with two rows of one label held a row of another label"
        )
        split = (
            ""
            if phase == "training"
            else (
                " (`validation_split` takes the last rows: if they are sorted, the last "
                "labels alone)"
            )
        )
        _checks.warn(
            f"No batch of the {phase} holds a triplet: {why}. So its loss says nothing "
            "of the embedding. Draw batches of several rows of several labels with "
            f"PKSampler{split}."
        )

    def _drop_zeros(self, phase: str, logs: Any, lead: str = "") -> None:
        """A model that does not count must not report zeros."""
        if logs and phase not in self._counted:
            for key in self.census.keys:
                logs.pop(f"{lead}{key}", None)
