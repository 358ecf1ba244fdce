"""Builds the package, runs the tests and every benchmark that this machine can run, in one command.

python -m bench.gpu_suite                 all parts
python -m bench.gpu_suite step memory     the named parts
python -m bench.gpu_suite --list          what there is
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import common


@dataclass(frozen=True)
class Part:
    """A command of the suite; `{out}` in it is the folder of results, `gpu` parts need an accelerator."""

    name: str
    what: str
    command: tuple[str, ...]
    gpu: bool = False

    def argv(self, out: Path) -> list[str]:
        """The command line with this interpreter and the folder filled in."""
        return [sys.executable, *(word.replace("{out}", str(out)) for word in self.command)]


PARTS = (
    Part("build", "the package with its native core", ("-m", "pip", "install", "--no-deps", "-e", ".")),
    Part("tests", "the test suite", ("-m", "pytest", "-q")),
    Part("step", "step time", ("-m", "bench.step", "--out", "{out}/step.json")),
    Part("memory", "counted memory", ("-m", "bench.memory", "--out", "{out}/memory.json")),
    Part("quality", "quality, hours", ("-m", "bench.quality", "queue", "bench/quality_queue.jsonl")),
)


def folder_name(device: str) -> str:
    """A device's name as a folder name: lower case, everything but letters and digits a dash."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def select(names: Sequence[str], parts: Sequence[Part] = PARTS, gpu: bool | None = None) -> list[Part]:
    """The named parts in the suite's order; without names all that this machine can run but `quality`.

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
    return [part for part in parts if (gpu or not part.gpu) and part.name != "quality"]


def run_part(part: Part, out: Path) -> dict[str, Any]:
    """Runs one part from the repository root with its output shown; returns exit code and seconds."""
    start = time.perf_counter()
    code = subprocess.run(part.argv(out), cwd=common.REPO).returncode
    return {"part": part.name, "exit_code": code, "seconds": round(time.perf_counter() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu_suite", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help="parts to run (default: all but quality)")
    parser.add_argument("--list", action="store_true", help="show the parts and stop")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="default %(default)s")
    args = parser.parse_args()
    if args.list:
        for part in PARTS:
            print(f"{part.name:10s} {'GPU' if part.gpu else 'any':4s} {part.what}")
        return 0
    try:
        chosen = select(args.parts)
    except ValueError as error:
        parser.error(str(error))
    out = args.results / folder_name(common.device_name())
    rows = []
    for part in chosen:
        rows.append(run_part(part, out))
        print(
            f"{part.name:10s} {'ok' if rows[-1]['exit_code'] == 0 else 'FAILED'} {rows[-1]['seconds']} s",
            flush=True,
        )
        common.write_json(out / "suite.json", common.header(0) | {"parts": rows})
        if rows[-1]["exit_code"] != 0 and part.name == "build":
            break
    return 1 if any(row["exit_code"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
