"""EpochSync: samplers and random layers follow the epoch number of `fit`."""

from __future__ import annotations

import weakref
from typing import Any

import keras

from kerastrip import _checks

__all__ = [
    "EpochSync",
    "sampler_beside",
]

# The stream of random numbers of a layer moves on by so many draws from one epoch to the
# next: more than a layer uses in an epoch.
_DRAWS = 2**20
# Every living EpochSync that has been in a `fit`, in the order of its first `fit`.
_living: weakref.WeakKeyDictionary[EpochSync, None] = weakref.WeakKeyDictionary()


class EpochSync(keras.callbacks.Callback):
    """Sets samplers and random layers to the epoch number of `fit`.

    A training that is resumed with `fit(initial_epoch=k)` or by
    `BackupAndRestore(save_freq="epoch")` then gets, from the next epoch on, the same
    batches as the training without an interruption (with `shuffle=False`). At the
    beginning of an epoch the callback

    - sets the epoch of its samplers, which decides their batches and augmentations;
    - reseeds Dropout and other random layers from the epoch number, because Keras does
      not save their position. (On PyTorch these layers draw from a generator of
      PyTorch, which the callback does not touch.)

    It also looks for faults that would break this promise:

    - when the training begins, it checks that each replica of the distribution strategy
      of the model gets whole classes;
    - it warns if the restored weights are ahead of the beginning of the epoch. This
      happens if the process was killed between the two files of a backup, which Keras
      cannot notice, or while Keras deleted the files after the last epoch (with
      `delete_checkpoint=False` Keras keeps them);
    - it warns if none of its samplers gave the first batch of the training: then `fit`
      trains on another sampler, for example on a copy.

    A copy of this callback (`copy.deepcopy`, as tuners make it) drives the same samplers,
    unless they are copied together with it. A pickled callback contains its samplers, and
    drives the samplers that it contains.

    Args:
        *samplers: `PKSampler`s, or anything with `set_epoch(epoch)`. Validation
            samplers with `fixed=True` stay at epoch 0 and do not belong here.

    Raises:
        TypeError: without samplers, or if a sampler has no `set_epoch`.
        ValueError: for a sampler with `fixed=True`; when training begins, if the
            number of replicas does not divide `classes_per_batch`.

    Example:
        >>> import numpy as np
        >>> from kerastrip.sampling.sampler import PKSampler
        >>> train = PKSampler(np.zeros((6, 2)), [0, 0, 0, 1, 1, 1],
        ...                   classes_per_batch=2, samples_per_class=2)
        >>> sync = EpochSync(train)  # model.fit(train, callbacks=[sync], shuffle=False)
        >>> sync.on_epoch_begin(7)
        >>> train.epoch
        7
    """

    # Keras may run the batch hook late, beside later steps: it only counts calls.
    async_safe = True

    def __init__(self, *samplers: Any):
        super().__init__()
        if not samplers:
            raise _checks.type_error("samplers", "at least one sampler", ())
        for sampler in samplers:
            if not hasattr(sampler, "set_epoch"):
                raise _checks.type_error(
                    "samplers", "samplers with `set_epoch`", sampler
                )
            if getattr(sampler, "fixed", False):
                raise _checks.value_error(
                    "samplers",
                    "samplers that follow the epochs",
                    sampler,
                    "One with `fixed=True` stays at epoch 0: leave it out.",
                )
        self.samplers = samplers
        # Steps of the optimizer before a backup was restored; None after the check.
        self._taken: int | None = None
        # How often each sampler had been asked when the training began; [] after the check.
        self._asked: list[int] | None = None

    def __reduce__(self) -> tuple:
        return type(self), self.samplers  # a copy belongs to no model yet

    def __deepcopy__(self, memo: dict[int, Any]) -> EpochSync:
        # `fit` is given the sampler itself, so a copy of it would train nothing.
        return type(self)(
            *(memo.get(id(sampler), sampler) for sampler in self.samplers)
        )

    # Keras calls this before any callback restores a backup.
    def set_model(self, model: Any) -> None:
        super().set_model(model)
        self._taken = self._iterations()
        _living[self] = None

    def _iterations(self) -> int:
        """The number of steps that the optimizer has taken."""
        optimizer = getattr(self.model, "optimizer", None)
        if optimizer is None:
            return 0
        return int(optimizer.iterations + 0)  # a tensor, under a strategy too

    def on_train_begin(self, logs: Any = None) -> None:
        strategy = getattr(self.model, "distribute_strategy", None)
        replicas = getattr(strategy, "num_replicas_in_sync", 1)
        for sampler in self.samplers:
            if hasattr(sampler, "check_replicas"):
                sampler.check_replicas(replicas)
        self._asked = None

    # Callbacks run before Keras asks for the first batch of an epoch. It does not tell
    # the dataset which epoch that is.
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._taken is not None:
            self._check_restored(epoch, self._iterations() - self._taken)
            self._taken = None
        for sampler in self.samplers:
            sampler.set_epoch(epoch)
        _set_random_layers(self.model, epoch)
        if self._asked is None:
            self._asked = self._calls()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        asked, self._asked = self._asked, []
        if asked and asked == self._calls():
            _checks.warn(
                f"EpochSync drives {', '.join(map(repr, self.samplers))}, which gave "
                "no batch when the training began: `fit` trains on other data. Make "
                "EpochSync with the sampler that `fit` is given."
            )

    def _calls(self) -> list[int]:
        """How often each sampler has been asked for a batch, if it counts that."""
        return [s.asked for s in self.samplers if hasattr(s, "asked")]

    def _check_restored(self, epoch: int, restored: int) -> None:
        """Warns if the weights have come more steps than there are before this epoch.

        Args:
            epoch: number of the epoch that begins.
            restored: steps by which the optimizer moved on when a backup was restored.
        """
        steps = (self.params or {}).get("steps") or 0
        ahead = restored - epoch * steps
        # More steps than an epoch has: the backup is of a training with longer epochs.
        if ahead > 0 and (ahead <= steps or epoch == 0):
            _checks.warn(
                f"The restored weights are {ahead} steps ahead of epoch {epoch}, which "
                "now begins: the training will differ from one without an interruption. "
                "The backup was cut short while it was written or deleted, or made "
                'inside an epoch. `BackupAndRestore(save_freq="epoch", '
                "double_checkpoint=True)` keeps the backup before: rename its `*.bkp` "
                "files."
            )


def _set_random_layers(model: Any, epoch: int) -> None:
    """Reseeds Dropout and other random layers from the epoch number.

    Each random layer has a `keras.random.SeedGenerator`, whose state is a variable of two
    numbers, (seed, position). Layers keep the generator under different names, but the
    variable has the same name everywhere.
    """
    for variable in getattr(model, "non_trainable_variables", ()):
        if variable.name == "seed_generator_state":
            seed = int((variable + 0)[0])
            variable.assign([seed, epoch * _DRAWS % 2**31])


def sampler_beside(callback: keras.callbacks.Callback) -> Any:
    """The first sampler that an `EpochSync` drives in the `fit` of a callback, or None.

    Keras does not show a callback the other callbacks of its `fit`, but all of them get
    the same dict `params`, and another dict in the next `fit`. So an `EpochSync` of an
    earlier `fit` that ended in an exception is not mistaken for one of this `fit`.
    """
    for reference in _living.keyrefs():
        sync = reference()
        if sync is None or sync.model is not callback.model:
            continue
        if sync.params is callback.params:
            return sync.samplers[0]
    return None
