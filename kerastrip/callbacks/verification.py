"""VerificationEvaluation: verification metrics of held-out data in the epoch logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kerastrip import _checks
from kerastrip.callbacks._copies import without_model
from kerastrip.callbacks._evaluation import (
    EpochEvaluation,
    HeldOut,
    check_interval_classes,
)
from kerastrip.evaluation.intervals import (
    check_interval,
    few_classes_warning,
    with_intervals,
)
from kerastrip.evaluation.verification import (
    VerificationCurve,
    check_codes,
    check_metrics,
    class_scores,
    flags_array,
    pairs_array,
    verification_curve,
)

__all__ = [
    "VerificationEvaluation",
]


class VerificationEvaluation(keras.callbacks.Callback):
    """Adds `val_auc`, `val_eer`, `val_tar@0.01` of held-out data to the epoch logs.

    After an epoch every sample is embedded once. All pairs, or the pairs of a list, are
    then decided to be the same or different by their distance
    (`kerastrip.evaluation.verification_metrics`). As for `RetrievalEvaluation` are: the
    place among the callbacks, the epochs without a measurement, the distance, the
    beginning of new `results`, and the figures of NaN embeddings.

    Args:
        x: held-out data, as for `RetrievalEvaluation`.
        y: labels, as for `RetrievalEvaluation`. Not needed with `is_same`.
        pairs: (pairs, 2) rows of x. Default None: all n (n - 1) / 2 pairs.
        is_same: (pairs,) booleans, in place of y.
        metrics: metric words of `verification_metrics`. Default
            `("auc", "eer", "tar@0.01")`.
        distance: `"euclidean"`, `"squared_euclidean"` or `"cosine"`. Default None:
            the `distance` of the compiled loss, `"euclidean"` if it has none.
        every: epochs from one measurement to the next, at least 1. Default 1.
        prefix: text before each key. Default `"val_"`.
        names: other names for the logs, as for `RetrievalEvaluation`:
            `{"tar@0.01": "tar_1e-2"}` logs `val_tar_1e-2`. Default None.
        interval: level of the intervals, as for `RetrievalEvaluation`; needs labels. With
            the name above the ends are `val_tar_1e-2_low` and `val_tar_1e-2_high`.
            Default None: figures alone.
        output: name or position of the embedding among the outputs of the model.
            None takes the output whose loss has a `distance`, or the only output.
        batch_size: rows per call of the model. Default 128.
        verbose: as for `RetrievalEvaluation`.

    Attributes:
        results: epoch -> the dict of `verification_metrics`, with the numbers of pairs.
        curve: the latest `VerificationCurve`, None before the first measurement. It
            gives the thresholds, with the precision and recall at each.

    Raises:
        TypeError, ValueError: if the arrays do not fit each other, a metric word is
            unknown, or there are no same or no different pairs; with `interval` if
            there are no labels, or same pairs of fewer than two classes.

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
        distance: str | None = None,
        every: int = 1,
        prefix: str = "val_",
        names: Mapping[str, str] | None = None,
        interval: float | None = None,
        output: int | str | None = None,
        batch_size: int = 128,
        verbose: bool | None = None,
    ):
        super().__init__()
        self._metrics = check_metrics(metrics)
        if is_same is not None and (pairs is None or y is not None):
            raise _checks.value_error(
                "is_same", "`pairs` with it, and y=None in its place", is_same
            )
        self._interval = check_interval(interval)
        if interval is not None and is_same is not None:
            raise _checks.value_error(
                "interval",
                "None with `is_same`",
                interval,
                "Give labels as y in its place: without labels nobody knows which pairs "
                "share a class.",
            )
        data = HeldOut(x, y, labelled=is_same is None)
        if pairs is None:
            if data.table is not None:
                check_codes("y", data.table.codes)
        else:
            if data.length is not None:  # else after the first epoch
                pairs = pairs_array(pairs, data.length)
            if is_same is not None:
                is_same = flags_array(is_same, len(pairs))
        if interval is not None and data.table is not None:
            check_interval_classes(interval, _classes_of_pairs(data.table.codes, pairs))
        self._pairs, self._is_same = pairs, is_same
        self.curve: VerificationCurve | None = None
        self._evaluation = EpochEvaluation(
            self,
            [data],
            keys=self._metrics,
            with_ends=() if interval is None else self._metrics,
            measure=self._measure,
            every=every,
            prefix=prefix,
            names=names,
            distance=distance,
            output=output,
            batch_size=batch_size,
            verbose=verbose,
        )

    def __getstate__(self) -> dict[str, Any]:
        return without_model(self)

    def _measure(
        self, embeddings: Any, labels: Any, *, distance: str, verbose: bool
    ) -> dict[str, float]:
        self.curve = verification_curve(
            embeddings,
            labels if self._is_same is None else None,
            pairs=self._pairs,
            is_same=self._is_same,
            distance=distance,
            verbose=verbose,
        )
        figures = self.curve.figures(self._metrics)
        if self._interval is None:
            return figures
        scores = class_scores(
            embeddings,
            labels,
            pairs=self._pairs,
            metrics=self._metrics,
            distance=distance,
            curve=self.curve,
        )
        self._evaluation.tell_of_few(few_classes_warning(scores))
        return with_intervals(figures, scores, self._interval)

    @property
    def results(self) -> dict[int, dict[str, float]]:
        return self._evaluation.results

    def on_train_begin(self, logs: Any = None) -> None:
        self.curve = None
        self._evaluation.begin()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._evaluation.begin_epoch(epoch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._evaluation.end(epoch, logs)

    def on_train_end(self, logs: Any = None) -> None:
        self._evaluation.end_fit()


def _classes_of_pairs(codes: np.ndarray, pairs: np.ndarray | None) -> np.ndarray:
    """The codes of the classes that have same pairs."""
    if pairs is None:
        return np.flatnonzero(np.bincount(codes) > 1)
    first, second = codes[pairs.T]
    return first[first == second]
