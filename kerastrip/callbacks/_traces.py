"""Making a model trace its steps again, and using again what it has traced.

What a step reads from Python (the margin of a loss, the metrics there are) is fixed when
the step is traced. So whoever changes it calls `retrace`.
"""

from __future__ import annotations

from typing import Any

import keras

# Enough for the coming and going of two callbacks, in either order.
_MOST_KEPT = 8


def retrace(model: Any) -> None:
    """Make the model build its train and test functions anew."""
    model.make_train_function(force=True)
    model.make_test_function(force=True)


class Traces:
    """The functions of a model, for each of the things that come to it and go again.

    TensorFlow never gives back all the memory of a trace: a program that calls `fit`
    again and again, with a thing and without it, would grow with every call. So the
    functions are exchanged, and serve again as long as nothing else has changed:

        fit with the thing          fit without                fit with the thing
        use([thing])          use([])                    use([thing])
        |-- made, traced --|  |-- made, traced --|       |-- the first ones again --|

    On JAX and PyTorch nothing is kept. JAX takes two functions of one method for the same:
    as long as anyone holds the first, the second is never traced. PyTorch does not trace.

    Args:
        model: a compiled model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._functions: dict[tuple[Any, ...], tuple[Any, Any]] = {}
        self._left: Any = None  # the surroundings after the last exchange

    def things(self) -> list[Any]:
        """The things for which functions are kept that still are right."""
        if self._left != self._surroundings():
            self._functions.clear()
        return [thing for things in self._functions for thing in things]

    def use(self, things: list[Any]) -> None:
        """Give the model the functions for these things, or let it make them anew."""
        self.things()  # what is out of date is forgotten
        key = tuple(things)
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
        """What a step reads besides the things, and whether others made it anew.

        After `compile`, or when a callback has called `retrace`, the functions are
        others than those of the last exchange.
        """
        model = self._model
        return (
            (model.train_function, model.test_function),
            [id(variable) for variable in model.trainable_variables],
            [_settings(loss) for loss in keras.tree.flatten(model.loss)],
            model.run_eagerly,
        )


def _settings(loss: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in getattr(loss, "__dict__", {}).items()
        if isinstance(value, (bool, int, float, str))
    }
