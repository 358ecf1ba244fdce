"""The processes that torchrun starts together: which of them this one is, and how they become a group."""

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from chunkft.cli.errors import UserError
from chunkft.cli.models import resolve_device
from chunkft.cli.ranks import Ranks

__all__ = ["Launch", "device_of", "joined", "launched"]

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Trainer and Accelerate take these for an order to wrap the model in DistributedDataParallel
HIDDEN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """What the environment says of this process.

    Attributes:
        rank: number of the process among all.
        world: number of processes.
        local_rank: number of the process on its machine.
        local_world: number of processes on its machine.
        restarts: how often torchrun has started the group anew.
        may_restart: whether torchrun may start it anew.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    restarts: int = 0
    may_restart: bool = False


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The place of this process among those that torchrun started, or None if it was started by itself.

    Raises UserError if a variable of torchrun is no number, or the rank is not one of the group.
    """
    if any(name not in environment for name in NEEDED):
        return None

    def number(name: str, default: int) -> int:
        text = environment.get(name, str(default))
        if not text.isdigit():
            raise UserError(f"environment {name}={text!r} is not a whole number from 0, as torchrun sets it")
        return int(text)

    rank, world = number("RANK", 0), number("WORLD_SIZE", 1)
    if rank >= world:
        raise UserError(f"environment RANK={rank} is not below WORLD_SIZE={world}")
    return Launch(
        rank,
        world,
        number("LOCAL_RANK", rank),
        number("LOCAL_WORLD_SIZE", world),
        number("TORCHELASTIC_RESTART_COUNT", 0),
        number("TORCHELASTIC_MAX_RESTARTS", 0) > 0,
    )


def device_of(launch: Launch, name: str) -> torch.device:
    """The device of a process: the GPU with its local number, or the CPU; raises UserError if there is none.

    The GPU becomes the only one that this process sees, as with ``--device cuda:N``.
    """
    kind, colon, _ = name.partition(":")
    if colon:
        raise UserError(
            f"--device {name}: under torchrun each process takes the GPU of its local rank; allowed: auto, cpu, cuda"
        )
    count = torch.cuda.device_count()  # does not start the driver, which would not look for GPUs again
    if kind == "cpu" or (kind == "auto" and count == 0):
        return torch.device("cpu")
    if 0 < count <= launch.local_rank:
        raise UserError(
            f"local rank {launch.local_rank}: this machine shows {count} GPUs to {launch.local_world} processes; start"
            f" at most {count} a machine (--nproc-per-node), or use --device cpu"
        )
    return resolve_device(f"cuda:{launch.local_rank}" if count else name)


@contextmanager
def joined(launch: Launch, device: torch.device, timeout: int) -> Iterator[Ranks]:
    """The group of all processes that were launched, inside the block: nccl on GPUs, gloo on CPUs.

    Args:
        launch: which process this is.
        device: that it computes on.
        timeout: seconds that a process waits for another.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    limit = timedelta(seconds=timeout)
    outer, rank, world = next(rendezvous("env://", timeout=limit))
    # torchrun may keep one store for all attempts: an address of the last one must not be read in this one
    store = PrefixStore(f"chunkft/{launch.restarts}", outer)
    options: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options["device_id"] = device
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=world,
        timeout=limit,
        **options,
    )
    control = dist.new_group(backend="gloo", timeout=limit)
    hidden = {name: os.environ.pop(name) for name in HIDDEN if name in os.environ}
    ranks = Ranks(rank, world, control, PrefixStore("told", store))
    try:
        yield ranks
        # only where all went well: the others may be gone, and some backends wait for them
        dist.destroy_process_group()
        # Threads of gloo take the GIL to drop the tensors of their last collective, a moment after that is done; one
        # that is still to do so when the interpreter ends takes the process down. They are joined when nobody has the
        # groups any more, and an optimizer, which has them, is part of a cycle.
        ranks.leave()
        del control
        gc.collect()
    finally:
        os.environ.update(hidden)
