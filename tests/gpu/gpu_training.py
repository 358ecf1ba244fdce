"""Small Llamas that train on a machine, with their state in every place that there is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_machine import Machine, rehearsing
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import chunkft
from bench import plain_llama


def places(machine: Machine) -> dict[str, dict[str, Any]]:
    """Options of an optimizer, by the place of its state."""
    page = machine.pick(1 << 20, 1 << 16)
    return {
        "paged": {"state_device": "paged"},
        "stream": {"residency": "stream", "page_bytes": page},
        "backward": {"residency": "stream", "page_bytes": page, "update": "backward"},
    }


PLACES = ("paged", "stream", "backward")


@contextmanager
def same_bits() -> Iterator[None]:
    """Attention by matrix products: the backward pass of flash attention adds in any order."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def model_of(machine: Machine, dtype: torch.dtype = torch.bfloat16, checkpointing: bool = False) -> nn.Module:
    return plain_llama.build(machine.pick("28M", "tiny"), machine.device, dtype, checkpointing)


def batch(machine: Machine, seed: int) -> Tensor:
    name, tokens = machine.pick(("28M", 64), ("tiny", 9))
    return plain_llama.batch_of(name, machine.device, 2, tokens, seed=seed)


def optimizer_of(
    model: nn.Module, plan: chunkft.ChunkPlan | None = None, **options: Any
) -> chunkft.ChunkOptimizer:
    chosen: dict[str, Any] = {"chunks": 4} if plan is None else {"chunks": None, "partition": plan}
    # a rehearsal has less time for a sweep
    return chunkft.ChunkAdamW(
        model, **{"lr": 1e-3, "interval": 1 if rehearsing() else 2, **chosen, **options}
    )


def train(
    machine: Machine, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, micro: int = 1
) -> None:
    """One optimizer step for each number, of `micro` batches."""
    with same_bits():
        for step in steps:
            for part in range(micro):
                (model(batch(machine, step * micro + part)) / micro).backward()
            optimizer.step()
            optimizer.zero_grad()


def trained(
    machine: Machine,
    steps: int,
    plan: chunkft.ChunkPlan | None = None,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
    micro: int = 1,
    **options: Any,
) -> tuple[nn.Module, chunkft.ChunkOptimizer]:
    """A model after some steps, and its optimizer."""
    model = model_of(machine, dtype, checkpointing)
    optimizer = optimizer_of(model, plan, **options)
    train(machine, model, optimizer, range(steps), micro)
    return model, optimizer


def assert_same_bits(model: nn.Module, other: nn.Module) -> None:
    """Every weight has the bits that it has in the other model, wherever that is."""
    different = [
        name
        for (name, weight), same in zip(model.named_parameters(), other.parameters(), strict=True)
        if not torch.equal(weight, same.to(weight.device))
    ]
    assert not different


def assert_moved(model: nn.Module, machine: Machine, dtype: torch.dtype) -> None:
    """Training changed every matrix: equal bits say nothing about weights that stayed as they were."""
    before = model_of(machine, dtype)
    same = [
        n
        for (n, p), q in zip(model.named_parameters(), before.parameters(), strict=True)
        if p.dim() > 1 and torch.equal(p, q)
    ]
    assert not same
