"""What the models say before anything is measured: one file a GPU, held against the first run and every later one.

python -m bench.predictions                  h100 and h200, into bench/results/predicted/
python -m bench.predictions --gpu a100

- `FORM/MODEL/NAME/K/T/triton|torch|auto`: microseconds by the picker's model (chunkft.kernels.heuristics).
- `adamw/...`, `embedding/...`: microseconds at 85 % of the memory speed of the data sheet.
- `llama-2-7b/PLACE/peak`: GiB by bench.predict, from shapes alone; `/driver`: with 0.6 GiB of context and libraries.
- `llama-2-7b/PLACE/step`: milliseconds from FLOP: forward, recomputation and dX of what lies above the lowest active
  slice, dW of the chunk, at 65 % of the 16-bit peak; the update at the rate of a copy; with K=1 in backward at least
  what loading the state of all parameters takes.
- `llama-2-7b/PLACE/exposed`: what paging takes longer than a step, as a share of it.
- `streamed/llama-2-7b/TOKENS/resident0/PLACE/peak`: GiB by bench.predict, for chunks of one block.
- `.../no compute/step`: milliseconds in which the pages of a step cross the link; `.../PLACE/step`: of that and of
  the FLOP the longer one, with the update, which is on the host at 40 GB/s of its memory; `.../exposed`: what the
  pages take longer than the FLOP, as a share of it.
- `ceiling/...`: copies at 90 % of the memory speed, a product at 80 % of the peak, a link of 16 lanes.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import chunkft
from chunkft.kernels.targets import TARGETS, Target
from chunkft.weights import find_units
from chunkft.weights.units import SLOTS

from . import common, plain_llama, predict
from .kernel_cases import cases
from .kernel_updates import MODES, TABLES
from .kernels import prediction
from .suite_cases import DENSE, MEASURED

FOLDER = common.RESULTS / "predicted"
GPUS = ("h100", "h200")
ELEMENTS = 200_000_000
SHARE = 0.85  # of the memory speed of the data sheet that a copy reaches
FLOPS = 0.65  # of the 16-bit peak that a step reaches
PRODUCT = 0.8  # and a large product alone
LINK = {8: 25.0, 9: 50.0, 10: 50.0, 12: 50.0}  # GB/s that pinned copies reach, by major compute capability
HOST_RATE = 40e9  # bytes a second that AdamW on the host reads and writes
CONTEXT = 0.6  # GiB of context, modules and libraries' work space
CHUNKS, TOKENS, INTERVAL = 32, 1024, 4  # of the suite's cases of the paper


def kernel_figures(target: Target) -> dict[str, float]:
    """Microseconds of every case of the suite's kernels."""
    found = {}
    for case in cases(MEASURED, (1, 32), (1024, 4096), DENSE):
        told = prediction(case, target)
        found[f"{case.key}/triton"] = told["triton_us"]
        found[f"{case.key}/torch"] = told["torch_us"]
        found[f"{case.key}/auto"] = told[f"{told['auto']}_us"]
    rate = SHARE * target.bandwidth * 1e3  # bytes a microsecond
    kept = {"residual": 2, "fp32": 4, "none": 0, "stochastic": 0}
    for mode in MODES:
        found[f"adamw/{mode}/default/kernel"] = ELEMENTS * (2 * (2 + 8 + kept[mode]) + 2) / rate
    found["adamw/none fp32/default/kernel"] = ELEMENTS * (2 * 12 + 4) / rate
    for tokens, vocabulary, width, rows in TABLES:
        hits = tokens * rows / vocabulary
        found[f"embedding/T{tokens}/V{vocabulary}/uniform/kernel"] = 2 * width * (hits + rows) / rate
    return found


def ceiling_figures(target: Target) -> dict[str, float]:
    """Copies, a product, the link."""
    link = LINK[target.capability // 10]
    return {
        "ceiling/copy_gb_s": 0.9 * target.bandwidth,
        "ceiling/bf16_tflops": PRODUCT * target.tflops_16bit,
        "ceiling/link/load": link,
        "ceiling/link/store": link,
        "ceiling/link/both": 1.7 * link,
    }


def paper_figures(target: Target) -> dict[str, float]:
    """Peak, step and exposed paging of Llama-2-7B at 1,024 tokens and 32 chunks, by place of the state."""
    rows, lean, elements, table = _paper_bytes()
    places = {
        "adamw": ("AdamW, full", 1),
        "paged K=32": ("chunkft, paged", CHUNKS),
        "stream K=32": ("chunkft, stream", CHUNKS),
        "backward K=1": ("chunkft, stream, update in backward", 1),
    }
    found: dict[str, float] = {}
    for place, key in places.items():
        # the benchmark's AdamW keeps moments in bf16 and no master: 4 bytes a parameter, not 12
        extra = -8 * elements if place == "adamw" else 0
        peak = (rows[key]["peak"] + extra) / 2**30
        found |= {f"llama-2-7b/{place}/peak": peak, f"llama-2-7b/{place}/driver": peak + CONTEXT}
        full = place in ("adamw", "backward K=1")
        found[f"llama-2-7b/{place}/step"] = step_ms(target, elements - table, elements, full)
    found["llama-2-7b/lean K=128/peak"] = lean / 2**30
    found["llama-2-7b/lean K=128/driver"] = lean / 2**30 + CONTEXT
    hidden = INTERVAL * found["llama-2-7b/paged K=32/step"]
    # milliseconds to load the state of all parameters; with one chunk every step waits for that
    every = 1e3 * elements * 10 / (LINK[target.capability // 10] * 1e9)
    found["llama-2-7b/backward K=1/step"] = max(found["llama-2-7b/backward K=1/step"], every)
    each = every / CHUNKS
    for place in ("paged K=32", "stream K=32"):
        found[f"llama-2-7b/{place}/exposed"] = max(0.0, each - hidden) / max(each, hidden)
    return found


@functools.cache
def _paper_bytes() -> tuple[dict[tuple[str, int], dict[str, Any]], float, int, int]:
    """Of every GPU alike: rows of `predict.held`, the lean peak, parameters, and those of the table of tokens."""
    model = predict.shape_of("llama-2-7b")
    rows = {(row["variant"], row["chunks"]): row for row in predict.held(model, 1, TOKENS)}
    elements = sum(p.numel() for p in model.parameters())
    return rows, lean_peak(model), elements, model.table.weight.numel()


@functools.cache
def _streamed_peak(tokens: int, place: str) -> float:
    """Bytes, on every GPU alike."""
    model = predict.shape_of("llama-2-7b")
    return float(predict.streamed(model, 1, tokens, CHUNKS, on_host=place == "host")["peak"])


def streamed_figures(target: Target) -> dict[str, float]:
    """Peak, step and exposed copies of Llama-2-7B whose weights stream, for the mean of a sweep over its blocks."""
    model, shape = predict.shape_of("llama-2-7b"), plain_llama.SHAPES["llama-2-7b"]
    units = find_units(model)
    page = units.slot_nbytes()
    kept = (shape.layers - SLOTS) ** 2 / (
        2 * shape.layers
    )  # of blocks that come back, on average over the depth
    nbytes = page * (shape.layers + kept) + 2 * sum(sum(table.tiles) for table in units.tables)
    link = 1e3 * nbytes / (LINK[target.capability // 10] * 1e9)
    elements = sum(p.numel() for p in model.parameters())
    found: dict[str, float] = {}
    for tokens in (1024, 4096):
        base = f"streamed/llama-2-7b/T{tokens}/resident0"
        compute = step_ms(target, elements - model.table.weight.numel(), elements, False, tokens)
        found[f"{base}/no compute/step"] = link
        found[f"{base}/resident/step"] = compute
        for place, update in (("host", 1e3 * elements / CHUNKS * 26 / HOST_RATE), ("device", 0.0)):
            peak = _streamed_peak(tokens, place) / 2**30
            step = max(compute, link) + update
            found[f"{base}/{place}/peak"] = peak
            found[f"{base}/{place}/step"] = step
            found[f"{base}/{place}/exposed"] = max(0.0, link - compute) / step
    return found


def lean_peak(model: plain_llama.PlainLlama) -> float:
    """Bytes with 128 chunks, three pages of 16 MiB and no logits: those that are saved are left out, in fp32."""
    plan = chunkft.partition(model, 4 * CHUNKS)
    ids = torch.zeros(1, TOKENS + 1, dtype=torch.long, device="meta")
    saved = predict.saved_bytes(model, plan.chunks[0].slices, lambda: model(ids))
    saved -= 4 * TOKENS * model.lm_head.out_features
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gradients = 2 * max(chunk.numel for chunk in plan.chunks)
    return weights + gradients + 3 * (16 << 20) + saved + predict.recomputed_block(model, 1, TOKENS)


def step_ms(target: Target, multiplied: int, elements: int, full: bool, tokens: int = TOKENS) -> float:
    """Milliseconds of a step: `multiplied` parameters are in products; of a chunk half of the depth is recomputed."""
    depth = 1.0 if full else 0.5
    products = 2 * tokens * multiplied * (1 + 2 * depth + (1.0 if full else 1 / CHUNKS))
    update = elements * 14 / (1 if full else CHUNKS) / (SHARE * target.bandwidth * 1e9)
    return 1e3 * (products / (FLOPS * target.tflops_16bit * 1e12) + update)


def predicted(target: Target) -> dict[str, Any]:
    """Every figure of a GPU by key."""
    every = ceiling_figures(target) | kernel_figures(target)
    every |= paper_figures(target) | streamed_figures(target)
    return {key: {"value": round(value, 4)} for key, value in every.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.predictions", description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", nargs="+", choices=list(TARGETS), default=list(GPUS))
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default bench/results/predicted)")
    args = parser.parse_args(arguments)
    for name in args.gpu:
        figures = predicted(TARGETS[name])
        path = args.out / f"{name}.json"
        common.write_json(path, common.header(0) | {"kind": "predicted", "gpu": name, "figures": figures})
        for key in ("llama-2-7b/paged K=32/peak", "llama-2-7b/paged K=32/step", "llama-2-7b/adamw/step"):
            print(f"{name} {key} {figures[key]['value']:.2f}")
        print(f"{path}: {len(figures)} figures, predicted")


if __name__ == "__main__":
    main()
