"""How ranks come together: rounds in which gradients go to their owners, and the ends of steps."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # that of torch.compiler imports the compiler at once

from chunkft.attach import Attachment
from chunkft.autograd import Hook, Slice
from chunkft.optim.agreement import agree_all, position
from chunkft.optim.backward import BackwardResidency
from chunkft.optim.divided import ShownGradients, sum_of_squares
from chunkft.optim.gradients import spoil
from chunkft.optim.meeting import DOING, Met, Phase, Report, meet
from chunkft.optim.outputs import tensors_in
from chunkft.parallel import Bucket, Ranks, Reducer, ShardedWeights

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer

Pairs = list[tuple[Slice, nn.Parameter]]
JOINING = (Phase.READ, Phase.CLOSE)  # where a rank takes part in rounds that others begin
AGAIN = (
    "a second backward pass came before step(), on this rank or another: update='backward' updates a slice as soon as "
    "its gradient is complete, so it cannot accumulate gradients; call step() after each backward pass, or use "
    "update='step'"
)


class Rounds:
    """The gradients of a step, from the backward passes of all ranks to their owners.

    Before ranks send each other anything they meet (``meeting``): so all go on together, or all raise.

    Args:
        optimizer: of this rank.
        attachment: of the model.
        ranks: among whom slices are divided.
        copies: in hybrid sharding, the ranks that own the same slices; or None.

    Attributes:
        pairs: the active slices of this rank, and the leaves that the optimizer updates.
        shown: what ``weight.grad`` is meanwhile.
    """

    def __init__(
        self, optimizer: ChunkOptimizer, attachment: Attachment, ranks: Ranks, copies: Ranks | None
    ) -> None:
        self.ranks = ranks
        self.copies = copies
        self.pairs: Pairs = []
        self.shown = ShownGradients(self, attachment)
        self._attachment = attachment
        self._optimizer = weakref.ref(optimizer)
        self._residency: Any = optimizer._residency
        self._interval: tuple[int, int] | None = None  # in which ranks were compared
        self._queued: int | None = None  # the backward pass that runs
        self._spare: nn.Parameter | None = None  # see ``_stand_in``
        self._scaled: bool | None = None  # whether a GradScaler looks at gradients; None: not known yet
        me = weakref.WeakMethod(self._begin_round)

        def begin_round(whole: bool) -> bool:
            begin = me()
            return begin is not None and begin(whole)

        arrived = self._arrived if optimizer.updates_in_backward else None
        gathered = isinstance(attachment.wiring.residence, ShardedWeights)
        self._reducer = Reducer(ranks, copies, begin_round, attachment.wiring, gathered, arrived)
        self._reducer.on_gradient = self._gradients_come
        self._reducer.on_send = self._gradients_leave
        self._number = ranks.number()
        self._agree(optimizer)

    def watch(self) -> None:
        """Know of every backward pass from now on; the first chunk is active."""
        self._attachment.hold([self._attachment.model.register_forward_hook(_Leave(self))])

    def bind(self, buckets: Sequence[Bucket], leaves: Mapping[Slice, nn.Parameter], pairs: Pairs) -> None:
        """Bring gradients of the leaves that autograd sees to their owners; this rank owns ``pairs``."""
        self.pairs = pairs
        self._reducer.bind(buckets, leaves, pairs)
        self.shown.changed()

    def release(self) -> None:
        """No slice is active any more."""
        self.shown.hide()
        self._reducer.release()
        self.pairs = []

    def drop(self) -> None:
        """Forget all gradients of this step."""
        optimizer = self._optimizer()
        self._reducer.drop(anew=optimizer is not None and optimizer.updates_in_backward)
        for _, leaf in self.pairs:
            leaf.grad = None
        if self._spare is not None:
            self._spare.grad = None
        self.shown.changed()
        self.shown.hide()

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

    def dropped_by_some(self, dropped: bool) -> bool:
        """Whether some rank dropped gradients in a step whose updates were part of the backward pass."""
        return bool(self._meet(Phase.SPREAD, found_inf=float(dropped)).values[2])

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
    def has_gradients(self) -> bool:
        """Whether this rank has gradients, of its own slices or for other ranks."""
        return self._reducer.is_open or any(leaf.grad is not None for _, leaf in self.pairs)

    def forget_agreement(self) -> None:
        """Compare the ranks again, because what they train may have changed."""
        self._interval = None

    @_disable_dynamo
    def left(self, output: Any) -> None:
        """Watch for the backward pass of an output."""
        if torch.is_grad_enabled():
            for tensor in tensors_in(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._on_backward)  # type: ignore[no-untyped-call]

    def _on_backward(self, gradient: Tensor | None = None) -> None:
        running = torch._C._current_graph_task_id()
        if self._queued != running:  # also if an error ended the pass before
            self._queued = running
            self._reducer.begin_backward()
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    @torch.no_grad()
    def _after_backward(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._ready:
            self.shown.changed()
            if self._reducer.close_backward():
                self._tell_scaler()
            if not optimizer.updates_in_backward:
                self.shown.show()
        self._queued = None

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

    def _gradients_come(self) -> None:
        """The first gradient of a backward pass is about to come, which need not begin at an output of the model."""
        self._settle_cleared()
        if torch._C._current_graph_task_id() != -1:
            self._on_backward()

    def _gradients_leave(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._ready:
            optimizer._memory.observe_sending(optimizer)

    def _settle_cleared(self) -> None:
        self.shown.settle_cleared(self._reducer)

    def gather_gradients(self) -> None:
        """Bring all gradients to their owners; a collective."""
        self._meet(Phase.READ)

    def _arrived(self, pairs: Sequence[tuple[Slice, nn.Parameter]], spoiled: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and isinstance(optimizer._residency, BackwardResidency):
            if optimizer._team is not None:
                optimizer._team.follow()  # weights may have moved since the last step
            optimizer._residency.note_spoiled(spoiled)
            for piece, leaf in pairs:
                optimizer._residency.complete(piece, leaf)

    @property
    def _all(self) -> list[Ranks]:
        return [self.ranks] if self.copies is None else [self.ranks, self.copies]

    @property
    def _size(self) -> int:
        return math.prod(ranks.size for ranks in self._all)

    def _begin_round(self, whole: bool) -> bool:
        return not self._meet(Phase.REDUCE, partial=not whole).partial

    def _meet(
        self,
        phase: Phase,
        scale: Tensor | None = None,
        found_inf: Tensor | float | None = None,
        partial: bool = False,
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
            report = self._report(optimizer, phase, scale, found_inf, partial)
            met = meet(phase, report, self.ranks, self.copies, self._attachment.device)
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
        self.shown.changed()
        self._tell_scaler()

    def _report(
        self,
        optimizer: ChunkOptimizer,
        phase: Phase,
        scale: Tensor | None,
        found_inf: Tensor | float | None,
        partial: bool,
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
        )
        if phase in (Phase.CLOSE, Phase.TELL) and not in_backward:
            values[1] = sum_of_squares(own)
        if self.copies is not None:  # they have the same
            values[:3] /= self.copies.size
        unsent = self._reducer.is_open
        return Report(
            position=(self._number, *position(optimizer)),
            agrees=self._interval == _interval(optimizer),
            unsent=unsent,
            again=in_backward and self._reducer.rounds > 0 and (unsent or phase == Phase.REDUCE),
            unscaled=phase == Phase.CLOSE and scale is None and found_inf is not None,
            partial=partial,
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

    def _agree(self, optimizer: ChunkOptimizer) -> None:
        """Raise the same RuntimeError on every rank if they do not train alike."""
        agree_all(optimizer, self._all, self._attachment.device, self._number)
        self._interval = _interval(optimizer)


class _Leave(Hook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.target is not None:
            self.target.left(output)


def _interval(optimizer: ChunkOptimizer) -> tuple[int, int]:
    return optimizer._interval_index, id(optimizer.plan)


def _differ(total: float, of_squares: float, count: float) -> bool:
    mean = total / count
    return abs(of_squares / count - mean * mean) > 1e-9 * max(1.0, mean * mean)
