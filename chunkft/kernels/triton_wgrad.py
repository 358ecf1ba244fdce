"""Host side of the Triton kernel of ``wgrad``: what is asked for, in which configuration, and its launch."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from chunkft.kernels import gpu, measured
from chunkft.kernels.choice import choose
from chunkft.kernels.heuristics import Config, Problem, broken_limits, pick, tiles, workspace_elements
from chunkft.kernels.launches import Launch, Memo, alignment, has_memory
from chunkft.kernels.selection import Blocks, Selection, selected_size
from chunkft.kernels.targets import Target, target_of
from chunkft.kernels.torch_wgrad import squared_norm_of
from chunkft.kernels.triton_persistent import Prepared, descriptor, launch_persistent, prepare_persistent

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGN = 8
# by all that they depend on: the choices of backend="auto", and the launches
_decisions: Memo[tuple[Config | None, Config | None]] = Memo()
_plans: Memo[Plan] = Memo()


def target_for(device: torch.device) -> Target:
    """Limits and speeds of a CUDA device; under the interpreter, those of the newest known one.

    Raises:
        ValueError: if the device is older than compute capability 8.0.
    """
    if device.type != "cuda":
        return target_of(90)
    facts = torch.cuda.get_device_properties(device)
    return target_of(facts.major * 10 + facts.minor, facts.name, facts.multi_processor_count)


def problem_of(
    dy: Tensor,
    x: Tensor,
    rows: Selection,
    cols: Selection,
    out_dtype: torch.dtype,
    accumulate: bool,
    tf32: bool,
    described: bool,
) -> Problem:
    """What the picker has to know about checked arguments of ``wgrad``; ``described`` as ``is_described`` of both."""
    row_start, row_block = _start(rows)
    col_start, col_block = _start(cols)
    return Problem(
        tokens=dy.shape[0],
        rows=selected_size(rows, dy.shape[1]),
        cols=selected_size(cols, x.shape[1]),
        itemsize=dy.dtype.itemsize,
        out_itemsize=out_dtype.itemsize,
        row_block=row_block,
        col_block=col_block,
        row_shift=row_start % _ALIGN,
        col_shift=col_start % _ALIGN,
        described=described,
        accumulate=accumulate,
        tf32=tf32,
    )


def chosen(
    dy: Tensor,
    x: Tensor,
    rows: Selection,
    cols: Selection,
    *,
    out_dtype: torch.dtype,
    accumulate: bool,
    tf32: bool,
    norm: bool,
) -> tuple[Config | None, bool]:
    """The configuration with which ``backend="auto"`` takes Triton, or None: PyTorch; and whether at any address."""
    if torch.compiler.is_compiling() or not (has_memory(dy) and has_memory(x)):
        return None, False
    key = (
        dy.shape, x.shape, dy.stride(), x.stride(), dy.dtype, dy.device, _named(rows), _named(cols),
        out_dtype, accumulate, tf32, norm,
    )  # fmt: skip
    found = _decisions.get(key)
    if found is None:
        problem = problem_of(dy, x, rows, cols, out_dtype, accumulate, tf32, described=False)
        found = _decisions.keep(key, _decide(dy, x, problem, norm))
    settled = found[0] is found[1]
    return found[0 if settled else is_described(dy) and is_described(x)], settled


def _decide(dy: Tensor, x: Tensor, problem: Problem, norm: bool) -> tuple[Config | None, Config | None]:
    """The choice for matrices that do not suit a descriptor, and for those that do."""
    if not gpu.available() or unsupported(dy, x):
        return None, None
    try:
        target = target_for(dy.device)
    except ValueError:  # older than the kernels, or not known to them
        return None, None
    table = measured.for_capability(target.capability)
    plain = choose(problem, target, table, norm=norm)
    return plain, choose(replace(problem, described=True), target, table, norm=norm)


def unsupported(dy: Tensor, x: Tensor) -> str:
    """Why the kernel cannot read these tensors; empty if it can."""
    for name, matrix in (("dy", dy), ("x", x)):
        if matrix.dtype not in DTYPES:
            return f"{name} must be bfloat16, float16 or float32, got {matrix.dtype}"
        if matrix.is_neg():
            return f"{name} must not be a view that negates; see torch.Tensor.resolve_neg"
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            return f"{name} must have a contiguous last dimension, got strides {matrix.stride()}"
    return ""


@dataclass(frozen=True)
class Plan:
    """A launch but for its tensors; without ``call`` and ``persistent`` the result is empty."""

    config: Config
    tiles: int
    workspace: int
    call: Launch | None
    integers: tuple[int, ...]
    persistent: Prepared | None = None


def launch(
    dy: Tensor,
    x: Tensor,
    rows: Selection,
    cols: Selection,
    out: Tensor,
    *,
    accumulate: bool,
    tf32: bool,
    squared_norm: Tensor | None,
    config: Config | None,
) -> None:
    """Run the kernel on checked arguments; ``out`` (R, C) receives the result.

    Raises:
        ValueError: if the tensors or ``config`` do not suit the kernel.
    """
    if dy.is_neg() or x.is_neg():  # views that negate what is at their address
        dy, x = dy.resolve_neg(), x.resolve_neg()
    plan = launch_of(
        dy, x, rows, cols, out, accumulate=accumulate, tf32=tf32, norm=squared_norm is not None, config=config
    )
    config = plan.config
    if plan.persistent is not None:
        launch_persistent(dy, x, out, config, plan.persistent)
        if squared_norm is not None:
            # Triton 3.6 does not compile a sum over the parts of a tile for 10.0: another pass, as PyTorch's form has
            squared_norm.copy_(squared_norm_of(out).view(squared_norm.shape))
        return
    if plan.call is None:
        if squared_norm is not None:
            squared_norm.zero_()
        return
    partials = counters = norms = None
    if config.splits > 1:
        partials = torch.empty(plan.workspace, dtype=torch.float32, device=dy.device)
        counters = torch.zeros(plan.tiles, dtype=torch.int32, device=dy.device)
    if squared_norm is not None:
        norms = torch.empty(plan.tiles, dtype=torch.float32, device=dy.device)
    row_index, col_index = _index(rows), _index(cols)
    tensors = (dy, x, out, row_index, col_index, partials, counters, norms)
    with torch.cuda.device(dy.device) if dy.is_cuda else nullcontext():
        plan.call(
            alignment(*[tensor.data_ptr() for tensor in tensors if tensor is not None]),
            _operand(dy, config.block_k, config.block_m, config.tma),
            _operand(x, config.block_k, config.block_n, config.tma),
            out,
            row_index,
            col_index,
            partials,
            counters,
            # a pointer is needed where none is used: the kernel adds the tile's number to it
            out if norms is None else norms,
            *plan.integers,
        )
    if squared_norm is not None and norms is not None:
        total = squared_norm if squared_norm.dim() < 2 else squared_norm.view(1)
        torch.sum(norms, dim=0, keepdim=total.dim() == 1, out=total)


def launch_of(
    dy: Tensor,
    x: Tensor,
    rows: Selection,
    cols: Selection,
    out: Tensor,
    *,
    accumulate: bool = False,
    tf32: bool = False,
    norm: bool = False,
    config: Config | None = None,
) -> Plan:
    """Everything of a launch on checked arguments but their addresses: made once, then remembered.

    Raises:
        ValueError: if the tensors or ``config`` do not suit the kernel.
    """
    described = is_described(dy) and is_described(x)
    key = (
        dy.shape, x.shape, dy.stride(), x.stride(), out.stride(), dy.dtype, out.dtype, dy.device,
        x.device, out.device, _named(rows), _named(cols), accumulate, tf32, norm, config, described,
        out.data_ptr() % 16 == 0,
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        gpu.require(dy)
        reason = unsupported(dy, x)
        if not reason and out.dtype not in DTYPES:
            reason = f"out must be bfloat16, float16 or float32, got {out.dtype}"
        if not reason and not dy.device == x.device == out.device:
            reason = f"dy, x and out must be on one device, got {dy.device}, {x.device} and {out.device}"
        if reason:
            raise ValueError(f"backend='triton' cannot do this: {reason}")
        target = target_for(dy.device)
        problem = problem_of(dy, x, rows, cols, out.dtype, accumulate, tf32, described)
        used = _checked_config(config, problem, target)
        plan = _plans.keep(key, _plan(dy, x, rows, cols, out, problem, target, used, norm))
    return plan


def _plan(
    dy: Tensor,
    x: Tensor,
    rows: Selection,
    cols: Selection,
    out: Tensor,
    problem: Problem,
    target: Target,
    config: Config,
    norm: bool,
) -> Plan:
    """Everything of a launch that shapes, strides, dtypes and bounds tell."""
    if not problem.rows or not problem.cols:
        return Plan(config, 0, 0, None, ())
    if config.persistent:
        starts = _start(rows)[0], _start(cols)[0]
        ready = prepare_persistent(*starts, out, problem, config, target)
        return Plan(config, 0, 0, None, (), ready)
    from chunkft.kernels.gpu.wgrad import wgrad_kernel

    count = tiles(config, problem)
    row_start, row_shift = divmod(_start(rows)[0], _ALIGN)
    col_start, col_shift = divmod(_start(cols)[0], _ALIGN)
    steps = -(-problem.tokens // config.block_k)
    integers = (
        problem.tokens,
        -(-steps // config.splits) * config.block_k,
        dy.shape[1],
        x.shape[1],
        problem.rows,
        problem.cols,
        dy.stride(0),
        x.stride(0),
        out.stride(0),
        out.stride(1),
        row_start,
        row_shift,
        col_start,
        col_shift,
    )
    constants = {
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
        "SPLITS": config.splits,
        "ROW_BLOCK": problem.row_block,
        "COL_BLOCK": problem.col_block,
        "MASKED": not config.tma and problem.tokens % config.block_k != 0,
        "TMA": config.tma,
        "ACCUMULATE": problem.accumulate,
        "NORM": norm,
        "PRECISION": "tf32" if problem.tf32 and problem.itemsize == 4 else "ieee",
        "INTERPRETED": gpu.interpreted(),
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    workspace = workspace_elements(config, problem) if config.splits > 1 else 0
    call = Launch(wgrad_kernel, (count * config.splits,), constants, options)
    return Plan(config, count, workspace, call, integers)


def _checked_config(config: Config | None, problem: Problem, target: Target) -> Config:
    if config is not None:
        broken = broken_limits(config, problem, target)
        steps = -(-problem.tokens // config.block_k)
        if not 1 <= config.splits <= max(1, steps):
            broken.append(f"splits between 1 and {max(1, steps)}")
        if broken:
            raise ValueError(f"config={config} is not allowed on {target.name}: needs {', '.join(broken)}")
        return config
    table = measured.for_capability(target.capability)
    found = None if table is None else table.find(problem, target)
    return pick(problem, target) if found is None or found[0] is None else found[0]


def _start(selection: Selection) -> tuple[int, int]:
    """Start of a contiguous selection, and the size of indexed blocks (0: contiguous)."""
    if isinstance(selection, Tensor):
        return 0, 1
    if isinstance(selection, Blocks):
        return 0, selection.size
    return (0 if selection is None else int(selection.start)), 0


def _named(selection: Selection) -> Hashable:
    """All that a launch depends on, but for the indices."""
    if selection is None:
        return None
    if isinstance(selection, slice):
        return selection.start, selection.stop
    index, size = (selection.index, selection.size) if isinstance(selection, Blocks) else (selection, 1)
    return index.numel(), index.dtype, size


def _index(selection: Selection) -> Tensor | None:
    if isinstance(selection, Blocks):
        return selection.index.contiguous()
    return selection.contiguous() if isinstance(selection, Tensor) else None


def is_described(matrix: Tensor) -> bool:
    """Whether a matrix is one that a descriptor of tensor memory can describe: aligned rows of whole 16 bytes."""
    pitch = matrix.stride(0)
    aligned = matrix.data_ptr() % 16 == 0 and pitch * matrix.dtype.itemsize % 16 == 0
    return bool(matrix.numel()) and aligned and pitch >= matrix.shape[1]


def _operand(matrix: Tensor, block_k: int, block: int, tma: bool) -> Any:
    return descriptor(matrix, block_k, block) if tma else matrix
