"""What training holds, predicted from shapes alone: no memory is taken and nothing is computed.

python -m bench.predict         Llama-2-7B and Llama-3-8B in bf16; checked against what bench.memory counted on 28M

Gradients, state and pages follow from the plan. Activations are those that autograd saves when the model runs on
PyTorch's meta device with the slices of a chunk attached: inputs of checkpointed blocks, head and loss. To them comes
the larger of what the backward pass makes on the way: two fp32 gradients of the logits, or one recomputed block (flash
attention) beside the gradients of the chunk. Not counted: work space of matrix products, the allocator's rounding, the
CUDA context.
"""

from __future__ import annotations

import argparse
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import chunkft
from chunkft.weights import find_units

from . import common, plain_llama

OUT = common.RESULTS / "memory-predicted.json"
PAGE_BYTES = 64 << 20
PAGES = 3
RESIDUAL = 2  # bytes of a bf16 weight's missing half
MASTER = 4  # bytes of the fp32 master that full fine-tuning keeps beside a 16-bit weight
MOMENTS = 8  # bytes of two fp32 moments
CASES = (
    {"model": "llama-2-7b", "tokens": 1024, "batch": 1},
    {"model": "llama-3-8b", "tokens": 1024, "batch": 1},
    {"model": "llama-3-8b", "tokens": 4096, "batch": 1},
)
CHUNKS = (8, 16, 32, 64)


class Held:
    """A tensor that autograd keeps; gone when autograd lets it go."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedShapes:
    """Counts bytes of the distinct storages that autograd keeps on the meta device, where all have address 0;
    parameters excluded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {p.untyped_storage()._cdata for p in model.parameters()}
        self._held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(self, tensor: Tensor) -> Held:
        """Saved-tensor hook."""
        held = Held(tensor)
        self._held.add(held)
        return held

    def total(self) -> int:
        """Bytes that autograd keeps now."""
        storages = [held.tensor.untyped_storage() for held in self._held]
        return sum({s._cdata: s.nbytes() for s in storages if s._cdata not in self._own}.values())


def saved_bytes(model: nn.Module, slices: Iterable[chunkft.Slice] | None, run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps after `run`, a forward pass of `model` on the meta device with `slices` active
    (None: every weight); raises ValueError where the result requires no gradient.
    """
    attachment = chunkft.attach(model) if slices is not None else None
    try:
        if attachment is not None:
            attachment.freeze()
            attachment.activate(slices)
        saved = SavedShapes(model)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
            result = run()
        if not result.requires_grad:
            raise ValueError("the forward pass uses none of the active slices, so nothing is saved")
        return saved.total()
    finally:
        if attachment is not None:
            attachment.detach()


class FlashShapes(torch.autograd.Function):
    """Keeps for backward what flash attention keeps: its inputs, its output, and fp32 sums (B, H, T)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError("shapes only: nothing is computed on the meta device")


def recomputed_block(model: plain_llama.PlainLlama, batch: int, tokens: int) -> int:
    """Bytes that autograd keeps of one block while it is recomputed with all of its weights active."""
    block, hidden = model.blocks[0], model.table.embedding_dim
    dtype = next(model.parameters()).dtype
    x = torch.empty(batch, tokens, hidden, device="meta", dtype=dtype, requires_grad=True)
    angles = torch.empty(tokens, model.head, device="meta", dtype=dtype)
    # On the meta device PyTorch takes its attention without a kernel, which keeps (T, T) matrices.
    flash = mock.patch.object(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: FlashShapes.apply(q, k, v)
    )
    with flash:
        return saved_bytes(block, None, lambda: block(x, angles, angles))


@functools.cache
def shape_of(name: str) -> plain_llama.PlainLlama:
    """A named shape in bf16 on the meta device, blocks recomputed in the backward pass."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return plain_llama.PlainLlama(plain_llama.SHAPES[name], checkpointing=True).train()
    finally:
        torch.set_default_dtype(before)


def held(model: plain_llama.PlainLlama, batch: int, tokens: int) -> list[dict[str, Any]]:
    """Bytes on the device for full AdamW and for chunkft in each of its residencies."""
    ids = torch.zeros(batch, tokens + 1, dtype=torch.long, device="meta")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    elements = sum(p.numel() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    logits = 2 * 4 * batch * tokens * model.lm_head.out_features
    block = recomputed_block(model, batch, tokens)
    run = functools.partial(model, ids)
    everything = saved_bytes(model, None, run)

    full = elements * (MOMENTS + MASTER)

    def row(name: str, chunks: int, gradients: int, state: int, saved: int) -> dict[str, Any]:
        # gradients of weights do not exist yet when those of the logits do
        passing = max(logits - gradients, block)
        parts = {
            "weights": weights,
            "gradients": gradients,
            "state": state,
            "activations": saved,
            "backward": passing,
        }
        host = elements * (MOMENTS + RESIDUAL) if state != full else 0
        return {"variant": name, "chunks": chunks, **parts, "peak": sum(parts.values()), "host": host}

    rows = [row("AdamW, full", 1, weights, full, everything)]
    for chunks in CHUNKS:
        plan = chunkft.partition(model, chunks)
        saved = max(saved_bytes(model, chunk.slices, run) for chunk in plan.chunks[:: max(1, chunks // 8)])
        elements_of_chunk = max(chunk.numel for chunk in plan.chunks)
        state = elements_of_chunk * (MOMENTS + RESIDUAL)
        rows.append(row("chunkft, paged", chunks, 2 * elements_of_chunk, 2 * state, saved))
        rows.append(row("chunkft, stream", chunks, 2 * elements_of_chunk, PAGES * PAGE_BYTES, saved))
    rows.append(row("chunkft, stream, update in backward", 1, largest, PAGES * PAGE_BYTES, everything))
    return rows


def streamed(
    model: plain_llama.PlainLlama, batch: int, tokens: int, chunks: int, *, on_host: bool, resident: int = 0
) -> dict[str, int]:
    """Bytes on the device by kind, their sum as `peak`, and those of weights in host memory, for weights that stream
    and a head without logits.

    `on_host` says where the update runs; on the device, state passes through pages. Gradients are taken to be there
    until the last of the chunk has come down.
    """
    units = find_units(model)
    named, plan = dict(model.named_parameters()), chunkft.partition(model, chunks)
    wide = next(iter(named.values())).element_size()
    ids = torch.zeros(batch, tokens + 1, dtype=torch.long, device="meta")
    run = functools.partial(model, ids)
    saved = max(saved_bytes(model, chunk.slices, run) for chunk in plan.chunks[:: max(1, chunks // 8)])
    states = batch * tokens * model.table.embedding_dim * wide
    intermediate = batch * tokens * model.blocks[0].down.in_features * wide
    chunk = wide * max(chunk.numel for chunk in plan.chunks)
    rest = sum(named[name].numel() * named[name].element_size() for name in units.rest)
    parts = {
        "weights": rest + units.resident_nbytes(resident) + units.ring_nbytes(resident) + units.tile_nbytes(),
        "leaves": 0 if on_host else chunk,
        "gradients": chunk,
        "state": 0 if on_host else PAGES * PAGE_BYTES,
        # of the loss its gradient is kept in place of the logits
        "activations": saved - 4 * batch * tokens * model.lm_head.out_features + states,
        # and of a block what passes through it on the way back, of which three of its widest are there at a time
        "backward": recomputed_block(model, batch, tokens) + 3 * intermediate + 2 * states,
    }
    return parts | {"peak": sum(parts.values()), "host": units.host_nbytes(resident)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.predict", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    cases = []
    for case in CASES:
        model = shape_of(case["model"])
        rows = held(model, case["batch"], case["tokens"])
        parameters = sum(p.numel() for p in model.parameters())
        cases.append({**case, "dtype": "bfloat16", "parameters": parameters, "rows": rows})
        for row in rows:
            print(
                f"{case['model']} {case['tokens']:5d} tokens, {row['variant']:36s} K={row['chunks']:3d} "
                f"predicted peak {row['peak'] / 2**30:7.2f} GiB"
            )
    common.write_json(
        args.out, {**common.header(0), "kind": "predicted", "page_bytes": PAGE_BYTES, "cases": cases}
    )
    print(args.out)


if __name__ == "__main__":
    main()
