"""AdamW of slices that live in host memory: one pass over it by the native core, on several threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chunkft.kernels.adamw_table import rows_of
from chunkft.kernels.companding import BLOCK

try:
    from chunkft import _core as _core
except ImportError as error:
    raise ImportError(
        "chunkft's native module chunkft._core is missing or was built for another Python; "
        "build it with `pip install -e .` in the source tree, or install chunkft anew"
    ) from error

_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_WEIGHTS = {
    "none": (torch.float32, torch.bfloat16, torch.float16),
    "fp32": (torch.bfloat16, torch.float16),
    "residual": (torch.bfloat16,),
    "stochastic": (torch.bfloat16,),
}
_EXTRAS = {"fp32": torch.float32, "residual": torch.int16}


@dataclass(frozen=True)
class HostSlice:
    """The tensors of one slice, all on the CPU and of one shape, and its numbers.

    ``param``: fp32, bf16 or fp16; contiguous, or rows or columns of a matrix. ``grad``: likewise, of any strides; it is
    copied where it is not contiguous. ``exp_avg`` and ``exp_avg_sq``: likewise and contiguous, or int8 and uint8 codes
    of which ``scales`` has those of the first and of the second moment, fp32 of shape (ceil(n / 128),). ``extra``: the
    fp32 master or the int16 residual, contiguous. ``step`` counts this update.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: float
    lr: float
    weight_decay: float = 0.0
    extra: Tensor | None = None
    scales: tuple[Tensor, Tensor] | None = None
    seed: int = 0


def host_adamw(
    slices: Sequence[HostSlice],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    master: str = "none",
    grad_scale: Tensor | None = None,
    clip_factor: Tensor | None = None,
    threads: int | None = None,
) -> None:
    """Update all slices in place, with the formula and the masters of ``chunkft.kernels.adamw``, in fp32.

    The bits are the same for any number of threads. On processors with fused multiply-adds, moments have the bits of
    ``torch.optim.AdamW(foreach=False)``, and weights as well, but for the root: here it is rounded to nearest, by MKL,
    which PyTorch takes on x86, in most cases only. 8-bit moments are coded as by ``chunkft.kernels.companding``. The
    GIL is released meanwhile; threads live for the call.

    Args:
        slices: any number.
        betas: decay rates of the moments, 0 <= beta < 1.
        eps: added to the root of the second moment.
        master: ``"none"``, ``"fp32"``, ``"residual"`` or ``"stochastic"``, of all slices.
        grad_scale: fp32 CPU tensor of one element; gradients are divided by it.
        clip_factor: likewise; gradients are multiplied by it.
        threads: at most so many; ``torch.get_num_threads()`` by default.

    Raises:
        ValueError: if devices, dtypes, shapes or strides do not fit; nothing is changed then.
    """
    if master not in _WEIGHTS:
        raise ValueError(f"master={master!r} is not known; allowed are {', '.join(map(repr, _WEIGHTS))}")
    # alive until the end of the call
    grads = [piece.grad.detach().contiguous() for piece in slices]
    entries = [
        _entry(j, piece, grad, betas, master)
        for j, (piece, grad) in enumerate(zip(slices, grads, strict=True))
    ]
    _core.host_adamw(
        entries,
        master=master,
        pull=1 - betas[0],
        beta2=betas[1],
        keep2=1 - betas[1],
        eps=eps,
        grad_factor=1.0 if grad_scale is None else float(grad_scale.reciprocal()),
        clip_factor=1.0 if clip_factor is None else float(clip_factor),
        threads=torch.get_num_threads() if threads is None else threads,
    )
    changed = [tensor for piece in slices for tensor in _written(piece)]
    # what autograd saved of them is not what it was
    torch.autograd.graph.increment_version(changed)


def _written(piece: HostSlice) -> list[Tensor]:
    extra = () if piece.extra is None else (piece.extra,)
    return [piece.param, piece.exp_avg, piece.exp_avg_sq, *extra, *(piece.scales or ())]


def _entry(
    j: int, piece: HostSlice, grad: Tensor, betas: tuple[float, float], master: str
) -> _core.HostAdamwSlice:
    _check(j, piece, master)
    row, pitch = rows_of(piece.param)
    scales = piece.scales
    moments = (
        ("codes", "codes") if scales else (_FORMATS[piece.exp_avg.dtype], _FORMATS[piece.exp_avg_sq.dtype])
    )
    return (
        (
            piece.param.data_ptr(),
            grad.data_ptr(),
            piece.exp_avg.data_ptr(),
            piece.exp_avg_sq.data_ptr(),
            0 if piece.extra is None else piece.extra.data_ptr(),
            scales[0].data_ptr() if scales else 0,
            scales[1].data_ptr() if scales else 0,
        ),
        (piece.param.numel(), row, pitch),
        (_FORMATS[piece.param.dtype], _FORMATS[grad.dtype], *moments),
        piece.seed,
        (
            1 - piece.lr * piece.weight_decay,
            piece.lr / (1 - betas[0] ** piece.step),
            (1 - betas[1] ** piece.step) ** 0.5,
        ),
    )


def _check(j: int, piece: HostSlice, master: str) -> None:
    floats = tuple(_FORMATS)
    codes = piece.scales is not None
    wanted = {
        "param": (piece.param, _WEIGHTS[master]),
        "grad": (piece.grad, floats),
        "exp_avg": (piece.exp_avg, (torch.int8,) if codes else floats),
        "exp_avg_sq": (piece.exp_avg_sq, (torch.uint8,) if codes else floats),
    }
    if (piece.extra is None) != (master not in _EXTRAS):
        raise ValueError(f"slice {j}: master={master!r} {'needs' if master in _EXTRAS else 'takes no'} extra")
    if piece.extra is not None:
        wanted["extra"] = (piece.extra, (_EXTRAS[master],))
    shape = piece.param.shape
    for name, (tensor, dtypes) in wanted.items():
        if tensor.device.type != "cpu" or tensor.dtype not in dtypes or tensor.shape != shape:
            allowed = ", ".join(map(str, dtypes))
            raise ValueError(
                f"slice {j}: {name} must be a CPU tensor of shape {tuple(shape)} and one of {allowed} with "
                f"master={master!r}, got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )
        if name not in ("param", "grad") and not tensor.is_contiguous():
            raise ValueError(f"slice {j}: {name} must be contiguous, got strides {tensor.stride()}")
    blocks = -(-piece.param.numel() // BLOCK)
    for scale in piece.scales or ():
        if scale.device.type != "cpu" or scale.dtype != torch.float32 or scale.shape != (blocks,):
            raise ValueError(
                f"slice {j}: scales must be float32 CPU tensors of shape ({blocks},), got {scale.dtype} of shape "
                f"{tuple(scale.shape)} on {scale.device}"
            )
        if not scale.is_contiguous():
            raise ValueError(f"slice {j}: scales must be contiguous, got strides {scale.stride()}")
