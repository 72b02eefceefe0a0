"""Figures of a training: what the mining does, where the embeddings lie.

Every function draws on a given matplotlib axes or on a new figure, writes the
figure to `path` when one is given, and returns the `matplotlib.figure.Figure`.
matplotlib (`pip install kerastrip[plot]`) is imported when a figure is drawn,
and its global state (`pyplot`) is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kerastrip import _checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FRACTIONS = ("easy", "semi_hard", "hard")
COLOURS = {"easy": "#c9d3dc", "semi_hard": "#f2a541", "hard": "#c8413b"}


def plot_mining(
    history: Mapping[str, Sequence[float]],
    *,
    prefix: str = "",
    ax: Axes | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the fractions of easy, semi-hard and hard triplets over the epochs.

    The three fractions are stacked (they sum to 1); the loss is a line on an
    axis of its own.

    Args:
        history: one sequence per key, as in `History.history`: `easy`,
            `semi_hard`, `hard` and, when present, `loss`, each with one value
            per epoch.
        prefix: put before every key: `"val_"` draws the validation.
        ax: the axes to draw on; a new figure by default.
        path: where to write the figure; nothing is written by default.

    Returns:
        The figure.

    Raises:
        ValueError: a fraction is missing from `history`.

    Example:

    >>> figure = plot_mining(
    ...     {"easy": [0.2, 0.7], "semi_hard": [0.5, 0.2], "hard": [0.3, 0.1]}
    ... )
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['hard', 'semi-hard', 'easy']
    """
    keys = [prefix + key for key in FRACTIONS]
    missing = [key for key in keys if key not in history]
    if missing:
        raise ValueError(
            _checks.message(
                "history",
                f"the keys {', '.join(keys)}",
                _checks.Told(f"{', '.join(sorted(history)) or 'no keys'}"),
                "Train with `kerastrip.MiningStats()` among the callbacks.",
            )
        )
    figure, ax = _figure(ax, (7.0, 3.6))
    epochs = np.arange(1, len(history[keys[0]]) + 1)
    # Hard at the bottom: what training should drive to zero grows from zero.
    order = FRACTIONS[::-1]
    ax.stackplot(
        epochs,
        [np.asarray(history[prefix + key], float) for key in order],
        colors=[COLOURS[key] for key in order],
        labels=[key.replace("_", "-") for key in order],
    )
    ax.set(xlabel="epoch", ylabel="fraction of triplets", ylim=(0, 1))
    ax.set_xlim(epochs[0], max(epochs[-1], epochs[0] + 1))
    ax.locator_params(axis="x", integer=True)
    if prefix + "loss" in history:
        losses = ax.twinx()
        losses.plot(epochs, history[prefix + "loss"], color="#222222", linewidth=1.5)
        losses.set_ylabel("loss")
        losses.set_ylim(bottom=0)
    ax.legend(loc="upper right", framealpha=0.9)
    return _written(figure, path)


def plot_embeddings(
    embeddings: Any,
    labels: Any,
    *,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw embeddings in the plane of their first two principal components.

    Args:
        embeddings: `(samples, dim)` numbers, dim >= 2.
        labels: `(samples,)` labels; one colour for each distinct label.
        names: what the legend calls the distinct labels, in sorted order of
            the labels; the labels themselves by default.
        ax: the axes to draw on; a new figure by default.
        path: where to write the figure; nothing is written by default.

    Returns:
        The figure.

    Raises:
        ValueError: the shapes do not fit together.

    Example:

    >>> figure = plot_embeddings(np.eye(4), ["a", "a", "b", "b"])
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['a', 'b']
    """
    embeddings, labels = np.asarray(embeddings, float), np.asarray(labels)
    if embeddings.ndim != 2 or embeddings.shape[1] < 2:
        raise ValueError(
            _checks.message("embeddings", "shape (samples, dim >= 2)", embeddings)
        )
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            _checks.message("labels", f"shape ({len(embeddings)},)", labels)
        )
    figure, ax = _figure(ax, (6.0, 5.0))
    points = _principal_plane(embeddings)
    distinct = np.unique(labels)
    colours = _class_colours(len(distinct))
    for position, label in enumerate(distinct):
        rows = labels == label
        name = str(label) if names is None else names[position]
        x, y = points[rows].T
        ax.scatter(x, y, s=10, color=colours[position], label=name)
    ax.set(xlabel="1st principal component", ylabel="2nd principal component")
    ax.set_aspect("equal", "datalim")
    if len(distinct) <= 20:
        ax.legend(markerscale=2, ncols=1 + (len(distinct) > 10), fontsize="small")
    return _written(figure, path)


def plot_batch(
    images: Any,
    labels: Any,
    *,
    names: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the images of a P×K batch as a grid, one row for each class.

    Args:
        images: `(rows, height, width)` or `(rows, height, width, channels)`
            with 1 or 3 channels; integers in 0..255, or floats, which are
            drawn between their least and greatest value when they leave 0..1.
        labels: `(rows,)` labels, rows of one class side by side.
        names: what each row of the grid is called, in order; the labels
            themselves by default.
        path: where to write the figure; nothing is written by default.

    Returns:
        The figure.

    Raises:
        ValueError: the shapes do not fit together.

    Example:

    >>> figure = plot_batch(np.zeros((4, 8, 8)), [3, 3, 5, 5])
    >>> [axes.get_ylabel() for axes in figure.axes[::2]]
    ['3', '5']
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] != 3):
        raise ValueError(
            _checks.message(
                "images", "shape (rows, height, width[, 1 or 3 channels])", images
            )
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(_checks.message("labels", f"shape ({len(images)},)", labels))
    if images.dtype.kind == "f" and (images.min() < 0 or images.max() > 1):
        images = (images - images.min()) / max(np.ptp(images), 1e-12)
    starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
    counts = np.diff(np.r_[starts, len(labels)])
    figure = _new_figure((0.9 * counts.max() + 1.2, 0.9 * len(starts)))
    grid = figure.subplots(len(starts), counts.max(), squeeze=False)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        for column, ax in enumerate(grid[row]):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if column < count:
                # uint8 stays on its own scale; two grey images compare fairly.
                top = 255 if images.dtype.kind in "ui" else 1
                ax.imshow(images[start + column], cmap="gray", vmin=0, vmax=top)
        name = str(labels[start]) if names is None else names[row]
        grid[row][0].set_ylabel(name, rotation=0, ha="right", va="center")
    return _written(figure, path)


def _new_figure(size: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _figure(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """The axes to draw on and their figure: those given, or new ones."""
    if ax is None:
        ax = _new_figure(size).add_subplot()
    return cast("Figure", ax.get_figure(root=True)), ax


def _written(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _principal_plane(embeddings: np.ndarray) -> np.ndarray:
    """`(samples, 2)` coordinates on the two directions of largest variance."""
    centred = embeddings - embeddings.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    # The sign of a direction is arbitrary: fix it, so that figures compare.
    signs = np.sign(directions[:, np.abs(directions).argmax(axis=1)].diagonal())
    plane = (directions * np.where(signs == 0, 1, signs)[:, None])[:2]
    return centred @ plane.T


def _class_colours(count: int) -> Any:
    from matplotlib import colormaps

    if count <= 10:
        return colormaps["tab10"](np.arange(count))
    return colormaps["turbo"](np.linspace(0, 1, count))
