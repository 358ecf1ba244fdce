"""Step time of full AdamW, BAdam and ChunkAdamW on one Llama, variants interleaved step by step.

python -m bench.step                      the published setup: 28M parameters, 4 x 256 tokens, K=16, 2 threads
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import common, llama

OUT = common.RESULTS / "step-cpu.json"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Variant:
    """A model with its optimizer, and the seconds of each of its steps in parts."""

    def __init__(
        self,
        name: str,
        factory: Callable[[nn.Module], torch.optim.Optimizer],
        size: llama.Size,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.name = name
        self.model = llama.build_model(size)
        self.optimizer = factory(self.model)
        self.clock = clock
        self.compute: list[float] = []
        self.update: list[float] = []

    def step(self, batch: dict[str, torch.Tensor], keep: bool) -> None:
        """One forward, backward, optimizer step and zero_grad; timed apart as compute and update."""
        start = self.clock()
        self.model(**batch).loss.backward()
        middle = self.clock()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = self.clock()
        if keep:
            self.compute.append(middle - start)
            self.update.append(end - middle)

    def steps(self) -> list[float]:
        """Seconds of every kept step."""
        return [c + u for c, u in zip(self.compute, self.update, strict=True)]


def sweep_mean(times: Sequence[float], period: int) -> float:
    """Mean over positions of a sweep of the median over repeats: each chunk counts once, outliers do not."""
    if not times or len(times) % period:
        raise ValueError(f"times has {len(times)} entries: a positive multiple of period={period} is needed")
    repeats = torch.tensor(times, dtype=torch.float64).reshape(-1, period)
    return repeats.quantile(0.5, dim=0).mean().item()


def split_switch(times: Sequence[float], interval: int, at: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Times of the steps that end with a switch (intervals,) and of all others (intervals, interval - 1)."""
    if interval < 2 or len(times) % interval:
        raise ValueError(
            f"interval={interval} with {len(times)} steps: whole intervals of at least 2 steps needed"
        )
    rows = torch.tensor(times, dtype=torch.float64).reshape(-1, interval)
    others = [i for i in range(interval) if i != at % interval]
    return rows[:, at % interval], rows[:, others]


def switch_cost(update: Sequence[float], interval: int, at: int) -> float:
    """Seconds that a switch adds to `optimizer.step()`: the median over intervals.

    `at` is the position in the interval of the step that switches.
    """
    switching, others = split_switch(update, interval, at)
    return (switching - others.quantile(0.5, dim=1)).quantile(0.5).item()


def switch_position(name: str, interval: int) -> int | None:
    """Position in the interval of the step that switches: the last, for BAdam the one before."""
    if name.startswith("adamw"):
        return None
    return interval - 2 if name.startswith("badam") else interval - 1


def measure(
    size: llama.Size,
    chunks: int,
    interval: int,
    sweeps: int,
    chunk_options: Sequence[dict[str, Any]] = ({},),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Times every variant over `sweeps` sweeps of chunks * interval steps, after an untimed one."""
    made = llama.variants(chunks, interval, chunk_options)
    runs = [Variant(name, factory, size, clock) for name, factory in made.items()]
    batch = llama.build_batch(size)
    small = llama.build_batch(llama.Size(vocab=size.vocab, batch=1, tokens=8))
    period = chunks * interval
    for variant in runs:
        variant.step(batch, keep=False)
    for _ in range(period - 1):
        for variant in runs:
            variant.step(small, keep=False)
    for _ in range(sweeps * period):
        for variant in runs:
            variant.step(batch, keep=True)
    return {variant.name: figures(variant, period, interval) for variant in runs}


def figures(variant: Variant, period: int, interval: int) -> dict[str, Any]:
    """Summary of one variant, in milliseconds, with the raw steps."""
    steps = variant.steps()
    low, median, high = common.quartiles(steps)
    result: dict[str, Any] = {
        "sweep_mean_ms": 1e3 * sweep_mean(steps, period),
        "mean_ms": 1e3 * sum(steps) / len(steps),
        "median_ms": 1e3 * median,
        "quartiles_ms": [1e3 * low, 1e3 * high],
        "update_median_ms": 1e3 * common.quartiles(variant.update)[1],
        "steps_ms": [round(1e3 * s, 2) for s in steps],
    }
    at = switch_position(variant.name, interval)
    if at is not None:
        result["switch_ms"] = 1e3 * switch_cost(variant.update, interval, at)
        result["switch_share_of_step"] = result["switch_ms"] / result["sweep_mean_ms"]
        steady = split_switch(steps, interval, at)[1].reshape(-1, (interval - 1) * period // interval)
        result["steady_mean_ms"] = 1e3 * steady.quantile(0.5, dim=0).mean().item()
    return result


def ratios(measured: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean step over a sweep, switches included, over each baseline's in the same run.

    `badam-steady` leaves out the steps in which BAdam switches, which is what long intervals come to.
    """
    bases = {
        name: measured[name]["sweep_mean_ms"] for name in ("adamw", "adamw-fused", "badam", "badam-fused")
    }
    for name in ("badam", "badam-fused"):
        bases[name + "-steady"] = measured[name]["steady_mean_ms"]
    return {
        name: {base: figure["sweep_mean_ms"] / ms for base, ms in bases.items() if not base.startswith(name)}
        for name, figure in measured.items()
        if not name.startswith("adamw")
    }


def line_of(name: str, figure: dict[str, Any], full: dict[str, Any]) -> str:
    """One variant in one line."""
    low, high = figure["quartiles_ms"]
    line = (
        f"{name:12s} {figure['sweep_mean_ms']:8.1f} ms a step over a sweep, median {figure['median_ms']:.1f}"
        f" (quartiles {low:.1f} to {high:.1f}), {figure['sweep_mean_ms'] / full['sweep_mean_ms']:.3f} x AdamW"
    )
    if "switch_ms" in figure:
        line += f", switch {100 * figure['switch_share_of_step']:.1f} % of a step"
    return line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.step", description=__doc__.split("\n")[0])
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--interval", type=int, default=2, help="steps a chunk stays active (default 2)")
    parser.add_argument("--sweeps", type=int, default=2, help="timed sweeps (default 2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu: time of the process, for a busy machine; with --threads 1, or waiting threads count (default wall)",
    )
    parser.add_argument("--tiny", action="store_true", help="a toy size, to try the script")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    size = llama.TINY if args.tiny else llama.Size()
    measured = measure(size, args.chunks, args.interval, args.sweeps, clock=CLOCKS[args.clock])
    result = common.header(0) | {
        "size": vars(size),
        "parameters": sum(p.numel() for p in llama.build_model(size).parameters()),
        "chunks": args.chunks,
        "interval": args.interval,
        "sweeps": args.sweeps,
        "clock": args.clock,
        "variants": measured,
        "ratios": ratios(measured),
    }
    common.write_json(args.out, result)
    for name, figure in measured.items():
        print(line_of(name, figure, measured["adamw"]))


if __name__ == "__main__":
    main()
