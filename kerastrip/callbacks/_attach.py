"""Attaching a census to a compiled model, and making the model trace again.

What a step does is fixed when it is traced, and TensorFlow never gives back all the
memory of a trace. So the functions that were traced with a census, and those without it,
are exchanged when it comes and goes, and serve again as long as nothing changed:

    fit with MiningStats      fit without           fit with MiningStats
    attach        detach                            attach
    |-- made, traced --|-- made, traced when used --|-- the first ones again --|
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import keras

from kerastrip import _checks
from kerastrip.metrics import TripletCensus

if TYPE_CHECKING:
    from kerastrip.callbacks.mining_stats import MiningStats

# Sets of functions that a model keeps: enough for two MiningStats, coming and going.
_MOST_KEPT = 4


def retrace(model: Any) -> None:
    """Make the model build its train and test functions anew.

    What a step reads from Python (a loss's margin, the metrics there are) is fixed
    when it is traced.
    """
    model.make_train_function(force=True)
    model.make_test_function(force=True)


def creation_scope(model: Any) -> Any:
    """The scope in which variables for this model must be created."""
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


class _Tap:
    """Stands in for `model.compute_metrics` and feeds the attached `MiningStats`.

    `compute_metrics` is the documented place to update metrics; the train and test
    steps of every backend call it with the targets and outputs of the batch.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.shadowed = model.__dict__.get("compute_metrics")
        self.original = model.compute_metrics
        self.attached: list[MiningStats] = []

    def __call__(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        of_batch = [stats.feed(y, y_pred) for stats in self.attached]
        results = dict(self.original(x, y, y_pred, sample_weight))
        for stats in self.attached:  # now the metrics of `compile` exist, too
            _check_prefix(self.model, stats.census)
        for figures in of_batch:
            results.update(figures)
        return results


class _Kept:
    """What a model keeps from one run to the next; no container, so never saved."""

    def __init__(self) -> None:
        self.censuses: dict[str, tuple[Any, TripletCensus, set[str]]] = {}
        self.functions: dict[Any, tuple[Any, Any]] = {}
        self.used: tuple[Any, tuple[Any, Any]] | None = None


def _kept(model: Any) -> _Kept:
    # Past Keras' attribute tracking, as the tap.
    return model.__dict__.setdefault("mining_stats_kept", _Kept())


def _functions(model: Any) -> tuple[Any, Any]:
    return model.train_function, model.test_function


def _state(model: Any) -> Any:
    """All that a step reads from Python when it is traced: equal, or traced anew."""
    tap = model.__dict__.get("compute_metrics")
    attached = tap.attached if isinstance(tap, _Tap) else []
    losses = [
        (id(loss), *sorted(_plain_attributes(loss)))
        for loss in keras.tree.flatten(model.loss)
    ]
    return (
        tuple((id(stats.census), *stats.settings) for stats in attached),
        tuple(losses),
        tuple(id(variable) for variable in model.trainable_variables),
        model.run_eagerly,
    )


def _plain_attributes(loss: Any) -> list[tuple[str, str]]:
    return [
        (name, repr(value))
        for name, value in getattr(loss, "__dict__", {}).items()
        if value is None or isinstance(value, (bool, int, float, str))
    ]


def _forget_if_made_by_others(model: Any) -> None:
    """After `compile`, or when others made the functions anew, all kept is out of date."""
    kept, now = _kept(model), _functions(model)
    if kept.used is None or kept.used[1] != now:
        kept.functions.clear()
        kept.censuses.clear()
        _note(model, None)  # in which state they were traced is not known


def _note(model: Any, state: Any) -> None:
    """Remember which functions are in use, on TensorFlow.

    JAX takes two functions of one method for the same: as long as anyone holds the
    first, the second is never traced. So nothing is held there, and nothing kept.
    """
    if keras.backend.backend() == "tensorflow":
        _kept(model).used = state, _functions(model)


def _put_away(model: Any) -> None:
    """Keep the functions in use for a run like this one, if they are still right."""
    _forget_if_made_by_others(model)
    kept, state = _kept(model), _state(model)
    if kept.used is not None and kept.used[0] == state:
        kept.functions.pop(state, None)
        kept.functions[state] = kept.used[1]
        for oldest in list(kept.functions)[:-_MOST_KEPT]:
            del kept.functions[oldest]


def _take_out(model: Any) -> None:
    """Give the model the functions for what is attached now, or let it make them."""
    kept, state = _kept(model), _state(model)
    if state in kept.functions:
        model.train_function, model.test_function = kept.functions[state]
    else:
        retrace(model)
    _note(model, state)


def census_for(
    model: Any, margin: float, distance: str, gather: bool, prefix: str, memory: bool
) -> tuple[TripletCensus, set[str]]:
    """A census for this model, and in which phases it has counted so far.

    That of an earlier run serves again, since its variables are part of the traces.
    """
    _forget_if_made_by_others(model)
    kept, fixed = _kept(model).censuses, (gather, memory)
    found = kept.get(prefix)
    if found and found[0] == fixed and all(found[1] is not m for m in model._metrics):
        return found[1:]
    with creation_scope(model):
        census = TripletCensus(
            margin,
            distance,
            gather=gather,
            prefix=prefix,
            name=f"{prefix}triplet_census",
        )
    census.with_memory = memory
    kept[prefix] = fixed, census, set()
    return census, kept[prefix][2]


def attach(model: Any, stats: MiningStats) -> None:
    """Let `stats.census` count every batch and report through the model's logs."""
    _check_prefix(model, stats.census)
    _put_away(model)
    tap = model.__dict__.get("compute_metrics")
    if not isinstance(tap, _Tap):
        tap = _Tap(model)
        # Past Keras' attribute tracking, so that nothing of it is ever saved.
        model.__dict__["compute_metrics"] = tap
    tap.attached.append(stats)
    model._metrics.append(stats.census)
    _take_out(model)


def end_other_runs(model: Any, stats: MiningStats) -> None:
    """Detach what an interrupted `fit` left attached.

    Keras gives all callbacks of one run the same `params` object, so another object
    tells another run.
    """
    tap = model.__dict__.get("compute_metrics")
    if isinstance(tap, _Tap):
        for other in list(tap.attached):
            if other.params is not stats.params:
                other.detach()


def detach(model: Any, stats: MiningStats) -> None:
    """Undo `attach`."""
    _put_away(model)
    tap = model.__dict__["compute_metrics"]
    tap.attached.remove(stats)
    if not tap.attached:
        del model.__dict__["compute_metrics"]
        if tap.shadowed is not None:
            model.__dict__["compute_metrics"] = tap.shadowed
    model._metrics.remove(stats.census)
    _take_out(model)


class Bar:
    """Lets the progress bar of a `fit` show some figures of the logs, and in order.

    Keras hands one dict of logs from callback to callback: first the user's, then its
    own `History`, last the progress bar. Standing in for two hooks of that `History`
    this leaves out what the bar need not show when all others have seen it.
    """

    def __init__(self, history: Any, shown: list[str], hidden: set[str]) -> None:
        self.history, self.shown, self.hidden = history, shown, hidden
        self.hooks = {
            name: getattr(history, name)
            for name in ("on_train_batch_end", "on_epoch_end")
        }
        for name in self.hooks:
            setattr(history, name, functools.partial(self._then_arrange, name))

    def _then_arrange(self, name: str, number: int, logs: Any = None) -> None:
        self.hooks[name](number, logs)
        if logs:
            arrange(logs, self.shown, self.hidden)

    def remove(self) -> None:
        """Give the `History` its hooks back."""
        for name in self.hooks:
            self.history.__dict__.pop(name, None)


def arrange(logs: dict[str, Any], shown: list[str], hidden: set[str]) -> None:
    """Put the keys `shown` first, in place, and take out the keys `hidden`.

    Both are without `val_`; the figures of the validation come behind the others.
    """

    def place(key: str) -> tuple[bool, int]:
        word = key.removeprefix("val_")
        return key != word, shown.index(word) if word in shown else len(shown)

    kept = {key: logs[key] for key in sorted(logs, key=place)}
    logs.clear()
    logs.update(
        {
            key: value
            for key, value in kept.items()
            if key.removeprefix("val_") not in hidden
        }
    )


def _check_prefix(model: Any, census: TripletCensus) -> None:
    for metric in model.metrics:
        for other in (metric, *getattr(metric, "metrics", ())):
            if (
                isinstance(other, TripletCensus)
                and other is not census
                and other.prefix == census.prefix
            ):
                raise ValueError(
                    _checks.message(
                        "prefix",
                        "one that no other census of this model has",
                        census.prefix,
                        f"Two would report {census.keys[0]!r}: give one of them "
                        "prefix='second_'.",
                    )
                )
