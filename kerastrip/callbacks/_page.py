"""The parts of a self-contained HTML page, each a function of plain values.

Whatever is text is escaped here; what a function calls `body` is HTML already.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape

# No scripts, no network: the page cannot load anything but what it carries.
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
  --soft: #5b6675; --line: #dfe3e8; --good: #2f7d4f; --bad: #c8413b; --train: #5b6675;
  --held: #1668a8; --alarm: #fdeceb; }
@media (prefers-color-scheme: dark) {
  :root { --back: #12161c; --card: #1b2129; --text: #e6eaf0; --soft: #9aa5b4;
    --line: #303843; --good: #57b47f; --bad: #ef7a74; --train: #9aa5b4;
    --held: #6db3ea; --alarm: #3a2022; }
  img.chart { filter: invert(.885) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5
  system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 0; }
.soft { color: var(--soft); font-size: .875rem; }
.lead { margin: 16px 0 0; max-width: 46em; }
.tiles { display: grid; gap: 12px; margin: 20px 0 0;
  grid-template-columns: repeat(auto-fit, minmax(104px, 1fr)); }
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
.charts { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(380px, 100%), 1fr)); }
figure { margin: 0; }
img { display: block; max-width: 100%; }
.chart { width: 100%; height: auto; border-radius: 6px; }
.charts figcaption { color: var(--soft); font-size: .875rem; margin-top: 4px; }
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
.spark path { fill: none; stroke: var(--train); stroke-width: 1.5;
  vector-effect: non-scaling-stroke; }
.spark .held { stroke: var(--held); }
.cards { display: grid; gap: 18px;
  grid-template-columns: repeat(auto-fill, minmax(min(306px, 100%), 1fr)); }
.thumbs { display: flex; flex-wrap: wrap; gap: 6px; margin-top: 8px; }
.pair { display: flex; gap: 3px; }
.thumb { width: 46px; }
.thumb img { width: 46px; height: 46px; object-fit: contain; border-radius: 4px;
  border: 3px solid var(--line); background: var(--back); }
.thumb figcaption { font-size: .72rem; line-height: 1.25; text-align: center;
  overflow-wrap: anywhere; }
.tiny { image-rendering: pixelated; }
.right img { border-color: var(--good); } .right figcaption { color: var(--good); }
.wrong img { border-color: var(--bad); } .wrong figcaption { color: var(--bad); }
@media (max-width: 480px) {
  main { padding: 16px 10px 32px; } section { padding: 14px 12px; }
  .tiles { grid-template-columns: repeat(4, 1fr); gap: 6px; }
  .tiles div { padding: 6px 8px; } dt { font-size: .75rem; } dd { font-size: 1rem; }
  svg.spark { width: 52px; } th, td { padding-right: 8px; }
  table { font-size: .85rem; } }
"""


def page(title: str, bodies: Iterable[str]) -> str:
    """The whole file."""
    return (
        f"{_HEAD}<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(bodies)}</main>\n</body>\n</html>\n"
    )


def header(title: str, state: str, lead: str, tiles: Iterable[tuple[str, str]]) -> str:
    """Title, state, one paragraph and a row of (name, value) tiles."""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in tiles
    )
    return (
        f'<header><h1>{escape(title)}</h1><p class="soft">{escape(state)}</p>'
        f'<p class="lead">{escape(lead)}</p><dl class="tiles">{cells}</dl></header>\n'
    )


def section(heading: str, hint: str, body: str, kind: str = "") -> str:
    return (
        f'<section class="{kind}"><h2>{escape(heading)}</h2>'
        f'<p class="soft">{escape(hint)}</p>\n{body}</section>\n'
    )


def bullets(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>\n"


def charts(bodies: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(bodies)}</div>\n'


def chart(image: bytes, caption: str, alternative: str) -> str:
    """A figure as PNG, its caption, and in words what it shows."""
    return (
        f'<figure><img class="chart" alt="{escape(alternative)}" src="{_data(image)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
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
    """A cell: three digits, and a small note."""
    if value is None:
        return ""
    return digits(value) + (f" <small>{escape(note)}</small>" if note else "")


def digits(value: float) -> str:
    """Three significant digits; whole numbers under a million in full."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def spark(name: str, train: Sequence[float], held: Sequence[float] = ()) -> str:
    """A cell: values over the epochs as lines of one scale (NaN: a gap)."""
    finite = [value for value in (*train, *held) if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    paths = []
    for kind, values in (("train", train), ("held", held)):
        # A single value is drawn from edge to edge.
        values = list(values) * 2 if len(values) == 1 else values
        pen, steps = "M", []
        for i, value in enumerate(values):
            if not math.isfinite(value):
                pen = "M"
                continue
            x = 100 * i / (len(values) - 1)
            y = 22 - 20 * ((value - low) / (high - low) if high > low else 0.5)
            steps.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        if steps:
            paths.append(f'<path class="{kind}" d="{"".join(steps)}"/>')
    label = f"{name}: between {digits(low)} and {digits(high)}"
    return (
        '<svg class="spark" viewBox="0 0 100 24" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{"".join(paths)}</svg>'
    )


def cards(bodies: Iterable[str]) -> str:
    return f'<div class="cards">{"".join(bodies)}</div>\n'


def card(heading: str, hint: str, body: str) -> str:
    return (
        f'<div><h3>{escape(heading)}</h3><p class="soft">{escape(hint)}</p>'
        f'<div class="thumbs">{body}</div></div>\n'
    )


def thumb(
    image: bytes | None, tiny: bool, alternative: str, lines: Sequence[str], kind: str
) -> str:
    """A small picture over lines of text, or these alone.

    Args:
        image: PNG.
        tiny: whether to enlarge it without a blur.
        alternative: what it shows, in words.
        lines: the text.
        kind: "right", "wrong" or "".
    """
    picture = ""
    if image is not None:
        css = ' class="tiny"' if tiny else ""
        picture = f'<img{css} alt="{escape(alternative)}" src="{_data(image)}">'
    return (
        f'<figure class="thumb {kind}">{picture}'
        f"<figcaption>{'<br>'.join(map(escape, lines))}</figcaption></figure>"
    )


def pair(body: str) -> str:
    return f'<div class="pair">{body}</div>'


def _data(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode('ascii')}"
