"""Every kernel once on odd shapes, and one round of the pager, for compute-sanitizer; ends with "fine".

    compute-sanitizer --tool memcheck  python tests/gpu/sanitized.py
    compute-sanitizer --tool racecheck python tests/gpu/sanitized.py kernels

Arguments name parts, "kernels" and "pager"; all by default. With CHUNKFT_REHEARSE=1 it runs on a CPU.
PYTORCH_NO_CUDA_MEMORY_CACHING=1, which is set unless it was chosen, gives every tensor an allocation of its own: a
read behind the end of one is not a read within the pool.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # before torch looks

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from gpu_machine import Machine, rehearsing  # noqa: E402
from gpu_operations import OPERATIONS, lacks  # noqa: E402

from chunkft.kernels import adamw, wgrad  # noqa: E402
from chunkft.kernels.adamw import MASTERS  # noqa: E402
from chunkft.kernels.heuristics import Config  # noqa: E402
from chunkft.streaming import Pager  # noqa: E402

PARTS = ("kernels", "pager")


def close(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> bool:
    """The tolerance rule of the tests: at most twice as far from fp64 as PyTorch is."""
    off = float((ours.cpu().double() - exact).abs().max())
    allowed = float((theirs.double() - exact).abs().max())
    return off <= 2 * allowed + 1e-6 * (1 + float(exact.abs().max()))


def kernels(machine: Machine) -> None:
    """All operations; slices that begin and end anywhere; all masters; split-K with an accumulated result."""
    for name, make in OPERATIONS.items():
        why = lacks(machine, name)
        if why:
            print(f"{name}: left out, {why}")
            continue
        operation = make(machine)
        found = operation.work()
        own = operation.on_cpu()
        for got, theirs, exact in zip(found, operation.theirs(own), operation.exact(own), strict=True):
            assert close(got, theirs, exact), name
        print(f"{name}: right", flush=True)
    dy, x = machine.randn(131, 77, dtype=torch.bfloat16), machine.randn(131, 53, dtype=torch.bfloat16)
    for rows, cols in ((slice(76, 77), None), (slice(1, 70), slice(3, 52)), (slice(0, 7), slice(52, 53))):
        for config in (Config(32, 32, 32, 4, 2), Config(32, 32, 32, 4, 2, splits=4)):
            out = torch.ones(
                rows.stop - rows.start, 53 if cols is None else cols.stop - cols.start, device=machine.device
            )
            wgrad(dy, x, rows, cols, out=out, accumulate=True, **machine.kernel(config))
            chosen = cols or slice(None)
            exact = 1 + (dy.cpu().double().t() @ x.cpu().double())[rows, chosen]
            theirs = 1 + (dy.cpu().float().t() @ x.cpu().float())[rows, chosen]
            assert close(out, theirs, exact), (rows, cols, config)
    print("slices at the edges: right", flush=True)
    for master in MASTERS:
        updates(machine, master)
        print(f"adamw with master={master}: right", flush=True)


def updates(machine: Machine, master: str) -> None:
    """Rows of a matrix at an odd start, columns, and a vector with a tail, beside which nothing may change."""
    weight = machine.randn(50, 77, dtype=torch.bfloat16)
    kept = weight.clone()
    params = [weight[1:9], weight[9:41, 5:70], machine.randn(4097, dtype=torch.bfloat16)]
    extra = {}
    if master == "fp32":
        extra = {"masters": [param.float() for param in params]}
    elif master == "residual":
        extra = {
            "residuals": [torch.zeros(p.shape, dtype=torch.int16, device=machine.device) for p in params]
        }
    moments = [[torch.zeros(p.shape, device=machine.device) for p in params] for _ in range(2)]
    grads = [torch.ones_like(param) for param in params]
    adamw(params, grads, *moments, [torch.zeros(()) for _ in params], lr=1e-2, master=master, seed=7,
          **extra, **machine.kernel())  # fmt: skip
    outside = torch.ones(50, 77, dtype=torch.bool, device=machine.device)
    outside[1:9] = outside[9:41, 5:70] = False
    assert torch.equal(weight[outside], kept[outside])
    for param, (first, second) in zip(params, zip(*moments, strict=True), strict=True):
        assert bool((first - 0.1).abs().max() < 1e-6)
        assert bool((second - 0.001).abs().max() < 1e-6)
        assert bool(param.isfinite().all())


def pager(machine: Machine) -> None:
    """Pages of odd sizes come, are changed on two streams, and go, in memory that is page-locked."""
    sizes = [1, 300, 4096, 70_001, 257]
    with Pager(sizes, device=machine.device, slots=2) as pages:
        for page in range(len(sizes)):
            pages.acquire(page, load=False).fill_(page)
            pages.release(page)
        for turn, stream in enumerate((None, machine.stream())):
            with machine.on(stream):
                for page in range(len(sizes)):
                    pages.prefetch((page + 1) % len(sizes))
                    pages.acquire(page).add_(10)
                    pages.release(page, keep=turn == 0)
        pages.flush()
        assert all(bool((pages.host(page) == page + 20).all()) for page in range(len(sizes)))
    print("pager: right", flush=True)


def main(arguments: Sequence[str]) -> None:
    unknown = set(arguments) - set(PARTS)
    if unknown:
        sys.exit(f"part {sorted(unknown)[0]!r} is not known; allowed are {', '.join(PARTS)}")
    torch.manual_seed(0)
    machine = Machine(torch.device("cpu" if rehearsing() else "cuda"))
    for part in arguments or PARTS:
        {"kernels": kernels, "pager": pager}[part](machine)
    machine.synchronize()
    print("fine")


if __name__ == "__main__":
    main(sys.argv[1:])
