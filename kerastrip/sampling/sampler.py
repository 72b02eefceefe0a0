"""PKSampler: plan + source + augmentation -> batches for `Model.fit`."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import operator
import os
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from kerastrip import _checks
from kerastrip.sampling import batch_parts
from kerastrip.sampling.look_ahead import Ending, LookAhead, in_flight, in_thread
from kerastrip.sampling.plan import PKPlan
from kerastrip.sampling.workers import WorkerPool
from kerastrip.sources import as_source

__all__ = [
    "PKSampler",
]


class PKSampler(keras.utils.PyDataset):
    """Batches of P classes with K samples each, as a Keras dataset.

    A batch is a pure function of (seed, epoch, step): any order of calls, in any
    thread or process, gives the same answer, augmentation included. Rows of one
    class lie side by side.

    Args:
        x: the samples: an array, `np.memmap`, anything with `__len__` and
            `__getitem__` whose samples are the inputs alone, a source of
            `kerastrip.sources`, or a dict or tuple of these (several model inputs). The
            samples are not copied.
        y: (samples,) integer or text labels, or (samples, classes) one-hot rows.
            Default None: the labels of the source. The labels are copied.
        classes_per_batch: P >= 1, distinct classes in a batch.
        samples_per_class: K >= 1, samples of each class in a batch.
        targets: what the model gets as y. "label": (rows,) int32 codes, positions in
            `classes_`. "one_hot": (rows, classes) float32 over all of `classes_`. An
            array with one row per sample: the rows of the samples in the batch. A tuple
            of such entries in the order of the model's outputs, or a dict by output name.
        classes: the label table, if it shall not be made of `y`: pass the training
            sampler's `classes_` for validation, so that the codes agree.
        epoch_mode: "balanced": classes are drawn equally often. "coverage": every
            kept sample is drawn at least once in an epoch.
        batches_per_epoch: length of an epoch ("balanced" only).
        small_classes: what to do with classes of fewer than K samples: "repeat" their
            samples in a batch, "drop" the classes, or "error".
        min_class_size: classes with fewer samples are left out. Default 2.
        max_per_class: the most samples that an epoch takes from a class ("coverage"
            only); the next epoch takes other samples.
        groups: one group per sample or class (category, alphabet, site); all classes of
            a batch are of one group, or of `groups_per_batch` groups.
        groups_per_batch: C, groups in a batch; P / C classes come from each. Default 1.
        spread: one word per sample (camera, session, typeface): the K rows of a class
            come from as many different cameras as the class has. `sampler.spread` keeps the
            words, for `RetrievalEvaluation(groups=)` among others. Default None.
        sample_weight: (samples,) weights for all outputs, or a tuple of one array per
            output; for a model whose outputs are a dict a dict by output name. Use
            ones for an output without weights.
        augment: `Augmentation`, albumentations pipeline or callable (image, rng) ->
            image; for dict or tuple inputs a dict or tuple of augmentations by input, or
            for a dict one pipeline that transforms all entries (image, mask, ...) alike. The
            key of an image is (seed, epoch, step, position in the global batch), so
            inputs whose `Augmentation`s have one seed draw the same numbers.
        fixed: True for validation: always the batches of epoch 0.
        replicas: devices that share a batch in contiguous parts (on this host). P
            must be divisible, so that no class is cut.
        shard: (index, count) of this host; it gets P / count classes of each batch.
            A sampler with a shard raises an error if steps come out of order: pass
            `shuffle=False` to `fit`.
        seed: integer of 64 bits. Default 0.
        workers: threads that prepare batches ahead, or processes with
            `use_multiprocessing=True`. Default 2 on TensorFlow, 1 on JAX and
            PyTorch. 0: batches are made when they are asked for.
        use_multiprocessing: True: a pool of processes, forked here (spawned on macOS
            and Windows), prepares the inputs. Worth it where augmentation or decoding
            is slow. Sources and augmentations must not call TensorFlow, JAX or PyTorch
            there. Processes without work end when another sampler starts its processes,
            and are forked again for the next batch. Call `close()` to stop the processes
            before the program ends: Keras keeps a reference to a sampler after `fit`, so
            that Python never frees it.
        max_queue_size: the most batches that are made ahead. Default 10.

    Raises:
        ValueError, TypeError: an argument does not work; the message says what would.

    Corner cases:
        * Classes smaller than `min_class_size` are left out, classes smaller than K
          repeat samples inside a batch; one warning names these classes and `report()`
          counts them. Repeated samples have different augmentations.
        * P larger than the number of classes left is an error: every batch holds P
          *distinct* classes.
        * P need not divide the number of classes, nor K a class: no batch is short;
          counts even out over the epochs.
        * `classes_` also holds the classes that were left out, and `one_hot` has a column
          for each of `classes_`.
        * Epochs: `EpochSync(sampler)` among the callbacks sets the number that `fit`
          passes, which makes `initial_epoch` and `BackupAndRestore` exact. Without
          it the sampler counts its epochs itself.
        * `sampler.asked` counts the calls of `sampler[step]`, so that `EpochSync` can
          tell whether its sampler is the one that trains.
        * `fit` permutes the steps unless it is given `shuffle=False`; the content of
          a step stays the same. Leave `steps_per_epoch` alone: `len()` is the epoch.
        * `sampler[step]` is a batch of the current epoch, `sampler.batch(step, epoch)` a
          batch of any epoch.
        * `fit(class_weight=)` counts codes, not labels: `class_weight` translates.
        * Images that cannot be read are an error, unless their source has
          `on_error="skip"`: then another sample of the class takes the place, with its
          target and weight; `broken` names the images.
        * Threads read arrays, memory maps and the sources of `kerastrip.sources` side by
          side. Threads take turns where a file may stay open: in data sets, h5py files
          and sources of your own. An attribute `thread_safe = True` of the data set says
          that threads need not. Forked workers open such files anew and read in parallel.
        * Texts are inputs for a model that begins with `TextVectorization`, on
          TensorFlow only.

    Example:
        >>> import numpy as np
        >>> images = np.zeros((12, 8, 8, 1), "uint8")
        >>> labels = np.repeat(["cat", "dog", "emu"], 4)
        >>> train = PKSampler(images, labels, classes_per_batch=2, samples_per_class=3,
        ...                   targets=("one_hot", "label"))
        >>> x, (one_hot, label) = train[0]
        >>> x.shape, one_hot.shape, label.shape, len(train)
        ((6, 8, 8, 1), (6, 3), (6,), 2)
        >>> bool((train.decode(label[:3]) == train.decode(label[0])).all())
        True
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        *,
        classes_per_batch: int,
        samples_per_class: int,
        targets: Any = "label",
        classes: Any = None,
        epoch_mode: str = "balanced",
        batches_per_epoch: int | None = None,
        small_classes: str = "repeat",
        min_class_size: int = 2,
        max_per_class: int | None = None,
        groups: Any = None,
        groups_per_batch: int = 1,
        spread: Any = None,
        sample_weight: Any = None,
        augment: Any = None,
        fixed: bool = False,
        replicas: int = 1,
        shard: tuple[int, int] = (0, 1),
        seed: int = 0,
        workers: int | None = None,
        use_multiprocessing: bool = False,
        max_queue_size: int = 10,
    ):
        self.source = as_source(x)
        self.plan = PKPlan(
            _labels_of(self.source) if y is None else y,
            classes_per_batch=classes_per_batch,
            samples_per_class=samples_per_class,
            classes=classes,
            epoch_mode=epoch_mode,
            batches_per_epoch=batches_per_epoch,
            small_classes=small_classes,
            min_class_size=min_class_size,
            max_per_class=max_per_class,
            groups=groups,
            groups_per_batch=groups_per_batch,
            spread=spread,
            shard=shard,
            seed=_checks.integer64("seed", seed),
        )
        self.labels = self.plan.codes
        self.spread = None if spread is None else np.asarray(spread)
        self.classes_ = self.plan.classes_
        if len(self.source) != len(self.labels):
            expected = f"{len(self.labels)} samples, as many as labels"
            received = _checks.Told(f"{len(self.source)} samples")
            advice = "Several inputs go in as a tuple or a dict, not as a list."
            advice = advice if isinstance(x, list) else ""
            raise _checks.value_error("x", expected, received, advice)
        self._threads, self._processes = _employees(
            workers, use_multiprocessing, max_queue_size
        )
        # Keras gets no workers: its processes repeat random numbers and hang when one of
        # them dies, and its threads outlive a `fit` that was stopped.
        super().__init__(workers=0)
        self.fixed = _checks.boolean("fixed", fixed)
        self.check_replicas(replicas)
        self._targets = batch_parts.targets(targets, self.plan)
        self._weights = batch_parts.weights(sample_weight, targets, len(self.labels))
        self.asked = 0
        self._epoch, self._due, self._begun, self._closed = 0, 0, False, False
        self._rows = batch_parts.ReadableRows(self.plan)
        self._inputs = batch_parts.Inputs(self.source, augment, self.plan, self._rows)
        if self._processes:
            self._inputs.check_fixed_size()
        self._employ(start=True)

    def _employ(self, *, start: bool) -> None:
        """Gives the sampler threads, or processes that start now or when needed."""
        self._pool: WorkerPool | None = None
        if self._processes and not self._closed:
            inputs = self._inputs
            self._pool = WorkerPool(
                inputs.arrays, inputs.layout, self._processes, start=start
            )
            # Not at exit: the finalizer would stop a batch that a thread waits for. (`_leave`
            # of `workers` ends the processes in the right order.)
            weakref.finalize(self, self._pool.close).atexit = False
        self._ahead: LookAhead | None = None
        if self._threads and not self._closed:
            ahead = self._threads
            self._ahead = LookAhead(len(self), ahead, endless=not self.fixed)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None, "_ahead": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._employ(start=False)

    def __deepcopy__(self, memo: Any) -> PKSampler:
        # Tuners copy callbacks, and the samplers in them, for every trial. The samples do
        # not change, and two copies may not fit into memory: so the copy shares them, and
        # has only an epoch and workers of its own.
        return copy.copy(self)

    # -- batches -------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> tuple:
        epoch = self._epoch  # once: another thread may set it meanwhile
        self.asked += 1
        step = operator.index(step)
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of an epoch of {len(self)} batches")
        if self.plan.shard[1] > 1:
            if step not in (0, self._due):
                raise RuntimeError(
                    f"Step {step} was asked for when step {self._due} was due. Every "
                    "host must go through the steps of a sampler with a shard in "
                    "order: pass `shuffle=False` to `fit`. (`sampler.batch(step)` "
                    "gives any batch.)"
                )
            self._due = step + 1
        begun = None if self._ahead is None else self._ahead(self._begin, step, epoch)
        if self._pool is None and begun is not None:
            return begun.result()
        return self._made(step, epoch, begun)

    def _begin(self, step: int, epoch: int) -> Any:
        """Begins a batch.

        Returns:
            With threads the future of the batch. With processes (rows, function that
            waits for the inputs of the rows), or None if the batch cannot be begun now.
        """
        if self._pool is None:
            return in_thread(self._made, step, epoch)
        try:
            rows = self._rows.planned(epoch, step)
        except ValueError:
            return None  # the error is raised when the batch is needed
        finish = self._pool.begin(rows, epoch, step)
        return None if finish is None else (rows, finish)

    @property
    def num_batches(self) -> int:
        """The number of batches in an epoch; Keras reads it before each epoch."""
        if self._ahead is not None:
            self._ahead.expect_shuffle()
        return len(self)

    def batch(self, step: int, epoch: int | None = None) -> tuple:
        """The batch of any step and epoch.

        Args:
            step: 0 <= step < len(self).
            epoch: at least 0. Default: the current one.

        Returns:
            (x, y) or (x, y, sample_weight), fresh arrays.
        """
        return self._made(step, self._epoch if epoch is None else epoch)

    def _made(self, step: int, epoch: int, begun: Any = None) -> tuple:
        """Makes a batch.

        Args:
            step, epoch: of the batch.
            begun: what `_begin` returned, if processes have begun the batch. Default None.
        """
        if self._closed:
            raise RuntimeError("This sampler was closed: no more batches.")
        with in_flight.call():
            try:
                make = self._inputs.arrays if self._pool is None else self._pool
                rows, arrays = self._rows.read(make, epoch, step, begun)
                x = self._inputs.packed(arrays)
                y = batch_parts.gather(self._targets, rows)
            except SystemExit as error:
                # Keras' threads would swallow a SystemExit and wait for the batch for ever.
                raise RuntimeError(
                    f"Something called sys.exit({error.code!r}) while preparing step "
                    f"{step} of epoch {epoch}."
                ) from error
        if self._weights is None:
            return x, y
        return x, y, batch_parts.gather(self._weights, rows)

    def as_dataset(self, initial_epoch: int | None = None) -> Any:
        """The same batches as a `tf.data.Dataset`: one epoch each time it is read.

            model.fit(sampler.as_dataset(), epochs=5, callbacks=[EpochSync(sampler)])

        Each reading gives the batches of the epoch that the sampler is at, in order,
        and moves the sampler to the next epoch when it takes the last batch. So
        `set_epoch` and `EpochSync` choose the epoch of the next reading; with
        `fixed=True` it is always epoch 0. tf.data takes some batches ahead: without
        `EpochSync`, a reading that is broken off near its end counts as an epoch.

        Args:
            initial_epoch: sets the epoch of the sampler first. Default: as it is.

        Returns:
            A dataset of `len(sampler)` elements whose shapes are fully known.
        """
        import tensorflow as tf

        if initial_epoch is not None:
            self.set_epoch(initial_epoch)
        example = self.batch(0)
        specs = keras.tree.flatten(example)

        def keys() -> Iterator[tuple[int, int]]:
            epoch, last = self._epoch, len(self) - 1
            for step in range(len(self)):
                # Here and not after the loop: nobody asks for a batch behind the last one.
                if step == last and self._epoch == epoch and not self.fixed:
                    self._epoch = epoch + 1
                yield epoch, step

        def make(epoch: np.ndarray, step: np.ndarray) -> list[np.ndarray]:
            self.asked += 1
            try:
                return keras.tree.flatten(self.batch(int(step), int(epoch)))
            except Ending:
                # TensorFlow logs a traceback of every other error.
                raise StopIteration from None

        def load(epoch: Any, step: Any) -> Any:
            dtypes = [spec.dtype for spec in specs]
            tensors = tf.numpy_function(make, [epoch, step], dtypes)
            for tensor, spec in zip(tensors, specs, strict=True):
                tensor.set_shape(spec.shape)
            return keras.tree.pack_sequence_as(example, tensors)

        threads = max(self._threads, 1)
        key = tf.TensorSpec((), tf.int64)
        return (
            tf.data.Dataset.from_generator(keys, output_signature=(key, key))
            .apply(tf.data.experimental.assert_cardinality(len(self)))
            .map(load, num_parallel_calls=threads, deterministic=True)
            .prefetch(threads)
        )

    def plot_batch(
        self,
        step: int,
        epoch: int | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> Any:
        """Draws the images of one batch, a row for each class (needs matplotlib).

        Args:
            step: 0 <= step < len(self).
            epoch: default: the current one.
            path: where to write the figure; nothing is written by default.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ValueError: if no input of the model is made of images.
        """
        from kerastrip.plotting import plot_batch

        epoch = self._epoch if epoch is None else epoch
        arrays = keras.tree.flatten(self.batch(step, epoch)[0])
        images = [array for array in arrays if array.ndim in (3, 4)]
        if not images:
            expected = "an input of images, (rows, height, width[, channels])"
            received = _checks.Told(f"shapes {[array.shape for array in arrays]}")
            raise _checks.value_error("x", expected, received)
        codes = self.labels[self.plan.indices(epoch, step)]
        names = self.decode(codes[:: self.plan.samples_per_class])
        return plot_batch(
            images[0], codes, names=[str(name) for name in names], path=path
        )

    # -- epochs --------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The epoch whose batches `sampler[step]` gives."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Makes `sampler[step]` give the batches of `epoch`.

        Args:
            epoch: at least 0; only 0 for a sampler with `fixed=True`.
        """
        epoch = _checks.integer("epoch", epoch, minimum=0)
        if self.fixed and epoch != 0:
            expected = "0, as the sampler has `fixed=True`"
            raise _checks.value_error("epoch", expected, epoch)
        self._epoch = epoch

    # Keras calls on_epoch_end before the first epoch, and twice round a validation. So
    # only an epoch that was begun counts. To build a model on JAX, PyTorch or several
    # replicas, Keras even begins an epoch, takes a batch and starts over:
    #
    #     on_epoch_begin  batch                  EpochIterator.reset -> on_epoch_end
    #     on_epoch_begin  batch  batch  batch                           on_epoch_end
    #
    # An epoch may have one batch, so only the caller of on_epoch_end (`reset` or not)
    # tells the two apart.
    def on_epoch_begin(self) -> None:
        self._begun = True

    def on_epoch_end(self) -> None:
        frame = inspect.currentframe()
        for _ in range(2):  # to the adapter, to what calls it
            frame = frame.f_back if frame else None
        starts_over = frame is not None and frame.f_code.co_name == "reset"
        if self._begun and not starts_over and not self.fixed:
            self._epoch += 1
        self._begun = False

    # -- what is in it -------------------------------------------------------

    def encode(self, labels: Any) -> np.ndarray:
        """Labels as int32 codes, positions in `classes_`."""
        return self.plan.encode(labels)

    def decode(self, codes: Any) -> np.ndarray:
        """Codes as the labels that were passed in."""
        return self.plan.decode(codes)

    def class_weight(self, weights: Mapping[Any, float]) -> dict[int, float]:
        """Weights by label as Keras wants them, by code: for `fit(class_weight=)`.

            model.fit(train, class_weight=train.class_weight({"rare": 5.0}))

        The targets of a batch are codes, so Keras would take `{1: 5.0}` for the second
        label. Keras takes class weights for models with one output only; for more
        outputs give `sample_weight` to the sampler.

        Args:
            weights: label -> weight, >= 0. Labels that are left out weigh 1.

        Raises:
            TypeError, ValueError: a label is not in `classes_`, or a weight is no finite
                number >= 0.
        """
        if isinstance(self._targets, (tuple, Mapping)) and len(self._targets) > 1:
            advice = "Give the sampler `sample_weight`, one array for each output."
            expected = "a sampler with targets for one output, as Keras weighs one only"
            received = _checks.Told(f"targets for {len(self._targets)} outputs")
            raise _checks.value_error("class_weight", expected, received, advice)
        return self.plan.class_weight(weights)

    def report(self) -> Any:
        """What is kept, left out, repeated and broken: a `SamplingReport`."""
        report = self.plan.report()
        return dataclasses.replace(report, samples_broken=len(self._rows.broken))

    @property
    def broken(self) -> dict[int, str]:
        """Sample -> what is wrong with it, for all samples skipped so far."""
        return dict(self._rows.broken)

    def check_replicas(self, replicas: int) -> None:
        """Raises ValueError if `replicas` parts of a batch would cut a class.

        Args:
            replicas: devices of this host that share a batch, at least 1.
        """
        replicas = _checks.integer("replicas", replicas, minimum=1)
        classes, hosts = self.plan.classes_per_batch, self.plan.shard[1]
        if classes % (replicas * hosts):
            near = max(round(classes / (replicas * hosts)), 1) * replicas * hosts
            host = f" on each of {hosts} hosts" if hosts > 1 else ""
            expected = (
                f"a multiple of the {replicas} replicas{host}, so that every replica "
                "gets whole classes"
            )
            advice = f"The nearest that works is classes_per_batch={near}."
            name = "classes_per_batch"
            raise _checks.value_error(name, expected, classes, advice)

    def close(self) -> None:
        """Ends the worker processes; the sampler gives no more batches."""
        self._closed, self._ahead = True, None
        if self._pool is not None:
            self._pool.close()

    def __repr__(self) -> str:
        plan = self.plan
        shard = f", shard={plan.shard}" if plan.shard[1] > 1 else ""
        return (
            f"PKSampler({plan.classes_per_batch} classes x {plan.samples_per_class} "
            f"samples, {len(self)} batches per epoch, {len(self.labels)} samples in "
            f"{len(self.classes_)} classes, epoch={self.epoch}{shard})"
        )


def _labels_of(source: Any) -> Any:
    """The `labels` of a source; ValueError if it has none."""
    labels = getattr(source, "labels", None)
    if labels is None:
        expected, advice = "labels, as `x` has none of its own", "Pass PKSampler(x, y)."
        raise _checks.value_error("y", expected, None, advice)
    return labels


def _employees(
    workers: int | None, use_multiprocessing: bool, max_queue_size: int
) -> tuple[int, int]:
    """The arguments checked: (batches made ahead, processes or 0)."""
    processes = _checks.boolean("use_multiprocessing", use_multiprocessing)
    if workers is None:
        workers = 2 if keras.backend.backend() == "tensorflow" else 1
    workers = _checks.integer("workers", workers, minimum=int(processes))
    ahead = _checks.integer("max_queue_size", max_queue_size, minimum=1)
    # One batch more than there are processes, so that no process waits for its next task.
    return min(ahead, workers + processes), workers if processes else 0
