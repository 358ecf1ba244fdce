"""Sharded training in the ways that ``fully_shard``, torch and transformers offer, each beside the plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import rigs
import torch
from rigs import Case, Trained
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.parallel import DistributedDataParallel

import chunkft


def train(group: Any, case: Case, variant: str) -> Trained:
    """One rank of several, by the variant of this name."""
    return VARIANTS[variant](group, case)


def _shard(
    group: Any, case: Case, before: Callable[[nn.Module], None] | None = None, **options: Any
) -> Trained:
    model = case.model()
    if before is not None:
        before(model)
    model = rigs.sharded(model, group, **options)
    return rigs.run(case, model, chunkft.ChunkAdamW(model, **case.keywords()), group)


def _hybrid(group: Any, case: Case) -> Trained:
    """Two replicas of two shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return _shard(group, case, mesh=mesh)


def _compiling(train: Callable[[Any, Case], Trained]) -> Callable[[Any, Case], Trained]:
    """A run whose blocks are compiled, which is made sure of."""

    def compiled(group: Any, case: Case) -> Trained:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        try:
            trained = train(group, case)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
        finally:
            torch._dynamo.reset()
        return trained

    return compiled


def _compile_blocks(model: nn.Module) -> None:
    for block in rigs.blocks(model):
        block.compile(backend="aot_eager")


def _compiled_replica(group: Any, case: Case) -> Trained:
    model = case.model()
    _compile_blocks(model)
    return rigs.run(case, model, chunkft.ChunkAdamW(model, process_group=group, **case.keywords()), group)


def _checkpointing(reentrant: bool) -> Callable[[Any, Case], Trained]:
    def prepare(model: nn.Module) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        model.train()

    return lambda group, case: _shard(group, case, before=prepare)


def _in_ddp(group: Any, case: Case) -> Trained:
    """A team of replicas whose wrapper idles, as Trainer makes it."""
    model = case.model()
    optimizer = chunkft.ChunkAdamW(model, process_group=group, **case.keywords())
    return rigs.run(case, DistributedDataParallel(model, process_group=group), optimizer, group)


VARIANTS: dict[str, Callable[[Any, Case], Trained]] = {
    "plain": _shard,
    "kept gathered": lambda group, case: _shard(group, case, reshard_after_forward=False),
    "gathered in part": lambda group, case: _shard(group, case, reshard_after_forward=2),
    "offloaded": lambda group, case: _shard(group, case, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "hybrid": _hybrid,
    "compiled": _compiling(lambda group, case: _shard(group, case, before=_compile_blocks)),
    "checkpointing": _checkpointing(False),
    "reentrant checkpointing": _checkpointing(True),
    "replicas": rigs.train_replica,
    "compiled replicas": _compiling(_compiled_replica),
    "replicas in a wrapper": _in_ddp,
}
