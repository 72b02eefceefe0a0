"""Figures of a training: what the mining does, where the embeddings lie, what is confused.

Every function draws a new figure (or on a given matplotlib axes, where one is
enough), writes it to `path` when one is given, and returns the
`matplotlib.figure.Figure`.
matplotlib (`pip install kerastrip[plot]`) is imported when a figure is drawn,
and its global state (`pyplot`) is left alone.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kerastrip import _checks
from kerastrip._files import readable
from kerastrip._neighbours import confusions, nearest_others, spread_rows
from kerastrip._pictures import pictures
from kerastrip.evaluation import label_table
from kerastrip.inference import embeddings_array
from kerastrip.metrics import FRACTIONS as FRACTIONS
from kerastrip.sources import as_source
from kerastrip.verification import VerificationCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"easy": "#c9d3dc", "semi_hard": "#f2a541", "hard": "#c8413b"}
SAME, DIFFERENT = "#2f7d4f", "#c8413b"
# Points of a curve that are drawn: more than a screen has.
_POINTS = 1000


def plot_mining(
    history: Mapping[str, Sequence[float]],
    *,
    prefix: str = "",
    epochs: Sequence[int] | None = None,
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
        epochs: the number of each epoch; 1, 2, ... by default.
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
    numbers = np.arange(1, len(history[keys[0]]) + 1) if epochs is None else epochs
    x, repeats = np.asarray(numbers, float), 1
    if len(x) == 1:  # a band, where an area would have no width
        x, repeats = np.array([x[0] - 0.5, x[0] + 0.5]), 2
    # Hard at the bottom: what training should drive to zero grows from zero.
    order = FRACTIONS[::-1]
    ax.stackplot(
        x,
        [np.repeat(np.asarray(history[prefix + k], float), repeats) for k in order],
        colors=[COLOURS[key] for key in order],
        labels=[key.replace("_", "-") for key in order],
    )
    ax.set(xlabel="epoch", ylabel="fraction of triplets", ylim=(0, 1))
    ax.set_xlim(x[0], x[-1])
    ax.locator_params(axis="x", integer=True)
    if prefix + "loss" in history:
        losses = ax.twinx()
        loss = np.repeat(np.asarray(history[prefix + "loss"], float), repeats)
        losses.plot(x, loss, color="#222222", linewidth=1.5)
        losses.set_ylabel("loss (line)")
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
    distinct, codes = np.unique(labels, return_inverse=True)
    colours = _class_colours(len(distinct))
    if len(distinct) > 20:
        ax.scatter(points[:, 0], points[:, 1], s=10, color=colours[codes])
    else:
        for code, label in enumerate(distinct):
            name = readable(label) if names is None else names[code]
            x, y = points[codes == code].T
            ax.scatter(x, y, s=10, color=colours[code], label=name)
        legend = ax.legend(
            markerscale=2, ncols=1 + (len(distinct) > 10), fontsize="small"
        )
        for text in legend.get_texts():  # a name is no formula
            text.set_parse_math(False)
    ax.set(xlabel="1st principal component", ylabel="2nd principal component")
    ax.set_aspect("equal", "datalim")
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
    images, labels = pictures("images", images), np.asarray(labels)
    if labels.shape != images.shape[:1]:
        raise ValueError(_checks.message("labels", f"shape ({len(images)},)", labels))
    starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
    counts = np.diff(np.r_[starts, len(labels)])
    figure = _new_figure((0.9 * counts.max() + 1.2, 0.9 * len(starts)))
    grid = figure.subplots(len(starts), counts.max(), squeeze=False)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        for column, ax in enumerate(grid[row]):
            _picture(ax, images[start + column] if column < count else None)
        name = readable(labels[start]) if names is None else names[row]
        _side_label(grid[row][0], name)
    return _written(figure, path)


def plot_distances(
    curve: VerificationCurve,
    *,
    margin: float | None = None,
    bins: int = 60,
    ax: Axes | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw histograms of the distances of positives and of negatives.

    The less they overlap, the better a threshold tells them apart. Every pair that
    the curve has counted is in the figure; each histogram has the area 1.

    Args:
        curve: from `kerastrip.verification.verification_curve(embeddings, labels)`.
        margin: of the loss: draws the range of so much beyond the mean distance of
            the positives, which the negatives should leave.
        bins: number of bins, at least 1. Default 60.
        ax: the axes to draw on; a new figure by default.
        path: where to write the figure; nothing is written by default.

    Returns:
        The figure.

    Example:

    >>> from kerastrip.verification import verification_curve
    >>> curve = verification_curve([[0.0], [1.0], [5.0], [7.0]], [0, 0, 1, 1])
    >>> figure = plot_distances(curve, margin=2.0)
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['2 positive pairs', '4 negative pairs', 'margin 2']
    """
    bins = _checks.integer("bins", bins, 1)
    if margin is not None:
        margin = _checks.number("margin", margin, above=0)
    figure, ax = _figure(ax, (6.0, 3.6))
    edges = np.linspace(0, max(curve.thresholds[-1], 1e-12), bins + 1)
    upto = np.searchsorted(curve.thresholds, edges, side="right") - 1
    for kind, counts, colour in (
        ("positive", curve.same, SAME),
        ("negative", curve.different, DIFFERENT),
    ):
        total = counts[-1]
        inside = np.diff(np.r_[0, counts[upto[1:]]])
        ax.stairs(
            inside / total / np.diff(edges),
            edges,
            fill=True,
            alpha=0.55,
            color=colour,
            label=f"{total:,} {kind} pairs",
        )
    if margin is not None:
        mean = float(np.diff(curve.same) @ curve.thresholds[1:]) / curve.same[-1]
        ax.axvspan(
            mean,
            mean + margin,
            facecolor="none",
            edgecolor="#555555",
            hatch="///",
            linewidth=0.8,
            alpha=0.5,
            label=f"margin {margin:g}",
        )
    ax.set(xlabel="distance", ylabel="density", xlim=(0, edges[-1]), ylim=(0, None))
    ax.legend(framealpha=0.9, fontsize="small")
    return _written(figure, path)


def plot_roc(
    curve: VerificationCurve,
    *,
    log: bool = False,
    ax: Axes | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the ROC: true accepts over false accepts, with the equal error rate.

    Args:
        curve: from `kerastrip.verification.verification_curve(embeddings, labels)`.
        log: whether the axis of the false accepts is logarithmic, down to one
            false accept. Default False.
        ax: the axes to draw on; a new figure by default.
        path: where to write the figure; nothing is written by default.

    Returns:
        The figure.

    Example:

    >>> from kerastrip.verification import verification_curve
    >>> curve = verification_curve([[0.0], [1.0], [5.0], [7.0]], [0, 0, 1, 1])
    >>> figure = plot_roc(curve)
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['AUC 1.0000', 'EER 0.0000', 'chance']
    """
    figure, ax = _figure(ax, (4.6, 4.2))
    least = 1 / float(curve.different[-1])
    grid = np.geomspace(least, 1, _POINTS) if log else np.linspace(0, 1, _POINTS)
    places = np.r_[
        np.searchsorted(curve.far, grid, side="right") - 1,
        np.searchsorted(curve.tar, np.linspace(0, 1, _POINTS)),
    ]
    shown = np.unique(places)
    ax.plot(
        curve.far[shown],
        curve.tar[shown],
        color="#22577a",
        label=f"AUC {curve.auc:.4f}",
    )
    eer = curve.eer
    ax.plot(
        [eer], [1 - eer], "o", color=DIFFERENT, label=f"EER {eer:.4f}", clip_on=False
    )
    ax.plot(grid, grid, ":", color="#777777", label="chance")
    ax.set(xlabel="false accepts (FAR)", ylabel="true accepts (TAR)", ylim=(0, 1.02))
    if log:
        ax.set(xscale="log", xlim=(least, 1))
    else:
        ax.set_xlim(-0.02, 1)
    ax.legend(loc="lower right", framealpha=0.9)
    return _written(figure, path)


def plot_confusions(
    embeddings: Any,
    labels: Any,
    images: Any,
    *,
    pairs: int = 5,
    examples: int = 3,
    names: Sequence[str] | None = None,
    distance: str = "euclidean",
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the classes that nearest neighbours confuse most, with examples.

    A row for each pair of classes: samples of the first (left) beside their nearest
    neighbour, which is of the second (right, framed), the nearest first.

    Args:
        embeddings: `(samples, dim)` finite numbers, two rows at least.
        labels: `(samples,)` integers or strings, or one-hot rows.
        images: what to show of each sample: an array as for `plot_batch`, or a
            source of such images.
        pairs: how many pairs of classes to show at most. Default 5.
        examples: how many samples of each to show at most. Default 3.
        names: what the distinct labels are called, in sorted order; the labels
            themselves by default.
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`.
        path: where to write the figure; nothing is written by default.

    Returns:
        The figure.

    Raises:
        TypeError, ValueError: the shapes do not fit together.

    Example:

    >>> figure = plot_confusions([[0.0], [1.0], [5.0], [1.1]], ["a", "a", "b", "b"],
    ...                          np.zeros((4, 8, 8)))
    >>> figure.axes[0].get_ylabel().splitlines()
    ['a taken for b', '1 of 2']
    """
    pairs = _checks.integer("pairs", pairs, 1)
    examples = _checks.integer("examples", examples, 1)
    rows, codes, names = _labelled(embeddings, labels, names)
    source = _image_source(images, len(rows))
    distances, nearest = nearest_others(rows, 1, distance)
    found = confusions(codes, nearest[:, 0], distances[:, 0], pairs)
    if not found:
        figure = _new_figure((4.0, 1.0))
        figure.text(0.5, 0.5, "no confusions", ha="center", va="center")
        return _written(figure, path)
    columns = min(examples, max(len(one.queries) for one in found))
    figure = _new_figure((1.8 * columns + 1.6, 1.0 * len(found) + 0.2))
    grid = figure.subplots(len(found), 2 * columns, squeeze=False)
    for line, one in zip(grid, found, strict=True):
        shown = np.c_[one.queries, one.neighbours][:columns].ravel()
        drawn = pictures("images", source.take(shown))
        for column, ax in enumerate(line):
            _picture(
                ax,
                drawn[column] if column < len(shown) else None,
                DIFFERENT if column % 2 else None,
            )
        _side_label(
            line[0],
            f"{names[one.code]} taken for {names[one.taken_for]}\n"
            f"{len(one.queries)} of {one.total}",
        )
    return _written(figure, path)


def plot_neighbours(
    embeddings: Any,
    labels: Any,
    images: Any,
    *,
    queries: Any = None,
    k: int = 5,
    names: Sequence[str] | None = None,
    distance: str = "euclidean",
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw some samples and their nearest neighbours: right green, wrong red.

    Args:
        embeddings: `(samples, dim)` finite numbers, two rows at least.
        labels: `(samples,)` integers or strings, or one-hot rows.
        images: what to show of each sample: an array as for `plot_batch`, or a
            source of such images.
        queries: rows to look up among the others. Default: 6, spread over the
            classes.
        k: neighbours of each, at least 1. Default 5.
        names: what the distinct labels are called, in sorted order; the labels
            themselves by default.
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`.
        path: where to write the figure; nothing is written by default.

    Returns:
        The figure. Above each image stand its class and its distance.

    Raises:
        TypeError, ValueError: the shapes do not fit together.

    Example:

    >>> figure = plot_neighbours([[0.0], [1.0], [5.0], [1.1]], ["a", "a", "b", "b"],
    ...                          np.zeros((4, 8, 8)), queries=[1], k=2)
    >>> [axes.get_title() for axes in figure.axes]
    ['a', 'b 0.1', 'a 1']
    """
    k = _checks.integer("k", k, 1)
    rows, codes, names = _labelled(embeddings, labels, names)
    source = _image_source(images, len(rows))
    asked = spread_rows(codes, 6) if queries is None else np.asarray(queries)
    if asked.ndim != 1 or asked.dtype.kind not in "iu" or not len(asked):
        raise ValueError(_checks.message("queries", "row numbers", queries))
    if asked.min() < 0 or asked.max() >= len(rows):
        raise ValueError(
            _checks.message("queries", f"rows 0 ... {len(rows) - 1}", queries)
        )
    distances, nearest = nearest_others(rows, k, distance, asked)
    shown = np.c_[asked, nearest]
    drawn = pictures("images", source.take(shown.ravel()))
    figure = _new_figure((shown.shape[1], 1.2 * len(shown)))
    grid = figure.subplots(*shown.shape, squeeze=False)
    for ax, row, picture in zip(grid.ravel(), shown.ravel(), drawn, strict=True):
        _picture(ax, picture)
        ax.set_title(names[codes[row]], fontsize="small", parse_math=False)
    for i, query in enumerate(asked):
        for ax, row, far in zip(grid[i, 1:], nearest[i], distances[i], strict=True):
            name, right = names[codes[row]], codes[row] == codes[query]
            _frame(ax, SAME if right else DIFFERENT)
            ax.set_title(f"{name} {far:.2g}", fontsize="small")
            ax.title.set_color(SAME if right else DIFFERENT)
    return _written(figure, path)


def _labelled(
    embeddings: Any, labels: Any, names: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Checked rows, the code of each, and what the codes are called."""
    rows = embeddings_array("embeddings", embeddings)
    if len(rows) < 2:
        raise ValueError(_checks.message("embeddings", "two rows or more", rows))
    table = label_table("labels", labels, len(rows))
    if names is not None and len(names) != len(table.classes):
        raise ValueError(_checks.message("names", f"{len(table.classes)} names", names))
    return (
        rows,
        table.codes,
        [readable(n) for n in (table.classes if names is None else names)],
    )


def _image_source(images: Any, length: int) -> Any:
    source = as_source(images, "images")
    if len(source) != length:
        raise ValueError(
            _checks.message(
                "images", f"{length} images", _checks.Told(f"{len(source)} of them")
            )
        )
    return source


def _picture(ax: Axes, picture: np.ndarray | None, frame: str | None = None) -> None:
    """An image without axes, in a coloured frame if one is given; or nothing."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if picture is not None:
        ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
        if frame is not None:
            _frame(ax, frame)


def _side_label(ax: Axes, text: str) -> None:
    ax.set_ylabel(text, rotation=0, ha="right", va="center", parse_math=False)


def _frame(ax: Axes, colour: str) -> None:
    ax.spines[:].set(visible=True, color=colour, linewidth=2.5)


@functools.cache
def _shown_figure() -> type[Figure]:
    """A Figure that a notebook shows, with or without `%matplotlib inline`."""
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png", dpi=120)
            return picture.getvalue()

    return ShownFigure


def _new_figure(size: tuple[float, float]) -> Figure:
    return _shown_figure()(figsize=size, layout="constrained")


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
