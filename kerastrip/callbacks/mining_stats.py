"""MiningStats: the state of the mining in the logs of fit and evaluate."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from kerastrip import _checks
from kerastrip._outputs import Output, embedding_output
from kerastrip.callbacks._attach import attach, creation_scope, detach
from kerastrip.distances import DISTANCES
from kerastrip.metrics import TripletCensus


class MiningStats(keras.callbacks.Callback):
    """Report what the mining finds in every batch of a compiled model.

    Pass it to `fit` or `evaluate` and nothing else: for that run it attaches a
    `TripletCensus` to the model, whose figures show in the progress bar, `History`,
    `CSVLogger`, TensorBoard and, for validation, as `val_` keys. It may stand
    anywhere among the callbacks; `EarlyStopping` and `ModelCheckpoint` can monitor
    its keys when given a `mode`.

    The figures are those of `TripletCensus`: `easy`, `semi_hard`, `hard`, `active`,
    `pairs_with_semi_hard`, `anchors_without_positive`, `pos_dist`, `neg_dist`,
    `norm`, `spread`, `effective_dim`. They are computed from the embeddings of the
    training step itself, at the margin and distance of the compiled loss, which
    they follow when a callback changes it. Under a `tf.distribute` strategy they are
    those within each replica, or those of the whole batch if the loss has
    `gather=True`.

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
        if not isinstance(per_batch, bool):
            raise TypeError(_checks.message("per_batch", "True or False", per_batch))
        self.margin = margin
        self.distance = distance
        self.output = output
        self.prefix = prefix
        self.per_batch = per_batch
        self.census: TripletCensus
        self._target: Any = None  # the model it is attached to
        self._where: Output
        self._fitting = False
        self._phase = "train"
        self._counted: set[str] = set()
        self._checked: set[str] = set()
        self._norm_told = False

    def feed(self, y: Any, y_pred: Any) -> dict[str, Any]:
        """Count one batch, inside the step; returns what to show for it."""
        self.census.margin = self._setting("margin")
        self.census.distance = self._setting("distance")
        if self.per_batch:
            return self.census.update_and_report(y, y_pred)
        self.census.update_state(y, y_pred)
        return {}

    def detach(self) -> None:
        """Take the census off the model; without effect where none is attached."""
        model, self._target = self._target, None
        if model is not None:
            detach(model, self)

    def _attach(self) -> None:
        self.detach()
        model = self.model
        self._where = embedding_output(model, self.output)
        margin, distance = self._setting("margin"), self._setting("distance")
        with creation_scope(model):
            self.census = TripletCensus(
                margin,
                distance,
                gather=getattr(self._where.loss, "gather", False),
                prefix=self.prefix,
                name=f"{self.prefix}triplet_census",
            )
        self.census.take = self._take
        attach(model, self)
        self._target = model
        self._counted, self._checked = set(), set()

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
        self._fitting = False
        self.detach()
        super().set_model(model)

    def on_train_begin(self, logs: Any = None) -> None:
        self._fitting, self._phase = True, "train"
        self._attach()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._target is None:  # an evaluation between two epochs replaced it
            self._attach()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._check("train", logs)
        self._drop_zeros("train", logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._drop_zeros("train", logs)
        self._drop_zeros("test", logs, "val_")

    def on_train_end(self, logs: Any = None) -> None:
        self._fitting = False
        self.detach()

    def on_test_begin(self, logs: Any = None) -> None:
        if not self._fitting or self._target is None:
            self._attach()
        self._phase = "test"

    def on_test_end(self, logs: Any = None) -> None:
        self._phase = "train"
        self._check("test", logs)
        if not self._fitting:
            self.detach()

    def _check(self, phase: str, logs: Any) -> None:
        """Once per run and phase: was anything counted, is it normalised?"""
        if phase in self._checked:
            return
        self._checked.add(phase)
        if phase not in self._counted:
            warnings.warn(
                f"MiningStats has nothing to report for {phase}ing: the "
                f"`{phase}_step` of this model calls neither `compute_metrics` nor "
                "the metrics of `self.metrics`. Let it return "
                "`self.compute_metrics(x, y, y_pred, sample_weight)`."
            )
            return
        norm = (logs or {}).get(f"{self.prefix}norm")
        if norm is None or self._norm_told or self.census.distance == "cosine":
            return
        if self.census.margin < 2 and not 0.5 <= norm <= 2:
            self._norm_told = True
            warnings.warn(
                f"The embeddings have a mean length of {norm:.3g}, while a margin of "
                f"{self.census.margin:g} with the {self.census.distance} distance is "
                "meant for length 1: end the embedding with "
                'keras.layers.UnitNormalization(dtype="float32"), or choose a margin '
                "of the size of the distances."
            )

    def _drop_zeros(self, phase: str, logs: Any, lead: str = "") -> None:
        """A model that does not count must not report zeros."""
        if logs and phase in self._checked - self._counted:
            for key in self.census.keys:
                logs.pop(f"{lead}{key}", None)
