"""An optimizer that shares its chunk with other ranks: each owns a part of it, and updates that."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # that of torch.compiler imports the compiler at once

from chunkft.attach import Attachment
from chunkft.autograd import Hook, Slice, record, records
from chunkft.optim.agreement import agree_all, position
from chunkft.optim.backward import BackwardResidency
from chunkft.optim.divided import ShownGradients, sum_of_squares
from chunkft.optim.gradients import spoil
from chunkft.optim.meeting import DOING, Met, Phase, Report, meet
from chunkft.optim.outputs import tensors_in
from chunkft.parallel import (
    Bucket,
    Ownership,
    Ranks,
    Reducer,
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

Pairs = list[tuple[Slice, nn.Parameter]]
JOINING = (Phase.READ, Phase.CLOSE)  # where a rank takes part in rounds that others begin
AGAIN = (
    "a second backward pass came before step(), on this rank or another: update='backward' updates a slice as soon as "
    "its gradient is complete, so it cannot accumulate gradients; call step() after each backward pass, or use "
    "update='step'"
)


class Team:
    """The ranks that train one model together, each with the state of its own slices.

    Args:
        attachment: of the model.
        group: whose processes divide slices among them; building is a collective.
        sharded: the weights, if they are sharded; None: each rank has a replica of the model.

    Attributes:
        ranks: among whom slices are divided.
        copies: in hybrid sharding, the ranks that own the same slices; or None.
        pairs: the active slices of this rank, and the leaves that the optimizer updates.
    """

    def __init__(
        self, attachment: Attachment, group: dist.ProcessGroup, sharded: ShardedWeights | None = None
    ) -> None:
        self.ranks = Ranks(group)
        copies = None if sharded is None else sharded.replicate_group
        self.copies = None if copies is None else Ranks(copies)
        self.pairs: Pairs = []
        self._attachment = attachment
        self._sharded = sharded
        self._ownership: Ownership
        self._residency: Any = None
        self._optimizer: Callable[[], ChunkOptimizer | None] = lambda: None
        self._reducer: Reducer
        self._interval: tuple[int, int] | None = None  # in which ranks were compared
        self._shown = ShownGradients(self, attachment)
        self._queued: int | None = None  # the backward pass that runs
        self._spare: nn.Parameter | None = None  # see ``_stand_in``
        self._scaled: bool | None = None  # whether a GradScaler looks at gradients; None: not known yet

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
        """Work for this optimizer from now on."""
        self._optimizer = weakref.ref(optimizer)
        self._residency = optimizer._residency
        me = weakref.WeakMethod(self._begin_round)

        def begin_round() -> None:
            begin = me()
            if begin is not None:
                begin()

        arrived = self._arrived if optimizer.updates_in_backward else None
        self._reducer = Reducer(self.ranks, self.copies, begin_round, self._attachment.wiring, arrived)
        self._reducer.on_gradient = self._settle_cleared
        self._agree(optimizer)
        root = self._attachment.model
        if self._sharded is None:
            self.ranks.copy_from_first(
                [*root.parameters(), *root.buffers()], "giving all ranks the same weights"
            )

    def numbers(self) -> tuple[int, int]:
        """How many ranks update a part each, copies of hybrid shards counted as well, and which of them this is."""
        size, rank = self.ranks.size, self.ranks.rank
        return (
            (size, rank) if self.copies is None else (size * self.copies.size, self.copies.rank * size + rank)
        )

    def watch(self) -> None:
        """Know of every backward pass from now on; the first chunk is active."""
        self._attachment.hold([self._attachment.model.register_forward_hook(_Leave(self))])

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
        self.pairs = []
        for piece in own:
            leaf = before.get(piece)
            if leaf is None:
                leaf = nn.Parameter(self._home(piece))
            record(leaf, trained[piece.name])
            self.pairs.append((piece, leaf))
        self.follow()
        self._reducer.bind(self._buckets(chunk), leaves, self.pairs)
        self._shown.changed()
        return self.pairs

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
        self._shown.hide()
        reducer = getattr(self, "_reducer", None)  # none yet if the optimizer was refused
        if reducer is not None:
            reducer.release()
        self.pairs = []

    def drop(self) -> None:
        """Forget all gradients of this step."""
        optimizer = self._optimizer()
        self._reducer.drop(anew=optimizer is not None and optimizer.updates_in_backward)
        for _, leaf in self.pairs:
            leaf.grad = None
        if self._spare is not None:
            self._spare.grad = None
        self._shown.changed()
        self._shown.hide()

    def close(self, scale: Tensor | None, found_inf: Tensor | float | None) -> Tensor | None:
        """Bring what is missing to its owner, and sum up what a step has to know.

        Args:
            scale: of a GradScaler, or None.
            found_inf: what it found, or None.

        Returns:
            The norm of all gradients of all ranks, which is not finite if one of them is not, divided by ``scale``;
            None if there is none anywhere. The same on all ranks.

        Raises:
            RuntimeError: on all ranks, if their scales differ.
        """
        self._settle_cleared()
        met = self._meet(Phase.CLOSE, scale, found_inf)
        count, squares, spoiled, sum_of_scales, scales, of_scales, looked = met.values
        self._scaled = bool(scales or looked)
        self._reducer.close_step(every_pass=self._scaled)
        if not met.cleared_alike:
            raise RuntimeError(
                "the gradients of a step were cleared by zero_grad() on some ranks only, after others had them; clear "
                "them on all ranks or on none"
            )
        if scales and (scales != self._size or _differ(sum_of_scales, of_scales, scales)):
            raise RuntimeError(
                "the GradScalers of the ranks have different scales, so that gradients cannot be averaged; give them "
                "the same init_scale and step them together"
            )
        if not count:
            return None
        norm = torch.tensor(squares, dtype=torch.float64).sqrt() / (1.0 if scale is None else float(scale))
        return torch.full_like(norm, float("nan")) if spoiled else norm

    def close_backward(self) -> bool:
        """Bring what is missing to its owners, where updates are part of the backward pass.

        Returns:
            Whether some rank had a gradient in this step.
        """
        begun = self._meet(Phase.CLOSE).values[0]
        self._reducer.close_step(every_pass=True)
        return bool(begun)

    def close_update(self, dropped: bool, chunk: int) -> bool:
        """Slices were updated: let all ranks have them, and know whether some rank dropped gradients."""
        spoiled = self._meet(Phase.SPREAD, found_inf=float(dropped)).values[2]
        self.publish(chunk)
        return bool(spoiled)

    @property
    def passes(self) -> int:
        """Expected number of backward passes of a step, 0 if each sends; the order of sums follows from it."""
        return 0 if self._reducer.every_pass else self._reducer.expected

    @passes.setter
    def passes(self, count: int) -> None:
        self._scaled = None if count == 0 else False
        self._reducer.every_pass = count == 0
        self._reducer.expected = max(1, count)

    @property
    def device(self) -> torch.device:
        """Where tensors are that ranks send each other."""
        return self._attachment.device

    @property
    def has_gradients(self) -> bool:
        """Whether this rank has gradients, of its own slices or for other ranks."""
        return self._reducer.is_open or any(leaf.grad is not None for _, leaf in self.pairs)

    # --- in the backward pass

    @_disable_dynamo
    def left(self, output: Any) -> None:
        """Watch for the backward pass of an output."""
        if torch.is_grad_enabled():
            for tensor in tensors_in(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._on_backward)  # type: ignore[no-untyped-call]

    def _on_backward(self, gradient: Tensor) -> None:
        running = torch._C._current_graph_task_id()
        if self._queued != running:  # also if an error ended the pass before
            self._queued = running
            self._reducer.begin_backward()
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    @torch.no_grad()
    def _after_backward(self) -> None:
        self._queued = None
        optimizer = self._optimizer()
        if optimizer is None or not optimizer._ready:
            return
        self._shown.changed()
        if self._reducer.close_backward():
            self._tell_scaler()
        if not optimizer.updates_in_backward:
            self._shown.show()

    def _tell_scaler(self) -> None:
        """A GradScaler looks at this rank's gradients, and has to find what another rank has."""
        optimizer = self._optimizer()
        if self._scaled is False or optimizer is None or optimizer.updates_in_backward:
            return
        squares = self._meet(Phase.TELL).values[1]
        own = [leaf.grad for _, leaf in self.pairs if leaf.grad is not None]
        own = own or [self._stand_in(optimizer)]
        if not math.isfinite(squares):
            spoil(own[0], torch.ones(()))

    def _stand_in(self, optimizer: ChunkOptimizer) -> Tensor:
        """A gradient for a GradScaler to look at, of a parameter of nobody: it fails on a rank where it finds none."""
        if self._spare is None:
            self._spare = nn.Parameter(torch.zeros(1, device=self._attachment.device))
        members = optimizer.param_groups[0]["params"]
        if all(member is not self._spare for member in members):
            members.append(self._spare)
        self._spare.grad = torch.zeros_like(self._spare)
        return self._spare.grad

    def _settle_cleared(self) -> None:
        self._shown.settle_cleared(self._reducer)

    def gather_gradients(self) -> None:
        """Bring all gradients to their owners; a collective."""
        self._meet(Phase.READ)

    def _arrived(self, pairs: Sequence[tuple[Slice, nn.Parameter]], spoiled: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and isinstance(optimizer._residency, BackwardResidency):
            optimizer._residency.note_spoiled(spoiled)
            for piece, leaf in pairs:
                optimizer._residency.complete(piece, leaf)

    # --- inside

    @property
    def _all(self) -> list[Ranks]:
        return [self.ranks] if self.copies is None else [self.ranks, self.copies]

    @property
    def _size(self) -> int:
        return math.prod(ranks.size for ranks in self._all)

    def _begin_round(self) -> None:
        self._meet(Phase.REDUCE)

    def _meet(
        self, phase: Phase, scale: Tensor | None = None, found_inf: Tensor | float | None = None
    ) -> Met:
        """Come together with all ranks, and take part in rounds of gradients that others begin until all are here.

        Raises:
            RuntimeError: on all ranks, if they do not train alike, or if they are where they cannot come together.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("the optimizer is gone")
        reducer = self._reducer
        for ranks in self._all:
            ranks.during = self._where()
        while True:
            if reducer.under_way and phase in JOINING:  # an error ended the backward pass that began it
                self._reduce()
            met = meet(phase, self._report(optimizer, phase, scale, found_inf), self.ranks, self.copies)
            if not met.agreed or not met.alike:
                self._agree(optimizer)
                if not met.alike:
                    raise RuntimeError(f"the processes do not train alike in {self._where()}")
            if met.again:
                raise RuntimeError(AGAIN)
            if met.unscaled and (met.at[Phase.REDUCE] or met.unsent):
                raise RuntimeError(
                    "some rank had another backward pass after others had called GradScaler.unscale_(optimizer); with "
                    "unscale_ give all ranks the same number of backward passes a step"
                )
            here, reducing = met.at[phase], met.at[Phase.REDUCE]
            if here == self._size:
                if phase not in JOINING or not met.unsent:
                    return met
                self._reduce()
            elif reducing and reducing + met.at[Phase.READ] + met.at[Phase.CLOSE] == self._size:
                if phase == Phase.REDUCE:
                    return met
                self._reduce()
            else:
                raise RuntimeError(
                    f"the ranks are not at the same place in {self._where()}: {met}; all have to call step(), and to "
                    "look at gradients, equally often"
                )

    def _reduce(self) -> None:
        """Take part in a round that no backward pass of this rank begins."""
        self._reducer.flush()
        self._shown.changed()
        self._tell_scaler()

    def _report(
        self,
        optimizer: ChunkOptimizer,
        phase: Phase,
        scale: Tensor | None,
        found_inf: Tensor | float | None,
    ) -> Report:
        own = [leaf.grad for _, leaf in self.pairs if leaf.grad is not None]
        scaling = 0.0 if scale is None else float(scale)
        in_backward = optimizer.updates_in_backward
        values = torch.tensor(
            [
                float(self._residency.begun if in_backward else len(own)),
                0.0,
                0.0 if found_inf is None else float(found_inf),
                scaling,
                float(scale is not None),
                scaling * scaling,
                float(found_inf is not None),
            ],
            dtype=torch.float64,
        ).to(self._attachment.device)
        if phase in (Phase.CLOSE, Phase.TELL) and not in_backward:
            values[1] = sum_of_squares(own).to(values.device)
        if self.copies is not None:  # they have the same
            values[:3] /= self.copies.size
        unsent = self._reducer.is_open
        return Report(
            position=position(optimizer),
            agrees=self._interval == _interval(optimizer),
            unsent=unsent,
            again=in_backward and self._reducer.rounds > 0 and (unsent or phase == Phase.REDUCE),
            unscaled=phase == Phase.CLOSE and scale is None and found_inf is not None,
            cleared=self._reducer.cleared,
            values=values,
        )

    def everywhere(self, values: Tensor) -> Tensor:
        """Sums over all ranks."""
        values = self.ranks.total(values.to(self._attachment.device), DOING[Phase.READ])
        return values if self.copies is None else self.copies.total(values, DOING[Phase.READ])

    def _where(self) -> str:
        """For error messages."""
        optimizer = self._optimizer()
        if optimizer is None or not hasattr(optimizer, "_interval_index"):
            return "construction"
        return f"step {optimizer.updates + optimizer.skipped + 1}"

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

    def _agree(self, optimizer: ChunkOptimizer) -> None:
        """Raise the same RuntimeError on every rank if they do not train alike."""
        agree_all(optimizer, self._all, self._attachment.device)
        self._interval = _interval(optimizer)

    def traffic(self) -> dict[str, int]:
        """Bytes that this rank sent since the last call, by kind."""
        sent = self.ranks.traffic()
        if self.copies is not None:
            for kind, count in self.copies.traffic().items():
                sent[kind] += count
        return sent

    def forget_agreement(self) -> None:
        """Compare the ranks again, because what they train may have changed."""
        self._interval = None


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
            ours, asked = (dist.get_process_group_ranks(one) for one in (sharded.group, group))
            if ours != asked and sharded.replicate_group is None:
                raise ValueError(
                    f"process_group has the ranks {asked}, and fully_shard sharded the model over {ours}; leave "
                    "process_group out: it is that of the shards"
                )
        return Team(attachment, sharded.group, sharded)
    return None if group is None or group.size() == 1 else Team(attachment, group)


class _Leave(Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.target is not None:
            self.target.left(output)


def _interval(optimizer: ChunkOptimizer) -> tuple[int, int]:
    return optimizer._interval_index, id(optimizer.plan)


def _differ(total: float, of_squares: float, count: float) -> bool:
    mean = total / count
    return abs(of_squares / count - mean * mean) > 1e-9 * max(1.0, mean * mean)
