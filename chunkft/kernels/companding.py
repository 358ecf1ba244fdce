"""Moments of AdamW in 8 bits: codes of single elements beside one fp32 scale for each block of 128.

A block is 128 consecutive elements of a slice in row-major order of its shape; the last one may be shorter. Two moments
take 2 + 8 / 128 = 2.0625 bytes an element. First moments are companded by softsign, second moments by the square root,
so that small elements of a block keep more of their digits than in equal steps (FlashOptim, arXiv 2602.23349; scales of
blocks: 8-bit optimizers, arXiv 2110.02861).

Decoding and encoding again gives the same codes and scales, bit for bit, for every code and every scale that is a
normal number, if a block has an element of the largest code, as every encoded block that is not all zero does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128
FIRST_CODES = torch.int8
SECOND_CODES = torch.uint8
# First moments are held below this, so that 254 times one of them, and the sum of two, are numbers still.
FIRST_LIMIT = 2.0**120
SECOND_LIMIT = torch.finfo(torch.float32).max


def blocks_of(numel: int) -> int:
    """How many scales so many elements have."""
    return -(-numel // BLOCK)


def encode_first(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a first moment.

    With ``s`` the largest magnitude of a block, the code of ``m`` is ``rint(254 m / (s + |m|))``: ``127 f(|m| / s)``
    with the sign of ``m``, where ``f(x) = 2 x / (1 + x)``. Ties go to even codes.

    Args:
        moment: fp32, any shape. Magnitudes above 2^120, infinities too, become 2^120; a block with a NaN gets the scale
            NaN, and is NaN when it is decoded.

    Returns:
        int8 codes of the same shape, -127 to 127, contiguous; fp32 scales of shape (ceil(n / 128),).

    Raises:
        ValueError: if ``moment`` is not float32.
    """
    values = _blocked(moment).clamp(-FIRST_LIMIT, FIRST_LIMIT)
    size = values.abs()
    scale = size.amax(1)
    codes = (254 * values).div_(size.add_(scale[:, None])).round_()
    return _cropped(codes.nan_to_num_(nan=0.0).to(FIRST_CODES), moment), scale


def decode_first(codes: Tensor, scales: Tensor, start: int = 0) -> Tensor:
    """First moments: ``c / (254 - |c|) s``, which is ``s x`` with ``x = y / (2 - y)`` and ``y = |c| / 127``.

    Args:
        codes: int8, any shape.
        scales: fp32, one for each block.
        start: where in the blocks the first of these codes is, counted in elements; for a part of what was encoded.

    Returns:
        fp32 of the shape of ``codes``, contiguous. The codes 127 and -127 are the scale itself, with that sign.

    Raises:
        ValueError: if a dtype is another one, or there are too few scales.
    """
    spread = _spread(codes, FIRST_CODES, scales, start)
    values = codes.to(torch.float32, memory_format=torch.contiguous_format)
    return values.div_(254 - values.abs()).mul_(spread)


def encode_second(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a second moment.

    With ``s`` the largest of a block, the code of ``v`` is ``rint(sqrt(v) (255 / sqrt(s)))``, but at least 1 where
    ``v > 0``: a second moment that became 0 beside a first moment would make the update infinite.

    Args:
        moment: fp32, any shape, >= 0. Infinities become the largest number; a block with a NaN gets the scale NaN.

    Returns:
        uint8 codes of the same shape, contiguous; fp32 scales of shape (ceil(n / 128),).

    Raises:
        ValueError: if ``moment`` is not float32.
    """
    values = _blocked(moment).clamp(max=SECOND_LIMIT)
    scale = values.amax(1)
    factor = torch.full_like(scale, 255).div_(_root(scale))  # a number over a tensor would be rounded twice
    codes = _root(values).mul_(factor[:, None]).round_()
    codes = torch.where((values > 0) & (codes == 0), 1.0, codes)
    return _cropped(codes.nan_to_num_(nan=0.0).to(SECOND_CODES), moment), scale


def decode_second(codes: Tensor, scales: Tensor, start: int = 0) -> Tensor:
    """Second moments: ``(c / 255)^2 s``, with ``c`` times the fp32 number next to 1 / 255 for the quotient.

    Args:
        codes: uint8, any shape.
        scales: fp32, one for each block.
        start: as for ``decode_first``.

    Returns:
        fp32 of the shape of ``codes``, contiguous. The code 255 is the scale itself.

    Raises:
        ValueError: if a dtype is another one, or there are too few scales.
    """
    spread = _spread(codes, SECOND_CODES, scales, start)
    values = codes.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
    return values.square_().mul_(spread)


def _root(values: Tensor) -> Tensor:
    """The square root, rounded to nearest, which MKL's is not: codes must not depend on where they are made."""
    return values.double().sqrt_().float()


def _blocked(moment: Tensor) -> Tensor:
    """Rows of 128 elements, the last one filled up with zeros."""
    if moment.dtype != torch.float32:
        raise ValueError(f"moment must be float32, got {moment.dtype}")
    flat = moment.detach().reshape(-1)
    return pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _cropped(codes: Tensor, moment: Tensor) -> Tensor:
    return codes.view(-1)[: moment.numel()].view(moment.shape)


def _spread(codes: Tensor, dtype: torch.dtype, scales: Tensor, start: int) -> Tensor:
    """The scale of every element."""
    if codes.dtype != dtype:
        raise ValueError(f"codes must be {dtype}, got {codes.dtype}")
    stop = start + codes.numel()
    if scales.dtype != torch.float32 or scales.dim() != 1 or blocks_of(stop) > scales.numel() or start < 0:
        raise ValueError(
            f"scales must be float32 of shape (n,) with n >= {blocks_of(stop)} for {codes.numel()} codes from "
            f"start={start} >= 0 on, got {scales.dtype} of shape {tuple(scales.shape)}"
        )
    first = start // BLOCK
    spread = scales[first : blocks_of(stop)].repeat_interleave(BLOCK)
    return spread[start - first * BLOCK : stop - first * BLOCK].view(codes.shape)
