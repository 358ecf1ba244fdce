"""Memory of chunked against full fine-tuning: bytes that training holds, and the peak of the process.

python -m bench.memory    the published setup: 28M parameters, 4 x 256 tokens, K in 1, 4, 16, 64
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import common, llama, peers

OUT = common.RESULTS / "memory-cpu.json"
RESIDENT = ("gradients", "state", "masters")
# Blocks of 1 MiB and more come from mmap and go back when freed: the process peak follows live tensors.
CHILD_ENV = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


class SavedBytes:
    """Counts bytes of the unique storages that autograd saves in a forward pass, parameters excluded."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._seen: dict[int, int] = {}
        self._kept: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        """Saved-tensor hook; keeps the tensor alive until `clear`, so that no address is used twice."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._seen[storage.data_ptr()] = storage.nbytes()
            self._kept.append(tensor)
        return tensor

    def total(self) -> int:
        """Bytes seen since the last `clear`."""
        return sum(self._seen.values())

    def clear(self) -> None:
        """Forgets what was seen."""
        self._seen.clear()
        self._kept.clear()


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Tensors of `optimizer.state` that hold one number a parameter (step counters are left out)."""
    for state in optimizer.state.values():
        yield from (v for v in state.values() if isinstance(v, Tensor) and v.dim() > 0)


def gradient_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Every gradient that exists after backward: of parameters, and of leaves in the optimizer's groups."""
    seen: set[int] = set()
    for p in (*model.parameters(), *(p for group in optimizer.param_groups for p in group["params"])):
        if p.grad is not None and id(p) not in seen:
            seen.add(id(p))
            yield p.grad


def peak_rss() -> int:
    """Highest resident set of this process so far, in bytes (Linux: VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line; peak memory needs Linux")


def build(variant: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """Full AdamW for {"method": "adamw"}, else ChunkAdamW with the variant's options."""
    options = {k: v for k, v in variant.items() if k != "method"}
    if variant["method"] == "adamw":
        return peers.adamw(model, llama.LR, 0.01, fused=False)
    return llama.chunk_adamw(model, options.pop("chunks"), interval_of(variant), **options)


def interval_of(variant: dict[str, Any]) -> int:
    """Steps a chunk stays active: two where state is forgotten, so that it can be seen between two steps."""
    return 1 if variant.get("keep_state", True) else 2


def resident(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of optimizer state and masters: counted for torch.optim, as reported by chunkft."""
    if not hasattr(optimizer, "memory"):
        return {"state": unique_bytes(state_tensors(optimizer)), "state_host": 0, "masters": 0}
    held = optimizer.memory()
    return {"state": held["state_active"], "state_host": held["state_host"], "masters": held["master_active"]}


def count(variant: dict[str, Any], size: llama.Size) -> dict[str, Any]:
    """Trains one sweep of `variant` and returns the maximum over its steps of every quantity, in bytes."""
    model, batch = llama.build_model(size), llama.build_batch(size)
    before = peak_rss()
    optimizer = build(variant, model)
    saved = SavedBytes(model)
    peaks = dict.fromkeys(("gradients", "state", "state_host", "masters", "saved_activations"), 0)
    saved_by_step = []
    for _ in range(variant.get("chunks", 1) * interval_of(variant) + 1):
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
            loss = model(**batch).loss
        saved_by_step.append(saved.total())
        saved.clear()
        loss.backward()
        now = {
            "gradients": unique_bytes(gradient_tensors(model, optimizer)),
            "saved_activations": saved_by_step[-1],
        }
        now |= resident(optimizer)
        optimizer.step()
        after = resident(optimizer)
        for name in peaks:
            peaks[name] = max(peaks[name], now[name], after.get(name, 0))
        optimizer.zero_grad()
    return peaks | {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "saved_activations_by_step": saved_by_step,
        "row_group": row_group_bytes(model),
        "peak_rss": peak_rss(),
        "rss_before_training": before,
    }


def row_group_bytes(model: nn.Module, rows: int = 64) -> int:
    """Bytes of 64 rows of the widest matrix: what rounding a boundary can add to a chunk."""
    return max(
        min(rows, p.shape[0]) * p[0].numel() * p.element_size() for p in model.parameters() if p.dim() > 1
    )


def in_fresh_process(variant: dict[str, Any], tiny: bool, threads: int) -> dict[str, Any]:
    """`count` in a process of its own; raises CalledProcessError where it fails."""
    command = [
        sys.executable,
        "-m",
        f"{common.PACKAGE}.memory",
        "--child",
        json.dumps(variant),
        "--threads",
        str(threads),
    ]
    command += ["--tiny"] if tiny else []
    done = subprocess.run(
        command, cwd=common.REPO, env=os.environ | CHILD_ENV, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def cases(chunks: Iterable[int]) -> list[dict[str, Any]]:
    """Full AdamW, ChunkAdamW at each K, and at K=16 forgetting the state of inactive chunks."""
    keep = [{"method": "chunk", "chunks": k} for k in chunks]
    forget = [v | {"keep_state": False} for v in keep if v["chunks"] == 16]
    return [{"method": "adamw"}, *keep, *forget]


def judge(row: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """Ratios of `row` to full fine-tuning, and whether the bounds hold: 1/K plus a row group, less saved.

    State is two fp32 moments an element, so a row group of it is twice that of the gradient.
    """
    k = row["variant"].get("chunks", 1)
    groups = {"gradients": row["row_group"], "state": 2 * row["row_group"]}
    return {
        "gradients_ratio": row["gradients"] / full["gradients"],
        "state_ratio": row["state"] / full["state"],
        "saved_ratio": row["saved_activations"] / full["saved_activations"],
        "gradients_within_bound": row["gradients"] <= full["gradients"] / k + groups["gradients"],
        "state_within_bound": row["state"] + row["masters"] <= full["state"] / k + groups["state"],
        "saved_below_full": row["saved_activations"] < full["saved_activations"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a toy size, to try the script")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    size = llama.TINY if args.tiny else llama.Size()
    if args.child:
        print(json.dumps(count(json.loads(args.child), size)))
        return
    rows = []
    for variant in cases(args.chunks):
        row = {"variant": variant} | in_fresh_process(variant, args.tiny, args.threads)
        if rows:
            row |= judge(row, rows[0])
        rows.append(row)
        name = " ".join(f"{k}={v}" for k, v in variant.items())
        sizes = ", ".join(
            f"{n} {row[n] / 2**20:.1f}" for n in (*RESIDENT, "state_host", "saved_activations", "peak_rss")
        )
        print(f"{name:40s} {sizes} MiB", flush=True)
    result = common.header(0) | {"size": vars(size), "malloc": CHILD_ENV, "cases": rows}
    common.write_json(args.out, result)


if __name__ == "__main__":
    main()
