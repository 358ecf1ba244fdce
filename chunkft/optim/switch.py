"""The end of a step and of an interval: the state of one chunk rests, another chunk becomes active."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import nn

from chunkft import tracing
from chunkft.autograd import Slice
from chunkft.optim.arguments import check_backward_step
from chunkft.optim.backward import BackwardResidency

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer


def close_backward(optimizer: ChunkOptimizer, residency: BackwardResidency) -> None:
    """``step()`` for slices that were updated in the backward pass."""
    check_backward_step(getattr(optimizer, "grad_scale", None))
    if not residency.begun and all(leaf.grad is None for _, leaf in optimizer._attachment.active()):
        optimizer._pass_unreached()
        return
    optimizer._attachment.called = False
    residency.step(optimizer._noise_seed())
    optimizer._attachment.gather()
    if residency.dropped:
        optimizer.skipped += 1
    else:
        optimizer._count_update()
    residency.seed = optimizer._noise_seed()
    advance_if_due(optimizer)


def advance_if_due(optimizer: ChunkOptimizer) -> None:
    """Begin the next interval if this one is over; fetch what comes next during the last step of one."""
    if optimizer.interval_position >= optimizer.interval:
        _advance(optimizer)
    # A callable schedule may fail for the next interval: that is for the switch to tell, not for us.
    if optimizer.interval_position == optimizer.interval - 1 and isinstance(optimizer._schedule, str):
        following = optimizer._chunk_of(optimizer._interval_index + 1)
        optimizer._residency.prefetch(optimizer.plan.chunks[following].slices)


def _advance(optimizer: ChunkOptimizer) -> None:
    before, after = optimizer.active, optimizer._chunk_of(optimizer._interval_index + 1)
    if after == before and optimizer._keep_state:
        optimizer._interval_index += 1
        optimizer.interval_position = 0
        return
    optimizer._switch_to = optimizer._interval_index + 1
    optimizer._attachment.unfinished = weakref.WeakMethod(optimizer._settle)
    with tracing.span("switch %d->%d", before, after):
        finish_switch(optimizer)


def finish_switch(optimizer: ChunkOptimizer) -> None:
    """Do what is left of a switch that has begun, or nothing.

    An interrupt or an error may end a switch at any point. It is finished before anything else is done with the model
    or the optimizer: every part of it may be repeated.
    """
    if optimizer._switch_to is None:
        return
    if optimizer._interval_index != optimizer._switch_to:
        optimizer._residency.stash(optimizer.plan.always, optimizer._keep_state)
        optimizer.state.clear()
        optimizer.interval_position = 0
        optimizer._interval_index = optimizer._switch_to
    activate(optimizer)
    optimizer._switch_to = None
    optimizer._attachment.unfinished = None


def activate(optimizer: ChunkOptimizer) -> None:
    """Make the chunk that the schedule names the active one."""
    chunk = optimizer.plan.chunks[optimizer.active]
    bind(optimizer, optimizer._attachment.activate([*optimizer.plan.always, *chunk.slices]))


def bind(optimizer: ChunkOptimizer, pairs: list[tuple[Slice, nn.Parameter]]) -> None:
    """Point the groups at these leaves and give them their state."""
    optimizer._generation = optimizer._attachment.generation
    for group in optimizer.param_groups:
        group["params"] = []
    for piece, leaf in pairs:
        optimizer.param_groups[optimizer._group_of[piece.name]]["params"].append(leaf)
    if isinstance(optimizer._residency, BackwardResidency):
        optimizer._residency.seed = optimizer._noise_seed()
        optimizer._residency.carrier = optimizer._attachment.carrier
    optimizer._residency.bind(pairs)
    optimizer._residency.show(optimizer.state)
