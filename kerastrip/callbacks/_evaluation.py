"""What RetrievalEvaluation and VerificationEvaluation share: when, on what, where to."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from kerastrip import _checks
from kerastrip._labels import LabelTable
from kerastrip._outputs import embedding_output
from kerastrip.evaluation import label_table
from kerastrip.inference import (
    embed_with_targets,
    is_batches,
    is_sampler,
    source_of,
    unusable_rows,
)


class HeldOut:
    """Data to embed, and their labels.

    Args:
        x: samples, a sampler, or a dataset of batches, as `embed` takes them.
        y: labels, or None for those that come with x.
        names: what the callback calls x and y.
        labelled: whether labels are needed.

    Attributes:
        length: number of samples, None if it shows only in reading.
        table: their labels, None likewise, or if there are none.
    """

    def __init__(
        self, x: Any, y: Any, names: tuple[str, str] = ("x", "y"), labelled: bool = True
    ):
        self.length: int | None = None
        self.table: LabelTable | None = None
        self._names = names
        self._labelled = labelled
        if is_batches(x):
            self._x = x
            if y is not None:
                raise ValueError(
                    _checks.message(
                        names[1], "None for a dataset, which has its own targets", y
                    )
                )
            return
        self._x = source_of(x)
        self.length = len(self._x)
        if y is None:
            y = getattr(x if is_sampler(x) else self._x, "labels", None)
        if y is not None:
            self.table = label_table(names[1], y, self.length)
        elif labelled:
            raise ValueError(_checks.message(names[1], "one label per sample", y))

    def embed(self, model: Any, **options: Any) -> tuple[np.ndarray, Any]:
        """(n, dim) embeddings by the model, and (n,) labels if there are any."""
        embeddings, targets = embed_with_targets(model, self._x, **options)
        table = self.table
        if targets is not None:
            if targets.ndim == 2 and targets.shape[1] == 1:
                targets = targets[:, 0]
            table = label_table(self._names[0], targets, len(embeddings))
        elif table is None and self._labelled:
            raise ValueError(
                _checks.message(self._names[0], "batches of (inputs, targets)", self._x)
            )
        return embeddings, None if table is None else table.decode(table.codes)


class EpochEvaluation:
    """Embeds fixed sets of data every few epochs and logs what `measure` finds.

    Args:
        callback: the Keras callback this works for.
        data: what to embed.
        keys: the figures to log, in order.
        measure: a function of the embeddings and labels of each of `data` in turn
            and `verbose`, that returns a dict with those figures.
        every, prefix, output, batch_size, verbose: arguments of the callback.
    """

    def __init__(
        self,
        callback: keras.callbacks.Callback,
        data: Sequence[HeldOut],
        *,
        keys: Sequence[str],
        measure: Callable[..., dict[str, float]],
        every: int,
        prefix: str,
        output: int | str | None,
        batch_size: int,
        verbose: bool | None,
    ):
        self.results: dict[int, dict[str, float]] = {}
        self._latest: dict[str, float] | None = None
        self._callback = callback
        self._data = data
        self._keys = {key: f"{prefix}{key}" for key in keys}
        self._measure = measure
        self._every = _checks.integer("every", every, 1)
        self._output = output
        self._batch_size = _checks.integer("batch_size", batch_size, 1)
        if not (verbose is None or isinstance(verbose, bool)):
            raise TypeError(_checks.message("verbose", "True, False or None", verbose))
        self._verbose = verbose

    def begin(self) -> None:
        """Looks for what would fail, or be missed, at the end of the first epoch."""
        self._latest = None
        if getattr(self._callback.model, "output_names", None):
            embedding_output(self._callback.model, self._output)
        names = set(self._keys.values())
        for other in _listed_before(self._callback):
            if getattr(other, "monitor", None) in names:
                warnings.warn(
                    f"{type(other).__name__}(monitor={other.monitor!r}) is listed "
                    f"before {type(self._callback).__name__} and will not see that "
                    "key. List it after.",
                    stacklevel=2,
                )

    def end(self, epoch: int, logs: dict[str, Any] | None) -> None:
        """Measures if it is the turn of this epoch, and adds the figures to `logs`."""
        params = self._callback.params or {}
        turn = (epoch + 1) % self._every == 0 or epoch + 1 == params.get("epochs")
        if turn or self._latest is None:
            self._latest = self.results[epoch] = self._evaluate(epoch)
        if logs is not None:
            logs.update({self._keys[key]: self._latest[key] for key in self._keys})

    def _evaluate(self, epoch: int) -> dict[str, float]:
        verbose = self._verbose
        if verbose is None:
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
                warnings.warn(
                    f"{type(self._callback).__name__}: {len(bad)} of "
                    f"{len(embeddings)} embeddings hold NaN, infinity or more than "
                    f"1e15 after epoch {epoch + 1}; its figures are NaN. The training "
                    "has diverged.",
                    stacklevel=2,
                )
                return dict.fromkeys(self._keys, float("nan"))
            arguments += [embeddings, labels]
        return self._measure(*arguments, verbose=verbose)


def _listed_before(callback: keras.callbacks.Callback) -> list[Any]:
    """The callbacks before this one in the list that is calling it.

    Keras does not tell a callback of the others: the list is a few frames up.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            listed = list(caller.callbacks)
            return listed[: listed.index(callback)] if callback in listed else []
        frame = frame.f_back
    return []
