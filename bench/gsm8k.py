"""Fine-tunes the embedded model on real text through the command line, stops it halfway, and lets it go on.

    python -m bench.gsm8k

200 steps of `chunkft finetune` on gsm8k's questions and answers (bytes, sequences of 512). The run is stopped
with
SIGTERM after half of the steps and resumed from its checkpoint; the loss is reported as the mean of every 20
steps.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from chunkft.cli.problems import embedded_model_dir

from .common import REPO, RESULTS, data_dir, header, write_json

WINDOW = 20
OPTIONS = {
    "chunks": 8,
    "lr": 2e-3,
    "warmup": 10,
    "batch-size": 2,
    "seq-len": 512,
    "save-every": 50,
    "seed": 0,
}


def steps_done(metrics: Path) -> list[dict[str, Any]]:
    """The records of optimizer steps; a last line that is being written is left out."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return [record for record in map(json.loads, lines) if "loss" in record]


def run(arguments: list[str], out: Path, stop_at: int | None) -> int:
    """Runs the command, with SIGTERM once `stop_at` steps are done, and returns its exit status."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, "-m", "chunkft", *arguments], env=environment)
    while process.poll() is None:
        time.sleep(0.2)
        if stop_at is not None and len(steps_done(out / "metrics.jsonl")) >= stop_at:
            process.send_signal(signal.SIGTERM)
            stop_at = None
    return int(process.returncode)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS / "gsm8k-cpu.json")
    arguments = parser.parse_args()
    data = data_dir("gsm8k") / "train.jsonl"
    options = [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        first = [
            "finetune",
            "--model",
            str(embedded_model_dir()),
            "--data",
            str(data),
            "--steps",
            str(arguments.steps),
        ]
        status = run([*first, *options, "--out", str(out)], out, arguments.steps // 2)
        stopped = steps_done(out / "metrics.jsonl")[-1]["step"]
        saved = (out / "checkpoints" / f"checkpoint-{stopped}" / "optimizer.safetensors").is_file()
        resumed = run(["finetune", "--resume", "--out", str(out)], out, None)
        records = steps_done(out / "metrics.jsonl")
        memory = json.loads((out / "memory.json").read_text())
        complete = (out / "model.safetensors").is_file()
    losses = [record["loss"] for record in records]
    windows = [sum(losses[at : at + WINDOW]) / WINDOW for at in range(0, len(losses) - WINDOW + 1, WINDOW)]
    shown = ["chunkft", "finetune", "--model", "EMBEDDED", "--data", "$CHUNKFT_DATA/gsm8k/train.jsonl"]
    result = header(OPTIONS["seed"]) | {
        "cli": " ".join([*shown, "--steps", str(arguments.steps), *options, "--out", "OUT"]),
        "cli_resumed": "chunkft finetune --resume --out OUT",
        "stopped_by_sigterm": {"status": status, "step": stopped, "checkpoint_saved": saved},
        "resumed": {"status": resumed, "model_saved": complete},
        "steps": [record["step"] for record in records] == list(range(1, arguments.steps + 1))
        and len(records),
        "loss_mean_of_20_steps": [round(value, 4) for value in windows],
        "loss_first": round(windows[0], 4),
        "loss_last": round(windows[-1], 4),
        "step_seconds_median": sorted(record["step_seconds"] for record in records)[len(records) // 2],
        "memory": memory,
    }
    write_json(arguments.out, result)
    print(
        f"loss {windows[0]:.3f} -> {windows[-1]:.3f}; stopped at {stopped} (status {status}),"
        f" resumed: status {resumed}"
    )
    return 0 if resumed == 0 and saved and windows[-1] < windows[0] else 1


if __name__ == "__main__":
    sys.exit(main())
