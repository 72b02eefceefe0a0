"""The parts of a self-contained HTML page, each a function of plain values.

These functions escape every text. Only an argument called `body` is HTML already.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np

__all__ = [
    "bullets",
    "chart",
    "charts",
    "digits",
    "header",
    "number",
    "page",
    "section",
    "spark",
    "table",
]

# No scripts, no network: the browser loads nothing but the data inside the page.
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
"""

_STYLE = """
:root { color-scheme: light dark; --back: #f4f5f7; --card: #fff; --text: #1c2430;
  --soft: #5b6675; --line: #dfe3e8; --bad: #b5371f; --held: #1668a8;
  --alarm: #fdeceb; }
@media (prefers-color-scheme: dark) {
  :root { --back: #12161c; --card: #1b2129; --text: #e6eaf0; --soft: #9aa5b4;
    --line: #303843; --bad: #ef7a74; --held: #6db3ea; --alarm: #3a2022; }
  .chart { filter: invert(.885) hue-rotate(180deg); }
  .photos { filter: brightness(.9); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5
  system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0; }
p { margin: 0; }
.soft { color: var(--soft); font-size: .875rem; }
.lead { margin: 16px 0 0; max-width: 46em; }
.tiles { display: grid; gap: 12px; margin: 20px 0 0;
  grid-template-columns: repeat(auto-fit, minmax(96px, 1fr)); }
.tiles div, section { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.tiles div { padding: 10px 14px; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
section { margin-top: 20px; padding: 16px 20px; }
section > .soft { margin: 2px 0 14px; max-width: 52em; }
section > .soft:last-child { margin-bottom: 0; }
.alarms { background: var(--alarm); border-color: var(--bad); }
.alarms li { margin: 6px 0; overflow-wrap: anywhere; }
ul { margin: 8px 0 0; padding-left: 1.2em; }
.charts { display: grid; gap: 20px 16px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(380px, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; height: auto; border-radius: 6px; }
figcaption, details { color: var(--soft); font-size: .875rem; margin-top: 6px; }
details p { white-space: pre-line; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; white-space: normal;
  overflow-wrap: anywhere; min-width: 7em; }
thead th { color: var(--soft); font-weight: 500; font-size: .8rem; }
td small { color: var(--soft); }
svg.spark { width: 110px; height: 24px; display: block; margin-left: auto; }
.spark path { fill: none; stroke: var(--soft); stroke-width: 1.5;
  vector-effect: non-scaling-stroke; }
.spark .held { stroke: var(--held); stroke-dasharray: 4 2; }
.spark .band { stroke: none; fill: var(--soft); fill-opacity: .25; }
.spark .band.held { fill: var(--held); }
@media (max-width: 480px) {
  main { padding: 16px 10px 32px; } section { padding: 14px 12px; }
  .tiles { grid-template-columns: repeat(3, 1fr); gap: 6px; }
  .tiles div { padding: 6px 8px; } dt { font-size: .75rem; } dd { font-size: 1rem; }
  svg.spark { width: 40px; } th, td { padding-right: 5px; }
  th:first-child { min-width: 5.5em; } table { font-size: .8rem; } }
"""


def page(title: str, bodies: Iterable[str]) -> str:
    """The whole file."""
    return (
        f"{_HEAD}<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(bodies)}</main>\n</body>\n</html>\n"
    )


def header(
    title: str, notes: Iterable[str], lead: str, tiles: Iterable[tuple[str, str]]
) -> str:
    """Title, lines of notes, one paragraph and a row of (name, value) tiles."""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in tiles
    )
    soft = "".join(f'<p class="soft">{escape(note)}</p>' for note in notes)
    return (
        f"<header><h1>{escape(title)}</h1>{soft}"
        f'<p class="lead">{escape(lead)}</p><dl class="tiles">{cells}</dl></header>\n'
    )


def section(heading: str, hint: str, body: str, kind: str = "") -> str:
    """A section of the page: a heading, a line of explanation and a body."""
    return (
        f'<section class="{kind}"><h2>{escape(heading)}</h2>'
        f'<p class="soft">{escape(hint)}</p>\n{body}</section>\n'
    )


def bullets(lines: Iterable[str]) -> str:
    """A list of lines."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>\n"


def charts(bodies: Iterable[str]) -> str:
    """Charts side by side, on a phone below each other."""
    return f'<div class="charts">{"".join(bodies)}</div>\n'


def chart(image: bytes, kind: str, width: float, words: str, caption: str) -> str:
    """A chart with its caption.

    Args:
        image: the bytes of a WebP file.
        kind: "chart" (black on transparent) or "photos" (on white).
        width: the least width in pixels; on a narrower page the chart scrolls.
        words: the content in words; lines after the first can be unfolded below it.
        caption: how to read the chart.
    """
    data = base64.b64encode(image).decode("ascii")
    alternative, _, more = words.partition("\n")
    if more:
        more = f"<details><summary>In words</summary><p>{escape(more)}</p></details>"
    return (
        f'<figure><div class="scroll"><img class="{kind}" style="min-width:{width:.0f}px"'
        f' alt="{escape(alternative)}" src="data:image/webp;base64,{data}"></div>'
        f"<figcaption>{escape(caption)}</figcaption>{more}</figure>\n"
    )


def table(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Rows of a name (text) and cells (`body`), under a line of column names."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = "".join(
        f'<tr><th scope="row">{escape(name).replace("_", "_<wbr>")}</th>'
        f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"
        for name, cells in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{lines}</tbody></table></div>\n"
    )


def number(value: float | None, note: str = "") -> str:
    """A cell of a table: three digits, and a small note."""
    if value is None:
        return ""
    return digits(value) + (f" <small>{escape(note)}</small>" if note else "")


def digits(value: float) -> str:
    """Three significant digits; whole numbers under a million in full."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def spark(
    name: str,
    train: Sequence[float],
    held: Sequence[float] = (),
    *,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> str:
    """A cell of a table: two curves over the epochs, on one scale (NaN: a gap).

    Args:
        name: of the figure.
        train: a value for each epoch, drawn in grey.
        held: a value for each epoch, drawn in blue and dashed.
        bands: "train" or "held" -> the lower and upper ends around this curve, drawn as
            a shade behind it.
    """
    curves, bands = {"train": train, "held": held}, bands or {}
    finite = [value for value in (*train, *held) if math.isfinite(value)]
    if not finite:
        return ""
    ends = [value for pair in bands.values() for end in pair for value in end]
    spread = [*finite, *(value for value in ends if math.isfinite(value))]
    low, high = min(spread), max(spread)

    def points(values: Sequence[float]) -> np.ndarray:
        # A single value is drawn from edge to edge.
        line = np.repeat(values, 2 if len(values) == 1 else 1)
        # From 22 (the lowest value) up to 2; equal values lie in the middle.
        y = 22 - 20 * ((line - low) / (high - low) if high > low else 0 * line + 0.5)
        return np.stack([np.linspace(0, 100, len(line)), y], axis=1)

    paths = [
        f'<path class="band {kind}" d="{_band(*map(points, pair))}"/>'
        for kind, pair in bands.items()
    ]
    for kind, values in curves.items():
        path = _line(points(values))
        if path:
            paths.append(f'<path class="{kind}" d="{path}"/>')
    label = f"{name}: between {digits(min(finite))} and {digits(max(finite))}"
    return (
        '<svg class="spark" viewBox="0 0 100 24" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{"".join(paths)}</svg>'
    )


def _line(points: np.ndarray) -> str:
    """The path through (n, 2) points; where y is NaN there is a gap."""
    known = np.isfinite(points[:, 1])
    # M moves the pen without drawing: at the beginning and behind a gap.
    pens = np.where(np.r_[False, known][:-1], "L", "M")
    steps = zip(pens, points, strict=True)
    return "".join(f"{pen}{x:.1f} {y:.1f}" for pen, (x, y) in steps if math.isfinite(y))


def _band(low: np.ndarray, high: np.ndarray) -> str:
    """The path around the area between two lines of (n, 2) points.

    Each run without a gap is walked along its lower end and back along its upper end:

        high   <---<---<         <---<
               |       |    NaN  |   |
        low    >--->--->         >--->
    """
    known = np.isfinite(low[:, 1]) & np.isfinite(high[:, 1])
    cuts = np.flatnonzero(np.diff(known)) + 1
    runs = [run for run in np.split(np.arange(len(low)), cuts) if known[run].all()]
    around = [np.concatenate([low[run], high[run[::-1]]]) for run in runs]
    return "".join(f"{_line(one)}Z" for one in around if len(one))
