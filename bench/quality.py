"""Quality of chunked fine-tuning against full fine-tuning and its peers, as a resumable queue of runs.

python -m bench.quality run '{"method": "adamw", "lr": 1e-4}'      one run, appended to the results
python -m bench.quality queue bench/quality_queue.jsonl            every run of a list that is not done yet
python -m bench.quality grid                                       prints the list of the whole comparison
python -m bench.quality summary                                    means over seeds, best learning rates
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import common
from .quality_run import Job, load_data, train

RUNS = common.RESULTS / "quality-cpu" / "runs.jsonl"
BADAM = {"blocks": 16, "active_modules": ["classifier."]}
GRIDS = {
    "adamw": (3e-5, 5e-5, 1e-4, 2e-4),
    "galore": (3e-5, 1e-4, 2e-4, 4e-4),
    "lorafa": (5e-4, 1e-3, 2e-3, 4e-3),
    "badam": (1e-4, 3e-4, 6e-4, 1e-3),
    4: (1e-4, 2e-4, 3e-4, 6e-4),
    16: (3e-4, 5e-4, 1e-3, 2e-3),
}


def key(record: dict[str, Any]) -> str:
    """Identity of a run: two records with equal keys are the same experiment."""
    fields = {name: record[name] for name in ("method", "lr", "seed", "steps", "options")}
    return json.dumps(fields, sort_keys=True)


def family(record: dict[str, Any], with_lr: bool = True) -> str:
    """What runs that differ in their seed alone share; `with_lr=False` leaves out the learning rate too."""
    names = ("method", "steps", "options") + (("lr",) if with_lr else ())
    return json.dumps({name: record[name] for name in names}, sort_keys=True)


def grid_of(job: dict[str, Any]) -> tuple[float, ...]:
    """The four learning rates that the search of a method tries on seed 0."""
    return GRIDS[job["options"]["chunks"] if job["method"] == "chunk" else job["method"]]


def grid() -> list[dict[str, Any]]:
    """Runs of seed 0 of the whole comparison: one and three epochs, four learning rates a method."""
    families: list[dict[str, Any]] = [{"method": m, "options": {}} for m in ("adamw", "galore", "lorafa")]
    families += [{"method": "badam", "options": BADAM | {"interval": t}} for t in (1, 5, 12)]
    for chunks in (4, 16):
        for interval in (1, 5, 20):
            for always in ("head", None):
                options = {
                    "chunks": chunks,
                    "interval": interval,
                    "always_active": always,
                    "schedule": "random",
                }
                families.append({"method": "chunk", "options": options})
    return [
        f | {"lr": lr, "seed": 0, "steps": steps}
        for steps in (200, 600)
        for f in families
        for lr in grid_of(f)
    ]


def parse(line: str) -> Job:
    """A job from one JSON object; raises TypeError or ValueError where it names no valid run."""
    return Job(**json.loads(line))


def run(job: Job, out: Path) -> dict[str, Any]:
    """Trains `job`, appends its record to `out` in one write and prints it in one line."""
    result = job.record() | train(job, load_data()) | common.header(job.seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(line_of(result), flush=True)
    return result


def line_of(record: dict[str, Any]) -> str:
    """One run in one line."""
    options = " ".join(f"{k}={v}" for k, v in record["options"].items())
    return (
        f"{record['method']:7s} lr={record['lr']:<8g} seed={record['seed']} steps={record['steps']:<5d}"
        f" acc={record['accuracy']:.4f} loss={record['train_loss']:.3f}"
        f" cpu={record['train_cpu_seconds']:.0f}s wall={record['train_wall_seconds']:.0f}s {options}"
    )


def work(queue: Path, out: Path, until: float) -> None:
    """Runs the jobs of `queue` in order, each in a process of its own, until Unix time `until`.

    The list is read anew before each job, so it can be extended and reordered meanwhile; a job that fails is
    reported and not tried again by this process.
    """
    failed: set[str] = set()
    while time.time() < until:
        done = {key(r) for r in common.read_jsonl(out)} | failed
        open_jobs = [j for j in common.read_jsonl(queue) if key(Job(**j).record()) not in done]
        if not open_jobs:
            return
        job = Job(**open_jobs[0]).record()
        command = [
            sys.executable,
            "-m",
            f"{common.PACKAGE}.quality",
            "run",
            json.dumps(job),
            "--out",
            str(out),
        ]
        try:
            code = subprocess.run(command, cwd=common.REPO, timeout=max(1.0, until - time.time())).returncode
        except subprocess.TimeoutExpired:
            print(f"stopped at the deadline: {job}", flush=True)
            return
        if code != 0:
            print(f"failed with exit code {code}: {job}", flush=True)
            failed.add(key(job))


def summarise(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a configuration: mean accuracy over its seeds, the error of that mean, and seconds of training.

    The error adds the sampling error of the test set, sqrt(p(1-p)/n), to the spread over seeds.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[family(record)].append(record)
    rows = []
    for group in groups.values():
        scores = torch.tensor([r["accuracy"] for r in group], dtype=torch.float64)
        mean = scores.mean().item()
        sampling = mean * (1 - mean) / group[0]["test_sentences"]
        spread = scores.var(unbiased=True).item() / len(scores) if len(scores) > 1 else 0.0
        rows.append(
            {name: group[0][name] for name in ("method", "lr", "steps", "options")}
            | {
                "seeds": sorted(r["seed"] for r in group),
                "accuracy": mean,
                "error": math.sqrt(sampling + spread),
                "cpu_seconds": math.fsum(r["train_cpu_seconds"] for r in group) / len(group),
            }
        )
    return rows


def best(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every method, option set and run length the row with the best learning rate, most accurate first.

    A rate that was run with more seeds goes before one with fewer, whose mean may be luck.
    """

    def merit(row: dict[str, Any]) -> tuple[int, float]:
        return len(row["seeds"]), row["accuracy"]

    top: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = family(row, with_lr=False)
        if name not in top or merit(row) > merit(top[name]):
            top[name] = row
    return sorted(top.values(), key=lambda row: (row["steps"], -row["accuracy"]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.quality", description=__doc__.split("\n")[0])
    sub = parser.add_subparsers(dest="command", required=True)
    one = sub.add_parser("run", help="one run, given as JSON")
    one.add_argument("job")
    many = sub.add_parser("queue", help="work through a JSON-lines list of runs")
    many.add_argument("file", type=Path)
    many.add_argument("--hours", type=float, default=24.0, help="stop after this long (default 24)")
    listing = sub.add_parser("grid", help="print the list of the whole comparison")
    table = sub.add_parser("summary", help="print means over seeds")
    table.add_argument("--best", action="store_true", help="only the best learning rate of each method")
    for command in (one, many, listing, table):
        command.add_argument("--out", type=Path, default=RUNS, help="result file (default %(default)s)")
        command.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.command == "run":
        run(parse(args.job), args.out)
    elif args.command == "queue":
        work(args.file, args.out, time.time() + 3600 * args.hours)
    elif args.command == "grid":
        for job in grid():
            print(json.dumps(job))
    else:
        rows = summarise(common.read_jsonl(args.out))
        for row in best(rows) if args.best else rows:
            options = " ".join(f"{k}={v}" for k, v in row["options"].items())
            print(
                f"{row['method']:7s} steps={row['steps']:<5d} lr={row['lr']:<8g}"
                f" acc={100 * row['accuracy']:.2f} +- {100 * row['error']:.2f} n={len(row['seeds'])}"
                f" cpu={row['cpu_seconds']:.0f}s {options}"
            )


if __name__ == "__main__":
    main()
