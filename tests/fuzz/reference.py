"""Dense training of which only the elements of active slices are updated: what chunkft must come to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import chunkft
from chunkft.schedule import active_chunk

NEVER = float("nan")  # state of an element that was not updated yet


class Owners:
    """For each element of each trained weight the chunk that it belongs to; -1 where it is always active."""

    def __init__(self, plan: chunkft.ChunkPlan, shapes: dict[str, torch.Size]) -> None:
        self.count = len(plan)
        self.chunk: dict[str, Tensor] = {}
        self._dims = {piece.name: piece.dim for piece in plan.slices()}
        parts = [(-1, piece) for piece in plan.always]
        parts += [(chunk.index, piece) for chunk in plan.chunks for piece in chunk.slices]
        for index, piece in parts:
            owner = self.chunk.setdefault(piece.name, torch.full(shapes[piece.name], -2))
            part = (
                owner if piece.dim is None else owner.narrow(piece.dim, piece.start, piece.stop - piece.start)
            )
            assert bool((part == -2).all()), f"{piece} overlaps another slice of the plan"
            part.fill_(index)
        assert not any(bool((owner == -2).any()) for owner in self.chunk.values()), "the plan leaves gaps"

    def same(self, other: Owners) -> bool:
        """Whether both cut along the same dimensions and give each element the same chunk."""
        return self._dims == other._dims and all(
            torch.equal(mine, other.chunk[name]) for name, mine in self.chunk.items()
        )


class Reference:
    """Masked dense training.

    The base optimizer runs on the whole of a weight, once for each set of step counts that its active elements
    have, and only those elements take the result over. State is kept per element, scalars too.

    Args:
        model: an ordinary model of its own; its gradients after a backward pass are dense.
        base, options: class of the base optimizer and its keywords.
        groups: keywords of each group; ``group_of`` gives the number for a name.
    """

    def __init__(
        self,
        model: nn.Module,
        owners: Owners,
        base: Callable[..., torch.optim.Optimizer],
        options: dict[str, Any],
        groups: list[dict[str, Any]],
        group_of: dict[str, int],
        schedule: Any,
        interval: int,
        seed: int,
        keep_state: bool,
        max_grad_norm: float | None,
    ) -> None:
        self.model, self.owners, self.base, self.options = model, owners, base, options
        self.groups, self.group_of = groups, group_of
        self.schedule, self.interval, self.seed = schedule, interval, seed
        self.keep_state, self.max_grad_norm = keep_state, max_grad_norm
        self.parameters = dict(model.named_parameters())
        self.values: dict[str, dict[str, Tensor]] = {name: {} for name in owners.chunk}
        self.scalars: set[str] = set()
        self.index = self.position = self.updates = self.skipped = 0

    @property
    def active(self) -> int:
        return active_chunk(self.schedule, self.index, self.owners.count, self.seed)

    def mask(self, name: str) -> Tensor:
        """Which elements are active."""
        owner = self.owners.chunk[name]
        return (owner == -1) | (owner == self.active)

    def names(self) -> list[str]:
        """Weights with active elements."""
        return [name for name in self.owners.chunk if bool(self.mask(name).any())]

    def backward(self, loss: Tensor) -> None:
        """The dense backward pass; gradients of elements that are not active are then zero, or None."""
        loss.backward()
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            mask = (
                self.mask(name)
                if name in self.owners.chunk
                else torch.zeros(parameter.shape, dtype=torch.bool)
            )
            if bool(mask.any()):
                parameter.grad = torch.where(mask, parameter.grad, 0.0)
            else:
                parameter.grad = None

    def has_gradients(self) -> bool:
        return any(self.parameters[name].grad is not None for name in self.names())

    def update(self) -> None:
        """Update from the masked gradients, unless one is not finite."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if not all(bool(torch.isfinite(grad).all()) for grad in gradients.values()):
            self.skipped += 1
        else:
            if self.max_grad_norm is not None and gradients:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            for name in gradients:
                self._update(name)
            self.updates += bool(gradients)  # one that reaches no active slice counts for the interval only
            self.position += 1
        self.model.zero_grad()

    def close(self) -> None:
        """The end of a step: the next chunk if its time has come."""
        if self.position >= self.interval:
            self._advance()

    def changed_plan(self, owners: Owners) -> None:
        """Loading into another plan: on at the start of the sweep, unless nothing differs."""
        if not owners.same(self.owners):
            self.index, self.position = self.index // self.owners.count * owners.count, 0
        self.owners = owners

    @torch.no_grad()
    def _advance(self) -> None:
        if not self.keep_state:
            for name, values in self.values.items():
                gone = self.owners.chunk[name] == self.active
                for value in values.values():
                    value[gone] = NEVER
        self.index, self.position = self.index + 1, 0

    @torch.no_grad()
    def _update(self, name: str) -> None:
        parameter, values, pending = self.parameters[name], self.values[name], self.mask(name)
        before = parameter.detach().clone()
        old = {key: value.clone() for key, value in values.items()}
        while bool(pending.any()):
            first = tuple(pending.nonzero()[0].tolist())
            # the elements with the same step counts (or none) as this one
            alike = pending.clone()
            for key in self.scalars & old.keys():
                alike &= (old[key] == old[key][first]) | (old[key].isnan() & old[key][first].isnan())
            for key in old.keys() - self.scalars:
                alike &= old[key].isnan() == old[key][first].isnan()
            self._update_alike(name, before, old, alike, first)
            pending &= ~alike

    def _update_alike(
        self, name: str, before: Tensor, old: dict[str, Tensor], alike: Tensor, first: tuple[int, ...]
    ) -> None:
        working = nn.Parameter(before.clone())
        working.grad = self.parameters[name].grad.clone()
        group = self.groups[self.group_of[name]]
        optimizer = self.base([{**group, "params": [working]}], **self.options)
        state: dict[str, Any] = {}
        for key, value in old.items():
            if bool(value[first].isnan()):
                continue
            state[key] = value[first].clone().float() if key in self.scalars else value.nan_to_num()
        if state:
            optimizer.state[working] = state
        optimizer.step()
        self.parameters[name][alike] = working.detach()[alike]
        for key, value in optimizer.state[working].items():
            if not isinstance(value, Tensor):
                continue
            if value.dim() == 0:
                self.scalars.add(key)
            whole = self.values[name].setdefault(key, torch.full(before.shape, NEVER, dtype=torch.float64))
            whole[alike] = value.double() if value.dim() == 0 else value[alike]


def saved_values(saved: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The state of a ``state_dict`` of chunkft per element, in the form of ``Reference.values``."""
    result: dict[str, dict[str, Tensor]] = {}
    for name, entry in saved["state"].items():
        values = result.setdefault(name, {})
        for span in entry["ranges"]:
            window = _window(span)
            for key in span["elementwise"]:
                whole = values.setdefault(key, torch.full(entry["shape"], NEVER, dtype=torch.float64))
                whole[window] = entry["tensors"][key][window]
            for key, value in span["values"].items():
                if isinstance(value, Tensor):
                    whole = values.setdefault(key, torch.full(entry["shape"], NEVER, dtype=torch.float64))
                    whole[window] = float(value)
    return result


def _window(span: dict[str, Any]) -> tuple[slice, ...]:
    if span["dim"] is None:
        return (slice(None),)
    return (slice(None),) * span["dim"] + (slice(span["start"], span["stop"]),)
