"""Charts of a training: the mining, the embeddings, the distances, the confused classes.

Every function draws a new figure, or draws on given matplotlib axes where a single axes
is enough. It writes the figure to `path` if a path is given, and returns the
`matplotlib.figure.Figure`. `figure.get_label()` says in words what the figure shows, for
use as an alternative text. No chart needs the eye to tell red from green: a sign, a
shape or a kind of line says the same as each colour.
matplotlib (`pip install kerastrip[plot]`) is imported when a figure is drawn, and its
global state (`pyplot`) does not change.
"""

from __future__ import annotations

import functools
import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from kerastrip import _checks
from kerastrip._files import readable
from kerastrip.evaluation.confusions import confusions, nearest_others, spread_rows
from kerastrip.evaluation.retrieval import label_table
from kerastrip.evaluation.search import (
    Space,
    embeddings_array,
    nearest,
    row_distances,
)
from kerastrip.evaluation.verification import VerificationCurve
from kerastrip.metrics import FRACTIONS
from kerastrip.plotting.thumbnails import as_uint8, file_names
from kerastrip.sources import as_source

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "DIFFERENT",
    "LEFT_OUT",
    "SAME",
    "plot_batch",
    "plot_confusions",
    "plot_distances",
    "plot_embeddings",
    "plot_mining",
    "plot_neighbours",
    "plot_roc",
]

COLOURS = {"easy": "#cdd6de", "semi_hard": "#f2a541", "hard": "#b5371f"}
# Blue and vermilion differ for every kind of colour vision (Okabe and Ito 2008).
SAME, DIFFERENT, LEFT_OUT = "#0072b2", "#d55e00", "#767676"
# Seven colours and five shapes tell 35 classes apart.
_CLASS_COLOURS = np.array(
    ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#333333"]
)
_MARKERS = "os^DP"
_LEGEND = 20  # from so many classes on the names stand in the plane, not in a legend
_NAMED = 30  # at most so many classes have their names there
# So many points of a curve are drawn: more than a screen has pixels for.
_POINTS = 1000
# A sheet of samples: the width of a sample in inches, and the least number of samples
# that a line has room for, so that the title and the headings fit.
_CELL, _COLUMNS = 0.77, 6
# The colour, line and width of the frame of each kind of sample, and the sign of it.
_FRAMES: dict[str, tuple[str, Any, float]] = {
    "": ("#5b6675", "-", 1.0),
    "right": (SAME, "-", 2.5),
    "wrong": (DIFFERENT, (0, (2, 1)), 2.5),
    "left out": (LEFT_OUT, ":", 2.5),
}
_SIGNS = {"right": "✓", "wrong": "✗", "left out": "⊘"}


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
        prefix: text before every key: `"val_"` draws the validation.
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
    lines = _mining_lines(history, prefix)
    figure, ax = _figure(ax, (7.0, 3.6))
    numbers = np.arange(1, len(lines["hard"]) + 1) if epochs is None else epochs
    if len(numbers) == 1:  # a band of width 1: the area over one point has no width
        x = np.array([-0.5, 0.5]) + numbers
        lines = {key: np.repeat(line, 2) for key, line in lines.items()}
        ax.set_xticks(numbers)
    else:
        x = np.asarray(numbers, float)
        ax.locator_params(axis="x", integer=True)
    names = [*lines][:3]
    colours = [COLOURS[key] for key in FRACTIONS[::-1]]
    drawn: list[Any] = ax.stackplot(
        x, [lines[n] for n in names], colors=colours, labels=names
    )
    # Hard triplets are hatched, so that the eye needs no colours to find them.
    drawn[0].set(hatch="///", edgecolor="#ffffff55", linewidth=0)
    ax.set(xlabel="epoch", ylabel="fraction of triplets", ylim=(0, 1), xlim=x[[0, -1]])
    if "loss" in lines:
        losses = ax.twinx()
        drawn += losses.plot(x, lines["loss"], color="#222222", label="loss")
        losses.set(ylabel="loss", ylim=(0, None))
    data = {"": "training", "val_": "validation"}.get(prefix, prefix.strip("_"))
    _headed(ax, f"Triplets in {data}", drawn)
    ends = [
        f"{key} from {line[0]:.3g} to {line[-1]:.3g}" for key, line in lines.items()
    ]
    words = (
        f"Triplets in {data}, epochs {numbers[0]} to {numbers[-1]}: {', '.join(ends)}."
    )
    return _written(figure, words, path)


def _mining_lines(
    history: Mapping[str, Sequence[float]], prefix: str
) -> dict[str, np.ndarray]:
    """Name -> a value for each epoch: the fractions from the bottom up, and the loss."""
    keys = [prefix + key for key in FRACTIONS]
    if not set(keys) <= set(history):
        raise _checks.value_error(
            "history",
            f"the keys {', '.join(keys)}",
            _checks.Told(f"{', '.join(sorted(history)) or 'no keys'}"),
            "Train with `kerastrip.MiningStats()` among the callbacks.",
        )
    # Hard at the bottom: what training should drive to zero grows from zero.
    return {
        key.replace("_", "-"): np.asarray(history[prefix + key], float)
        for key in (*FRACTIONS[::-1], "loss")
        if prefix + key in history
    }


def plot_embeddings(
    embeddings: Any,
    labels: Any,
    *,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw embeddings in the plane of their first two principal components.

    Up to 19 classes are named in a legend. Of twenty and more classes the largest 30
    have their names at the means of their points, as far as there is room.

    Args:
        embeddings: `(samples, dim)` numbers, dim >= 2.
        labels: `(samples,)` labels; each label has a colour and a shape.
        names: names of the distinct labels, in sorted order; the labels themselves by
            default.
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
        raise _checks.value_error("embeddings", "shape (samples, dim >= 2)", embeddings)
    if labels.shape != embeddings.shape[:1]:
        raise _checks.value_error("labels", f"shape ({len(embeddings)},)", labels)
    figure, ax = _figure(ax, (6.0, 5.0))
    points, shares = _principal_plane(embeddings)
    distinct, codes = np.unique(labels, return_inverse=True)
    names = [readable(name) for name in (distinct if names is None else names)]
    few = len(names) < _LEGEND
    # One call draws a class that the legend names, or else all classes of one shape.
    groups = codes if few else codes % len(_MARKERS)
    for group in range(groups.max() + 1):
        of = groups == group
        colours = _CLASS_COLOURS[codes[of] % len(_CLASS_COLOURS)].tolist()
        marker, name = _MARKERS[group % len(_MARKERS)], _short(names[group], 16)
        x, y = points[of].T
        ax.scatter(x, y, 14, colours, marker=marker, linewidths=0, label=name)
    ax.set_title("Embeddings in their principal plane")
    ax.set_xlabel(f"1st principal component ({shares[0]:.0%} of the variance)")
    ax.set_ylabel(f"2nd principal component ({shares[1]:.0%})")
    ax.locator_params(nbins=5)
    ax.set_aspect("equal", "datalim")
    if few:
        beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1.02)}
        legend = ax.legend(frameon=False, fontsize="small", **beside)
        for text in legend.get_texts():  # a name is no formula
            text.set_parse_math(False)
    else:
        _name_means(ax, points, codes, names)
    words = (
        f"{len(points)} embeddings of {len(names)} classes in their principal plane."
    )
    return _written(figure, words, path)


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
        names: name of each row of the grid, in order; the labels themselves by
            default.
        path: where to write the figure; nothing is written by default.

    Returns:
        The figure.

    Raises:
        ValueError: the shapes do not fit together.

    Example:

    >>> figure = plot_batch(np.zeros((4, 8, 8)), [3, 3, 5, 5])
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['Batch', '3', '5']
    """
    images, labels = as_uint8("images", images), np.asarray(labels)
    if labels.shape != images.shape[:1]:
        raise _checks.value_error("labels", f"shape ({len(images)},)", labels)
    starts = np.flatnonzero(np.r_[True, labels[1:] != labels[:-1]])
    names = labels[starts] if names is None else names
    lines = [
        (readable(name), [_Sample(row) for row in rows])
        for name, rows in zip(
            names, np.split(np.arange(len(labels)), starts[1:]), strict=True
        )
    ]
    shown = _shown(images, None, len(labels))
    return _written(*_sheet("Batch", lines, *shown), path)


def plot_distances(
    curve: VerificationCurve,
    *,
    margin: float | None = None,
    distance: str | None = None,
    bins: int = 60,
    ax: Axes | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw histograms of the distances of positives and of negatives.

    The less the two histograms overlap, the better a threshold tells positives from
    negatives. Every pair that the curve has counted is drawn; each histogram has the
    area 1.

    Args:
        curve: from `kerastrip.verification.verification_curve(embeddings, labels)`.
        margin: the margin of the loss. Shades mean positive distance ... + margin;
            the negatives should lie to the right of it.
        distance: name of the distance, for the label of the axis.
        bins: number of bins, at least 1. Default 60.
        ax: the axes to draw on; a new figure by default.
        path: where to write the figure; nothing is written by default.

    Returns:
        The figure.

    Example:

    >>> from kerastrip.evaluation.verification import verification_curve
    >>> curve = verification_curve([[0.0], [1.0], [5.0], [7.0]], [0, 0, 1, 1])
    >>> figure = plot_distances(curve, margin=2.0)
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['2 positive', '4 negative', 'margin 2']
    """
    bins = _checks.integer("bins", bins, 1)
    if margin is not None:
        margin = _checks.number("margin", margin, above=0)
    figure, ax = _figure(ax, (6.0, 3.6))
    edges = np.linspace(0, max(curve.thresholds[-1], 1e-12), bins + 1)
    # For every edge the last point of the curve at or below it.
    upto = np.searchsorted(curve.thresholds, edges, side="right") - 1
    for kind, counts, colour, line in (
        ("positive", curve.same, SAME, "-"),
        ("negative", curve.different, DIFFERENT, "--"),
    ):
        density = np.diff(np.r_[0, counts[upto[1:]]]) / counts[-1] / np.diff(edges)
        style: dict[str, Any] = {
            "fc": f"{colour}66",
            "ec": colour,
            "linestyle": line,
            "linewidth": 1.2,
        }
        name = f"{counts[-1]:,} {kind}"
        ax.stairs(density, edges, fill=True, label=name, **style)
    if margin is not None:
        mean = float(np.diff(curve.same) @ curve.thresholds[1:]) / curve.same[-1]
        style = {"fc": "none", "ec": "#555555", "hatch": "//", "linewidth": 0.8}
        ax.axvspan(mean, mean + margin, alpha=0.6, label=f"margin {margin:g}", **style)
    axis = f"{distance or ''} distance".replace("_", " ").strip()
    ax.set(xlabel=axis, ylabel="density of pairs", xlim=(0, edges[-1]), ylim=(0, None))
    _headed(ax, "Distances of positive and negative pairs")
    words = (
        f"Histograms of the {axis} of {curve.same[-1]:,} positive and "
        f"{curve.different[-1]:,} negative pairs; equal error rate {curve.eer:.4g}."
    )
    return _written(figure, words, path)


def plot_roc(
    curve: VerificationCurve,
    *,
    log: bool = False,
    ax: Axes | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the ROC: the rate of true accepts over that of false accepts, and the EER.

    Args:
        curve: from `kerastrip.verification.verification_curve(embeddings, labels)`.
        log: whether the axis of the false accepts is logarithmic; it then begins at one
            false accept. Default False.
        ax: the axes to draw on; a new figure by default.
        path: where to write the figure; nothing is written by default.

    Returns:
        The figure.

    Example:

    >>> from kerastrip.evaluation.verification import verification_curve
    >>> curve = verification_curve([[0.0], [1.0], [5.0], [7.0]], [0, 0, 1, 1])
    >>> figure = plot_roc(curve)
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['AUC 1.0000', 'EER 0.0000', 'chance']
    """
    figure, ax = _figure(ax, (4.6, 4.2))
    least = 1 / float(curve.different[-1])  # FAR of one false accept
    grid = np.geomspace(least, 1, _POINTS) if log else np.linspace(0, 1, _POINTS)
    # Points at even steps along both axes: a steep curve has few along the first.
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
    ax.set(ylim=(0, 1.02))
    ax.set(xlabel="rate of false accepts (FAR)", ylabel="rate of true accepts (TAR)")
    if log:
        ax.set(xscale="log", xlim=(least, 1))
    else:
        ax.set_xlim(-0.02, 1)
    _headed(ax, "ROC of all pairs")
    words = f"ROC of all pairs: AUC {curve.auc:.4f}, equal error rate {eer:.4f}."
    return _written(figure, words, path)


def plot_confusions(
    embeddings: Any,
    labels: Any,
    images: Any = None,
    *,
    groups: Any = None,
    pairs: int = 5,
    examples: int = 3,
    names: Sequence[str] | None = None,
    samples: Sequence[str] | None = None,
    distance: str = "euclidean",
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw the classes that nearest neighbours confuse most, with examples.

    There is a line for each pair of classes. It shows samples of the first class, each
    beside its nearest neighbour, which is of the second class and has a dashed frame.
    The sample nearest to its neighbour comes first. A sample without a positive is not
    counted.

    Args:
        embeddings: `(samples, dim)` finite numbers, two rows at least.
        labels: `(samples,)` integers or strings, or one-hot rows.
        images: an image of each sample: an array as for `plot_batch`, or a source of
            images. Default None: the figure shows the names of the samples only.
        groups: `(samples,)` groups (camera, session), as for `retrieval_metrics`: rows
            of the class and of the group of a sample are not its neighbours. Default
            None: all other rows are.
        pairs: the largest number of pairs of classes to show. Default 5.
        examples: the largest number of samples to show of each pair. Default 3.
        names: names of the distinct labels, in sorted order; the labels themselves by
            default.
        samples: names of the samples. Default: the names of the files that `images`
            reads, else "sample 12".
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`.
        path: where to write the figure; nothing is written by default.

    Returns:
        The figure.

    Raises:
        TypeError, ValueError: the shapes do not fit together.

    Example:

    >>> figure = plot_confusions([[0.0], [1.0], [5.0], [1.1]], ["a", "a", "b", "b"])
    >>> print(figure.get_label())
    Confused classes by euclidean distance
    a taken for b, 1 of 2
      sample 1, sample 3
    b taken for a, 1 of 2
      sample 3, sample 1
    """
    pairs = _checks.integer("pairs", pairs, 1)
    examples = _checks.integer("examples", examples, 1)
    rows, codes, names = _labelled(embeddings, labels, names)
    cells = _cells(codes, groups)
    source, samples = _shown(images, samples, len(rows))
    fars, neighbours = _nearest_counted(rows, codes, cells, distance)
    lines = []
    for one in confusions(codes, neighbours, fars, pairs):
        couples = np.c_[one.queries, one.neighbours][:examples].tolist()
        line = [
            _Sample(row, "", kind)
            for a, b in couples
            for row, kind in ((a, ""), (b, "wrong"))
        ]
        heading = f"{names[one.code]} taken for {names[one.taken_for]}"
        lines.append((f"{heading}, {len(one.queries)} of {one.total}", line))
    title = "Confused classes" if lines else "No confused classes"
    title = f"{title} by {distance.replace('_', ' ')} distance"
    return _written(*_sheet(title, lines, source, samples, named=True), path)


def plot_neighbours(
    embeddings: Any,
    labels: Any,
    images: Any = None,
    *,
    groups: Any = None,
    queries: Any = None,
    k: int = 5,
    names: Sequence[str] | None = None,
    samples: Sequence[str] | None = None,
    distance: str = "euclidean",
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw some samples and their nearest neighbours.

    Neighbours of the class of the sample have ✓ and a blue frame, neighbours of another
    class ✗ and a dashed red frame. With `groups`, neighbours of the class *and* the group
    of the sample have ⊘, the words "left out" and a dotted grey frame: they stand where
    they are in the ranking, but are neither right nor wrong.

    Args:
        embeddings: `(samples, dim)` finite numbers, two rows at least.
        labels: `(samples,)` integers or strings, or one-hot rows.
        images: an image of each sample: an array as for `plot_batch`, or a source of
            images. Default None: the figure shows the names of the samples only.
        groups: `(samples,)` groups (camera, session), as for `retrieval_metrics`. Default
            None: every neighbour counts.
        queries: the rows whose neighbours to show, or a number of rows, which are then
            spread over the classes. Default 6.
        k: number of neighbours of each sample, those left out among them, at least 1.
            Default 5.
        names: names of the distinct labels, in sorted order; the labels themselves by
            default.
        samples: names of the samples. Default: the names of the files that `images`
            reads, else "sample 12".
        distance: `"euclidean"` (default), `"squared_euclidean"` or `"cosine"`.
        path: where to write the figure; nothing is written by default.

    Returns:
        The figure. Below each neighbour stand its class and its distance.

    Raises:
        TypeError, ValueError: the shapes do not fit together.

    Example:

    >>> figure = plot_neighbours([[0.0], [1.0], [5.0], [1.1]], ["a", "a", "b", "b"],
    ...                          queries=[1], k=2)
    >>> print(figure.get_label())
    Nearest neighbours by euclidean distance
    sample 1: a, 1 of 2 right
      sample 1, sample 3 ✗ b 0.1, sample 0 ✓ a 1

    One camera has taken the samples 0 and 1, which are of one class:

    >>> figure = plot_neighbours([[0.0], [1.0], [5.0], [1.1]], ["a", "a", "a", "b"],
    ...                          groups=["c1", "c1", "c2", "c2"], queries=[1], k=3)
    >>> print(figure.get_label())
    Nearest neighbours by euclidean distance
    sample 1: a, 1 of 2 right, 1 left out
      sample 1, sample 3 ✗ b 0.1, sample 0 ⊘ left out 1, sample 2 ✓ a 4
    """
    k = _checks.integer("k", k, 1)
    rows, codes, names = _labelled(embeddings, labels, names)
    cells = _cells(codes, groups)
    source, samples = _shown(images, samples, len(rows))
    asked = _asked(queries, codes)
    lines = []
    looked_up = nearest_others(rows, k, distance, asked)
    for query, fars, others in zip(asked, *looked_up, strict=True):
        kinds = np.where(codes[others] == codes[query], "right", "wrong")
        kinds = np.where(cells[others] == cells[query], "left out", kinds).tolist()
        line = [_Sample(query)]
        for row, far, kind in zip(others, fars, kinds, strict=True):
            told = kind if kind == "left out" else names[codes[row]]
            line.append(_Sample(row, f"{_SIGNS[kind]} {told}\n{far:.2g}", kind))
        left_out = kinds.count("left out")
        counted = f"{kinds.count('right')} of {len(kinds) - left_out} right"
        more = f", {left_out} left out" if left_out else ""
        summary = f"{names[codes[query]]}, {counted}{more}"
        lines.append((f"{samples[query]}: {summary}", line))
    title = f"Nearest neighbours by {distance.replace('_', ' ')} distance"
    return _written(*_sheet(title, lines, source, samples), path)


def _asked(queries: Any, codes: np.ndarray) -> np.ndarray:
    """The rows that the argument `queries` of `plot_neighbours` asks for."""
    if queries is None or isinstance(queries, int):
        count = 6 if queries is None else _checks.integer("queries", queries, 1)
        asked = spread_rows(codes, count)
    else:
        asked = np.asarray(queries)
    if (
        asked.ndim != 1
        or asked.dtype.kind not in "iu"
        or not len(asked)
        or (asked.min() < 0 or asked.max() >= len(codes))
    ):
        expected = f"rows 0 ... {len(codes) - 1}, or how many"
        raise _checks.value_error("queries", expected, queries)
    return asked


def _labelled(
    embeddings: Any, labels: Any, names: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The rows after their check, the code of each row, and the names of the codes."""
    rows = embeddings_array("embeddings", embeddings)
    if len(rows) < 2:
        raise _checks.value_error("embeddings", "two rows or more", rows)
    table = label_table("labels", labels, len(rows))
    if names is not None and len(names) != len(table.classes):
        raise _checks.value_error("names", f"{len(table.classes)} names", names)
    return (
        rows,
        table.codes,
        [readable(n) for n in (table.classes if names is None else names)],
    )


def _cells(codes: np.ndarray, groups: Any) -> np.ndarray:
    """(n,) for each row a number 0, 1, ... of its class and group.

    Rows of one cell are left out of the neighbours of each other. Without groups every
    row has a cell of its own. For two classes and two cameras:

        class    0   0   0   1   1
        group    c1  c1  c2  c1  c1
        cell     0   0   1   2   2
    """
    if groups is None:
        return np.arange(len(codes))
    table = label_table("groups", groups, len(codes))
    both = codes.astype(np.int64) * len(table.classes) + table.codes
    return np.unique(both, return_inverse=True)[1]


def _nearest_counted(
    rows: np.ndarray, codes: np.ndarray, cells: np.ndarray, distance: str
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) distances and row numbers of the nearest row of another cell.

    A row of a class of one cell has no positive, so that its nearest row cannot be right
    and says nothing about confusions: it gets its own number.
    """
    distances = np.empty(len(rows), np.float32)
    found = np.empty(len(rows), np.int64)
    space = Space.of(rows, rows, distance)
    for span, numbers in space.blocks():
        numbers[cells[span, None] == cells] = np.inf
        # As in `search`: of a few candidates the nearest by distances that are exact.
        near = nearest(numbers, min(9, len(rows)))
        far = row_distances(space.queries[span, None], space.gallery[near], distance)
        far[cells[near] == cells[span, None]] = np.inf
        first = np.lexsort((near, far), axis=-1)[:, :1]
        distances[span] = np.take_along_axis(far, first, axis=1)[:, 0]
        found[span] = np.take_along_axis(near, first, axis=1)[:, 0]
    _, firsts = np.unique(cells, return_index=True)
    cells_of_class = np.bincount(codes[firsts])
    lone = np.flatnonzero(cells_of_class[codes] == 1)
    found[lone] = lone
    return distances, found


def _shown(
    images: Any, samples: Sequence[str] | None, length: int
) -> tuple[Any, Sequence[str]]:
    """The source of the images (None without images), and the names of the samples."""
    source = None if images is None else as_source(images, "images")
    if source is not None and len(source) != length:
        raise _checks.value_error(
            "images", f"{length} images", _checks.Told(f"{len(source)} of them")
        )
    if samples is None:
        samples = file_names(source) or [f"sample {row}" for row in range(length)]
    if len(samples) != length:
        raise _checks.value_error("samples", f"{length} names", samples)
    return source, samples


class _Sample(NamedTuple):
    """A sample of a sheet: its row, a text below it, and which of `_FRAMES` it has.

    The `kind` of a neighbour is "right" or "wrong" by its class, or "left out"; it is ""
    for a sample that is no neighbour.
    """

    row: int
    text: str = ""
    kind: str = ""


def _sheet(
    title: str,
    lines: Sequence[tuple[str, Sequence[_Sample]]],
    source: Any,
    names: Sequence[str],
    named: bool = False,
) -> tuple[Figure, str]:
    """A figure of lines of samples, each line under its heading; and its text in words.

    One axes holds all samples, because dozens of axes would take a second to make. Its
    unit is the width of a sample:

        heading           0.38 high
        +-----+ +-----+
        | 0.9 | |     |   1
        +-----+ +-----+
        name    name      0.2 for each line
        text    text

    Args:
        lines: (heading, samples) of each line.
        source: the source of the images, or None: then the names stand in their place.
        names: the names of all samples, by row.
        named: whether the names stand below the images.
    """
    every = [one for _, line in lines for one in line]
    shown: dict[int, Any] = {one.row: _wrapped(names[one.row]) for one in every}
    # The lines of text below each sample.
    below = [
        (shown[one.row] if named and source is not None else [])
        + [_short(text, 10) for text in one.text.splitlines()]
        for one in every
    ]
    if source is not None and shown:
        images = as_uint8("images", source.take([*shown]))
        shown = dict(zip(shown, images, strict=True))
    height = 1.4 + 0.2 * max(map(len, below), default=0)
    columns = max([_COLUMNS, *(len(line) for _, line in lines)])
    tall = 0.5 + height * len(lines)
    figure = _shown_figure()(figsize=(_CELL * columns, _CELL * tall))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(tall, 0))
    ax.axis("off")
    write = functools.partial(ax.text, va="center", parse_math=False)
    write(columns / 2, 0.25, title, fontsize="large", ha="center")
    words, texts = [title], iter(below)
    for i, (heading, line) in enumerate(lines):
        top = 0.5 + height * i
        write(0.06, top + 0.2, _short(heading, 9 * columns), fontsize=9, weight="bold")
        for x, one in enumerate(line):
            _cell(ax, x + 0.5, top + 0.88, shown[one.row], one.kind, next(texts))
        texts_of_line = (
            " ".join(f"{names[one.row]} {one.text}".split()) for one in line
        )
        words += [heading, "  " + ", ".join(texts_of_line)]
    return figure, "\n".join(words)


def _cell(
    ax: Axes, x: float, y: float, shown: Any, kind: str, below: Sequence[str]
) -> None:
    """An image, or lines of text, in a frame around (x, y), and lines of text below it."""
    write = functools.partial(
        ax.text, ha="center", fontsize=8.5, linespacing=1.15, parse_math=False
    )
    tall = wide = 0.44  # half the sides of the frame
    if isinstance(shown, np.ndarray):
        tall, wide = 0.44 * np.array(shown.shape[:2]) / max(shown.shape[:2])
        edges = (x - wide, x + wide, y + tall, y - tall)
        # Without limits an image of one grey would be black.
        ax.imshow(shown, "gray", aspect="auto", vmin=0, vmax=255, extent=edges)
    else:
        write(x, y, "\n".join(shown), va="center")
    colour, line, width = _FRAMES[kind]
    across, down = np.array([-1, 1, 1, -1, -1]), np.array([-1, -1, 1, 1, -1])
    ax.plot(x + wide * across, y + tall * down, color=colour, ls=line, lw=width)
    if below:
        write(x, y + 0.52, "\n".join(below), va="top", color=colour)


def _short(text: str, most: int) -> str:
    """The text; of a text longer than `most` the beginning and the end."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[most // 2 + 1 - most :]}"


def _wrapped(name: str) -> list[str]:
    """A name in two or three short lines, broken behind "_" where it can be."""
    lines = textwrap.wrap(_short(name, 20).replace("_", "_ "), 9)
    return [line.replace("_ ", "_") for line in lines]


def _headed(ax: Axes, title: str, handles: Any = None) -> None:
    """Puts a title above the axes, and the legend between both, where it covers nothing."""
    ax.set_title(title, pad=26)
    between: dict[str, Any] = {
        "loc": "lower center",
        "bbox_to_anchor": (0.5, 1),
        "frameon": False,
    }
    small: dict[str, Any] = {
        "fontsize": "small",
        "handlelength": 1.5,
        "columnspacing": 1.2,
    }
    ax.legend(handles=handles, ncols=4, **between, **small)


def _name_means(
    ax: Axes, points: np.ndarray, codes: np.ndarray, names: Sequence[str]
) -> None:
    """Writes the names of the largest classes at the means of their points.

    A name that would cover another name moves to the nearest free place, with a line to
    its mean, or is left out if no place is free. The places tried are a grid around the
    mean, in hundredths of the width of the plane:

              -20 -15 ... 0 ... 15 20
        -18    x   x      x     x   x
         ...
         18    x   x      x     x   x
    """
    sizes = np.bincount(codes)
    sums = [np.bincount(codes, part) for part in points.T]
    means = np.stack(sums, axis=1) / sizes[:, None]
    unit = 0.01 * (np.ptp(points, axis=0).max() or 1.0)
    across, down = np.meshgrid(np.arange(-20, 21, 5), np.arange(-18, 19, 6))
    steps = unit * np.stack([across.ravel(), down.ravel()], axis=1)
    # (places, 2) steps from the mean, the shortest first.
    steps = steps[np.hypot(*steps.T).argsort(kind="stable")]
    taken = np.empty((0, 3))  # x, y and half the width of the names so far
    paper = {"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.5}
    middle: dict[str, Any] = {"ha": "center", "va": "center", "in_layout": False}
    for code in np.argsort(-sizes, kind="stable")[:_NAMED]:
        name = _short(names[code], 12)
        half = unit * 1.5 * len(name)
        places = means[code] + steps
        gaps = np.abs(places[:, None] - taken[:, :2])  # (places, taken, 2)
        apart = (gaps[..., 0] > half + taken[:, 2]) | (gaps[..., 1] > 6 * unit)
        for place in places[apart.all(axis=1)][:1]:
            taken = np.vstack([taken, [*place, half]])
            ax.plot(*np.transpose([means[code], place]), color="#555555", linewidth=0.6)
            x, y = place
            ax.text(x, y, name, size="small", parse_math=False, bbox=paper, **middle)


@functools.cache
def _shown_figure() -> type[Figure]:
    """A Figure class that a notebook shows, with or without `%matplotlib inline`.

    Made when it is first used, because matplotlib is imported no earlier.
    """
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=120)
            return file.getvalue()

    return ShownFigure


def _new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of (width, height) in inches."""
    return _shown_figure()(figsize=size, layout="constrained")


def _figure(ax: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """The axes to draw on and their figure: the given axes, or axes of a new figure."""
    if ax is None:
        ax = _new_figure(size).add_subplot()
    return cast("Figure", ax.get_figure(root=True)), ax


def _written(figure: Figure, words: str, path: str | os.PathLike[str] | None) -> Figure:
    """The figure with its text in words as its label; written if a path is given."""
    before = str(figure.get_label())  # of other axes of the same figure
    figure.set_label(f"{before}\n{words}" if before else words)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _principal_plane(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(samples, 2) coordinates in the principal plane, and (2,) shares of the variance."""
    centred = embeddings - embeddings.mean(axis=0)
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    # The sign of a direction is arbitrary: fix it, so that figures compare.
    signs = np.sign(directions[:, np.abs(directions).argmax(axis=1)].diagonal())
    plane = (directions * np.where(signs == 0, 1, signs)[:, None])[:2]
    shares = scales[:2] ** 2 / max((scales**2).sum(), 1e-300)
    return centred @ plane.T, shares
