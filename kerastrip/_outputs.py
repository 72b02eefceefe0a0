"""Which output of a model is the embedding, and its part of outputs and targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras

from kerastrip import _checks

_STRUCTURES = (Mapping, list, tuple)


@dataclass(frozen=True)
class Output:
    """One output of a model: its position, its name and its compiled loss.

    Attributes:
        index: position among the outputs; None if only the name is known.
        name: the name of the output; its key if the outputs are a dict; its path if
            they are nested dicts: "head/embedding", as Keras names the loss. None if
            only the position is known.
        loss: the loss that `compile` got for this output, None if it got none.
        count: number of outputs of the model.
        trained: positions of the outputs that have a loss.
    """

    index: int | None
    name: str | None
    loss: Any = None
    count: int = 1
    trained: tuple[int | None, ...] = ()

    def part_of(self, structure: Any) -> Any:
        """The outputs or targets of this output, out of those of the whole model.

        The targets may leave out the outputs without a loss, as Keras allows. For the
        second of the outputs "P", "Q" and "R", of which "Q" and "R" have a loss:

            tensor                          the tensor itself
            {"P": p, "Q": q, "R": r}        q, by its name
            {"a": x, "b": y, "c": z}        y: Keras pairs other keys in sorted order
            [q]                             q, the only one
            [q, r]                          q, the first of the outputs with a loss
            [p, q, r]                       q, by its position

        Args:
            structure: a tensor, or a list, tuple or dict, which may be nested.
        """
        if _is_nested(structure):
            leaves = _leaves(structure)
            by_name = self.index is None or self.name in leaves
            structure = leaves if by_name else list(leaves.values())
        if isinstance(structure, dict):
            if self.name in structure:
                return structure[self.name]
            # Keras pairs a dict with a list in the order of the sorted keys.
            keys = sorted(structure)
            if self.index is not None and len(keys) == self.count:
                return structure[keys[self.index]]
            raise _checks.value_error(
                "output", f"one of the keys {keys}", self.name or self.index
            )
        if not isinstance(structure, (list, tuple)):
            return structure
        if len(structure) == 1:
            return structure[0]
        if len(structure) == len(self.trained) < self.count:
            return structure[self.trained.index(self.index)]
        if self.index is None or self.index >= len(structure):
            raise _checks.value_error(
                "output",
                f"a position among {len(structure)} outputs",
                self.name if self.index is None else self.index,
            )
        return structure[self.index]

    @property
    def loss_key(self) -> str:
        """The key of this output's own loss in the logs of Keras."""
        return "loss" if len(self.trained) < 2 else f"{self.name}_loss"


def _outputs(model: Any) -> list[Output]:
    """Every output that the model or its compiled losses name."""
    names = list(getattr(model, "output_names", None) or [])
    loss = getattr(model, "loss", None)
    built = getattr(model, "output", None) if len(names) > 1 else None
    if _is_nested(built):
        names = list(_leaves(built))
    if _is_nested(loss):
        loss = _leaves(loss)
    entries: list[tuple[int | None, str | None, Any]]
    if isinstance(loss, dict):
        # The keys of dict outputs need not be the names of the layers.
        known = [name for name in names if name not in loss]
        foreign = [name for name in loss if name not in names]
        entries = [
            (names.index(name) if name in names else None, name, one)
            for name, one in loss.items()
        ]
        if not foreign:
            entries += [(names.index(name), name, None) for name in known]
    elif isinstance(loss, (list, tuple)):
        entries = [
            (i, names[i] if len(names) == len(loss) else None, one)
            for i, one in enumerate(loss)
        ]
    else:
        entries = [(i, name, loss) for i, name in enumerate(names or [None])]
    trained = tuple(index for index, _, one in entries if one is not None)
    count = max(len(entries), len(names))
    return [Output(*entry, count, trained) for entry in entries]


def embedding_output(model: Any, output: int | str | None = None) -> Output:
    """The output that holds the embedding.

    That is the output that `output` names; else the only output whose compiled loss has
    a `distance` (the mark of a metric-learning loss); else the only output of the model.

    Args:
        model: a Keras model, compiled or not.
        output: position or name of an output; None finds it.

    Returns:
        An `Output`.

    Raises:
        ValueError: if several outputs may be the embedding, or `output` names none.
    """
    outputs = _outputs(model)
    names = ", ".join(
        repr(one.name if one.name is not None else one.index) for one in outputs
    )
    if output is not None:
        for one in outputs:
            if output in (one.index, one.name) and not isinstance(output, bool):
                return one
        if not getattr(model, "output_names", None):  # subclassed: the user knows
            index, name = (None, output) if isinstance(output, str) else (output, None)
            return Output(index, name, count=len(outputs))
        raise _checks.value_error("output", f"one of {names}", output)
    marked = [one for one in outputs if hasattr(one.loss, "distance")]
    if len(marked) == 1:
        return marked[0]
    if not marked and len(outputs) == 1:
        return outputs[0]
    which = "none of them has" if not marked else "several have"
    raise _checks.value_error(
        "output",
        "the position or name of the embedding",
        _checks.Told(f"None for a model with the outputs {names}"),
        f"It is found by the `distance` of its loss, and {which} such a loss: "
        "give output=....",
    )


def _is_nested(structure: Any) -> bool:
    """Whether a dict, list or tuple holds a further dict, list or tuple."""
    members = structure.values() if isinstance(structure, Mapping) else structure
    return isinstance(structure, _STRUCTURES) and any(
        isinstance(member, _STRUCTURES) for member in members
    )


def _leaves(structure: Any) -> dict[str, Any]:
    """The tensors of nested dicts, lists and tuples by their paths: {"head/embedding": t}."""
    # In the order of Keras, which differs on PyTorch.
    leaves = keras.tree.flatten_with_path(structure)
    return {"/".join(map(str, path)): leaf for path, leaf in leaves}
