"""The sections of a TrainingReport: from figures and embeddings to HTML."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from kerastrip import plotting
from kerastrip.callbacks.collapse import Alarm
from kerastrip.callbacks.report import page
from kerastrip.evaluation.retrieval import retrieval_metrics
from kerastrip.evaluation.verification import verification_curve
from kerastrip.plotting.thumbnails import Thumbnails

__all__ = [
    "Look",
    "alarms_section",
    "best_epoch",
    "held_out_section",
    "lead",
    "logs_section",
    "look",
    "mining_section",
    "settings",
    "tiles",
]

_RETRIEVAL = ("recall@1", "recall@5", "precision@5", "r_precision", "map@r", "mrr")
_SETTINGS = ("margin", "mining", "distance", "gamma")  # of a loss
_TILES = ("loss", "val_loss", "easy", "hard")

# One value for each epoch, NaN where there is none.
_History = Mapping[str, Sequence[float]]


class Look(NamedTuple):
    """What is seen of held-out data after one epoch.

    Attributes:
        figures: retrieval and verification figures.
        charts: HTML of the charts of distances and embeddings.
        samples: HTML of the section on confusions and neighbours.
        worst: the most frequent confusion in words, "" if there is none.
    """

    figures: dict[str, float]
    charts: str
    samples: str
    worst: str


def look(
    embeddings: np.ndarray,
    labels: Any,
    *,
    distance: str,
    margin: float | None,
    images: Thumbnails | None,
    verbose: bool,
    pairs: int,
    queries: int,
    k: int,
) -> Look:
    """Measures and draws the embeddings of held-out data."""
    figures = retrieval_metrics(
        embeddings, labels, metrics=_RETRIEVAL, distance=distance, verbose=verbose
    )
    curve = verification_curve(embeddings, labels, distance=distance, verbose=verbose)
    figures |= {"auc": curve.auc, "eer": curve.eer}
    charts = [
        _chart(
            plotting.plot_distances(curve, margin=margin, distance=distance),
            "The less the two overlap, the better.",
        )
    ]
    if embeddings.shape[1] > 1:
        charts.append(_chart(plotting.plot_embeddings(embeddings, labels)))
    by: dict[str, Any] = {"images": images, "distance": distance}
    confused = plotting.plot_confusions(embeddings, labels, pairs=pairs, **by)
    near = plotting.plot_neighbours(embeddings, labels, queries=queries, k=k, **by)
    beside = "Samples beside their nearest neighbour (dashed frame), of another class."
    others = "The nearest others, ✓ right or ✗ wrong (dashed), with class and distance."
    photos = images is not None
    sheets = [_chart(confused, beside, photos), _chart(near, others, photos)]
    samples = page.section("Samples", "", page.charts(sheets))
    worst = f"{confused.get_label()}\n".split("\n")[1]
    return Look(figures, page.charts(charts), samples, worst)


def settings(model: Any, params: Mapping[str, Any]) -> str:
    """The losses, the optimizer, the size of the model and the length of the training."""
    told = []
    for loss in filter(None, keras.tree.flatten(getattr(model, "loss", None))):
        name = loss if isinstance(loss, str) else getattr(loss, "__name__", None)
        values = {word: getattr(loss, word, None) for word in _SETTINGS}
        given = [
            f"{word} {value}" for word, value in values.items() if value is not None
        ]
        told.append(", ".join([name or type(loss).__name__, *given]))
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        rate = float(optimizer.learning_rate)
        told.append(f"{type(optimizer).__name__}, learning rate {rate:.3g}")
    told.append(f"{model.count_params():,} parameters")
    told.append(f"{params.get('epochs')} epochs of {params.get('steps')} steps")
    return " · ".join(told)


def best_epoch(
    epochs: Sequence[int], history: _History, results: Mapping[int, Any]
) -> tuple[int, str] | None:
    """The epoch of the best held-out figure, else of the least loss, and it in words.

    None where there are not two epochs to compare.
    """
    kinds: dict[str, dict[int, float]] = {
        name: dict(zip(epochs, history[name], strict=True))
        for name in ("val_loss", "loss")
        if name in history
    }
    held_out = {epoch: one.get("map@r", math.nan) for epoch, one in results.items()}
    for name, values in {"map@r": held_out, **kinds}.items():
        finite = {epoch: one for epoch, one in values.items() if math.isfinite(one)}
        if len(values) < 2 or not finite:
            continue
        choose = max if name == "map@r" else min
        best, last = choose(finite, key=finite.__getitem__), max(values)
        value, end = page.digits(finite[best]), page.digits(values[last])
        if values[last] == finite[best]:
            return last, f"The last epoch is the best so far ({name} {value})."
        told = f"Epoch {best + 1} is the best ({name} {value}); the last one is worse"
        return best, f"{told} ({end})."
    return None


def lead(
    best: tuple[int, str] | None,
    history: _History,
    results: Mapping[int, Any],
    latest: Look | None,
) -> str:
    """The state of the training in three sentences."""
    told = [] if best is None else [best[1]]
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
    best: tuple[int, str] | None,
    history: _History,
    results: Mapping[int, Any],
    alarms: Sequence[Alarm] | None,
) -> list[tuple[str, str]]:
    """The names and latest values of the figures that count most."""
    values = {
        name.replace("_", " "): history[name][-1] for name in _TILES if name in history
    }
    for figures in filter(None, results.values()):
        values |= {name: figures[name] for name in ("recall@1", "map@r", "eer")}
    told = [(name, page.digits(value)) for name, value in values.items()]
    if best is not None:
        told.append(("best epoch", str(best[0] + 1)))
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
        return page.section(heading, broken, "")
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
                    page.spark(name, list(values.values())),
                    page.number(values[epochs[0]]),
                    page.number(values[best], f"({best + 1})"),
                    page.number(values[epochs[-1]]),
                ],
            )
        )
    columns = ["figure", "curve", f"epoch {epochs[0] + 1}", "best"]
    table = page.table([*columns, f"epoch {epochs[-1] + 1}"], rows)
    counts = measured[epochs[-1]]
    hint += f" {counts['queries']} queries"
    if counts["lone_queries"]:
        hint += f", and {counts['lone_queries']} without a partner, left out"
    return page.section(heading, f"{hint}. {broken}", f"{table}<br>\n{latest.charts}")


def mining_section(epochs: Sequence[int], history: _History) -> str:
    """The stacked fractions of training and validation; '' if none are logged."""
    parts = [
        _chart(plotting.plot_mining(history, prefix=prefix, epochs=epochs))
        for prefix in ("", "val_")
        if {prefix + key for key in plotting.FRACTIONS} <= set(history)
    ]
    if not parts:
        return ""
    return page.section(
        "Mining",
        "Hard: a negative is nearer than the positive; this should fall. Semi-hard: "
        "farther, but by less than the margin; from this the loss learns. Easy: done.",
        page.charts(parts),
    )


def alarms_section(alarms: Sequence[Alarm] | None) -> str:
    """What was noticed; without a `CollapseGuard` None, or what others noticed."""
    if alarms is None:
        return ""
    if not alarms:
        return page.section("Alarms", "None from CollapseGuard so far.", "")
    return page.section(
        "Alarms",
        "What was noticed, with what to try.",
        page.bullets(alarm.message for alarm in alarms),
        "alarms",
    )


def logs_section(history: _History) -> str:
    """Every logged figure: curve, first, best and latest value."""
    rows = []
    names = dict.fromkeys(key.removeprefix("val_") for key in history)
    for name in sorted(names, key="loss".__ne__):
        train, held = history.get(name, ()), history.get(f"val_{name}", ())
        rows.append(
            (
                name,
                [
                    page.spark(name, train, held),
                    *(page.number(one) for one in _ends(train)),
                    page.number(_ends(held)[1]),
                ],
            )
        )
    return page.section(
        "All figures of the logs",
        "Curves and latest values of training (grey) and validation (blue, dashed).",
        page.table(["figure", "curve", "first", "latest", "validation"], rows),
    )


def _ends(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The first and the last of the values there are."""
    there = [value for value in values if not math.isnan(value)]
    return (there[0], there[-1]) if there else (None, None)


def _chart(figure: Any, caption: str = "", photos: bool = False) -> str:
    """A figure for a page, of one size unless it is a sheet of samples."""
    if figure.get_layout_engine() is not None:
        figure.set_size_inches(4.6, 3.4)
        figure.set_layout_engine("tight")  # half the time of "constrained"
    # Photographs would be large without loss, and text blurred with it.
    how = {"quality": 70} if photos else {"lossless": True, "quality": 20}
    file, options = io.BytesIO(), {"method": 2, **how}
    # Dark pages turn black on nothing into white, which would spoil photographs.
    figure.savefig(
        file, format="webp", dpi=216, transparent=not photos, pil_kwargs=options
    )
    width = 65 * figure.get_size_inches()[0]
    kind = "photos" if photos else "chart"
    return page.chart(file.getvalue(), kind, width, figure.get_label(), caption)
