"""RetrievalEvaluation: retrieval metrics of held-out data in the epoch logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from kerastrip import _checks
from kerastrip.callbacks._copies import without_model
from kerastrip.callbacks._evaluation import (
    EpochEvaluation,
    HeldOut,
    check_positives,
)
from kerastrip.evaluation.intervals import check_interval
from kerastrip.evaluation.retrieval import (
    CLUSTERING,
    check_groups,
    check_metrics,
    lookup_figures,
    self_match_warning,
)

__all__ = [
    "RetrievalEvaluation",
]


class RetrievalEvaluation(keras.callbacks.Callback):
    """Adds `val_recall@1`, `val_map@r`, ... of held-out data to the epoch logs.

    After an epoch every sample is embedded once, and looked up among all others, or
    in a gallery (`kerastrip.evaluation.retrieval_metrics`). Callbacks that monitor
    these keys stand *after* this callback in the list, because Keras calls callbacks in
    the order of the list (and warns if a callback does not find its key):

        callbacks=[RetrievalEvaluation(x_val, y_val),
                   ModelCheckpoint("best.keras", monitor="val_recall@1",
                                   mode="max", save_best_only=True)]

    With `every=n` it measures after every n-th epoch, and after the first and the
    last epoch of a `fit`. In between the latest figures are repeated, so that CSVLogger,
    which fixes its columns in the first epoch, and callbacks with a monitor find
    their keys; patience still counts epochs.

    The neighbours are found by the `distance` of the compiled loss of the embedding, as
    for `MiningStats`. If the loss has no `distance`, they are found by the euclidean
    distance, with a warning if you have written the loss yourself.

    Samples of x that are in the gallery, too, would find themselves. Samples from the
    same array or source are looked up without themselves; copies cannot be recognised
    for certain, and a warning counts them.

    With `groups` (the camera of each photograph, the session of each recording) the rows
    of a query's label *and* group are left out of its ranking, neither right nor wrong:
    the model must find the same person on another camera. This is the evaluation of
    re-identification, whose figures are

        RetrievalEvaluation(x_query, y_query, groups=query_cameras,
                            gallery=x_gallery, gallery_labels=y_gallery,
                            gallery_groups=gallery_cameras,
                            metrics=("map", "cmc@1", "minp"))

    If the training has diverged (NaN embeddings) the figures are NaN, with a
    warning. A new `fit` begins with empty `results`; if it resumes a training with
    `initial_epoch`, it keeps the results of the earlier epochs.

    Args:
        x: held-out data: an array, a dict or tuple of arrays, a source of
            `kerastrip.sources`; a sampler, whose source and labels are read, every
            sample once and without augmentation; or a dataset (or a `DataLoader` of
            PyTorch) of batches (inputs, targets), whose targets of the embedding
            output are the labels.
        y: (n,) integer or string labels or (n, classes) one-hot rows. Default None:
            the labels of the sampler, source or dataset.
        gallery: the data to search in; accepts the same types as `x`. Default None:
            x itself, each sample without itself.
        gallery_labels: labels of the gallery; accepts the same types as `y`.
        groups: (n,) integers or strings, the group of each sample in the order of x; of
            a sampler, in the order of its source (`groups=sampler.spread`). A dataset
            with groups must not be shuffled: it is an error if its labels come in
            another order than at the first reading. Default None: no rows are left out.
        gallery_groups: groups of the gallery, needed if the queries have groups and
            there is a gallery.
        metrics: metric words of `retrieval_metrics`. Default `("recall@1", "map@r")`.
        distance: `"euclidean"`, `"squared_euclidean"` or `"cosine"`. Default None:
            the `distance` of the compiled loss, `"euclidean"` if it has none.
        every: epochs from one measurement to the next, at least 1. Default 1.
        prefix: text before each key. Default `"val_"`.
        names: metric word -> another name for the logs, behind the prefix, for use where
            `@` is not allowed (file names of `ModelCheckpoint`, some experiment
            trackers). Default None: the metric words.
        interval: level of the intervals of the figures over classes, such as 0.95: each
            key but those of `nmi` and `ami` then comes with `..._low` and `..._high` (`val_recall@1_low`),
            for the logs and `results`; the progress bar shows the figures alone. With
            fewer than 20 classes a warning, once in a `fit`, says that the ends are
            rough. Default None: figures alone.
        output: name or position of the embedding among the outputs of the model.
            None takes the output whose loss has a `distance`, or the only output.
        batch_size: rows per call of the model. Default 128.
        verbose: whether to show a progress bar once it takes over two seconds.
            Default None: if `fit` shows one, too.

    Attributes:
        results: epoch -> the dict of `retrieval_metrics`, with the numbers of queries
            with and without a positive, and with `groups` of queries whose label is in
            their own group only (`lone_across_groups`).

    Raises:
        TypeError, ValueError: if x and y do not fit each other, a metric word is
            unknown, no label occurs twice (with `groups`: in two groups), or no label
            of y is in the gallery (in another group); with `interval` if such labels
            are fewer than two.

    Example:

    >>> import keras, numpy as np
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.eye(3)[[0, 0, 1, 1, 2, 2]], [0, 0, 1, 1, 2, 2]
    >>> history = model.fit(x, np.zeros((6, 2)), verbose=0,
    ...                     callbacks=[RetrievalEvaluation(x, y)])
    >>> history.history["val_recall@1"]
    [1.0]

    Two cameras have taken each object twice:

    >>> cross = RetrievalEvaluation(x[[0, 0, *range(6)]], [0, 0, *y],
    ...                             groups=["c1", "c2"] * 4, metrics=("map", "cmc@1"))
    >>> history = model.fit(x, np.zeros((6, 2)), verbose=0, callbacks=[cross])
    >>> history.history["val_map"], cross.results[0]["queries"]
    ([1.0], 8)
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        *,
        gallery: Any = None,
        gallery_labels: Any = None,
        groups: Any = None,
        gallery_groups: Any = None,
        metrics: Sequence[str] = ("recall@1", "map@r"),
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
        self._interval = check_interval(interval)
        data = _held_out(x, y, groups, gallery, gallery_labels, gallery_groups)
        check_positives(data[0], data[-1], interval)
        self._own = None if len(data) == 1 else data[0].rows_in(data[1])
        self._data = data
        self._warned = False
        self._evaluation = EpochEvaluation(
            self,
            data,
            keys=self._metrics,
            with_ends=()
            if interval is None
            else [word for word in self._metrics if word not in CLUSTERING],
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
        self,
        embeddings: Any,
        labels: Any,
        gallery: Any = None,
        gallery_labels: Any = None,
        *,
        distance: str,
        verbose: bool,
    ) -> dict[str, float]:
        # Not `retrieval_metrics`, which would warn in every epoch.
        figures, met, few = lookup_figures(
            embeddings,
            labels,
            gallery,
            gallery_labels,
            own=self._own,
            groups=self._data[0].groups,
            gallery_groups=None if gallery is None else self._data[1].groups,
            metrics=self._metrics,
            distance=distance,
            interval=self._interval,
            verbose=verbose,
        )
        if len(met) and not self._warned:
            self._warned = True
            _checks.warn(
                f"{type(self).__name__}: {self_match_warning(met, len(embeddings))}"
            )
        self._evaluation.tell_of_few(few)
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

    def on_train_end(self, logs: Any = None) -> None:
        self._evaluation.end_fit()


def _held_out(
    x: Any, y: Any, groups: Any, gallery: Any, gallery_labels: Any, gallery_groups: Any
) -> list[HeldOut]:
    """The held-out data and the gallery; without a gallery the data alone."""
    # x as its own gallery: then every sample is looked up without itself.
    if (
        gallery is x
        and (gallery_labels is None or gallery_labels is y)
        and (gallery_groups is None or gallery_groups is groups)
    ):
        gallery = gallery_labels = gallery_groups = None
    check_groups(gallery, groups, gallery_groups)
    data = [HeldOut(x, y, groups=groups)]
    if gallery is not None:
        names = ("gallery", "gallery_labels", "gallery_groups")
        data.append(
            HeldOut(gallery, gallery_labels, groups=gallery_groups, names=names)
        )
    elif gallery_labels is not None:
        raise _checks.value_error("gallery_labels", "`gallery` with it", gallery_labels)
    return data
