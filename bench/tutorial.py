"""Runs the commands of docs/tutorial.md and keeps what they print, so that the page shows what a reader will see.

python -m bench.tutorial        4 minutes on a CPU
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import common

OUT = common.RESULTS / "tutorial-cpu.json"
LOSS = common.REPO / "docs" / "images" / "tutorial-loss.png"
MODEL = common.REPO / "chunkft" / "data" / "tiny-llama-bytes"

MATCH = re.compile(r"held-out problems: ([\d.]+)% before, ([\d.]+)% after")


def _children_seconds() -> float:
    """Processor time of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(
    arguments: list[str], folder: Path, stop: Callable[[str], bool] = lambda line: False
) -> dict[str, Any]:
    """Runs `chunkft` with `arguments` in `folder`; sends SIGINT after the first line for which `stop` holds.

    Raises RuntimeError with the output where it fails other than by that signal.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(common.REPO), environment.get("PYTHONPATH", "")])
    start, before = time.monotonic(), _children_seconds()
    process = subprocess.Popen(
        [sys.executable, "-m", "chunkft", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: list[str] = []
    stopped = False
    for line in process.stdout or ():
        lines.append(line.rstrip("\n"))
        if not stopped and stop(line):
            process.send_signal(signal.SIGINT)
            stopped = True
    errors = process.stderr.read() if process.stderr else ""
    status = process.wait()
    if status != (130 if stopped else 0):
        raise RuntimeError(f"chunkft {' '.join(arguments)}: exit status {status}\n{errors}")
    match = MATCH.search("\n".join(lines))
    shown = " ".join(["chunkft", *arguments]).replace(str(MODEL), "chunkft/data/tiny-llama-bytes")
    return {
        "command": shown,
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(_children_seconds() - before, 1),
        "exact_match_percent": match and {"before": float(match[1]), "after": float(match[2])},
        "output": [line.replace(str(folder) + "/", "") for line in lines],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.tutorial", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--picture", type=Path, default=LOSS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {
            "plan": run(["plan", "--model", str(MODEL), "--chunks", "8"], folder),
            "first": run(["finetune", "--out", "runs/first"], folder),
            "stopped": run(
                ["finetune", "--steps", "60", "--out", "runs/second"],
                folder,
                lambda line: line.startswith("step 2"),
            ),
            "resumed": run(["finetune", "--resume", "--out", "runs/second"], folder),
        }
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        args.picture.write_bytes((folder / "runs/first/loss.png").read_bytes())
    common.write_json(args.out, {**common.header(0), "runs": runs})
    for key, found in runs.items():
        print(f"{key:8s} {found['seconds']:7.1f} s  {found['command']}")
    print(args.out)


if __name__ == "__main__":
    main()
