"""The sections of a TrainingReport: from figures and embeddings to HTML."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kerastrip import plotting
from kerastrip._files import readable
from kerastrip._neighbours import confusions, nearest_others, spread_rows
from kerastrip._pictures import png
from kerastrip.callbacks import _page
from kerastrip.callbacks._images import Thumbnails
from kerastrip.callbacks.collapse import Alarm
from kerastrip.evaluation import label_table, retrieval_metrics
from kerastrip.verification import verification_curve

_RETRIEVAL = ("recall@1", "recall@5", "precision@5", "r_precision", "map@r", "mrr")
_EXAMPLES = 4  # of each confusion
_THUMBNAIL, _TINY = 96, 48  # pixels; what is smaller is enlarged without a blur

_TILES = ("loss", "val_loss", "easy", "hard")

# One value for each epoch, NaN where there is none.
History = Mapping[str, Sequence[float]]


class Look(NamedTuple):
    """What is seen of held-out data after one epoch.

    Attributes:
        figures: retrieval and verification figures.
        charts: HTML of the charts of distances and embeddings.
        neighbours: HTML of the sections on confusions and neighbours.
        worst: the most frequent confusion, in words.
    """

    figures: dict[str, float]
    charts: str
    neighbours: str
    worst: str


def look(
    embeddings: np.ndarray,
    labels: Any,
    *,
    distance: str,
    margin: float | None,
    thumbnails: Thumbnails | None,
    verbose: bool,
    pairs: int,
    queries: int,
    k: int,
) -> Look:
    """Measures and draws the embeddings of held-out data."""
    table = label_table("y", labels, len(embeddings))
    names = [readable(name) for name in table.classes]
    figures = retrieval_metrics(
        embeddings, labels, metrics=_RETRIEVAL, distance=distance, verbose=verbose
    )
    curve = verification_curve(embeddings, labels, distance=distance, verbose=verbose)
    figures |= {"auc": curve.auc, "eer": curve.eer}
    charts = [
        _chart(
            functools.partial(plotting.plot_distances, curve, margin=margin),
            "Distances of all pairs. The less the two overlap, the better.",
            f"Histograms of the distances of {curve.same[-1]} positive and "
            f"{curve.different[-1]} negative pairs; equal error rate {curve.eer:.4g}.",
        )
    ]
    if embeddings.shape[1] > 1:
        charts.append(
            _chart(
                functools.partial(plotting.plot_embeddings, embeddings, labels),
                "The embeddings in the plane of their largest variance.",
                f"{len(embeddings)} embeddings of {len(names)} classes, in their first "
                "two principal components.",
            )
        )
    distances, nearest = nearest_others(embeddings, 1, distance)
    found = confusions(table.codes, nearest[:, 0], distances[:, 0], pairs)
    asked = spread_rows(table.codes, queries)
    distances, nearest = nearest_others(embeddings, k, distance, asked)
    shown = [row for one in found for row in _examples(one).ravel()]
    shown += [*asked, *nearest.ravel()]
    thumb = _thumbs(thumbnails, table.codes, names, shown)

    cards = [
        _page.card(
            f"{names[one.code]} taken for {names[one.taken_for]}",
            f"{len(one.queries)} of {one.total} ({len(one.queries) / one.total:.1%})",
            "".join(
                _page.pair(thumb(query) + thumb(row, False))
                for query, row in _examples(one)
            ),
        )
        for one in found
    ]
    rows = [
        _page.card(
            f"{names[table.codes[query]]}, sample {query}",
            f"{(table.codes[others] == table.codes[query]).sum()} of {len(others)} right",
            thumb(query)
            + "".join(
                thumb(row, table.codes[row] == table.codes[query], _page.digits(far))
                for row, far in zip(others, fars, strict=True)
            ),
        )
        for query, others, fars in zip(asked, nearest, distances, strict=True)
    ]
    sections = _page.section(
        "Confusions",
        "Pairs of classes of which the first most often has a nearest neighbour of the "
        "second; samples beside that neighbour, the nearest first.",
        _page.cards(cards)
        if cards
        else "<p>None: every nearest neighbour is right.</p>",
    ) + _page.section(
        "Nearest neighbours",
        "A sample (grey frame), and the nearest others with their distance: right ones "
        "✓ green, wrong ones ✗ red.",
        _page.cards(rows),
    )
    worst = ""
    if found:
        first = found[0]
        worst = (
            f"{names[first.code]} taken for {names[first.taken_for]} "
            f"({len(first.queries)} of {first.total})"
        )
    return Look(figures, _page.charts(charts), sections, worst)


def _examples(one: Any) -> np.ndarray:
    """(examples, 2) rows: queries and their neighbours."""
    return np.c_[one.queries, one.neighbours][:_EXAMPLES]


def _thumbs(
    thumbnails: Thumbnails | None,
    codes: np.ndarray,
    names: Sequence[str],
    rows: Sequence[int],
) -> Callable[..., str]:
    """A function from one of the rows to its thumbnail, as HTML."""
    images: dict[int, np.ndarray] = {}
    if thumbnails is not None:
        distinct = np.unique(rows)
        images = dict(zip(distinct, thumbnails.take(distinct, _THUMBNAIL), strict=True))

    def thumb(row: int, right: bool | None = None, *notes: str) -> str:
        name, image = names[codes[row]], images.get(row)
        kind = "" if right is None else "right" if right else "wrong"
        sign = {"": "", "right": "✓ ", "wrong": "✗ "}[kind]
        return _page.thumb(
            None if image is None else png(image),
            image is not None and max(image.shape[:2]) < _TINY,
            f"sample {row} of {name} {kind}".strip(),
            [sign + name, *notes],
            kind,
        )

    return thumb


def lead(history: History, results: Mapping[int, Any], latest: Look | None) -> str:
    """The state of the training in two sentences."""
    told = []
    if set(plotting.FRACTIONS) <= set(history):
        hard, easy = history["hard"], history["easy"]
        told.append(
            f"{hard[-1]:.1%} of the triplets of the last epoch are hard and "
            f"{easy[-1]:.1%} easy (first epoch: {hard[0]:.1%} and {easy[0]:.1%})."
        )
    measured = [figures for figures in results.values() if figures]
    if measured and latest is not None:
        first, last = measured[0], measured[-1]
        told.append(
            f"Of {last['queries']} held-out samples {last['recall@1']:.1%} have a nearest "
            f"neighbour of their own class (first: {first['recall@1']:.1%})"
            + (f"; most often {latest.worst}." if latest.worst else ".")
        )
    return " ".join(told)


def tiles(
    history: History, results: Mapping[int, Any], alarms: Sequence[Alarm] | None
) -> list[tuple[str, str]]:
    """The names and latest values of the figures that count most."""
    values = {
        name.replace("_", " "): history[name][-1] for name in _TILES if name in history
    }
    for figures in filter(None, results.values()):
        values |= {name: figures[name] for name in ("recall@1", "map@r", "eer")}
    told = [(name, _page.digits(value)) for name, value in values.items()]
    return told if alarms is None else [*told, ("alarms", str(len(alarms)))]


def held_out_section(latest: Look | None, results: Mapping[int, Any]) -> str:
    """The table of figures (first, best, latest) and the charts."""
    measured = {epoch: figures for epoch, figures in results.items() if figures}
    heading, broken = "Held-out data", ""
    if len(measured) < len(results):
        broken = (
            f"After epoch {max(set(results) - set(measured)) + 1} the embeddings were "
            "not finite: the training has diverged."
        )
    if latest is None:
        return _page.section(heading, broken, "")
    hint = (
        "Every sample is looked up among all others, and all pairs are told apart by "
        "their distance; the epoch of the best value is in brackets."
    )
    epochs = sorted(measured)
    rows = []
    for name in (*_RETRIEVAL, "auc", "eer"):
        values = {epoch: measured[epoch][name] for epoch in epochs}
        choose = min if name == "eer" else max
        best = choose(epochs, key=values.__getitem__)
        rows.append(
            (
                name,
                [
                    _page.spark(name, (), list(values.values())),
                    _page.number(values[epochs[0]]),
                    _page.number(values[best], f"({best + 1})"),
                    _page.number(values[epochs[-1]]),
                ],
            )
        )
    columns = ["figure", "curve", f"epoch {epochs[0] + 1}", "best"]
    table = _page.table([*columns, f"epoch {epochs[-1] + 1}"], rows)
    counts = measured[epochs[-1]]
    hint += f" {counts['queries']} queries"
    if counts["lone_queries"]:
        hint += f", and {counts['lone_queries']} without a partner, left out"
    return _page.section(heading, f"{hint}. {broken}", f"{table}<br>\n{latest.charts}")


def mining_section(epochs: Sequence[int], history: History) -> str:
    """The stacked fractions of training and validation; '' if none are logged."""
    parts = []
    for prefix, name in (("", "Training"), ("val_", "Validation")):
        keys = [prefix + key for key in plotting.FRACTIONS]
        if not set(keys) <= set(history):
            continue
        told = ", ".join(
            f"{key.removeprefix('val_').replace('_', '-')} from {history[key][0]:.3g} "
            f"to {history[key][-1]:.3g}"
            for key in [*keys, prefix + "loss"]
            if key in history
        )
        parts.append(
            _chart(
                functools.partial(
                    plotting.plot_mining, history, prefix=prefix, epochs=epochs
                ),
                f"{name}.",
                f"{name}, epochs {epochs[0]} to {epochs[-1]}: {told}.",
            )
        )
    if not parts:
        return ""
    return _page.section(
        "Mining",
        "Hard: a negative is nearer than the positive; this should fall. Semi-hard: "
        "farther, but by less than the margin; from this the loss learns. Easy: done.",
        _page.charts(parts),
    )


def alarms_section(alarms: Sequence[Alarm] | None) -> str:
    """What was noticed; without a `CollapseGuard` None, or what others noticed."""
    if alarms is None:
        return ""
    if not alarms:
        return _page.section("Alarms", "None from CollapseGuard so far.", "")
    return _page.section(
        "Alarms",
        "What was noticed, with what to try.",
        _page.bullets(alarm.message for alarm in alarms),
        "alarms",
    )


def logs_section(history: History) -> str:
    """Every logged figure: curve, first, best and latest value."""
    rows = []
    names = dict.fromkeys(key.removeprefix("val_") for key in history)
    for name in sorted(names, key="loss".__ne__):
        train, held = history.get(name, ()), history.get(f"val_{name}", ())
        rows.append(
            (
                name,
                [
                    _page.spark(name, train, held),
                    *(_page.number(one) for one in _ends(train)),
                    _page.number(_ends(held)[1]),
                ],
            )
        )
    return _page.section(
        "All figures of the logs",
        "Curves and latest values of training (grey) and validation (blue).",
        _page.table(["figure", "curve", "first", "latest", "validation"], rows),
    )


def _ends(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The first and the last of the values there are."""
    there = [value for value in values if not math.isnan(value)]
    return (there[0], there[-1]) if there else (None, None)


def _chart(draw: Callable[..., Any], caption: str, alternative: str) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    draw(ax=figure.add_subplot())
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=192, transparent=True)
    return _page.chart(file.getvalue(), caption, alternative)
