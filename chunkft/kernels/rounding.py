"""Keeping fp32 accuracy with bf16 weights: the residual of a master weight, and stochastic rounding."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def split_residual(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 into the nearest bf16 value and the 16 bits that are missing.

    With ``b`` the bits of ``master``, the weight is ``(b + 0x8000) >> 16`` and the residual ``b - (weight << 16)``,
    which lies in [-0x8000, 0x7fff]. The weight is the nearest bf16; a tie goes away from zero (round-to-nearest-even
    would need a 17th bit to undo).

    Args:
        master: fp32 tensor of any shape.

    Returns:
        ``(weight, residual)``: bf16 and int16 tensors of the same shape, from which ``apply_residual`` makes
        ``master`` again, bit for bit; only a signalling NaN comes back as a quiet one.

    Raises:
        ValueError: if ``master`` is not float32.
    """
    if master.dtype != torch.float32:
        raise ValueError(f"master must be float32, got {master.dtype}")
    bits = master.contiguous().view(torch.int32)
    # Rounding could turn a NaN into a number and truncation into an infinity: keep it by its quiet bit.
    truncated = torch.where(torch.isnan(master), bits | 0x00400000, bits)
    rounded = torch.where(torch.isfinite(master), bits + 0x8000, truncated)
    high = rounded >> 16
    weight = high.to(torch.int16).view(torch.bfloat16)
    residual = bits - (high << 16)
    # A truncated NaN keeps low bits up to 0xffff, stored modulo 2^16; apply_residual undoes that.
    return weight.view(master.shape), residual.to(torch.int16).view(master.shape)


def apply_residual(weight: Tensor, residual: Tensor) -> Tensor:
    """Join a bf16 weight and its 16-bit residual into the fp32 master they came from.

    Args:
        weight: bf16 tensor.
        residual: int16 tensor of the same shape.

    Returns:
        fp32 tensor of the same shape.

    Raises:
        ValueError: if dtypes or shapes do not fit.
    """
    if weight.dtype != torch.bfloat16 or residual.dtype != torch.int16 or weight.shape != residual.shape:
        raise ValueError(
            "weight and residual must be bfloat16 and int16 of one shape, got "
            f"{weight.dtype} {tuple(weight.shape)} and {residual.dtype} {tuple(residual.shape)}"
        )
    high = weight.contiguous().view(torch.int16).to(torch.int32) << 16
    low = residual.contiguous().to(torch.int32)
    non_finite = (high & 0x7F800000) == 0x7F800000
    overflowed = non_finite & (low < 0) & ((high & 0x007F0000) == 0)
    joined = torch.where(non_finite & ~overflowed, high | (low & 0xFFFF), high + low)
    return joined.view(torch.float32).view(weight.shape)


def noise_bits(count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Random bits by counter: they depend on seed and place alone, so that every device gives the same.

    Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11) with the counter ``i // 8``
    and the key ``seed`` gives four words; the elements ``8 (i // 8) ... + 7`` take their lower and upper halves in
    turn.

    Args:
        count: how many.
        seed: 0 <= seed < 2^63.
        device: where.

    Returns:
        (count,) int32 tensor of values in [0, 2^16).

    Raises:
        ValueError: if ``seed`` is out of range.
    """
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed={seed} is not allowed; needs 0 <= seed < 2^63")
    counter = torch.arange(-(-count // 8), dtype=torch.int64, device=device)
    words = [counter & _WORD, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    key = [seed & _WORD, seed >> 32]
    for _ in range(10):
        # int64 wraps around, which leaves both halves of the unsigned product right
        left, right = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            (right >> 32 & _WORD) ^ words[1] ^ key[0],
            right & _WORD,
            (left >> 32 & _WORD) ^ words[3] ^ key[1],
            left & _WORD,
        ]
        key = [key[0] + 0x9E3779B9 & _WORD, key[1] + 0xBB67AE85 & _WORD]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack([half.to(torch.int32) for half in halves], 1).view(-1)[:count]


def stochastic_round(value: Tensor, seed: int) -> Tensor:
    """Round fp32 to bf16, up or down with a probability that makes the expectation exact.

    Adds 16 uniform random bits below the last bit that bf16 keeps, then truncates; so ``E[result] = value`` for
    finite values. The same seed and shape give the same bits, on every device.

    Args:
        value: fp32 tensor of any shape; infinities and NaN keep their kind.
        seed: non-negative integer below 2^63.

    Returns:
        bf16 tensor of the same shape.

    Raises:
        ValueError: if ``value`` is not float32, or ``seed`` is out of range.
    """
    if value.dtype != torch.float32:
        raise ValueError(f"value must be float32, got {value.dtype}")
    noise = noise_bits(value.numel(), seed, value.device).view(value.shape)
    bits = value.contiguous().view(torch.int32)
    truncated = torch.where(torch.isnan(value), bits | 0x00400000, bits)
    rounded = torch.where(torch.isfinite(value), bits + noise, truncated)
    return (rounded >> 16).to(torch.int16).view(torch.bfloat16).view(value.shape)
