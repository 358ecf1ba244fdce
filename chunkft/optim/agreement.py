"""Whether all ranks train alike: found out before they wait for each other's gradients."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer


def agree(optimizer: ChunkOptimizer, group: dist.ProcessGroup, device: torch.device) -> None:
    """Compare hashes of all that the ranks of a group must have in common; they are of one size, so nobody hangs.

    Raises:
        RuntimeError: on every rank, if one of them differs; it names the rank and what is different.
    """
    aspects = _aspects(optimizer)
    own = torch.tensor([_hash(value) for value in aspects.values()], dtype=torch.int64, device=device)
    gathered = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(gathered, own, group=group)
    rows = [row.tolist() for row in gathered]
    for rank, row in enumerate(rows):
        different = [name for name, mine, first in zip(aspects, row, rows[0], strict=True) if mine != first]
        if different:
            raise RuntimeError(
                f"the processes of process_group do not train alike: rank {rank} of the group differs from rank 0 "
                f"in {', '.join(different)}; build the same optimizer on each, or leave process_group out"
            )


def _aspects(optimizer: ChunkOptimizer) -> dict[str, Any]:
    """What replicas must have in common for their leaves to be the same slices in every step."""
    schedule, rule = optimizer._schedule, optimizer._residency.rule
    return {
        "parameters": [
            (spec.name, spec.shape, str(optimizer._attachment.model.get_parameter(spec.name).dtype))
            for spec in optimizer._specs
        ],
        "plan": [optimizer.plan.always, [chunk.slices for chunk in optimizer.plan.chunks]],
        "schedule": schedule if isinstance(schedule, str) else getattr(schedule, "__qualname__", "callable"),
        "interval": optimizer.interval,
        "seed": optimizer._seed,
        "base": (optimizer._base_class.__qualname__, sorted(optimizer._modes.items())),
        "precision of the moments": (rule.first_moment, rule.state_bits),
        "position": (optimizer._interval_index, optimizer.interval_position, optimizer.active),
    }


def _hash(value: Any) -> int:
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
