"""Step time on the GPUs of a machine, by turns: training in chunks, DDP with AdamW, FSDP2 with AdamW.

torchrun --nproc-per-node 8 -m bench.scale_steps --model 1B --tokens 4096
torchrun --nproc-per-node 2 -m bench.scale_steps --model tiny --tokens 32 --rounds 2    (gloo, where there is no GPU)

Every variant has a model of its own, in bf16 with recomputed blocks; one step of each is taken in turn. A step begins
when all ranks are ready and ends when the last one is done. Full AdamW runs a second time, under another name: how far
the two are apart is the machine's noise.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import common, harness, plain_llama, scale_setup
from .scale_setup import Case

OUT = common.RESULTS / "scale-steps.json"
VARIANTS = {"replicas": "ddp", "fsdp2": "zero3"}  # each beside full AdamW on the same collectives


class Trained:
    """One variant that is being trained."""

    def __init__(self, case: Case, name: str, device: torch.device, tokens: int) -> None:
        dtype = getattr(torch, case.dtype)
        self.case = case
        model = plain_llama.build(name, device, dtype, checkpointing=True)
        self.model, self.optimizer = scale_setup.prepared(case, model, counted=False)
        self.ids = plain_llama.batch_of(name, device, 1, tokens, seed=dist.get_rank())

    def step(self) -> None:
        """One step, waited for by all ranks."""
        self.model(self.ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ids.is_cuda:
            torch.cuda.synchronize()
        dist.barrier()

    def record(self) -> dict[str, Any]:
        """Of this rank: bytes that the optimizer sent a step, and that it holds."""
        optimizer: Any = self.optimizer
        chunked = hasattr(optimizer, "traffic")
        return {
            "sent": optimizer.traffic() if chunked else None,
            "memory": optimizer.memory() if chunked else None,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.scale_steps", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=plain_llama.SHAPES, default="1B")
    parser.add_argument("--methods", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank in a step")
    parser.add_argument("--rounds", type=int, default=32, help="steps of each variant that are timed")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    if "LOCAL_RANK" not in os.environ:
        parser.error("needs torchrun: torchrun --nproc-per-node 8 -m bench.scale_steps")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=scale_setup.TIMEOUT))
    try:
        result = measure(args, device)
        if dist.get_rank() == 0:
            common.write_json(args.out, common.header(0) | result)
            print(args.out)
    finally:
        dist.destroy_process_group()


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Times of all variants with their ratios to full AdamW on the same collectives; rank 0 prints them."""
    ranks, steps = dist.get_world_size(), args.rounds
    result: dict[str, Any] = {
        "backend": dist.get_backend(),
        "ranks": ranks,
        "model": args.model,
        "chunks": args.chunks,
        "tokens": args.tokens,
        "rounds": steps,
        "methods": {},
    }
    for method in args.methods:
        names = {method: method, "adamw": VARIANTS[method], harness.AGAIN: VARIANTS[method]}
        trained = {
            name: Trained(Case(kind, ranks, args.chunks, args.dtype, steps), args.model, device, args.tokens)
            for name, kind in names.items()
        }
        taken = harness.interleave(
            {name: variant.step for name, variant in trained.items()},
            steps,
            time.perf_counter,
            warmup=args.chunks,
        )
        noise = harness.noise_of(harness.ratio(taken[harness.AGAIN], taken["adamw"]))
        found = harness.ratio(taken[method], taken["adamw"])
        result["methods"][method] = {
            "beside": VARIANTS[method],
            "ratio": [found.ratio, found.low, found.high],
            "noise": noise,
            "verdict": harness.verdict(found, noise),
            "samples_ms": {name: [1e3 * value for value in values] for name, values in taken.items()},
            "rank_0": trained[method].record(),
        }
        if dist.get_rank() == 0:
            print(
                f"{method} on {ranks} ranks: step {found} x {VARIANTS[method]} with AdamW; {harness.noise_line(noise)}"
            )
        del trained
    return result


if __name__ == "__main__":
    main()
