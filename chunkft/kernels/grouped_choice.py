"""What ``backend="auto"`` takes for several slices and for experts, remembered by all that it depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from chunkft.kernels import choice, gpu, measured
from chunkft.kernels.choice import choose_group
from chunkft.kernels.heuristics import Config, Problem
from chunkft.kernels.launches import Memo, has_memory
from chunkft.kernels.targets import Target
from chunkft.kernels.torch_grouped_wgrad import can_join, shares_input

Way = Config | Literal["one by one", "by one product"]
_decisions: Memo[Way] = Memo()


def way_of_groups(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    spans: Sequence[slice],
    cols: Sequence[slice],
    outs: Sequence[Tensor] | None,
    accumulate: bool,
    wanted: torch.dtype,
    tf32: bool,
    triton: bool,
) -> Way:
    """Triton in a configuration, or one of PyTorch's forms; ``triton=False`` chooses among PyTorch's."""
    if not choice.asks(xs[0]) or torch.compiler.is_compiling() or not all(map(has_memory, (*dys, *xs))):
        return "one by one"
    shared = shares_input(xs)
    key = (
        tuple((dy.shape, dy.stride(), x.shape, x.stride(), x.dtype) for dy, x in zip(dys, xs, strict=True)),
        tuple((span.start, span.stop) for span in (*spans, *cols)),
        None if outs is None else tuple(out.stride() for out in outs),
        xs[0].device, accumulate, wanted, tf32, triton, shared,
    )  # fmt: skip
    found = _decisions.get(key)
    if found is None:
        target = _target(xs[0])
        problem = _problem(xs, spans, cols, wanted, tf32, shared)
        way: Way = "one by one"
        if target is not None and problem is not None:
            way = _decide(replace(problem, accumulate=accumulate), target, dys, xs, outs, wanted, triton)
        found = _decisions.keep(key, way)
    return found


def _problem(
    xs: Sequence[Tensor],
    spans: Sequence[slice],
    cols: Sequence[slice],
    wanted: torch.dtype,
    tf32: bool,
    shared: bool,
) -> Problem | None:
    """All slices as one problem; None where they differ in tokens or columns."""
    alike = {(x.shape[0], window.start, window.stop) for x, window in zip(xs, cols, strict=True)}
    if len(alike) > 1:
        return None
    from chunkft.kernels.triton_grouped_wgrad import group_problem

    return replace(group_problem(xs[0], spans, cols[0], wanted, tf32), shared=shared)


def _decide(
    problem: Problem,
    target: Target,
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    outs: Sequence[Tensor] | None,
    wanted: torch.dtype,
    triton: bool,
) -> Way:
    from chunkft.kernels.triton_grouped_wgrad import GROUPS_MAX

    if triton and len(dys) <= GROUPS_MAX and _readable(dys, xs, outs, wanted):
        config = choose_group(problem, target, measured.for_capability(target.capability))
        if config is not None:
            return config
    joins = can_join(dys, xs) and choice.by_one_product(problem, target) < choice.one_by_one(problem, target)
    return "by one product" if joins else "one by one"


def config_of_experts(
    dy: Tensor, x: Tensor, out: Tensor | None, wanted: torch.dtype, problem: Problem, experts: int
) -> Config | None:
    """The configuration with which Triton computes ``experts`` experts of the given mean problem, or None: PyTorch."""
    if not choice.asks(dy) or torch.compiler.is_compiling() or not (has_memory(dy) and has_memory(x)):
        return None
    outs = None if out is None else [out]
    target = _target(dy)
    if target is None or not _readable([dy], [x], outs, wanted):
        return None
    key = (problem, experts, target)
    found = _decisions.get(key)
    if found is None:
        config = choose_group(
            experts_problem(problem, experts),
            target,
            measured.for_capability(target.capability),
            split=False,
        )
        found = _decisions.keep(key, "one by one" if config is None else config)
    return None if isinstance(found, str) else found


def experts_problem(problem: Problem, experts: int) -> Problem:
    """All experts of a mean problem, as tables of measurements know them."""
    parts = (problem.rows,) * experts
    return replace(problem, rows=sum(parts), parts=parts)


def _target(tensor: Tensor) -> Target | None:
    if not gpu.available():
        return None
    # looked up at the call, so that tests can put another device in its place
    from chunkft.kernels import triton_wgrad

    try:
        return triton_wgrad.target_for(tensor.device)
    except ValueError:  # older than the kernels, or not known to them
        return None


def _readable(
    dys: Sequence[Tensor], xs: Sequence[Tensor], outs: Sequence[Tensor] | None, wanted: torch.dtype
) -> bool:
    from chunkft.kernels.triton_wgrad import DTYPES, unsupported

    rows = all(out.shape[-1] <= 1 or out.stride(-1) == 1 for out in outs or ())
    same = len({x.dtype for x in xs}) == 1
    return (
        wanted in DTYPES
        and rows
        and same
        and not any(unsupported(dy, x) for dy, x in zip(dys, xs, strict=True))
    )
