"""``memory_budget=`` of the optimizers: the planner's choice for a model that is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from chunkft.optim.planner.planning import plan_memory
from chunkft.optim.planner.result import MemoryPlan
from chunkft.optim.weights import WeightChoice
from chunkft.plan import uncompiled
from chunkft.weights import WeightStream, stream_of
from chunkft.weights.arguments import resolved_device

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
    state_bits: int,
    where: WeightChoice,
) -> tuple[int, str, WeightChoice]:
    """Number of chunks, residency and place of the weights with which training fits a budget.

    Weights stream if that was asked for, or if nothing else fits and they may.

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
        state_bits: likewise.
        where: the weights are, and are updated; what is ``"auto"`` there, and how many blocks stay, may be chosen.
        partition: has to be ``"bytes"``.
        state_device: has to be ``"auto"`` or ``"paged"``.

    Returns:
        ``chunks``, ``residency`` and ``where``.

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

    def planned(fixed: dict[str, Any]) -> MemoryPlan:
        return plan_memory(
            model,
            gpu=budget,
            tokens=tokens,
            base=base,
            base_options=base_options,
            interval=interval,
            page_bytes=page_bytes,
            always_active=always_active,
            slice_dim=slice_dim,
            residency="stream" if residency == "stream" else ("chunk", "stream"),
            update=update,
            state_bits=state_bits,
            checkpointing=None,
            master=master,
            **place,
            **fixed,
        )

    stream = where.weights if isinstance(where.weights, WeightStream) else stream_of(model)
    plan: MemoryPlan | None = None
    if stream is None and where.weights != "stream":
        on_gpu = any(p.is_cuda for p in model.parameters())
        plan = planned({"weights": "resident", "device": "cuda" if on_gpu else "cpu"})
    if plan is None or (not plan.fits and where.weights == "auto"):
        resident = plan
        plan = planned(_streamed(where, stream, model))
        if resident is not None and not plan.fits:
            plan = min(resident, plan, key=lambda one: one.gpu.total)
    if not plan.fits:
        raise ValueError(
            f"{given} is too little for {plan.parameters:,} parameters and {tokens} tokens: even {plan.setting} "
            f"{plan.change} ({plan.gpu.total:,} bytes in all); chunkft.plan_memory(model, gpu=...) looks at other "
            "ways, such as activation checkpointing"
        )
    setting = plan.setting
    if setting.weights == "stream":
        where = replace(where, update_on=setting.update_on)
        if stream is None:
            where = replace(where, weights="stream", resident_blocks=setting.resident_blocks)
    return setting.chunks, setting.residency, where


def _streamed(where: WeightChoice, stream: WeightStream | None, model: nn.Module) -> dict[str, Any]:
    """What ``plan_memory`` is to fix of weights that stream."""
    fixed: dict[str, Any] = {"weights": "stream", "offload_inputs": where.offload_inputs}
    if where.update_on != "auto":
        fixed["update_on"] = where.update_on
    if stream is not None:
        fixed |= {
            "resident_blocks": stream.resident_blocks,
            "offload_inputs": stream.lot is not None,
            "device": stream.device.type,
        }
        return fixed
    if where.resident_blocks:
        fixed["resident_blocks"] = where.resident_blocks
    return fixed | {"device": resolved_device(where.device).type}
