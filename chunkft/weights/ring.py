"""The ring: blocks of weights that visit a few slots on the device, and what each parameter is meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chunkft import tracing
from chunkft.autograd import Slice
from chunkft.streaming import Pager, PagerStats
from chunkft.weights.units import Block, PlacedWeight

POISON = 0xFF  # of these bytes every floating-point number is NaN
Holder = tuple[dict[str, Any], str]


@dataclass
class Resting:
    """One parameter and the host memory that it is a view of between the visits of its block."""

    weight: PlacedWeight
    parameter: nn.Parameter
    home: Tensor
    holders: Sequence[Holder]

    def is_in_place(self) -> bool:
        """Whether the model holds the parameter still, and that its memory in the host."""
        if self.parameter.data_ptr() != self.home.data_ptr():
            return False
        return all(held.get(attribute) is self.parameter for held, attribute in self.holders)


def in_backward() -> bool:
    """Whether a backward pass runs in this thread."""
    return torch._C._current_graph_task_id() != -1


class Ring:
    """Pages of weights in host memory, or in a file, of which a few are on the device.

    While a block is held its parameters are views of a slot, else of its page. The device never changes a weight there:
    what leaves a slot is dropped.

    Args:
        blocks: whose weights these are.
        parameters: the parameter of a name, and where the model holds it.
        device: where the slots are.
        slots: how many.
        directory: of a file in place of host memory, or None.
        pin: as for ``Pager``.
        poison: overwrite what leaves a slot with NaN: whoever reads it later is found out.

    Attributes:
        moved: told name and address of each parameter whose memory changed.
        overlays: for names of weights, slices with newer values on the device, which are laid over the page.
        lay_over_backward: whether that is done in the backward pass too: not where it updates them.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        parameters: Callable[[str], tuple[nn.Parameter, Sequence[Holder]]],
        device: torch.device,
        *,
        slots: int,
        directory: str | os.PathLike[str] | None,
        pin: bool | Literal["auto"],
        poison: bool,
    ) -> None:
        self.blocks = tuple(blocks)
        self.moved: Callable[[str, int], None] = lambda name, address: None
        self.overlays: dict[str, list[tuple[Slice, Tensor]]] = {}
        self.lay_over_backward = True
        self.lock = threading.RLock()
        self._poison = poison
        self._on_file = directory is not None
        self.pager = Pager(
            [block.nbytes for block in blocks],
            device=device,
            slots=min(slots, len(self.blocks)),
            pin=pin,
            state_dir=directory,
        )
        self._resting: list[list[Resting]] = []
        try:
            for number, block in enumerate(self.blocks):
                page = self.pager.host(number)
                self._resting.append([_rest(w, page, *parameters(w.name)) for w in block.weights])
        except BaseException:
            self.close(lambda home: home)
            raise
        self._held: dict[int, Tensor] = {}
        self._ahead: list[int] = []  # fetched, and not held since
        self._wanted: int | None = None  # would be fetched, had there been a slot
        self._kept: set[int] = set()  # were held, and may be in a slot still
        self._views: dict[tuple[int, int], list[Tensor]] = {}
        self._owner: dict[int, int] = {}  # block whose page is in the slot at an address

    @property
    def slots(self) -> int:
        """How many blocks can be on the device at a time."""
        return self.pager.slots

    @property
    def stats(self) -> PagerStats:
        """Counters of the pager."""
        return self.pager.stats()

    def home(self, name: str) -> Tensor | None:
        """The host memory of a parameter, or None if it is none of these."""
        return next((one.home for rest in self._resting for one in rest if one.weight.name == name), None)

    def holds(self, number: int) -> bool:
        """Whether a block is on the device for use."""
        return number in self._held

    def owner(self, storage: int) -> int | None:
        """Which held block the memory at an address is of, or None if it is no slot."""
        number = self._owner.get(storage)
        return number if number in self._held else None

    def hold(self, number: int) -> None:
        """Make the parameters of a block views of a slot with their values, for work of the current stream from now on.

        Raises:
            RuntimeError: if as many blocks are held as there are slots, or a parameter is not where it was put.
        """
        with self.lock:
            if number in self._held:
                return
            self._check_places(number)
            self._make_room(number)
            with tracing.span("fetch %s", self.blocks[number].name):
                slot = self.pager.acquire(number)
            if number in self._ahead:
                self._ahead.remove(number)
            self._kept.discard(number)
            self._held[number] = slot
            self._owner[slot.untyped_storage().data_ptr()] = number
            views = self._views_of(number, slot)
            overlays = self.overlays if self.lay_over_backward or not in_backward() else {}
            for one, view in zip(self._resting[number], views, strict=True):
                one.parameter.data = view
                self.moved(one.weight.name, view.data_ptr())
                for piece, leaf in overlays.get(one.weight.name, ()):
                    # not by way of the parameter, whose count of changes others watch
                    piece.of(view).copy_(leaf.detach())

    def leave(self, number: int) -> None:
        """Make the parameters of a held block views of the host page again; the slot may be taken for another."""
        with self.lock:
            slot = self._held.pop(number, None)
            if slot is None:
                return
            self._rest_again(number)
            if self._poison:
                slot.fill_(POISON)
                self.pager.discard(number)
            else:
                self.pager.release(number, dirty=False, keep=True)
                self._kept.add(number)
            if self._wanted is not None:
                self.fetch(self._wanted)

    def fetch(self, number: int) -> None:
        """Begin to bring a block to the device, if a slot is free for it."""
        with self.lock:
            self._wanted = None
            if number in self._held or number in self._ahead:
                return
            if len(self._held) + len(self._ahead) >= self.slots or not self.pager.prefetch(number):
                self._wanted = number
                return
            self._ahead.append(number)

    def refresh(self) -> None:
        """Forget what is on the device of blocks that are not held: their weights may have been changed since."""
        with self.lock:
            self._wanted = None
            for number in [*self._ahead, *self._kept]:
                self.pager.evict(number)
            self._ahead.clear()
            self._kept.clear()

    def written(self, number: int) -> None:
        """The host page of a block was changed, by others than the pager."""
        with self.lock:
            if number in self._ahead or number in self._kept:
                self.pager.evict(number)
                self._kept.discard(number)
                if number in self._ahead:
                    self._ahead.remove(number)
            if self._on_file:
                self.pager.host(number)  # what was read ahead of it is forgotten, and its checksum made anew

    def view(self, number: int, layout: tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]) -> Tensor:
        """A tensor over the slot of a held block, of this dtype, shape, strides and offset in elements."""
        dtype, shape, strides, offset = layout
        return self._held[number].view(dtype).as_strided(shape, strides, offset)

    def close(self, keep: Callable[[Tensor], Tensor]) -> None:
        """Give up slots and pages. ``keep`` is given the host memory of each parameter and returns what it is then."""
        for number in list(getattr(self, "_held", {})):
            self.leave(number)
        for rest in self._resting:
            for one in rest:
                if one.parameter.data_ptr() == one.home.data_ptr():
                    one.parameter.data = keep(one.home)
        self._views = {}
        self.pager.close()

    def _check_places(self, number: int) -> None:
        for one in self._resting[number]:
            if not one.is_in_place():
                raise RuntimeError(
                    f"parameter {one.weight.name!r} was moved or replaced while its weights stream; detach() the "
                    "optimizer (or the stream) first, change the model, then build it again"
                )

    def _make_room(self, number: int) -> None:
        if number in self._ahead or len(self._held) + len(self._ahead) < self.slots:
            return
        if not self._ahead:
            names = ", ".join(self.blocks[held].name for held in sorted(self._held))
            raise RuntimeError(
                f"block {self.blocks[number].name} is needed while {names} are, and there are slots for {self.slots}: "
                "give the stream more of them (slots=...)"
            )
        dropped = self._ahead.pop(0)
        self.pager.evict(dropped)

    def _views_of(self, number: int, slot: Tensor) -> list[Tensor]:
        key = number, slot.data_ptr()
        if key not in self._views:
            self._views[key] = [_placed(one.weight, slot) for one in self._resting[number]]
        return self._views[key]

    def _rest_again(self, number: int) -> None:
        for one in self._resting[number]:
            one.parameter.data = one.home
            self.moved(one.weight.name, one.home.data_ptr())


def _rest(weight: PlacedWeight, page: Tensor, parameter: nn.Parameter, holders: Sequence[Holder]) -> Resting:
    home = _placed(weight, page)
    return Resting(weight, settle(parameter, home, holders), home, holders)


def settle(parameter: nn.Parameter, home: Tensor, holders: Sequence[Holder]) -> nn.Parameter:
    """Make a parameter a view of host memory, with its values if it has some; a new one where it is on meta."""
    if parameter.is_meta:
        fresh = nn.Parameter(home, requires_grad=parameter.requires_grad)
        for held, attribute in holders:
            held[attribute] = fresh
        return fresh
    with torch.no_grad():
        home.copy_(parameter.detach())
        parameter.data = home
    return parameter


def _placed(weight: PlacedWeight, page: Tensor) -> Tensor:
    part = page[weight.offset : weight.offset + weight.nbytes]
    return part.view(weight.dtype).view(weight.shape)
