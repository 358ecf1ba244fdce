"""The ring: blocks of weights that visit a few slots on the device, and what each parameter is meanwhile."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chunkft import tracing
from chunkft.autograd import Slice
from chunkft.streaming import CorruptPageError, Pager, PagerStats, place_of
from chunkft.weights.endings import in_backward
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


class Ring:
    """Pages of weights in host memory, or in a file, of which a few are on the device.

    While a block is held its parameters are views of a slot, else of its page. The device never changes a weight there:
    what leaves a slot is dropped.

    Args:
        blocks: whose weights these are.
        device: where the slots are.
        slots: how many.
        directory: of a file in place of host memory, or None.
        pin: as for ``Pager``.
        poison: overwrite what leaves a slot with NaN: whoever reads it later is found out.

    Attributes:
        moved: told name and address of each parameter whose memory changed.
        homes: the host memory of each parameter by name.
        overlays: for names of weights, slices with copies of their own on the device, and what tells whether such a
            copy is newer than the page, over which it is laid then; else it takes its values from there.
        lay_over_backward: whether that is done in the backward pass too: not where it updates them.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        device: torch.device,
        *,
        slots: int,
        directory: str | os.PathLike[str] | None,
        pin: bool | Literal["auto"],
        poison: bool,
    ) -> None:
        self.blocks = tuple(blocks)
        self.moved: Callable[[str, int], None] = lambda name, address: None
        self.overlays: dict[str, list[tuple[Slice, Tensor, Callable[[Slice], bool]]]] = {}
        self.lay_over_backward = True
        self.lock = threading.RLock()
        self._poison = poison
        self._on_file = directory is not None
        self._place = place_of(device)
        try:
            self.pager = Pager(
                [block.nbytes for block in blocks],
                device=device,
                slots=min(slots, len(self.blocks)),
                pin=pin,
                state_dir=directory,
            )
        except (OSError, RuntimeError, ValueError) as error:
            told = [
                part.replace("state_dir", "weights_dir") if isinstance(part, str) else part
                for part in error.args
            ]
            error.args = tuple(told)
            raise
        self.homes: dict[str, Tensor] = {}
        self._resting: list[list[Resting]] = []
        self._held: dict[int, Tensor] = {}
        self._ahead: list[int] = []  # fetched, and not held since
        self._wanted: int | None = None  # would be fetched, had there been a slot
        self._kept: set[int] = set()  # were held, and may be in a slot still
        self._updates = [
            [0 for _ in block.weights] for block in self.blocks
        ]  # that came by way of ``changed``
        self._found = {
            weight.name: (number, place)
            for number, block in enumerate(self.blocks)
            for place, weight in enumerate(block.weights)
        }
        self._counts: list[list[int]] = []  # of changes in place of each parameter, at the last look
        self._torn = False  # a call ended in the midst of its changes
        self._views: dict[tuple[int, int], list[Tensor]] = {}
        self._owner: dict[int, int] = {}  # block whose page is in the slot at an address

    def place(self, parameters: Callable[[str], tuple[nn.Parameter, Sequence[Holder]]]) -> None:
        """Move the weights into their pages.

        Args:
            parameters: the parameter of a name, and where the model holds it.
        """
        for number, block in enumerate(self.blocks):
            page = self.pager.host(number)
            rest: list[Resting] = []
            self._resting.append(rest)
            for weight in block.weights:
                home = _placed(weight, page)
                parameter, holders = parameters(weight.name)
                rest.append(Resting(weight, settle(parameter, home, holders), home, holders))
                self.homes[weight.name] = home
            self._counts.append(self._count(number))

    @property
    def slots(self) -> int:
        """How many blocks can be on the device at a time."""
        return self.pager.slots

    @property
    def stats(self) -> PagerStats:
        """Counters of the pager."""
        return self.pager.stats()

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter by name."""
        number, place = self._found[name]
        return self._resting[number][place].parameter

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
            self._follow(number)
            self._make_room(number)
            torn, self._torn = self._torn, True
            with tracing.span("fetch %s", self.blocks[number].name):
                slot = self._acquired(number)
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
                for piece, leaf, is_newer in overlays.get(one.weight.name, ()):
                    # not by way of parameter and leaf, whose counts of changes others watch
                    if is_newer(piece):
                        piece.of(view).copy_(leaf.detach())
                    else:
                        leaf.data.copy_(piece.of(view))
            self._torn = torn

    def leave(self, number: int) -> None:
        """Make the parameters of a held block views of the host page again; the slot may be taken for another.

        What was changed in place meanwhile, as by layers that do so to their weight, is written back first.
        """
        with self.lock:
            slot = self._held.get(number)
            if slot is None:
                return
            counts = self._count(number)
            torn, self._torn = self._torn, True
            self._rest_again(number)
            if torn and self.pager.state(number) != "IN_USE":
                self._kept.add(number)  # it was given back, and an interrupt came behind that
            elif self._counts[number] != counts:
                self.pager.release(number)
                self.pager.flush()
                self._counts[number] = counts
            elif self._poison:
                slot.fill_(POISON)
                self.pager.discard(number)
            else:
                self.pager.release(number, dirty=False, keep=True)
                self._kept.add(number)
            del self._held[number]
            self._torn = torn
            if self._wanted is not None:
                self.fetch(self._wanted)

    def settle(self, wanted: Container[int]) -> None:
        """Put in order what an interrupt left half done, and give up blocks that nobody wants."""
        with self.lock:
            if self._torn:
                for number in range(len(self.blocks)):
                    in_use = self.pager.state(number) == "IN_USE"
                    if in_use and number not in self._held:
                        self.pager.discard(number)
                    elif number in self._held and not in_use:
                        self._kept.add(number)
                        del self._held[number]
                    if number not in self._held:
                        self._rest_again(number)
                self._torn = False
            for number in [number for number in self._held if number not in wanted]:
                self.leave(number)

    def wait(self) -> None:
        """Wait for the device: work on the slots may have been given to any stream."""
        self._place.synchronize()

    def fetch(self, number: int) -> None:
        """Begin to bring a block to the device, if a slot is free for it."""
        with self.lock:
            self._wanted = None
            if number in self._held or number in self._ahead:
                return
            self._follow(number)
            if len(self._held) + len(self._ahead) >= self.slots or not self.pager.prefetch(number):
                self._wanted = number
                return
            self._ahead.append(number)

    def refresh(self) -> None:
        """Forget what is on the device of blocks that are not held: their weights may have been changed since."""
        with self.lock:
            self._wanted = None
            for number in {*self._ahead, *self._kept}:
                self._drop(number)

    def changed(self, names: Iterable[str]) -> None:
        """The host memory of these parameters was changed, by others than the pager."""
        with self.lock:
            found = [self._found[name] for name in names]
            for number, place in found:
                self._updates[number][place] += 1
            for number in {number for number, _ in found}:
                self._written(number)

    def version(self, number: int, offset: int) -> int:
        """How often the weight at an offset in bytes on the page of a block was changed in place."""
        weights = self.blocks[number].weights
        place = bisect_right(weights, offset, key=lambda weight: weight.offset) - 1
        return self._updates[number][place] + self._resting[number][place].parameter._version

    def view(self, number: int, layout: tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]) -> Tensor:
        """A tensor over the slot of a held block, of this dtype, shape, strides and offset in elements."""
        dtype, shape, strides, offset = layout
        return self._held[number].view(dtype).as_strided(shape, strides, offset)

    def close(self) -> None:
        """Give up slots and pages, whose memory lives as long as the parameters are views of it."""
        self._wanted = None
        self.settle(())
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
        self._drop(self._ahead[0])

    def _drop(self, number: int) -> None:
        """Forget what is on the device of a block that is not held."""
        if number in self._ahead or number in self._kept:
            self.pager.evict(number)
            self._kept.discard(number)
            if number in self._ahead:
                self._ahead.remove(number)

    def _follow(self, number: int) -> None:
        """What is on the device, or was read ahead, of a block that was changed in place since does not count."""
        counts = self._count(number)
        if self._counts[number] != counts:
            self._written(number)
            self._counts[number] = counts

    def _written(self, number: int) -> None:
        self._drop(number)
        if self._on_file:
            self.pager.host(number)  # what was read ahead of it is forgotten, and its checksum made anew

    def _count(self, number: int) -> list[int]:
        return [one.parameter._version for one in self._resting[number]]

    def _acquired(self, number: int) -> Tensor:
        try:
            return self.pager.acquire(number)
        except CorruptPageError as error:
            raise RuntimeError(
                f"block {self.blocks[number].name}: the file does not hold the weights that were written to it. If "
                "they were changed by way of .data, which nobody is told of, change them in place under no_grad() "
                f"(weight.copy_(...)) while weights_dir is used ({error})"
            ) from error

    def _views_of(self, number: int, slot: Tensor) -> list[Tensor]:
        key = number, slot.data_ptr()
        if key not in self._views:
            self._views[key] = [_placed(one.weight, slot) for one in self._resting[number]]
        return self._views[key]

    def _rest_again(self, number: int) -> None:
        for one in self._resting[number]:
            address = one.parameter.untyped_storage().data_ptr()
            if address in self._owner:
                one.parameter.data = one.home
            elif address != one.home.untyped_storage().data_ptr():
                continue  # somebody else moved it, which the next call tells
            self.moved(one.weight.name, one.home.data_ptr())


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
    # A view in another dtype that is made in evaluation would not be fit for training.
    with torch.inference_mode(False):
        part = page[weight.offset : weight.offset + weight.nbytes]
        return part.view(weight.dtype).view(weight.shape)
