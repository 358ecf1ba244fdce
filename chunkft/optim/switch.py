"""The end of a step and of an interval: the state of one chunk rests, another chunk becomes active."""

from __future__ import annotations

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
    scale = getattr(optimizer, "grad_scale", None)  # None after scaler.unscale_(optimizer)
    check_backward_step(getattr(optimizer, "found_inf", None) if scale is None else scale)
    if not residency.begun and all(leaf.grad is None for _, leaf in optimizer._attachment.active()):
        return
    residency.step(optimizer._noise_seed())
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
    with tracing.span("switch %d->%d", before, after):
        changes = after != before or not optimizer._keep_state
        if changes:
            optimizer._residency.stash(optimizer.plan.always, optimizer._keep_state)
            optimizer.state.clear()
        optimizer._interval_index += 1
        optimizer.interval_position = 0
        if changes:
            activate(optimizer)


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
