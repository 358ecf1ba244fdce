"""Gradient of rows of an embedding table: every row is summed by one program, over the tokens that are sorted by id."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chunkft.kernels import gpu
from chunkft.kernels.gpu.common import rounded

TOKENS = 16  # rows of dY that are on their way at the same time
COLUMNS_MAX = 1024
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit(do_not_specialize=["padding"])
def embedding_grad_kernel(
    dy,
    order,
    bounds,
    out,
    width,
    stride,
    padding,
    BY_FREQUENCY: tl.constexpr,
    DTYPE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``out[v] = sum over bounds[v] <= i < bounds[v + 1] of dY[order[i]]``, in fp32, in the order of ``i``.

    ``dy`` (T, width) with ``stride`` from row to row, ``order`` (T,), ``bounds`` (rows + 1,), ``out`` (rows, width);
    ``padding`` is the row that stays zero, or -1.

    A program has TOKENS rows of dY on their way at a time, in pieces of 16 bytes. An id with all T tokens takes many
    such rounds, one after the other, in ``width / COLUMNS`` programs: slow, but other rows do not wait for it.
    """
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    inside = column < width
    first = tl.load(bounds + row)
    last = tl.load(bounds + row + 1)
    count = last - first
    if row == padding:
        last = first
    total = tl.zeros((COLUMNS,), tl.float32)
    token = tl.arange(0, TOKENS)  # [TOKENS]
    for begin in range(first, last, TOKENS):
        present = begin + token < last
        place = tl.load(order + begin + token, mask=present, other=0)
        tile = tl.load(
            dy + place[:, None] * stride + column[None, :], mask=present[:, None] & inside[None, :], other=0.0
        )  # [TOKENS, COLUMNS]
        total += tl.sum(tile.to(tl.float32), 0)
    if BY_FREQUENCY:
        total = total / tl.maximum(count, 1).to(tl.float32)
    tl.store(out + row.to(tl.int64) * width + column, rounded(total, DTYPE, INTERPRETED), mask=inside)


def embedding_rows(
    dy: Tensor, ids: Tensor, start: int, stop: int, padding_idx: int | None, by_frequency: bool
) -> Tensor:
    """Rows ``[start, stop)`` of the gradient from dY (T, H), whose last dimension is contiguous, and ids (T,).

    Deterministic, and without a wait for the device: nothing that is on it decides about a launch.
    """
    rows, width = stop - start, dy.shape[1]
    out = dy.new_empty(rows, width)
    if not out.numel():
        return out
    ordered, order = ids.sort(stable=True)
    bounds = torch.searchsorted(
        ordered, torch.arange(start, stop + 1, dtype=ids.dtype, device=ids.device), out_int32=False
    )
    padding = -1 if padding_idx is None or not start <= padding_idx < stop else padding_idx - start
    columns = min(COLUMNS_MAX, triton.next_power_of_2(width))
    with gpu.current(dy):
        embedding_grad_kernel[(rows, triton.cdiv(width, columns))](
            dy,
            order,
            bounds,
            out,
            width,
            dy.stride(0),
            padding,
            BY_FREQUENCY=by_frequency,
            DTYPE=_TYPES[dy.dtype],
            TOKENS=TOKENS,
            COLUMNS=columns,
            INTERPRETED=gpu.interpreted(),
            num_warps=4,
        )
    return out
