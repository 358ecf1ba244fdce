"""Embedding lookup whose weight gradient is computed for active slices only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from chunkft import tracing
from chunkft.autograd.linear import backward_name, differentiated_again, own_tensor, placed, wants_weight
from chunkft.autograd.slices import Slice
from chunkft.autograd.stand_ins import stand_in_of
from chunkft.kernels import embedding_grad


def sliced_embedding(
    ids: Tensor,
    weight: Tensor,
    active: Sequence[tuple[Slice, Tensor]],
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """Embedding lookup whose backward yields the gradient of the active rows or columns, and of no others.

    Args:
        ids: (...) int32 or int64 token ids.
        weight: (V, H); gets no gradient itself.
        active: pairs of a slice (dim 0: vocabulary rows, dim 1: columns) and a leaf of its shape that shares
            memory with ``weight``.
        padding_idx: as in ``torch.nn.functional.embedding``.
        scale_grad_by_freq: as in ``torch.nn.functional.embedding``.

    Returns:
        (..., H) tensor of ``weight``'s dtype.
    """
    if not active or not torch.is_grad_enabled():
        return F.embedding(ids, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    windows = []
    for piece, _ in active:
        if piece.dim not in (0, 1):
            raise ValueError(f"active slice {piece} has dim={piece.dim}; an embedding takes 0 or 1")
        windows.append((piece.dim, piece.start, piece.stop))
    leaves = [stand_in_of(leaf, weight.device) for _, leaf in active]
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return _SlicedEmbedding.apply(  # type: ignore[no-any-return, no-untyped-call]
        ids,
        weight.detach(),
        weight,
        padding_idx,
        scale_grad_by_freq,
        tuple(windows),
        backward_name(active),
        *leaves,
    )


class _SlicedEmbedding(Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        weight: Tensor,
        parameter: Tensor,
        padding_idx: int | None,
        scale_grad_by_freq: bool,
        windows: tuple[tuple[int, int, int], ...],
        name: str,
        *leaves: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_embeddings = weight.shape[0]
        ctx.parameter_shape = parameter.shape
        ctx.options = padding_idx, scale_grad_by_freq
        ctx.windows = windows
        ctx.name = name
        return own_tensor(F.embedding(ids, weight, padding_idx))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        with tracing.span("backward %s", ctx.name):
            return _SlicedEmbedding._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        padding_idx, by_frequency = ctx.options
        backend = "torch" if differentiated_again() else "auto"  # PyTorch's has derivatives of its own
        grads: list[Tensor | None] = []
        for (dim, start, stop), need in zip(ctx.windows, ctx.needs_input_grad[7:], strict=True):
            if not need:
                grads.append(None)
                continue
            rows, cols = ((start, stop), None) if dim == 0 else (None, (start, stop))
            grads.append(
                embedding_grad(dy, ids, ctx.num_embeddings, rows, cols, padding_idx, by_frequency, backend)
            )
        whole = None
        if ctx.needs_input_grad[2] and wants_weight(ctx, 2, len(ctx.windows)):
            whole = placed(grads, ctx.windows, ctx.parameter_shape)
        return (None, None, whole, None, None, None, None, *grads)
