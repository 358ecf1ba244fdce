"""Data parallelism: replicas that see different batches and must take the same step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def check_process_group(process_group: Any) -> None:
    """Raise ValueError unless it is None or a process group that this process belongs to."""
    if process_group is None:
        return
    kind = getattr(dist, "ProcessGroup", None) if dist.is_available() else None
    if kind is None or not isinstance(process_group, kind):
        raise ValueError(
            f"process_group={process_group!r} is not allowed; needs a torch.distributed.ProcessGroup of this process, "
            "such as torch.distributed.group.WORLD after init_process_group(), or None"
        )


def world_size(process_group: Any) -> int:
    """Number of processes that take one step together."""
    return 1 if process_group is None else dist.get_world_size(process_group)


def check_same(what: str, process_group: Any, device: torch.device) -> None:
    """Raise RuntimeError on every process of the group if they do not all hold the same text.

    Without that, collectives of different shapes would meet: the processes would hang, or mix up their gradients.
    """
    digest = int.from_bytes(hashlib.blake2b(what.encode(), digest_size=7).digest())
    ends = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=process_group)
    highest, lowest = int(ends[0]), -int(ends[1])
    if highest != lowest:
        raise RuntimeError(
            "the processes of process_group hold different models, plans, schedules or seeds, so their gradients "
            "cannot be averaged; build the same optimizer on each, or use process_group=None"
        )


def average_gradients(leaves: Sequence[nn.Parameter], process_group: Any) -> None:
    """Average the gradients of the active leaves over a process group; does nothing without one.

    A wrapper such as ``DistributedDataParallel`` cannot do this: it looks for parameters once, at wrapping, and
    the leaves change. A leaf that got a gradient on some ranks only counts as zero on the others; one that got
    none anywhere stays without.
    """
    count = world_size(process_group)
    if count == 1 or not leaves:
        return
    device = leaves[0].device
    present = torch.tensor([leaf.grad is not None for leaf in leaves], dtype=torch.int32, device=device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX, group=process_group)
    for leaf, used in zip(leaves, present.tolist(), strict=True):
        if not used:
            continue
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
        dist.all_reduce(leaf.grad, group=process_group)
        leaf.grad.div_(count)
