"""Builds the package, runs the tests and every benchmark that this machine can run, in one command.

python -m bench.gpu_suite                 all parts that a run without names takes
python -m bench.gpu_suite step memory     the named parts
python -m bench.gpu_suite --list          what there is
python -m bench.gpu_suite --resume        what an earlier run did not finish
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import common


@dataclass(frozen=True)
class Part:
    """A command of the suite; `{out}` in it is the folder of results.

    `gpu` parts need an accelerator, `extra` ones run by name only. A part that takes more than `limit` seconds is
    stopped.
    """

    name: str
    what: str
    command: tuple[str, ...]
    gpu: bool = False
    extra: bool = False
    limit: float = 120.0

    def argv(self, out: Path) -> list[str]:
        """The command line with this interpreter and the folder filled in."""
        return [sys.executable, *(word.replace("{out}", str(out)) for word in self.command)]


PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
SEVEN = ("--model", "llama-2-7b", "--checkpointing", "--batch", "1", "--tokens", "1024", "--chunks", "32")

# Without what has to be installed or compiled first; one step a sample, as each is long.
PEERS = (
    *("--only", "AdamW", "chunkft", "BAdam", "GaLore", "LoRA", "8-bit"),
    *("--steps", "16", "--rounds", "3", "--per-sample", "4", "--limit", "30"),
)

PARTS = (
    Part(
        "build",
        "the package with its native core",
        ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", "."),
    ),
    Part("gpu-tests", "tests that need a GPU", (*PYTEST, "tests/gpu"), gpu=True, limit=150),
    Part(
        "kernels",
        "kernels against cuBLAS",
        ("-m", "bench.kernels", "--out", "{out}/kernels.json"),
        limit=180,
    ),
    Part(
        "pager",
        "paging against the link",
        ("-m", "bench.pager", "--out", "{out}/pager.json"),
        limit=60,
    ),
    Part(
        "residency",
        "1B parameters: step and memory of every place of state",
        ("-m", "bench.residency", "--out", "{out}/residency-1b.json"),
        gpu=True,
        limit=120,
    ),
    Part(
        "llama-2-7b",
        "the same for Llama-2-7B, 1,024 tokens",
        (
            "-m",
            "bench.residency",
            *SEVEN,
            "--steps",
            "8",
            "--warmup",
            "4",
            "--out",
            "{out}/residency-7b.json",
        ),
        gpu=True,
        limit=180,
    ),
    Part(
        "peers",
        "1B parameters: other methods side by side",
        ("-m", "bench.peer_bench", *PEERS, "--out", "{out}/peers-1b.json"),
        gpu=True,
        limit=180,
    ),
    Part("doctor", "what the machine gives", ("-m", "chunkft", "doctor"), limit=60),
    Part(
        "step",
        "step time on the CPU",
        ("-m", "bench.step", "--out", "{out}/step.json"),
        extra=True,
        limit=1200,
    ),
    Part(
        "memory",
        "counted memory on the CPU",
        ("-m", "bench.memory", "--out", "{out}/memory.json"),
        extra=True,
        limit=600,
    ),
    Part("tests", "the whole test suite", PYTEST, extra=True, limit=3600),
    Part(
        "quality",
        "quality after real fine-tuning, hours",
        ("-m", "bench.quality", "queue", "bench/quality_queue.jsonl"),
        extra=True,
        limit=86400,
    ),
)


def folder_name(device: str) -> str:
    """A device's name as a folder name: lower case, everything but letters and digits a dash."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def select(names: Sequence[str], parts: Sequence[Part] = PARTS, gpu: bool | None = None) -> list[Part]:
    """The named parts in the suite's order; without names all that this machine can run but the extra ones.

    Raises ValueError for a name that does not exist, or one that needs an accelerator where there is none.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    known = {part.name: part for part in parts}
    for name in names:
        if name not in known:
            raise ValueError(f"part {name!r} does not exist; allowed are {', '.join(known)}")
        if known[name].gpu and not gpu:
            raise ValueError(f"part {name!r} needs an accelerator and torch sees none")
    if names:
        return [part for part in parts if part.name in names]
    return [part for part in parts if (gpu or not part.gpu) and not part.extra]


def run_part(part: Part, out: Path, seconds: float = float("inf")) -> dict[str, Any]:
    """Runs one part from the repository root with its output shown; returns exit code and seconds.

    It is stopped after its limit, or after `seconds` if that is less; the exit code is 124 then, as of `timeout`.
    """
    start = time.perf_counter()
    try:
        code = subprocess.run(part.argv(out), cwd=common.REPO, timeout=min(part.limit, seconds)).returncode
    except subprocess.TimeoutExpired:
        code = 124
    return {"part": part.name, "exit_code": code, "seconds": round(time.perf_counter() - start, 1)}


def finished(path: Path) -> list[dict[str, Any]]:
    """Parts that an earlier run at this commit ended without an error."""
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    if before["commit"] != common.commit():
        return []
    return [row for row in before["parts"] if row["exit_code"] == 0]


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu_suite", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help="parts to run (default: all but the extra ones)")
    parser.add_argument("--list", action="store_true", help="show the parts and stop")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what an earlier run at this commit finished"
    )
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for all parts (default 600)")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="default %(default)s")
    args = parser.parse_args()
    if args.list:
        for part in PARTS:
            kind = "GPU" if part.gpu else "any"
            print(f"{part.name:11s} {kind} {'by name' if part.extra else '':8s} {part.what}")
        return 0
    try:
        chosen = select(args.parts)
    except ValueError as error:
        parser.error(str(error))
    out = args.results / folder_name(common.device_name())
    budget = max(args.budget, *(part.limit for part in chosen if part.extra), 0.0)
    rows = finished(out / "suite.json") if args.resume else []
    done = {row["part"] for row in rows}
    start = time.perf_counter()
    for part in chosen:
        if part.name in done and part.name != "build":
            continue
        left = budget - (time.perf_counter() - start)
        row = run_part(part, out, left) if left > 1 else {"part": part.name, "exit_code": 124, "seconds": 0.0}
        rows = [other for other in rows if other["part"] != part.name] + [row]
        verdict = {0: "ok", 124: "OUT OF TIME"}.get(row["exit_code"], f"FAILED with {row['exit_code']}")
        print(f"{part.name:11s} {verdict} {row['seconds']} s", flush=True)
        common.write_json(out / "suite.json", common.header(0) | {"parts": rows})
        if row["exit_code"] != 0 and part.name == "build":
            break
    return 1 if any(row["exit_code"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
