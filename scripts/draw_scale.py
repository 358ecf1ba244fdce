"""The picture of docs/scale.md, from bench/results/scale-predicted.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log10
from pathlib import Path
from typing import Any

import svg

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
MODEL = "70B"
Line = tuple[str, str, str, list[tuple[int, float]]]  # label, colour, dash, points


def scale(out: Path) -> None:
    """Bytes that a rank sends and holds over the number of ranks, for full AdamW and for chunks."""
    found = json.loads((RESULTS / "scale-predicted.json").read_text())
    cases = [case for case in found["cases"] if case["model"] == MODEL]

    def line(
        label: str, colour: str, dash: str, method: str, value: Callable[[dict[str, Any]], float]
    ) -> Line:
        rows = [(case["ranks"], value(case)) for case in cases if case["method"] == method]
        return label, colour, dash, [(ranks, size) for ranks, size in rows if size > 0]

    picture = svg.Picture(760, 372, f"Bytes that a rank of {MODEL} sends and holds, over the number of ranks")
    picture.text(
        20, 28, f"{MODEL} in 16 bit, K={found['chunks']}, {found['tokens']:,} tokens a rank", bold=True
    )
    sent = [
        line("DDP, AdamW", svg.INK, "", "ddp", lambda case: case["sent"]["own"] / 1e9),
        line("ZeRO-3, AdamW: gathers", svg.SOFT, "5 3", "zero3", lambda case: case["sent"]["gathers"] / 1e9),
        line("ZeRO-3, AdamW: gradients", svg.SOFT, "", "zero3", lambda case: case["sent"]["own"] / 1e9),
        line("chunkft, FSDP2: gathers", svg.TEAL, "5 3", "fsdp2", lambda case: case["sent"]["gathers"] / 1e9),
        line("chunkft, FSDP2: own", svg.TEAL, "", "fsdp2", lambda case: case["sent"]["own"] / 1e9),
        line("chunkft, replicas", svg.ORANGE, "", "replicas", lambda case: case["sent"]["own"] / 1e9),
    ]
    held = [
        line("DDP, AdamW", svg.INK, "", "ddp", lambda case: case["held"]["device"] / 2**30),
        line("ZeRO-3, AdamW", svg.SOFT, "", "zero3", lambda case: case["held"]["device"] / 2**30),
        line("chunkft, replicas", svg.ORANGE, "", "replicas", lambda case: case["held"]["device"] / 2**30),
        line("chunkft, shards of 8", svg.BLUE, "", "hybrid", lambda case: case["held"]["device"] / 2**30),
        line("chunkft, FSDP2", svg.TEAL, "", "fsdp2", lambda case: case["held"]["device"] / 2**30),
    ]
    panel(picture, 58, "GB that a rank sends in a step", sent, (1, 1000))
    panel(picture, 440, "GiB on the device of a rank", held, (10, 1200), 80.0)
    picture.save(out)


def panel(
    picture: svg.Picture,
    left: float,
    title: str,
    lines: Sequence[Line],
    limits: tuple[float, float],
    card: float | None = None,
) -> None:
    """Lines over ranks, both axes logarithmic, and what they are; `card` is what a device has."""
    width, top, bottom = 290.0, 66.0, 262.0
    low, high = map(log10, limits)

    def place(ranks: float, value: float) -> tuple[float, float]:
        return (
            left + width * log10(ranks) / log10(1024),
            bottom - (bottom - top) * (log10(value) - low) / (high - low),
        )

    picture.text(left, 52, title, size=12.5)
    for mark in (1, 10, 100, 1000):
        if limits[0] <= mark <= limits[1]:
            _, y = place(1, mark)
            picture.line(left, y, left + width, y)
            picture.text(left - 6, y + 4, f"{mark:,}", "end", svg.SOFT, 11)
    for mark in (1, 8, 64, 1024):
        x, _ = place(mark, limits[0])
        picture.line(x, bottom, x, bottom + 4, svg.SOFT)
        picture.text(x, bottom + 17, f"{mark:,}", "middle", svg.SOFT, 11)
    picture.text(left + width, bottom + 31, "ranks", "end", svg.SOFT, 11)
    if card is not None:
        _, y = place(1, card)
        picture.line(left, y, left + width, y, svg.ROSE, 1.5, "3 3")
        picture.text(left + width, y - 4, f"a card of {card:g} GiB", "end", svg.ROSE, 11)
    for _, colour, dash, points in lines:
        places = [place(*point) for point in points]
        for (x, y), (u, v) in pairwise(places):
            picture.line(x, y, u, v, colour, 2, dash)
    for i, (label, colour, dash, _) in enumerate(lines):
        column, row = divmod(i, 3)
        x, y = left - 30 + 178 * column, bottom + 52 + 20 * row
        picture.line(x, y, x + 20, y, colour, 2, dash)
        picture.text(x + 26, y + 4, label, fill=svg.SOFT, size=11.5)
