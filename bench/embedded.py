"""What fine-tuning the embedded model reaches: exact match on held-out problems, by full AdamW and in chunks.

python -m bench.embedded        8 minutes on two CPU cores; runs that are in the file already are skipped
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import common

OUT = common.RESULTS / "embedded-cpu.json"
OTHERS = 200  # held-out problems of another seed, counted apart by their number of steps
RUNS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw", "steps": 100, "lr": 1e-3},
    "K=8, low rate": {"chunks": 8, "steps": 300, "lr": 1e-3},
    "K=8, short": {"chunks": 8, "steps": 300, "lr": 3e-3},
    "K=16": {"chunks": 16, "steps": 400, "lr": 4e-3},
    "K=8": {"chunks": 8, "steps": 400, "lr": 3e-3},
}


def arguments(options: dict[str, Any]) -> list[str]:
    """Options of `chunkft finetune` for one run."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def by_steps(folder: Path) -> dict[str, dict[str, float]]:
    """Exact match of the model in `folder` on other held-out problems: of one step, and of two."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from chunkft.cli import problems

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = problems.generate(OTHERS, 1, "heldout")
    two = [p for p in found if " Then " in p["prompt"]]
    one = [p for p in found if " Then " not in p["prompt"]]
    return {
        name: {"problems": len(part), "percent": 100 * problems.exact_match(model, tokenizer, part)}
        for name, part in (("one", one), ("two", two))
    }


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Fine-tunes in a process of its own; raises CalledProcessError where that fails."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(common.REPO), os.environ.get("PYTHONPATH", "")]),
    }
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "run"
        words = ["finetune", *arguments(options), "--out", str(out)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "chunkft", *words], check=True, env=environment, stdout=subprocess.DEVNULL
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        score = json.loads((out / "exact_match.json").read_text())
        return {
            "options": options,
            "command": " ".join(["chunkft", *words[:-1], "OUT"]),
            "problems": score["problems"],
            "before_percent": 100 * score["before"],
            "after_percent": 100 * score["after"],
            "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "other_problems": by_steps(out),
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.embedded", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() else {**common.header(0), "runs": {}}
    for name, options in RUNS.items():
        if name in result["runs"]:
            continue
        found = result["runs"][name] = measure(options)
        common.write_json(args.out, result)
        print(
            f"{name:14s} {found['after_percent']:5.1f} % after {options['steps']} steps, {found['cpu_seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
