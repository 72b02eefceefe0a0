"""The JSON text of an augmentation: errors say what is wrong, and at which place.

`albumentations.from_dict` would drop arguments that it does not know, with a warning at
most, and fails in many ways on a text that does not describe a pipeline. Therefore the
text is read here.

    {"scheme": 2, "seed": 0, "versions": {...}, "transform":
        {"__class_fullname__": "Compose", "p": 1.0, "transforms": [
            {"__class_fullname__": "HorizontalFlip", "p": 0.5}]}}

The flip stands at the place `transform.transforms[0]`.
"""

from __future__ import annotations

import enum
import inspect
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from kerastrip import _checks

__all__ = [
    "pipeline",
    "plain",
    "read",
    "written",
]

_KEYS = {"kerastrip", "scheme", "seed", "versions", "transform"}
_NAME = "__class_fullname__"
_DEEPEST = 50  # levels: copies of a pipeline take some frames of Python for each level


def written(pipeline: Any) -> Any:
    """A pipeline as dicts, lists and plain values; TypeError if it cannot be written."""
    try:
        return pipeline.to_dict()["transform"]
    except NotImplementedError as error:
        raise TypeError(
            f"The pipeline holds a transform that cannot be written as JSON: {error} "
            "Pickle the Augmentation instead."
        ) from error


def plain(value: Any) -> Any:
    """Enumerations and NumPy values as plain Python values, for JSON."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(
        f"The pipeline holds a {type(value).__name__}, which cannot be written as JSON: "
        f"{_checks.describe(value)}. Pickle the Augmentation instead."
    )


def read(text: Any) -> tuple[Any, int, dict[str, Any], Any]:
    """Scheme, seed, versions and transform of a text; ValueError if it has none."""
    try:
        content = json.loads(text)
        scheme, seed = content["scheme"], content["seed"]
        versions, transform = dict(content["versions"]), content["transform"]
        unknown = sorted(content.keys() - _KEYS)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        expected = "the JSON text of Augmentation.to_json()"
        advice = "Use Augmentation.load(path) for a file."
        raise _checks.value_error("text", expected, text, advice) from None
    if unknown:
        raise _checks.value_error("text", f"no keys but {sorted(_KEYS)}", unknown[0])
    try:
        return scheme, _checks.integer64("seed", seed), versions, transform
    except TypeError as error:
        raise ValueError(str(error)) from None


def pipeline(node: Any, lambdas: Mapping[str, Any], place: str = "transform") -> Any:
    """The transform that a node of the text describes.

    Args:
        node: a dict of the class name and the arguments.
        lambdas: `Lambda` transforms by their names.
        place: where the node stands, such as "transform.transforms[0]".
    """
    from albumentations.core import serialization

    name = node.get(_NAME) if isinstance(node, dict) else None
    if not isinstance(name, str):
        raise _checks.value_error(place, f"a transform with the key {_NAME!r}", node)
    if name in serialization.NON_SERIALIZABLE_REGISTRY:
        key = node.get("__name__")
        if not (isinstance(key, str) and key in lambdas):
            expected = f"one of `lambdas`, which are {sorted(lambdas)}"
            raise _checks.value_error(place, expected, key)
        return lambdas[key]
    kind: Any = serialization.SERIALIZABLE_REGISTRY.get(
        serialization.shorten_class_name(name)
    )
    # The register holds classes that are no transforms too: parameters of boxes and
    # keypoints.
    if not hasattr(kind, "set_random_state"):
        raise ValueError(
            f"The transform {name!r} is not known (at {place}). Import the module that "
            "defines it first; pass a Lambda by its name in `lambdas`."
        )
    arguments = _arguments(kind, node, place)
    if "transforms" in node:
        nodes = node["transforms"]
        if not isinstance(nodes, list) or place.count("[") >= _DEEPEST:
            expected = f"a list of transforms, nested at most {_DEEPEST} deep"
            received = nodes if not isinstance(nodes, list) else _checks.Told("more")
            raise _checks.value_error(f"{place}.transforms", expected, received)
        arguments["transforms"] = [
            pipeline(inner, lambdas, f"{place}.transforms[{i}]")
            for i, inner in enumerate(nodes)
        ]
    try:
        return kind(**arguments)
    except Exception as error:  # transforms check their arguments in many ways
        raise ValueError(f"{name} at {place}: {error}") from error


def _arguments(kind: Any, node: dict[str, Any], place: str) -> dict[str, Any]:
    """The arguments of a transform; ValueError if there is one that it does not know."""
    signature = inspect.signature(kind.__init__).parameters
    given = {key: value for key, value in node.items() if key != _NAME}
    if any(argument.kind is argument.VAR_KEYWORD for argument in signature.values()):
        return given
    # Some transforms write arguments of a base class that they do not take themselves.
    # Such arguments are known, but left out.
    known = {
        key
        for above in kind.__mro__
        for key in inspect.signature(above.__init__).parameters
    }
    for key in given:
        if key not in known:
            expected = f"arguments that {kind.__name__} takes"
            advice = "This version of albumentations may not know it."
            raise _checks.value_error(place, expected, key, advice)
    return {key: value for key, value in given.items() if key in signature}
