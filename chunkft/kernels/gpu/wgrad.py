"""Triton kernel of ``wgrad``: ``dW[rows, cols] = dY[:, rows]^T X[:, cols]``; see docs/kernels.md for the costs.

One program computes a tile (BM, BN) of the result over a range of tokens. Rows and columns are counted from a bound
that is rounded down to 8 elements, so that 16-byte copies stay possible at any start; what lies outside of the slice
is computed and not stored. Token ranges of one tile (split-K) meet in a workspace: the program that arrives last adds
all of them, in their order, so that the result does not depend on who was last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from chunkft.kernels.gpu.common import operand, rounded


@triton.jit
def selected(virtual, start, index, size, count, BLOCK: tl.constexpr):
    """Source column of each of a tile's rows (or columns), and whether it lies outside of the matrix.

    ``virtual`` counts from the rounded-down start; with ``BLOCK`` > 0 source blocks of that size are named by
    ``index``. An index outside of the matrix is read as block 0 and reported.
    """
    if BLOCK == 0:
        source = start * 8 + virtual
        outside = source < 0
    else:
        block = tl.load(index + virtual // BLOCK, mask=virtual < count, other=0).to(tl.int32)
        outside = (block < 0) | (block >= size // BLOCK)
        source = tl.where(outside, 0, block) * BLOCK + virtual % BLOCK
        if BLOCK % 8 == 0:
            source = tl.max_contiguous(tl.multiple_of(source, 8), 8)
    return source, outside


@triton.jit
def product(
    dy_at,
    row_ok,
    dy_stride,
    x_at,
    col_ok,
    x_stride,
    start,
    stop,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """(BM, BN) fp32 sum over tokens ``[start, stop)`` of the outer products of dY's and X's parts.

    ``dy_at`` [BM] and ``x_at`` [BN] point to token 0; without ``MASKED`` the range is a multiple of BK. dY's tile is
    read as its transpose: after a ``tl.trans`` it would not be copied asynchronously on sm_80. ``dy_stride`` is one
    pitch, or [BM, 1] pitches.
    """
    token = tl.arange(0, BK)
    # element offsets can pass 2^31
    dy_stride, x_stride = tl.cast(dy_stride, tl.int64), tl.cast(x_stride, tl.int64)
    first = tl.zeros((BK,), tl.int64) + start + token
    dy_at = dy_at[:, None] + first[None, :] * dy_stride  # [BM, BK]
    x_at = x_at[None, :] + (first * x_stride)[:, None]  # [BK, BN]
    total = tl.zeros((BM, BN), tl.float32)
    for at in range(start, stop, BK):
        if MASKED:
            inside = at + token < stop
            dy_tile = tl.load(dy_at, mask=row_ok[:, None] & inside[None, :], other=0.0)
            x_tile = tl.load(x_at, mask=inside[:, None] & col_ok[None, :], other=0.0)
        else:
            dy_tile = tl.load(dy_at, mask=row_ok[:, None], other=0.0)
            x_tile = tl.load(x_at, mask=col_ok[None, :], other=0.0)
        dy_tile, x_tile = operand(dy_tile, INTERPRETED), operand(x_tile, INTERPRETED)
        total = tl.dot(dy_tile, x_tile, total, input_precision=PRECISION)
        dy_at += BK * dy_stride
        x_at += BK * x_stride
    return total


@triton.jit
def product_tma(
    dy,
    row,
    x,
    col,
    start,
    stop,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``product`` through tensor descriptors: zeros outside of the matrices, no masks.

    ``row`` and ``col`` are multiples of 8: Triton wants coordinates of whole 16 bytes.
    """
    total = tl.zeros((BM, BN), tl.float32)
    for at in range(start, stop, BK):
        dy_tile = operand(dy.load([at, row]), INTERPRETED)  # [BK, BM]
        x_tile = operand(x.load([at, col]), INTERPRETED)  # [BK, BN]
        total = tl.dot(tl.trans(dy_tile), x_tile, total, input_precision=PRECISION)
    return total


@triton.jit
def finish(
    total,
    out,
    row,
    rows,
    row_stride,
    row_outside,
    col,
    cols,
    col_stride,
    col_outside,
    norm,
    ACCUMULATE: tl.constexpr,
    NORM: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Adds what is there, rounds, stores, and writes the tile's squared norm; NaN where an index was outside."""
    ok = ((row >= 0) & (row < rows))[:, None] & ((col >= 0) & (col < cols))[None, :]
    at = (out + row.to(tl.int64) * row_stride)[:, None] + col.to(tl.int64)[None, :] * col_stride
    if row_outside is not None:
        total = tl.where(row_outside[:, None], float("nan"), total)
    if col_outside is not None:
        total = tl.where(col_outside[None, :], float("nan"), total)
    if ACCUMULATE:
        total += tl.load(at, mask=ok, other=0.0).to(tl.float32)
    value = rounded(total, out.dtype.element_ty, INTERPRETED)
    tl.store(at, value, mask=ok)
    if NORM:
        stored = tl.where(ok, value.to(tl.float32), 0.0)
        tl.store(norm, tl.sum(tl.sum(stored * stored, axis=1), axis=0))


@triton.jit
def is_last(total, partials, counters, tile, split, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr):
    """Stores this program's part of a tile, and tells whether all parts of the tile are there.

    The counter is zero at the start of each launch: its memory is new and zeroed on the same stream, so that a CUDA
    graph holds the zeroing, too. tests/kernels/test_split_protocol.py tries every interleaving of a model of this.
    """
    place = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    tl.store(partials + (tile.to(tl.int64) * SPLITS + split) * (BM * BN) + place, total)
    # every thread's part is stored before one thread says so: the release of its addition covers them all
    tl.debug_barrier()
    return tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1


@triton.jit
def sum_of_parts(partials, tile, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr):
    """Adds all parts of a tile in their order, after the acquire in ``is_last``; past L1 besides."""
    place = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for split in range(SPLITS):
        at = partials + (tile.to(tl.int64) * SPLITS + split) * (BM * BN) + place
        total += tl.load(at, cache_modifier=".cg")
    return total


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile, ordered so that programs that run together share tiles of dY and of X."""
    width = GROUP * tiles_n
    first = program // width * GROUP
    height = min(tiles_m - first, GROUP)
    return first + program % width % height, program % width // height


@triton.jit(do_not_specialize=["tokens", "per_split", "row_start", "col_start", "row_shift"])
def wgrad_kernel(
    dy,
    x,
    out,
    row_index,
    col_index,
    partials,
    counters,
    norms,
    tokens,
    per_split,
    outputs,
    inputs,
    rows,
    cols,
    dy_stride,
    x_stride,
    row_stride,
    col_stride,
    row_start,
    row_shift,
    col_start,
    col_shift,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COL_BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(rows + row_shift, BM), tl.cdiv(cols + col_shift, BN)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    split = tl.program_id(0) // (tiles_m * tiles_n)
    m, n = tile_of(tile, tiles_m, tiles_n, 8)
    virtual_row = m * BM + tl.arange(0, BM)
    virtual_col = n * BN + tl.arange(0, BN)
    start = split * per_split
    stop = min(start + per_split, tokens)

    row_outside, col_outside = None, None
    if TMA:
        # one descriptor coordinate a tile: a block covers whole tiles
        row, col = row_start * 8 + m * BM, col_start * 8 + n * BN
        if ROW_BLOCK > 0:
            block = tl.load(row_index + m * BM // ROW_BLOCK).to(tl.int32)
            row = block * ROW_BLOCK + m * BM % ROW_BLOCK
            row_outside = tl.zeros((BM,), tl.int32) + block
            row_outside = (row_outside < 0) | (row_outside >= outputs // ROW_BLOCK)
        total = product_tma(dy, row, x, col, start, stop, BM, BN, BK, PRECISION, INTERPRETED)
    else:
        source_row, outside = selected(virtual_row, row_start, row_index, outputs, rows, ROW_BLOCK)
        if ROW_BLOCK > 0:
            row_outside = outside
        source_col, outside = selected(virtual_col, col_start, col_index, inputs, cols, COL_BLOCK)
        if COL_BLOCK > 0:
            col_outside = outside
        total = product(
            dy + source_row,
            source_row < outputs,
            dy_stride,
            x + source_col,
            source_col < inputs,
            x_stride,
            start,
            stop,
            BM,
            BN,
            BK,
            MASKED,
            PRECISION,
            INTERPRETED,
        )

    row, col = virtual_row - row_shift, virtual_col - col_shift
    if SPLITS > 1:
        if is_last(total, partials, counters, tile, split, BM, BN, SPLITS):
            total = sum_of_parts(partials, tile, BM, BN, SPLITS)
            finish(
                total, out, row, rows, row_stride, row_outside, col, cols, col_stride, col_outside,
                norms + tile, ACCUMULATE, NORM, INTERPRETED,
            )  # fmt: skip
    else:
        finish(
            total, out, row, rows, row_stride, row_outside, col, cols, col_stride, col_outside,
            norms + tile, ACCUMULATE, NORM, INTERPRETED,
        )  # fmt: skip
