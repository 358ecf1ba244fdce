"""Tables and marked figures of the documentation, written from the JSON of the benchmarks: none is typed by hand.

python -m bench.report            sums up the runs and writes the tables and figures anew
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import bench_tables, common, doc_numbers, doc_tables, planner_table, quality, scale, scale_table
from .doc_tables import markdown

DOC = common.REPO / "docs" / "quality.md"
# Pages whose figures all come from result files.
PAGES = (
    common.REPO / "README.md",
    *(
        common.REPO / "docs" / f"{name}.md"
        for name in (
            "api",
            "benchmarks",
            "cli",
            "comparison",
            "embedded-model",
            "kernels",
            "larger-than-gpu",
            "method",
            "models",
            "profiling",
            "quality",
            "recipes",
            "scale",
            "semantics",
            "streaming",
            "tutorial",
            "trainers/accelerate",
            "trainers/lightning",
            "trainers/pytorch",
            "trainers/torchtitan",
            "trainers/transformers",
            "trainers/trl",
        )
    ),
)
BLOCK = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {
    "adamw": "AdamW, full",
    "badam": "BAdam",
    "galore": "GaLore",
    "lorafa": "LoRA-FA",
    "chunk": "chunkft",
}
DEFAULTS = {"schedule": "cyclic", "partition": "bytes", "always_active": None}


def describe(options: dict[str, Any], method: str) -> str:
    """The options of a run in the words of the documentation, defaults left out."""
    words = []
    if method == "badam":
        words.append(f"{options['blocks']} blocks, T={options['interval']}, head always active")
    if method == "chunk":
        words.append(f"K={options['chunks']}, T={options.get('interval', 50)}")
        if options.get("always_active") == "head":
            words.append("head always active")
        if options.get("schedule", "cyclic") != "cyclic":
            words.append(str(options["schedule"]))
        if options.get("seldom") == "embeddings":
            words.append("embedding rows seldom")
        if options.get("partition", "bytes") != "bytes":
            words.append(str(options["partition"]))
        known = {"chunks", "interval", "seldom", *DEFAULTS}
        words += [f"{k} {v}" for k, v in options.items() if k not in known]
    return ", ".join(words)


def quality_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Table of configurations: accuracy with its error, seeds, steps, CPU seconds."""
    if not rows:
        return "No run yet.\n"
    head = ("method", "setting", "lr", "steps", "accuracy, %", "error", "seeds", "CPU s")
    body = [
        [
            NAMES[r["method"]],
            describe(r["options"], r["method"]) or "-",
            f"{r['lr']:g}",
            str(r["steps"]),
            f"{100 * r['accuracy']:.1f}",
            f"{100 * r['error']:.1f}",
            str(len(r["seeds"])),
            f"{r['cpu_seconds']:.0f}",
        ]
        for r in rows
    ]
    return markdown(head, body)


def best_at(rows: Sequence[dict[str, Any]], low: int, high: int) -> list[dict[str, Any]]:
    """Best learning rate of each setting with low <= steps <= high, most accurate first."""
    chosen = quality.best(r for r in rows if low <= r["steps"] <= high)
    return sorted(chosen, key=lambda r: -r["accuracy"])


def learning_rates(rows: Sequence[dict[str, Any]]) -> str:
    """Settings that were run at two learning rates or more, in order of the rate."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(quality.family(row, with_lr=False), []).append(row)
    several = [g for g in groups.values() if len(g) > 1]
    return quality_rows([r for g in several for r in sorted(g, key=lambda r: r["lr"])])


def step_table(result: dict[str, Any]) -> str:
    """Step times and ratios of one JSON of bench.step."""
    body = []
    for name, v in result["variants"].items():
        full = result["variants"]["adamw"]["sweep_mean_ms"]
        switch = f"{v['switch_ms']:.0f}" if "switch_ms" in v else "-"
        share = f"{100 * v['switch_share_of_step']:.1f}" if "switch_ms" in v else "-"
        quartiles = " to ".join(f"{q:.0f}" for q in v["quartiles_ms"])
        steady = f"{v['steady_mean_ms']:.0f}" if "steady_mean_ms" in v else "-"
        ratio = f"{v['sweep_mean_ms'] / full:.2f}"
        body.append([name, f"{v['sweep_mean_ms']:.0f}", ratio, quartiles, steady, switch, share])
    head = (
        "variant",
        "ms a step",
        "x AdamW",
        "quartiles, ms",
        "without switches, ms",
        "switch, ms",
        "switch, %",
    )
    return markdown(head, body)


def cost_table(result: dict[str, Any]) -> str:
    """CPU time of a step on the encoder, and how many steps fit into the time of AdamW's."""
    body = [
        [
            name,
            f"{m['mean_ms']:.0f}",
            " to ".join(f"{q:.0f}" for q in m["quartiles_ms"][::2]),
            f"{m['steps_at_equal_time']:.2f}",
        ]
        for name, m in result["methods"].items()
    ]
    return markdown(("method", "CPU ms a step", "quartiles, ms", "steps in the time of one of AdamW"), body)


def memory_table(result: dict[str, Any]) -> str:
    """Counted MiB of one JSON of bench.memory."""
    parts = ("gradients", "state", "masters", "state_host", "saved_activations", "peak_rss")
    body = []
    for case in result["cases"]:
        variant = case["variant"]
        name = "AdamW, full" if variant["method"] == "adamw" else f"chunkft, K={variant['chunks']}"
        name += "" if variant.get("keep_state", True) else ", state forgotten"
        body.append([name, *(f"{case[part] / 2**20:.1f}" for part in parts)])
    head = (
        "MiB",
        "gradients",
        "resident state",
        "masters",
        "paged state",
        "saved activations",
        "process peak",
    )
    return markdown(head, body)


def tables(summary: dict[str, Any], results: Path) -> dict[str, str]:
    """Every table by the name that the document's markers use; those without figures are missing."""
    rows = summary["rows"]
    made = {
        "one-epoch": quality_rows(best_at(rows, 200, 200)),
        "equal-time": quality_rows(
            best_at([r for r in rows if r["steps"] != 200 or r["method"] == "adamw"], 101, 599)
        ),
        "three-epochs": quality_rows(best_at(rows, 600, 10**6)),
        "learning-rates": learning_rates(rows),
    }
    single: tuple[tuple[str, str, Callable[[dict[str, Any]], str]], ...] = (
        ("step", "step-cpu", step_table),
        ("step-1thread", "step-cpu-1thread", step_table),
        ("memory", "memory-cpu", memory_table),
        ("cost", "quality-cpu/cost", cost_table),
        ("scaling", "scaling-cpu", bench_tables.scaling),
        ("peers", "peers-cpu", bench_tables.peers),
        ("residency", "residency-cpu", bench_tables.residency),
        ("streamed", "streamed-cpu", bench_tables.streamed),
        ("planner", "planner-table", lambda found: planner_table.markdown(found["cells"]) + "\n"),
        ("scale-bytes", "scale-predicted", scale_table.bytes_table),
        ("scale-memory", "scale-predicted", scale_table.memory_table),
        ("scale-cards", "scale-predicted", scale_table.cards_table),
        ("scale-steps", "scale-predicted", scale_table.step_table),
        ("scale-limits", "scale-predicted", scale_table.limits_table),
        ("scale-counted", "scale-cpu", scale.table),
        ("cross-entropy", "cross-entropy-cpu", bench_tables.cross_entropy),
    )
    for name, file, make in single:
        if (results / f"{file}.json").exists():
            made[name] = make(json.loads((results / f"{file}.json").read_text()))
    return made | doc_tables.tables(results)


def fill(text: str, made: dict[str, str]) -> str:
    """`text` with each marked block replaced by its table; raises KeyError for a marker without figures."""
    return BLOCK.sub(lambda m: m.group(1) + made[m.group(2)] + m.group(3), text)


def summarise(runs: Path, count: int | None = None) -> dict[str, Any]:
    """Summary of the first `count` runs of the file (all without it)."""
    records = common.read_jsonl(runs)[:count]
    return {"runs": len(records), "rows": quality.summarise(records)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("--doc", type=Path, nargs="+", default=PAGES)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    args = parser.parse_args()
    summary = summarise(args.results / "quality-cpu" / "runs.jsonl")
    common.write_json(args.results / "quality-cpu" / "summary.json", summary)
    made = tables(summary, args.results)
    for page in args.doc:
        page.write_text(doc_numbers.refreshed(fill(page.read_text(), made), args.results))
        print(page)
    print(f"from {summary['runs']} runs of the quality study and the other files of {args.results}")


if __name__ == "__main__":
    main()
