"""One step: gradients are averaged, checked and clipped, then used up for an update, or counted as what they are."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch.nn.utils import clip_grads_with_norm_

from chunkft.optim.arguments import check_backward_step
from chunkft.optim.backward import BackwardResidency
from chunkft.optim.gradients import all_finite, clip, unscale
from chunkft.optim.switch import advance_if_due, watch

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer
    from chunkft.optim.team import Team


def take(optimizer: ChunkOptimizer) -> None:
    """Update the active slices from their gradients and consume these; begin the next interval if this one is over."""
    if isinstance(optimizer._residency, BackwardResidency):
        _close_backward(optimizer, optimizer._residency)
        return
    if optimizer._team is not None:
        _take_together(optimizer, optimizer._team)
        return
    attachment = optimizer._attachment
    leaves = [leaf for _, leaf in attachment.active()]
    optimizer._memory.observe_gradients(optimizer)
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    unscale(grads, getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))
    optimizer._replicas.finish(leaves)
    leaves = [leaf for leaf in leaves if leaf.grad is not None]
    if not leaves:
        _pass_unreached(optimizer)
        return
    if all_finite([leaf.grad for leaf in leaves if leaf.grad is not None]):
        if optimizer.max_grad_norm is not None:
            optimizer.grad_norm = clip(leaves, optimizer.max_grad_norm)
        attachment.wiring.updating()
        optimizer._residency.step(optimizer._noise_seed())
        _gather(optimizer)
        attachment.wiring.publish()
        optimizer._residency.show(optimizer.state)
        _count_update(optimizer)
    else:
        optimizer.skipped += 1
    for leaf in leaves:
        leaf.grad = None
    attachment.wiring.hide_gradients()
    attachment.called = False
    advance_if_due(optimizer)


def _take_together(optimizer: ChunkOptimizer, team: Team) -> None:
    """The same by many ranks: each updates what it owns, from gradients that the others sent."""
    scale = getattr(optimizer, "grad_scale", None)
    norm = team.rounds.close(scale, getattr(optimizer, "found_inf", None))
    optimizer._memory.observe_gradients(optimizer)
    if norm is None:
        _pass_unreached(optimizer)
        return
    leaves = [leaf for _, leaf in team.pairs if leaf.grad is not None]
    unscale([leaf.grad for leaf in leaves if leaf.grad is not None], scale)
    if bool(torch.isfinite(norm)):
        if optimizer.max_grad_norm is not None:
            optimizer.grad_norm = norm.float()
            clip_grads_with_norm_(leaves, optimizer.max_grad_norm, norm)
        optimizer._residency.step(optimizer._noise_seed())
        _gather(optimizer)
        team.publish(optimizer.active)
        optimizer._residency.show(optimizer.state)
        _count_update(optimizer)
    else:
        optimizer.skipped += 1
    team.rounds.drop()
    optimizer._attachment.called = False
    advance_if_due(optimizer)


def _close_backward(optimizer: ChunkOptimizer, residency: BackwardResidency) -> None:
    """The same for slices that were updated in the backward pass."""
    scale = getattr(optimizer, "grad_scale", None)  # None after scaler.unscale_(optimizer)
    check_backward_step(getattr(optimizer, "found_inf", None) if scale is None else scale)
    team = optimizer._team
    if team is not None and not team.rounds.close_backward():
        _pass_unreached(optimizer)
        return
    if (
        team is None
        and not residency.begun
        and all(leaf.grad is None for _, leaf in optimizer._attachment.active())
    ):
        _pass_unreached(optimizer)
        return
    optimizer._attachment.called = False
    residency.step(optimizer._noise_seed())
    _gather(optimizer)
    dropped = residency.dropped
    if team is None:
        optimizer._attachment.wiring.publish()
    else:
        dropped = team.rounds.dropped_by_some(dropped)
        team.publish(optimizer.active)
    if dropped:
        optimizer.skipped += 1
    else:
        _count_update(optimizer)
    residency.seed = optimizer._noise_seed()
    advance_if_due(optimizer)


def _pass_unreached(optimizer: ChunkOptimizer) -> None:
    """A step whose loss did not depend on the active slices: nothing changes, and the interval goes on.

    A step before which the model was not called is no step.
    """
    if not optimizer._attachment.called:
        return
    optimizer._attachment.called = False
    if not optimizer._warned_unreached:
        optimizer._warned_unreached = True
        warnings.warn(
            f"no parameter of chunk {optimizer.active} had a gradient in this step: the loss did not depend on them, "
            "or they were cleared or frozen. As in dense training they stay as they are, and the interval goes on "
            "(said once)",
            stacklevel=5,
        )
    if optimizer.interval_position + 1 >= optimizer.interval:
        watch(optimizer)
    optimizer.interval_position += 1
    advance_if_due(optimizer)


def _count_update(optimizer: ChunkOptimizer) -> None:
    if optimizer.interval_position + 1 >= optimizer.interval:
        watch(optimizer)
    optimizer.updates, optimizer.interval_position = optimizer.updates + 1, optimizer.interval_position + 1
    if optimizer.interval_position == 1:  # from now on it does not change until the switch
        optimizer._memory.observe_state(optimizer)


def _gather(optimizer: ChunkOptimizer) -> None:
    """Take over what the base optimizer assigned to ``.data``; those of torch write in place."""
    if not optimizer._base_class.__module__.startswith("torch.optim."):
        if optimizer._team is None:
            optimizer._attachment.wiring.gather()
        else:
            optimizer._team.gather()
