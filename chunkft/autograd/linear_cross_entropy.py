"""The loss of a language model's head, with gradients of the active slices of its weight only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from chunkft import tracing
from chunkft.autograd.linear import autocast_inputs, backward_name, differentiated_again, split_active
from chunkft.autograd.slices import Slice
from chunkft.autograd.tiled import tiles_of
from chunkft.kernels.linear_cross_entropy import Loss, RowTiles, Window, linear_cross_entropy

REDUCTIONS = ("mean", "sum", "none")


def sliced_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    active: Sequence[tuple[Slice, Tensor]] = (),
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """``cross_entropy(linear(hidden, weight), targets)`` without the logits and without the whole weight gradient.

    For ``"mean"`` and ``"sum"`` the gradients are computed together with the loss, so that logits are computed once;
    from then on they take the memory of ``hidden`` and of the active slices. For ``"none"`` the backward pass
    computes the logits again.

    Args:
        hidden: (..., H).
        weight: (V, H); gets no gradient itself.
        targets: (...) int64, of the shape of ``hidden`` without its last dimension.
        active: pairs of a slice (dim 0: vocabulary rows, dim 1: columns) and a leaf of its shape that shares memory
            with ``weight``.
        reduction: ``"mean"`` over the tokens that are not ignored, ``"sum"`` or ``"none"``.
        ignore_index: as in ``torch.nn.functional.cross_entropy``.
        label_smoothing: likewise.
        softcap: logits are ``softcap * tanh(logits / softcap)``; None for plain logits.
        chunk: tokens at a time; see ``chunkft.kernels.linear_cross_entropy``.

    Returns:
        The loss, fp32 (fp64 for fp64): a scalar, or of the shape of ``targets``.

    Raises:
        ValueError: if shapes, dtypes or options do not fit.
        IndexError: if a target is out of range.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not known; allowed are 'mean', 'sum' and 'none'")
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must be of shape {tuple(hidden.shape[:-1])}, that of hidden without its last dimension, got "
            f"{tuple(targets.shape)}"
        )
    loss = Loss(ignore_index, label_smoothing, softcap)
    tiles = tiles_of(weight)
    if tiles is None:
        hidden, weight, _ = autocast_inputs(hidden, weight.detach(), None)
    else:  # which are cast one by one
        hidden, _, _ = autocast_inputs(hidden, hidden.new_empty(0), None)
        weight = hidden.new_empty(()).expand(tiles.shape)
    windows, leaves = split_active(active, hidden.device)
    flat = hidden.reshape(targets.numel(), hidden.shape[-1])
    recorded, name = torch.is_grad_enabled(), backward_name(active)
    link = flat[:0]  # nothing of the input but its place in the graph
    losses: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        flat,
        weight,
        targets.reshape(-1),
        loss,
        reduction,
        (chunk, tiles),
        recorded,
        windows,
        name,
        link,
        *leaves,
    )
    return losses.view(targets.shape) if reduction == "none" else losses


class _Once(Function):
    """Gradients as they are, whose own gradients are refused with a sentence rather than taken for zero."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        # what comes after the gradients is what they depend on
        return tuple(torch.ops.aten._unsafe_view(gradient, gradient.shape) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            "sliced_linear_cross_entropy cannot be differentiated twice, because its logits are not kept; with "
            "create_graph=True take cross_entropy of sliced_linear"
        )


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss: Loss,
        reduction: str,
        part: tuple[int | None, RowTiles | None],
        recorded: bool,
        windows: tuple[Window, ...],
        name: str,
        link: Tensor,
        *leaves: Tensor,
    ) -> Tensor:
        ctx.name = name
        needs = ctx.needs_input_grad[10:]
        wanted = tuple(w for w, need in zip(windows, needs, strict=True) if need and recorded)
        need_hidden = ctx.needs_input_grad[0] and recorded
        ctx.setting = loss, reduction, part, wanted
        ctx.leaves = leaves
        at_once = reduction != "none"
        losses, dx, dw = linear_cross_entropy(
            hidden,
            weight,
            targets,
            wanted if at_once else (),
            loss=loss,
            hidden_grad=need_hidden and at_once,
            chunk=part[0],
            tiles=part[1],
        )
        if not at_once:
            ctx.save_for_backward(link, hidden, weight, targets)
            return losses
        # Kept as gradients of the sum: divided by the number of tokens those of fp16 would underflow.
        count = (targets != loss.ignore_index).sum().to(losses.dtype)
        total = losses.sum()
        ctx.save_for_backward(link, count, dx, *dw)
        return total / count if reduction == "mean" else total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        with tracing.span("backward %s", ctx.name), torch.no_grad():
            gradients = _LinearCrossEntropy._gradients(ctx, upstream)
        if not differentiated_again():
            return gradients
        found = [one for one in gradients if one is not None]
        origins = [one for one in (upstream, ctx.saved_tensors[0], *ctx.leaves) if one.requires_grad]
        guarded = iter(_Once.apply(len(found), *found, *origins))  # type: ignore[no-untyped-call]
        return tuple(None if one is None else next(guarded) for one in gradients)

    @staticmethod
    def _gradients(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        loss, reduction, (chunk, tiles), wanted = ctx.setting
        if reduction == "none":
            _, hidden, weight, targets = ctx.saved_tensors
            _, dx, dw = linear_cross_entropy(
                hidden,
                weight,
                targets,
                wanted,
                loss=loss,
                hidden_grad=ctx.needs_input_grad[0],
                upstream=upstream,
                chunk=chunk,
                tiles=tiles,
            )
        else:
            _, count, dx, *dw = ctx.saved_tensors
            # without any token the gradients are zero, and have to stay so
            scale = upstream / count.clamp(min=1) if reduction == "mean" else upstream
            # a scalar tensor would be rounded to fp16 before the product
            dx = None if dx is None else (dx.to(scale.dtype) * scale).to(dx.dtype)
            dw = [gradient * scale for gradient in dw]
        found = iter(dw)
        leaves = [
            next(found).to(leaf.dtype) if need else None
            for need, leaf in zip(ctx.needs_input_grad[10:], ctx.leaves, strict=True)
        ]
        return (dx, None, None, None, None, None, None, None, None, None, *leaves)
