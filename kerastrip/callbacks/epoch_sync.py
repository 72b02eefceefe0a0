"""EpochSync: the samplers of a training follow the epoch number of `fit`."""

from __future__ import annotations

from typing import Any

import keras

from kerastrip import _checks


class EpochSync(keras.callbacks.Callback):
    """Sets the epoch of samplers to the number that `fit` passes.

    With it, `fit(initial_epoch=k)` and a training resumed by
    `BackupAndRestore(save_freq="epoch")` see, from the next epoch on, the batches of
    the training that was not interrupted (with `shuffle=False`). It also checks that
    the replicas of the model's distribution strategy get whole classes.

    Args:
        *samplers: `PKSampler`s, or anything with `set_epoch(epoch)`. Validation
            samplers with `fixed=True` stay at epoch 0 and need none of this.

    Raises:
        TypeError: if there is none, or one cannot set an epoch.
        ValueError: for a sampler with `fixed=True`; when training begins, if the
            number of replicas does not divide `classes_per_batch`.

    Example:
        >>> import numpy as np
        >>> from kerastrip.sampler import PKSampler
        >>> train = PKSampler(np.zeros((6, 2)), [0, 0, 0, 1, 1, 1],
        ...                   classes_per_batch=2, samples_per_class=2)
        >>> sync = EpochSync(train)  # model.fit(train, callbacks=[sync], shuffle=False)
        >>> sync.on_epoch_begin(7)
        >>> train.epoch
        7
    """

    def __init__(self, *samplers: Any):
        super().__init__()
        if not samplers:
            raise TypeError(_checks.message("samplers", "at least one sampler", ()))
        for sampler in samplers:
            if not hasattr(sampler, "set_epoch"):
                raise TypeError(
                    _checks.message("samplers", "samplers with `set_epoch`", sampler)
                )
            if getattr(sampler, "fixed", False):
                raise ValueError(
                    _checks.message(
                        "samplers",
                        "samplers that follow the epochs",
                        sampler,
                        "One with `fixed=True` stays at epoch 0: leave it out.",
                    )
                )
        self.samplers = samplers

    def on_train_begin(self, logs: Any = None) -> None:
        strategy = getattr(self.model, "distribute_strategy", None)
        replicas = getattr(strategy, "num_replicas_in_sync", 1)
        for sampler in self.samplers:
            if hasattr(sampler, "check_replicas"):
                sampler.check_replicas(replicas)

    # Callbacks run before Keras asks for the first batch of an epoch. It does not tell
    # the dataset which epoch that is.
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        for sampler in self.samplers:
            sampler.set_epoch(epoch)
