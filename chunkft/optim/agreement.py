"""Whether all ranks train alike: found out before they wait for each other's gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from chunkft.parallel import Ranks

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer

COMPARING = "comparing how ranks train"


def agree(optimizer: ChunkOptimizer, group: dist.ProcessGroup, device: torch.device) -> None:
    """Compare hashes of all that the ranks of a group must have in common; they are of one size, so nobody hangs.

    Raises:
        RuntimeError: on every rank, if one of them differs; it names the rank and what is different.
    """

    def rows(own: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(gathered, own, group=group)
        return gathered

    refuse(difference(optimizer, rows, device))


def agree_all(optimizer: ChunkOptimizer, among: Sequence[Ranks], device: torch.device, number: int) -> None:
    """The same among the ranks of a team: of one group, or of the rows and columns of a mesh."""
    found = ""
    for ranks in among:
        found = (
            difference(
                optimizer,
                partial(ranks.announced, device=device, doing=COMPARING),
                torch.device("cpu"),
                number,
            )
            or found
        )
    if len(among) > 1:  # some see a difference that others do not
        flag = torch.tensor([float(bool(found))], dtype=torch.float64)
        for ranks in among:
            flag = torch.tensor(ranks.announce(flag, device, COMPARING), dtype=torch.float64)
        found = found or ("others differ" if flag.item() else "")
    refuse(found)


def difference(
    optimizer: ChunkOptimizer, rows: Callable[[Tensor], list[Tensor]], device: torch.device, number: int = 0
) -> str:
    """Which rank differs first, and in what; empty if none does.

    Args:
        optimizer: of this rank.
        rows: gives the tensors of all ranks for that of this one.
        device: of the tensor, whose hashes are int64.
        number: which of the optimizers of the group this is, in the order in which they were built.
    """
    aspects = {"which optimizer of the process it is": number, **_aspects(optimizer)}
    own = torch.tensor([_hash(value) for value in aspects.values()], dtype=torch.int64, device=device)
    found = [row.tolist() for row in rows(own)]
    for rank, row in enumerate(found):
        different = [name for name, mine, first in zip(aspects, row, found[0], strict=True) if mine != first]
        if different:
            return f"rank {rank} of the group differs from rank 0 in {', '.join(different)}"
    return ""


def refuse(found: str) -> None:
    """Raise RuntimeError for a difference."""
    if found:
        raise RuntimeError(
            f"the processes of process_group do not train alike: {found}; build the same optimizer on each, or leave "
            "process_group out"
        )


def position(optimizer: ChunkOptimizer) -> tuple[int, ...]:
    """Where a run is in its schedule."""
    return (
        optimizer._interval_index,
        optimizer.interval_position,
        optimizer.active,
        optimizer.interval,
        optimizer.updates,
        optimizer.skipped,
    )


def _options(optimizer: ChunkOptimizer) -> list[list[tuple[str, Any]]]:
    """Hyper-parameters; tensors as their values."""
    return [
        [
            (key, _comparable(value))
            for key, value in sorted(group.items())
            if key not in ("params", "param_names")
        ]
        for group in optimizer.param_groups
    ]


def _comparable(value: Any) -> Any:
    """What has the same ``repr`` on all ranks: others have objects at other addresses, and sets in another order."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_comparable(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(_comparable(one)) for one in value)
    if isinstance(value, dict):
        return sorted((repr(key), repr(_comparable(one))) for key, one in value.items())
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _aspects(optimizer: ChunkOptimizer) -> dict[str, Any]:
    """What replicas must have in common for their leaves to be the same slices in every step."""
    schedule, rule = optimizer._schedule, optimizer._residency.rule
    return {
        "parameters": [
            (spec.name, spec.shape, str(optimizer._attachment.parameter(spec.name).dtype))
            for spec in optimizer._specs
        ],
        "what is frozen": sorted(optimizer._attachment._untrained),
        "plan": [optimizer.plan.always, [chunk.slices for chunk in optimizer.plan.chunks]],
        "schedule": schedule if isinstance(schedule, str) else getattr(schedule, "__qualname__", "callable"),
        "interval": optimizer.interval,
        "seed": optimizer._seed,
        "base": (optimizer._base_class.__qualname__, sorted(optimizer._modes.items())),
        "precision of the moments": (rule.first_moment, rule.state_bits),
        "max_grad_norm": optimizer.max_grad_norm,
        "learning rate and other options": _options(optimizer),
        "position": position(optimizer),
    }


def _hash(value: Any) -> int:
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
