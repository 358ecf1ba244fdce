"""The memory of the paper's case as a picture: Llama-2-7B, bf16, 1,024 tokens, 32 chunks, by kind and residency.

python -m bench.memory_picture                                  what bench.predict foresees
python -m bench.memory_picture --measured residency-7b.json     beside it the peaks of a run of bench.residency on a GPU

Above, the whole of it; below, what comes on top of the weights, where the methods differ. The lines are the paper's
figure and the least that resident weights allow: the weights, the inputs of all blocks (checkpointed), and one
block's recompute.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import common, plain_llama, predict

GIB = 2**30
MODEL, TOKENS, BATCH, CHUNKS = "llama-2-7b", 1024, 1, 32
PAPER = 13.72  # arXiv 2605.21177, "GB"; the weights alone are 13.48 of 10^9 bytes, so 2^30 are meant
KINDS = ("weights", "gradients", "state", "activations", "backward")
COLOURS = {
    "weights": "#bdbdbd",
    "gradients": "#de2d26",
    "state": "#756bb1",
    "activations": "#3182bd",
    "backward": "#fdae6b",
}
LABELS = {"backward": "backward: logits' gradients or a block's recompute"}
# variant of bench.predict and its chunks: the line beside the bar, the variant of bench.residency
VARIANTS = {
    ("AdamW, full", 1): ("full AdamW", "adamw"),
    ("chunkft, paged", CHUNKS): (f"paged, K={CHUNKS}", f"paged K={CHUNKS}"),
    ("chunkft, stream", CHUNKS): (f"stream, K={CHUNKS}", f"stream K={CHUNKS}"),
    ("chunkft, stream, update in backward", 1): ("stream, update in backward, K=1", "backward K=1"),
}


@dataclass(frozen=True)
class Bar:
    """One variant: predicted bytes by kind, and the measured peak or why there is none."""

    name: str
    parts: dict[str, int]
    measured: int | None = None
    missing: str = ""

    @property
    def predicted(self) -> int:
        """Bytes of all kinds together."""
        return sum(self.parts.values())


def floor_bytes() -> int:
    """The least with resident weights: weights, the inputs of all blocks, and what a block's recompute keeps."""
    model, shape = predict.shape_of(MODEL), plain_llama.SHAPES[MODEL]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    inputs = shape.layers * BATCH * TOKENS * shape.hidden * next(model.parameters()).element_size()
    return weights + inputs + predict.recomputed_block(model, BATCH, TOKENS)


def bars_of(predicted: dict[str, Any], measured: dict[str, Any] | None = None) -> list[Bar]:
    """A bar for each variant of the case.

    Raises ValueError where `predicted` is no file of bench.predict with the case, or `measured` none of bench.residency
    of this model, tokens, batch and chunks on a GPU.
    """
    case = {"model": MODEL, "tokens": TOKENS, "batch": BATCH}
    found = [c for c in predicted.get("cases", ()) if all(c.get(key) == case[key] for key in case)]
    if len(found) != 1:
        raise ValueError(
            f"the predictions hold {len(found)} cases of {case}, expected one; see bench.predict"
        )
    rows = {(row["variant"], row["chunks"]): row for row in found[0]["rows"]}
    peaks: dict[str, Any] = {}
    if measured is not None:
        settings = measured.get("settings", {})
        wanted = case | {"chunks": CHUNKS, "checkpointing": True}
        off = {key: settings.get(key) for key in wanted if settings.get(key) != wanted[key]}
        if off:
            raise ValueError(f"the measured run has {off}, expected { ({key: wanted[key] for key in off}) }")
        peaks = measured["variants"]
        if not any(result.get("peak_bytes") for result in peaks.values()):
            raise ValueError("the measured run has no peak_bytes: bench.residency counts them on a GPU only")
    bars = []
    for key, (name, variant) in VARIANTS.items():
        if key not in rows:
            raise ValueError(
                f"the predictions lack {key[0]!r} with K={key[1]}; make them anew by bench.predict"
            )
        result = peaks.get(variant, {})
        parts = {kind: rows[key][kind] for kind in KINDS}
        # the benchmark's AdamW keeps its moments in 16 bits and no master: another thing than what is predicted
        peak = None if variant == "adamw" else result.get("peak_bytes")
        bars.append(Bar(name, parts, peak, result.get("error", "")))
    return bars


def measured_in(content: dict[str, Any]) -> dict[str, Any]:
    """The measured run in a file of bench.residency, or in one of bench.gpu_suite, which ran one place a process."""
    if "cases" not in content:
        return content
    runs = [
        row["result"]
        for name, row in content["cases"].items()
        if name.startswith("paper/") and "result" in row
    ]
    variants: dict[str, Any] = {}
    for run in runs:
        settings = run.get("settings", {})
        if settings.get("chunks") == CHUNKS:
            variants |= run.get("variants", {})
    return content | {"settings": runs[0].get("settings", {}) if runs else {}, "variants": variants}


def draw(bars: Sequence[Bar], floor: int, source: str, out: Path) -> None:
    """Draws the bars into a PNG: all of each above, what comes on top of the weights below.

    `floor` is in bytes; `source` is written below the picture.
    """
    from .plots import plt, save

    measured = any(bar.measured for bar in bars)
    small = [bar for bar in bars if bar.predicted < 2 * floor]
    weights = bars[0].parts["weights"]
    figure, (whole, above) = plt.subplots(
        2, 1, figsize=(9.2, 5.6 + 1.2 * measured), gridspec_kw={"height_ratios": [len(bars), len(small)]}
    )
    _panel(whole, bars, 0, measured)
    _panel(above, small, weights, measured)
    whole.set_title(f"{MODEL}, bf16, {TOKENS:,} tokens, batch {BATCH}, blocks recomputed", fontsize=11)
    whole.set_xlabel("GiB held at the peak")
    whole.legend(fontsize=8, loc="lower right", frameon=False)
    above.set_xlabel(f"of these, GiB on top of the weights ({weights / GIB:.2f})\n")
    top = above.get_xaxis_transform()
    for gib, name, style, side in ((floor / GIB, "floor", "--", "right"), (PAPER, "paper", ":", "left")):
        at = gib - weights / GIB
        above.axvline(at, color="black", lw=1, ls=style, zorder=3)
        above.text(at, 1.02, f"{name} {gib:.2f}", transform=top, fontsize=8, ha=side)
    figure.text(0.5, 0.012, source, fontsize=6.5, ha="center", color="#555555")
    save(figure, out)


def _panel(axis: Any, bars: Sequence[Bar], base: int, measured: bool) -> None:
    """Predicted bars from `base` bytes up, stacked by kind; below each, where there is one, the measured peak."""
    height, seen = (0.4 if measured else 0.66), False
    for place, bar in enumerate(bars):
        y = place - (0.21 if measured else 0.0)
        left = 0.0
        for kind in KINDS if not base else KINDS[1:]:
            size = bar.parts[kind] / GIB
            label = LABELS.get(kind, kind) if not place else None
            axis.barh(y, size, height, left=left, color=COLOURS[kind], label=label, zorder=2)
            left += size
        _note(axis, left, y, _text(bar.predicted, base, "predicted"))
        if not measured:
            continue
        y = place + 0.21
        if bar.measured:
            size = (bar.measured - base) / GIB
            label = None if seen else "measured"
            seen = True
            axis.barh(
                y, size, height, color="white", edgecolor="black", hatch="///", lw=0.8, label=label, zorder=2
            )
            share = bar.measured / bar.predicted
            _note(axis, size, y, _text(bar.measured, base, "measured", f", {share:.3f} of predicted"))
        else:
            _note(axis, 0, y, "did not fit" if bar.missing else "not measured")
    axis.set_yticks(range(len(bars)), [bar.name for bar in bars])
    axis.set_ylim(len(bars) - 0.5, -0.5)
    widest = max(max(bar.predicted, bar.measured or 0) - base for bar in bars) / GIB
    axis.set_xlim(0, 1.6 * widest if measured else 1.3 * widest)
    axis.spines[["top", "right"]].set_visible(False)


def _text(nbytes: int, base: int, kind: str, more: str = "") -> str:
    return f"{nbytes / GIB:.2f} {kind}" + (f" (+{(nbytes - base) / GIB:.2f})" if base else "") + more


def _note(axis: Any, x: float, y: float, text: str) -> None:
    """What stands behind a bar, readable over a line."""
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    axis.annotate(
        text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8, bbox=ground, zorder=4
    )


def describe(path: Path, content: dict[str, Any]) -> str:
    """File, commit, and for a measured run the device of a result, in one line."""
    name = path.resolve()
    shown = name.relative_to(common.REPO) if name.is_relative_to(common.REPO) else path
    device = "" if content.get("kind") == "predicted" else f", {content.get('device', 'device not named')}"
    return f"{shown}, commit {content.get('commit', 'unknown')[:12]}{device}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.memory_picture", description=__doc__.split("\n")[0])
    parser.add_argument("--predicted", type=Path, default=predict.OUT, help="JSON of bench.predict")
    parser.add_argument(
        "--measured", type=Path, help="JSON of bench.residency or of bench.gpu_suite, from a GPU"
    )
    parser.add_argument(
        "--out", type=Path, help="PNG (default bench/results/memory-7b-predicted.png or -measured.png)"
    )
    args = parser.parse_args(arguments)
    try:
        predicted = json.loads(args.predicted.read_text())
        measured = measured_in(json.loads(args.measured.read_text())) if args.measured else None
        bars = bars_of(predicted, measured)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    source = "predicted: " + describe(args.predicted, predicted)
    if measured is not None:
        source += "; measured: " + describe(args.measured, measured)
    floor = floor_bytes()
    kind = "predicted" if measured is None else "measured"
    draw(bars, floor, source, args.out or common.RESULTS / f"memory-7b-{kind}.png")
    for bar in bars:
        seen = f", measured {bar.measured / GIB:.2f} GiB" if bar.measured else ""
        print(f"{bar.name:34s} predicted {bar.predicted / GIB:7.2f} GiB{seen}")
    print(f"{'floor with resident weights':34s} {floor / GIB:17.2f} GiB, paper {PAPER}")


if __name__ == "__main__":
    main()
