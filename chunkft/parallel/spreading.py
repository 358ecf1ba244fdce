"""Brings updated rows of replicas from their owners to all ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from chunkft.autograd import Slice
from chunkft.parallel.owners import Bucket, padded
from chunkft.parallel.ranks import Pending, Ranks
from chunkft.parallel.reducer import AHEAD

SPREADING = "spreading updated weights"


@torch.no_grad()
def spread(ranks: Ranks, buckets: Sequence[Bucket], weight_of: Callable[[Slice], Tensor]) -> None:
    """All-gather the rows of each bucket into the weights of all ranks.

    Args:
        ranks: that hold replicas.
        buckets: of what was updated; this rank's parts have their new values.
        weight_of: the memory of a slice.
    """
    under_way: deque[tuple[Bucket, int, Pending]] = deque()
    for bucket in buckets:
        if len(under_way) > AHEAD:
            _take(ranks, *under_way.popleft(), weight_of)
        sample = weight_of(bucket.leaves[0])
        size = padded(max(bucket.numels()), sample.element_size())
        message = torch.empty(size, dtype=sample.dtype, device=sample.device)
        mine = bucket.parts[ranks.rank]
        if mine:
            torch._foreach_copy_(_places(message, mine), [weight_of(piece) for piece in mine])
        under_way.append((bucket, size, ranks.spread(message, "weights", SPREADING)))
    for entry in under_way:
        _take(ranks, *entry, weight_of)


def _take(
    ranks: Ranks, bucket: Bucket, size: int, pending: Pending, weight_of: Callable[[Slice], Tensor]
) -> None:
    """Put what came from other ranks into the weights."""
    everything = pending.wait()
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for rank, part in enumerate(bucket.parts):
        if rank != ranks.rank:
            targets += [weight_of(piece) for piece in part]
            sources += _places(everything[rank * size : (rank + 1) * size], part)
    if targets:
        torch._foreach_copy_(targets, sources)


def _places(flat: Tensor, pieces: Sequence[Slice]) -> list[Tensor]:
    places, offset = [], 0
    for piece in pieces:
        places.append(flat[offset : offset + piece.numel].view(piece.shape))
        offset += piece.numel
    return places
