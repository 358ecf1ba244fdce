"""Step time and memory of every place that optimizer state can live.

python -m bench.residency                          28M parameters on a CPU, 1B on a GPU
python -m bench.residency --model llama-2-7b --checkpointing --tokens 1024 --batch 1
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import chunkft

from . import common, plain_llama
from .peers import adamw
from .records import Records

LR = 1e-5
LEAN = "head without logits"


def variants(chunks: int, interval: int, page_bytes: int) -> dict[str, dict[str, Any] | None]:
    """Options of ChunkAdamW by name; None is full AdamW."""
    shared = {"chunks": chunks, "interval": interval}
    stream = {"residency": "stream", "page_bytes": page_bytes}
    return {
        "adamw": None,
        f"device K={chunks}": {**shared, "state_device": "device"},
        f"paged K={chunks}": {**shared, "state_device": "paged"},
        f"stream K={chunks}": {**shared, **stream},
        f"backward K={chunks}": {**shared, **stream, "update": "backward"},
        "backward K=1": {**shared, **stream, "chunks": 1, "update": "backward"},
        # the least memory with resident weights: small pages, and no logits
        f"lean K={4 * chunks}": {
            **shared,
            **stream,
            "chunks": 4 * chunks,
            "page_bytes": page_bytes // 4,
            LEAN: True,
        },
    }


def measure(options: dict[str, Any] | None, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Times `args.steps` steps after `args.warmup` ones, and the most that was held."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = plain_llama.build(args.model, device, dtype, args.checkpointing)
    ids = plain_llama.batch_of(args.model, device, args.batch, args.tokens)
    options = None if options is None else dict(options)
    lean = options is not None and options.pop(LEAN, False)
    optimizer = (
        adamw(model, LR, 0.01, fused=device.type == "cuda")
        if options is None
        else chunkft.ChunkAdamW(model, lr=LR, **options)
    )
    chunked = isinstance(optimizer, chunkft.ChunkOptimizer)
    if lean and chunked:
        model.active_rows_of_head = lambda: [
            pair for pair in optimizer.active_parameters() if pair[0].name == "lm_head.weight"
        ]
    seconds: list[float] = []
    held = {"gradients": 0, "state": 0}
    loss = torch.zeros(())
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            _settle(device)
            if chunked:
                optimizer.paging()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        loss = model(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _settle(device)
        if step >= args.warmup:
            seconds.append(time.perf_counter() - start)
        if chunked:
            memory = optimizer.memory()
            held["gradients"] = max(held["gradients"], memory["gradients"])
            held["state"] = max(held["state"], memory["state_active"] + memory["master_active"])
    if not chunked:
        weights = list(model.parameters())
        held["gradients"] = sum(p.numel() * p.element_size() for p in weights)
        held["state"] = sum(
            v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if v.dim()
        )
    free = torch.cuda.mem_get_info(device) if device.type == "cuda" else None
    low, median, high = common.quartiles(seconds)
    result: dict[str, Any] = {
        "median_ms": 1e3 * median,
        "quartiles_ms": [1e3 * low, 1e3 * high],
        "mean_ms": 1e3 * sum(seconds) / len(seconds),
        "final_loss": float(loss.detach()),
        "held_bytes": held,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        # what the allocator took it keeps, so that the driver's figure of the end is the peak, with the context
        "driver_bytes": free[1] - free[0] if free is not None else None,
    }
    report = optimizer.paging() if chunked else None
    if report is not None:
        result["exposed_share"] = report.exposed_share
        result["load_gb_s"] = report.load_rate / 1e9
        result["store_gb_s"] = report.store_rate / 1e9
        result["hiding_chunks"] = report.hiding_chunks
    if chunked:
        optimizer.detach()
    return result


def line_of(name: str, result: dict[str, Any], base: float | None) -> str:
    """One variant in one line."""
    if "error" in result:
        return f"{name:16s} {result['error']}"
    held = result["held_bytes"]
    peak = ""
    if result["peak_bytes"] is not None:
        peak = f", peak {result['peak_bytes'] / 2**30:.2f} GiB (driver: {result['driver_bytes'] / 2**30:.2f})"
    ratio = "" if base is None else f" ({result['mean_ms'] / base:.3f} x adamw)"
    exposed = "" if "exposed_share" not in result else f", exposed {result['exposed_share']:.1%}"
    return (
        f"{name:16s} {result['mean_ms']:9.2f} ms a step{ratio}, gradients {held['gradients'] / 2**20:.1f} MiB, "
        f"state {held['state'] / 2**20:.1f} MiB{peak}{exposed}"
    )


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="bench.residency", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=plain_llama.SHAPES, default="1B" if gpu else "28M")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--interval", type=int, default=2)
    parser.add_argument("--page-mib", type=int, default=64 if gpu else 4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024 if gpu else 128)
    parser.add_argument("--steps", type=int, default=32, help="timed steps, whole sweeps of K*T (default 32)")
    parser.add_argument("--warmup", type=int, default=32, help="untimed steps, a sweep (default 32)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--only", nargs="*", help="variants to run, by the beginning of their name")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--resume", action="store_true", help="keep what --out holds and go on behind it")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "residency-cpu.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if gpu else "cpu")
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "resume")}
    records = Records(args.out, common.header(0) | {"settings": settings}, "variants", args.resume)
    base = None
    for name, options in variants(args.chunks, args.interval, args.page_mib << 20).items():
        if args.only and not any(name.startswith(word) for word in args.only):
            continue
        if name not in records:
            with contextlib.suppress(torch.OutOfMemoryError, OSError), records.case(name) as record:
                # full AdamW of a large model does not fit, nor do its moments on a small host: that is a result
                record |= measure(options, args, device)
            _free(device)
        result = records[name]
        base = result.get("mean_ms") if options is None else base
        print(line_of(name, result, base), flush=True)
    if any("error" in record and "OutOfMemory" not in record["error"] for record in records.values()):
        raise SystemExit("some places have no figure: see the lines that say why")


if __name__ == "__main__":
    main()
