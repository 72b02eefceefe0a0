"""What a batch is made of: inputs, targets and sample weights.

Each is read by the rows of the plan. Nothing here refers to the sampler, so that
worker processes can hold it and a sampler that is dropped is freed.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np

from kerastrip import _checks
from kerastrip.augmentation import Augmentation
from kerastrip.plan import PKPlan
from kerastrip.sources import BrokenSamples, CachedImages, as_source
from kerastrip.sources.arrays import ArraySource

Reader = Callable[..., Any]

_WORDS = ("label", "one_hot")

# Sources whose `take` gathers rows of an `array`, and does nothing else.
_IN_MEMORY = (ArraySource, CachedImages)

# Samples are read and augmented by so many bytes at a time: they stay in the cache and
# in memory that is used again, which makes large images up to 1.6 times faster.
_AT_ONCE = 2**21


class Rows:
    """The rows of a batch, with others of their class in place of broken ones.

    The place of a broken row takes the first of `PKPlan.substitutes` that is neither
    broken nor in the batch already, or if there is none the first that is not broken.
    This is done over until the batch can be read, so which of the broken ones were
    known before makes no difference: the rows depend on the samples, the plan, epoch
    and step alone.

    Args:
        plan: the plan.

    Attributes:
        broken: sample -> what is wrong, for those met so far.
    """

    def __init__(self, plan: PKPlan):
        self._plan, self._meetings = plan, itertools.count()
        self.broken: dict[int, str] = {}

    def read(
        self,
        make: Reader,
        epoch: int,
        step: int,
        begun: tuple[np.ndarray, Callable[[], Any]] | None = None,
    ) -> tuple[np.ndarray, Any]:
        """The rows, and what `make(rows, epoch, step)` gives for them.

        Args:
            make: reads them.
            epoch, step: of the batch.
            begun: rows that were `planned`, and a function that gives what `make` is
                about to give for them.
        """
        while True:
            if begun is None:
                rows = self.planned(epoch, step)
                finish: Callable[[], Any] = partial(make, rows, epoch, step)
            else:
                (rows, finish), begun = begun, None
            try:
                return rows, finish()
            except BrokenSamples as error:
                if not error.skip or error.broken.keys().isdisjoint(rows.tolist()):
                    raise
                self.broken.update(error.broken)
                if next(self._meetings) == 0:
                    row, why = next(iter(error.broken.items()))
                    warnings.warn(
                        f"Sample {row} cannot be read: {why}. Another of its class is "
                        "drawn instead, and so for all that turn out broken: "
                        "`sampler.broken` names them, `sampler.report()` counts them.",
                        stacklevel=2,
                    )

    def planned(self, epoch: int, step: int) -> np.ndarray:
        """The rows of the plan without those that are known to be broken."""
        rows, plan, broken = self._plan.indices(epoch, step), self._plan, self.broken
        if not broken:
            return rows
        present = set(rows.tolist())
        for position, row in enumerate(rows.tolist()):
            if row not in broken:
                continue
            others = plan.substitutes(epoch, step, position)
            usable = (other for other in others if other not in broken)
            first = next(usable, None)
            if first is None:
                label = plan.classes_[plan.codes[[row]]].tolist()[0]
                raise ValueError(
                    f"No sample of class {label!r} can be read, so none can be drawn. "
                    f"One of them: {broken[row]}. Leave the class out."
                )
            fresh = (other for other in usable if other not in present)
            rows[position] = next(fresh, first) if first in present else first
            present.add(int(rows[position]))
        return rows


class Inputs:
    """The model inputs of a batch, gathered and augmented.

    Makes the first batch: what is wrong with samples or augmentation shows here, and
    its shapes and dtypes are what every later batch must have.

    Args:
        source: a source.
        augment: what `PKSampler(augment=)` takes.
        plan: gives the key of the augmentation.
        rows: gives those of the first batch.

    Attributes:
        layout: (shape, dtype) of each input.
    """

    def __init__(self, source: Any, augment: Any, plan: PKPlan, rows: Rows):
        self._source, self._key, self._first = source, plan.seed, plan.first_row
        first, x = rows.read(lambda indices, *_: source.take(indices), 0, 0)
        self._augment, self._images = _augmentations(augment, x), None
        if isinstance(self._augment, Augmentation) and type(source) in _IN_MEMORY:
            self._images = source.array
        self._at_once = len(first)
        if self._augment is not None and self._images is None:
            whole = sum(np.asarray(part).nbytes for part in keras.tree.flatten(x))
            count = _AT_ONCE * len(first) // max(whole, 1)
            self._at_once = min(max(count, 1), len(first))
        self._example = self._augmented(x, 0, 0)
        arrays = keras.tree.flatten(self._example)
        for array in arrays:
            if not isinstance(array, np.ndarray):
                raise TypeError(
                    _checks.message(
                        "augment" if augment is not None else "x",
                        "arrays that stack to a batch",
                        array,
                    )
                )
        self.layout = [(array.shape, array.dtype) for array in arrays]

    def _augmented(
        self,
        x: Any,
        epoch: int,
        step: int,
        at: int = 0,
        rows: np.ndarray | None = None,
        out: Any = None,
    ) -> Any:
        """`x` augmented, the samples of the batch from position `at` on.

        Args:
            x: samples, fresh arrays; or with `rows` an array that stays as it is.
            epoch, step: of the batch.
            at: position of the first of them.
            rows: which of `x` they are. Default: all.
            out: what to write one input's views into, where there is one input.
        """
        key, first = (self._key, epoch, step), self._first + at
        if self._augment is None:
            return x
        if isinstance(self._augment, Augmentation):
            copy = rows is not None
            return self._augment.batch(
                x, *key, first=first, rows=rows, out=out, copy=copy
            )
        parts = {
            name: self._augment[name].batch(part, *key, first=first, copy=False)
            if name in self._augment
            else part
            for name, part in _items(x)
        }
        return parts if isinstance(x, Mapping) else tuple(parts.values())

    def arrays(
        self,
        rows: np.ndarray,
        epoch: int,
        step: int,
        out: Sequence[np.ndarray] | None = None,
    ) -> Sequence[np.ndarray]:
        """The inputs one after the other.

        Args:
            rows: of the batch.
            epoch, step: of the batch.
            out: arrays of `layout` to write into. Default: fresh ones.
        """
        if out is None:
            if self._augment is None:
                arrays = keras.tree.flatten(self._source.take(rows))
                self._check(arrays, 0, epoch, step)
                return arrays
            out = [np.empty(shape, dtype) for shape, dtype in self.layout]
        for at in range(0, len(rows), self._at_once):
            part = slice(at, at + self._at_once)
            targets = [array[part] for array in out]
            x = self._part(rows[part], epoch, step, at, targets)
            arrays = keras.tree.flatten(x)
            self._check(arrays, len(rows) - len(rows[part]), epoch, step)
            for array, target in zip(arrays, targets, strict=True):
                if array is not target:
                    target[...] = array
        return out

    def _part(
        self,
        rows: np.ndarray,
        epoch: int,
        step: int,
        at: int,
        targets: Sequence[np.ndarray],
    ) -> Any:
        """The samples of a part of a batch, which may be written into `targets`."""
        if self._images is None:
            make = partial(self._augmented, self._source.take(rows), epoch, step, at)
        else:  # gathered first, they would go through memory once more
            if isinstance(self._source, CachedImages):
                self._source.check(rows)
            make = partial(self._augmented, self._images, epoch, step, at, rows)
        if not isinstance(self._example, np.ndarray):
            return make()
        try:
            return make(out=targets[0])
        except ValueError:  # if they do not fit, `_check` tells what does not
            return make()

    def _check(
        self, arrays: Sequence[np.ndarray], others: int, epoch: int, step: int
    ) -> None:
        """Refuses inputs of a part that has `others` beside it in the batch."""
        found = [
            ((len(array) + others, *array.shape[1:]), array.dtype) for array in arrays
        ]
        if found != self.layout:
            raise ValueError(
                f"The inputs of step {step} of epoch {epoch} differ from those of the "
                f"first batch: expected {_told(self.layout)}, received {_told(found)}."
            )

    def packed(self, arrays: Sequence[np.ndarray]) -> Any:
        """What `arrays` returned, in the structure that the model gets."""
        return keras.tree.pack_sequence_as(self._example, arrays)


def gather(readers: Any, rows: np.ndarray) -> Any:
    """What the readers give for `rows`, in their structure."""
    return keras.tree.map_structure(lambda read: read(rows), readers)


def _per_output(name: str, value: Any, reader: Callable[[str, Any], Reader]) -> Any:
    """One reader, or a tuple or dict of them by output."""
    if isinstance(value, list):
        raise TypeError(
            _checks.message(
                name,
                "one entry, a tuple in the order of the outputs or a dict by output name",
                value,
                "Keras takes no lists here: write a tuple, or np.asarray for values.",
            )
        )
    if isinstance(value, (tuple, Mapping)):
        if not value:
            raise ValueError(_checks.message(name, "at least one entry", value))
        parts = {key: reader(f"{name}[{key!r}]", part) for key, part in _items(value)}
        return parts if isinstance(value, Mapping) else tuple(parts.values())
    return reader(name, value)


def _items(structure: Mapping | tuple) -> Any:
    if isinstance(structure, Mapping):
        return structure.items()
    return enumerate(structure)


def targets(value: Any, plan: PKPlan) -> Any:
    """Readers of the targets: the words, arrays, tuples and dicts of `targets=`."""
    return _per_output("targets", value, partial(_target, plan))


def _target(plan: PKPlan, name: str, value: Any) -> Reader:
    if isinstance(value, str):
        word = _checks.one_of(name, value, _WORDS)
        if word == "label":
            return plan.codes.__getitem__
        return partial(_one_hot, plan.codes, len(plan.classes_))
    if isinstance(value, (list, tuple, Mapping)) or not hasattr(value, "__len__"):
        raise TypeError(
            _checks.message(
                name,
                "'label', 'one_hot', an array of one row per sample, or a tuple or "
                "dict of those by output",
                value,
            )
        )
    source = as_source(value, name)
    if len(source) != len(plan.codes):
        raise ValueError(
            _checks.message(
                name,
                f"{len(plan.codes)} rows, one per sample",
                _checks.Told(f"{len(source)} rows"),
            )
        )
    return source.take


def _one_hot(codes: np.ndarray, classes: int, rows: np.ndarray) -> np.ndarray:
    encoded = np.zeros((len(rows), classes), np.float32)
    encoded[np.arange(len(rows)), codes[rows]] = 1
    return encoded


def weights(sample_weight: Any, targets: Any, samples: int) -> Any:
    """Readers of the weights, in a structure that Keras accepts, or None."""
    if sample_weight is None:
        return None
    if isinstance(sample_weight, (tuple, Mapping)):
        if isinstance(sample_weight, tuple):
            fits = isinstance(targets, (tuple, Mapping)) and (
                len(sample_weight) == len(targets)
            )
        else:
            fits = isinstance(targets, Mapping) and (
                sample_weight.keys() == targets.keys()
            )
        if not fits:
            raise ValueError(
                _checks.message(
                    "sample_weight",
                    "one array for all outputs, a tuple of one per output, in their "
                    "order, or for a model whose outputs are a dict a dict with the "
                    "names that `targets` has",
                    _checks.Told(
                        f"{_entries(sample_weight)} for targets={_entries(targets)}"
                    ),
                )
            )

    def reader(name: str, value: Any) -> Reader:
        if value is None:
            raise ValueError(
                _checks.message(
                    name, "an array", value, "For an output without weights: np.ones."
                )
            )
        array = np.array(value)
        if array.dtype.kind not in "biuf" or array.ndim == 0:
            raise TypeError(_checks.message(name, f"{samples} numbers", value))
        if len(array) != samples or not np.isfinite(array).all() or (array < 0).any():
            raise ValueError(
                _checks.message(
                    name, f"{samples} finite weights >= 0, one per sample", value
                )
            )
        return array.astype(np.float32).__getitem__

    return _per_output("sample_weight", sample_weight, reader)


def _augmentations(augment: Any, x: Any) -> Any:
    """None, one Augmentation for the whole input, or a dict of them by input."""

    def made(one: Any) -> Augmentation:
        return one if isinstance(one, Augmentation) else Augmentation(one)

    if augment is None:
        return None
    if isinstance(augment, (Mapping, tuple)):
        kind = Mapping if isinstance(augment, Mapping) else tuple
        known = {key for key, _ in _items(x)} if isinstance(x, kind) else set()
        parts = {key: made(one) for key, one in _items(augment) if one is not None}
        if parts and parts.keys() <= known:
            return parts
    elif isinstance(x, np.ndarray) or (
        # A plain callable expects an image; these know a dict of targets.
        isinstance(x, Mapping)
        and (isinstance(augment, Augmentation) or hasattr(augment, "set_random_state"))
    ):
        return made(augment)
    expected = "one augmentation, as `x` is one array"
    if not isinstance(x, np.ndarray):
        expected = (
            f"a {type(x).__name__} of augmentations for some of the inputs "
            f"{[key for key, _ in _items(x)]}"
        )
    raise ValueError(_checks.message("augment", expected, augment))


def _entries(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict of {sorted(value)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return _checks.describe(value)


def _told(layout: Sequence[tuple]) -> str:
    return ", ".join(f"{shape} {dtype}" for shape, dtype in layout)
