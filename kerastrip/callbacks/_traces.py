"""Let a model trace its steps again, and keep traced steps for later use.

The Python values that a step reads (the margin of a loss, the list of metrics) are fixed
when the step is traced. So a callback that changes such a value calls `retrace`.
"""

from __future__ import annotations

from typing import Any

import keras

# Enough for two callbacks that come and go in either order.
_MOST_KEPT = 8


def retrace(model: Any) -> None:
    """Make the model build its train and test functions anew."""
    model.make_train_function(force=True)
    model.make_test_function(force=True)


class Traces:
    """The train and test functions of a model, for each set of metrics added to it.

    TensorFlow never frees all the memory of a trace: a program that calls `fit` again
    and again, with an added metric and without it, would grow with every call. So the
    functions are exchanged, and used again as long as nothing else has changed:

        fit with a metric          fit without                fit with the metric
        use([metric])              use([])                    use([metric])
        |-- made and traced --|    |-- made and traced --|    |-- the first again --|

    On JAX and PyTorch nothing is kept. JAX takes two functions made from one method for
    the same function: as long as the first function exists, the second is never traced.
    PyTorch does not trace.

    Args:
        model: a compiled model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._functions: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        self._left: Any = None  # the `_surroundings` after the last exchange

    def metrics(self) -> list[Any]:
        """The metrics whose functions are kept and still valid."""
        if self._left != self._surroundings():
            self._functions.clear()
        return [metric for metrics in self._functions for metric in metrics]

    def use(self, metrics: list[Any]) -> None:
        """Give the model the functions for these metrics, or let it make them anew."""
        self.metrics()  # forgets functions that are no longer valid
        key = tuple(metrics)
        if key in self._functions:
            self._model.train_function, self._model.test_function = self._functions[key]
        else:
            retrace(self._model)
        if keras.backend.backend() == "tensorflow":
            if len(self._functions) == _MOST_KEPT:
                self._functions.clear()
            self._left = self._surroundings()
            self._functions[key] = self._left[0]

    def _surroundings(self) -> tuple[Any, ...]:
        """Everything that makes kept functions invalid when it changes.

        The functions are among it: after `compile`, or when a callback has called
        `retrace`, the model has other functions than after the last exchange.
        """
        model = self._model
        return (
            (model.train_function, model.test_function),
            [id(variable) for variable in model.trainable_variables],
            [_settings(loss) for loss in keras.tree.flatten(model.loss)],
            model.run_eagerly,
        )


def _settings(loss: Any) -> dict[str, Any]:
    """The plain attributes of a loss, which a trace holds as constants."""
    return {
        name: value
        for name, value in getattr(loss, "__dict__", {}).items()
        if isinstance(value, (bool, int, float, str))
    }
