"""Pictures from the committed JSON of the benchmarks.

python -m bench.plots       every picture whose figures exist, as PNG beside them
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from . import common, pictures, quality

NAMES = {"adamw": "AdamW, full", "badam": "BAdam", "galore": "GaLore", "lorafa": "LoRA-FA"}
COLOURS = {"adamw": "black", "badam": "tab:red", "galore": "tab:purple", "lorafa": "tab:brown"}
CHUNK_COLOURS = {1: "tab:cyan", 4: "tab:blue", 8: "tab:olive", 16: "tab:green", 32: "tab:orange"}


def label(row: dict[str, Any]) -> str:
    """Short name of a configuration."""
    if row["method"] != "chunk":
        return NAMES[row["method"]]
    options = row["options"]
    cut = ", interleaved" if options.get("partition") == "interleaved" else ""
    return f"chunkft K={options['chunks']}, T={options.get('interval', 50)}{cut}"


def colour(row: dict[str, Any]) -> str:
    """One colour a method, one a K."""
    if row["method"] != "chunk":
        return COLOURS[row["method"]]
    return CHUNK_COLOURS.get(row["options"]["chunks"], "tab:gray")


def accuracy_over_k(records: list[dict[str, Any]], out: Path) -> None:
    """Best accuracy of each K against the number of chunks, full AdamW as a line, one panel a run length."""
    rows = quality.best(quality.summarise(records))
    lengths = sorted({r["steps"] for r in rows if r["method"] == "adamw"})
    figure, axes = plt.subplots(1, len(lengths), figsize=(5 * len(lengths), 3.6), squeeze=False, sharey=True)
    for axis, steps in zip(axes[0], lengths, strict=True):
        here = [r for r in rows if r["steps"] == steps]
        for row in here:
            score, error = 100 * row["accuracy"], 100 * row["error"]
            if row["method"] == "chunk":
                continue
            axis.axhline(
                score, color=colour(row), ls="-" if row["method"] == "adamw" else ":", label=label(row)
            )
            if row["method"] == "adamw":
                axis.axhspan(score - error, score + error, color="black", alpha=0.08)
        by_k: dict[int, dict[str, Any]] = {}
        for row in (r for r in here if r["method"] == "chunk"):
            by_k.setdefault(row["options"]["chunks"], row)  # `best` sorts by accuracy
        ks = sorted(by_k)
        axis.errorbar(
            ks,
            [100 * by_k[k]["accuracy"] for k in ks],
            yerr=[100 * by_k[k]["error"] for k in ks],
            marker="o",
            color="tab:green",
            label="chunkft, best setting",
        )
        longer = [r for r in rows if r["method"] == "chunk" and steps < r["steps"] < 2 * steps]
        for row in longer:
            axis.errorbar(
                row["options"]["chunks"],
                100 * row["accuracy"],
                yerr=100 * row["error"],
                marker="s",
                mfc="none",
                color="tab:green",
                label="chunkft, AdamW's time (more steps)",
            )
        axis.set(xscale="log", xlabel="chunks K", title=f"{steps} steps", xticks=ks, xticklabels=ks)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("accuracy, %")
    handles = {name: h for axis in axes[0] for h, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[0][-1].legend(handles.values(), handles.keys(), fontsize=7)
    save(figure, out)


def cost_name(row: dict[str, Any]) -> str:
    """Name under which bench.quality_cost measured the step of this configuration."""
    options = row["options"]
    if row["method"] == "badam":
        return f"BAdam, {options['blocks']} blocks"
    if row["method"] == "chunk":
        cut = ", interleaved" if options.get("partition") == "interleaved" else ""
        return f"chunkft, K={options['chunks']}{cut}" + (
            ", embedding rows seldom" if options.get("seldom") else ""
        )
    return NAMES[row["method"]]


def accuracy_over_steps(records: list[dict[str, Any]], costs: dict[str, Any], out: Path) -> None:
    """Accuracy on dev.tsv during the best run of each method over its steps, and over time in steps of AdamW."""
    rows = quality.best(quality.summarise(records))
    wanted = {quality.family(row): row for row in rows}
    figure, (over_steps, over_time) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    shown: set[tuple[str, int]] = set()
    for name, row in wanted.items():
        kind = (label(row), row["steps"])
        if kind in shown:
            continue
        shown.add(kind)
        runs = [r for r in records if quality.family(r) == name]
        points = [p for p, _ in runs[0]["curve"]] + [row["steps"]]
        scores = [100 * sum(r["curve"][i][1] for r in runs) / len(runs) for i in range(len(runs[0]["curve"]))]
        scores.append(100 * sum(r["probe_accuracy"] for r in runs) / len(runs))
        style = {"color": colour(row), "marker": ".", "lw": 2 if row["method"] == "adamw" else 1}
        over_steps.plot(points, scores, label=f"{label(row)}, {row['steps']} steps", **style)
        share = costs.get(cost_name(row))
        if share is not None:
            over_time.plot([p / share["steps_at_equal_time"] for p in points], scores, **style)
    over_steps.set(xlabel="optimizer steps", ylabel="accuracy on dev.tsv, %")
    over_time.set(xlabel="time, in steps of full AdamW")
    for axis in (over_steps, over_time):
        axis.grid(alpha=0.3)
    over_steps.legend(fontsize=6, ncol=2)
    save(figure, out)


def step_times(result: dict[str, Any], out: Path) -> None:
    """Mean step of each variant over a sweep, with quartiles of single steps."""
    variants = result["variants"]
    figure, axis = plt.subplots(figsize=(6, 3.2))
    means = [v["sweep_mean_ms"] for v in variants.values()]
    low = [max(0.0, v["sweep_mean_ms"] - v["quartiles_ms"][0]) for v in variants.values()]
    high = [max(0.0, v["quartiles_ms"][1] - v["sweep_mean_ms"]) for v in variants.values()]
    axis.barh(list(variants), means, xerr=[low, high], color="tab:green", ecolor="gray")
    axis.axvline(0.55 * variants["adamw"]["sweep_mean_ms"], color="black", ls="--", label="0.55 x AdamW")
    axis.set(xlabel=f"ms a step, mean over a sweep (K={result['chunks']}, T={result['interval']})")
    axis.legend(fontsize=8)
    axis.invert_yaxis()
    save(figure, out)


def memory_bars(result: dict[str, Any], out: Path) -> None:
    """Counted bytes of each variant, stacked: gradients, resident state, masters, saved activations."""
    cases = [c for c in result["cases"] if c["variant"].get("keep_state", True)]
    names = [
        "AdamW, full" if c["variant"]["method"] == "adamw" else f"K={c['variant']['chunks']}" for c in cases
    ]
    figure, axis = plt.subplots(figsize=(6, 3.2))
    left = [0.0] * len(cases)
    for part in ("gradients", "state", "masters", "saved_activations"):
        sizes = [c[part] / 2**20 for c in cases]
        axis.barh(names, sizes, left=left, label=part.replace("_", " "))
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axis.set(xlabel="MiB beside the weights, resident while training")
    axis.legend(fontsize=8)
    axis.invert_yaxis()
    save(figure, out)


def save(figure: Any, out: Path) -> None:
    """Writes a PNG and prints its path."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(out, dpi=130, metadata={"Software": None})
    plt.close(figure)
    print(out)


def draw(results: Path) -> None:
    """Draws every picture whose JSON lies below `results`."""
    runs = common.read_jsonl(results / "quality-cpu" / "runs.jsonl")
    if any(r["method"] == "adamw" for r in runs):
        accuracy_over_k(runs, results / "quality-cpu" / "accuracy_over_k.png")
        cost = results / "quality-cpu" / "cost.json"
        costs = json.loads(cost.read_text())["methods"] if cost.exists() else {}
        accuracy_over_steps(runs, costs, results / "quality-cpu" / "accuracy_over_steps.png")
    single: tuple[tuple[str, Callable[[dict[str, Any], Path], None]], ...] = (
        ("step-cpu", step_times),
        ("step-cpu-1thread", step_times),
        ("memory-cpu", memory_bars),
        ("peers-cpu", pictures.peers),
        ("scaling-cpu", pictures.scaling),
        ("kernels-predicted", pictures.kernels),
        ("kernels-measured", pictures.kernels),
        ("kernels", pictures.kernels),
    )
    for name, plot in single:
        source = results / f"{name}.json"
        if source.exists():
            plot(json.loads(source.read_text()), source.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.plots", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    draw(parser.parse_args().results)


if __name__ == "__main__":
    main()
