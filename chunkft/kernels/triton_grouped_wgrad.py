"""Host side of the Triton kernels of ``grouped_wgrad`` and ``expert_wgrad``: packing, configuration, launch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from chunkft.kernels import gpu
from chunkft.kernels.heuristics import (
    Config,
    Problem,
    broken_limits,
    pick,
    shared_bytes,
    tiles,
    workspace_elements,
)
from chunkft.kernels.targets import Target
from chunkft.kernels.triton_wgrad import DTYPES, target_for, unsupported

_ALIGN = 8
# slices of one launch: each adds a few instructions to every program
GROUPS_MAX = 16


def group_problem(
    x: Tensor, spans: Sequence[slice], cols: slice, out_dtype: torch.dtype, tf32: bool
) -> Problem:
    """What the picker has to know of several slices: each has tiles of its own, read through pointers."""
    parts = tuple(span.stop - span.start + span.start % _ALIGN for span in spans)
    return Problem(
        tokens=x.shape[0],
        rows=sum(parts),
        cols=cols.stop - cols.start,
        itemsize=x.dtype.itemsize,
        out_itemsize=out_dtype.itemsize,
        col_shift=cols.start % _ALIGN,
        described=False,
        tf32=tf32,
        parts=parts,
    )


def launch_groups(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    spans: Sequence[slice],
    cols: Sequence[slice],
    outs: Sequence[Tensor],
    *,
    accumulate: bool,
    tf32: bool,
    config: Config | None,
) -> None:
    """Run the kernel on checked arguments, once for every 16 slices with the same columns, tokens and dtype.

    Raises:
        ValueError: if a tensor or ``config`` does not suit the kernel; nothing is written then.
    """
    classes: dict[tuple[int, int, int, torch.dtype], list[int]] = {}
    for i, (dy, x, out) in enumerate(zip(dys, xs, outs, strict=True)):
        _check(dy, x, out, f"dys[{i}], its x and outs[{i}]")
        if out.shape[1] > 1 and out.stride(1) != 1:
            raise ValueError(f"outs[{i}] must have a contiguous last dimension, got strides {out.stride()}")
        if out.numel():
            classes.setdefault((cols[i].start, cols[i].stop, x.shape[0], x.dtype), []).append(i)
    launches = []
    for full in classes.values():
        for k in range(0, len(full), GROUPS_MAX):
            batch = full[k : k + GROUPS_MAX]
            head = batch[0]
            problem = group_problem(xs[head], [spans[i] for i in batch], cols[head], outs[head].dtype, tf32)
            launches.append((batch, problem, _config(config, problem, target_for(xs[head].device))))
    for batch, problem, chosen in launches:
        members = [(dys[i], xs[i], spans[i], outs[i]) for i in batch]
        _launch_batch(members, cols[batch[0]], problem, chosen, accumulate)


def _launch_batch(
    members: Sequence[tuple[Tensor, Tensor, slice, Tensor]],
    cols: slice,
    problem: Problem,
    config: Config,
    accumulate: bool,
) -> None:
    from chunkft.kernels.gpu.grouped_wgrad import grouped_kernel

    dys, xs, spans, outs = zip(*members, strict=True)
    device = xs[0].device
    count = tiles(config, problem)
    steps = -(-problem.tokens // config.block_k)
    partials = counters = None
    if config.splits > 1:
        partials = torch.empty(workspace_elements(config, problem), dtype=torch.float32, device=device)
        counters = torch.zeros(count, dtype=torch.int32, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        grouped_kernel[(_programs(config, problem, device),)](
            dys,
            xs,
            outs,
            partials,
            counters,
            problem.tokens,
            -(-steps // config.splits) * config.block_k,
            tuple(dy.stride(0) for dy in dys),
            tuple(x.stride(0) for x in xs),
            tuple(out.stride(0) for out in outs),
            tuple(dy.shape[1] for dy in dys),
            tuple(x.shape[1] for x in xs),
            tuple(span.start // _ALIGN for span in spans),
            tuple(span.start % _ALIGN for span in spans),
            tuple(span.stop - span.start for span in spans),
            sum(-(-part // config.block_m) for part in problem.parts),
            problem.cols,
            cols.start // _ALIGN,
            cols.start % _ALIGN,
            GROUPS=len(members),
            BM=config.block_m,
            BN=config.block_n,
            BK=config.block_k,
            SPLITS=config.splits,
            ALIGNED=all(_is_aligned(matrix) for matrix in (*dys, *xs)),
            OUTS_ALIGNED=all(_is_aligned(out) for out in outs),
            MASKED=problem.tokens % config.block_k != 0,
            ACCUMULATE=accumulate,
            PRECISION="tf32" if problem.tf32 and problem.itemsize == 4 else "ieee",
            INTERPRETED=gpu.interpreted(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _programs(config: Config, problem: Problem, device: torch.device) -> int:
    """One program a tile and token range or, where it is persistent, as many as run at a time for certain."""
    count = tiles(config, problem) * config.splits
    if not config.persistent:
        return count
    target = target_for(device)
    # 64 K registers, of which a thread has at most 255
    blocks = min(target.shared_memory // shared_bytes(config, problem, target), 8 // config.num_warps)
    return min(count, target.multiprocessors * max(1, blocks))


def expert_problem(
    dy: Tensor, experts: int, shape: tuple[int, int], shifts: tuple[int, int], out_itemsize: int, tf32: bool
) -> Problem:
    """What the picker has to know of one of ``experts`` experts: the mean number of tokens, no TMA, no splits."""
    return Problem(
        tokens=-(-dy.shape[0] // max(1, experts)),
        rows=shape[0],
        cols=shape[1],
        itemsize=dy.dtype.itemsize,
        out_itemsize=out_itemsize,
        row_shift=shifts[0],
        col_shift=shifts[1],
        described=False,
        tf32=tf32,
    )


def launch_experts(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    experts: slice,
    rows: slice,
    cols: slice,
    out: Tensor,
    *,
    accumulate: bool,
    tf32: bool,
    config: Config | None,
) -> None:
    """Run the kernel on checked arguments.

    Raises:
        ValueError: if a tensor or ``config`` does not suit the kernel; nothing is written then.
    """
    _check(dy, x, out, "dy, x and out")
    shifts = (rows.start % _ALIGN, cols.start % _ALIGN)
    shape = (rows.stop - rows.start, cols.stop - cols.start)
    problem = expert_problem(dy, len(offsets), shape, shifts, out.dtype.itemsize, tf32)
    target = target_for(dy.device)
    chosen = _config(config, problem, target, split=False)
    if not out.numel():
        return
    from chunkft.kernels.gpu.grouped_wgrad import expert_kernel

    with torch.cuda.device(dy.device) if dy.is_cuda else nullcontext():
        expert_kernel[(out.shape[0] * tiles(chosen, problem),)](
            dy,
            x,
            out,
            offsets.contiguous(),
            dy.shape[0],
            experts.start,
            dy.shape[1],
            x.shape[1],
            *shape,
            dy.stride(0),
            x.stride(0),
            *out.stride(),
            rows.start // _ALIGN,
            shifts[0],
            cols.start // _ALIGN,
            shifts[1],
            BM=chosen.block_m,
            BN=chosen.block_n,
            BK=chosen.block_k,
            ACCUMULATE=accumulate,
            PRECISION="tf32" if tf32 and dy.dtype == torch.float32 else "ieee",
            INTERPRETED=gpu.interpreted(),
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )


def _is_aligned(matrix: Tensor) -> bool:
    return matrix.data_ptr() % 16 == 0 and matrix.shape[1] % _ALIGN == 0 and matrix.stride(0) % _ALIGN == 0


def _check(dy: Tensor, x: Tensor, out: Tensor, names: str) -> None:
    reason = unsupported(dy, x)
    if not reason and out.dtype not in DTYPES:
        reason = f"out must be bfloat16, float16 or float32, got {out.dtype}"
    if reason:
        raise ValueError(f"backend='triton' cannot do this with {names}: {reason}")


def _config(config: Config | None, problem: Problem, target: Target, split: bool = True) -> Config:
    if config is None:
        return pick(problem, target, split)
    broken = broken_limits(config, problem, target)
    limit = max(1, -(-problem.tokens // config.block_k)) if split else 1
    if not 1 <= config.splits <= limit:
        broken.append(f"splits between 1 and {limit}")
    if broken or config.tma:
        raise ValueError(
            f"config={config} is not allowed on {target.name}: needs {', '.join(broken) or 'no TMA'}"
        )
    return config
