"""Weight gradients of several slices at once: projections that share an input, and the experts of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chunkft.kernels import choice, gpu
from chunkft.kernels.grouped_choice import config_of_experts, way_of_groups
from chunkft.kernels.selection import checked
from chunkft.kernels.torch_grouped_wgrad import by_one_product, one_by_one
from chunkft.kernels.wgrad import BACKENDS, wgrad

if TYPE_CHECKING:
    from chunkft.kernels.heuristics import Config


def grouped_wgrad(
    dys: Sequence[Tensor],
    x: Tensor | Sequence[Tensor],
    rows: Sequence[slice | None] | None = None,
    cols: slice | None = None,
    outs: Sequence[Tensor] | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    *,
    tf32: bool = False,
    config: Config | None = None,
) -> list[Tensor]:
    """Gradients of slices of several weights, such as q, k and v, or gate and up, which share their input.

    ``dW_g = dY_g[:, rows_g]^T X_g[:, cols]``. The Triton kernel computes up to 16 slices of any numbers of rows in one
    launch, ordered so that an X that several of them share comes from memory once.

    Args:
        dys: G gradients (T, M_g); last dimension contiguous for Triton.
        x: (T, N) the shared input, or G inputs (T_g, N_g); dtype and device of all of ``dys``. Slices whose inputs
            differ in T or N need a launch for each.
        rows: for each weight a slice with step 1, or None for all of its rows; all rows of all weights by default.
        cols: columns of every weight; all of each by default.
        outs: G tensors (R_g, C) of one dtype that receive the results; for Triton with a contiguous last dimension.
        accumulate: add to ``outs`` instead of overwriting them.
        out_dtype: dtype of new results; the input's by default.
        backend: as for ``wgrad``. ``"torch"`` is a product a slice, or one for all that share X where copying their dY
            side by side is expected to cost less than products of few rows (on a GPU; results are views of one tensor
            then); ``"auto"`` compares Triton with the better of the two.
        tf32: as for ``wgrad``.
        config: tile of the Triton kernel instead of the picker's choice.

    Returns:
        G tensors (R_g, C): ``outs`` if given.

    Raises:
        ValueError: if numbers, shapes, dtypes, bounds or the backend do not fit; nothing is written then.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; allowed are {', '.join(map(repr, BACKENDS))}")
    if config is not None and backend != "triton":
        raise ValueError(f"config is for backend='triton', got backend={backend!r}")
    chosen = [None] * len(dys) if rows is None else list(rows)
    xs = [x] * len(dys) if isinstance(x, Tensor) else list(x)
    lengths = [len(dys), len(xs), len(chosen), len(dys) if outs is None else len(outs)]
    if lengths != [len(dys)] * 4:
        raise ValueError(f"dys, x, rows and outs must be of one length, got {', '.join(map(str, lengths))}")
    if accumulate and outs is None:
        raise ValueError("accumulate=True needs outs=, the tensors to add to")
    for i, (dy, own) in enumerate(zip(dys, xs, strict=True)):
        if dy.dim() != 2 or own.dim() != 2 or dy.shape[0] != own.shape[0]:
            raise ValueError(
                f"dys[{i}] and x must be (T, M) and (T, N) with the same T, got {tuple(dy.shape)}, {tuple(own.shape)}"
            )
        if dy.dtype != own.dtype or dy.device != own.device or not dy.is_floating_point():
            raise ValueError(
                f"dys[{i}] and x must share one floating dtype and device, got {dy.dtype} on {dy.device} "
                f"and {own.dtype} on {own.device}"
            )
    spans = [
        _span(part, dy.shape[1], f"rows[{i}]") for i, (part, dy) in enumerate(zip(chosen, dys, strict=True))
    ]
    widths = [_span(cols, own.shape[1], "cols") for own in xs]
    shapes = [(r.stop - r.start, c.stop - c.start) for r, c in zip(spans, widths, strict=True)]
    for i, out in enumerate(outs or ()):
        if out.shape != shapes[i] or outs is None or out.dtype != outs[0].dtype:
            raise ValueError(
                f"outs[{i}] must be {shapes[i]} of the dtype of outs[0], got {tuple(out.shape)} {out.dtype}"
            )
        if out_dtype is not None and out.dtype != out_dtype:
            raise ValueError(
                f"out_dtype={out_dtype} disagrees with outs[{i}].dtype={out.dtype}; give one of them"
            )

    if not dys:
        return []
    if backend == "triton":
        gpu.require(dys[0])
        return _by_triton(dys, xs, spans, widths, outs, accumulate, out_dtype, tf32, config)
    if len({dy.dtype for dy in dys}) > 1:
        return [
            wgrad(dy, own, span, width, None if outs is None else outs[i], accumulate, out_dtype, "torch")
            for i, (dy, own, span, width) in enumerate(zip(dys, xs, spans, widths, strict=True))
        ]
    wanted = outs[0].dtype if outs is not None else out_dtype or dys[0].dtype
    way = way_of_groups(dys, xs, spans, widths, outs, accumulate, wanted, tf32, triton=backend == "auto")
    if way == "by one product":
        return by_one_product(dys, xs[0], spans, widths[0], outs, accumulate, wanted)
    if way == "one by one":
        return one_by_one(dys, xs, spans, widths, outs, accumulate, wanted)
    return _by_triton(dys, xs, spans, widths, outs, accumulate, out_dtype, tf32, way)


def _by_triton(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    spans: Sequence[slice],
    widths: Sequence[slice],
    outs: Sequence[Tensor] | None,
    accumulate: bool,
    out_dtype: torch.dtype | None,
    tf32: bool,
    config: Config | None,
) -> list[Tensor]:
    from chunkft.kernels.triton_grouped_wgrad import launch_groups

    if outs is None:
        results = [
            dy.new_empty((span.stop - span.start, width.stop - width.start), dtype=out_dtype or dy.dtype)
            for dy, span, width in zip(dys, spans, widths, strict=True)
        ]
    else:
        results = list(outs)
    launch_groups(dys, xs, spans, widths, results, accumulate=accumulate, tf32=tf32, config=config)
    return results


def expert_wgrad(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    experts: slice | None = None,
    rows: slice | None = None,
    cols: slice | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    *,
    tf32: bool = False,
    config: Config | None = None,
) -> Tensor:
    """Gradient of a slice of a 3-D expert weight, tokens being sorted by expert as for ``torch._grouped_mm``.

    ``dW[e] = dY[t0:t1, rows]^T X[t0:t1, cols]`` with ``t0, t1 = offsets[e - 1], offsets[e]``; zero for an expert
    without tokens.

    Args:
        dy: (T, M) gradient of the experts' outputs.
        x: (T, N) inputs, in the same order of tokens.
        offsets: (E,) int32, for each expert the end of its tokens; ascending, the last at most T.
        experts: which of the E experts; all by default.
        rows: which of the M rows of each; all by default.
        cols: which of the N columns of each; all by default.
        out: (E', R, C) tensor that receives the result.
        accumulate: add to ``out`` instead of overwriting it.
        out_dtype: dtype of a new result; the input's by default.
        backend: as for ``wgrad``. ``"torch"`` waits for the device to learn the offsets, and is a product an expert;
            Triton, which ``"auto"`` takes on a GPU if that is expected or measured to be faster, does neither.
            ``torch._grouped_mm`` is not used: without tokens it gave no zeros on compute capability 10.0
            (pytorch/pytorch#172439).
        tf32: as for ``wgrad``.
        config: tile of the Triton kernel instead of the picker's choice; without splits and TMA.

    Returns:
        (E', R, C) tensor: ``out`` if given.

    Raises:
        ValueError: if shapes, dtypes, bounds or the backend do not fit, or offsets that are on the CPU are not
            ascending within T.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; allowed are {', '.join(map(repr, BACKENDS))}")
    if config is not None and backend != "triton":
        raise ValueError(f"config is for backend='triton', got backend={backend!r}")
    if dy.dim() != 2 or x.dim() != 2 or dy.shape[0] != x.shape[0] or dy.dtype != x.dtype:
        raise ValueError(
            "dy and x must be (T, M) and (T, N) with the same T and dtype, got "
            f"{dy.dtype} {tuple(dy.shape)} and {x.dtype} {tuple(x.shape)}"
        )
    if offsets.dim() != 1 or offsets.dtype != torch.int32 or offsets.device != dy.device:
        raise ValueError(
            f"offsets must be 1-D int32 on {dy.device}, got {offsets.dtype} {tuple(offsets.shape)} on {offsets.device}"
        )
    if accumulate and out is None:
        raise ValueError("accumulate=True needs out=, the tensor to add to")
    if out is not None and out_dtype is not None and out.dtype != out_dtype:
        raise ValueError(f"out_dtype={out_dtype} disagrees with out.dtype={out.dtype}; give one of them")
    if not offsets.is_cuda:
        ends = [0, *offsets.tolist()]
        if any(b < a for a, b in pairwise(ends)) or ends[-1] > dy.shape[0]:
            raise ValueError(f"offsets={ends[1:]} must ascend from 0 to at most T={dy.shape[0]}")
    chosen = _span(experts, len(offsets), "experts")
    row, col = _span(rows, dy.shape[1], "rows"), _span(cols, x.shape[1], "cols")
    shape = (chosen.stop - chosen.start, row.stop - row.start, col.stop - col.start)
    if out is not None and out.shape != shape:
        raise ValueError(f"out must have shape {shape}, got {tuple(out.shape)}")
    if backend == "triton":
        gpu.require(dy)
    elif backend == "auto" and choice.asks(dy):
        from chunkft.kernels.triton_grouped_wgrad import expert_problem

        shifts = (row.start % 8, col.start % 8)
        wanted = (out_dtype or dy.dtype) if out is None else out.dtype
        mean = expert_problem(dy, len(offsets), shape[1:], shifts, wanted.itemsize, tf32)
        mean = replace(mean, accumulate=accumulate)
        config = config_of_experts(dy, x, out, wanted, mean, shape[0])
    target = dy.new_empty(shape, dtype=out_dtype or dy.dtype) if out is None else out
    if backend == "triton" or config is not None:
        from chunkft.kernels.triton_grouped_wgrad import launch_experts

        launch_experts(
            dy, x, offsets, chosen, row, col, target, accumulate=accumulate, tf32=tf32, config=config
        )
        return target
    ends = [0, *offsets.tolist()]
    for place, expert in enumerate(range(chosen.start, chosen.stop)):
        tokens = slice(ends[expert], ends[expert + 1])
        wgrad(dy[tokens], x[tokens], row, col, target[place], accumulate, backend="torch")
    return target


def _span(selection: slice | None, size: int, name: str) -> slice:
    if selection is not None and not isinstance(selection, slice):
        raise ValueError(f"{name} must be a slice or None, got {type(selection).__name__}")
    found = checked(slice(0, size) if selection is None else selection, size, name)
    assert isinstance(found, slice)
    return found
