"""An optimizer that shares its chunk with other ranks: each owns a part of it, and updates that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from chunkft.attach import Attachment
from chunkft.autograd import Slice, record, records
from chunkft.optim.rounds import Pairs, Rounds
from chunkft.parallel import (
    Bucket,
    Ownership,
    Ranks,
    ShardedWeights,
    expand,
    is_sharded,
    make_buckets,
    owner_of,
    shard_specs,
    spread,
)
from chunkft.partitions import Partition, make_plan
from chunkft.plan import ChunkPlan, ParameterSpec

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer


class Team:
    """The ranks that train one model together, each with the state of its own slices.

    Args:
        attachment: of the model.
        group: whose processes divide slices among them; building is a collective.
        sharded: the weights, if they are sharded; None: each rank has a replica of the model.

    Attributes:
        ranks: among whom slices are divided.
        copies: in hybrid sharding, the ranks that own the same slices; or None.
    """

    def __init__(
        self, attachment: Attachment, group: dist.ProcessGroup, sharded: ShardedWeights | None = None
    ) -> None:
        self.ranks = Ranks(group)
        copies = None if sharded is None else sharded.replicate_group
        self.copies = None if copies is None else Ranks(copies)
        self._attachment = attachment
        self._sharded = sharded
        self._ownership: Ownership
        self._rounds: Rounds | None = None

    def divide(
        self,
        specs: list[ParameterSpec],
        chunks: int | None,
        partition: Partition,
        slice_dim: int,
        always_active: str | Sequence[str] | None,
    ) -> ChunkPlan:
        """The plan of all ranks, each of whose slices has one owner. The arguments are those of ``make_plan``.

        Raises:
            ValueError: as for ``make_plan``; of sharded weights also for slices that do not fit shards.
        """
        model, sharded, size = self._attachment.model, self._sharded, self.ranks.size
        owner: Callable[[Slice], int] | None = None
        if sharded is None:
            plan = make_plan(model, specs, chunks, partition, slice_dim, always_active)
        elif isinstance(partition, ChunkPlan):
            whole = [replace(spec, dims=(0,)) for spec in specs]
            plan = make_plan(model, whole, chunks, partition, slice_dim, always_active)
        else:
            if slice_dim != 0:
                raise ValueError(
                    f"slice_dim={slice_dim} is not possible with a model of fully_shard, whose shards are rows; use 0"
                )
            virtual = shard_specs(specs, sharded.rows, size)
            plan = make_plan(model, virtual, chunks, partition, slice_dim, always_active)
            plan = expand(plan, specs, sharded.rows)
        if sharded is not None:
            owner = partial(owner_of, rows=sharded.rows)
        divided = [make_buckets(chunk.slices, size, self._kind, owner) for chunk in plan.chunks]
        always = make_buckets(plan.always, size, self._kind, owner)
        self._ownership = Ownership(always, divided, plan)
        return self._ownership.plan

    def join(self, optimizer: ChunkOptimizer) -> None:
        """Work for this optimizer from now on; a collective.

        Raises:
            RuntimeError: on all ranks, if they do not train alike.
        """
        self._rounds = Rounds(optimizer, self._attachment, self.ranks, self.copies)
        root = self._attachment.model
        if self._sharded is None:
            self.ranks.copy_from_first(
                [*root.parameters(), *root.buffers()], "giving all ranks the same weights"
            )

    @property
    def rounds(self) -> Rounds:
        """How gradients come to their owners, once the team has joined an optimizer."""
        assert self._rounds is not None
        return self._rounds

    @property
    def pairs(self) -> Pairs:
        """The active slices of this rank, and the leaves that the optimizer updates."""
        return [] if self._rounds is None else self._rounds.pairs

    def numbers(self) -> tuple[int, int]:
        """How many ranks update a part each, copies of hybrid shards counted as well, and which of them this is."""
        size, rank = self.ranks.size, self.ranks.rank
        return (
            (size, rank) if self.copies is None else (size * self.copies.size, self.copies.rank * size + rank)
        )

    def owner_of(self, piece: Slice) -> int:
        """The rank that owns a slice."""
        return self._ownership.owner_of(piece)

    def own(self, plan: ChunkPlan) -> ChunkPlan:
        """What this rank owns of a plan; chunks of it may be empty."""
        return self._ownership.of(plan, self.ranks.rank)

    def seen(self, chunk: int) -> list[Slice]:
        """What autograd is to see as active slices, in the order of the stream."""
        buckets = self._buckets(chunk)
        return [piece for bucket in reversed(buckets) for piece in bucket.leaves]

    def bind(self, chunk: int, own: Sequence[Slice]) -> Pairs:
        """Make leaves of this rank's active slices, and bring gradients to them.

        Args:
            chunk: the active one.
            own: its slices that this rank owns, and what it owns of those that are always active.
        """
        leaves = dict(self._attachment.active())
        trained = {piece.name: records(leaf) for piece, leaf in leaves.items()}
        before = dict(self.pairs)
        pairs: Pairs = []
        for piece in own:
            leaf = before.get(piece)
            if leaf is None:
                leaf = nn.Parameter(self._home(piece))
            record(leaf, trained[piece.name])
            pairs.append((piece, leaf))
        self.rounds.bind(self._buckets(chunk), leaves, pairs)
        self.follow()
        return pairs

    def follow(self) -> None:
        """Let the leaves of this rank be where their weights are now."""
        for piece, leaf in self.pairs:
            home = self._home(piece)
            if leaf.data_ptr() != home.data_ptr() or leaf.device != home.device:
                grad, leaf.grad = leaf.grad, None
                leaf.data = home
                leaf.grad = None if grad is None else grad.to(home.device)

    def gather(self) -> None:
        """Take the values of leaves whose ``.data`` was replaced into their weights."""
        for piece, leaf in self.pairs:
            home = self._home(piece)
            if leaf.data_ptr() != home.data_ptr():
                home.copy_(leaf.detach())
                leaf.data = home

    def publish(self, chunk: int) -> None:
        """Owners have updated their slices: let all ranks have them."""
        if self._sharded is None:
            spread(self.ranks, self._buckets(chunk), self._home)
        else:
            self._sharded.written()

    def release(self) -> None:
        """No slice is active any more."""
        if self._rounds is not None:  # else the optimizer was refused before
            self._rounds.release()

    @property
    def device(self) -> torch.device:
        """Where tensors are that ranks send each other."""
        return self._attachment.device

    def _buckets(self, chunk: int) -> list[Bucket]:
        return [*self._ownership.chunks[chunk], *self._ownership.always]

    def _kind(self, piece: Slice) -> tuple[torch.dtype, torch.device]:
        """In which dtype, and from where, the gradient of a slice is sent."""
        if self._sharded is not None:
            return self._sharded.wire_dtype(piece.name), self._sharded.device
        parameter = self._attachment.model.get_parameter(piece.name)
        return parameter.dtype, parameter.device

    def _home(self, piece: Slice) -> Tensor:
        """The memory of a slice that this rank owns, or of any slice of a replica."""
        if self._sharded is not None:
            return self._sharded.own(piece)
        return piece.of(self._attachment.wiring.bound[piece.name].parameter.detach())

    def traffic(self) -> dict[str, int]:
        """Bytes that this rank sent since the last call, by kind."""
        sent = self.ranks.traffic()
        if self.copies is not None:
            for kind, count in self.copies.traffic().items():
                sent[kind] += count
        return sent


def build_team(attachment: Attachment, group: dist.ProcessGroup | None) -> Team | None:
    """The ranks that share the chunk with this process, or None if it trains by itself.

    Raises:
        ValueError: if the model is sharded, over other processes than those of ``group``, or in a way that cannot be
            trained.
    """
    if is_sharded(attachment.model):
        sharded = ShardedWeights(attachment.model, attachment.specs)
        attachment.reside(sharded)
        if group is not None:
            asked = dist.get_process_group_ranks(group)
            if asked != sharded.members:
                raise ValueError(
                    f"process_group has the ranks {asked}, and fully_shard sharded the model over {sharded.members}; "
                    "leave process_group out: it is that of the shards"
                )
        return Team(attachment, sharded.group, sharded)
    return None if group is None or group.size() == 1 else Team(attachment, group)
