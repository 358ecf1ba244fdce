"""Tables of docs/comparison.md, docs/recipes.md and docs/tutorial.md from result files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GIB = 2**30
# Names of the methods in cost.json by those in summary.json.
COSTS = {"adamw": "AdamW, full", "badam": "BAdam, 16 blocks", "galore": "GaLore", "lorafa": "LoRA-FA"}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# BAdam, whose step is the cheapest, makes this many in the time of an epoch of AdamW; runs of three epochs have more
ONE_EPOCH_OF_TIME = 400


def method_name(row: dict[str, Any]) -> str:
    """A configuration of the quality study in the words of the comparison."""
    if row["method"] == "chunk":
        interleaved = ", interleaved" if row["options"].get("partition") == "interleaved" else ""
        return f"chunkft, K={row['options']['chunks']}{interleaved}"
    return COSTS[row["method"]]


def equal_time(summary: dict[str, Any], cost: dict[str, Any]) -> list[dict[str, Any]]:
    """The configurations that were run for AdamW's time with three seeds, most accurate first, with the share of
    AdamW's time that one step takes.
    """
    rows = []
    for row in summary["rows"]:
        options = row["options"]
        if len(row["seeds"]) < 3 or (row["steps"] == 200) != (row["method"] == "adamw"):
            continue
        if row["steps"] > ONE_EPOCH_OF_TIME:
            continue
        name = method_name(row)
        measured = cost["methods"].get(name + (", embedding rows seldom" if options.get("seldom") else ""))
        measured = measured or cost["methods"].get(name)
        rows.append(
            {"name": name, **row, "step": None if measured is None else 1 / measured["steps_at_equal_time"]}
        )
    best = {
        row["name"]: row for row in sorted(rows, key=lambda r: r["accuracy"])
    }  # of several learning rates
    return sorted(best.values(), key=lambda r: -r["accuracy"])


def accuracy_table(results: Path) -> str:
    """Accuracy of each method in the time that full AdamW takes for one epoch."""
    summary = json.loads((results / "quality-cpu" / "summary.json").read_text())
    cost = json.loads((results / "quality-cpu" / "cost.json").read_text())
    body = [
        [
            row["name"],
            f"{row['lr']:g}",
            str(row["steps"]),
            f"{100 * row['accuracy']:.1f} ± {100 * row['error']:.1f}",
            f"{row['step']:.2f}",
        ]
        for row in equal_time(summary, cost)
    ]
    return markdown(("method", "lr", "steps in the same time", "accuracy, %", "step, x AdamW"), body)


def step_ratios(results: Path) -> str:
    """Step time over full AdamW's, by two clocks."""
    wall = json.loads((results / "step-cpu.json").read_text())["variants"]
    cpu = json.loads((results / "step-cpu-1thread.json").read_text())["variants"]
    names = {"adamw": "AdamW, full", "badam": "BAdam", "chunk": "chunkft"}
    body = [
        [
            name,
            *(f"{v[key]['sweep_mean_ms'] / v['adamw']['sweep_mean_ms']:.2f}" for v in (wall, cpu)),
            f"{cpu[key].get('steady_mean_ms', cpu[key]['sweep_mean_ms']) / cpu['adamw']['sweep_mean_ms']:.2f}",
        ]
        for key, name in names.items()
    ]
    head = ("step, x AdamW", "wall clock, 2 threads", "processor time, 1 thread", "the same without switches")
    return markdown(head, body)


def memory_shares(results: Path) -> str:
    """What training holds beside the weights, in MiB, counted."""
    cases = json.loads((results / "memory-cpu.json").read_text())["cases"]
    parts = ("gradients", "state", "saved_activations")
    body = []
    for case in cases:
        variant = case["variant"]
        if not variant.get("keep_state", True):
            continue
        name = "AdamW, full" if variant["method"] == "adamw" else f"chunkft, K={variant['chunks']}"
        total = sum(case[part] for part in parts)
        body.append([name, *(f"{case[part] / 2**20:.1f}" for part in parts), f"{total / 2**20:.1f}"])
    return markdown(
        ("MiB beside the weights", "gradients", "resident state", "saved activations", "together"), body
    )


def predicted(results: Path, model: str, tokens: int) -> str:
    """Predicted bytes on the device, and of state on the host, for one shape, in GiB."""
    cases = json.loads((results / "memory-predicted.json").read_text())["cases"]
    case = next(c for c in cases if (c["model"], c["tokens"]) == (model, tokens))
    parts = ("weights", "gradients", "state", "activations", "backward", "peak", "host")
    body = [
        [row["variant"], str(row["chunks"]), *(f"{row[part] / GIB:.2f}" for part in parts)]
        for row in case["rows"]
    ]
    head = (
        "predicted, GiB",
        "K",
        "weights",
        "gradients",
        "state",
        "activations",
        "backward pass",
        "together",
    )
    return markdown(head, body)


def embedded(results: Path) -> str:
    """Exact match of the embedded model after fine-tuning."""
    body = []
    for run in json.loads((results / "embedded-cpu.json").read_text())["runs"].values():
        options, others = run["options"], run["other_problems"]
        body.append(
            [
                "AdamW" if options.get("optimizer") == "adamw" else f"chunkft, K={options['chunks']}",
                str(options["steps"]),
                f"{options['lr']:g}",
                f"{run['before_percent']:.1f}",
                f"{run['after_percent']:.1f}",
                *(
                    f"{v['percent'] * v['problems'] / 100:.0f} of {v['problems']}"
                    for v in (others["one"], others["two"])
                ),
                f"{run['cpu_seconds']:.0f}",
            ]
        )
    head = (
        "",
        "steps",
        "lr",
        "before, %",
        "after, %",
        "one-step problems",
        "two-step problems",
        "CPU s",
    )
    return markdown(head, body)


def printed(results: Path, run: str, first: int = 6, last: int = 3) -> str:
    """What a command of the tutorial printed; of its lines of progress the first and the last ones."""
    found = json.loads((results / "tutorial-cpu.json").read_text())["runs"][run]
    progress = [i for i, line in enumerate(found["output"]) if line.startswith("step ") and "/" in line]
    dropped = progress[first:-last] if len(progress) > first + last + 1 else []
    lines = [line for i, line in enumerate(found["output"]) if i not in dropped[1:]]
    shown = ["..." if dropped and line == found["output"][dropped[0]] else line for line in lines]
    return "".join(["```text\n", *(f"{line}\n" for line in shown), "```\n"])


def tables(results: Path) -> dict[str, str]:
    """Every table whose files exist, by the name that the pages' markers use."""
    made: dict[str, tuple[tuple[str, ...], Callable[[], str]]] = {
        "compare-accuracy": (
            ("quality-cpu/summary.json", "quality-cpu/cost.json"),
            lambda: accuracy_table(results),
        ),
        "compare-step": (("step-cpu.json", "step-cpu-1thread.json"), lambda: step_ratios(results)),
        "compare-memory": (("memory-cpu.json",), lambda: memory_shares(results)),
    }
    made["embedded"] = (("embedded-cpu.json",), lambda: embedded(results))
    for name, model, tokens in (
        ("predicted-7b", "llama-2-7b", 1024),
        ("predicted-8b", "llama-3-8b", 1024),
        ("predicted-8b-4096", "llama-3-8b", 4096),
    ):
        made[name] = (("memory-predicted.json",), lambda m=model, t=tokens: predicted(results, m, t))
    for run in ("plan", "first", "stopped", "resumed"):
        made[f"tutorial-{run}"] = (("tutorial-cpu.json",), lambda r=run: printed(results, r))
    return {
        name: make() for name, (files, make) in made.items() if all((results / f).exists() for f in files)
    }
