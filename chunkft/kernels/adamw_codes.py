"""Moments of an update that are codes of 8 bits (``companding``): what they must be, read and written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chunkft.kernels.companding import (
    FIRST_CODES,
    SECOND_CODES,
    blocks_of,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
)

if TYPE_CHECKING:
    from chunkft.kernels.adamw import Piece


def moments(piece: Piece, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """First and second moment of a slice as numbers; the stored tensors themselves where these are of that dtype."""
    if piece.scales is None:
        return piece.exp_avg.to(exact), piece.exp_avg_sq.to(exact)
    first, second = piece.scales
    return decode_first(piece.exp_avg, first), decode_second(piece.exp_avg_sq, second)


def keep_moments(piece: Piece, first: Tensor, second: Tensor) -> None:
    """Store new moments in the form in which the slice keeps them."""
    kept, new = [piece.exp_avg, piece.exp_avg_sq], [first, second]
    if piece.scales is not None:
        kept += piece.scales
        (codes, scale), (codes_sq, scale_sq) = encode_first(first), encode_second(second)
        new = [codes, codes_sq, scale, scale_sq]
    for old, value in zip(kept, new, strict=True):
        if old is not value:
            old.copy_(value)


def scale_columns(
    first: Sequence[Tensor] | None, second: Sequence[Tensor] | None
) -> tuple[Sequence[Tensor], ...]:
    """The scales of both moments; nothing where the moments are numbers.

    Raises:
        ValueError: if only one of both is given.
    """
    if first is None and second is None:
        return ()
    if first is None or second is None:
        raise ValueError("exp_avg_scales and exp_avg_sq_scales belong together; give both, or neither")
    return first, second


def check_codes(j: int, param: Tensor, codes: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    """Raise ValueError unless the moments of slice ``j`` are such codes and scales as its parameter's would be."""
    if param.dtype == torch.float64:
        raise ValueError(f"params[{j}] is torch.float64; moments of 8 bits need parameters of 16 or 32 bits")
    shape = (blocks_of(param.numel()),)
    for name, code, dtype, scale in zip(
        ("exp_avg", "exp_avg_sq"), codes, (FIRST_CODES, SECOND_CODES), scales, strict=True
    ):
        if code.dtype != dtype or not code.is_contiguous():
            raise ValueError(
                f"{name}s[{j}] must be contiguous {dtype} beside {name}_scales, got {code.dtype} of strides "
                f"{code.stride()}"
            )
        same_place = scale.device == param.device and scale.is_contiguous()
        if scale.dtype != torch.float32 or scale.shape != shape or not same_place:
            raise ValueError(
                f"{name}_scales[{j}] must be contiguous float32 of shape {shape} on {param.device}, got {scale.dtype} "
                f"of shape {tuple(scale.shape)} on {scale.device}"
            )
