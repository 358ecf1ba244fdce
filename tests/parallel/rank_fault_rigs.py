"""A small model that some ranks train, and what may happen to one of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import rigs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import chunkft

KINDS = ("replicas", "sharded")
VICTIM = 1  # the rank to which it happens
WHEN = 3  # the step in which it happens: the second of the second interval, so that it ends in a switch
STEPS = 6


def build(kind: str, group: Any, **options: Any) -> tuple[nn.Module, Any]:
    """A model, and its optimizer over the group; without a group of this process alone."""
    torch.manual_seed(0)
    width = options.pop("width", 12)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 10), nn.Tanh(), nn.Linear(10, 3))
    if kind == "sharded" and group is not None:
        mesh = DeviceMesh.from_group(group, "cpu")
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    options = {"lr": 1e-2, "chunks": 2, "interval": 2, "seed": 3, **options}
    if kind == "replicas":
        options["process_group"] = group
    return model, chunkft.ChunkAdamW(model, **options)


def batch(step: int, rank: int, part: int = 0) -> Tensor:
    """Rows that no other rank, step or part has."""
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1000 * step + 100 * part + rank))


def loss_of(model: nn.Module, step: int, rank: int, part: int = 0) -> Tensor:
    """Of a batch."""
    return model(batch(step, rank, part)).square().mean()


@dataclass(frozen=True)
class Trained:
    """What a rank ends with."""

    weights: str
    updates: int
    skipped: int
    active: int


def trained(model: nn.Module, optimizer: Any) -> Trained:
    """What this rank has now."""
    return Trained(rigs.digest(model), optimizer.updates, optimizer.skipped, optimizer.active)


def kill(*_: Any) -> None:
    """End this process as the kernel does when memory is out."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(*_: Any) -> None:
    """An error of the user's code."""
    raise ZeroDivisionError("something happened on this rank")


def interrupt(*_: Any) -> None:
    """Somebody pressed a key."""
    raise KeyboardInterrupt


def full(*_: Any) -> None:
    """State cannot be written."""
    raise OSError(28, "No space left on device")


def in_forward(what: Callable[..., None]) -> Callable[[nn.Module, Any], Any]:
    """It happens in the middle of the forward pass."""
    return lambda model, optimizer: model[2].register_forward_pre_hook(what)


def in_backward(what: Callable[..., None]) -> Callable[[nn.Module, Any], Any]:
    """It happens in the middle of the backward pass, when gradients are on their way."""
    return lambda model, optimizer: model[3].register_full_backward_hook(what)


def in_update(what: Callable[..., None]) -> Callable[[nn.Module, Any], Any]:
    """It happens in ``step()``, when some ranks have updated their slices."""
    return lambda model, optimizer: setattr(optimizer._residency, "step", what)


def in_switch(what: Callable[..., None]) -> Callable[[nn.Module, Any], Any]:
    """It happens when the state of a chunk is to rest."""
    return lambda model, optimizer: setattr(optimizer._residency, "stash", what)


def broken_schedule(index: int, chunks: int) -> int:
    """Fails at the second switch, on the victim alone."""
    if index == 2 and dist.get_rank() == VICTIM:
        fail()
    return index % chunks


FAULTS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "killed in forward": in_forward(kill),
    "killed in backward": in_backward(kill),
    "killed in step": in_update(kill),
    "raises in forward": in_forward(fail),
    "raises in backward": in_backward(fail),
    "interrupted in step": in_update(interrupt),
    "cannot rest state": in_switch(full),
}
OTHERS = ("raises in schedule", "raises in construction", "leaves", "goes elsewhere", "loads alone")


def train_until(group: Any, kind: str, fault: str) -> Any:
    """Train, and let the fault happen to the victim; what ends the run is raised, after the model was given back."""
    victim = dist.get_rank(group) == VICTIM
    options = {"schedule": broken_schedule} if fault == "raises in schedule" else {}
    if fault == "raises in construction" and victim:
        options["interval"] = 0
    optimizer: Any = None
    try:
        model, optimizer = build(kind, group, **options)
        for step in range(STEPS):
            if victim and step == WHEN and fault in FAULTS:
                FAULTS[fault](model, optimizer)
            if victim and step == WHEN and fault == "leaves":
                dist.destroy_process_group()
                raise StopIteration("no more batches")
            if victim and step == WHEN and fault == "goes elsewhere":
                dist.barrier(group)
            if victim and step == WHEN and fault == "loads alone":
                optimizer.load_state_dict(optimizer.state_dict())
            began = time.monotonic()
            loss_of(model, step, dist.get_rank(group)).backward()
            optimizer.step()
    except BaseException as error:
        error.add_note(
            f"waited {time.monotonic() - began:.1f} s" if optimizer is not None else "was not built"
        )
        if optimizer is not None:
            began = time.monotonic()
            optimizer.detach()
            assert time.monotonic() - began < 1.0, "detach() waited"
            assert not any(hasattr(module, "chunkft") for module in model.modules())
            error.add_note("detached")
        raise
    raise AssertionError("nothing happened")
