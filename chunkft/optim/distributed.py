"""Data parallelism: replicas that see different batches and must take the same step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn


def average_gradients(leaves: Sequence[nn.Parameter]) -> None:
    """Average the gradients of the active leaves over the default process group; does nothing without one.

    A wrapper such as ``DistributedDataParallel`` cannot do this: it looks for parameters once, at wrapping, and
    the leaves change. A leaf that got a gradient on some ranks only counts as zero on the others; one that got
    none anywhere stays without.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1 or not leaves:
        return
    device = leaves[0].device
    present = torch.tensor([leaf.grad is not None for leaf in leaves], dtype=torch.int32, device=device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    for leaf, used in zip(leaves, present.tolist(), strict=True):
        if not used:
            continue
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
        dist.all_reduce(leaf.grad)
        leaf.grad.div_(dist.get_world_size())
