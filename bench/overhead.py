"""What wrapping costs: a step with ChunkAdamW beside the same step written by hand, interleaved.

The loop by hand has the same leaves, the same sliced operators and `torch.optim.AdamW`, but nothing of what an
optimizer does for its user: no plan to follow, no schedule, no moved weights to notice, no look for infinities.

python -m bench.overhead                  one thread, its CPU time: other load on the machine does not count
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import chunkft
from chunkft.autograd import Slice, sliced_embedding, sliced_linear

from . import common, plain_llama

OUT = common.RESULTS / "overhead-cpu.json"
LR = 1e-5


@dataclass(frozen=True)
class Case:
    """A model with its batch, and how it is cut."""

    model: str
    batch: int
    tokens: int
    chunks: int
    interval: int
    sweeps: int


CASES = (
    Case("tiny", 2, 64, 4, 5, 20),
    Case("3M", 4, 64, 8, 5, 5),
    Case("28M", 2, 128, 16, 2, 2),
)


class ByHand:
    """The chunks of a plan in turn, with leaves and optimizers made by hand; weights are trained in place."""

    def __init__(self, model: nn.Module, plan: chunkft.ChunkPlan, interval: int) -> None:
        self.model, self.plan, self.interval = model, plan, interval
        self.steps = 0
        self.optimizers: dict[int, torch.optim.Optimizer] = {}
        self.leaves: dict[int, list[tuple[Slice, nn.Parameter]]] = {}
        model.requires_grad_(False)
        self.switch(0)

    def switch(self, chunk: int) -> None:
        """Let the slices of this chunk be the active ones."""
        for module in self.model.modules():
            module.__dict__.pop("forward", None)
        self.model.requires_grad_(False)
        if chunk not in self.leaves:
            self.leaves[chunk] = [(piece, self.leaf_of(piece)) for piece in self.plan.chunks[chunk].slices]
            leaves = [leaf for _, leaf in self.leaves[chunk]]
            self.optimizers[chunk] = torch.optim.AdamW(leaves, lr=LR)
        by_name: dict[str, list[tuple[Slice, nn.Parameter]]] = {}
        for piece, leaf in self.leaves[chunk]:
            leaf.requires_grad_(True)
            if piece.dim is not None:
                by_name.setdefault(piece.name, []).append((piece, leaf))
        for name, pairs in by_name.items():
            module = self.model.get_submodule(name.rpartition(".")[0])
            call = embedding if isinstance(module, nn.Embedding) else linear
            module.forward = partial(call, module, pairs)
        self.optimizer = self.optimizers[chunk]

    def leaf_of(self, piece: Slice) -> nn.Parameter:
        """The parameter itself, or a leaf that shares memory with its rows."""
        parameter = self.model.get_parameter(piece.name)
        return parameter if piece.dim is None else nn.Parameter(piece.of(parameter.detach()))

    def step(self) -> None:
        """Update the active leaves; after `interval` of these the next chunk is active."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        if self.steps % self.interval == 0:
            self.switch(self.steps // self.interval % len(self.plan))

    def zero_grad(self) -> None:
        """Done by `step` already."""


def linear(module: nn.Linear, pairs: Sequence[tuple[Slice, Tensor]], x: Tensor) -> Tensor:
    """Forward of a linear layer with active slices."""
    return sliced_linear(x, module.weight, module.bias, pairs)


def embedding(module: nn.Embedding, pairs: Sequence[tuple[Slice, Tensor]], ids: Tensor) -> Tensor:
    """Forward of an embedding with active slices."""
    return sliced_embedding(ids, module.weight, pairs)


class Run:
    """One variant, and the seconds of each of its steps in parts."""

    def __init__(self, case: Case, make: Callable[[nn.Module], Any]) -> None:
        self.model = plain_llama.build(case.model, torch.device("cpu"), torch.float32)
        self.ids = plain_llama.batch_of(case.model, torch.device("cpu"), case.batch, case.tokens)
        self.optimizer = make(self.model)
        self.compute: list[float] = []
        self.update: list[float] = []

    def step(self) -> None:
        """One forward, backward and optimizer step."""
        start = time.thread_time()
        self.model(self.ids).backward()
        middle = time.thread_time()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.compute.append(middle - start)
        self.update.append(time.thread_time() - middle)

    def sweep_mean(self, times: Sequence[float], period: int, skipped: int) -> float:
        """Mean over the positions of a sweep of the median over sweeps, the first `skipped` left out."""
        rows = torch.tensor(times, dtype=torch.float64).reshape(-1, period)[skipped:]
        return rows.quantile(0.5, dim=0).mean().item()


def measure(case: Case) -> dict[str, Any]:
    """Times both variants over `case.sweeps` sweeps, after an untimed one; raises if they do not train alike."""
    plan = chunkft.partition(
        plain_llama.build(case.model, torch.device("cpu"), torch.float32), chunks=case.chunks
    )
    runs = {
        "by hand": Run(case, lambda model: ByHand(model, plan, case.interval)),
        "chunkft": Run(
            case,
            lambda model: chunkft.ChunkAdamW(
                model, lr=LR, chunks=None, partition=plan, interval=case.interval
            ),
        ),
    }
    order = list(runs.values())
    period = case.chunks * case.interval
    for number in range(period * (1 + case.sweeps)):
        for run in order if number % 2 else reversed(order):
            run.step()
    ours, theirs = (dict(run.model.named_parameters()) for run in runs.values())
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    if different:
        raise RuntimeError(f"both variants must train the same weights, but they differ in {different[:3]}")
    result: dict[str, Any] = {"case": vars(case)}
    for name, run in runs.items():
        parts = {"compute": run.compute, "update": run.update}
        result[name] = {f"{part}_ms": 1e3 * run.sweep_mean(times, period, 1) for part, times in parts.items()}
        result[name]["step_ms"] = sum(result[name].values())
    added = {key: result["chunkft"][key] - result["by hand"][key] for key in result["chunkft"]}
    result["added"] = added
    result["overhead"] = added["step_ms"] / result["by hand"]["step_ms"]
    return result


def line_of(result: dict[str, Any]) -> str:
    """One case in one line."""
    case, added = result["case"], result["added"]
    return (
        f"{case['model']:5s} batch {case['batch']} x {case['tokens']}, K={case['chunks']}, T={case['interval']}: "
        f"by hand {result['by hand']['step_ms']:.2f} ms a step, chunkft {100 * result['overhead']:+.1f} % "
        f"({1e3 * added['compute_ms']:+.0f} us in forward and backward, {1e3 * added['update_ms']:+.0f} us in step)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.overhead", description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="the smallest case only, to try the script")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured = []
    for case in CASES[:1] if args.tiny else CASES:
        measured.append(measure(case))
        print(line_of(measured[-1]), flush=True)
    common.write_json(args.out, common.header(0) | {"clock": "cpu time of the thread", "cases": measured})


if __name__ == "__main__":
    main()
