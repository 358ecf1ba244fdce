"""Which model trains on which card, and how fast, as the planner predicts it: nothing is measured.

python -m bench.planner_table                  six public shapes on six cards, into bench/results/planner-table.json
python -m bench.planner_table --models 1B 8B --gpus 8 24 --ram 64
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chunkft
from chunkft.cli.models import quiet_transformers
from chunkft.cli.presets import PRESETS, config_of_preset, preset_named

from . import common

OUT = common.RESULTS / "planner-table.json"
GPUS = (8, 12, 16, 24, 48, 80)
MODELS = tuple(short for short, *_ in PRESETS.values())


def cell(
    model: str, gpu: int, ram: int, disk: int, tokens: int, link: float, tflops: float
) -> dict[str, Any]:
    """The plan of one model on one card."""
    name = preset_named(model)
    if name is None:
        raise ValueError(f"model={model!r} is not known; allowed are {', '.join(MODELS)}")
    plan = chunkft.plan_memory(
        config_of_preset(name),
        gpu=gpu << 30,
        host=ram << 30,
        disk=disk << 30,
        tokens=tokens,
        link=link,
        tflops=tflops,
    )
    return {
        "model": model,
        "name": name,
        "gpu_gib": gpu,
        "fits": plan.fits,
        "change": plan.change,
        "setting": str(plan.setting),
        "arguments": plan.optimizer_arguments(),
        "checkpointing": plan.setting.checkpointing,
        "in_files": plan.setting.in_files,
        "gpu_bytes": plan.gpu.total,
        "host_bytes": plan.host.total,
        "step_seconds": plan.seconds.total,
        "tokens_per_second": plan.batch * plan.tokens / plan.seconds.total,
    }


def markdown(cells: Sequence[dict[str, Any]]) -> str:
    """One row a model, one column a card: tokens a second and how; what is lacking where nothing fits."""
    gpus = sorted({entry["gpu_gib"] for entry in cells})
    models = list(dict.fromkeys(entry["model"] for entry in cells))
    found = {(entry["model"], entry["gpu_gib"]): entry for entry in cells}
    lines = ["| | " + " | ".join(f"{gpu} GiB" for gpu in gpus) + " |", "|---" * (len(gpus) + 1) + "|"]
    for model in models:
        lines.append(f"| {model} | " + " | ".join(_short(found[model, gpu]) for gpu in gpus) + " |")
    return "\n".join(lines)


def _short(entry: dict[str, Any]) -> str:
    if not entry["fits"]:
        return entry["change"]
    arguments = entry["arguments"]
    words = [f"{entry['tokens_per_second']:,.0f} tokens/s", f"K={arguments['chunks']}"]
    if arguments.get("weights") == "stream":
        stay = arguments.get("resident_blocks", 0)
        words.append("streamed weights" + (f", {stay} blocks stay" if stay else ""))
    if arguments.get("residency") == "stream":
        words.append("streamed state")
    if entry["in_files"]:
        words.append("state in files")
    if arguments.get("state_bits") == 8:
        words.append("8-bit moments")
    if entry["checkpointing"]:
        words.append("recomputed blocks")
    return "; ".join(words)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.planner_table", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS), help="GiB")
    parser.add_argument("--ram", type=int, default=256, help="GiB of host memory (default 256)")
    parser.add_argument("--disk", type=int, default=1000, help="GiB for files of state (default 1000)")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step (default 4096)")
    parser.add_argument("--link", type=float, default=25.0, help="GB/s (default 25)")
    parser.add_argument("--tflops", type=float, default=100.0, help="16-bit TFLOP/s (default 100)")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    with quiet_transformers():
        cells = [
            cell(model, gpu, args.ram, args.disk, args.tokens, args.link, args.tflops)
            for model in args.models
            for gpu in args.gpus
        ]
    given = {
        "ram_gib": args.ram,
        "disk_gib": args.disk,
        "tokens": args.tokens,
        "link_gb_s": args.link,
        "tflops": args.tflops,
    }
    header = {**common.header(0), "kind": "predicted", **given}
    common.write_json(args.out, {**header, "cells": cells})
    print(markdown(cells))
    print(args.out)


if __name__ == "__main__":
    main()
