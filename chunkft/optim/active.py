"""The base optimizer at work on the active slices."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from chunkft.autograd import Slice
from chunkft.optim.master import WorkingWeight
from chunkft.optim.rule import UpdateRule
from chunkft.optim.state import State, tensor_nbytes


class ActiveSlices:
    """The active slices, the base optimizer that updates them, and the state that both need.

    Args:
        pairs: each active slice with its leaf.
        states: what is known of each slice: state of the base optimizer and its master.
        rule: how they are updated.
    """

    def __init__(
        self,
        pairs: list[tuple[Slice, nn.Parameter]],
        states: dict[Slice, State],
        rule: UpdateRule,
    ) -> None:
        self._working = {
            piece: WorkingWeight(
                piece, leaf, rule.modes[piece.name], states[piece], rule.needs_contiguous(piece.name)
            )
            for piece, leaf in pairs
        }
        members: list[list[nn.Parameter]] = [[] for _ in rule.groups]
        for piece, working in self._working.items():
            members[rule.group_of[piece.name]].append(working.parameter)
        self._groups = [group for group, inside in zip(rule.groups, members, strict=True) if inside]
        for working in self._working.values():
            working.open()
        filled = [{**group, "params": m} for group, m in zip(rule.groups, members, strict=True) if m]
        # A rank may own nothing of a chunk, and no optimizer takes an empty list.
        self._base = rule.make_base(filled) if filled else None
        for working in self._working.values():
            working.close(None)
        for piece, working in self._working.items():
            if states[piece] and self._base is not None:
                self._base.state[working.parameter] = states[piece]

    def step(self, seed: str) -> None:
        """Update every slice that has a gradient; ``seed`` names the noise of stochastic rounding."""
        if self._base is None:
            return
        self._share_hyperparameters(to_base=True)
        for working in self._working.values():
            working.open()
        done = False
        try:
            for absent in self._apart():
                with _without_gradients(absent):
                    self._base.step()
            done = True
        finally:
            for working in self._working.values():
                working.close(seed if done else None)
        self._share_hyperparameters(to_base=False)

    def states(self) -> dict[Slice, State]:
        """State of the base optimizer and master of each slice, the tensors themselves."""
        return {piece: {**self._state(working), **working.extra} for piece, working in self._working.items()}

    def masters(self) -> dict[Slice, State]:
        """Only what belongs to the weights."""
        return {piece: dict(working.extra) for piece, working in self._working.items()}

    def show(self, target: MutableMapping[Tensor, State]) -> None:
        """Put the base optimizer's state of each leaf into ``target``, in place of what was there."""
        target.clear()
        for working in self._working.values():
            state = self._state(working)
            if state:
                target[working.leaf] = state

    def follow_devices(self) -> None:
        """Bring state to where its leaf is now."""
        for working in self._working.values():
            device = working.leaf.device
            for holder in (self._state(working), working.extra):
                for key, value in holder.items():
                    if isinstance(value, Tensor) and value.dim() > 0 and value.device != device:
                        holder[key] = value.to(device)

    def nbytes(self) -> tuple[int, int]:
        """Bytes of the base optimizer's state, and of the masters."""
        working = self._working.values()
        return sum(tensor_nbytes(self._state(w)) for w in working), sum(
            tensor_nbytes(w.extra) for w in working
        )

    def _state(self, working: WorkingWeight) -> State:
        state: State = {} if self._base is None else self._base.state.get(working.parameter, {})
        return state

    def _apart(self) -> list[list[nn.Parameter]]:
        """What has to stay out of each call of the base optimizer's step: nothing of one, as a rule.

        torch's fused SGD needs the momenta of all of its parameters or of none (seen in torch 2.13), and some have none
        at their first gradient: those of a new chunk beside what is always active. They get a call of their own.
        """
        if not isinstance(self._base, torch.optim.SGD):
            return [[]]
        taking = [w for w in self._working.values() if w.parameter.grad is not None]
        fresh = [w.parameter for w in taking if self._state(w).get("momentum_buffer") is None]
        rest = [w.parameter for w in taking if self._state(w).get("momentum_buffer") is not None]
        uses = any(group["fused"] and group["momentum"] for group in self._base.param_groups)
        return [rest, fresh] if uses and fresh and rest else [[]]

    def _share_hyperparameters(self, to_base: bool) -> None:
        """Both sides' groups hold the same values: schedulers change the outer ones, some bases their own."""
        assert self._base is not None
        for outer, base in zip(self._groups, self._base.param_groups, strict=True):
            source, target = (outer, base) if to_base else (base, outer)
            target.update({key: value for key, value in source.items() if key != "params"})


@contextmanager
def _without_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """For the time being these have none."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
