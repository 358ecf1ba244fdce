"""Pieces of the report: text, tables, bars and lines as HTML that needs no script and nothing from elsewhere."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

FILLS = 6
LONG_SERIES = 12  # as many numbers still stand in a cell; more are drawn
LONG_TEXT = 48


def escape(text: object) -> str:
    """Text for any place in a page."""
    return html.escape(str(text))


def number(value: object) -> str:
    """A JSON scalar as people read it: at most six significant digits, thousands separated."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        if value and not 1e-4 <= abs(value) < 1e9:
            return f"{value:.4g}"
        digits = max(0, 5 - max(0, math.floor(math.log10(abs(value))) if value else 0))
        text = f"{value:,.{min(digits, 5)}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return str(value)


def scroll(inner: str, label: str) -> str:
    """A box that scrolls sideways by itself, so that the page does not; reachable by the keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{inner}</div>\n'


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_series(value: object) -> bool:
    """True for a list of two numbers or more."""
    return isinstance(value, list) and len(value) > 1 and all(is_number(v) for v in value)


def cell(value: Any) -> str:
    """A table cell: numbers to the right, long series drawn, other nested values as JSON."""
    if is_series(value):
        if len(value) > LONG_SERIES:
            return f'<td class="text">{series(value)}</td>'
        return f'<td class="text">{", ".join(number(v) for v in value)}</td>'
    if isinstance(value, (dict, list)):
        text = words(value)
        kind = "text long" if len(text) > LONG_TEXT else "text"
        return f'<td class="{kind}">{escape(text)}</td>'
    text = number(value)
    if is_number(value) or value is None or isinstance(value, bool):
        return f"<td>{escape(text)}</td>"
    return f'<td class="{"text long" if len(text) > LONG_TEXT else "text"}">{escape(text)}</td>'


def words(value: Any) -> str:
    """A nested JSON value in one line: entries joined by commas, those that are nested by semicolons."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {words(v)}" for k, v in value.items())
    if isinstance(value, list):
        nested = any(isinstance(v, (dict, list)) for v in value)
        return ("; " if nested else ", ").join(map(words, value)) or "none"
    return number(value)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], label: str) -> str:
    """A table in a box of its own; a row may be shorter than the head."""
    texts = {i for i in range(len(head)) if any(i < len(row) and not is_number(row[i]) for row in rows)}
    cells = "".join(f"<th{' class=text' if i in texts else ''}>{escape(h)}</th>" for i, h in enumerate(head))
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>\n" for row in rows)
    return scroll(f"<table>\n<thead><tr>{cells}</tr></thead>\n<tbody>\n{body}</tbody></table>", label)


def series(values: Sequence[float]) -> str:
    """A long series of numbers: a small picture, how many, and their least, median and largest."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    points = " ".join(
        f"{'M' if i == 0 else 'L'}{1 + 98 * i / (len(values) - 1):.1f} {19 - 18 * (v - low) / span:.1f}"
        for i, v in enumerate(values)
    )
    picture = (
        f'<svg class="spark" viewBox="0 0 100 20" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="line s0" vector-effect="non-scaling-stroke" d="{points}"/></svg>'
    )
    middle = statistics.median(values)
    return f"{picture} {len(values)} values, {number(low)} to {number(high)}, median {number(middle)}"


def bars(
    rows: Sequence[tuple[str, Sequence[float], tuple[float, float] | None]],
    unit: str,
    label: str,
    digits: int | None = 1,
) -> str:
    """Bars, one a row: name, parts that are stacked, and a range that is drawn over them (or None).

    Sums are written with `digits` decimals, or as in tables (None). One below zero is drawn as nothing.
    """
    largest = max((max(sum(parts), spread[1] if spread else 0.0) for _, parts, spread in rows), default=0.0)
    scale = 100 / largest if largest > 0 else 0.0
    body = []
    for name, parts, spread in rows:
        spans = "".join(
            f'<span class="f{i % FILLS}" style="width:{scale * max(part, 0):.3f}%"></span>'
            for i, part in enumerate(parts)
        )
        if spread is not None:
            low, high = (max(v, 0.0) for v in spread)
            spans += f'<span class="spread" style="left:{scale * low:.3f}%;width:{scale * (high - low):.3f}%"></span>'
        total = f"{number(sum(parts)) if digits is None else f'{sum(parts):,.{digits}f}'} {unit}".strip()
        cells = (("name", escape(name)), ("track", spans), ("value", escape(total)))
        inner = "".join(f'<div class="{kind}">{content}</div>' for kind, content in cells)
        body.append(f'<div class="bar">{inner}</div>\n')
    return f'<div class="bars" role="img" aria-label="{escape(label)}">\n{"".join(body)}</div>\n'


def legend(names: Sequence[str]) -> str:
    """Names of the colours that `bars` and `lines` use, in their order."""
    items = "".join(f'<li><i class="f{i % FILLS}"></i>{escape(n)}</li>' for i, n in enumerate(names))
    return f'<ul class="legend">{items}</ul>\n'


def figure(inner: str, caption: str) -> str:
    return f"<figure>{inner}<figcaption>{escape(caption)}</figcaption></figure>\n"


def lines(curves: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """Curves over one pair of axes as inline SVG, with a legend where there are several."""
    points = [p for curve in curves.values() for p in curve]
    left, right, top, bottom = 44.0, 412.0, 18.0, 184.0
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    marks = ticks(min(p[1] for p in points), max(p[1] for p in points))
    y0, y1 = marks[0], marks[-1]

    def x_of(x: float) -> float:
        return left + (right - left) * (x - x0) / ((x1 - x0) or 1)

    def y_of(y: float) -> float:
        return bottom - (bottom - top) * (y - y0) / ((y1 - y0) or 1)

    drawn = [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y_of(m):.1f}" y2="{y_of(m):.1f}"/>'
        f'<text x="{left - 5}" y="{y_of(m) + 4:.1f}" text-anchor="end">{number(m)}</text>'
        for m in marks
    ]
    for place, anchor in ((x0, "start"), (x1, "end")):
        drawn.append(
            f'<text x="{x_of(place):.1f}" y="{bottom + 15}" text-anchor="{anchor}">{number(place)}</text>'
        )
    drawn.append(
        f'<text x="{(left + right) / 2}" y="{bottom + 30}" text-anchor="middle">{escape(x_label)}</text>'
    )
    drawn.append(f'<text x="4" y="11">{escape(y_label)}</text>')
    for i, curve in enumerate(curves.values()):
        path = " ".join(
            f"{'M' if j == 0 else 'L'}{x_of(x):.1f} {y_of(y):.1f}" for j, (x, y) in enumerate(curve)
        )
        drawn.append(f'<path class="line s{i % FILLS}" d="{path}"/>')
    title = escape(f"{y_label} over {x_label}")
    picture = (
        f'<svg class="chart" viewBox="0 0 420 220" role="img" aria-label="{title}">{"".join(drawn)}</svg>\n'
    )
    return picture + (legend(list(curves)) if len(curves) > 1 else "")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` of them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / (count - 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, last + 1)]
