"""What a training run compiles: the kernels of all slices of a plan, launched once each without a GPU.

python -m bench.variants                       Llama-2-7B in 32 chunks, 1,024 tokens: one line a variant
python -m bench.variants --chunks 8 --tokens 4096
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import chunkft
from chunkft.autograd import Slice
from chunkft.kernels import adamw, embedding_grad, wgrad

from .empty_launches import Record, empty_launches

LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


def llama(shape: dict[str, int]) -> nn.Module:
    """A Llama in bf16 whose weights take no memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)).bfloat16()


def sweep(model: nn.Module, plan: chunkft.ChunkPlan, tokens: int) -> Record:
    """Launches of one sweep over the plan: a gradient of every slice by Triton, and the update of every chunk."""
    weights = dict(model.named_parameters())
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    operands: dict[int, Tensor] = {}
    with empty_launches() as record:
        for chunk in plan.chunks:
            params = [
                _gradient(piece, weights[piece.name], piece.name in linears, tokens, operands)
                for piece in chunk.slices
            ]
            _update(params)
    return record


def _gradient(piece: Slice, weight: Tensor, linear: bool, tokens: int, operands: dict[int, Tensor]) -> Tensor:
    """The gradient of a slice, which nobody computes; memory that is not touched costs nothing."""
    if weight.dim() == 1:
        return torch.empty(weight.shape, dtype=weight.dtype)
    rows, cols = weight.shape
    for width in (rows, cols):
        if width not in operands and (linear or width == cols):
            operands[width] = torch.empty(tokens, width, dtype=weight.dtype)
    start, stop = (0, rows) if piece.dim is None else (piece.start, piece.stop)
    if linear:
        return wgrad(operands[rows], operands[cols], slice(start, stop), backend="triton")
    ids = torch.zeros(tokens, dtype=torch.int64)
    return embedding_grad(operands[cols], ids, rows, rows=(start, stop), backend="triton")


def _update(grads: Sequence[Tensor]) -> None:
    """AdamW as ChunkAdamW calls it for 16-bit weights."""
    params = [torch.empty_like(grad) for grad in grads]
    moments = [[torch.empty(grad.shape) for grad in grads] for _ in range(2)]
    residuals = [torch.empty(grad.shape, dtype=torch.int16) for grad in grads]
    steps = [torch.zeros(()) for _ in grads]
    adamw(params, grads, *moments, steps, lr=1e-5, residuals=residuals, master="residual", backend="triton")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.variants", description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args(arguments)
    model = llama(LLAMA_2_7B)
    plan = chunkft.partition(model, chunks=options.chunks)
    record = sweep(model, plan, options.tokens)
    for handle, text in record.variants.items():
        print(f"{sum(one.variant == handle for one in record.launches):5d} launches  {text}")
    slices = sum(len(chunk.slices) for chunk in plan.chunks)
    size = math.prod((len(record.variants), 1))
    print(f"{size} variants, {len(record.launches)} launches, {slices} slices in {options.chunks} chunks")


if __name__ == "__main__":
    main()
