"""Triton kernels of ``grouped_wgrad`` and ``expert_wgrad``; tiles and their product are those of gpu/wgrad.py."""

from __future__ import annotations

import triton
import triton.language as tl

from chunkft.kernels.gpu.wgrad import finish, is_last, product, sum_of_parts, tile_of

_TUPLES = ["dy_pitches", "x_pitches", "out_pitches", "outputs", "inputs", "starts", "shifts", "counts"]


@triton.jit(do_not_specialize=["tokens", "per_split", "col_start", *_TUPLES])
def grouped_kernel(
    dys,
    xs,
    outs,
    partials,
    counters,
    tokens,
    per_split,
    dy_pitches,
    x_pitches,
    out_pitches,
    outputs,
    inputs,
    starts,
    shifts,
    counts,
    tiles_m,
    cols,
    col_start,
    col_shift,
    GROUPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    OUTS_ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``dW_g = dY_g[:, rows_g]^T X_g[:, cols]`` for all g; every tuple has one entry a slice.

    The row tiles of all slices are numbered one after another, and tiles of one column run side by side, so that
    slices with the same X read it from memory once. (Rows of several slices in one tile would need an address a row:
    that spilled at every tile size.)

    A grid of any size does: programs walk over tiles and token ranges. Flattened into one with that over tokens, as in
    gpu/wgrad_persistent.py, this loop compiles to the same code, with Triton 3.6 and 3.9.
    """
    tiles_n = tl.cdiv(cols + col_shift, BN)
    for item in tl.range(tl.program_id(0), tiles_m * tiles_n * SPLITS, tl.num_programs(0)):
        tile = item % (tiles_m * tiles_n)
        split = item // (tiles_m * tiles_n)
        m, n = tile_of(tile, tiles_m, tiles_n, 8)
        start = split * per_split
        stop = min(start + per_split, tokens)

        dy, x, out = dys[0], xs[0], outs[0]
        dy_pitch, x_pitch, out_pitch = dy_pitches[0], x_pitches[0], out_pitches[0]
        width_m, width_n = outputs[0], inputs[0]
        row_start, row_shift, rows = starts[0], shifts[0], counts[0]
        first = 0
        own = tl.cdiv(counts[0] + shifts[0], BM)
        for g in tl.static_range(1, GROUPS):
            # no `if`: what is known of alignment does not survive it
            here = m >= own
            dy, x, out = tl.where(here, dys[g], dy), tl.where(here, xs[g], x), tl.where(here, outs[g], out)
            dy_pitch = tl.where(here, dy_pitches[g], dy_pitch)
            x_pitch = tl.where(here, x_pitches[g], x_pitch)
            out_pitch = tl.where(here, out_pitches[g], out_pitch)
            width_m, width_n = tl.where(here, outputs[g], width_m), tl.where(here, inputs[g], width_n)
            row_start, row_shift = tl.where(here, starts[g], row_start), tl.where(here, shifts[g], row_shift)
            rows, first = tl.where(here, counts[g], rows), tl.where(here, own, first)
            own += tl.cdiv(counts[g] + shifts[g], BM)
        if ALIGNED:
            dy, x = tl.multiple_of(dy, 16), tl.multiple_of(x, 16)
            dy_pitch, x_pitch = tl.multiple_of(dy_pitch, 8), tl.multiple_of(x_pitch, 8)
            width_m, width_n = tl.multiple_of(width_m, 8), tl.multiple_of(width_n, 8)
        if OUTS_ALIGNED:
            out, out_pitch = tl.multiple_of(out, 16), tl.multiple_of(out_pitch, 8)

        row = (m - first) * BM + tl.arange(0, BM)
        col = n * BN + tl.arange(0, BN)
        source_row, source_col = row_start * 8 + row, col_start * 8 + col
        total = product(
            dy + source_row,
            source_row < width_m,
            dy_pitch,
            x + source_col,
            source_col < width_n,
            x_pitch,
            start,
            stop,
            BM,
            BN,
            BK,
            MASKED,
            PRECISION,
            INTERPRETED,
        )
        if SPLITS > 1:
            if is_last(total, partials, counters, tile, split, BM, BN, SPLITS):
                total = sum_of_parts(partials, tile, BM, BN, SPLITS)
                finish(
                    total, out, row - row_shift, rows, out_pitch, None, col - col_shift, cols, 1, None,
                    None, ACCUMULATE, False, INTERPRETED,
                )  # fmt: skip
        else:
            finish(
                total, out, row - row_shift, rows, out_pitch, None, col - col_shift, cols, 1, None,
                None, ACCUMULATE, False, INTERPRETED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "first_expert", "row_start", "row_shift", "col_start"])
def expert_kernel(
    dy,
    x,
    out,
    offsets,
    tokens,
    first_expert,
    outputs,
    inputs,
    rows,
    cols,
    dy_stride,
    x_stride,
    expert_stride,
    row_stride,
    col_stride,
    row_start,
    row_shift,
    col_start,
    col_shift,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """``dW[e] = dY[a:b, rows]^T X[a:b, cols]`` with ``a, b = offsets[e - 1], offsets[e]``; zero without tokens."""
    tiles_m, tiles_n = tl.cdiv(rows + row_shift, BM), tl.cdiv(cols + col_shift, BN)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    place = tl.program_id(0) // (tiles_m * tiles_n)
    m, n = tile_of(tile, tiles_m, tiles_n, 8)
    row, col = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    expert = first_expert + place
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    # wrong offsets must not reach outside of the tensors
    start = max(start, 0)
    stop = min(tl.load(offsets + expert).to(tl.int32), tokens)
    source_row, source_col = row_start * 8 + row, col_start * 8 + col
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
        True,
        PRECISION,
        INTERPRETED,
    )
    finish(
        total, out + place.to(tl.int64) * expert_stride, row - row_shift, rows, row_stride, None,
        col - col_shift, cols, col_stride, None, None, ACCUMULATE, False, INTERPRETED,
    )  # fmt: skip
