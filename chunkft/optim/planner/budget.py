"""``memory_budget=`` of the optimizers: the planner's choice for a model that is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from chunkft.optim.planner.planning import plan_memory
from chunkft.plan import uncompiled

__all__ = ["DEFAULT_CHUNKS", "choose"]


class _Default(int):
    """A default that can be told from the same number given by hand."""


DEFAULT_CHUNKS = _Default(32)


def choose(
    model: Any,
    base: type[torch.optim.Optimizer],
    base_options: dict[str, Any],
    budget: int | str,
    tokens: int,
    *,
    chunks: int | None,
    residency: str,
    update: str,
    partition: Any,
    slice_dim: int,
    always_active: str | Sequence[str] | None,
    state_device: str,
    state_dir: Any,
    master: str,
    interval: int,
    page_bytes: int,
) -> tuple[int, str]:
    """Number of chunks and residency with which training fits a budget.

    Args:
        model: the module.
        base: class of the optimizer.
        base_options: its keywords.
        budget: memory of the parameters' device.
        tokens: of a forward pass.
        chunks: has to be the default.
        residency: ``"stream"`` is kept; ``"chunk"`` may become it.
        update: kept as it is, and so are the next ones.
        slice_dim: likewise.
        always_active: likewise.
        state_dir: likewise.
        master: likewise.
        interval: likewise.
        page_bytes: likewise.
        partition: has to be ``"bytes"``.
        state_device: has to be ``"auto"`` or ``"paged"``.

    Returns:
        ``chunks`` and ``residency``.

    Raises:
        ValueError: if an argument contradicts the budget, or nothing fits; the message names the smallest change.
    """
    given = f"memory_budget={budget!r}"
    if chunks is not DEFAULT_CHUNKS:
        raise ValueError(
            f"chunks={chunks!r} and {given} exclude each other: the budget chooses the chunks; give one"
        )
    for name, value, allowed in (
        ("partition", partition, ("bytes",)),
        ("state_device", state_device, ("auto", "paged")),
    ):
        if value not in allowed:
            raise ValueError(
                f"{name}={value!r} cannot be combined with {given}; allowed are {', '.join(map(repr, allowed))}"
            )
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{given} takes a module, got {type(model).__name__}; for parameter groups call chunkft.plan_memory(model, "
            "gpu=...) before chunkft.attach(model), and pass its optimizer_arguments()"
        )
    model = uncompiled(model)
    if model.__dict__.get("_chunkft") is not None:
        raise ValueError(
            f"{given} needs a model that is not attached; call chunkft.plan_memory(model, gpu=...) before "
            "chunkft.attach(model), and pass its optimizer_arguments()"
        )
    place = {"disk": 1 << 62, "state_dir": state_dir} if state_dir is not None else {}
    plan = plan_memory(
        model,
        gpu=budget,
        tokens=tokens,
        base=base,
        base_options=base_options,
        interval=interval,
        page_bytes=page_bytes,
        always_active=always_active,
        slice_dim=slice_dim,
        device="cuda" if any(p.is_cuda for p in model.parameters()) else "cpu",
        residency="stream" if residency == "stream" else ("chunk", "stream"),
        update=update,
        weights="resident",
        state_bits=32,
        checkpointing=None,
        master=master,
        **place,
    )
    if not plan.fits:
        raise ValueError(
            f"{given} is too little for {plan.parameters:,} parameters and {tokens} tokens: even {plan.setting} "
            f"{plan.change} ({plan.gpu.total:,} bytes in all); chunkft.plan_memory(model, gpu=...) looks at other "
            "ways, such as activation checkpointing"
        )
    return plan.setting.chunks, plan.setting.residency
