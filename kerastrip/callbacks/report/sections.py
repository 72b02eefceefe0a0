"""The sections of a TrainingReport: HTML from logs, metrics and embeddings."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from kerastrip import plotting
from kerastrip._labels import LabelTable
from kerastrip.callbacks._evaluation import ENDS
from kerastrip.callbacks.collapse import Alarm
from kerastrip.callbacks.report import page
from kerastrip.evaluation.auditing import audit
from kerastrip.evaluation.intervals import (
    FEW_CLASSES,
    effective_number,
    with_intervals,
)
from kerastrip.evaluation.retrieval import lookup_figures
from kerastrip.evaluation.verification import (
    VerificationCurve,
    class_scores,
    verification_curve,
)
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
# Where there are groups, these figures and this count come with them.
_OF_GROUPS, _ACROSS = ("map", "cmc@1", "minp"), "lone_across_groups"
# The attributes of a loss that the page names.
_SETTINGS = ("margin", "mining", "distance", "gamma")
# A sample is shown as mislabelled if another class is nearer by this much (euclidean);
# the labels are judged from this recall@1 on.
_CLEAR, _JUDGES = 0.3, 0.5
_TILES = ("loss", "val_loss", "easy", "hard")
_HELD_OUT_TILES = ("recall@1", "map@r", "map", "eer")

# key -> a value for each epoch, NaN for an epoch whose logs lack the key.
_History = Mapping[str, Sequence[float]]


class Look(NamedTuple):
    """The measurement of held-out data after one epoch.

    Attributes:
        figures: the values of the retrieval and verification metrics.
        charts: HTML of the charts of distances and embeddings.
        samples: HTML of the section on confusions and neighbours.
        worst: the most frequent confusion in words, "" without confusions.
        audit: HTML of the section on labels that look wrong, "" if none does.
    """

    figures: dict[str, float]
    charts: str
    samples: str
    worst: str
    audit: str


def look(
    embeddings: np.ndarray,
    labels: Any,
    *,
    groups: Any,
    distance: str,
    margin: float | None,
    interval: float | None,
    images: Thumbnails | None,
    verbose: bool,
    pairs: int,
    queries: int,
    k: int,
) -> Look:
    """Measures and draws the embeddings of held-out data."""
    how: dict[str, Any] = {"distance": distance, "verbose": verbose}
    curve = verification_curve(embeddings, labels, **how)
    figures = _figures(embeddings, labels, groups, curve, interval, how)
    charts = [
        _chart(
            plotting.plot_distances(curve, margin=margin, distance=distance),
            "The less the two overlap, the better.",
        )
    ]
    if embeddings.shape[1] > 1:  # a plane needs two dimensions
        charts.append(_chart(plotting.plot_embeddings(embeddings, labels)))
    by: dict[str, Any] = {"images": images, "groups": groups, "distance": distance}
    samples, worst = _samples(embeddings, labels, pairs, queries, k, by)
    # A model that does not tell the classes apart cannot judge the labels.
    judges = figures["recall@1"] >= _JUDGES
    wrong = _audit(embeddings, labels, images, distance) if judges else ""
    return Look(figures, page.charts(charts), samples, worst, wrong)


def _figures(
    embeddings: np.ndarray,
    labels: Any,
    groups: Any,
    curve: VerificationCurve,
    interval: float | None,
    how: dict[str, Any],
) -> dict[str, float]:
    """The values of all metrics, with their intervals if there are two classes.

    Args:
        embeddings, labels, groups, interval: as for `look`.
        curve: the verification curve of the embeddings.
        how: the keywords `distance` and `verbose` of the metrics.
    """
    classes = _effective_classes(labels, groups)
    if classes < 2:  # nobody knows how much classes differ
        interval = None
    of_pairs = {"auc": curve.auc, "eer": curve.eer}
    # Not `retrieval_metrics`, which would warn of few classes: the page tells of them.
    figures, *_ = lookup_figures(
        embeddings,
        labels,
        None,
        None,
        own=None,
        groups=groups,
        metrics=_RETRIEVAL if groups is None else (*_RETRIEVAL, *_OF_GROUPS),
        interval=interval,
        **how,
    )
    if interval is not None:
        scores = class_scores(
            embeddings, labels, metrics=[*of_pairs], curve=curve, **how
        )
        of_pairs = with_intervals(of_pairs, scores, interval)
        figures |= {"interval": interval, "classes": classes}
    return figures | of_pairs


def _audit(
    embeddings: np.ndarray, labels: Any, images: Thumbnails | None, distance: str
) -> str:
    """The section on labels that look wrong; "" if none does."""
    found = audit(embeddings, labels, distance=distance)
    # Many samples are a little nearer to another class: not worth a look.
    clear = 1 - (1 - _CLEAR) ** (1 if distance == "euclidean" else 2)
    rows = [one for one in found.rows if one.nearer >= clear]
    found = dataclasses.replace(found, rows=rows)
    if not (found.rows or found.pairs or found.classes):
        return ""
    figure = plotting.plot_audit(found, labels, images)
    chart = _chart(figure, "", images is not None)
    hint = (
        "What the embeddings say about the labels; the better the model, the more it "
        "is worth. A sample looks mislabelled if another class is much nearer than its "
        "own. Mixing is 0 for classes apart, and 1 for random parts of one class."
    )
    return page.section("Labels to look at", hint, page.charts([chart]))


def _effective_classes(labels: Any, groups: Any) -> float:
    """The number of classes of equal size that would tell as much; 0 below two classes.

    Rows count that have a positive: a row of their class and, where there are groups, of
    another group.
    """
    codes = LabelTable(labels).codes
    cells = np.arange(len(codes)) if groups is None else LabelTable(groups).codes
    of_class = np.unique(np.stack([codes, cells]), axis=1)[0]
    sizes = np.bincount(codes)[np.bincount(of_class) > 1]
    return effective_number(sizes) if len(sizes) > 1 else 0.0


def _samples(
    embeddings: np.ndarray,
    labels: Any,
    pairs: int,
    queries: int,
    k: int,
    by: Mapping[str, Any],
) -> tuple[str, str]:
    """The section on confusions and neighbours, and the most frequent confusion."""
    confused = plotting.plot_confusions(embeddings, labels, pairs=pairs, **by)
    near = plotting.plot_neighbours(embeddings, labels, queries=queries, k=k, **by)
    of_pairs = (
        "Samples beside their nearest neighbour (dashed frame), of another class."
    )
    of_near = (
        "The nearest others, ✓ right or ✗ wrong (dashed), with class and distance."
    )
    if by["groups"] is not None:
        of_pairs += " Rows of the class and group of a sample are no neighbours."
        of_near += " ⊘ left out (dotted): of the class and group of the sample."
    photos = by["images"] is not None
    sheets = [_chart(confused, of_pairs, photos), _chart(near, of_near, photos)]
    # The label of the chart is its title, then the heading of the first confusion, if any.
    worst = f"{confused.get_label()}\n".split("\n")[1]
    return page.section("Samples", "", page.charts(sheets)), worst


def settings(model: Any, params: Mapping[str, Any]) -> str:
    """The losses, the optimizer, the size of the model and the length of the training."""
    facts = []
    for loss in filter(None, keras.tree.flatten(getattr(model, "loss", None))):
        name = loss if isinstance(loss, str) else getattr(loss, "__name__", None)
        values = {word: getattr(loss, word, None) for word in _SETTINGS}
        given = [
            f"{word} {value}" for word, value in values.items() if value is not None
        ]
        facts.append(", ".join([name or type(loss).__name__, *given]))
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        rate = float(optimizer.learning_rate)
        facts.append(f"{type(optimizer).__name__}, learning rate {rate:.3g}")
    facts.append(f"{model.count_params():,} parameters")
    facts.append(f"{params.get('epochs')} epochs of {params.get('steps')} steps")
    return " · ".join(facts)


def best_epoch(
    epochs: Sequence[int], history: _History, results: Mapping[int, Any]
) -> tuple[int, str] | None:
    """The epoch of the highest `map@r`, or else of the least loss; and a sentence on it.

    With groups `map` takes the place of `map@r`: it is what is asked across groups. None
    if there are fewer than two epochs to compare.
    """
    kinds: dict[str, dict[int, float]] = {
        name: dict(zip(epochs, history[name], strict=True))
        for name in ("val_loss", "loss")
        if name in history
    }
    word = "map" if any("map" in one for one in results.values()) else "map@r"
    held_out = {epoch: one.get(word, math.nan) for epoch, one in results.items()}
    # The first of these metrics that two epochs have decides.
    for name, values in {word: held_out, **kinds}.items():
        finite = {epoch: one for epoch, one in values.items() if math.isfinite(one)}
        if len(values) < 2 or not finite:
            continue
        choose = max if name == word else min
        best, last = choose(finite, key=finite.__getitem__), max(values)
        value, end = page.digits(finite[best]), page.digits(values[last])
        if values[last] == finite[best]:
            return last, f"The last epoch is the best so far ({name} {value})."
        worse = f"Epoch {best + 1} is the best ({name} {value}); the last one is worse"
        return best, f"{worse} ({end})."
    return None


def lead(
    best: tuple[int, str] | None,
    history: _History,
    results: Mapping[int, Any],
    latest: Look | None,
) -> str:
    """The state of the training in up to three sentences."""
    sentences = [] if best is None else [best[1]]
    if set(plotting.FRACTIONS) <= set(history):
        hard, easy = history["hard"], history["easy"]
        sentences.append(
            f"{hard[-1]:.1%} of the triplets of the last epoch are hard and "
            f"{easy[-1]:.1%} easy (first epoch: {hard[0]:.1%} and {easy[0]:.1%})."
        )
    measured = [figures for figures in results.values() if figures]
    if measured and latest is not None:
        first, last = measured[0], measured[-1]
        # Rows of the class and group of a sample are no neighbours.
        apart = " in another group" if _has_groups(last) else ""
        sentences.append(
            f"Of {last['queries']} held-out samples {last['recall@1']:.1%} have a nearest "
            f"neighbour of their own class{apart} (first: {first['recall@1']:.1%})"
            + (f"; most often {latest.worst}." if latest.worst else ".")
        )
    return " ".join(sentences)


def tiles(
    best: tuple[int, str] | None,
    history: _History,
    results: Mapping[int, Any],
    alarms: Sequence[Alarm] | None,
) -> list[tuple[str, str]]:
    """The names and latest values of the most important metrics."""
    values = {
        name.replace("_", " "): history[name][-1] for name in _TILES if name in history
    }
    for figures in filter(None, results.values()):
        values |= {name: figures[name] for name in _HELD_OUT_TILES if name in figures}
    shown = [(name, page.digits(value)) for name, value in values.items()]
    if best is not None:
        shown.append(("best epoch", str(best[0] + 1)))
    return shown if alarms is None else [*shown, ("alarms", str(len(alarms)))]


def held_out_section(latest: Look | None, results: Mapping[int, Any]) -> str:
    """The table of metrics (first, best, latest) and the charts of held-out data."""
    # An epoch whose embeddings are not finite has no figures.
    measured = {epoch: figures for epoch, figures in results.items() if figures}
    heading, broken = "Held-out data", ""
    if len(measured) < len(results):
        broken = (
            f"After epoch {max(set(results) - set(measured)) + 1} the embeddings were "
            "not finite: the training has diverged."
        )
    if latest is None:
        return page.section(heading, broken, "")
    epochs = sorted(measured)
    counts = measured[epochs[-1]]
    rows = []
    for name in (
        *_RETRIEVAL,
        *(_OF_GROUPS if _has_groups(counts) else ()),
        "auc",
        "eer",
    ):
        values = {epoch: measured[epoch][name] for epoch in epochs}
        choose = min if name == "eer" else max
        best = choose(epochs, key=values.__getitem__)
        figures = {
            key: [measured[epoch].get(key, math.nan) for epoch in epochs]
            for key in (name, *_ends_of(name))
        }
        rows.append(
            (
                name,
                [
                    page.spark(
                        name, list(values.values()), bands=_bands(name, figures)
                    ),
                    page.number(values[epochs[0]]),
                    page.number(values[best], f"({best + 1})"),
                    page.number(values[epochs[-1]], _between(name, figures)),
                ],
            )
        )
    columns = ["figure", "curve", f"epoch {epochs[0] + 1}", "best"]
    table = page.table([*columns, f"epoch {epochs[-1] + 1}"], rows)
    hint = f"{_how_measured(counts)}. {broken}"
    return page.section(heading, hint, f"{table}<br>\n{latest.charts}")


def _how_measured(counts: Mapping[str, float]) -> str:
    """How the held-out samples are looked up and compared, and how many are left out."""
    apart, pairs = "", "all pairs"
    if _has_groups(counts):
        apart = " without the rows of its own class and group"
        pairs = "all pairs, within the groups and across them,"
    words = (
        f"Every sample is looked up among all others{apart}, and {pairs} are compared by "
        "their distance; the epoch of the best value is in brackets."
        f"{_interval_told(counts)} {counts['queries']} queries"
    )
    lone = {
        "without a positive": counts["lone_queries"],
        "with positives of their own group only": counts.get(_ACROSS, 0),
    }
    told = [f"{count} {why}" for why, count in lone.items() if count]
    return f"{words}, and {' and '.join(told)}, left out" if told else words


def _interval_told(counts: Mapping[str, float]) -> str:
    """What the shade and the notes of the latest values are; "" without intervals."""
    if "interval" not in counts:
        return ""
    level, classes = counts["interval"], counts["classes"]
    words = (
        f" Shade and note of the latest value: the {100 * level:.4g} % interval, within "
        "which the figure would move if the classes were others."
    )
    if classes >= FEW_CLASSES:
        return words
    return (
        f"{words} It is rough: the classes are worth {classes:.1f} classes of equal size, "
        f"and how much classes differ is hardly known from fewer than {FEW_CLASSES}."
    )


def _has_groups(figures: Mapping[str, float]) -> bool:
    """Whether rows of the class and group of a query were left out of these figures."""
    return _ACROSS in figures


def mining_section(epochs: Sequence[int], history: _History) -> str:
    """The stacked fractions of training and validation; "" if the logs have none."""
    charts = [
        _chart(plotting.plot_mining(history, prefix=prefix, epochs=epochs))
        for prefix in ("", "val_")
        if {prefix + key for key in plotting.FRACTIONS} <= set(history)
    ]
    if not charts:
        return ""
    return page.section(
        "Mining",
        "Hard: a negative is nearer than the positive; this should fall. Semi-hard: "
        "farther, but by less than the margin; from this the loss learns. Easy: done.",
        page.charts(charts),
    )


def alarms_section(alarms: Sequence[Alarm] | None) -> str:
    """The alarms; "" if they are None, because nothing watches for any."""
    if alarms is None:
        return ""
    if not alarms:
        return page.section("Alarms", "None from CollapseGuard so far.", "")
    return page.section(
        "Alarms",
        "The alarms of the training, each with remedies to try.",
        page.bullets(alarm.message for alarm in alarms),
        "alarms",
    )


def logs_section(history: _History) -> str:
    """Every key of the logs: curve, first and latest value, latest of the validation."""
    rows = []
    ends = {end for key in history if _has_ends(key, history) for end in _ends_of(key)}
    names = dict.fromkeys(
        key.removeprefix("val_") for key in history if key not in ends
    )
    # The loss comes first, the others stay in the order of the logs.
    for name in sorted(names, key="loss".__ne__):
        train, held = history.get(name, ()), history.get(f"val_{name}", ())
        bands = {**_bands(name, history), **_bands(f"val_{name}", history, "held")}
        rows.append(
            (
                name,
                [
                    page.spark(name, train, held, bands=bands),
                    page.number(_ends(train)[0]),
                    page.number(_ends(train)[1], _between(name, history)),
                    page.number(_ends(held)[1], _between(f"val_{name}", history)),
                ],
            )
        )
    return page.section(
        "All figures of the logs",
        "Curves and latest values of training (grey) and validation (blue, dashed)"
        f"{', with their intervals (shade, note)' if ends else ''}.",
        page.table(["figure", "curve", "first", "latest", "validation"], rows),
    )


def _ends_of(key: str) -> list[str]:
    """The keys of the ends of the interval of a figure."""
    return [f"{key}_{end}" for end in ENDS]


def _has_ends(key: str, history: _History) -> bool:
    """Whether the history has a figure and both ends of its interval."""
    return {key, *_ends_of(key)} <= set(history)


def _bands(
    key: str, history: _History, kind: str = "train"
) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """Kind of the curve -> the lower and upper ends of its intervals; {} without them."""
    low, high = _ends_of(key)
    return {kind: (history[low], history[high])} if _has_ends(key, history) else {}


def _between(key: str, history: _History) -> str:
    """The interval of the latest value as a note; "" if it is not known."""
    ends = [_ends(history[end])[1] for end in _ends_of(key) if _has_ends(key, history)]
    known = [page.digits(end) for end in ends if end is not None]
    return f"({' – '.join(known)})" if len(known) == 2 else ""


def _ends(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The first and the last value that is not NaN; (None, None) if all are NaN."""
    known = [value for value in values if not math.isnan(value)]
    return (known[0], known[-1]) if known else (None, None)


def _chart(figure: Any, caption: str = "", photos: bool = False) -> str:
    """The HTML of a figure; all figures but sheets of samples get one size."""
    if figure.get_layout_engine() is not None:
        figure.set_size_inches(4.6, 3.4)
        figure.set_layout_engine("tight")  # half the time of "constrained"
    # Photographs are large without loss of quality, and text is blurred with it.
    how = {"quality": 70} if photos else {"lossless": True, "quality": 20}
    file, options = io.BytesIO(), {"method": 2, **how}
    # A dark page inverts charts, which are transparent, but no photographs.
    figure.savefig(
        file, format="webp", dpi=216, transparent=not photos, pil_kwargs=options
    )
    width = 65 * figure.get_size_inches()[0]
    kind = "photos" if photos else "chart"
    return page.chart(file.getvalue(), kind, width, figure.get_label(), caption)
