"""What a batch is made of: inputs, targets and sample weights.

    plan -> rows -> Inputs: source.take -> augmentation -> one array for each input
             |
             +----> readers of the targets and of the weights

Inputs, targets and weights are all read by the rows of the plan. Nothing in this file
refers to the sampler: worker processes can hold these objects, and a sampler that nobody
uses any more is freed.
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np

from kerastrip import _checks
from kerastrip.augmentation.pipeline import Augmentation
from kerastrip.sampling.plan import PKPlan
from kerastrip.sources import BrokenSamples, CachedImages, as_source
from kerastrip.sources.arrays import ArraySource, from_data_set

__all__ = [
    "Inputs",
    "ReadableRows",
    "gather",
    "targets",
    "weights",
]

_Reader = Callable[..., Any]

_WORDS = ("label", "one_hot")
_TEXTS = "OSU"  # kinds of dtype

# Sources whose `take` gathers rows of an `array`, and does nothing else.
_IN_MEMORY = (ArraySource, CachedImages)

# Samples are read and augmented in pieces of this many bytes. A piece stays in the cache
# of the processor and its memory is used again, which makes large images up to 1.6 times
# faster.
_AT_ONCE = 2**21


class ReadableRows:
    """The rows of a batch, in which no sample is broken.

    A broken row is replaced by another sample of its class: the first substitute
    (`PKPlan.substitutes`) that is neither broken nor in the batch already. If there is
    none, a substitute that is in the batch already is taken. This is repeated until the
    batch can be read. So it makes no difference which broken samples were known before:
    the rows depend on the samples, the plan, the epoch and the step alone.

    For a batch 4 7 | 2 9, where 7 is broken and its class has the substitutes 7 4 8 5:

        planned(), 7 not known yet      4 7 | 2 9      reading it fails: 7 is broken
        planned() once more             4 8 | 2 9      7 is broken, 4 is in the batch
        every later epoch               8 at once, wherever 4 stands beside a broken row

    Args:
        plan: the plan.

    Attributes:
        broken: sample -> what is wrong, for the broken samples met so far.
    """

    def __init__(self, plan: PKPlan):
        self._plan = plan
        self.broken: dict[int, str] = {}

    def read(
        self,
        make: _Reader,
        epoch: int,
        step: int,
        begun: tuple[np.ndarray, Callable[[], Any]] | None = None,
    ) -> tuple[np.ndarray, Any]:
        """The rows of a batch, and the result of `make(rows, epoch, step)`.

        Args:
            make: reads the rows.
            epoch, step: the epoch and the step of the batch.
            begun: rows that were `planned` earlier, and a function that waits for the
                result of `make` for these rows, which worker processes are making.
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
                # A source that names only samples outside of the batch would be asked for
                # ever.
                if not error.skip or error.broken.keys().isdisjoint(rows.tolist()):
                    raise
                first_ones = not self.broken
                self.broken.update(error.broken)
                if first_ones:
                    row, why = next(iter(error.broken.items()))
                    _checks.warn(
                        f"Sample {row} cannot be read: {why}. Another of its class is "
                        "drawn instead, and so for all that turn out broken: "
                        "`sampler.broken` names them, `sampler.report()` counts them."
                    )

    def planned(self, epoch: int, step: int) -> np.ndarray:
        """The rows of a batch; samples known to be broken are replaced."""
        rows, plan, broken = self._plan.indices(epoch, step), self._plan, self.broken
        if not broken:
            return rows
        present = set(rows.tolist())
        for position, row in enumerate(rows.tolist()):
            if row not in broken:
                continue
            # `usable` is lazy: mostly the first substitute or the second is taken.
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

    The constructor makes the first batch. So faults of samples or augmentation show when
    the sampler is built, and every later batch must have the shapes and dtypes of the
    first.

    Args:
        source: a source.
        augment: the argument `augment` of `PKSampler`.
        plan: its seed and first row are a part of the keys of the augmentation.
        rows: reads the rows of the first batch.

    Attributes:
        layout: (shape, dtype) of each input.
    """

    def __init__(self, source: Any, augment: Any, plan: PKPlan, rows: ReadableRows):
        self._source, self._key, self._first = source, plan.seed, plan.first_row
        first, x = rows.read(self._take, 0, 0)
        if isinstance(x, (Mapping, tuple)) and from_data_set(source):
            self._warn_of_labels(x, plan, rows)
        self._augment = _augmentations(augment, x)
        # Whether the augmentation reads the samples from the array of the source, so that
        # no copy of the batch is made before.
        self._in_place = (
            isinstance(self._augment, Augmentation)
            and type(source) in _IN_MEMORY
            and source.array.dtype.isnative
        )
        self._example = self._augmented(x, (0, 0), 0)
        # How many samples are read at a time: all, unless they are augmented.
        self._at_once = len(first)
        if self._augment is not None:
            passing = keras.tree.flatten(self._example if self._in_place else x)
            count = _AT_ONCE * len(first) // max(sum(map(_size, passing)), 1)
            self._at_once = min(max(count, 1), len(first))
        arrays = keras.tree.flatten(self._example)
        for array in arrays:
            if not isinstance(array, np.ndarray):
                name = "x" if augment is None else "augment"
                expected = "arrays that stack to a batch"
                raise _checks.type_error(name, expected, array)
        self.layout = [(array.shape, array.dtype) for array in arrays]
        self._texts = any(dtype.kind in _TEXTS for _, dtype in self.layout)
        if self._texts and keras.backend.backend() != "tensorflow":
            backend = keras.backend.backend()
            expected = f"numbers, as a model on {backend} takes no texts"
            texts = next(array for array in arrays if array.dtype.kind in _TEXTS)
            advice = (
                "Encode them first: arrays of tokens go in. On TensorFlow a model may "
                "begin with TextVectorization."
            )
            raise _checks.type_error("x", expected, texts, advice)

    def _take(self, rows: np.ndarray, *_: int) -> Any:
        return self._source.take(rows)

    def _warn_of_labels(self, x: Any, plan: PKPlan, rows: ReadableRows) -> None:
        """Warns if the labels are among the inputs, where nobody named the inputs.

        In a single batch another input may tell the classes by chance. The labels tell
        the classes in every batch.
        """

        def telling(x: Any, chosen: np.ndarray) -> list:
            codes = plan.codes[chosen]
            return [key for key, entry in _items(x) if _tells_class(entry, codes)]

        suspects = telling(x, plan.indices(0, 0))
        for epoch in range(1, 8):
            if suspects:
                chosen, x = rows.read(self._take, epoch, 0)
                suspects = [key for key in telling(x, chosen) if key in suspects]
        if suspects:
            _checks.warn(
                f"Entry {suspects[0]!r} of the samples in `x` tells the class of each: the "
                "labels become an input of the model. If that is not wanted, let the "
                "samples be the inputs alone, such as one column of the data set: "
                "PKSampler(data['image'], data['label']). If it is, name the inputs: "
                "x={'image': data['image'], 'label': data['label']}."
            )

    def check_fixed_size(self) -> None:
        """Raises TypeError if samples cannot be handed on by worker processes."""
        if any(dtype.hasobject for _, dtype in self.layout):
            name, expected = (
                "use_multiprocessing",
                "False for texts, whose lengths differ",
            )
            advice = "Threads read them; np.array(texts, str) has one length for all."
            raise _checks.type_error(name, expected, True, advice)

    def _read(self, rows: np.ndarray, step: tuple[int, int], position: int) -> Any:
        """Some samples of a batch, augmented.

        Args:
            rows: the samples.
            step: (epoch, step) of the batch.
            position: the place of the first of these samples in the batch.
        """
        if not self._in_place:
            return self._augmented(self._source.take(rows), step, position)
        if isinstance(self._source, CachedImages):
            self._source.check(rows)
        # If they were gathered first, large images would go through memory once more.
        key, first = (self._key, *step), self._first + position
        return self._augment.batch(self._source.array, *key, first=first, rows=rows)

    def _augmented(self, x: Any, step: tuple[int, int], position: int) -> Any:
        """`x` augmented; `x` are fresh arrays, the other arguments are as for `_read`."""
        # The key of an image is (seed, epoch, step, position in the global batch).
        key, first = (self._key, *step), self._first + position
        if self._augment is None:
            return x
        if isinstance(self._augment, Augmentation):
            return self._augment.batch(x, *key, first=first, copy=False)
        views = {
            name: self._augment[name].batch(entry, *key, first=first, copy=False)
            if name in self._augment
            else entry
            for name, entry in _items(x)
        }
        return views if isinstance(x, Mapping) else tuple(views.values())

    def arrays(
        self,
        rows: np.ndarray,
        epoch: int,
        step: int,
        out: Sequence[np.ndarray] | None = None,
    ) -> Sequence[np.ndarray]:
        """The inputs of a batch as a flat list of arrays; worker processes run this.

        Args:
            rows: the samples of the batch.
            epoch, step: the epoch and the step of the batch.
            out: arrays of `layout` to write into. Default: fresh ones.
        """
        # Pieces pay because they are copied into `out` while they are in the cache. Where
        # nothing has to be copied, the batch is made in one piece.
        count = len(rows) if self._in_place and out is None else self._at_once
        for start in range(0, len(rows), count):
            piece = rows[start : start + count]
            arrays = keras.tree.flatten(self._read(piece, (epoch, step), start))
            self._check(arrays, len(rows) - len(piece), epoch, step)
            if out is None:
                if len(piece) == len(rows):
                    return arrays
                out = [np.empty(shape, dtype) for shape, dtype in self.layout]
            for array, target in zip(arrays, out, strict=True):
                target[start : start + len(piece)] = array
        return out or []

    def _check(
        self, arrays: Sequence[np.ndarray], others: int, epoch: int, step: int
    ) -> None:
        """ValueError if shape or dtype of an input differ from the first batch.

        Args:
            arrays: the inputs of a piece of the batch.
            others: how many samples of the batch are not in the piece.
            epoch, step: the epoch and the step of the batch.
        """
        received = [
            ((len(array) + others, *array.shape[1:]), array.dtype) for array in arrays
        ]
        if received != self.layout:
            raise ValueError(
                f"The inputs of step {step} of epoch {epoch} differ from those of the "
                f"first batch: expected {_words(self.layout)}, received {_words(received)}."
            )

    def packed(self, arrays: Sequence[np.ndarray]) -> Any:
        """The inputs that `arrays` returned, in the structure that the model gets."""
        if self._texts:
            # Keras takes texts from a dataset as tensors only.
            import tensorflow as tf

            arrays = [
                tf.constant(array) if array.dtype.kind in _TEXTS else array
                for array in arrays
            ]
        return keras.tree.pack_sequence_as(self._example, arrays)


def _size(array: Any) -> int:
    return int(np.asarray(array).nbytes)


def _tells_class(entry: Any, codes: np.ndarray) -> bool:
    """Whether an input has one value for each class, and no value for two classes."""
    if not isinstance(entry, np.ndarray) or entry.dtype.kind not in "biuOSU":
        return False
    if entry.shape not in (codes.shape, (*codes.shape, 1)):
        return False
    values = entry.ravel().tolist()
    pairs = set(zip(values, codes.tolist(), strict=True))
    return 1 < len(pairs) == len(set(values)) == len(set(codes.tolist()))


def gather(readers: Any, rows: np.ndarray) -> Any:
    """The arrays that the readers return for `rows`, in the structure of the readers."""
    return keras.tree.map_structure(lambda read: read(rows), readers)


def _per_output(name: str, value: Any, reader: Callable[[str, Any], _Reader]) -> Any:
    """One reader of rows, or a tuple or dict of readers by output."""
    if isinstance(value, list):
        expected = (
            "one entry, a tuple in the order of the outputs or a dict by output name"
        )
        advice = "Keras takes no lists here: write a tuple, or np.asarray for values."
        raise _checks.type_error(name, expected, value, advice)
    if isinstance(value, (tuple, Mapping)):
        if not value:
            raise _checks.value_error(name, "at least one entry", value)
        readers = {key: reader(f"{name}[{key!r}]", one) for key, one in _items(value)}
        return readers if isinstance(value, Mapping) else tuple(readers.values())
    return reader(name, value)


def _items(structure: Mapping | tuple) -> Any:
    if isinstance(structure, Mapping):
        return structure.items()
    return enumerate(structure)


def targets(value: Any, plan: PKPlan) -> Any:
    """Readers of the targets: the words, arrays, tuples and dicts of `targets=`."""
    return _per_output("targets", value, partial(_target, plan))


def _target(plan: PKPlan, name: str, value: Any) -> _Reader:
    if isinstance(value, str):
        word = _checks.one_of(name, value, _WORDS)
        if word == "label":
            return plan.codes.__getitem__
        return partial(_one_hot, plan.codes, len(plan.classes_))
    if isinstance(value, (list, tuple, Mapping)) or not hasattr(value, "__len__"):
        expected = (
            "'label', 'one_hot', an array of one row per sample, or a tuple or dict of "
            "such entries by output"
        )
        raise _checks.type_error(name, expected, value)
    source = as_source(value, name)
    with contextlib.suppress(BrokenSamples):  # an error when the sample is drawn
        first = keras.tree.flatten(source.take([0]))
        if any(np.asarray(array).dtype.kind in _TEXTS for array in first):
            words = "numbers, or one of the words 'label' and 'one_hot'"
            raise _checks.type_error(name, words, value)
    if len(source) != len(plan.codes):
        expected = f"{len(plan.codes)} rows, one per sample"
        received = _checks.Told(f"{len(source)} rows")
        raise _checks.value_error(name, expected, received)
    return source.take


def _one_hot(codes: np.ndarray, classes: int, rows: np.ndarray) -> np.ndarray:
    encoded = np.zeros((len(rows), classes), np.float32)
    encoded[np.arange(len(rows)), codes[rows]] = 1
    return encoded


def weights(sample_weight: Any, targets: Any, samples: int) -> Any:
    """Readers of the weights, in a structure that Keras accepts, or None."""
    if sample_weight is None:
        return None
    if isinstance(sample_weight, tuple):
        kinds = (tuple, Mapping)
        fits = isinstance(targets, kinds) and len(sample_weight) == len(targets)
    elif isinstance(sample_weight, Mapping):
        fits = isinstance(targets, Mapping) and sample_weight.keys() == targets.keys()
    else:
        fits = True
    if not fits:
        expected = (
            "one array for all outputs, a tuple of one per output, in their order, or "
            "for a model whose outputs are a dict a dict with the names that `targets` "
            "has"
        )
        received = f"{_entries(sample_weight)} for targets={_entries(targets)}"
        raise _checks.value_error("sample_weight", expected, _checks.Told(received))
    return _per_output("sample_weight", sample_weight, partial(_weight, samples))


def _weight(samples: int, name: str, value: Any) -> _Reader:
    if value is None:
        advice = "For an output without weights: np.ones."
        raise _checks.value_error(name, "an array", value, advice)
    _checks.refuse_masked(name, value)
    array = np.array(value)
    if array.dtype.kind == "O":
        for sample, weight in enumerate(array.reshape(-1)):
            if not isinstance(weight, numbers.Real):
                received = _checks.Told(f"{weight} for sample {sample}")
                raise _checks.type_error(name, f"{samples} numbers", received)
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise _checks.type_error(name, f"{samples} numbers", value)
    expected = f"{samples} finite weights >= 0, one per sample"
    if len(array) != samples:
        raise _checks.value_error(name, expected, value)
    usable = np.isfinite(array) & (array >= 0)
    if not usable.all():
        first = np.unravel_index(int(np.argmin(usable)), usable.shape)
        received = _checks.Told(f"{array[first]} for sample {first[0]}")
        raise _checks.value_error(name, expected, received)
    return array.astype(np.float32).__getitem__


def _augmentations(augment: Any, x: Any) -> Any:
    """None, one Augmentation for the whole input, or a dict of Augmentations by input."""

    def made(one: Any) -> Augmentation:
        return one if isinstance(one, Augmentation) else Augmentation(one)

    if augment is None:
        return None
    if isinstance(augment, (Mapping, tuple)):
        kind = Mapping if isinstance(augment, Mapping) else tuple
        known = {key for key, _ in _items(x)} if isinstance(x, kind) else set()
        by_input = {key: made(one) for key, one in _items(augment) if one is not None}
        if by_input and by_input.keys() <= known:
            return by_input
    elif isinstance(x, np.ndarray) or (
        # A plain callable expects an image. Only an `Augmentation` and a pipeline of
        # albumentations know what to do with a dict of targets.
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
    raise _checks.value_error("augment", expected, augment)


def _entries(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict of {sorted(value)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return _checks.describe(value)


def _words(layout: Sequence[tuple]) -> str:
    return ", ".join(f"{shape} {dtype}" for shape, dtype in layout)
