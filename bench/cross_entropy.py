"""Peak memory of the loss of a head, with its gradients, beside the size of the logits: chunkft's, PyTorch's, Liger's.

python -m bench.cross_entropy          T=2048, H=64, V=8192 on this machine's CPU, one thread

Bytes are those of PyTorch's allocator beyond what was held before, working memory of operators included. "Slice" is a
head of which rows [1024, 1280) are trained, as when one chunk is active; the others train the whole weight. Time is the
median of turns, as CPU time on a CPU, by that of plain logits in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chunkft.autograd import Slice, sliced_linear_cross_entropy

from . import common

OUT = common.RESULTS / "cross-entropy-cpu.json"
ROWS = (1024, 1280)
GROUPS = 16  # of tokens, for the chunked loop in plain PyTorch: as many as chunkft's working memory allows
PLAIN = "logits"

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss as a model computes it."""
    return F.cross_entropy(hidden @ weight.t(), targets)


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's function without chunking."""
    return F.linear_cross_entropy(hidden, weight, targets)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's function with the chunking that it chooses by itself."""
    return F.linear_cross_entropy(hidden, weight, targets, options=nn.LinearCrossEntropyOptions())


def loop(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """A loop over groups of tokens in plain PyTorch, each recomputed in the backward pass."""
    parts = [
        torch.utils.checkpoint.checkpoint(
            lambda h, t: F.cross_entropy(h @ weight.t(), t, reduction="sum"), h, t, use_reentrant=False
        )
        for h, t in zip(hidden.chunk(GROUPS), targets.chunk(GROUPS), strict=True)
    ]
    return torch.stack(parts).sum() / targets.numel()


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger-Kernel's fused loss, whose kernels need a GPU."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if not hidden.is_cuda:
        raise RuntimeError("needs a GPU: its Triton kernels do not run on a CPU")
    result: Tensor = LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets)
    return result


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """chunkft's, with the whole weight as the slice."""
    piece = Slice("head", 0, 0, weight.shape[0], tuple(weight.shape))
    return sliced_linear_cross_entropy(hidden, weight.detach(), targets, [(piece, weight)])


METHODS: dict[str, Loss] = {
    PLAIN: logits,
    "F.linear_cross_entropy": reference,
    "F.linear_cross_entropy, chunked": chunked,
    "loop with recomputation": loop,
    "Liger-Kernel": liger,
    "chunkft": ours,
}


class Problem:
    """Random hidden states, a weight and targets; `run` computes loss and gradients of one method."""

    def __init__(self, tokens: int, width: int, vocabulary: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(tokens, width, device=device)
        self.weight = torch.randn(vocabulary, width, device=device) / width**0.5
        self.targets = torch.randint(0, vocabulary, (tokens,), device=device)
        self.logits = tokens * vocabulary * self.hidden.element_size()

    def run(self, method: Loss) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, gradient of the hidden states, and of the weight."""
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        loss = method(hidden, weight, self.targets)
        loss.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return loss.detach(), hidden.grad, weight.grad

    def run_slice(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same by chunkft where a slice of the weight is trained."""
        hidden = self.hidden.clone().requires_grad_()
        leaf = nn.Parameter(self.weight[slice(*ROWS)])
        piece = Slice("head", 0, *ROWS, tuple(self.weight.shape))
        loss = sliced_linear_cross_entropy(hidden, self.weight, self.targets, [(piece, leaf)])
        loss.backward()
        assert hidden.grad is not None
        assert leaf.grad is not None
        return loss.detach(), hidden.grad, leaf.grad


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most bytes that PyTorch's allocator held on this machine's CPU beyond those held before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def check(name: str, found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Raises AssertionError where loss or gradients are not those of plain logits."""
    for part, a, b in zip(("loss", "dX", "dW"), found, wanted, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-3, atol=1e-6, msg=lambda text, part=part: f"{name}, {part}: {text}"
        )


def measure(problem: Problem, rounds: int) -> dict[str, dict[str, Any]]:
    """Bytes, shares of the logits and times of every method; the error of one that fails."""
    wanted = problem.run(logits)
    runs: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        name: (lambda method=method: problem.run(method)) for name, method in METHODS.items()
    }
    runs["chunkft, slice"] = problem.run_slice
    rows: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        try:
            part = (*wanted[:2], wanted[2][slice(*ROWS)]) if name.endswith("slice") else wanted
            check(name, run(), part)
        except (RuntimeError, ImportError, AttributeError, AssertionError) as error:
            rows[name] = {"error": str(error).splitlines()[0]}
            continue
        rows[name] = {"peak_bytes": (peak := peak_bytes(run)), "share_of_logits": peak / problem.logits}
    seconds: dict[str, list[float]] = {name: [] for name, row in rows.items() if "error" not in row}
    for _ in range(rounds):
        for name, taken in seconds.items():
            start = time.process_time()
            runs[name]()
            taken.append(time.process_time() - start)
    plain = statistics.median(seconds[PLAIN])
    for name, taken in seconds.items():
        rows[name]["time_by_logits"] = statistics.median(taken) / plain
    return rows


def line_of(name: str, row: dict[str, Any]) -> str:
    """One method in one line."""
    if "error" in row:
        return f"{name:32s} {row['error']}"
    return (
        f"{name:32s} peak {row['peak_bytes'] / 2**20:7.1f} MiB = {row['share_of_logits']:.3f} x the logits, "
        f"{row['time_by_logits']:.2f} x the time of plain logits"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.cross_entropy", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if args.vocabulary < ROWS[1] or min(args.tokens, args.width, args.rounds) < 1:
        parser.error(f"sizes must be positive, and --vocabulary at least {ROWS[1]}")
    torch.set_num_threads(1)
    problem = Problem(args.tokens, args.width, args.vocabulary, torch.device("cpu"))
    rows = measure(problem, args.rounds)
    for name, row in rows.items():
        print(line_of(name, row), flush=True)
    sizes = {"tokens": args.tokens, "width": args.width, "vocabulary": args.vocabulary}
    common.write_json(
        args.out, common.header(0) | {"sizes": sizes, "logits": problem.logits, "methods": rows}
    )


if __name__ == "__main__":
    main()
