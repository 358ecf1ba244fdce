"""Draws the pictures of the documentation from a plan, from docs/streaming.md and from result files.

python scripts/draw_docs.py             every picture, into docs/images/
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(Path(__file__).resolve().parent)]

import draw_scale  # noqa: E402
import svg  # noqa: E402

IMAGES = REPO / "docs" / "images"
RESULTS = REPO / "bench" / "results"
GIB = 2**30


def stream(out: Path) -> None:
    """The parameters of the embedded model in one row, the chunks that they are cut into below, one of them active."""
    from transformers import AutoModelForCausalLM

    import chunkft

    model = AutoModelForCausalLM.from_pretrained(REPO / "chunkft" / "data" / "tiny-llama-bytes")
    plan = chunkft.partition(model, 8)
    active = 4
    picture = svg.Picture(760, 330, "A byte stream of parameters cut into eight chunks; the fifth is active")
    left, width = 20.0, 720.0
    total = sum(chunk.nbytes for chunk in plan)
    colours = {"embed": svg.BLUE, "self_attn": svg.TEAL, "mlp": svg.ORANGE, "lm_head": svg.ROSE}
    picture.text(left, 30, "The weights, in the order of the model, as one stream of bytes", bold=True)
    x = left
    for name, parameter in model.named_parameters():
        size = width * parameter.numel() / sum(p.numel() for p in model.parameters())
        fill = next((c for part, c in colours.items() if part in name), svg.SOFT)
        picture.box(x, 42, max(size - 0.6, 0.4), 30, fill, radius=1)
        x += size
    x = left
    for label, colour in (
        ("embedding", svg.BLUE),
        ("attention", svg.TEAL),
        ("MLP", svg.ORANGE),
        ("head", svg.ROSE),
    ):
        picture.box(x, 80, 11, 11, colour)
        picture.text(x + 16, 90, label, fill=svg.SOFT, size=12)
        x += 92
    picture.text(
        left, 128, f"cut into K = {len(plan)} chunks of equal bytes; one is active for T steps", bold=True
    )
    x, edges = left, []
    for chunk in plan:
        size = width * chunk.nbytes / total
        on = chunk.index == active
        picture.box(x, 140, size - 2, 34, svg.TEAL if on else svg.PALE, svg.TEAL if on else svg.LINE)
        picture.text(
            x + size / 2 - 1, 162, str(chunk.index + 1), "middle", "#ffffff" if on else svg.SOFT, bold=on
        )
        edges.append((x, x + size - 2))
        x += size
    a, b = edges[active]
    for place, colour, words in (
        (0, svg.ORANGE, "gradients"),
        (1, svg.BLUE, "first moments"),
        (2, svg.ROSE, "second moments"),
    ):
        y = 196 + 24 * place
        picture.box(a, y, b - a, 18, colour)
        picture.text(b + 10, y + 14, words, fill=svg.INK, size=12)
    picture.text(b + 130, 214, "exist on the device for this", fill=svg.SOFT, size=12)
    picture.text(b + 130, 231, "chunk only", fill=svg.SOFT, size=12)
    picture.text(a - 12, 214, "those of the others wait in host memory,", "end", svg.SOFT, 12)
    picture.text(a - 12, 231, "or on a disk, until it is their turn", "end", svg.SOFT, 12)
    picture.arrow([(left, 292), (left + width, 292)])
    picture.text(left, 285, "forward pass: the whole model", size=12)
    picture.arrow([(left + width, 312), (a, 312)])
    picture.text(left + width, 307, "backward pass: ends at the active chunk", "end", size=12)
    picture.line(a, 266, a, 318, svg.TEAL, 1.5, "4 3")
    picture.save(out)


# Middles of the states, and how far the arrow of a change bends to the left of its way.
STATES = {
    "HOST": (90, 190),
    "LOADING": (285, 60),
    "IN_USE": (520, 60),
    "RESIDENT": (530, 190),
    "DIRTY": (690, 190),
    "STORING": (265, 285),
    "POISONED": (690, 300),
}
BENDS = {
    ("HOST", "LOADING"): 14,
    ("HOST", "IN_USE"): 9,
    ("IN_USE", "RESIDENT"): 16,
    ("RESIDENT", "IN_USE"): 16,
    ("IN_USE", "DIRTY"): 16,
    ("DIRTY", "IN_USE"): 16,
    ("IN_USE", "HOST"): 9,
    ("STORING", "HOST"): 10,
    ("POISONED", "HOST"): 135,
    ("RESIDENT", "HOST"): -8,
}


def changes(page: str) -> list[tuple[str, str, str]]:
    """From, to and cause of every change in the diagram of docs/streaming.md."""
    block = re.search(r"^```mermaid\nstateDiagram-v2\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    if block is None:
        raise ValueError("docs/streaming.md holds no mermaid state diagram")
    found = re.findall(r"^ *(\w+) --> (\w+): (.+)$", block[1], re.MULTILINE)
    unknown = {state for change in found for state in change[:2]} - STATES.keys()
    if unknown:
        raise ValueError(
            f"docs/streaming.md names states that have no place in the picture: {sorted(unknown)}"
        )
    return found


def bezier(
    a: tuple[float, float], c: tuple[float, float], b: tuple[float, float], t: float
) -> tuple[float, float]:
    """The point at `t` of the curve from `a` to `b` with the handle `c`."""
    return tuple((1 - t) ** 2 * p + 2 * t * (1 - t) * q + t * t * r for p, q, r in zip(a, c, b, strict=True))  # type: ignore[return-value]


def states(out: Path) -> None:
    """The states of a page and what changes them, as docs/streaming.md has it: each arrow has a number, told below."""
    found = changes((REPO / "docs" / "streaming.md").read_text())
    rows = -(-len(found) // 2)
    top = 415
    picture = svg.Picture(760, top + 22 * rows + 14, "The states of a page and what changes them")
    half_w, half_h = 47.0, 17.0

    def outside(point: tuple[float, float], middle: tuple[float, float]) -> bool:
        return abs(point[0] - middle[0]) > half_w + 2 or abs(point[1] - middle[1]) > half_h + 2

    picture.arrow([(22, 190), (90 - half_w - 2, 190)])
    for number, (source, target, cause) in enumerate(found, 1):
        a, b = STATES[source], STATES[target]
        length = ((b[0] - a[0]) ** 2 + (b[1] - a[1]) ** 2) ** 0.5
        bend = 2 * BENDS.get((source, target), 0)
        handle = (
            (a[0] + b[0]) / 2 + bend * (b[1] - a[1]) / length,
            (a[1] + b[1]) / 2 - bend * (b[0] - a[0]) / length,
        )
        steps = [i / 200 for i in range(201)]
        first = next(t for t in steps if outside(bezier(a, handle, b, t), a))
        last = next(t for t in reversed(steps) if outside(bezier(a, handle, b, t), b))
        start, end = bezier(a, handle, b, first), bezier(a, handle, b, last)
        middle = bezier(a, handle, b, (first + last) / 2)
        # the handle of the part of the curve between the two states
        inner = tuple(2 * m - (p + q) / 2 for m, p, q in zip(middle, start, end, strict=True))
        picture.arrow([start, (inner[0], inner[1]), end])
        picture.dot(*middle, str(number))
        column, row = divmod(number - 1, rows)
        x, y = 26 + 368 * column, top + 22 * row + 8
        picture.dot(x, y - 4, str(number))
        picture.text(x + 16, y, cause, size=11.5)
    for name, (x, y) in STATES.items():
        fill = {"IN_USE": svg.TEAL, "POISONED": svg.ROSE}.get(name, svg.PALE)
        picture.box(x - half_w, y - half_h, 2 * half_w, 2 * half_h, fill, svg.LINE, radius=8)
        picture.text(x, y + 5, name, "middle", "#ffffff" if fill != svg.PALE else svg.INK, 12.5, bold=True)
    picture.save(out)


def card(out: Path) -> None:
    """Predicted bytes of Llama-3-8B on a card of 24 GB, stacked, one row a way to train."""
    cases = json.loads((RESULTS / "memory-predicted.json").read_text())["cases"]
    case = next(c for c in cases if (c["model"], c["tokens"]) == ("llama-3-8b", 1024))
    wanted = (("AdamW, full", 1), ("chunkft, paged", 16), ("chunkft, paged", 32), ("chunkft, paged", 64))
    wanted += (("chunkft, stream", 32), ("chunkft, stream, update in backward", 1))
    rows = [next(r for r in case["rows"] if (r["variant"], r["chunks"]) == key) for key in wanted]
    names = ("weights", "gradients", "state", "activations", "backward")
    colours = (svg.TEAL, svg.ORANGE, svg.BLUE, svg.ROSE, svg.OLIVE)
    picture = svg.Picture(760, 330, "Predicted memory of Llama-3-8B against a card of 24 GB")
    picture.text(20, 30, "Llama-3-8B, bf16, 1,024 tokens: predicted GiB on the device", bold=True)
    x = 20.0
    for name, colour in zip(names, colours, strict=True):
        picture.box(x, 44, 11, 11, colour)
        picture.text(x + 16, 54, name, fill=svg.SOFT, size=12)
        x += 105
    left, right, most = 250.0, 690.0, 40.0
    scale = (right - left) / most
    edge = left + 24 * scale
    for i, row in enumerate(rows):
        y = 78 + 36 * i
        label = row["variant"] + ("" if row["variant"].startswith("AdamW") else f", K={row['chunks']}")
        picture.text(left - 10, y + 16, label.replace(", update in backward", ", backward"), "end", size=12.5)
        x = left
        for name, colour in zip(names, colours, strict=True):
            size = min(scale * row[name] / GIB, right - x)
            picture.box(x, y, max(size, 0), 23, colour, radius=0)
            x += max(size, 0)
        cut = row["peak"] / GIB > most
        if cut:
            picture.arrow([(right, y + 11.5), (right + 16, y + 11.5)])
        # not under the line of the card
        place = edge + 6 if x < edge < x + 40 else x + (20 if cut else 6)
        picture.text(place, y + 16, f"{row['peak'] / GIB:.1f}", size=12.5, bold=True)
    picture.line(edge, 70, edge, 300, svg.INK, 1.5, "5 4")
    picture.text(edge, 318, "24 GiB", "middle", size=12, bold=True)
    picture.save(out)


def accuracy(out: Path) -> None:
    """Accuracy that each method reaches in the time of full AdamW, with its standard error, from the quality study."""
    from bench import doc_tables

    study = RESULTS / "quality-cpu"
    summary, cost = (json.loads((study / f"{name}.json").read_text()) for name in ("summary", "cost"))
    rows = doc_tables.equal_time(summary, cost)
    picture = svg.Picture(760, 96 + 34 * len(rows), "Accuracy of each method in the time of full AdamW")
    picture.text(20, 30, "Accuracy in the time that full AdamW takes for one epoch, %", bold=True)
    picture.text(
        20, 48, "three seeds each; the line is one standard error to either side", fill=svg.SOFT, size=12
    )
    left, right, low, high = 170.0, 690.0, 74.0, 82.0
    scale = (right - left) / (high - low)
    bottom = 64 + 34 * len(rows)
    for mark in range(int(low), int(high) + 1, 2):
        x = left + scale * (mark - low)
        picture.line(x, 62, x, bottom)
        picture.text(x, bottom + 18, str(mark), "middle", svg.SOFT, 12)
    for i, row in enumerate(rows):
        y = 80 + 34 * i
        score, error = 100 * row["accuracy"], 100 * row["error"]
        x = left + scale * (score - low)
        colour = svg.TEAL if row["method"] == "chunk" else svg.INK if row["method"] == "adamw" else svg.ORANGE
        picture.text(left - 12, y + 5, row["name"], "end")
        picture.line(x - scale * error, y, x + scale * error, y, colour, 2)
        picture.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{colour}"/>')
        picture.text(x, y - 10, f"{score:.1f}", "middle", size=11.5)
    picture.save(out)


def streamed_step(out: Path) -> None:
    """A recorded step of streamed training on a time axis: what computes, and what comes up and goes down meanwhile."""
    found = json.loads((RESULTS / "streamed-step.json").read_text())
    lanes: dict[str, list[tuple[str, float, float]]] = {}
    for lane, label, start, size in found["spans"]:
        lanes.setdefault(lane, []).append((label, start / 1e3, size / 1e3))
    total = lanes["step"][0][2]
    left, right = 120.0, 740.0
    scale = (right - left) / total
    picture = svg.Picture(
        760, 262, "A step of streamed training in time: computation, copies up, copies down"
    )
    picture.text(20, 28, "One step: blocks visit the device while others compute", bold=True)
    x = 20.0
    legend = (("forward", svg.BLUE), ("head", svg.OLIVE), ("recompute and backward", svg.ORANGE))
    legend += (("weights", svg.TEAL), ("gradients", svg.ROSE), ("update, in host memory", svg.SOFT))
    for label, colour in legend:
        picture.box(x, 42, 11, 11, colour)
        picture.text(x + 15, 52, label, fill=svg.SOFT, size=11.5)
        x += 38 + 6.1 * len(label)
    rows = (("compute", 76.0), ("copies up", 124.0), ("copies down", 166.0))
    for name, y in rows:
        picture.text(left - 12, y + 20, name, "end", size=12.5)
        picture.line(left, y + 34, right, y + 34)

    def spans(lane: str, y: float, colour: str, numbers: bool, least: float = 0.8) -> None:
        before = 0.0
        for label, start, size in lanes.get(lane, ()):
            begin, end = max(start, before), start + size  # one is let go when the next one has begun
            before = end if numbers else before
            width = max(scale * (end - begin), least)
            picture.box(left + scale * begin, y, width, 30, colour, svg.PAPER if width > 4 else "none", 1)
            if numbers and width > 9:
                middle = left + scale * (begin + end) / 2
                picture.text(middle, y + 20, label, "middle", "#ffffff", 11.5, bold=True)

    spans("forward", 78, svg.BLUE, True)
    spans("backward", 78, svg.ORANGE, True)
    last, first = lanes["forward"][-1], lanes["backward"][0]
    begin, end = last[1] + last[2], first[1]
    picture.box(left + scale * begin, 78, scale * (end - begin), 30, svg.OLIVE, svg.PAPER, 1)
    for _, start, size in lanes["update"]:
        picture.box(left + scale * start, 78, scale * size, 30, svg.SOFT, svg.PAPER, 1)
    spans("up, blocks", 126, svg.TEAL, False)
    spans("up, tiles", 126, svg.OLIVE, False)
    spans("down", 168, svg.ROSE, False)
    for label, start, size in lanes["up, blocks"]:
        picture.text(left + scale * (start + size / 2), 122, label, "middle", svg.SOFT, 10)
    mark = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if total / step <= 9)
    for tick in range(0, int(total) + 1, mark):
        picture.line(left + scale * tick, 200, left + scale * tick, 205, svg.SOFT)
        picture.text(left + scale * tick, 218, str(tick), "middle", svg.SOFT, 11)
    picture.text(right, 236, "ms", "end", svg.SOFT, 11)
    note = f"{found['model']} Llama of {found['blocks']} blocks, {found['tokens']} tokens; trained: {found['trained']}"
    picture.text(20, 250, f"{note}; one thread computes, one copies", fill=svg.SOFT, size=11)
    picture.save(out)


def streamed_depth(out: Path) -> None:
    """Counted bytes of weights on the device over the number of layers, resident and streamed."""
    cases = json.loads((RESULTS / "streamed-depth.json").read_text())["cases"]
    picture = svg.Picture(
        760, 84 + 56 * len(cases), "Device bytes of weights over depth, resident and streamed"
    )
    picture.text(
        20, 28, "Weights on the device, MiB, counted while a model of so many layers trains", bold=True
    )
    parts = (
        ("blocks", svg.TEAL, "three slots for blocks"),
        ("tiles", svg.OLIVE, "two for tiles of the head"),
    )
    x = 20.0
    for label, colour in (("resident", svg.SOFT), *((words, colour) for _, colour, words in parts)):
        picture.box(x, 42, 11, 11, colour)
        picture.text(x + 16, 52, label, fill=svg.SOFT, size=12)
        x += 40 + 6.6 * len(label)
    left, right = 110.0, 680.0
    scale = (right - left) / max(case["resident"] for case in cases)
    for i, case in enumerate(cases):
        y = 72 + 56 * i
        picture.text(left - 12, y + 25, f"{case['layers']} layers", "end")
        picture.box(left, y, scale * case["resident"], 18, svg.SOFT)
        picture.text(left + scale * case["resident"] + 6, y + 14, f"{case['resident'] / 2**20:.1f}", size=12)
        x = left
        for kind, colour, _ in parts:
            picture.box(x, y + 20, scale * case["streamed"][kind], 18, colour)
            x += scale * case["streamed"][kind]
        total = sum(case["streamed"].values())  # norms are too few to be seen
        picture.text(x + 6, y + 34, f"{total / 2**20:.1f}", size=12, bold=True)
    picture.save(out)


PICTURES: dict[str, Callable[[Path], None]] = {
    "stream.svg": stream,
    "page-states.svg": states,
    "card-24gb.svg": card,
    "equal-time.svg": accuracy,
    "streamed-step.svg": streamed_step,
    "streamed-depth.svg": streamed_depth,
    "scale.svg": draw_scale.scale,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="draw_docs", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=IMAGES)
    args = parser.parse_args()
    for name, draw in PICTURES.items():
        draw(args.out / name)
        print(args.out / name)


if __name__ == "__main__":
    main()
