"""EmbeddingMemory: embeddings of past batches, for the losses to mine in."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kerastrip import _checks
from kerastrip.mining import Others


@keras.saving.register_keras_serializable(package="kerastrip")
class EmbeddingMemory(keras.layers.Layer):
    """Remembers the last embeddings of the training, and returns its input as it is.

    Put it on the embedding output and hand the layer to the loss as well:

        memory = EmbeddingMemory(4096)
        model = keras.Model(inputs, memory(embedding))
        model.compile(optimizer, TripletLoss(memory=memory))

    In every training step the loss mines each row of the batch against the batch and
    against the rows remembered, then the batch takes the place of the oldest rows.
    Evaluation and prediction neither read nor write. Remembered rows are constants:
    they get no gradient, and in a triplet with one of them the anchor alone does (else
    the batch would be pulled together by negatives that cannot give way). They are as
    old as `size` / batch steps at most, so the embedding must not drift much in that
    time (a small learning rate, a `warmup`).
    `MiningStats` counts triplets with remembered rows like all others, and reports
    their share as `from_memory`.

    The memory is made of weights that are not trained: it is saved and restored with
    those of the model, by `BackupAndRestore` too. Under a `tf.distribute` strategy
    give the loss `gather=True`: then all replicas remember the whole batches.

    Labels are kept as int32. One loss writes to one memory.

    Args:
        size: rows to remember, those of the batch at hand included: choose a multiple
            of the batch size. Takes size * (dim + 1) * 4 bytes.
        warmup: training batches before the memory is read. Default 0.
        positives: whether remembered rows of the anchor's label are positives. False
            (default) leaves them out.
        **options: of `keras.layers.Layer`, `name` for one.

    Raises:
        ValueError, TypeError: for arguments out of range; when built, for an input
            that is not (batch, dim).

    Example:

    >>> import numpy as np
    >>> from kerastrip import TripletLoss
    >>> memory = EmbeddingMemory(8)
    >>> loss = TripletLoss(mining="hard", memory=memory)
    >>> for labels in ([0, 0], [1, 1]):
    ...     value = loss(labels, memory(np.eye(2, dtype="float32"), training=True))
    >>> float(value)  # to the positive sqrt(2), to the remembered negative 0
    1.614...
    >>> int(memory.filled)
    4

    References:
        Wang, Zhang, Huang, Scott, "Cross-Batch Memory for Embedding Learning", 2020,
        section 3.2.
    """

    def __init__(
        self, size: int, *, warmup: int = 0, positives: bool = False, **options: Any
    ) -> None:
        # The input comes out as it is, whatever the policy computes in.
        super().__init__(**{"autocast": False, **options})
        self.size = _checks.integer("size", size, minimum=1)
        self.warmup = _checks.integer("warmup", warmup, minimum=0)
        self.positives = _checks.boolean("positives", positives)

    def build(self, input_shape: Any) -> None:
        """Makes the weights for an input (batch, dim)."""
        if len(input_shape) != 2 or input_shape[-1] is None:
            raise ValueError(
                _checks.message(
                    "inputs",
                    "embeddings of shape (batch, dim)",
                    _checks.Told(f"shape {tuple(input_shape)}"),
                )
            )
        self.embeddings = self._weight("embeddings", (self.size, input_shape[-1]))
        self.labels = self._weight("labels", (self.size,), "int32")
        self.filled = self._weight("filled", (), "int32")
        self.batches = self._weight("batches", (), "int32")
        self.in_training = self._weight("in_training", (), "int32")

    def _weight(self, name: str, shape: tuple, dtype: str = "float32") -> Any:
        return self.add_weight(
            name=name,
            shape=shape,
            dtype=dtype,
            initializer="zeros",
            trainable=False,
            autocast=False,
            # All replicas write the same.
            aggregation="only_first_replica",
        )

    def call(self, inputs: Any, training: bool = False) -> Any:
        """`inputs`; notes whether a training step runs."""
        self.in_training.assign(ops.cast(bool(training), "int32"))
        return inputs

    def others(self, batch: Any) -> Others:
        """The rows to mine in beside the newest `batch` rows; none if not training.

        Args:
            batch: rows of the step at hand, which `add` has put first.
        """
        read = ops.logical_and(self._records(), self.batches.value > self.warmup)
        size = ops.where(read, ops.maximum(self.filled.value - batch, 0), 0)
        labels, rows = self.labels.value[batch:], self.embeddings.value[batch:]
        return Others(labels, rows, size, self.positives)

    def add(self, labels: Any, embeddings: Any) -> None:
        """In training, puts a batch first and drops the oldest rows."""
        batch = ops.shape(embeddings)[0]

        def put_first(weight: Any, rows: Any) -> Any:
            rows = ops.stop_gradient(ops.convert_to_tensor(rows, weight.dtype))
            return ops.concatenate([rows, weight.value])[: self.size]

        filled = ops.minimum(self.filled.value + batch, self.size)
        batches = ops.minimum(self.batches.value + 1, self.warmup + 1)
        for weight, value in (
            (self.labels, put_first(self.labels, labels)),
            (self.embeddings, put_first(self.embeddings, embeddings)),
            (self.filled, filled),
            (self.batches, batches),
        ):
            weight.assign(ops.where(self._records(), value, weight.value))

    def _records(self) -> Any:
        return self.in_training.value > 0

    def compute_output_shape(self, input_shape: Any) -> Any:
        """The shape of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Everything the constructor takes."""
        return {
            **super().get_config(),
            "size": self.size,
            "warmup": self.warmup,
            "positives": self.positives,
        }
