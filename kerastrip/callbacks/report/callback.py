"""TrainingReport: the course of a training, in one HTML file."""

from __future__ import annotations

import math
import os
import pathlib
import time
from typing import Any

import keras
import numpy as np

from kerastrip import _checks
from kerastrip._files import refuse_devices, write_whole
from kerastrip._outputs import embedding_output
from kerastrip.callbacks._copies import without_model
from kerastrip.callbacks._evaluation import EpochEvaluation, HeldOut, check_positives
from kerastrip.callbacks.collapse import CollapseGuard
from kerastrip.callbacks.report import page, sections
from kerastrip.evaluation.intervals import check_interval
from kerastrip.evaluation.verification import check_codes
from kerastrip.plotting.thumbnails import thumbnails_of

__all__ = [
    "TrainingReport",
]


class TrainingReport(keras.callbacks.Callback):
    """Write a page about the training, anew after every epoch.

    The page is one HTML file without scripts, which loads nothing else and fits a large
    screen and a phone. It shows:

    - the settings of the training, and the best epoch so far: by `map@r` of the
      held-out data (with `groups` by `map`), or by the loss if there are none;
    - the fractions of easy, semi-hard and hard triplets stacked over the epochs, with
      the loss (with `MiningStats`, for training and validation);
    - the alarms of a `CollapseGuard`, and an alarm if moving averages of
      BatchNormalization lag behind;
    - of held-out data: a table of retrieval and verification metrics (first, best and
      latest), and the charts of `kerastrip.plotting`: the distances of positives and
      negatives with the margin, the embeddings in their principal plane, the classes
      that nearest neighbours confuse most, and the neighbours of some samples (a
      sample has the name of its file where the source knows it). With `groups`, rows of
      the class and group of a sample are left out of the retrieval metrics and of the
      confusions, and have a grey frame among the neighbours; the distances are those of
      all pairs;
    - what an audit of the labels found (`kerastrip.evaluation.audit`), if it found any:
      samples that look mislabelled, classes that look like one or like two;
    - every value of the logs as a small curve. The ends of an interval, `..._low` and
      `..._high`, are the band around the curve of their figure.

    The file is replaced in one step, so that it is complete whenever it is opened and
    after an interrupted training. If the file cannot be written there is a warning, and
    the training goes on. A new `fit` begins a new report; if a training is resumed with
    `initial_epoch`, the report keeps the earlier epochs. List this callback last, so
    that it sees the values that other callbacks add to the logs. A copy
    (`copy.deepcopy`, as tuners make it) shares the data. The report needs matplotlib.

    Args:
        path: the HTML file to write; folders are made if missing.
        x: held-out data, as for `RetrievalEvaluation`. Default None: the
            report shows the logs only. All pairs of samples are compared, so give some
            thousands of samples.
        y: labels, as for `RetrievalEvaluation`.
        groups: (n,) groups of the samples, as for `RetrievalEvaluation`. The page then
            shows `map`, `cmc@1` and `minp`, too. Default None: no rows are left out.
        images: an image for each sample, as an array `(n, height, width)` or
            `(n, height, width, 1 or 3)`, or a source of such images; integers in 0..255, or
            floats, drawn between their least and greatest value when they leave 0..1.
            Default None: x itself, if it holds images.
        guard: the `CollapseGuard` of the same training, whose alarms the page shows.
        title: heading of the page. Default "Training report".
        every: epochs from one measurement of x to the next, at least 1. Default 1.
        pairs: the largest number of pairs of confused classes to show. Default 6.
        queries: number of samples whose neighbours to show, spread over the classes.
            Default 6.
        k: number of neighbours of each sample. Default 5.
        interval: level of the intervals of the retrieval and verification metrics over
            classes, which the page shows as bands; with few classes it says that they are
            rough. Default 0.95. None for figures alone.
        distance: `"euclidean"`, `"squared_euclidean"` or `"cosine"`. Default None:
            the `distance` of the compiled loss, `"euclidean"` if it has none.
        output: name or position of the embedding among the outputs of the model.
            None takes the output whose loss has a `distance`, or the only output.
        batch_size: rows per call of the model. Default 128.

    Raises:
        ImportError: if matplotlib is missing.
        TypeError, ValueError: if the arguments do not fit each other.

    Example:

    >>> import keras, numpy as np, os, tempfile
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> model.compile("sgd", "mse")
    >>> path = os.path.join(tempfile.mkdtemp(), "report.html")
    >>> x, y = np.eye(3)[[0, 0, 1, 1, 2, 2]], [0, 0, 1, 1, 2, 2]
    >>> history = model.fit(x, np.zeros((6, 2)), verbose=0,
    ...                     callbacks=[TrainingReport(path, x, y, title="Three points")])
    >>> "<h1>Three points</h1>" in open(path).read()
    True
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        x: Any = None,
        y: Any = None,
        *,
        groups: Any = None,
        images: Any = None,
        guard: CollapseGuard | None = None,
        title: str = "Training report",
        every: int = 1,
        pairs: int = 6,
        queries: int = 6,
        k: int = 5,
        interval: float | None = 0.95,
        distance: str | None = None,
        output: int | str | None = None,
        batch_size: int = 128,
    ):
        import matplotlib  # noqa: F401  (an error now, not after the first epoch)

        super().__init__()
        self._path = pathlib.Path(path)
        refuse_devices("path", self._path)
        if guard is not None and not isinstance(guard, CollapseGuard):
            raise _checks.type_error("guard", "a CollapseGuard", guard)
        self._guard = guard
        self._title = str(title)
        counts = {"pairs": pairs, "queries": queries, "k": k}
        self._counts = {n: _checks.integer(n, value, 1) for n, value in counts.items()}
        self._interval = check_interval(interval)
        self._output = output
        self._images = self._groups = None
        self._evaluation: EpochEvaluation | None = None
        if x is None:
            given = {"y": y, "groups": groups, "images": images}
            for name, value in given.items():
                if value is not None:
                    raise _checks.value_error(name, "`x` with it", value)
        else:
            data = HeldOut(x, y, groups=groups)
            if data.table is not None:
                check_codes("y", data.table.codes)
            check_positives(data, data)
            self._groups = data.groups
            self._images = thumbnails_of(x, images)
            self._evaluation = EpochEvaluation(
                self,
                [data],
                keys=(),
                measure=self._measure,
                every=every,
                distance=distance,
                output=output,
                batch_size=batch_size,
                verbose=None,
            )
        self._logs: dict[int, dict[str, float]] = {}  # by epoch
        self._latest: sections.Look | None = None
        self._begun = 0.0  # when this `fit` began
        self._first: int | None = None  # and with which epoch
        self._ended = False
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return without_model(self)

    def on_train_begin(self, logs: Any = None) -> None:
        self._begun, self._ended, self._first = time.monotonic(), False, None
        self._warned = False
        if self._evaluation is not None:
            self._evaluation.begin()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._first is not None:
            return
        self._first = epoch
        if epoch == 0:  # a new training, not a resumed one
            self._latest = None
        # An earlier run may have left logs of the epochs that now come again.
        self._logs = {e: past for e, past in self._logs.items() if e < epoch}
        if self._evaluation is not None:
            self._evaluation.begin_epoch(epoch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        # Only single numbers can be drawn: other callbacks may log anything.
        self._logs[epoch] = {
            name: float(value)
            for name, value in (logs or {}).items()
            if np.ndim(value) == 0 and not isinstance(value, str)
        }
        if self._evaluation is not None:
            self._evaluation.end(epoch, None)
        self._write()

    def on_train_end(self, logs: Any = None) -> None:
        self._ended = True
        self._write()

    def _measure(
        self, embeddings: np.ndarray, labels: Any, *, distance: str, verbose: bool
    ) -> dict[str, float]:
        """Draws the charts of the held-out data, and returns their metrics."""
        loss = embedding_output(self.model, self._output).loss
        margin = getattr(loss, "margin", None)
        self._latest = sections.look(
            embeddings,
            labels,
            groups=self._groups,
            distance=distance,
            margin=margin if isinstance(margin, float) and margin > 0 else None,
            interval=self._interval,
            images=self._images,
            verbose=verbose,
            **self._counts,
        )
        return self._latest.figures

    def _write(self) -> None:
        """Replaces the file by the page of this moment; warns once if that fails."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, page.page(self._title, self._sections()))
        except OSError as error:
            if not self._warned:
                _checks.warn(
                    f"TrainingReport cannot write {self._path} "
                    f"({error.strerror or error}). The training goes on, and so does "
                    "the report, once it can be written."
                )
            self._warned = True

    def _sections(self) -> list[str]:
        """The sections of the page of this moment, as HTML."""
        epochs, latest = sorted(self._logs), self._latest
        names = dict.fromkeys(name for e in epochs for name in self._logs[e])
        history = {
            name: [self._logs[e].get(name, math.nan) for e in epochs] for name in names
        }
        results: dict[int, Any] = {}
        # None without a guard, unless the watch of the averages has raised an alarm.
        alarms = None if self._guard is None else list(self._guard.alarms)
        if self._evaluation is not None:
            results = self._evaluation.results
            alarms = [*(alarms or []), *self._evaluation.alarms] or alarms
        best = sections.best_epoch(epochs, history, results)
        notes = [
            self._state(len(epochs)),
            sections.settings(self.model, self.params or {}),
        ]
        parts = [
            page.header(
                self._title,
                notes,
                sections.lead(best, history, results, latest),
                sections.tiles(best, history, results, alarms),
            ),
            sections.alarms_section(alarms),
            sections.mining_section([e + 1 for e in epochs], history),
        ]
        if self._evaluation is not None:
            parts.append(sections.held_out_section(latest, results))
        if latest is not None:
            parts += [latest.samples, latest.audit]
        return [*parts, sections.logs_section(history)]

    def _state(self, epochs: int) -> str:
        """The number of epochs done, the time they took, and the time of writing."""
        total = (self.params or {}).get("epochs")
        minutes, seconds = divmod(round(time.monotonic() - self._begun), 60)
        return (
            f"{'Ended after' if self._ended else 'Running:'} {epochs} of {total} epochs, "
            f"{minutes}:{seconds:02} minutes; written {time.strftime('%Y-%m-%d %H:%M:%S')}"
        )
