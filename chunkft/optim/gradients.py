"""What happens to gradients between the backward pass and the update."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def unscale(grads: list[Tensor], scale: Tensor | None, found_inf: Tensor | float | None = None) -> None:
    """Divide in place by the scale of a GradScaler, if there is one, and keep what it found.

    Where ``found_inf`` is not 0, a NaN goes into a gradient: the step is skipped then as it is for gradients that are
    not finite now, by every process that averages with this one, whatever made them finite since the scaler looked.

    Raises:
        ValueError: for fp16 gradients, which would underflow.
    """
    if grads and found_inf is not None:
        spoil(grads[0], torch.as_tensor(found_inf))
    if scale is None or not grads:
        return
    if any(grad.dtype == torch.float16 for grad in grads):
        raise ValueError(
            "a GradScaler cannot be used with float16 weights, whose gradients would underflow when they are "
            "unscaled; use float32 weights with autocast, or bfloat16 ones"
        )
    inverse = scale.double().reciprocal().float()
    for grad in grads:
        grad.mul_(inverse.to(grad.device))


def spoil(gradient: Tensor, found_inf: Tensor) -> None:
    """Put a NaN into a gradient where a flag is not 0, without asking the device."""
    values = gradient._values() if gradient.is_sparse else gradient
    if values.numel():
        first = values[(0,) * values.dim()]
        spoiled = torch.full_like(first, math.nan)
        # on the device, without asking it
        first.copy_(torch.where(found_inf.to(first.device) != 0, spoiled, first))


def all_finite(grads: list[Tensor]) -> bool:
    """Whether no element of any gradient is infinite or NaN; waits for the device once."""
    # A sum with a non-finite term is not finite, and on a CPU it takes a 25th of the time of the largest element.
    if all(grad.is_cpu for grad in grads) and all(math.isfinite(grad.sum().item()) for grad in grads):
        return True
    return bool(torch.isfinite(get_total_norm(grads, float("inf"))))


def non_finite(grads: list[Tensor]) -> Tensor:
    """1.0 if an element of any gradient is infinite or NaN, else 0.0: fp32 on their device, which nobody waits for."""
    return (~torch.isfinite(get_total_norm(grads, float("inf")))).float()


def clip(leaves: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients in place to a joint Euclidean norm of at most ``max_norm``; returns the norm before."""
    norm = get_total_norm([leaf.grad for leaf in leaves if leaf.grad is not None], 2.0)
    clip_grads_with_norm_(leaves, max_norm, norm)
    return norm
