"""A plan that several ranks divide: what each owns, and what travels between them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from chunkft.autograd import Slice
from chunkft.parallel import Bucket, Ownership, make_buckets, padded
from chunkft.plan import ChunkPlan

__all__ = ["Divided"]

META = torch.device("meta")


class Divided:
    """A plan among ranks that train replicas.

    Args:
        plan: the chunks.
        world: number of ranks; 1 divides nothing.
        parameters: by name.
    """

    def __init__(self, plan: ChunkPlan, world: int, parameters: Mapping[str, Tensor]) -> None:
        self._plan, self._world, self._parameters = plan, world, parameters

    @functools.cached_property
    def plans(self) -> list[ChunkPlan]:
        """What each rank owns."""
        if self._world == 1:
            return [self._plan]
        always, *chunks = self._buckets
        ownership = Ownership(always, chunks, self._plan)
        return [ownership.of(ownership.plan, rank) for rank in range(self._world)]

    @functools.cached_property
    def travelling(self) -> int:
        """Bytes of gradients between ranks, at most, beside those that autograd made.

        One bucket is on its way, out and in, while the next one becomes a message; but what was sent is gone by then.
        """
        if self._world == 1:
            return 0
        always, *chunks = self._buckets
        return max(self._beside([*buckets, *always]) for buckets in chunks)

    @functools.cached_property
    def _buckets(self) -> list[list[Bucket]]:
        """In which gradients travel: what is always active, then each chunk."""

        def kind(piece: Slice) -> tuple[torch.dtype, torch.device]:
            return self._parameters[piece.name].dtype, META

        groups = [self._plan.always, *(chunk.slices for chunk in self._plan.chunks)]
        return [make_buckets(pieces, self._world, kind) for pieces in groups]

    def _beside(self, buckets: Sequence[Bucket]) -> int:
        sizes, sums = [], []
        for bucket in buckets:
            itemsize = self._parameters[bucket.leaves[0].name].element_size()
            header = padded(len(bucket.leaves), itemsize)
            parts = [padded(numel, itemsize) for numel in bucket.numels()]
            sizes.append((sum(parts) + 2 * self._world * header) * itemsize)
            sums.append(max(bucket.numels()) * max(4, itemsize))
        return sum(sorted(sizes)[-2:]) + max(sums)
