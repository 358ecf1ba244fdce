"""Loss of the embedded model after 300 steps with moments of 8 bits beside 32 bits, at K=8 and K=1, over three seeds.

python -m bench.eight_bit        10 minutes on a CPU core; runs that are in the file already are skipped
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import chunkft
from chunkft.cli.problems import embedded_model_dir, generate

from . import common
from .records import Records

OUT = common.RESULTS / "eight-bit.json"
STEPS = 300
BATCH = 8
WARMUP = 20
TAIL = 50  # steps at the end whose mean is the loss
SEEDS = (0, 1, 2)
RATES = {8: 3e-3, 1: 1e-3}  # peak learning rate by K, those of bench.embedded
PROBLEMS = 2000
HELD_OUT, HELD_OUT_SEED = 256, 7

Rows = list[list[int]]


def key_of(chunks: int, seed: int, bits: int) -> str:
    """Name of a run in the file."""
    return f"K={chunks} seed={seed} bits={bits}"


def read(count: int, seed: int, split: Any) -> Rows:
    """Token ids of generated problems with their answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    return [tokenizer(p["prompt"] + p["completion"])["input_ids"] for p in generate(count, seed, split)]


def collate(rows: Rows) -> dict[str, Tensor]:
    """Pads to the longest row; padding is masked and has no label."""
    width = max(map(len, rows))
    return {
        name: torch.tensor([[value(token) for token in row] + [filler] * (width - len(row)) for row in rows])
        for name, value, filler in (
            ("input_ids", int, 0),
            ("labels", int, -100),
            ("attention_mask", lambda token: 1, 0),
        )
    }


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Rows) -> float:
    """Mean loss of a token."""
    total = tokens = 0.0
    for start in range(0, len(rows), 64):
        batch = collate(rows[start : start + 64])
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch).loss.item() * count
        tokens += count
    return total / tokens


def train(chunks: int, seed: int, bits: int, steps: int = STEPS, held_out: int = HELD_OUT) -> dict[str, Any]:
    """One run: linear warm-up and decay, random order of the chunks, one step an interval, no weight decay."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    rows = read(PROBLEMS, seed, "train")
    order = torch.Generator().manual_seed(seed)
    optimizer = chunkft.ChunkAdamW(
        model, lr=RATES[chunks], weight_decay=0.0, chunks=chunks, interval=1, schedule="random", seed=seed,
        state_bits=bits,
    )  # fmt: skip
    losses = []
    for step in range(steps):
        rate = RATES[chunks] * min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = rate
        chosen = torch.randint(0, len(rows), (BATCH,), generator=order).tolist()
        loss = model(**collate([rows[i] for i in chosen])).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tail = losses[-min(TAIL, steps) :]
    report = optimizer.memory_report()
    held = (report.state_device.now or 0) if chunks == 1 else (report.state_host.now or 0)
    return {
        "chunks": chunks,
        "seed": seed,
        "bits": bits,
        "steps": steps,
        "loss": statistics.fmean(tail),
        "held_out_loss": held_out_loss(model.eval(), read(held_out, HELD_OUT_SEED, "heldout")),
        # with one chunk the tensors themselves; else host memory, in which each tensor is padded to 256 bytes
        "state_bytes_per_parameter": held / sum(p.numel() for p in model.parameters()),
    }


def summarise(runs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """For each K how much larger the losses with 8 bits are, in percent: means over the seeds, and of each seed."""
    found = {}
    for chunks in RATES:
        pairs = [
            (runs[key_of(chunks, seed, 8)], runs[key_of(chunks, seed, 32)])
            for seed in SEEDS
            if all(key_of(chunks, seed, bits) in runs for bits in (8, 32))
        ]
        if not pairs:
            continue
        found[f"K={chunks}"] = {
            f"{name}_percent": {
                "mean": 100 * (sum(a[name] for a, _ in pairs) / sum(b[name] for _, b in pairs) - 1),
                "seeds": [100 * (a[name] / b[name] - 1) for a, b in pairs],
            }
            for name in ("loss", "held_out_loss")
        } | {"state_bytes_per_parameter": max(a["state_bytes_per_parameter"] for a, _ in pairs)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.eight_bit", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = Records(args.out, common.header(SEEDS[0]), "runs", resume=True)
    for chunks in RATES:
        for seed in SEEDS:
            for bits in (32, 8):
                name = key_of(chunks, seed, bits)
                if name in runs and "error" not in runs[name]:
                    continue
                with runs.case(name) as record:
                    record |= train(chunks, seed, bits)
                print(
                    f"{name:22s} loss {record['loss']:.5f}, held out {record['held_out_loss']:.5f}, "
                    f"{record['state_bytes_per_parameter']:.3f} bytes a parameter",
                    flush=True,
                )
    runs.note(summary=summarise(runs))


if __name__ == "__main__":
    main()
