"""A few shapes of SVG for the pictures of the documentation: readable on light and dark pages, in any browser."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

INK, SOFT, LINE, PAPER = "#1f2624", "#5d6764", "#c9cfcc", "#ffffff"
TEAL, ORANGE, BLUE, ROSE, OLIVE = "#00897b", "#e07b39", "#5b7fd1", "#b8577f", "#8a8f3c"
PALE = "#e6eae8"


class Picture:
    """Shapes on a white card of `width` x `height`; `title` is what a screen reader says."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'font-family="system-ui, sans-serif" font-size="13" role="img" aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="{SOFT}"/></marker></defs>',
            f'<rect width="{width:g}" height="{height:g}" rx="8" fill="{PAPER}"/>',
        ]

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str,
        stroke: str = "none",
        radius: float = 2,
        dash: str = "",
    ) -> None:
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{radius:g}" '
            f'fill="{fill}" stroke="{stroke}"{dashed}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        anchor: str = "start",
        fill: str = INK,
        size: float = 13,
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-size="{size:g}"{weight}>'
            f"{escape(words)}</text>"
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, colour: str = LINE, width: float = 1, dash: str = ""
    ) -> None:
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
            f'stroke-width="{width:g}"{dashed}/>'
        )

    def arrow(self, points: Sequence[tuple[float, float]], colour: str = SOFT) -> None:
        """A line through two points, or a curve through the first and last with the others as its handles."""
        start, *rest = (f"{x:.1f} {y:.1f}" for x, y in points)
        kind = {1: "L", 2: "Q", 3: "C"}[len(rest)]
        self.parts.append(
            f'<path d="M{start}{kind}{" ".join(rest)}" fill="none" stroke="{colour}" stroke-width="1.3" '
            'marker-end="url(#tip)"/>'
        )

    def dot(self, x: float, y: float, word: str) -> None:
        """A small disc with a number in it."""
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="{PAPER}" stroke="{SOFT}"/>')
        self.text(x, y + 3.8, word, "middle", size=10.5)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*self.parts, "</svg>", ""]))
