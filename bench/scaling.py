"""Step time and memory over the number of chunks K, the interval T, tokens and parameters, beside the theory.

python -m bench.scaling          a small Llama on one CPU thread, CPU time, every point interleaved with full AdamW

A step of full fine-tuning is three products of the same size: forward, gradient of the input, gradient of the weights.
With K chunks the last is needed for one chunk, and the gradient of the input only down to it, on average half of the
way. So the step is (2 + (1 + 1/K) + 2/K) / 6 of full AdamW's if everything else were free, and gradients and state are
1/K of its. The gap is how far the measured ratio lies above that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import chunkft

from . import common, harness, pictures, plain_llama
from .memory import gradient_tensors, resident, unique_bytes

OUT = common.RESULTS / "scaling-cpu.json"
LR = 1e-5
CPU = torch.device("cpu")
FULL_STEPS = 8  # of AdamW a sample, all of them alike; of chunkft whole sweeps, and no fewer steps


@dataclass(frozen=True)
class Point:
    """One setting: shape of the model, chunks, interval, and batch x tokens."""

    model: str = "3M"
    chunks: int = 16
    interval: int = 1
    batch: int = 2
    tokens: int = 64


BASE = Point()
AXES: dict[str, list[Point]] = {
    "chunks": [Point(chunks=k) for k in (1, 4, 16, 64)],
    "interval": [Point(interval=t) for t in (1, 2, 4)],
    "tokens": [Point(tokens=n) for n in (16, 64, 256)],
    "parameters": [Point(model=name) for name in ("tiny", "3M")],
}


def step_theory(chunks: int) -> float:
    """Step time over that of full fine-tuning where only matrix products count."""
    return (2 + (1 + 1 / chunks) + 2 / chunks) / 6


def points(axes: Sequence[str]) -> list[Point]:
    """Every point of the axes once."""
    return list(dict.fromkeys(point for axis in axes for point in AXES[axis]))


def stepping(model: plain_llama.PlainLlama, optimizer: Any, ids: torch.Tensor) -> Callable[[], None]:
    """A training step."""

    def step() -> None:
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bytes_held(
    model: plain_llama.PlainLlama, optimizer: Any, ids: torch.Tensor, steps: int
) -> dict[str, int]:
    """Most bytes of gradients, and of state on the device, over so many steps."""
    most = {"gradients": 0, "state": 0}
    for _ in range(steps):
        model(ids).backward()
        most["gradients"] = max(most["gradients"], unique_bytes(gradient_tensors(model, optimizer)))
        most["state"] = max(most["state"], resident(optimizer)["state"])
        optimizer.step()
        optimizer.zero_grad()
    return most


def check(model: plain_llama.PlainLlama, ids: torch.Tensor, chunks: int) -> str | None:
    """What differs, if the gradients of the active chunk are not those of an ordinary backward pass."""
    named = dict(model.named_parameters())
    whole = dict(zip(named, torch.autograd.grad(model(ids), list(named.values())), strict=True))
    optimizer = chunkft.ChunkAdamW(model, lr=LR, chunks=chunks, interval=1)
    try:
        model(ids).backward()
        for piece, leaf in optimizer.active_parameters():
            wanted = piece.of(whole[piece.name])
            if leaf.grad is None or not torch.allclose(leaf.grad, wanted, atol=1e-6, rtol=1e-3):
                return f"the gradient of {piece.name} differs from autograd's"
        return None
    finally:
        optimizer.detach()


def sweeping(step: Callable[[], None], steps: int) -> Callable[[], None]:
    """So many steps as one call."""

    def run() -> None:
        for _ in range(steps):
            step()

    return run


def measure(point: Point, rounds: int, clock: Callable[[], float] = time.process_time) -> dict[str, Any]:
    """Ratio of step time and of bytes to full AdamW, with the theory's and the gaps; raises CheckFailed."""
    ids = plain_llama.batch_of(point.model, CPU, point.batch, point.tokens)
    fresh = plain_llama.build(point.model, CPU, torch.float32)
    harness.checked({f"K={point.chunks}": lambda: check(fresh, ids, point.chunks)})
    sweep = point.chunks * point.interval
    calls = {"adamw": FULL_STEPS, "chunk": sweep * -(-FULL_STEPS // sweep)}
    held, runs = {}, {}
    for name, steps in calls.items():
        model = plain_llama.build(point.model, CPU, torch.float32)
        optimizer = (
            torch.optim.AdamW(model.parameters(), lr=LR)
            if name == "adamw"
            else chunkft.ChunkAdamW(model, lr=LR, chunks=point.chunks, interval=point.interval)
        )
        held[name] = bytes_held(model, optimizer, ids, 2 * steps)  # the first sweep makes the slots of state
        runs[name] = sweeping(stepping(model, optimizer, ids), steps)
    taken = harness.interleave(runs, rounds, clock, warmup=0)
    seconds = {name: [value / calls[name] for value in values] for name, values in taken.items()}
    found = harness.ratio(seconds["chunk"], seconds["adamw"])
    theory = step_theory(point.chunks)
    shares = {part: held["chunk"][part] / held["adamw"][part] for part in held["adamw"]}
    return {
        "point": asdict(point),
        "adamw_ms": 1e3 * statistics.median(seconds["adamw"]),
        "chunk_ms": 1e3 * statistics.median(seconds["chunk"]),
        "step": asdict(found),
        "step_theory": theory,
        "step_gap": found.ratio / theory - 1,
        "bytes": held,
        "bytes_share": shares,
        "bytes_theory": 1 / point.chunks,
        "bytes_gap": {part: share * point.chunks - 1 for part, share in shares.items()},
        "samples_ms": {name: [1e3 * value for value in values] for name, values in seconds.items()},
    }


def machine_noise(rounds: int, clock: Callable[[], float] = time.process_time) -> float:
    """Noise of full AdamW against itself at the base point."""
    ids = plain_llama.batch_of(BASE.model, CPU, BASE.batch, BASE.tokens)
    runs = {}
    for name in ("adamw", harness.AGAIN):
        model = plain_llama.build(BASE.model, CPU, torch.float32)
        step = stepping(model, torch.optim.AdamW(model.parameters(), lr=LR), ids)
        runs[name] = sweeping(step, FULL_STEPS)
    taken = harness.interleave(runs, rounds, clock)
    return harness.noise_of(harness.ratio(taken[harness.AGAIN], taken["adamw"]))


def line_of(row: dict[str, Any]) -> str:
    """One point in one line."""
    point = row["point"]
    return (
        f"{point['model']:5s} K={point['chunks']:3d} T={point['interval']:2d} {point['batch']} x {point['tokens']:4d}: "
        f"step {harness.Interval(**row['step'])} x AdamW, theory {row['step_theory']:.3f}, gap {row['step_gap']:+.1%};"
        f" gradients {row['bytes_share']['gradients']:.3f}, state {row['bytes_share']['state']:.3f},"
        f" theory {row['bytes_theory']:.3f}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--rounds", type=int, default=5, help="sweeps of each point (default 5)")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    noise = machine_noise(max(args.rounds, 5))
    print(harness.noise_line(noise), flush=True)
    rows = []
    for point in points(args.axes):
        rows.append(measure(point, args.rounds))
        print(line_of(rows[-1]), flush=True)
    settings = {"axes": args.axes, "rounds": args.rounds, "clock": "cpu time of the process"}
    common.write_json(
        args.out,
        common.header(0) | {"settings": settings, "noise": noise, "base": asdict(BASE), "points": rows},
    )
    pictures.scaling(json.loads(args.out.read_text()), args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
