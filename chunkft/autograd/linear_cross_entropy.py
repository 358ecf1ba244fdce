"""The loss of a language model's head, with gradients of the active slices of its weight only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from chunkft import tracing
from chunkft.autograd.linear import autocast_inputs, backward_name, split_active
from chunkft.autograd.slices import Slice
from chunkft.kernels.linear_cross_entropy import Loss, Window, linear_cross_entropy

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
    hidden, weight, _ = autocast_inputs(hidden, weight.detach(), None)
    windows, leaves = split_active(active)
    flat = hidden.reshape(targets.numel(), hidden.shape[-1])
    recorded, name = torch.is_grad_enabled(), backward_name(active)
    losses: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        flat, weight, targets.reshape(-1), loss, reduction, chunk, recorded, windows, name, *leaves
    )
    return losses.view(targets.shape) if reduction == "none" else losses


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss: Loss,
        reduction: str,
        chunk: int | None,
        recorded: bool,
        windows: tuple[Window, ...],
        name: str,
        *leaves: Tensor,
    ) -> Tensor:
        ctx.name = name
        needs = ctx.needs_input_grad[9:]
        wanted = tuple(w for w, need in zip(windows, needs, strict=True) if need and recorded)
        need_hidden = ctx.needs_input_grad[0] and recorded
        ctx.setting = loss, reduction, chunk, wanted
        ctx.dtypes = tuple(leaf.dtype for leaf in leaves)
        at_once = reduction != "none"
        losses, dx, dw = linear_cross_entropy(
            hidden,
            weight,
            targets,
            wanted if at_once else (),
            loss=loss,
            hidden_grad=need_hidden and at_once,
            chunk=chunk,
        )
        if not at_once:
            ctx.save_for_backward(hidden, weight, targets)
            return losses
        # Kept as gradients of the sum: divided by the number of tokens those of fp16 would underflow.
        count = (targets != loss.ignore_index).sum().to(losses.dtype)
        total = losses.sum()
        ctx.save_for_backward(count, dx, *dw)
        return total / count if reduction == "mean" else total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        with tracing.span("backward %s", ctx.name):
            return _LinearCrossEntropy._gradients(ctx, upstream)

    @staticmethod
    def _gradients(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        loss, reduction, chunk, wanted = ctx.setting
        if reduction == "none":
            hidden, weight, targets = ctx.saved_tensors
            _, dx, dw = linear_cross_entropy(
                hidden,
                weight,
                targets,
                wanted,
                loss=loss,
                hidden_grad=ctx.needs_input_grad[0],
                upstream=upstream,
                chunk=chunk,
            )
        else:
            count, dx, *dw = ctx.saved_tensors
            # without any token the gradients are zero, and have to stay so
            scale = upstream / count.clamp(min=1) if reduction == "mean" else upstream
            # a scalar tensor would be rounded to fp16 before the product
            dx = None if dx is None else (dx.to(scale.dtype) * scale).to(dx.dtype)
            dw = [gradient * scale for gradient in dw]
        found = iter(dw)
        leaves = [
            next(found).to(dtype) if need else None
            for need, dtype in zip(ctx.needs_input_grad[9:], ctx.dtypes, strict=True)
        ]
        return (dx, None, None, None, None, None, None, None, None, *leaves)
