"""Host side of the persistent Triton kernel of ``wgrad``: descriptors, grid and launch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from chunkft.kernels import gpu
from chunkft.kernels.heuristics import Config, Problem, parts, tiles
from chunkft.kernels.targets import Target

_ALIGN = 8


def launch_persistent(
    dy: Tensor,
    x: Tensor,
    row_start: int,
    col_start: int,
    out: Tensor,
    problem: Problem,
    config: Config,
    target: Target,
) -> None:
    """Run the kernel on checked arguments: slices of ``problem``'s size from the given row and column on.

    Args:
        dy: (T, M), which a descriptor can read, as can ``x``.
        x: (T, N).
        row_start: first row of the slice.
        col_start: first column.
        out: (R, C), R and C not 0, of any strides; receives the result.
        problem: what is asked for.
        config: a persistent configuration that satisfies the limits.
        target: the device, which says how many programs run at a time.
    """
    from chunkft.kernels.gpu.wgrad_persistent import TYPES, wgrad_persistent_kernel

    described = can_describe(out, problem)
    count = parts(config, problem)
    with torch.cuda.device(dy.device) if dy.is_cuda else nullcontext():
        wgrad_persistent_kernel[(min(tiles(config, problem), target.multiprocessors),)](
            _described(dy, config.block_k, config.block_m),
            _described(x, config.block_k, config.block_n),
            _described(out, config.block_m, config.block_n // count) if described else out,
            problem.tokens,
            problem.rows,
            problem.cols,
            out.stride(0),
            out.stride(1),
            row_start // _ALIGN,
            row_start % _ALIGN,
            col_start // _ALIGN,
            col_start % _ALIGN,
            BM=config.block_m,
            BN=config.block_n,
            BK=config.block_k,
            PARTS=count,
            DTYPE=TYPES[out.dtype],
            DESCRIBED=described,
            ACCUMULATE=problem.accumulate,
            SPECIALIZED=is_specialized(target.capability, described),
            PRECISION="tf32" if problem.tf32 and problem.itemsize == 4 else "ieee",
            INTERPRETED=gpu.interpreted(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def can_describe(out: Tensor, problem: Problem) -> bool:
    """Whether a descriptor can store ``out``: aligned rows of whole 16-byte units, from an aligned column on."""
    size = out.dtype.itemsize
    return (
        out.data_ptr() % 16 == 0
        and (out.stride(1) == 1 or out.shape[1] == 1)
        and out.stride(0) >= out.shape[1]
        and out.stride(0) * size % 16 == 0
        and out.shape[1] * size % 16 == 0
        and problem.col_shift == 0
    )


def is_specialized(capability: int, described: bool) -> bool:
    """Where warp specialisation changes the code and both Triton 3.6 and 3.9 compile it; elsewhere 3.6 fails."""
    return capability == 100 and described


def _described(matrix: Tensor, height: int, width: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [height, width])
