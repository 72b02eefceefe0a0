"""Attaching a census to a compiled model, and making the model trace again."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from kerastrip import _checks
from kerastrip.metrics import TripletCensus

if TYPE_CHECKING:
    from kerastrip.callbacks.mining_stats import MiningStats


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


def attach(model: Any, stats: MiningStats) -> None:
    """Let `stats.census` count every batch and report through the model's logs.

    What an interrupted `fit` left attached is replaced: Keras gives all callbacks
    of one run the same `params` object, so another object tells another run.
    """
    tap = model.__dict__.get("compute_metrics")
    if isinstance(tap, _Tap):
        for other in list(tap.attached):
            if other.params is not stats.params:
                other.detach()
    _check_prefix(model, stats.census)
    tap = model.__dict__.get("compute_metrics")
    if not isinstance(tap, _Tap):
        tap = _Tap(model)
        # Past Keras' attribute tracking, so that nothing of it is ever saved.
        model.__dict__["compute_metrics"] = tap
    tap.attached.append(stats)
    model._metrics.append(stats.census)
    retrace(model)


def detach(model: Any, stats: MiningStats) -> None:
    """Undo `attach`."""
    tap = model.__dict__["compute_metrics"]
    tap.attached.remove(stats)
    if not tap.attached:
        del model.__dict__["compute_metrics"]
        if tap.shadowed is not None:
            model.__dict__["compute_metrics"] = tap.shadowed
    model._metrics.remove(stats.census)
    retrace(model)


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
