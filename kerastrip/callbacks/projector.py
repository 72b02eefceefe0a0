"""EmbeddingProjector: embeddings for the projector of TensorBoard."""

from __future__ import annotations

import io
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from kerastrip import _checks
from kerastrip._files import write_whole
from kerastrip.callbacks._copies import without_model
from kerastrip.callbacks._evaluation import HeldOut
from kerastrip.plotting.thumbnails import Thumbnails, png, thumbnails_of

__all__ = [
    "EmbeddingProjector",
]

# The projector reads so many points, and a sprite of so many pixels a side.
_MOST_POINTS = 100_000
_SPRITE = 8192
_THUMBNAIL = 64


class EmbeddingProjector(keras.callbacks.Callback):
    """Write embeddings for the projector of TensorBoard.

    At the end of the training, and every few epochs if `every` is given, every sample is
    embedded once, and these files are replaced, each file in one step:

    | file | |
    |---|---|
    | `tensors.tsv` | the embeddings, a line for each sample |
    | `metadata.tsv` | labels and further columns, if there are any |
    | `sprite.png` | thumbnails of up to 64 pixels a side if there are images, smaller if they would not fit into 8192 x 8192 |
    | `projector_config.pbtxt` | which of these files belong to the embeddings |

    `tensorboard --logdir DIRECTORY` shows the embeddings under "Projector". TensorBoard is
    not needed to write the files. If they cannot be written there is a warning, and the
    training goes on. A copy (`copy.deepcopy`, as tuners make it) shares the data. List
    this callback after callbacks that restore better weights at the end
    (`EarlyStopping`).

    Args:
        directory: the folder to write into; made if missing.
        x: the data to embed, at most 100,000 samples, as for `RetrievalEvaluation`.
        y: labels, as for `RetrievalEvaluation`. Default None: without labels if x has
            none.
        images: an image for each sample, as an array `(n, height, width)` or
            `(n, height, width, 1 or 3)`, or a source of such images; integers in 0..255, or
            floats, drawn between their least and greatest value when they leave 0..1.
            Default None: x itself, if it holds images.
        metadata: further columns: name -> (n,) values.
        every: epochs from one writing to the next, at least 1. Default None: at the
            end only.
        output: name or position of the embedding among the outputs of the model.
            None takes the output whose loss has a `distance`, or the only output.
        batch_size: rows per call of the model. Default 128.

    Raises:
        TypeError, ValueError: if the arguments do not fit each other.

    Example:

    >>> import keras, numpy as np, os, tempfile
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> model.compile("sgd", "mse")
    >>> folder = tempfile.mkdtemp()
    >>> history = model.fit(np.eye(3), np.zeros((3, 2)), verbose=0,
    ...                     callbacks=[EmbeddingProjector(folder, np.eye(3), [5, 6, 5])])
    >>> sorted(os.listdir(folder))
    ['metadata.tsv', 'projector_config.pbtxt', 'tensors.tsv']
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        x: Any,
        y: Any = None,
        *,
        images: Any = None,
        metadata: Mapping[str, Any] | None = None,
        every: int | None = None,
        output: int | str | None = None,
        batch_size: int = 128,
    ):
        super().__init__()
        self._directory = pathlib.Path(directory)
        self._data = HeldOut(x, y, labelled=False)
        self._thumbnails = thumbnails_of(x, images)
        self._columns = {
            name: np.asarray(values) for name, values in (metadata or {}).items()
        }
        self._every = None if every is None else _checks.integer("every", every, 1)
        self._output = output
        self._batch_size = _checks.integer("batch_size", batch_size, 1)
        if self._data.length is not None:
            self._check_length(self._data.length)
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return without_model(self)

    def on_train_begin(self, logs: Any = None) -> None:
        self._warned = False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._every is not None and (epoch + 1) % self._every == 0:
            self._write()

    def on_train_end(self, logs: Any = None) -> None:
        self._write()

    def _check_length(self, length: int) -> None:
        """An error for too many samples, or metadata of another length."""
        if length > _MOST_POINTS:
            raise _checks.value_error(
                "x",
                f"at most {_MOST_POINTS} samples, as many as TensorBoard shows",
                _checks.Told(f"{length}"),
            )
        for name, values in self._columns.items():
            if values.shape != (length,):
                raise _checks.value_error(
                    "metadata", f"{length} values of {name!r}", values
                )

    def _write(self) -> None:
        """Embeds the samples and replaces the files; warns once if that fails."""
        embeddings, labels = self._data.embed(
            self.model,
            output=self._output,
            batch_size=self._batch_size,
            verbose=(self.params or {}).get("verbose") == 1,
        )
        self._check_length(len(embeddings))
        lines = io.StringIO()
        np.savetxt(lines, embeddings, fmt="%.6g", delimiter="\t")
        config = ['tensor_name: "embedding"', 'tensor_path: "tensors.tsv"']
        # All files are made before the first is replaced: an error leaves the old ones.
        files: dict[str, str | bytes] = {"tensors.tsv": lines.getvalue()}
        columns = self._columns if labels is None else {"label": labels} | self._columns
        if columns:
            config.append('metadata_path: "metadata.tsv"')
            files["metadata.tsv"] = _table(columns)
        if self._thumbnails is not None:
            sprite, height, width = _sprite(self._thumbnails, len(embeddings))
            files["sprite.png"] = png(sprite)
            config += [
                'sprite { image_path: "sprite.png"',
                f"  single_image_dim: {width} single_image_dim: {height} }}",
            ]
        files["projector_config.pbtxt"] = (
            "\n  ".join(["embeddings {", *config]) + "\n}\n"
        )
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                write_whole(self._directory / name, content)
        except OSError as error:
            if not self._warned:
                _checks.warn(
                    f"EmbeddingProjector cannot write into {self._directory} "
                    f"({error.strerror or error}). The training goes on."
                )
            self._warned = True


def _table(columns: Mapping[str, Any]) -> str:
    """Tab-separated lines; a head with the names of the columns if there are several."""
    head = [list(columns)] if len(columns) > 1 else []
    lines = [*head, *zip(*columns.values(), strict=True)]
    return "".join("\t".join(map(_cell, line)) + "\n" for line in lines)


def _cell(value: Any) -> str:
    """A value as one line of text without tabs, "-" if the text would be empty."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return " ".join(text.split()) or "-"


def _sprite(thumbnails: Thumbnails, count: int) -> tuple[np.ndarray, int, int]:
    """A square grid of all thumbnails, row by row, and the height and width of a thumbnail."""
    side = math.isqrt(count - 1) + 1  # the least square with `count` cells
    size = min(_THUMBNAIL, _SPRITE // side)
    height, width, *channels = thumbnails.take([0], size)[0].shape
    sprite = np.full((side * height, side * width, *channels), 255, np.uint8)
    # A view of the sprite: [row of the grid, y, column of the grid, x].
    cells = sprite.reshape(side, height, side, width, *channels)
    # One row of the grid at a time, because the images may not fit into the memory.
    for first in range(0, count, side):
        row = np.arange(first, min(first + side, count))
        for column, thumbnail in enumerate(thumbnails.take(row, size)):
            cells[first // side, :, column] = thumbnail
    return sprite, height, width
