"""The evaluation of held-out data after epochs, which several callbacks share.

`HeldOut` holds the data, and `EpochEvaluation` decides when to embed them, calls the
`measure` of the callback and puts the figures into the logs:

    RetrievalEvaluation ----.                    .--> HeldOut.embed
    VerificationEvaluation --+-> EpochEvaluation +--> measure(embeddings, labels, ...)
    TrainingReport ---------'                    '--> logs, results, AveragesWatch
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kerastrip import _checks
from kerastrip._labels import LabelTable
from kerastrip._outputs import embedding_output
from kerastrip.callbacks._averages import (
    AveragesWatch,
    some_rows,
    training_rows,
    watch_of,
)
from kerastrip.callbacks.collapse import Alarm
from kerastrip.distances import DISTANCES
from kerastrip.evaluation.embedding import (
    embed_with_targets,
    is_batches,
    is_sampler,
    source_of,
)
from kerastrip.evaluation.recalibration import moving_averages
from kerastrip.evaluation.retrieval import common_codes, label_table
from kerastrip.evaluation.search import shared_rows, unusable_rows
from kerastrip.sources import ArraySource, Subset

# The ends of an interval, behind the word of a figure and "_".
ENDS = ("low", "high")


class HeldOut:
    """Samples to embed, their labels, and their groups if they have any.

    Args:
        x: samples, a sampler, or a dataset of batches, as `embed` takes them.
        y: labels, or None for those that come with x.
        groups: groups in the order of x, or None.
        names: the names of x, y and the groups among the arguments of the callback, for
            errors.
        labelled: whether missing labels are an error.

    Attributes:
        length: number of samples. None for a dataset, which must be read to know it.
        table: the labels. None for a dataset, and if there are no labels.
        groups: (n,) the groups, None if there are none.

    A copy (`copy.deepcopy`, as tuners make it of every callback) is the object itself:
    the data may be large, and nothing here changes but the `_order` in which a dataset
    gave its labels at the first reading, which is the same for all copies.
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        *,
        groups: Any = None,
        names: tuple[str, str, str] = ("x", "y", "groups"),
        labelled: bool = True,
    ):
        self.length: int | None = None
        self.table: LabelTable | None = None
        self.groups: np.ndarray | None = None
        self._order: np.ndarray | None = None
        self._names = names
        self._labelled = labelled
        if is_batches(x):  # its length and labels are known only after reading
            self._x = x
            if groups is not None:
                self.groups = _values(LabelTable(groups, name=names[2]))
            if y is not None:
                raise _checks.value_error(
                    names[1], "None for a dataset, which has its own targets", y
                )
            return
        self._x = source_of(x)
        self.length = len(self._x)
        if y is None:
            y = getattr(x if is_sampler(x) else self._x, "labels", None)
        if y is not None:
            self.table = label_table(names[1], y, self.length)
        elif labelled:
            raise _checks.value_error(names[1], "one label per sample", y)
        if groups is not None:
            self.groups = _values(label_table(names[2], groups, self.length))

    def __deepcopy__(self, memo: Any) -> HeldOut:
        return self

    def rows_in(self, gallery: HeldOut) -> np.ndarray | None:
        """(n,) the row of the gallery that is the same sample, -1 where no row is.

        None if that cannot be known: for datasets, and for copies of arrays. Both sides
        may be a `Subset` of the same source, for example rows [4, 2, 9] and [9, 5, 4]:

            row of these data                     0   1   2
            row of the source                     4   2   9
            row of the gallery (`place`)          2  -1   0
        """
        if self.length is None or gallery.length is None:
            return None
        (source, rows), (other, its_rows) = _origin(self._x), _origin(gallery._x)
        if source is other:
            shared = np.arange(len(source))
        elif isinstance(source, ArraySource) and isinstance(other, ArraySource):
            in_memory = shared_rows(source.array, other.array)
            if in_memory is None:
                return None
            shared = in_memory
        else:
            return None
        place = np.full(len(other), -1)  # row of the source -> row of the gallery
        place[its_rows] = np.arange(len(its_rows))
        shared = shared[rows]  # (n,) rows of the source of the gallery
        return np.where(shared >= 0, place[shared], -1)

    def some(self) -> tuple[Any, np.ndarray] | None:
        """The inputs and labels of some samples; None for datasets and for few classes."""
        if self.table is None:
            return None
        rows = some_rows(self.table.codes)
        return None if rows is None else (self._x.take(rows), self.table.codes[rows])

    def embed(self, model: Any, **options: Any) -> tuple[np.ndarray, Any]:
        """(n, dim) embeddings by the model, and (n,) labels, None if there are none."""
        embeddings, targets = embed_with_targets(model, self._x, **options)
        table = self.table
        if targets is not None:
            if targets.ndim == 2 and targets.shape[1] == 1:  # as Keras allows
                targets = targets[:, 0]
            table = label_table(self._names[0], targets, len(embeddings))
        elif table is None and self._labelled:
            raise _checks.value_error(
                self._names[0], "batches of (inputs, targets)", self._x
            )
        labels = None if table is None else _values(table)
        if self.length is None and self.groups is not None:
            self._check_order(labels)
        return embeddings, labels

    def _check_order(self, labels: Any) -> None:
        """Raises an error if a dataset gives its labels in another order than before.

        Its rows would get the groups of other rows.
        """
        if self._order is None:
            self._order = labels
        elif not np.array_equal(labels, self._order):
            raise _checks.value_error(
                self._names[0],
                f"rows that come in the order of `{self._names[2]}` at every reading",
                _checks.Told("labels in another order than at the first reading"),
                "Do not shuffle the dataset, or give arrays or a source in its place.",
            )


def check_positives(
    queries: HeldOut, gallery: HeldOut, interval: float | None = None
) -> None:
    """Raises an error if no query has a positive, as far as labels are known now.

    With `interval` the queries with a positive must be of two classes or more.

    A positive is a row of the label of the query and, where there are groups, of another
    group. If both are the same object, the row that is the query itself is no positive.
    """
    if queries.table is None or gallery.table is None:
        return
    codes, row_codes = common_codes(queries.table, gallery.table)
    of_label = np.bincount(row_codes, minlength=codes.max() + 1)[codes]
    # (n,) the number of rows of the label of each query that are no positives
    left_out = np.full(len(codes), 1 if queries is gallery else 0)
    name, received = gallery._names[1], gallery.table.classes
    expected = "a label that occurs twice" if queries is gallery else "a label of y"
    if queries.groups is not None and gallery.groups is not None:
        own, others = LabelTable(queries.groups), LabelTable(gallery.groups)
        groups, row_groups = common_codes(own, others, "groups")
        width = np.int64(max(groups.max(), row_groups.max()) + 1)
        ordered, both = np.sort(row_codes * width + row_groups), codes * width + groups
        first, after = (np.searchsorted(ordered, both, s) for s in ("left", "right"))
        left_out = after - first  # the row that is the query itself among them
        name, received = queries._names[2], queries.groups
        where = "two groups" if queries is gallery else "another group of the gallery"
        expected = f"a label that occurs in {where}"
    found = of_label > left_out
    if not found.any():
        raise _checks.value_error(name, expected, received)
    if interval is not None:
        check_interval_classes(interval, codes[found])


def check_interval_classes(interval: float, codes: np.ndarray) -> None:
    """Raises an error if the classes that count in the figures are fewer than two."""
    classes = len(np.unique(codes))
    if classes < 2:
        raise _checks.value_error(
            "interval",
            "None for samples of which fewer than two classes have pairs",
            _checks.Told(f"{interval:g} with {classes} such class"),
            "An interval tells what other classes would change.",
        )


def _values(table: LabelTable) -> np.ndarray:
    """(n,) the labels of a table, one for each row."""
    return table.decode(table.codes)


def _origin(source: Any) -> tuple[Any, np.ndarray]:
    """The source that the samples of a `Subset` come from, and their rows in it."""
    rows = np.arange(len(source))
    while isinstance(source, Subset):
        source, chosen = source.origin()
        rows = chosen[rows]
    return source, rows


class EpochEvaluation:
    """Embeds fixed sets of samples every few epochs and logs the figures of `measure`.

    Args:
        callback: the Keras callback that delegates to this object.
        data: the sets of samples to embed.
        keys: the figures to log, in order.
        with_ends: those of them that `measure` returns with the ends of their intervals.
        measure: called with the embeddings and labels of each set in turn, and with
            `distance=` and `verbose=`; returns a dict with at least these figures.
        every, prefix, names, distance, output, batch_size, verbose: as the arguments of
            `RetrievalEvaluation`.

    Attributes:
        results: epoch -> the dict that `measure` returned; a new dict in each `fit`.
    """

    def __init__(
        self,
        callback: keras.callbacks.Callback,
        data: Sequence[HeldOut],
        *,
        keys: Sequence[str],
        with_ends: Sequence[str] = (),
        measure: Callable[..., dict[str, float]],
        every: int,
        prefix: str = "",
        names: Mapping[str, str] | None = None,
        distance: str | None = None,
        output: int | str | None,
        batch_size: int,
        verbose: bool | None,
    ):
        self.results: dict[int, dict[str, float]] = {}
        self._latest: dict[str, float] | None = None
        self._begun = self._warned_of_nan = self._warned_of_keys = False
        self._watch = AveragesWatch()
        self._callback = callback
        self._data = data
        self._keys = _log_keys(keys, with_ends, prefix, names)
        ends = [f"{word}_{end}" for word in with_ends for end in ENDS]
        self._only_in_logs = {self._keys[end] for end in ends}
        self._told_of_few = False
        self._measure = measure
        if distance is not None:
            _checks.one_of("distance", distance, DISTANCES)
        self._distance = distance
        self._used_distance = "euclidean"
        self._every = _checks.integer("every", every, 1)
        self._output = output
        self._batch_size = _checks.integer("batch_size", batch_size, 1)
        if not (verbose is None or isinstance(verbose, bool)):
            raise _checks.type_error("verbose", "True, False or None", verbose)
        self._verbose = verbose

    def begin(self) -> None:
        """Finds the embedding and its distance, so that errors come before the training."""
        self._latest = None
        self._begun = self._warned_of_nan = self._warned_of_keys = False
        self._told_of_few = False
        history = getattr(self._callback.model, "history", None)
        if self._only_in_logs and history is not None:
            hook = functools.partial(
                _then_hide, history.on_epoch_end, self._only_in_logs
            )
            history.on_epoch_end = hook
        self._watch = watch_of(self._callback.model, self._output)
        self._used_distance = self._distance_to_use()

    def tell_of_few(self, words: str) -> None:
        """Warns, once in a `fit`, with the words of `few_classes_warning` if any."""
        if words and not self._told_of_few:
            self._told_of_few = True
            _checks.warn(words)

    def end_fit(self) -> None:
        """Gives the `History` its hook back."""
        history = getattr(self._callback.model, "history", None)
        if self._only_in_logs and history is not None:
            vars(history).pop("on_epoch_end", None)

    def begin_epoch(self, epoch: int) -> None:
        """In the first epoch of a `fit`, forgets results that the `fit` will make anew."""
        if not self._begun:
            self._begun = True
            # A new dict: a user who has kept the dict of the last fold still has it.
            self.results = {e: past for e, past in self.results.items() if e < epoch}

    def end(self, epoch: int, logs: dict[str, Any] | None) -> None:
        """Measures if this epoch is due, and adds the latest figures to `logs`."""
        params = self._callback.params or {}
        due = (epoch + 1) % self._every == 0 or epoch + 1 == params.get("epochs")
        # The first epoch is always measured: from then on the logs have their keys.
        if due or self._latest is None:
            self._latest = self.results[epoch] = self._evaluate(epoch)
            self._watch_averages(epoch, epoch + 1 == params.get("epochs"))
        if logs is not None:
            self._warn_of_taken_keys(logs)
            logs.update({self._keys[key]: self._latest[key] for key in self._keys})

    @property
    def alarms(self) -> list[Alarm]:
        """The alarms of this `fit` for moving averages that lag behind."""
        return self._watch.alarms

    def _watch_averages(self, epoch: int, last: bool) -> None:
        """Warns if moving averages lag, seen on training rows or else on held-out rows."""
        model = self._callback.model
        if self._watch.epoch == epoch or not moving_averages(model):
            return  # another callback has looked already, or the model has no averages
        # Rows of the training are better: their statistics are those of a step.
        rows = training_rows(self._callback, epoch) or self._data[0].some()
        if rows is None:
            return
        alarm = self._watch.look(model, self._output, rows, epoch, last)
        if alarm:
            _checks.warn(alarm)

    @property
    def _name(self) -> str:
        return type(self._callback).__name__

    def _distance_to_use(self) -> str:
        """The given distance or that of the loss; else euclidean, with a warning."""
        loss = embedding_output(self._callback.model, self._output).loss
        word = self._distance or getattr(loss, "distance", None)
        if word in DISTANCES:
            return word
        if word is not None:
            fact = f"has the distance {word!r}, which {self._name} does not know"
        elif loss is None or isinstance(loss, str) or _is_known(loss):
            return (
                "euclidean"  # no warning: users know that such a loss has no distance
            )
        else:
            kind = getattr(loss, "__name__", type(loss).__name__)
            fact = f"{kind!r} tells no `distance`"
        _checks.warn(
            f"The loss {fact}, so {self._name} measures by the euclidean distance. "
            f"Give it distance=, one of {DISTANCES}."
        )
        return "euclidean"

    def _warn_of_taken_keys(self, logs: dict[str, Any]) -> None:
        """Warns, once in a `fit`, if another callback has logged the same keys."""
        taken = sorted(set(self._keys.values()) & set(logs))
        if taken and not self._warned_of_keys:
            self._warned_of_keys = True
            _checks.warn(
                f"The logs had {', '.join(map(repr, taken))} before {self._name} put "
                "its own figures there: the others are lost. Give it another prefix= "
                "or names=."
            )

    def _evaluate(self, epoch: int) -> dict[str, float]:
        """The figures of this epoch; NaN, with a warning, if embeddings are unusable."""
        verbose = self._verbose
        if verbose is None:  # as the progress bar of `fit`
            verbose = (self._callback.params or {}).get("verbose") == 1
        arguments = []
        for data in self._data:
            embeddings, labels = data.embed(
                self._callback.model,
                output=self._output,
                batch_size=self._batch_size,
                verbose=verbose,
            )
            bad = unusable_rows(embeddings)
            if len(bad):
                if not self._warned_of_nan:
                    self._warned_of_nan = True
                    _checks.warn(
                        f"{self._name}: {len(bad)} of "
                        f"{len(embeddings)} embeddings hold NaN, infinity or more than "
                        f"1e15 after epoch {epoch + 1}, so its figures are NaN. Look "
                        "for NaN in the inputs, then for labels that name no class "
                        "(run_eagerly=True names the row), then lower the learning "
                        "rate."
                    )
                return dict.fromkeys(self._keys, float("nan"))
            arguments += [embeddings, labels]
        return self._measure(
            *arguments,
            distance=self._used_distance,
            verbose=verbose,
        )


def _then_hide(hook: Any, hidden: set[str], epoch: int, logs: Any = None) -> None:
    """The `on_epoch_end` of a `History`, and then logs without the keys `hidden`.

    The progress bar, which comes last, would be flooded with them:

        callbacks of the user --> History --> (hide) --> progress bar
            with the ends         with the ends          without the ends
    """
    hook(epoch, logs)
    for key in hidden.intersection(logs or {}):
        del logs[key]


def _is_known(loss: Any) -> bool:
    """Whether the loss comes from Keras or this package, not from the user."""
    made_by = getattr(loss, "__module__", None) or ""
    return made_by.partition(".")[0] in ("keras", "kerastrip")


def _log_keys(
    metrics: Sequence[str],
    with_ends: Sequence[str],
    prefix: str,
    names: Mapping[str, str] | None,
) -> dict[str, str]:
    """Figure -> its key in the logs, each with the ends of its interval behind it.

    For "recall@1" with ends, the prefix "val_" and the name "r1":

        recall@1         recall@1_low    recall@1_high
        val_r1           val_r1_low      val_r1_high
    """
    names = {} if names is None else names
    if not isinstance(names, Mapping) or not all(
        isinstance(name, str) and name for name in names.values()
    ):
        raise _checks.type_error("names", "a dict from metrics to names", names)
    for word in names:
        _checks.one_of("names", word, metrics)
    keys: dict[str, str] = {}
    for word in metrics:
        name = names.get(word, word)
        ends = [f"_{end}" for end in ENDS] if word in with_ends else []
        for end in ("", *ends):
            key = f"{prefix}{name}{end}"
            if key in keys.values() and f"{word}{end}" not in keys:
                raise _checks.value_error(
                    "names", "a name of its own for every metric", f"{name}{end}"
                )
            keys[f"{word}{end}"] = key
    return keys
