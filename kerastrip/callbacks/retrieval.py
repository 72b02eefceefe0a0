"""RetrievalEvaluation: retrieval figures of held-out data in the epoch logs."""

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
)
from kerastrip.evaluation.retrieval import (
    check_metrics,
    common_codes,
    lookup_figures,
    themselves,
)

__all__ = [
    "RetrievalEvaluation",
]


class RetrievalEvaluation(keras.callbacks.Callback):
    """Adds `val_recall@1`, `val_map@r`, ... of held-out data to the epoch logs.

    After an epoch every sample is embedded once, and looked up among all others, or
    in a gallery (`kerastrip.evaluation.retrieval_metrics`). Callbacks that monitor these keys
    stand *after* this one in the list, because Keras calls callbacks in its order (and
    warns of a key that a monitor does not find):

        callbacks=[RetrievalEvaluation(x_val, y_val),
                   ModelCheckpoint("best.keras", monitor="val_recall@1",
                                   mode="max", save_best_only=True)]

    With `every=n` it measures after every n-th epoch, and after the first and the
    last of a `fit`. In between the last figures are repeated, so that CSVLogger,
    which fixes its columns in the first epoch, and callbacks with a monitor find
    their keys; patience still counts epochs.

    The figures are those of the distance that the loss of the embedding has in
    `compile`, as for `MiningStats`; of a loss that has none, of the euclidean one, with
    a warning where that loss is one of your own.

    Samples of x that are in the gallery, too, would find themselves. Those that come
    from the same array or source are looked up without themselves; copies are counted
    in a warning.

    If the training has diverged (NaN embeddings) the figures are NaN, with a
    warning. A new `fit` begins with empty `results`, unless it resumes one by
    `initial_epoch`.

    Args:
        x: held-out data: an array, a dict or tuple of arrays, a source of
            `kerastrip.sources`; a sampler, whose source and labels are read, every
            sample once and not augmented; or a dataset (or a `DataLoader` of
            PyTorch) of batches (inputs, targets), whose targets of the embedding
            output are the labels.
        y: (n,) integer or string labels or (n, classes) one-hot rows. Default None:
            those of the sampler, source or dataset.
        gallery: what to look up x in, given in any of the ways of x. Default None:
            x itself, each sample without itself.
        gallery_labels: labels of the gallery, as y.
        metrics: words of `retrieval_metrics`. Default `("recall@1", "map@r")`.
        distance: `"euclidean"`, `"squared_euclidean"` or `"cosine"`. Default None:
            that of the compiled loss, `"euclidean"` where it has none.
        every: epochs from one measurement to the next, at least 1. Default 1.
        prefix: put before each key. Default `"val_"`.
        names: other keys for the logs, for example where `@` is not allowed (file
            names of `ModelCheckpoint`, some experiment trackers): metric -> name,
            before which the prefix is put. Default None: the metrics.
        output: name or position of the embedding among the outputs of the model.
            None takes the output whose loss has a `distance`, or the only one.
        batch_size: rows per call of the model. Default 128.
        verbose: whether to show a progress bar once it takes over two seconds.
            Default None: where `fit` shows one, too.

    Attributes:
        results: what was measured: epoch -> dict as `retrieval_metrics` returns it,
            with the numbers of queries with and without a partner.

    Raises:
        TypeError, ValueError: if x and y do not fit each other, a word is unknown,
            no label occurs twice, or none is in the gallery.

    Example:

    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.eye(3)[[0, 0, 1, 1, 2, 2]], [0, 0, 1, 1, 2, 2]
    >>> history = model.fit(x, np.zeros((6, 2)), verbose=0,
    ...                     callbacks=[RetrievalEvaluation(x, y)])
    >>> history.history["val_recall@1"]
    [1.0]
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        *,
        gallery: Any = None,
        gallery_labels: Any = None,
        metrics: Sequence[str] = ("recall@1", "map@r"),
        distance: str | None = None,
        every: int = 1,
        prefix: str = "val_",
        names: Mapping[str, str] | None = None,
        output: int | str | None = None,
        batch_size: int = 128,
        verbose: bool | None = None,
    ):
        super().__init__()
        self._metrics = check_metrics(metrics)
        data = [HeldOut(x, y)]
        if gallery is x and (gallery_labels is None or gallery_labels is y):
            gallery = gallery_labels = None
        if gallery is not None:
            data.append(HeldOut(gallery, gallery_labels, ("gallery", "gallery_labels")))
        elif gallery_labels is not None:
            raise _checks.value_error(
                "gallery_labels", "`gallery` with it", gallery_labels
            )
        self._own = None if gallery is None else data[0].rows_in(data[1])
        self._warned = False
        self._evaluation = EpochEvaluation(
            self,
            data,
            keys=self._metrics,
            measure=self._measure,
            every=every,
            prefix=prefix,
            names=names,
            distance=distance,
            output=output,
            batch_size=batch_size,
            verbose=verbose,
        )
        own, others = data[0].table, data[-1].table
        if gallery is None:
            if own is not None and len(np.unique(own.codes)) == len(own.codes):
                raise _checks.value_error("y", "a label that occurs twice", y)
        elif own is None or others is None:
            return
        elif not np.isin(*common_codes(own, others)).any():
            raise _checks.value_error("gallery_labels", "a label of y", gallery_labels)

    def __getstate__(self) -> dict[str, Any]:
        return without_model(self)

    def _measure(
        self,
        embeddings: Any,
        labels: Any,
        gallery: Any = None,
        gallery_labels: Any = None,
        *,
        distance: str,
        verbose: bool,
    ) -> dict[str, float]:
        figures, met = lookup_figures(
            embeddings,
            labels,
            gallery,
            gallery_labels,
            own=self._own,
            metrics=self._metrics,
            distance=distance,
            verbose=verbose,
        )
        if len(met) and not self._warned:
            self._warned = True
            _checks.warn(f"{type(self).__name__}: {themselves(met, len(embeddings))}")
        return figures

    @property
    def results(self) -> dict[int, dict[str, float]]:
        return self._evaluation.results

    def on_train_begin(self, logs: Any = None) -> None:
        self._warned = False
        self._evaluation.begin()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._evaluation.begin_epoch(epoch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._evaluation.end(epoch, logs)
