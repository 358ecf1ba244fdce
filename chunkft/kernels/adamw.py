"""AdamW for all slices of a chunk: one launch on a GPU, the operations of ``torch.optim.AdamW`` on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from chunkft.kernels import gpu
from chunkft.kernels.adamw_codes import check_codes, keep_moments, moments, scale_columns
from chunkft.kernels.adamw_table import Columns, Scalars
from chunkft.kernels.rounding import apply_residual, split_residual, stochastic_round

MASTERS = ("none", "fp32", "residual", "stochastic")
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Piece:
    """The tensors of one slice, seen so that the state is contiguous; scalars as Python numbers.

    ``extra`` is the master or the residual. ``step`` is the count on the host, including this update; NaN where it
    is known on the device only. ``scales`` are those of the first and of the second moment, where these are codes.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    extra: Tensor | None
    counter: Tensor
    step: float
    lr: float
    weight_decay: float
    seed: int
    # of dimensions, in which they are seen here; None: their own
    order: tuple[int, ...] | None = None
    scales: tuple[Tensor, Tensor] | None = None


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor] | Tensor,
    *,
    lr: float | Tensor | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.01,
    residuals: Sequence[Tensor] | None = None,
    masters: Sequence[Tensor] | None = None,
    master: str = "none",
    exp_avg_scales: Sequence[Tensor] | None = None,
    exp_avg_sq_scales: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
    clip_factor: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: int | Sequence[int] = 0,
    backend: str = "auto",
) -> None:
    """Update all slices of a chunk in place by AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).

    ``m' = m + (1 - b1)(g - m)``, ``v' = b2 v + (1 - b2) g^2``,
    ``p' = p (1 - lr wd) - lr / (1 - b1^t) m' / (sqrt(v') / sqrt(1 - b2^t) + eps)``, where
    ``g = grad / grad_scale * clip_factor``. All in fp32 (fp64 for fp64 parameters), rounded once when it is stored.

    With the torch backend and fp32 the bits are those of ``torch.optim.AdamW(foreach=False)`` on the same device.
    The Triton backend is one launch for all slices of the same dtypes (and one small one that counts the steps); it
    allocates a table of 112 bytes per slice, no temporaries, and does not wait for the device.

    Args:
        params: S tensors, fp32, bf16, fp16 or fp64. Contiguous, rows or columns of a matrix, or of the same dense
            strides as their state.
        grads: S tensors of the same shapes, any floating dtype; they are not changed.
        exp_avgs: S tensors of the same shapes, first moments; any floating dtype.
        exp_avg_sqs: likewise, second moments.
        steps: S fp32 tensors of one element, or one of shape (S,): updates done so far, increased by 1. On the
            parameters' device or on the CPU.
        lr: learning rate, one for all slices or one each. A tensor is read on the host.
        betas: decay rates of the moments, 0 <= beta < 1.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, one for all slices or one each.
        residuals: S int16 tensors, for ``master="residual"``.
        masters: S fp32 tensors, for ``master="fp32"``. Where a weight is not its rounded master it was changed by
            others: then it takes the master's place.
        master: ``"none"``: the parameter is rounded to its dtype; ``"fp32"``: so is the parameter, and the master
            keeps all bits; ``"residual"``: a bf16 parameter and its residual are the master
            (``rounding.split_residual``); ``"stochastic"``: bf16, rounded by ``rounding.stochastic_round``.
        exp_avg_scales: S fp32 tensors of shape (ceil(n / 128),) for first moments of 8 bits, which ``exp_avgs`` then
            holds as int8 codes (``companding``), contiguous. Moments are decoded, updated in fp32 as above, and encoded
            with new scales after the update of the parameter.
        exp_avg_sq_scales: likewise for second moments, uint8 codes; both are given or neither.
        grad_scale: fp32 tensor of one element on the parameters' device; gradients are divided by it.
        clip_factor: likewise; gradients are multiplied by it.
        found_inf: likewise; if it is not zero nothing is changed, step counts included. ``steps`` have to be on the
            parameters' device, or ``found_inf`` is read on the host (CPU parameters).
        seed: of stochastic rounding, 0 <= seed < 2^63: one each, or one from which slice j takes
            ``(seed + j * 0x9E3779B97F4A7C15) mod 2^63``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"host"``. Auto is Triton on a GPU, except for fp64, and
            torch elsewhere. The torch backend reads ``steps`` and ``found_inf`` on the host. Host is one pass over
            memory by the native core, for CPU tensors of 16 or 32 bits (``host_adamw``).

    Raises:
        ValueError: if lengths, shapes, dtypes, devices or values do not fit; nothing is changed then.
        RuntimeError: while the current stream is captured into a CUDA graph.
    """
    if backend not in ("auto", "triton", "torch", "host"):
        raise ValueError(
            f"backend={backend!r} is not known; allowed are 'auto', 'triton', 'torch' and 'host'"
        )
    if master not in MASTERS:
        raise ValueError(f"master={master!r} is not known; allowed are {', '.join(map(repr, MASTERS))}")
    if params:
        _refuse_capture(params[0])
    _check_scalars(betas, eps)
    counters = _counters(steps, len(params))
    extras = _extras(master, residuals, masters, len(params))
    for name, tensors in (("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        _check_length(name, len(tensors), len(params))
    scales = scale_columns(exp_avg_scales, exp_avg_sq_scales)
    for name, tensors in zip(("exp_avg_scales", "exp_avg_sq_scales"), scales, strict=False):
        _check_length(name, len(tensors), len(params))
    rates = _each("lr", lr, len(params))
    decays = _each("weight_decay", weight_decay, len(params))
    seeds = _seeds(seed, len(params))
    if not params:
        return
    device = params[0].device
    for name, value in (("grad_scale", grad_scale), ("clip_factor", clip_factor), ("found_inf", found_inf)):
        if value is not None and (
            value.numel() != 1 or value.dtype != torch.float32 or value.device != device
        ):
            raise ValueError(
                f"{name} must be a float32 tensor of one element on {device}, got {value.dtype} of shape "
                f"{tuple(value.shape)} on {value.device}"
            )
    if found_inf is not None and device.type != "cpu" and any(c.device != device for c in counters):
        raise ValueError(
            f"found_inf on {device} needs steps on {device} as well: whether they count is known there only"
        )
    columns: Columns = (params, exp_avgs, exp_avg_sqs, extras, counters, *scales)
    scalars = Scalars(_step_counts(counters), rates, decays, seeds)
    if _uses_triton(backend, params):
        # Imported here: Triton is optional.
        from chunkft.kernels.gpu.adamw import prepare

        launches = prepare(columns, grads, scalars, betas, eps, master, grad_scale, clip_factor, found_inf)
        _count(counters, found_inf)
        for launch in launches:
            launch()
        return
    pieces = checked_pieces(columns, grads, scalars, master)
    if found_inf is not None and bool(found_inf != 0):
        return
    if backend == "host":
        _update_on_host(pieces, betas, eps, master, grad_scale, clip_factor)
        _count(counters, None)
        return
    _count(counters, None)
    for piece in pieces:
        adamw_reference(piece, betas, eps, master, grad_scale, clip_factor)


def adamw_reference(
    piece: Piece,
    betas: tuple[float, float],
    eps: float,
    master: str,
    grad_scale: Tensor | None,
    clip_factor: Tensor | None,
) -> None:
    """The update of one slice in plain PyTorch, operation by operation as ``torch.optim.AdamW`` does it."""
    exact = torch.float64 if piece.param.dtype == torch.float64 else torch.float32
    beta1, beta2 = betas
    step = float(piece.counter) if math.isnan(piece.step) else piece.step
    grad = piece.grad.to(exact)
    if grad_scale is not None:
        grad = grad * grad_scale.reciprocal()
    if clip_factor is not None:
        grad = grad * clip_factor
    value = _open(piece, master, exact)
    m, v = moments(piece, exact)
    value.mul_(1 - piece.lr * piece.weight_decay)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (1 - beta2**step) ** 0.5
    value.addcdiv_(m, (v.sqrt() / root).add_(eps), value=-(piece.lr / (1 - beta1**step)))
    keep_moments(piece, m, v)
    _close(piece, master, value)


def _update_on_host(
    pieces: list[Piece],
    betas: tuple[float, float],
    eps: float,
    master: str,
    grad_scale: Tensor | None,
    clip_factor: Tensor | None,
) -> None:
    # Imported here: it needs the native core, which the other backends do without.
    from chunkft.kernels.host_adamw import HostSlice, host_adamw

    slices = [
        HostSlice(
            *(piece.param, piece.grad, piece.exp_avg, piece.exp_avg_sq),
            *(piece.step, piece.lr, piece.weight_decay),
            extra=piece.extra,
            scales=piece.scales,
            seed=piece.seed,
        )
        for piece in pieces
    ]
    host_adamw(slices, betas=betas, eps=eps, master=master, grad_scale=grad_scale, clip_factor=clip_factor)


def _open(piece: Piece, master: str, exact: torch.dtype) -> Tensor:
    """What is updated: the parameter itself, or its fp32 value."""
    weight = piece.param
    if master == "none" or piece.extra is None:
        return weight.to(exact)
    if master == "fp32":
        kept = piece.extra
        return torch.where(kept.to(weight.dtype) == weight, kept, weight.float(), out=kept)
    # zero has no neighbour below in its bits: with the residual of another value it would become NaN
    return apply_residual(weight, piece.extra.masked_fill((weight == 0) & (piece.extra < 0), 0))


def _close(piece: Piece, master: str, value: Tensor) -> None:
    if master == "residual" and piece.extra is not None:
        weight, residual = split_residual(value)
        piece.param.copy_(weight)
        piece.extra.copy_(residual)
    elif master == "stochastic":
        piece.param.copy_(stochastic_round(value, piece.seed))
    elif value is not piece.param:
        piece.param.copy_(value)


def _uses_triton(backend: str, params: Sequence[Tensor]) -> bool:
    double = any(param.dtype == torch.float64 for param in params)
    if backend == "triton":
        gpu.require(params[0])
        if double:
            raise ValueError("backend='triton' takes parameters of 16 or 32 bits, got torch.float64")
        return True
    return backend == "auto" and params[0].is_cuda and gpu.runs_on(params[0]) and not double


def _refuse_capture(param: Tensor) -> None:
    """Raises RuntimeError while a CUDA graph is captured: what the host reads and writes would not be in it.

    Rates and step counts would stay what they were, and a replay would copy the table from page-locked memory that has
    become somebody else's.
    """
    if gpu.is_captured(param):
        raise RuntimeError(
            "adamw cannot be captured in a CUDA graph: the host reads learning rates and step counts at every call, so "
            "that a replay would repeat those of the capture; capture the other work and call adamw outside of graphs"
        )


def _count(counters: Sequence[Tensor], found_inf: Tensor | None) -> None:
    if found_inf is None:
        torch._foreach_add_(list(counters), 1)
    else:
        torch._foreach_add_(list(counters), (found_inf == 0).to(torch.float32).view(()))


def checked_pieces(columns: Columns, grads: Sequence[Tensor], scalars: Scalars, master: str) -> list[Piece]:
    """The slices of a call, each with its tensors and numbers.

    Raises:
        ValueError: if tensors of a slice do not fit together.
    """
    pieces = []
    device = columns[0][0].device
    for j, (param, exp_avg, exp_avg_sq, extra, counter, *scales) in enumerate(zip(*columns, strict=True)):
        tensors = [param, grads[j], exp_avg, exp_avg_sq]
        _check_piece(j, tensors, extra, counter, master, device, scales)
        numbers = (scalars.steps[j], scalars.rates[j], scalars.decays[j], scalars.seeds[j])
        piece = _piece(j, tensors, extra, counter, *numbers)
        pieces.append(replace(piece, scales=(scales[0], scales[1])) if scales else piece)
    return pieces


def _step_counts(counters: Sequence[Tensor]) -> list[float]:
    """Counts with this update, NaN where only the device knows."""
    return [c.item() + 1 if c.device.type == "cpu" else math.nan for c in counters]


def _piece(
    j: int,
    tensors: list[Tensor],
    extra: Tensor | None,
    counter: Tensor,
    step: float,
    lr: float,
    weight_decay: float,
    seed: int,
) -> Piece:
    order = None
    tensors = [tensor.detach() for tensor in tensors]
    state = [*tensors[2:], *([] if extra is None else [extra])]
    if not all(tensor.is_contiguous() for tensor in state):
        # Dense in another order of dimensions, as channels_last: seen in that order everything is contiguous.
        strides = state[0].stride()
        order = tuple(sorted(range(len(strides)), key=lambda dim: -strides[dim]))
        tensors = [tensor.permute(order) for tensor in tensors]
        state = [tensor.permute(order) for tensor in state]
        extra = None if extra is None else extra.permute(order)
        if not all(tensor.is_contiguous() for tensor in state):
            raise ValueError(
                f"slice {j}: exp_avg, exp_avg_sq, master and residual must be contiguous, or all of one dense order "
                f"of strides; got {[tensor.stride() for tensor in state]}"
            )
    param, grad, exp_avg, exp_avg_sq = tensors
    return Piece(param, grad, exp_avg, exp_avg_sq, extra, counter, step, lr, weight_decay, seed, order)


def _check_scalars(betas: tuple[float, float], eps: float) -> None:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas} is not allowed; needs two values with 0 <= beta < 1")
    if not (0 <= eps < math.inf):
        raise ValueError(f"eps={eps} is not allowed; needs a finite eps >= 0")


def _check_length(name: str, given: int, wanted: int) -> None:
    if given != wanted:
        raise ValueError(f"{name} must have one entry for each of the {wanted} params, got {given}")


def _each(name: str, value: float | Tensor | Sequence[float], count: int) -> list[float]:
    if isinstance(value, Sequence):
        _check_length(name, len(value), count)
        values = [float(entry) for entry in value]
    else:
        values = [float(value)] * count
    for entry in values:
        if not math.isfinite(entry):
            raise ValueError(f"{name}={entry} is not allowed; needs finite values")
    return values


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    if isinstance(seed, Sequence):
        _check_length("seed", len(seed), count)
        seeds = [int(entry) for entry in seed]
    else:
        seeds = [seed + j * _GOLDEN & (1 << 63) - 1 for j in range(count)] if 0 <= seed < 1 << 63 else [seed]
    for entry in seeds:
        if not 0 <= entry < 1 << 63:
            raise ValueError(f"seed={entry} is not allowed; needs 0 <= seed < 2^63")
    return seeds


def _counters(steps: Sequence[Tensor] | Tensor, count: int) -> list[Tensor]:
    if isinstance(steps, Tensor) and steps.shape != (count,):
        raise ValueError(f"steps must be a tensor of shape ({count},), got {tuple(steps.shape)}")
    counters = list(steps.detach().unbind() if isinstance(steps, Tensor) else steps)
    _check_length("steps", len(counters), count)
    for j, counter in enumerate(counters):
        if counter.numel() != 1 or counter.dtype != torch.float32:
            raise ValueError(
                f"steps[{j}] must be a float32 tensor of one element, got {counter.dtype} of shape "
                f"{tuple(counter.shape)}"
            )
    return counters


def _extras(
    master: str, residuals: Sequence[Tensor] | None, masters: Sequence[Tensor] | None, count: int
) -> list[Tensor | None]:
    for name, given, mode in (("residuals", residuals, "residual"), ("masters", masters, "fp32")):
        if (given is not None) != (master == mode):
            verb = "needs" if master == mode else "takes no"
            raise ValueError(f"master={master!r} {verb} {name}")
        if given is not None:
            _check_length(name, len(given), count)
            return list(given)
    return [None] * count


def _check_piece(
    j: int,
    tensors: list[Tensor],
    extra: Tensor | None,
    counter: Tensor,
    master: str,
    device: torch.device,
    scales: Sequence[Tensor],
) -> None:
    param = tensors[0]
    allowed = {
        "none": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
        "fp32": (torch.bfloat16, torch.float16),
        "residual": (torch.bfloat16,),
        "stochastic": (torch.bfloat16,),
    }[master]
    if param.dtype not in allowed:
        names = ", ".join(map(str, allowed))
        raise ValueError(f"params[{j}] is {param.dtype}; master={master!r} needs one of {names}")
    if extra is not None:
        wanted = torch.int16 if master == "residual" else torch.float32
        if extra.dtype != wanted:
            raise ValueError(f"slice {j}: master={master!r} keeps {wanted}, got {extra.dtype}")
    for tensor in [*tensors[1:], *([] if extra is None else [extra])]:
        if tensor.shape != param.shape or tensor.device != device or param.device != device:
            raise ValueError(
                f"slice {j}: all tensors must be of the parameter's shape {tuple(param.shape)} on {device}, got "
                f"{tuple(tensor.shape)} on {tensor.device} (parameter: {param.device})"
            )
    for tensor in tensors[1:2] if scales else tensors[1:]:
        if not tensor.is_floating_point():
            raise ValueError(f"slice {j}: gradient and moments must be floating, got {tensor.dtype}")
    if scales:
        check_codes(j, param, tensors[2:], scales)
    if counter.device not in (device, torch.device("cpu")):
        raise ValueError(f"steps[{j}] must be on {device} or on the CPU, got {counter.device}")
