"""Host side of the persistent Triton kernel of ``wgrad``: descriptors, grid and launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from chunkft.kernels import gpu
from chunkft.kernels.heuristics import Config, Problem, parts, tiles
from chunkft.kernels.launches import Launch, alignment
from chunkft.kernels.targets import Target

_ALIGN = 8


@dataclass(frozen=True)
class Prepared:
    """A launch but for its tensors; ``box`` is what a descriptor of ``out`` stores at a time, None without one."""

    call: Launch
    integers: tuple[int, ...]
    box: tuple[int, int] | None


def prepare_persistent(
    row_start: int, col_start: int, out: Tensor, problem: Problem, config: Config, target: Target
) -> Prepared:
    """What shapes, strides, bounds and the alignment of ``out`` tell of a launch.

    Args:
        row_start: first row of the slice.
        col_start: first column.
        out: (R, C), R and C not 0, of any strides.
        problem: what is asked for.
        config: a persistent configuration that satisfies the limits.
        target: the device, which says how many programs run at a time.
    """
    from chunkft.kernels.gpu.wgrad_persistent import TYPES, wgrad_persistent_kernel

    described = can_describe(out, problem)
    count = parts(config, problem)
    integers = (
        problem.tokens,
        problem.rows,
        problem.cols,
        out.stride(0),
        out.stride(1),
        row_start // _ALIGN,
        row_start % _ALIGN,
        col_start // _ALIGN,
        col_start % _ALIGN,
    )
    constants = {
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "PARTS": count,
        "DTYPE": TYPES[out.dtype],
        "DESCRIBED": described,
        "ACCUMULATE": problem.accumulate,
        "SPECIALIZED": is_specialized(target.capability, described),
        "PRECISION": "tf32" if problem.tf32 and problem.itemsize == 4 else "ieee",
        "INTERPRETED": gpu.interpreted(),
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    grid = (min(tiles(config, problem), target.multiprocessors),)
    call = Launch(wgrad_persistent_kernel, grid, constants, options)
    return Prepared(call, integers, (config.block_m, config.block_n // count) if described else None)


def launch_persistent(dy: Tensor, x: Tensor, out: Tensor, config: Config, prepared: Prepared) -> None:
    """Run the kernel on dy (T, M) and x (T, N), which a descriptor can read; ``out`` (R, C) receives the result."""
    with gpu.current(dy):
        prepared.call(
            alignment(dy.data_ptr(), x.data_ptr(), out.data_ptr()),
            descriptor(dy, config.block_k, config.block_m),
            descriptor(x, config.block_k, config.block_n),
            out if prepared.box is None else descriptor(out, *prepared.box),
            *prepared.integers,
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


def descriptor(matrix: Tensor, height: int, width: int) -> Any:
    """A matrix with a contiguous last dimension as tensor memory copies it, boxes of (height, width) at a time."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [height, width])
