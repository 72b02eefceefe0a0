"""The sampling plan: which samples make up a batch, as a pure function.

`PKPlan` is NumPy only and knows nothing of Keras or of images: anyone can wrap it.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from kerastrip import _checks, _labels
from kerastrip.sampling import epoch_modes, permutation
from kerastrip.sampling.permutation import mix
from kerastrip.sampling.spread import Cover, Spread, camera_order

__all__ = [
    "EPOCH_MODES",
    "PKPlan",
    "SamplingReport",
]

EPOCH_MODES = ("balanced", "coverage")
_SMALL_CLASSES = ("repeat", "drop", "error")

# About this many indices are planned at once when steps are asked for in order.
_BLOCK = 1 << 16
# The streams of keys that one seed is split into. (Stream 3 belongs to `splits`.)
_SAMPLES, _CLASSES, _LIMIT, _SUBSTITUTES, _SPREAD = 0, 1, 2, 4, 5


@dataclasses.dataclass(frozen=True)
class SamplingReport:
    """What a plan makes of its labels; a table when printed or shown in a notebook.

    All numbers of an epoch are numbers of epoch 0. With `groups=` given for
    samples, a class counts once for each group it has samples in.

    Attributes:
        classes_kept: classes that are drawn.
        classes_left_out: classes that are not drawn.
        samples_kept: samples of the classes that are drawn.
        samples_left_out: samples of the classes that are not drawn.
        batches_per_epoch: the length of the plan.
        rows_per_epoch: batches times rows of a batch.
        samples_seen: distinct samples in an epoch.
        coverage: `samples_seen / samples_kept`.
        repeats_per_epoch: rows whose sample has come before in the epoch.
        least_drawn: label and draws of the class drawn least.
        most_drawn: label and draws of the class drawn most.
        classes_not_spread: classes whose samples all have one word of `spread=` (one
            camera), so that their rows cannot be spread. None without `spread=`.
        samples_broken: how many samples could not be read so far; other samples of
            their class are drawn instead. Only a sampler counts them; 0 from a plan.
    """

    classes_kept: int
    classes_left_out: int
    samples_kept: int
    samples_left_out: int
    batches_per_epoch: int
    rows_per_epoch: int
    samples_seen: int
    coverage: float
    repeats_per_epoch: int
    least_drawn: tuple[Any, int]
    most_drawn: tuple[Any, int]
    classes_not_spread: int | None = None
    samples_broken: int = 0

    def __str__(self) -> str:
        return "\n".join(f"{name:<20}{value}" for name, value in self._lines())

    def _repr_html_(self) -> str:
        cells = (
            f"<tr><td>{name}</td><td>{html.escape(value)}</td></tr>"
            for name, value in self._lines()
        )
        return f"<table>{''.join(cells)}</table>"

    def _lines(self) -> Iterator[tuple[str, str]]:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if isinstance(value, tuple):
                value = f"{value[0]} ({value[1]} times)"
            elif isinstance(value, float):
                value = f"{value:.1%}"
            yield field.name.replace("_", " "), str(value)


class PKPlan:
    """Batches of P classes x K samples as a pure function of (epoch, step).

    Every batch holds exactly `classes_per_batch` distinct classes and
    `samples_per_class` rows of each, side by side. Rows of one class are distinct
    samples whenever it has that many. Nothing is drawn from a stream: any order
    of calls, in any thread or process, gives the same rows.

    Two kinds of epoch:

    - `"balanced"`: every class is drawn equally often. In each epoch, and over all
      epochs, the draws of any two classes (with `groups`: of one group) differ by at
      most 1. Inside a class the samples come in shuffled cycles, which continue from
      epoch to epoch: after every batch the numbers of uses of any two samples of a class
      (with `spread`: of one camera of it) differ by at most 1.
    - `"coverage"`: every kept sample is drawn at least once per epoch, in the fewest
      batches that P distinct classes x K rows allow. That is the larger of
      `ceil(sum(D) / P)` and `max(D)`, where `D = ceil(samples / K)` for each
      class. Spare places go to the classes drawn least in the epoch.

    `spread` keeps the rows of a class apart: in a *balanced* batch the K rows of a class
    come from `min(K, cameras of the class)` different cameras, and from each as evenly as
    its samples allow. For K = 4 a class with 1, 5 and 9 samples from three cameras gives
    1 + 1 + 2 or 1 + 2 + 1. Over the epochs its cameras are drawn equally often, as far
    as they have samples: where one camera has most samples of a class, those are drawn
    less often than the others. A *coverage* epoch shows all samples equally often, as
    far as spare rows allow, in as many batches as without `spread`: each camera is spread
    over the draws of its class as evenly as possible, and spare rows go to cameras
    that are missing. A class with samples from one camera only is drawn from that camera;
    `report()` counts such classes. A class of fewer than K samples gives all of them and
    then repeats samples, whatever their camera.

    `groups_per_batch=C` takes P / C classes from each of C groups. Groups share the batches
    in proportion to their classes, but a group is in a batch once only: a group with
    more than 1 / C of the classes is in every batch, and its classes are drawn less often
    than those of other groups. A coverage epoch takes the fewest batches that this
    allows: `max(ceil(sum(M) / C), max(M))`, where M is the fewest shares of P / C classes
    in which a group can be covered.

    Corner cases:

    - A class with fewer than `min_class_size` samples is left out.
    - A class with fewer than K samples is, by `small_classes`, drawn with all of
      its samples and topped up (`"repeat"`), left out (`"drop"`) or an error.
      One warning names the classes left out or repeated; `report()` counts them.
    - Fewer than P classes to draw from is an error that says how many there are.
    - P need not divide the number of classes, nor K the size of a class.
    - `samples_per_class=1` gives batches without any positive, and warns.
    - Labels are copied: changing the array afterwards does not change the plan.

    Args:
        labels: `(samples,)` integers of any size, strings or bytes, or
            `(samples, classes)` one-hot rows.
        classes_per_batch: P, at least 1.
        samples_per_class: K, at least 1.
        classes: the label table; by default all distinct labels, sorted. Give
            `train.classes_` to a validation plan to share the codes.
        epoch_mode: `"balanced"` (default) or `"coverage"`.
        batches_per_epoch: length of a balanced epoch; by default
            `ceil(kept samples / (P * K))`.
        small_classes: `"repeat"` (default), `"drop"` or `"error"`.
        min_class_size: the least samples of a class that is drawn, default 2.
        max_per_class: with coverage, the most samples of a class in an epoch;
            the next epoch takes the next samples. No limit by default.
        groups: `(samples,)` or `(distinct labels,)` group labels (a category, an
            alphabet, a site): the P classes of a batch come from one group, or from
            `groups_per_batch` groups, and groups get batches in proportion to their
            classes. If `groups` has an entry for each sample, a class gives only its
            samples of the batch's group.
        groups_per_batch: C, groups in a batch; it divides P. Default 1. With 2 or more
            all samples of a class must be of one group.
        spread: `(samples,)` one word per sample: its camera, session, typeface (integers
            or strings). The rows of a class come from different cameras. Default None.
        shard: `(index, count)`: this host's `P / count` classes of each batch.
        seed: any integer.

    Attributes:
        classes_: the label table, `(C,)`.
        codes: `(samples,)` int32, `classes_[codes]` are the labels.
        first_row: the place of the shard's first row in the global batch.

    Raises:
        TypeError: the labels have a float dtype, or a count is no integer.
        ValueError: another argument is out of range; the message says what would work.

    Example:

    >>> plan = PKPlan(["a", "a", "b", "b", "b", "c", "c"],
    ...               classes_per_batch=2, samples_per_class=2)
    >>> len(plan)
    2
    >>> rows = plan.indices(epoch=0, step=0)
    >>> plan.codes[rows].reshape(2, 2)  # two classes, two rows each
    array([[1, 1],
           [0, 0]], dtype=int32)

    Two cameras have seen two people; each pair of rows is of both cameras:

    >>> plan = PKPlan(["a", "a", "a", "b", "b"], classes_per_batch=2, samples_per_class=2,
    ...               spread=["north", "south", "south", "north", "south"])
    >>> rows = plan.indices(epoch=0, step=0).reshape(2, 2)  # samples 0 and 3 see north
    >>> [bool(0 in row or 3 in row) for row in rows]
    [True, True]

    References:
        - Hermans, Beyer, Leibe, "In Defense of the Triplet Loss for Person
          Re-Identification", 2017, section 2 (P x K batches).
        - McNaughton, "Scheduling with Deadlines and Loss Functions", 1959 (the
          fewest batches).
    """

    def __init__(
        self,
        labels: Any,
        *,
        classes_per_batch: int,
        samples_per_class: int,
        classes: Any = None,
        epoch_mode: str = "balanced",
        batches_per_epoch: int | None = None,
        small_classes: str = "repeat",
        min_class_size: int = 2,
        max_per_class: int | None = None,
        groups: Any = None,
        groups_per_batch: int = 1,
        spread: Any = None,
        shard: tuple[int, int] = (0, 1),
        seed: int = 0,
    ) -> None:
        check = _checks.integer
        self.classes_per_batch = check("classes_per_batch", classes_per_batch, 1)
        self.samples_per_class = check("samples_per_class", samples_per_class, 1)
        self.epoch_mode = _checks.one_of("epoch_mode", epoch_mode, EPOCH_MODES)
        self.small_classes = _checks.one_of(
            "small_classes", small_classes, _SMALL_CLASSES
        )
        self.min_class_size = check("min_class_size", min_class_size, 1)
        if self.epoch_mode == "balanced":
            name, unfit = "max_per_class", max_per_class
            advice = "There `batches_per_epoch` sets how much of a class is seen."
        else:
            name, unfit = "batches_per_epoch", batches_per_epoch
            advice = "The samples set the length; `max_per_class` shortens it."
        if unfit is not None:
            expected = f"None with epoch_mode={epoch_mode!r}"
            raise _checks.value_error(name, expected, unfit, advice)
        if max_per_class is not None:
            check("max_per_class", max_per_class, 1)
        if batches_per_epoch is not None:
            check("batches_per_epoch", batches_per_epoch, 1)
        self.max_per_class = max_per_class
        self.groups_per_batch = _checked_shares(
            groups_per_batch, groups, self.classes_per_batch
        )
        self.shard = _checked_shard(shard, self.classes_per_batch)
        self.seed = check("seed", seed)
        for name, what, lacking in (
            ("samples_per_class", "one row of each class", "positives"),
            ("classes_per_batch", "the rows of one class", "negatives"),
        ):
            if getattr(self, name) == 1:
                _checks.warn(
                    f"{name}=1 puts {what} into a batch: there are no {lacking} for a "
                    "triplet loss to mine. Use 2 or more."
                )

        table = _labels.LabelTable(labels, classes)
        self._table = table
        self.classes_, self.codes = table.classes, table.codes
        words = None if spread is None else _word_codes(spread, len(table.codes))
        self._index(*_group_codes(groups, table), words)
        self._batches = self._schedule_epochs(batches_per_epoch)
        # (epoch, first step, rows): a block planned ahead, replaced as a whole.
        self._block: tuple[int, int, np.ndarray] = (0, 0, np.empty((0, 0), np.int64))
        self._next: tuple[int, int] = (0, 0)
        self._covered: tuple[int, Cover] | None = None

    def _index(
        self,
        groups: np.ndarray | None,
        names: np.ndarray,
        words: np.ndarray | None,
    ) -> None:
        """Sort the samples by (group, class) and keep the classes to draw from.

        What is drawn as a class is a *stratum*: the samples of one class, or with groups
        for samples the samples of one class in one group.

        Args:
            groups: `(samples,)` codes of the groups; None if there is one group.
            names: `(groups,)` the groups as they were given.
            words: `(samples,)` codes of the words of `spread`.
        """
        # For the codes 1 0 1 2 0 1 and no groups the index is
        #
        #     order     1 4 | 0 2 5 | 3      rows of class 0, of class 1, of class 2
        #     sizes     2     3       1
        #     starts    0     2       5
        #
        # Class 2 has a single sample and is left out: `order` stays as it is, and the
        # last entry of `sizes` and of `starts` goes.
        strata = self.codes if groups is None else _paired(groups, self.codes)
        cameras = None
        if words is None:
            order, sizes = _labels.sorted_by(strata)
        else:
            order, cameras = camera_order(strata, words)
            sizes = cameras.sums(cameras.sizes)
        starts = np.cumsum(sizes) - sizes
        code = self.codes[order[starts]]
        fewest = self._fewest_samples(sizes, code)
        kept = sizes >= fewest
        self._order, self._starts, self._sizes = order, starts[kept], sizes[kept]
        self._cameras = None if cameras is None else cameras.of_strata(kept)
        self._codes_of_strata = code[kept]
        self._left_out = int((~kept).sum()), int(sizes[~kept].sum())
        self._check_usable(code)
        self._group_sizes = np.array([kept.sum()])
        if groups is not None:
            self._group_sizes = self._classes_of_groups(
                groups[order[self._starts]], names
            )
        notes = []
        if not kept.all():
            notes.append(
                f"{(~kept).sum()} of {len(sizes)} classes have fewer than "
                f"{fewest} samples and are left out: {self._named(code[~kept])}"
            )
        repeated = kept & (sizes < self.samples_per_class)
        if repeated.any():
            notes.append(
                f"{repeated.sum()} of {len(sizes)} classes have fewer than "
                f"samples_per_class={self.samples_per_class} samples and repeat them "
                f"inside a batch: {self._named(code[repeated])}"
            )
        if notes:
            _checks.warn("; ".join(notes) + ".")

    def _fewest_samples(self, sizes: np.ndarray, code: np.ndarray) -> int:
        """The fewest samples of a class that is drawn, given all sizes and codes."""
        k, small = self.samples_per_class, sizes < self.samples_per_class
        if self.small_classes == "error" and small.any():
            expected = (
                "'repeat' or 'drop' where classes have fewer than "
                f"samples_per_class={k} samples"
            )
            advice = f"These have fewer: {self._named(code[small])}."
            raise _checks.value_error("small_classes", expected, "error", advice)
        dropped = self.small_classes == "drop"
        return max(self.min_class_size, k) if dropped else self.min_class_size

    def _classes_of_groups(self, groups: np.ndarray, names: np.ndarray) -> np.ndarray:
        """`(groups,)` how many classes each group has, if batches can be made of them.

        Args:
            groups: `(strata,)` code of the group of each stratum.
            names: the groups as they were given, by code.
        """
        p, shares = self.classes_per_batch, self.groups_per_batch
        groups, sizes = np.unique(groups, return_counts=True)
        poor = groups[sizes < p // shares]
        if poor.size:
            rule = f"classes_per_batch={p}"
            if shares > 1:
                rule = f"classes_per_batch / groups_per_batch = {p // shares}"
            raise _checks.value_error(
                "groups",
                f"at least {rule} usable classes in every group",
                _checks.Told(
                    f"{sizes[groups == poor[0]][0]} in {names.tolist()[poor[0]]!r}"
                ),
                f"{len(poor)} of {len(groups)} groups are too small: leave them out or "
                f"draw fewer classes per batch. ({self._left_out[0]} classes were left "
                "out before, because they have too few samples.)",
            )
        if shares > len(groups):
            expected = f"at most {len(groups)}, the groups with usable classes"
            raise _checks.value_error("groups_per_batch", expected, shares)
        several = np.flatnonzero(np.bincount(self._codes_of_strata) > 1)
        if shares > 1 and several.size:
            received = _checks.Told(
                f"{len(several)} classes in several groups: {self._named(several)}"
            )
            raise _checks.value_error(
                "groups",
                f"one group for all samples of a class, with groups_per_batch={shares}",
                received,
                "A batch could hold such a class twice. If the groups are cameras or "
                "sessions, `spread=` is what takes them.",
            )
        return sizes

    def _check_usable(self, code: np.ndarray) -> None:
        """ValueError if fewer than P classes are kept.

        Args:
            code: the class of every stratum, including strata that are left out.
        """
        usable = len(self._sizes)
        if self.classes_per_batch <= usable:
            return
        if usable < 2:
            fewest = self.min_class_size
            advice = f"A triplet takes two classes of at least {fewest} samples."
        elif self._left_out[0]:
            advice = "Draw fewer classes per batch, or lower `min_class_size`."
        else:
            advice = "Draw fewer classes per batch."
        expected = (
            f"at most {usable}, the classes with enough samples "
            f"({len(np.unique(code))} have any)"
        )
        raise _checks.value_error(
            "classes_per_batch", expected, self.classes_per_batch, advice
        )

    def _named(self, codes: np.ndarray) -> str:
        names = [repr(label) for label in self.classes_[codes[:10]].tolist()]
        more = f" and {len(codes) - 10} more" if len(codes) > 10 else ""
        return ", ".join(names) + more

    def _schedule_epochs(self, batches_per_epoch: int | None) -> int:
        """Sets up the epoch mode and returns the number of batches in an epoch."""
        p, k = self.classes_per_batch, self.samples_per_class
        shares = self.groups_per_batch
        kept = int(self._sizes.sum())
        key = mix(self.seed, _CLASSES)
        # The samples of each class that an epoch of coverage goes through.
        self._limits = self._sizes
        if self.max_per_class is not None:
            self._limits = np.minimum(self._sizes, self.max_per_class)
        self._spread: Spread | None = None
        if self._cameras is not None:
            at_once = self._limits if self.epoch_mode == "coverage" else k
            at_once = np.minimum(at_once, self._sizes)
            self._spread = Spread(self._cameras, at_once, mix(self.seed, _SPREAD))
        self._mode: epoch_modes.Balanced | epoch_modes.Coverage
        if self.epoch_mode == "balanced":
            self._mode = epoch_modes.Balanced(
                self._group_sizes,
                p,
                batches_per_epoch or -(-kept // (p * k)),
                key,
                shares,
            )
            return self._mode.batches
        seen = self._limits
        needed = -(-seen // k)
        self._mode = epoch_modes.Coverage(self._group_sizes, needed, p, key, shares)
        rows = self._mode.batches * p * k
        if rows > 2 * seen.sum():
            most = self.classes_[self._codes_of_strata[np.argmax(seen)]]
            _checks.warn(
                f"A coverage epoch has {rows} rows for {seen.sum()} samples, more "
                f"than twice as many: the largest class ({most!s}, {seen.max()} "
                f"samples) alone needs {needed.max()} batches. `max_per_class` "
                "shortens the epoch; `epoch_mode='balanced'` does not depend on it."
            )
        return self._mode.batches

    def __len__(self) -> int:
        return self._batches

    @property
    def first_row(self) -> int:
        index, count = self.shard
        return index * (self.classes_per_batch // count) * self.samples_per_class

    def indices(self, epoch: int, step: int) -> np.ndarray:
        """The samples of one batch.

        Args:
            epoch: number of the epoch, from 0.
            step: number of the batch, 0 <= step < len(plan).

        Returns:
            `(rows,)` int64 positions into the labels, rows of a class side by
            side: P * K of them, or P * K / count for a shard.

        Raises:
            IndexError: there is no such step.
        """
        epoch = _checks.integer("epoch", epoch, 0)
        step = _checks.integer("step", step)
        if not 0 <= step < self._batches:
            raise IndexError(
                _checks.message("step", f"an integer in 0..{self._batches - 1}", step)
            )
        # One block of steps is planned at once and serves the calls that come in order.
        # Reading and replacing the tuple as a whole needs no lock: a thread that comes
        # too late for a block plans the same rows again.
        block_epoch, first, rows = self._block
        if block_epoch == epoch and first <= step < first + len(rows):
            return rows[step - first].copy()
        count = 1
        if self._next == (epoch, step):
            per_batch = self.classes_per_batch * self.samples_per_class
            count = min(max(_BLOCK // per_batch, 1), self._batches - step)
        rows = self._rows(epoch, np.arange(step, step + count))
        after = step + count
        self._next = (epoch, after) if after < self._batches else (epoch + 1, 0)
        self._block = epoch, step, rows
        return rows[0].copy()

    def _rows(self, epoch: int, steps: np.ndarray) -> np.ndarray:
        """`(steps, rows)` the batches of several steps."""
        index, count = self.shard
        share = self.classes_per_batch // count
        columns = np.arange(index * share, (index + 1) * share)
        stratum, draw = self._mode.draws(epoch, steps, columns)
        stratum, draw = stratum[..., None], draw[..., None]
        rows = self._order[self._places(epoch, stratum, draw)]
        return rows.reshape(len(steps), -1).astype(np.int64)

    def _places(self, epoch: int, stratum: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """`(..., K)` places in the index of the samples of `(..., 1)` draws."""
        if self._spread is not None:
            return self._spread_places(self._spread, epoch, stratum, draw)
        size = self._limits[stratum]
        item = self._items(epoch, stratum, draw)
        if self.max_per_class is not None:
            # Each epoch takes the next `size` samples of the class from cycles over all
            # of its samples; so far `item` is a position among these `size` samples.
            key = mix(self.seed, _LIMIT, stratum)
            item = permutation.cycle(
                np.full_like(stratum, epoch), item, self._sizes[stratum], size, key
            )
        return self._starts[stratum] + item

    def _items(self, epoch: int, stratum: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """`(..., K)` positions among the samples that the epoch takes of each class."""
        size = self._limits[stratum]
        # Balanced cycles run on over the epochs; coverage begins new cycles in each epoch,
        # so its key holds the epoch.
        cycles_since = epoch if self.epoch_mode == "coverage" else 0
        key = mix(self.seed, _SAMPLES, cycles_since, stratum)
        # A class too small for K rows gives all of its samples as often as they fit. The
        # remaining rows come from cycles, as in a larger class. For K = 5 and 2 samples:
        #
        #     row      0 1 2 3   4
        #     item     0 1 0 1   the next one of the cycles
        #
        k = self.samples_per_class
        cycled = np.where(size >= k, k, k % size)
        row = np.arange(k)
        whole = row < k - cycled
        item = permutation.cycle(
            draw,
            np.where(whole, 0, row - (k - cycled)),
            size,
            np.maximum(cycled, 1),
            key,
        )
        return np.where(whole, row % size, item)

    def _spread_places(
        self, spread: Spread, epoch: int, stratum: np.ndarray, draw: np.ndarray
    ) -> np.ndarray:
        """`_places`, if the rows of a class are spread."""
        k = self.samples_per_class
        row = np.tile(np.arange(k), (*draw.shape[:-1], 1))
        # A class too small for K rows gives all its samples first: its positions are rows.
        small = (self._limits[stratum] < k)[..., 0]
        if small.any():
            row[small] = self._items(epoch, stratum[small], draw[small])
        if self.epoch_mode == "coverage":
            return self._cover(spread, epoch).places(stratum, draw, row)
        return spread.places(stratum, draw, row)

    def _cover(self, spread: Spread, epoch: int) -> Cover:
        """The samples of a spread epoch of coverage; the last epoch's are kept."""
        covered = self._covered
        if covered is None or covered[0] != epoch:
            limits, k = self._limits, self.samples_per_class
            draws, key = -(-limits // k), mix(self.seed, _SPREAD, 1)
            covered = epoch, Cover(epoch, spread, draws, np.minimum(limits, k), key)
            # Replaced as a whole, so no lock is needed (see `_block`).
            self._covered = covered
        return covered[1]

    def substitutes(self, epoch: int, step: int, position: int) -> Iterator[int]:
        """Every sample that could stand at one position of a batch, shuffled.

        Args:
            epoch: number of the epoch, from 0.
            step: number of the batch.
            position: place in the batch, 0 <= position < rows.

        Yields:
            The samples of its class (with `groups` for samples: of its class and
            group), each once, in an order keyed by (seed, epoch, step, position). With
            `spread` the samples with the word of the planned sample come first.
        """
        index, count = self.shard
        column, row = divmod(position, self.samples_per_class)
        column += index * (self.classes_per_batch // count)
        drawn, draw = self._mode.draws(epoch, np.array([step]), np.array([column]))
        stratum = int(drawn.item())
        start, size = int(self._starts[stratum]), int(self._sizes[stratum])
        spans = [(start, size)]
        if self._cameras is not None:
            place = int(self._places(epoch, drawn, draw)[0, row])
            first, alike = self._cameras.span(place)
            after = first + alike
            spans = [
                (first, alike),
                (start, first - start),
                (after, start + size - after),
            ]
        # With the position in the global batch, so that all shards agree. Few substitutes
        # are ever needed, therefore they are shuffled in pieces of 64.
        key = mix(self.seed, _SUBSTITUTES, epoch, step, self.first_row + position)
        for start, size in spans:
            for piece in range(0, size, 64):
                places = np.arange(piece, min(piece + 64, size))
                places = permutation.permute(places, size, key)
                yield from self._order[start + places].tolist()

    def encode(self, labels: Any) -> np.ndarray:
        """The int32 codes of `labels`; ValueError names an unknown label."""
        return self._table.encode(labels)

    def decode(self, codes: Any) -> np.ndarray:
        """The labels of `codes`."""
        return self._table.decode(codes)

    def class_weight(self, weights: Mapping[Any, float]) -> dict[int, float]:
        """Weights by label as weights by code; labels that are left out weigh 1."""
        return self._table.class_weight(weights)

    def report(self) -> SamplingReport:
        """What the plan keeps, leaves out and repeats: a table when printed."""
        draws = self._mode.draws_per_class(0)
        # Epoch 0 begins at the start of a cycle: no sample of a class (with `spread`: of a
        # class and a camera) comes twice before all of them have come once.
        seen = int(np.minimum(self._limits, draws * self.samples_per_class).sum())
        not_spread = None
        if self._spread is not None:
            cameras = self._spread.cameras
            not_spread = int((cameras.counts == 1).sum())
            if self.epoch_mode == "balanced":
                seen = int(np.minimum(self._spread.uses(draws), cameras.sizes).sum())
        rows = len(self) * self.classes_per_batch * self.samples_per_class
        least, most = int(draws.argmin()), int(draws.argmax())
        label = [
            self.classes_[self._codes_of_strata[stratum]] for stratum in (least, most)
        ]
        return SamplingReport(
            classes_kept=len(self._sizes),
            classes_left_out=self._left_out[0],
            samples_kept=int(self._sizes.sum()),
            samples_left_out=self._left_out[1],
            batches_per_epoch=len(self),
            rows_per_epoch=rows,
            samples_seen=seen,
            coverage=seen / int(self._sizes.sum()),
            repeats_per_epoch=rows - seen,
            least_drawn=(label[0], int(draws[least])),
            most_drawn=(label[1], int(draws[most])),
            classes_not_spread=not_spread,
        )


def _checked_shard(shard: Any, classes_per_batch: int) -> tuple[int, int]:
    try:
        index, count = shard
    except (TypeError, ValueError):
        raise _checks.type_error("shard", "(index, count)", shard) from None
    index = _checks.integer("shard", index, 0)
    count = _checks.integer("shard", count, 1)
    if index >= count:
        raise _checks.value_error(
            "shard", f"an index in 0..{count - 1}", (index, count)
        )
    _check_divides("shard", "a count", count, classes_per_batch)
    return index, count


def _checked_shares(shares: Any, groups: Any, classes_per_batch: int) -> int:
    """`groups_per_batch`, if it divides P and there are groups."""
    shares = _checks.integer("groups_per_batch", shares, 1)
    if shares > 1 and groups is None:
        raise _checks.value_error("groups_per_batch", "1 without `groups`", shares)
    _check_divides("groups_per_batch", "a number", shares, classes_per_batch)
    return shares


def _check_divides(name: str, what: str, count: int, classes_per_batch: int) -> None:
    """ValueError if `count` does not divide P; it names the nearest P that works."""
    if classes_per_batch % count:
        nearest = max(round(classes_per_batch / count), 1) * count
        raise _checks.value_error(
            name,
            f"{what} that divides classes_per_batch={classes_per_batch}",
            count,
            f"classes_per_batch={nearest} would do.",
        )


def _group_codes(
    groups: Any, table: _labels.LabelTable
) -> tuple[np.ndarray | None, np.ndarray]:
    """(samples,) codes of the groups, None if there is one group; the groups by code."""
    if groups is None:
        return None, np.empty(0)
    given = _labels.LabelTable(groups, name="groups")
    codes, names = given.codes, given.classes
    if len(codes) == len(table.codes):
        return codes, names
    if len(codes) == len(table.classes):
        return codes[table.codes], names
    raise _checks.value_error(
        "groups",
        f"one group for each of {len(table.codes)} samples or of "
        f"{len(table.classes)} classes",
        _checks.Told(f"{len(codes)} groups"),
    )


def _word_codes(spread: Any, samples: int) -> np.ndarray:
    """(samples,) codes of the words of `spread`."""
    table = _labels.LabelTable(spread, name="spread")
    if len(table.codes) != samples:
        expected = f"one word for each of {samples} samples"
        received = _checks.Told(f"{len(table.codes)} words")
        raise _checks.value_error("spread", expected, received)
    if len(table.classes) == samples:
        _checks.warn(
            "Every sample has a word of its own in `spread`, so there is nothing to "
            "spread. Give words that samples share: cameras, sessions, typefaces."
        )
    return table.codes


def _paired(groups: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """(samples,) numbers of the strata: pairs (group, class) that occur, in this order."""
    pairs = groups.astype(np.int64) * (int(codes.max()) + 1) + codes
    return np.unique(pairs, return_inverse=True)[1]
