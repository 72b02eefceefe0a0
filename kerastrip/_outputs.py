"""Which output of a model is the embedding, and how to take it from a structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras

from kerastrip import _checks

_STRUCTURES = (Mapping, list, tuple)


@dataclass(frozen=True)
class Output:
    """One output of a model: where it stands, its name and its compiled loss.

    Attributes:
        index: position among the outputs; None if only the name is known.
        name: the output's name, its key where the outputs are a dict, or its path
            where dicts lie in one another: "head/embedding", as Keras names its loss.
        loss: what `compile` got for it, None without.
        count: number of outputs of the model.
        trained: positions of the outputs that have a loss.
    """

    index: int | None
    name: str | None
    loss: Any = None
    count: int = 1
    trained: tuple[int | None, ...] = ()

    def part_of(self, structure: Any) -> Any:
        """This output's part of outputs or targets: a tensor, a sequence or a dict.

        Targets may leave out the outputs without a loss, as Keras allows.
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
    """Every output the model or its compiled losses tell of."""
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

    It is the one named by `output`; else the only one whose compiled loss has a
    `distance` (the mark of a metric-learning loss); else the only output there is.

    Args:
        model: a Keras model, compiled or not.
        output: position or name of an output; None finds it.

    Returns:
        An `Output`.

    Raises:
        ValueError: if the outputs leave it open, or `output` is not among them.
    """
    outputs = _outputs(model)
    told = ", ".join(
        repr(one.name if one.name is not None else one.index) for one in outputs
    )
    if output is not None:
        for one in outputs:
            if output in (one.index, one.name) and not isinstance(output, bool):
                return one
        if not getattr(model, "output_names", None):  # subclassed: the user knows
            index, name = (None, output) if isinstance(output, str) else (output, None)
            return Output(index, name, count=len(outputs))
        raise _checks.value_error("output", f"one of {told}", output)
    marked = [one for one in outputs if hasattr(one.loss, "distance")]
    if len(marked) == 1:
        return marked[0]
    if not marked and len(outputs) == 1:
        return outputs[0]
    which = "none of them has" if not marked else "several have"
    raise _checks.value_error(
        "output",
        "the position or name of the embedding",
        _checks.Told(f"None for a model with the outputs {told}"),
        f"It is found by the `distance` of its loss, and {which} such a loss: "
        "give output=....",
    )


def _is_nested(structure: Any) -> bool:
    """Whether a dict, list or tuple holds another one."""
    parts = structure.values() if isinstance(structure, Mapping) else structure
    return isinstance(structure, _STRUCTURES) and any(
        isinstance(part, _STRUCTURES) for part in parts
    )


def _leaves(structure: Any) -> dict[str, Any]:
    """What lies in dicts, lists and tuples, by its path: {"head/embedding": ...}."""
    # In the order of Keras, which is another on PyTorch.
    found = keras.tree.flatten_with_path(structure)
    return {"/".join(map(str, path)): leaf for path, leaf in found}
