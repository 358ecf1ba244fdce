"""``plan_memory``: how to train a model on a machine, from shapes alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from chunkft.optim.memory import DEFAULT_PAGE_BYTES
from chunkft.optim.planner.estimate import Model
from chunkft.optim.planner.result import MemoryPlan
from chunkft.optim.planner.search import Space, search
from chunkft.optim.planner.setting import Machine
from chunkft.optim.planner.sizes import parse_rate, parse_size
from chunkft.optim.planner.twin import Step, empty_model, language_model_step
from chunkft.plan import uncompiled

__all__ = ["CHOICES", "plan_memory"]

CHOICES: dict[str, tuple[Any, ...]] = {
    "residency": ("chunk", "stream"),
    "update": ("step", "backward"),
    "weights": ("resident", "stream"),
    "update_on": ("device", "host"),
    "state_bits": (32, 8),
    "checkpointing": (False, True),
    "offload_inputs": (False, True),
    "master": ("auto", "fp32", "residual", "stochastic", "none"),
}
# What one process alone can do, or what is not foreseen of several.
ALONE: dict[str, tuple[Any, ...]] = {
    "update": ("backward",),
    "weights": ("stream",),
    "update_on": ("host",),
    "offload_inputs": (True,),
}


def plan_memory(
    model_or_config: Any,
    *,
    gpu: int | str,
    host: int | str | None = None,
    disk: int | str | None = None,
    tokens: int = 1024,
    batch: int = 1,
    link: float | str = 25.0,
    tflops: float = 100.0,
    world: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    step: Step | None = None,
    base: type[torch.optim.Optimizer] = torch.optim.AdamW,
    base_options: dict[str, Any] | None = None,
    interval: int = 50,
    page_bytes: int = DEFAULT_PAGE_BYTES,
    always_active: str | Sequence[str] | None = None,
    slice_dim: int = 0,
    device: str = "cuda",
    **fixed: Any,
) -> MemoryPlan:
    """Choose how a model is trained on a machine: the fastest predicted step of all settings that fit.

    Nothing is measured and no memory is taken: a copy of the model with two blocks of each kind runs on PyTorch's meta
    device, every allocation is written down, and the peak of the deep model is put together from that. Steps that
    differ by no more than 5 % count as equally fast; of those the plan has the fewest extras, then the fewest chunks.

    Args:
        model_or_config: a module on any device, or a configuration of transformers for a causal language model.
        gpu: memory of the GPU, such as ``"24GiB"`` or an integer in bytes.
        host: host memory for state and weights; None: as much as is needed.
        disk: room for files of the state; None: no files.
        tokens: of each sequence in a forward pass.
        batch: sequences in a forward pass.
        link: GB/s between host and GPU, each way (``chunkft doctor`` measures it), or a string such as ``"25GB/s"``.
        tflops: 16-bit TFLOP/s that the products of a step reach.
        world: ranks with a GPU each on this machine, which train replicas and divide the chunk (``process_group=``);
            they share host memory and disk. Messages between them count, their time does not.
        dtype: of the weights, for a configuration.
        step: function of (model, batch, tokens) that returns the loss of a training step on the meta device; by default
            ``model(input_ids=..., labels=...).loss``.
        base: class of the optimizer.
        base_options: its keywords.
        interval: as for ``ChunkOptimizer``, and so are the next ones.
        page_bytes: likewise.
        always_active: likewise.
        slice_dim: likewise.
        device: ``"cuda"``; ``"cpu"`` for a model that is trained there, whose updates take memory of their own.
        **fixed: ``chunks``, ``residency``, ``update``, ``weights``, ``update_on``, ``resident_blocks``, ``state_bits``,
            ``checkpointing``, ``offload_inputs`` or ``master``: a value, or a list of those that may be chosen.

    Returns:
        The plan; where nothing fits its ``fits`` is False and ``change`` names the smallest change that would help.

    Raises:
        TypeError: if the model, or an argument, is of the wrong kind.
        ValueError: if an argument is not allowed, or the model cannot be run on the meta device.
    """
    for name, value in (("tokens", tokens), ("batch", batch), ("world", world), ("interval", interval)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not allowed; needs an integer >= 1")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device={device!r} is not known; allowed are 'cuda' and 'cpu'")
    if isinstance(tflops, bool) or not isinstance(tflops, int | float) or not 0 < tflops < float("inf"):
        raise ValueError(f"tflops={tflops!r} is not allowed; needs a finite number above 0")
    machine = Machine(
        gpu=parse_size(gpu, "gpu"),
        host=None if host is None else parse_size(host, "host"),
        disk=None if disk is None else parse_size(disk, "disk"),
        link=parse_rate(link, "link"),
        flops=tflops * 1e12,
        processes=world,
        device=device,
    )
    space, kept = _space(fixed, machine, base, world)
    if isinstance(model_or_config, DistributedDataParallel):
        model_or_config = model_or_config.module
    if isinstance(model_or_config, nn.Module):
        deep = uncompiled(model_or_config)
    else:
        deep = empty_model(model_or_config, dtype)

    def look(tokens: int) -> Model:
        return Model(
            deep,
            step or language_model_step,
            batch,
            tokens,
            base,
            {"lr": 1e-4, **(base_options or {})},
            page_bytes,
            always_active,
            slice_dim,
            device,
            world,
        )

    model = look(tokens)
    if "checkpointing" not in fixed and not model.has_checkpointing:
        space = replace(space, checkpointing=(None,))
    kept |= {"interval": interval} if interval != 50 else {}
    kept |= {"page_bytes": page_bytes} if page_bytes != DEFAULT_PAGE_BYTES else {}
    kept |= {"slice_dim": slice_dim} if slice_dim else {}
    kept |= {"always_active": always_active} if always_active is not None else {}
    return search(model, machine, space, interval=interval, fixed=tuple(kept.items()), shorter=look)


def _space(
    fixed: dict[str, Any], machine: Machine, base: type[torch.optim.Optimizer], world: int
) -> tuple[Space, dict[str, Any]]:
    """The values that may be chosen, and keywords that only pass through.

    Raises:
        TypeError: for a keyword that is not known.
        ValueError: for a value that is not allowed.
    """
    space = Space(in_files=(False, True) if machine.disk is not None else (False,))
    if base is not torch.optim.AdamW:
        space = replace(space, state_bits=(32,), update_on=("device",))
    if world > 1:
        space = replace(
            space, update=("step",), weights=("resident",)
        )  # weights that stream take one process
    kept: dict[str, Any] = {}
    for name, value in fixed.items():
        if name == "state_dir":
            if machine.disk is None:
                raise ValueError(f"state_dir={os.fspath(value)!r} needs disk=, the room for its files")
            kept[name] = value
            space = replace(space, in_files=(True,))
            continue
        if name not in CHOICES and name not in ("chunks", "resident_blocks"):
            allowed = ", ".join(["chunks", "resident_blocks", *CHOICES])
            raise TypeError(f"plan_memory() has no keyword {name!r}; it can fix {allowed}")
        values = tuple(value) if isinstance(value, list | tuple | range) else (value,)
        for each in values:
            _check(name, each)
        if world > 1 and any(each in ALONE.get(name, ()) for each in values):
            raise ValueError(
                f"{name}={value!r} cannot be planned with world={world}; allowed there: "
                f"{', '.join(repr(each) for each in CHOICES[name] if each not in ALONE[name])}"
            )
        space = replace(space, **{name: values})
    return space, kept


def _check(name: str, value: Any) -> None:
    if name in CHOICES:
        allowed = CHOICES[name]
        as_it_is = name == "checkpointing" and value is None
        if not as_it_is and (value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool)):
            raise ValueError(
                f"{name}={value!r} is not known; allowed are {', '.join(map(repr, CHOICES[name]))}"
            )
        return
    least = 1 if name == "chunks" else 0
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is not allowed; needs an integer >= {least}")
