"""A Llama in plain PyTorch with random weights, for machines that have nothing but PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chunkft.autograd import Slice, sliced_linear_cross_entropy


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `kv` key-value heads share each the queries of `heads / kv` heads."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv: int
    vocab: int


SHAPES = {
    "tiny": Shape(64, 2, 128, 4, 2, 128),
    "3M": Shape(192, 6, 512, 6, 6, 1024),
    "28M": Shape(512, 8, 1408, 8, 8, 2304),
    "1B": Shape(2048, 16, 8192, 32, 8, 32000),
    "llama-2-7b": Shape(4096, 32, 11008, 32, 32, 32000),
    "llama-3-8b": Shape(4096, 32, 14336, 32, 8, 128256),
}


class Block(nn.Module):
    """Attention and gated MLP, each behind an RMSNorm and around a residual path."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, head = shape.hidden, shape.hidden // shape.heads
        self.head = head
        self.norm1 = nn.RMSNorm(width, eps=1e-5)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, shape.kv * head, bias=False)
        self.v = nn.Linear(width, shape.kv * head, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.norm2 = nn.RMSNorm(width, eps=1e-5)
        self.gate = nn.Linear(width, shape.intermediate, bias=False)
        self.up = nn.Linear(width, shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        h = self.norm1(x)
        q, k, v = (p(h).view(batch, tokens, -1, self.head).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(h.transpose(1, 2).reshape(batch, tokens, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class PlainLlama(nn.Module):
    """Returns the mean cross entropy of the next token; `checkpointing` recomputes each block in the backward pass.

    Where `active_rows_of_head` is set, it gives the active slices of the head with their leaves, and the loss is
    computed without logits.
    """

    def __init__(self, shape: Shape, checkpointing: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        self.checkpointing = checkpointing
        self.active_rows_of_head: Callable[[], list[tuple[Slice, nn.Parameter]]] | None = None
        self.head = shape.hidden // shape.heads

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        frequencies = 10000.0 ** (-torch.arange(0, self.head, 2, device=ids.device) / self.head)
        angles = torch.outer(torch.arange(ids.shape[1], device=ids.device), frequencies).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin)
        if self.active_rows_of_head is not None:
            active = self.active_rows_of_head()
            return sliced_linear_cross_entropy(self.norm(x[:, :-1]), self.lm_head.weight, ids[:, 1:], active)
        logits = self.lm_head(self.norm(x[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (B, H, T, D) by (T, D) angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def build(
    name: str, device: torch.device, dtype: torch.dtype, checkpointing: bool = False, seed: int = 0
) -> PlainLlama:
    """A model of a named shape with random weights, made on its device."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = PlainLlama(SHAPES[name], checkpointing)
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def batch_of(name: str, device: torch.device, batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Random token ids (batch, tokens + 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SHAPES[name].vocab, (batch, tokens + 1), generator=generator).to(device)
