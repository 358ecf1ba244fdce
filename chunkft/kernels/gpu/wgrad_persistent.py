"""Persistent Triton kernel of ``wgrad``: contiguous slices read, and where it can be stored, through descriptors (TMA).

A grid of at most one program a multiprocessor walks over the tiles of the result, ``program, program + programs, ...``.
The loop over tiles and the loop over tokens are flattened into one, so that barriers are set up once and the first
loads of the next tile are under way while this one is finished: seen in the code for 9.0, 10.0 and 12.0 of Triton 3.6
and 3.9 (one loop, the waits for ``wgmma`` one step behind, no spills). Warp specialisation changes nothing there on 9.0
with either version; on 10.0 both make a kernel of producer and consumer warps of it, and there it is asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from chunkft.kernels.gpu.common import operand, rounded
from chunkft.kernels.gpu.wgrad import tile_of

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _store(
    out,
    part,
    row,
    rows,
    row_stride,
    col,
    cols,
    col_stride,
    DTYPE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Adds what is there, rounds and stores."""
    if DESCRIBED:
        if ACCUMULATE:
            part += out.load([row, col]).to(tl.float32)
        out.store([row, col], rounded(part, DTYPE, INTERPRETED))
    else:
        height: tl.constexpr = part.shape[0]
        width: tl.constexpr = part.shape[1]
        r, c = row + tl.arange(0, height), col + tl.arange(0, width)
        ok = ((r >= 0) & (r < rows))[:, None] & ((c >= 0) & (c < cols))[None, :]
        at = (out + r.to(tl.int64) * row_stride)[:, None] + c.to(tl.int64)[None, :] * col_stride
        if ACCUMULATE:
            part += tl.load(at, mask=ok, other=0.0).to(tl.float32)
        tl.store(at, rounded(part, DTYPE, INTERPRETED), mask=ok)


@triton.jit
def _store_parts(
    out,
    total,
    row,
    rows,
    row_stride,
    col,
    cols,
    col_stride,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A tile in PARTS column ranges, one after the other: only the buffer of one must fit beside the pipeline."""
    if PARTS == 1:
        _store(
            out, total, row, rows, row_stride, col, cols, col_stride,
            DTYPE, DESCRIBED, ACCUMULATE, INTERPRETED,
        )  # fmt: skip
    else:
        height: tl.constexpr = total.shape[0]
        half: tl.constexpr = total.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(total, (height, 2, half)), (0, 2, 1)))
        _store_parts(
            out, left, row, rows, row_stride, col, cols, col_stride,
            PARTS // 2, DTYPE, DESCRIBED, ACCUMULATE, INTERPRETED,
        )  # fmt: skip
        _store_parts(
            out, right, row, rows, row_stride, col + half, cols, col_stride,
            PARTS // 2, DTYPE, DESCRIBED, ACCUMULATE, INTERPRETED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "rows", "row_start", "row_shift", "col_start"])
def wgrad_persistent_kernel(
    dy,
    x,
    out,
    tokens,
    rows,
    cols,
    row_stride,
    col_stride,
    row_start,
    row_shift,
    col_start,
    col_shift,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``dW[rows, cols] = dY[:, rows]^T X[:, cols]``, tile by tile.

    ``dy``, ``x``: descriptors with blocks (BK, BM) and (BK, BN); the slice's start is a coordinate of theirs. ``out``:
    with DESCRIBED a descriptor with blocks (BM, BN / PARTS), which cuts off what lies outside of the slice, else a
    pointer.
    """
    tiles_m, tiles_n = tl.cdiv(rows + row_shift, BM), tl.cdiv(cols + col_shift, BN)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True, warp_specialize=SPECIALIZED
    ):
        m, n = tile_of(tile, tiles_m, tiles_n, 8)
        row, col = row_start * 8 + m * BM, col_start * 8 + n * BN
        total = tl.zeros((BM, BN), tl.float32)
        for at in range(0, tokens, BK):
            dy_tile = operand(dy.load([at, row]), INTERPRETED)  # [BK, BM]
            x_tile = operand(x.load([at, col]), INTERPRETED)  # [BK, BN]
            total = tl.dot(tl.trans(dy_tile), x_tile, total, input_precision=PRECISION)
        _store_parts(
            out, total, m * BM - row_shift, rows, row_stride, n * BN - col_shift, cols, col_stride,
            PARTS, DTYPE, DESCRIBED, ACCUMULATE, INTERPRETED,
        )  # fmt: skip
