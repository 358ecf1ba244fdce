"""Chunk optimizers in Accelerate: built once FSDP2 has sharded the model, saved by all ranks together."""

from __future__ import annotations

import contextlib
import inspect
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from chunkft.attach import attach
from chunkft.optim import ChunkAdamW, ChunkOptimizer, load_checkpoint, save_checkpoint
from chunkft.parallel import is_sharded

__all__ = ["PreparedChunkAdamW", "load_state", "save_state", "shards_later", "unwrap_optimizer"]

_IN_GROUPS = ("lr", "betas", "eps", "weight_decay")
_NOTHING: dict[str, Any] = {"state": {}, "param_groups": []}


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, or the optimizer itself."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def shards_later(model: nn.Module) -> bool:
    """Whether ``accelerator.prepare()`` is going to shard a model by FSDP2.

    Raises:
        ValueError: if it is going to do what chunks cannot be trained with: FSDP1, DeepSpeed, Megatron-LM.
    """
    if not AcceleratorState._shared_state:  # no Accelerator was made: asking it would make its state
        return False
    state = AcceleratorState()
    kind = state.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate's distributed_type={kind.value} puts an optimizer of its own in the place of this one; leave "
            "its plugin out, or use FullyShardedDataParallelPlugin(fsdp_version=2)"
        )
    if kind == DistributedType.FSDP and not state.is_fsdp2:
        raise ValueError(
            "accelerate's fsdp_version=1 flattens parameters, so that there are no rows to train; use "
            "FullyShardedDataParallelPlugin(fsdp_version=2), in TrainingArguments fsdp_config={'version': 2}, without "
            "use_orig_params and sync_module_states"
        )
    return bool(kind == DistributedType.FSDP) and not is_sharded(model)


class PreparedChunkAdamW(ChunkAdamW):
    """A ``ChunkAdamW`` for ``accelerator.prepare(model, optimizer)``, which may shard the model by FSDP2.

    accelerate wants the optimizer before it shards the model, and gives it the shards afterwards. Until then this one
    holds parameters and nothing else; then it is built of the shards. Where nothing is going to be sharded it is a
    ``ChunkAdamW`` from the start.

    Args:
        model: a module, which need not be attached.
        groups: parameter groups of the module, or None: one of all that require grad.
        **keywords: of ``ChunkAdamW``.

    Raises:
        TypeError, ValueError: as ``ChunkAdamW`` and ``shards_later``; for a model that will be sharded, in ``prepare``.
    """

    _awaited: tuple[nn.Module, dict[str, Any]] | None = None

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]] | None = None, **keywords: Any) -> None:
        if not shards_later(model):
            self._build(model, groups, keywords)
            return
        self._ready = False
        self._awaited = model, keywords
        known = inspect.signature(ChunkAdamW).parameters
        defaults = {name: keywords.get(name, known[name].default) for name in _IN_GROUPS}
        if groups is None:
            groups = [{"params": [weight for weight in model.parameters() if weight.requires_grad]}]
        torch.optim.Optimizer.__init__(self, groups, defaults)
        self.param_groups = [_AwaitedGroup(group, self) for group in self.param_groups]

    def handed(self) -> None:
        """Build the optimizer, if all parameters of its groups are shards by now."""
        if self._awaited is None or not all(
            isinstance(weight, DTensor) for group in self.param_groups for weight in group["params"]
        ):
            return
        model, keywords = self._awaited
        groups = [dict(group) for group in self.param_groups]
        hooks = {name: held for name, held in self.__dict__.items() if name.startswith("_optimizer_")}
        self._awaited = None
        self._build(model, groups, keywords)
        self.__dict__.update(hooks)  # a new optimizer has none, and schedulers have theirs in this one

    def _build(self, model: nn.Module, groups: list[dict[str, Any]] | None, keywords: dict[str, Any]) -> None:
        if groups is None:
            super().__init__(model, **keywords)
            return
        known = "_chunkft" in model.__dict__
        attachment = attach(model)
        try:
            super().__init__(groups, **keywords)
        except BaseException:
            if not known:
                attachment.detach()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As that of ``ChunkAdamW``."""
        if self._awaited is None:
            super().zero_grad(set_to_none)
        else:
            torch.optim.Optimizer.zero_grad(self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As that of ``ChunkAdamW``; before there are shards, nothing."""
        return super().state_dict() if self._awaited is None else dict(_NOTHING)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As that of ``ChunkAdamW``; accelerate loads what ``state_dict`` gave while it prepares.

        Raises:
            RuntimeError: if there is something to load, and no shard yet.
        """
        if self._awaited is None:
            super().load_state_dict(state_dict)
        elif state_dict != _NOTHING:
            raise RuntimeError(_too_early("load_state_dict"))

    def __getattr__(self, name: str) -> Any:
        awaited = self._awaited is not None and hasattr(ChunkAdamW, name)
        if awaited or (self._awaited is not None and name.startswith("_")):
            raise AttributeError(_too_early(name))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class _AwaitedGroup(dict[str, Any]):
    """A parameter group that tells its optimizer when it got other parameters."""

    def __init__(self, group: dict[str, Any], optimizer: PreparedChunkAdamW) -> None:
        super().__init__(group)
        self._optimizer = weakref.ref(optimizer)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        optimizer = self._optimizer()
        if key == "params" and optimizer is not None:
            optimizer.handed()


def _too_early(name: str) -> str:
    return (
        f"{name} of an optimizer whose model is not sharded yet; call accelerator.prepare(model, optimizer) with both "
        "before"
    )


def save_state(accelerator: Accelerator, output_dir: str | os.PathLike[str], **keywords: Any) -> str:
    """``accelerator.save_state()``, with the state of chunk optimizers that many ranks hold parts of; a collective.

    accelerate saves optimizers of FSDP2 by ``torch.distributed.checkpoint.state_dict``, which knows whole parameters
    only. What it saves beside them is as always.

    Args:
        accelerator: that prepared them.
        output_dir: a directory, the same for all ranks.
        **keywords: of ``accelerator.save_state``.

    Returns:
        The directory.

    Raises:
        OSError: as ``chunkft.save_checkpoint``.
    """
    with _without_parts(accelerator) as optimizers:
        place = str(accelerator.save_state(os.fspath(output_dir), **keywords) or output_dir)
    accelerator.wait_for_everyone()
    for number, optimizer in enumerate(optimizers):
        save_checkpoint(optimizer, _file(place, number))
    accelerator.wait_for_everyone()
    return place


def load_state(accelerator: Accelerator, input_dir: str | os.PathLike[str], **keywords: Any) -> None:
    """``accelerator.load_state()`` for what ``save_state`` saved; a collective.

    Raises:
        FileNotFoundError, ValueError: as ``chunkft.load_checkpoint``.
    """
    with _without_parts(accelerator) as optimizers:
        accelerator.load_state(os.fspath(input_dir), **keywords)
    for number, optimizer in enumerate(optimizers):
        load_checkpoint(optimizer, _file(input_dir, number))


def _file(place: str | os.PathLike[str], number: int) -> Path:
    return Path(place) / ("chunkft.safetensors" if number == 0 else f"chunkft_{number}.safetensors")


@contextlib.contextmanager
def _without_parts(accelerator: Accelerator) -> Iterator[list[ChunkOptimizer]]:
    """The chunk optimizers whose state is divided among ranks, while accelerate does not know of them."""
    known = accelerator._optimizers
    inner = [unwrap_optimizer(wrapped) for wrapped in known]
    divided = [isinstance(one, ChunkOptimizer) and one.is_divided for one in inner]
    accelerator._optimizers = [wrapped for wrapped, ours in zip(known, divided, strict=True) if not ours]
    try:
        yield [one for one, ours in zip(inner, divided, strict=True) if ours]
    finally:
        accelerator._optimizers = known
