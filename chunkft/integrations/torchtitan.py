"""Chunk optimizers behind the interface of torchtitan's containers of optimizers."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from chunkft.optim import ChunkAdamW, ChunkOptimizer
from chunkft.parallel import is_sharded


class ChunkOptimizersContainer(torch.optim.Optimizer, Stateful):
    """One chunk optimizer for each part of a model, stepped together; stands in for torchtitan's OptimizersContainer.

    ``step()``, ``zero_grad()``, iteration, ``len()`` and hooks are those that torchtitan's trainer and its container of
    schedulers use. The state goes through ``torch.distributed.checkpoint`` as one packed entry for each part: that of
    chunks that were never active does not exist, so tensors could not be announced before they are loaded. Where ranks
    divide state (parts that ``fully_shard`` shards, or a ``process_group``) each has an entry of its own, and as many
    ranks load it.

    Args:
        model_parts: modules, on which ``fully_shard`` may have been called.
        optimizer_cls: ``ChunkAdamW``, or a callable that takes a module and ``optimizer_kwargs``.
        optimizer_kwargs: of ``optimizer_cls``.

    Raises:
        ValueError: if there are no parts, or a parameter is a DTensor otherwise than by ``fully_shard`` along its rows
            (tensor parallelism): a slice would not be a range of the local memory. The parts are left as they were.
    """

    def __init__(
        self,
        model_parts: Sequence[nn.Module],
        optimizer_cls: Callable[..., ChunkOptimizer] = ChunkAdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.model_parts = list(model_parts)
        if not self.model_parts:
            raise ValueError("model_parts must hold at least one module, got none")
        for part in self.model_parts:
            if is_sharded(part):
                continue
            for name, parameter in part.named_parameters():
                if isinstance(parameter, DTensor):
                    raise ValueError(
                        f"parameter {name!r} is a DTensor that fully_shard did not make: slices of parameters that are "
                        "sharded by tensor parallelism are not supported; allowed are parts of fully_shard, and "
                        "plain tensors, whose replicas name their process_group"
                    )
        parameters = [p for part in self.model_parts for p in part.parameters() if p.requires_grad]
        self.optimizers: list[ChunkOptimizer] = []
        try:
            for part in self.model_parts:
                self.optimizers.append(optimizer_cls(part, **(optimizer_kwargs or {})))
        except BaseException:
            for optimizer in self.optimizers:
                optimizer.detach()
            raise
        super().__init__(parameters, {})

    def __iter__(self) -> Iterator[ChunkOptimizer]:
        return iter(self.optimizers)

    def __len__(self) -> int:
        return len(self.optimizers)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every optimizer. Raises TypeError for a closure: parts share one backward pass."""
        if closure is not None:
            raise TypeError("ChunkOptimizersContainer.step() takes no closure")
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the active slices of every part."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of each part, packed: a dict from ``chunkft.N``, or ``chunkft.N.rankR``, to a buffer."""
        packed: dict[str, Any] = {}
        for name, optimizer in zip(self._names(), self.optimizers, strict=True):
            buffer = io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            packed[name] = buffer
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict()``.

        Raises:
            ValueError: if it has another number of parts, is of another rank or another kind; nothing is changed then.
        """
        names = self._names()
        if sorted(state_dict) != sorted(names):
            raise ValueError(f"state_dict has the entries {sorted(state_dict)}; allowed are {names}")
        states = []
        for name in names:
            buffer = state_dict[name]
            buffer.seek(0)
            states.append(torch.load(buffer, map_location="cpu", weights_only=True))
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def detach(self) -> None:
        """Give every part back as it was, trained."""
        for optimizer in self.optimizers:
            optimizer.detach()

    def _names(self) -> list[str]:
        """The entry of each part, under names that no other rank has if it is a part of the state only."""
        return [
            f"chunkft.{number}.rank{dist.get_rank()}" if optimizer.is_divided else f"chunkft.{number}"
            for number, optimizer in enumerate(self.optimizers)
        ]
