"""The setup that speed and memory are measured on: a 28M-parameter Llama, its batch, its optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import peers

LR = 1e-5


@dataclass(frozen=True)
class Size:
    """Shape of model and batch; the default has 28.1M parameters, 2.4M of them in embedding and head."""

    hidden: int = 512
    layers: int = 8
    intermediate: int = 1408
    heads: int = 8
    vocab: int = 2304
    batch: int = 4
    tokens: int = 256


TINY = Size(hidden=64, layers=2, intermediate=128, heads=4, vocab=128, batch=2, tokens=16)


def build_model(size: Size, seed: int = 0) -> nn.Module:
    """A Llama with random fp32 weights drawn from `seed`, embedding and head untied, no key-value cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        intermediate_size=size.intermediate,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=size.vocab,
        max_position_embeddings=size.tokens,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config).float().train()


def build_batch(size: Size, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids (batch, tokens) int64, labels equal to the ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, size.vocab, (size.batch, size.tokens), generator=generator)
    return {"input_ids": ids, "labels": ids}


def chunk_adamw(model: nn.Module, chunks: int, interval: int, **options: Any) -> torch.optim.Optimizer:
    """ChunkAdamW with the defaults of a user, but for the number of chunks and the interval."""
    import chunkft

    return chunkft.ChunkAdamW(model, lr=LR, chunks=chunks, interval=interval, **options)


def variants(
    chunks: int, interval: int, chunk_options: Sequence[dict[str, Any]] = ({},)
) -> dict[str, Callable]:
    """Optimizer factories by name: full AdamW, BAdam with as many blocks, ChunkAdamW once per option set."""
    made: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": lambda model: peers.adamw(model, LR, 0.01, fused=False),
        "adamw-fused": lambda model: peers.adamw(model, LR, 0.01, fused=True),
    }
    for name, fused in (("badam", False), ("badam-fused", True)):
        made[name] = lambda model, fused=fused: peers.badam(
            model, LR, 0.01, peers.llama_blocks(model, chunks), interval, order="descending", fused=fused
        )
    for options in chunk_options:
        name = "-".join(["chunk", *(f"{k}={v}" for k, v in options.items())])
        made[name] = lambda model, options=options: chunk_adamw(model, chunks, interval, **options)
    return made
