"""CollapseGuard: an alarm for trainings that cannot get anywhere."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import keras

from kerastrip import _checks
from kerastrip._outputs import embedding_output
from kerastrip.callbacks._copies import without_model
from kerastrip.metrics import KEYS

__all__ = [
    "Alarm",
    "CollapseGuard",
]

_ACTIONS = ("warn", "stop", "reduce_lr")

# A healthy training from scratch starts at a spread of 0.01 to 0.1 and falls to 0.002 for
# a while when mining is hard; a collapsed embedding stays under 0.0005.
_SPREAD = 1e-3
_LINE = 1.1
_LOSS_TOLERANCE = 0.05
_CHANCE = 0.02
_IDLE = 1e-4

# kind of alarm -> the remedies, in the order in which to try them.
_REMEDIES = {
    "not_finite": (
        "look for NaN and missing values in the inputs (and for a division by a "
        "deviation of 0), look for labels that name no class (rows that are not "
        "one-hot, fractions): compile with run_eagerly=True to have the row named, "
        "{lower_rate}, clip the gradients (clipnorm=1.0), with mixed precision take "
        "bfloat16 for float16, and go back to weights saved before"
    ),
    "exploded": (
        'end the embedding with UnitNormalization(dtype="float32"), {lower_rate}, clip '
        "the gradients (clipnorm=1.0)"
    ),
    "no_triplets": "draw P x K batches with PKSampler, check the labels",
    "collapsed": (
        "{lower_rate}, begin with mining='semi_hard' or 'all' and take 'hard' later "
        "(MiningSchedule), put more classes into a batch, train a softmax head beside "
        "the embedding"
    ),
    "at_chance": (
        "check that labels and samples belong together and are shuffled as one, check "
        "that the inputs reach the model scaled and not blank, raise the learning rate"
    ),
    "idle": (
        "stop if retrieval is good enough, put more classes into a batch, mine 'hard', "
        "raise the margin, augment more"
    ),
}


class Alarm(NamedTuple):
    """An alarm of a `CollapseGuard`, or one for moving averages that lag behind.

    Attributes:
        epoch: number of the epoch, counted from 0.
        kind: `"not_finite"`, `"exploded"`, `"collapsed"`, `"at_chance"`, `"no_triplets"`
            or `"idle"`; `"lagging"` for moving averages.
        message: the sentence that was given as a warning.
    """

    epoch: int
    kind: str
    message: str


class CollapseGuard(keras.callbacks.Callback):
    """Raise an alarm when the embedding collapses, explodes or has nothing to learn.

    At the end of each epoch it reads the figures of `MiningStats` (pass both callbacks, in
    any order). An alarm is one sentence with the figures and the remedies, in the order
    in which to try them. It is kept in `alarms` and given as a warning.

    | kind | figures of the training batches |
    |---|---|
    | `not_finite` | NaN: an embedding of the epoch is NaN or infinite, or a label names no class |
    | `exploded` | `norm` over `max_norm` |
    | `collapsed` | for `patience` epochs: the embedding is a point or a line, or the loss is stuck, see below |
    | `at_chance` | for `chance_patience` epochs: `hard` within 0.02 of 0.5 and `pos_dist` within 2 % of `neg_dist`: the embedding has nothing to do with the labels, as with permuted labels |
    | `no_triplets` | no batch of the epoch holds a triplet |
    | `idle` | for `idle_patience` epochs: `active` under 0.0001: every triplet is easy |

    An embedding has collapsed to a point if its `spread` is under 0.001 `norm`^2, and to a
    line if its `effective_dim` is under 1.1 (checked for embeddings of 3 and more
    dimensions). Both count only while `easy` is under 0.5. The loss is stuck if it is
    within 5 % of the margin (of ln 2 if it is soft) while `hard` is over 0.95 or both
    distances are under a tenth of the margin.

    Args:
        action: what to do at an alarm: `"warn"`; `"stop"` the training; or
            `"reduce_lr"`: multiply the learning rate by `factor` at every `exploded` and
            `collapsed` alarm, and only warn at other alarms (weights that are NaN stay
            NaN at any rate).
        patience: int >= 1, epochs in a row that make a collapse.
        chance_patience: int >= 1, epochs in a row at chance.
        idle_patience: int >= 1, epochs in a row without anything to learn from.
        max_norm: float > 0, the largest mean length of the embeddings.
        factor: float between 0 and 1, for `"reduce_lr"`.
        prefix: the `prefix` of the `MiningStats` to read.
        output: position or name of the embedding among the outputs. None takes the
            output whose loss has a `distance`.

    Raises:
        ValueError, TypeError: from the constructor for bad arguments.

    Example:

    >>> guard = CollapseGuard("stop", patience=2)
    >>> guard.alarms
    []
    """

    def __init__(
        self,
        action: str = "warn",
        *,
        patience: int = 3,
        chance_patience: int = 5,
        idle_patience: int = 10,
        max_norm: float = 1000.0,
        factor: float = 0.1,
        prefix: str = "",
        output: int | str | None = None,
    ) -> None:
        super().__init__()
        self.action = _checks.one_of("action", action, _ACTIONS)
        self.patience = {
            "not_finite": 1,
            "exploded": 1,
            "no_triplets": 1,
            "collapsed": _checks.integer("patience", patience, 1),
            "at_chance": _checks.integer("chance_patience", chance_patience, 1),
            "idle": _checks.integer("idle_patience", idle_patience, 1),
        }
        self.max_norm = _checks.number("max_norm", max_norm, above=0)
        self.factor = _checks.number("factor", factor, above=0, below=1)
        self.prefix = _checks.text("prefix", prefix)
        self.output = output
        self.alarms: list[Alarm] = []
        self._kind: str | None = None  # the diagnosis of the latest epoch,
        self._epochs = 0  # and for how many epochs in a row it has been the same
        self._warned = False
        self._where: Any = None  # the output it watches

    def __getstate__(self) -> dict[str, Any]:
        return {**without_model(self), "_where": None}

    def on_train_begin(self, logs: Any = None) -> None:
        self._where = embedding_output(self.model, self.output)
        self._kind, self._epochs = None, 0
        self._warned = False
        self.alarms = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs = logs or {}
        names = {key: self.prefix + key for key in KEYS}
        missing = [name for name in names.values() if name not in logs]
        if missing:
            if not self._warned:
                self._warned = True
                _checks.warn(
                    f"CollapseGuard sees nothing: the logs have no {missing[0]!r}. "
                    "Add MiningStats() to the callbacks, with the prefix given here "
                    f"({self.prefix!r})."
                )
            return
        figures = {key: logs[name] for key, name in names.items()}
        figures["loss"] = logs.get(self._where.loss_key, math.nan)
        kind, seen = self._diagnose(figures)
        self._epochs = self._epochs + 1 if kind == self._kind else 1
        self._kind = kind
        if kind is not None and self._epochs == self.patience[kind]:
            self._alarm(epoch, kind, seen)

    def _diagnose(self, now: dict[str, float]) -> tuple[str | None, str]:
        """The worst kind of alarm that fits these figures, and the reason in words."""
        # The worst kind first: an epoch shows one kind only.
        if not math.isfinite(now["norm"]):
            return "not_finite", (
                "there is NaN or infinity in the embeddings, or a label names no class, "
                "so no figure of this epoch counts"
            )
        if now["norm"] > self.max_norm:
            return "exploded", (
                f"the embeddings have a mean length of {now['norm']:.3g} (limit "
                f"{self.max_norm:g})"
            )
        if now["easy"] + now["active"] == 0:
            return "no_triplets", "no batch holds a triplet"
        collapse = self._collapse(now)
        if collapse:
            return "collapsed", f"the embedding has collapsed: {collapse}"
        if (
            abs(now["hard"] - 0.5) < _CHANCE
            and abs(now["pos_dist"] - now["neg_dist"]) < _CHANCE * now["neg_dist"]
        ):
            return "at_chance", (
                "the embedding knows nothing of the labels: a negative is nearer than "
                f"a positive in {now['hard']:.1%} of the triplets (chance: 50%), mean "
                f"distances {now['pos_dist']:.3g} and {now['neg_dist']:.3g}"
            )
        if now["active"] < _IDLE:
            return "idle", (
                f"all triplets but {now['active']:.1g} are easy, the loss has nothing "
                "left to teach"
            )
        return None, ""

    def _collapse(self, now: dict[str, float]) -> str:
        """In words, how the embedding has collapsed; "" if it has not."""
        solved = (
            now["easy"] >= 0.5
        )  # whatever its shape, the embedding separates the labels
        if now["spread"] <= _SPREAD * now["norm"] ** 2 and not solved:
            return (
                f"all embeddings lie at one point (spread {now['spread']:.2g} at a "
                f"mean length of {now['norm']:.3g}, distances {now['pos_dist']:.2g} "
                f"and {now['neg_dist']:.2g}, loss {now['loss']:.3g})"
            )
        if now["effective_dim"] < _LINE and not solved and self._dim() > 2:
            return (
                "all embeddings lie on one line (effective dimension "
                f"{now['effective_dim']:.3g} of {self._dim()}, {now['easy']:.0%} of "
                "the triplets easy)"
            )
        margin = getattr(self._where.loss, "margin", None)
        if margin is None:
            return ""
        soft = getattr(self._where.loss, "soft", False)
        stuck = math.log(2) if soft else margin  # the loss if all distances are equal
        near = max(now["pos_dist"], now["neg_dist"]) < 0.1 * margin
        if abs(now["loss"] - stuck) <= _LOSS_TOLERANCE * stuck and (
            now["hard"] > 0.95 or near
        ):
            return (
                f"the loss sits at {'ln 2' if soft else 'the margin'} "
                f"({now['loss']:.4g}) with {now['hard']:.0%} of the triplets hard and "
                f"mean distances of {now['pos_dist']:.2g} and {now['neg_dist']:.2g}"
            )
        return ""

    def _dim(self) -> int:
        """Dimensions of the embedding, 0 for a subclassed model, which does not show them."""
        outputs = getattr(self.model, "outputs", None)
        if not outputs or self._where.index is None:
            return 0
        return outputs[self._where.index].shape[-1] or 0

    def _rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def _alarm(self, epoch: int, kind: str, seen: str) -> None:
        """Raises an alarm: acts, keeps it and warns."""
        lasted = self.patience[kind]
        since = f" for {lasted} epochs" if lasted > 1 else ""
        rate = f"lower the learning rate to a tenth ({0.1 * self._rate():.2g})"
        remedies = _REMEDIES[kind].format(lower_rate=rate)
        message = f"Epoch {epoch + 1}: {seen}{since}; in this order: {remedies}."
        if self.action == "stop":
            self.model.stop_training = True
            message += " Training stops here."
        elif self.action == "reduce_lr" and kind in ("exploded", "collapsed"):
            message += self._reduce_rate()
            self._epochs = 0  # a lower rate gets as many epochs to help
        self.alarms.append(Alarm(epoch, kind, message))
        _checks.warn(message)

    def _reduce_rate(self) -> str:
        """Reduces the learning rate; returns a sentence about it."""
        try:
            self.model.optimizer.learning_rate = self.factor * self._rate()
        except TypeError:  # a LearningRateSchedule owns the rate
            return " The learning rate follows a schedule and was left alone."
        return f" The learning rate is now {self._rate():.2g}."
