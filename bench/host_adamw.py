"""AdamW of slices in host memory beside torch.optim.AdamW and the torch backend: time and bytes of an update.

python -m bench.host_adamw          4M and 64M parameters, one thread

By turns, in time of the thread, so that other load on the machine does not count but for the memory that it takes.
Bytes are those that have to be read and written once; what reads them more often gets fewer of them a second.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chunkft.kernels import adamw, split_residual
from chunkft.kernels.companding import BLOCK
from chunkft.kernels.host_adamw import HostSlice, host_adamw

from . import common, harness

OUT = common.RESULTS / "host-adamw-cpu.json"
HOST = "host"
NUMBERS = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
# bytes of an element that are read and written: weight, residual, moments; and its gradient, which is only read
BYTES = {
    "fp32": 2 * (4 + 8) + 4,
    "bf16 + residual": 2 * (2 + 2 + 8) + 2,
    "bf16 + residual + 8-bit": 2 * (2 + 2 + 2 + 8 / BLOCK) + 2,
}
ALL_BF16, FP32_MOMENTS = "torch fused=True, all bf16", "host, fp32 moments"
# of variants that keep something else than their setting says
OTHER_BYTES = {ALL_BF16: 2 * (2 + 4) + 2, FP32_MOMENTS: BYTES["bf16 + residual"]}

Call = Callable[[], Any]


def variants(setting: str, numel: int) -> dict[str, Call]:
    """One update each; every variant owns what it updates."""
    torch.manual_seed(0)
    start, grad = torch.randn(numel) * 0.02, torch.randn(numel) * 1e-3
    calls: dict[str, Call] = {HOST: _host(setting, start, grad)}
    if setting == "fp32":
        calls["torch foreach=False"] = _torch(start.clone(), grad, {"foreach": False})
        calls["torch fused=True"] = _torch(start.clone(), grad, {"fused": True})
    if setting == "bf16 + residual":
        # without a master, and with moments of bf16: less is computed and kept
        calls[ALL_BF16] = _torch(start.bfloat16(), grad.bfloat16(), {"fused": True})
    if setting == "bf16 + residual + 8-bit":
        calls[FP32_MOMENTS] = _host("bf16 + residual", start, grad)
    else:
        calls["torch backend"] = _reference(setting, start, grad)
    return calls


def _torch(start: torch.Tensor, grad: torch.Tensor, options: dict[str, Any]) -> Call:
    parameter = nn.Parameter(start)
    parameter.grad = grad
    optimizer = torch.optim.AdamW([parameter], **NUMBERS, **options)
    return optimizer.step


def _slice(setting: str, start: torch.Tensor) -> dict[str, Any]:
    numel = start.numel()
    if setting == "fp32":
        return {"param": start.clone(), "exp_avg": torch.zeros(numel), "exp_avg_sq": torch.zeros(numel)}
    weight, residual = split_residual(start)
    kept = {"param": weight, "extra": residual}
    if setting == "bf16 + residual":
        return kept | {"exp_avg": torch.zeros(numel), "exp_avg_sq": torch.zeros(numel)}
    scales = torch.zeros(-(-numel // BLOCK)), torch.zeros(-(-numel // BLOCK))
    moments = {
        "exp_avg": torch.zeros(numel, dtype=torch.int8),
        "exp_avg_sq": torch.zeros(numel, dtype=torch.uint8),
    }
    return kept | moments | {"scales": scales}


def _host(setting: str, start: torch.Tensor, grad: torch.Tensor) -> Call:
    tensors = _slice(setting, start)
    own = grad.to(tensors["param"].dtype)
    piece = HostSlice(grad=own, step=3.0, lr=NUMBERS["lr"], weight_decay=NUMBERS["weight_decay"], **tensors)
    master = "residual" if piece.extra is not None else "none"
    return lambda: host_adamw([piece], betas=NUMBERS["betas"], eps=NUMBERS["eps"], master=master)


def _reference(setting: str, start: torch.Tensor, grad: torch.Tensor) -> Call:
    tensors = _slice(setting, start)
    own, steps = grad.to(tensors["param"].dtype), torch.full((1,), 2.0)
    kept = {} if setting == "fp32" else {"residuals": [tensors["extra"]], "master": "residual"}
    columns = [tensors["param"]], [own], [tensors["exp_avg"]], [tensors["exp_avg_sq"]]
    return lambda: adamw(*columns, steps, backend="torch", **NUMBERS, **kept)


def case(setting: str, numel: int, rounds: int) -> dict[str, Any]:
    """Samples of one setting and size, with nanoseconds an element and GB/s of every variant."""
    found = harness.measure(variants(setting, numel), {}, rounds, time.thread_time)
    for name, row in found["variants"].items():
        row["ns_an_element"] = 1e6 * row["median_ms"] / numel
        row["gb_a_second"] = OTHER_BYTES.get(name, BYTES[setting]) / row["ns_an_element"]
    return {"case": f"{setting}, {numel >> 20}M", "setting": setting, "numel": numel, **found}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--millions", type=int, nargs="+", default=[4, 64], help="parameters, in units of 2^20"
    )
    parser.add_argument("--rounds", type=int, default=harness.ROUNDS)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(argv)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result: dict[str, Any] = {**common.header(0), "cases": []}
        for millions in given.millions:
            for setting in BYTES:
                # a large case takes long enough to be told from noise in fewer rounds
                rounds = max(2, given.rounds // (3 if millions > 16 else 1))
                found = case(setting, millions << 20, rounds)
                result["cases"].append(found)
                print(found["case"], flush=True)
                for line in harness.lines(found):
                    print("  " + line, flush=True)
                for name, row in found["variants"].items():
                    print(
                        f"  {name:28s} {row['ns_an_element']:7.2f} ns an element, {row['gb_a_second']:6.2f} GB/s"
                    )
                common.write_json(given.out, result)
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
