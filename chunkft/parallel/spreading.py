"""Brings updated rows of replicas from their owners to all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from chunkft.autograd import Slice
from chunkft.parallel.owners import Bucket
from chunkft.parallel.ranks import Pending, Ranks

SPREADING = "spreading updated weights"


@torch.no_grad()
def spread(ranks: Ranks, buckets: Sequence[Bucket], weight_of: Callable[[Slice], Tensor]) -> None:
    """All-gather the rows of each bucket into the weights of all ranks.

    Args:
        ranks: that hold replicas.
        buckets: of what was updated; this rank's parts have their new values.
        weight_of: the memory of a slice.
    """
    under_way: list[tuple[Bucket, int, Pending]] = []
    for bucket in buckets:
        size = max(bucket.numels())
        sample = weight_of(bucket.leaves[0])
        message = torch.empty(size, dtype=sample.dtype, device=sample.device)
        mine = bucket.parts[ranks.rank]
        torch._foreach_copy_(_places(message, mine), [weight_of(piece) for piece in mine]) if mine else None
        under_way.append((bucket, size, ranks.spread(message, "weights", SPREADING)))
    for bucket, size, pending in under_way:
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
