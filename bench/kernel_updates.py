"""The kernels that memory bounds, AdamW over a chunk and rows of an embedding, beside PyTorch's and beside a copy.

python -m bench.kernel_updates                 200M elements in bf16 with residual; every launch setting of AdamW
python -m bench.kernel_updates --elements 50000000

A rate counts the bytes that the update must read and write once; a copy's counts what it reads and what it writes.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from chunkft import kernels

from . import common
from .clock import Clock
from .harness import CheckFailed
from .records import Records
from .rehearsal import in_interpreter

BETAS, EPS, LR, DECAY = (0.9, 0.999), 1e-8, 1e-4, 0.01
WIDTH = 4096
ROUNDS = 15
MODES = ("residual", "none", "fp32", "stochastic")
# (tokens, vocabulary, width, rows of the table that are trained)
TABLES = ((4096, 32000, 4096, 8000), (16384, 128256, 4096, 32064))


def copy_rate(clock: Clock, nbytes: int) -> float:
    """GB/s of a copy on the device, bytes read and bytes written counted."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * nbytes / clock.microseconds([lambda: target.copy_(source)], 10)[0] / 1e3


def slices_of(elements: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Weights of some ten slices with `elements` in all, of unequal sizes, one of them a vector."""
    rows = max(1, elements // WIDTH)
    shares = [rows // 3, rows // 4, rows // 5, rows // 10]
    shares.append(rows - sum(shares))
    shapes: list[tuple[int, ...]] = [(share, WIDTH) for share in shares if share] + [(WIDTH,)]
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def adamw_case(
    clock: Clock, elements: int, master: str, dtype: torch.dtype
) -> tuple[Callable[..., None], int]:
    """A call of the kernel on new slices, and the bytes that it must move."""
    weights = slices_of(elements, clock.device, dtype)
    grads = [1e-3 * torch.randn_like(w) for w in weights]
    first, second = ([torch.zeros_like(w, dtype=torch.float32) for w in weights] for _ in range(2))
    steps = [torch.zeros(()) for _ in weights]
    extra: dict[str, Any] = {}
    kept = 0
    if master == "residual":
        extra["residuals"], kept = [torch.zeros_like(w, dtype=torch.int16) for w in weights], 2
    elif master == "fp32":
        extra["masters"], kept = [w.float() for w in weights], 4
    numel = sum(w.numel() for w in weights)
    size = weights[0].element_size()

    def run(**options: Any) -> None:
        kernels.adamw(
            weights, grads, first, second, steps, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY,
            master=master, **extra, **options,
        )  # fmt: skip

    # weight and moments are read and written, the gradient is read
    return run, numel * (2 * (size + 8 + kept) + size)


def torch_adamw(clock: Clock, elements: int, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """PyTorch's fused AdamW, which keeps its moments in the dtype of the weights, and the bytes that it must move."""
    weights = [torch.nn.Parameter(w) for w in slices_of(elements, clock.device, dtype)]
    for weight in weights:
        weight.grad = 1e-3 * torch.randn_like(weight)
    optimizer = torch.optim.AdamW(weights, lr=LR, fused=True)
    numel = sum(w.numel() for w in weights)
    return lambda: optimizer.step(), numel * 7 * weights[0].element_size()


@contextlib.contextmanager
def launched_as(tile: Any) -> Iterator[None]:
    """The AdamW kernel with another launch setting as its default."""
    from chunkft.kernels.gpu import adamw as device_side

    with mock.patch.object(device_side, "VARIANTS", (tile,)):
        yield


def settings() -> dict[str, Any]:
    """Launch settings of the AdamW kernel by name, the default first."""
    from chunkft.kernels.gpu.adamw import VARIANTS

    names = ["default", *(f"{tile.block}x{tile.loops}/{tile.warps} warps" for tile in VARIANTS[1:])]
    return dict(zip(names, VARIANTS, strict=True))


def measure_adamw(records: Records, clock: Clock, elements: int, rounds: int, copy: float) -> None:
    """Every mode with the default setting, the first mode with every setting, PyTorch's fused update."""
    dtypes = {"none fp32": ("none", torch.float32)} | {mode: (mode, torch.bfloat16) for mode in MODES}
    for name, (mode, dtype) in dtypes.items():
        every = settings() if mode == MODES[0] else {"default": settings()["default"]}
        run, moved = adamw_case(clock, elements, mode, dtype)
        for setting, tile in every.items():
            key = f"adamw/{name}/{setting}"
            if key in records:
                continue
            with records.case(key) as record, launched_as(tile):
                record |= _rates(
                    clock.microseconds([lambda r=run: r(backend="triton")], rounds)[0], moved, copy
                )
            print(_line(key, record), flush=True)
    for dtype in (torch.bfloat16, torch.float32):
        key = f"torch fused adamw/{str(dtype).split('.')[1]}"
        if key in records:
            continue
        run, moved = torch_adamw(clock, elements, dtype)
        with records.case(key) as record:
            record |= _rates(clock.microseconds([run], rounds)[0], moved, copy)
        print(_line(key, record), flush=True)


def measure_embedding(
    records: Records, clock: Clock, tables: Sequence[tuple[int, int, int, int]], rounds: int, copy: float
) -> None:
    """Rows of a table's gradient: Triton, and PyTorch's dense gradient of all rows."""
    for tokens, vocabulary, width, rows in tables:
        for kind in ("uniform", "one id"):
            key = f"embedding/T{tokens}/V{vocabulary}/{kind}"
            if key in records:
                continue
            with contextlib.suppress(CheckFailed), records.case(key) as record:
                dy = torch.randn(tokens, width, device=clock.device).to(torch.bfloat16)
                ids = torch.randint(0, vocabulary, (tokens,), device=clock.device)
                if kind == "one id":
                    ids[: tokens // 2] = 11

                def ours(
                    backend: str, dy: Tensor = dy, ids: Tensor = ids, v: int = vocabulary, n: int = rows
                ) -> Tensor:
                    return kernels.embedding_grad(dy, ids, v, rows=(0, n), backend=backend)

                exact = torch.zeros(rows, width, dtype=torch.float64, device=clock.device)
                inside = ids < rows
                exact.index_add_(0, ids[inside], dy[inside].double())
                off = float((ours("triton").double() - exact).abs().max())
                allowed = 2 * float((exact.to(torch.bfloat16).double() - exact).abs().max()) + 1e-6
                if not off <= allowed:
                    raise CheckFailed(f"off by {off:.3g}, allowed {allowed:.3g}")
                us, theirs = clock.microseconds([lambda: ours("triton"), lambda: ours("torch")], rounds)
                hits = int(inside.sum())
                record |= _rates(us, 2 * width * (hits + rows), copy)
                record |= {"torch_us": round(theirs, 2), "speedup": round(theirs / us, 3)}
            print(_line(key, record), flush=True)


def _rates(us: float, moved: int, copy: float) -> dict[str, Any]:
    rate = moved / us / 1e3
    return {"us": round(us, 2), "gbytes_per_s": round(rate, 1), "of_copy": round(rate / copy, 3)}


def _line(key: str, record: dict[str, Any]) -> str:
    if "error" in record:
        return f"{key:44s} NO FIGURE: {record['error']}"
    beside = f", {record['speedup']:.2f} x PyTorch" if "speedup" in record else ""
    rates = f"{record['gbytes_per_s']:8.1f} GB/s, {record['of_copy']:.2f} of a copy"
    return f"{key:44s} {record['us']:10.1f} us {rates}{beside}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.kernel_updates", description=__doc__.split("\n")[0])
    parser.add_argument("--elements", type=int, default=200_000_000, help="of AdamW (default 200 million)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--resume", action="store_true", help="keep what --out holds and go on behind it")
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU: figures mean nothing")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "kernel-updates.json")
    args = parser.parse_args(arguments)
    if args.rehearse:
        in_interpreter("kernel_updates", arguments)
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --rehearse runs this on the CPU")
    torch.manual_seed(0)
    clock = Clock(torch.device("cpu" if args.rehearse else "cuda"))
    elements, rounds = (3 * WIDTH, 1) if args.rehearse else (args.elements, args.rounds)
    copy = copy_rate(clock, 1 << 20 if args.rehearse else 2 << 30)
    kind = "rehearsed" if args.rehearse else "measured"
    head = common.header(0) | {"kind": kind, "copy_gb_s": copy, "elements": elements}
    records = Records(args.out, head, resume=args.resume)
    print(f"copy {copy:.0f} GB/s", flush=True)
    measure_adamw(records, clock, elements, rounds, copy)
    tables = ((50, 60, 40, 20),) if args.rehearse else TABLES
    measure_embedding(records, clock, tables, rounds, copy)
    if any("error" in record for record in records.values()):
        print("some cases have no figure: see the lines that say why", file=sys.stderr)
        raise SystemExit(common.INCOMPLETE)


if __name__ == "__main__":
    main()
