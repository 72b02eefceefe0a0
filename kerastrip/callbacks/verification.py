"""VerificationEvaluation: ROC figures of held-out data in the epoch logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from kerastrip import _checks
from kerastrip.callbacks._evaluation import EpochEvaluation
from kerastrip.distances import DISTANCES
from kerastrip.verification import (
    check_codes,
    check_metrics,
    flags_array,
    pairs_array,
    verification_metrics,
)


class VerificationEvaluation(keras.callbacks.Callback):
    """Adds `val_auc`, `val_eer`, `val_tar@0.01` of held-out data to the epoch logs.

    After an epoch every sample is embedded once, and all pairs, or those of a list,
    are told apart by their distance (`kerastrip.verification.verification_metrics`).
    Where it stands among the callbacks, what `every` does between measurements, and
    what happens to NaN embeddings is as for `RetrievalEvaluation`.

    Args:
        x: held-out data, as for `RetrievalEvaluation`.
        y: labels, likewise. Not needed with `is_same`.
        pairs: (pairs, 2) rows of x. Default None: all n (n - 1) / 2 pairs.
        is_same: (pairs,) booleans, in place of y.
        metrics: words of `verification_metrics`. Default
            `("auc", "eer", "tar@0.01")`.
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`.
        every: epochs from one measurement to the next, at least 1. Default 1.
        prefix: put before each key. Default `"val_"`.
        output: name or position of the embedding among the outputs of the model.
            None takes the output whose loss has a `distance`, or the only one.
        batch_size: rows per call of the model. Default 128.
        verbose: whether to show a progress bar while embedding. Default False.

    Attributes:
        results: what was measured: epoch -> dict as `verification_metrics` returns
            it, with the numbers of pairs.

    Raises:
        TypeError, ValueError: if the arrays do not fit each other, a word is
            unknown, or there are no same or no different pairs.

    Example:

    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.eye(3)[[0, 0, 1, 1, 2, 2]], [0, 0, 1, 1, 2, 2]
    >>> history = model.fit(x, np.zeros((6, 2)), verbose=0,
    ...                     callbacks=[VerificationEvaluation(x, y)])
    >>> history.history["val_eer"]
    [0.0]
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        *,
        pairs: Any = None,
        is_same: Any = None,
        metrics: Sequence[str] = ("auc", "eer", "tar@0.01"),
        distance: str = "euclidean",
        every: int = 1,
        prefix: str = "val_",
        output: int | str | None = None,
        batch_size: int = 128,
        verbose: bool = False,
    ):
        super().__init__()
        keys = check_metrics(metrics)
        _checks.one_of("distance", distance, DISTANCES)
        if is_same is not None and (pairs is None or y is not None):
            raise ValueError(
                _checks.message(
                    "is_same", "`pairs` with it, and y=None in its place", is_same
                )
            )
        self._evaluation = EpochEvaluation(
            self,
            x,
            y,
            labelled=is_same is None,
            keys=keys,
            measure=lambda embeddings, labels: verification_metrics(
                embeddings,
                labels if is_same is None else None,
                pairs=pairs,
                is_same=is_same,
                metrics=keys,
                distance=distance,
            ),
            every=every,
            prefix=prefix,
            output=output,
            batch_size=batch_size,
            verbose=verbose,
        )
        labels = self._evaluation.labels
        if pairs is None:
            if labels is not None:
                check_codes("y", labels)
            return
        if self._evaluation.length is not None:
            pairs = pairs_array(pairs, self._evaluation.length)
        if is_same is not None:
            is_same = flags_array(is_same, len(pairs))

    @property
    def results(self) -> dict[int, dict[str, float]]:
        return self._evaluation.results

    def on_train_begin(self, logs: Any = None) -> None:
        self._evaluation.begin()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._evaluation.end(epoch, logs)
