"""Processor time of a training step of every method of the quality benchmark, interleaved step by step.

python -m bench.quality_cost      which number of steps is "equal time" follows from these ratios
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from . import common
from .quality_run import Data, Job, batches, build, load_data, load_model

OUT = common.RESULTS / "quality-cpu" / "cost.json"
HEAD = {"interval": 1, "always_active": "head", "schedule": "random"}
BADAM = {"blocks": 16, "interval": 12, "active_modules": ["classifier."]}
JOBS = {
    "AdamW, full": Job("adamw", 1e-4),
    "GaLore": Job("galore", 1e-4),
    "LoRA-FA": Job("lorafa", 1e-3),
    "BAdam, 16 blocks": Job("badam", 3e-4, options=BADAM),
    "chunkft, K=4": Job("chunk", 2e-4, options={"chunks": 4, **HEAD}),
    "chunkft, K=4, interleaved": Job(
        "chunk", 2e-4, options={"chunks": 4, "partition": "interleaved", **HEAD}
    ),
    "chunkft, K=16": Job("chunk", 3e-4, options={"chunks": 16, **HEAD}),
    "chunkft, K=16, embedding rows seldom": Job(
        "chunk", 3e-4, options={"chunks": 16, "seldom": "embeddings", **HEAD}
    ),
}


def measure(jobs: dict[str, Job], data: Data, steps: int) -> dict[str, dict[str, Any]]:
    """CPU milliseconds a step of each job over `steps` steps, after one untimed step; all see the same batches."""
    runs = {name: build(job, load_model(job.seed))[:2] for name, job in jobs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    stream = batches(data.train, seed=0)
    for step in range(steps + 1):
        batch = next(stream)
        for name, (model, optimizer) in runs.items():
            start = time.process_time()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step > 0:
                seconds[name].append(time.process_time() - start)
    first = sum(next(iter(seconds.values())))
    return {
        name: {
            "mean_ms": 1e3 * sum(times) / len(times),
            "quartiles_ms": [1e3 * q for q in common.quartiles(times)],
            "steps_at_equal_time": first / sum(times),
        }
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.quality_cost", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=18, help="timed steps of each method (default 18)")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured = measure(JOBS, load_data(), args.steps)
    common.write_json(args.out, common.header(0) | {"steps": args.steps, "methods": measured})
    for name, row in measured.items():
        print(
            f"{name:40s} {row['mean_ms']:7.0f} ms of CPU a step, {row['steps_at_equal_time']:.2f} x the steps of AdamW"
        )


if __name__ == "__main__":
    main()
