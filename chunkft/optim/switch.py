"""The end of an interval: the state of one chunk rests, another chunk becomes active."""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chunkft import tracing
from chunkft.autograd import Slice
from chunkft.optim.backward import BackwardResidency

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer


UNBOUND = -1  # the generation of leaves while they are being bound


@dataclass
class Switch:
    """A switch that is under way: all that is needed to finish it, noted before anything is changed.

    Attributes:
        index: the interval that begins.
        position: optimizer steps done in it.
        changes: whether other slices, or other state, become active.
        stashed: whether the state of those that were active rests.
    """

    index: int
    position: int
    changes: bool
    stashed: bool = False


def advance_if_due(optimizer: ChunkOptimizer) -> None:
    """Begin the next interval if this one is over; fetch what comes next during the last step of one."""
    if optimizer.interval_position >= optimizer.interval:
        _advance(optimizer)
    # A callable schedule may fail for the next interval: that is for the switch to tell, not for us.
    if optimizer.interval_position == optimizer.interval - 1 and isinstance(optimizer._schedule, str):
        following = optimizer._chunk_of(optimizer._interval_index + 1)
        optimizer._residency.prefetch(optimizer._own_plan.chunks[following].slices)


def _advance(optimizer: ChunkOptimizer) -> None:
    before, after = optimizer.active, optimizer._chunk_of(optimizer._interval_index + 1)
    watch(optimizer)
    changes = after != before or not optimizer._keep_state
    with tracing.span("switch %d->%d", before, after):
        optimizer._switch = Switch(optimizer._interval_index + 1, 0, changes)
        _complete(optimizer, optimizer._switch)


def settle(optimizer: ChunkOptimizer) -> None:
    """Finish a switch, or a binding of leaves, that an interrupt or an error left half done.

    Raises:
        What stopped it, if that is still there; the next call tries again.
    """
    # Also in evaluation: what is made here must be fit for training. Other threads may evaluate during step().
    with optimizer._lock, torch.inference_mode(False), torch.no_grad():
        if at_work(optimizer):  # a signal handler interrupted it: it goes on afterwards
            return
        try:
            optimizer._work = sys._getframe()
            _settle(optimizer)
        finally:
            optimizer._work = None


def at_work(optimizer: ChunkOptimizer) -> bool:
    """Whether this thread is inside of a step, or of what ``settle`` finishes."""
    frame: FrameType | None = None if optimizer._work is None else sys._getframe(1)
    while frame is not None and frame is not optimizer._work:
        frame = frame.f_back
    return frame is not None


def _settle(optimizer: ChunkOptimizer) -> None:
    if optimizer._switch is not None:
        _complete(optimizer, optimizer._switch)
    elif optimizer.interval_position >= optimizer.interval:
        try:
            optimizer._chunk_of(optimizer._interval_index + 1)
        except Exception:
            return  # the schedule fails: step() will say so, and what is there can be saved
        _advance(optimizer)
    elif optimizer._generation == UNBOUND:
        bind(optimizer)
    if optimizer._switch_hook is not None:
        optimizer._switch_hook.remove()
        optimizer._switch_hook = None


def watch(optimizer: ChunkOptimizer) -> None:
    """Until the switch is done, a call of the model finishes it first: it must not compute with half of a chunk."""
    if optimizer._switch_hook is not None:
        return
    # The model must not hold the optimizer.
    reference = weakref.ref(optimizer)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(model: nn.Module, args: Any) -> None:
        owner = reference()
        if owner is not None and owner._ready:
            settle(owner)

    optimizer._switch_hook = optimizer._attachment.model.register_forward_pre_hook(before)


def _complete(optimizer: ChunkOptimizer, switch: Switch) -> None:
    """Every line may be the last one of a call, and is then done again by the next: none does harm twice."""
    if switch.changes and not switch.stashed:
        optimizer._residency.stash(optimizer._own_plan.always, optimizer._keep_state)
        optimizer.state.clear()
    switch.stashed = True
    optimizer._interval_index, optimizer.interval_position = switch.index, switch.position
    if switch.changes:
        activate(optimizer)
    optimizer._switch = None
    if optimizer._switch_hook is not None:
        optimizer._switch_hook.remove()
        optimizer._switch_hook = None


def activate(optimizer: ChunkOptimizer) -> None:
    """Make the chunk that the schedule names the active one."""
    chunk = optimizer.active
    team = optimizer._team
    optimizer._attachment.activate(own_slices(optimizer, chunk) if team is None else team.seen(chunk))
    bind(optimizer)


def own_slices(optimizer: ChunkOptimizer, chunk: int) -> list[Slice]:
    """The slices that this process updates while a chunk is active."""
    plan = optimizer._own_plan
    return [*plan.always, *plan.chunks[chunk].slices]


def bind(optimizer: ChunkOptimizer) -> None:
    """Point the groups at the leaves of the active slices and give them their state."""
    optimizer._generation = UNBOUND
    team = optimizer._team
    if team is None:
        pairs = optimizer._attachment.active()
    else:
        pairs = team.bind(optimizer.active, own_slices(optimizer, optimizer.active))
    for group in optimizer.param_groups:
        group["params"] = []
    for piece, leaf in pairs:
        optimizer.param_groups[optimizer._group_of[piece.name]]["params"].append(leaf)
    if isinstance(optimizer._residency, BackwardResidency):
        optimizer._residency.seed = optimizer._noise_seed()
        attachment = optimizer._attachment
        optimizer._residency.carrier = partial(attachment.wiring.carrier, attachment.model)
        optimizer._residency.weights = attachment.wiring
        optimizer._residency.is_fed = team is not None
    optimizer._residency.bind(pairs)
    optimizer._residency.show(optimizer.state)
    optimizer._generation = optimizer._attachment.wiring.generation
