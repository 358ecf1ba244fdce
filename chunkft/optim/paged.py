"""State that is paged between host memory, or a file, and a few slots on the device."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chunkft import tracing
from chunkft.autograd import Slice
from chunkft.optim.pages import Page, StateProbe, make_pages
from chunkft.optim.state import State, StateStore
from chunkft.plan import ChunkPlan
from chunkft.streaming import Pager


class PagedStore(StateStore):
    """State of slices, page by page; what is in use lies in a slot of the pager.

    Tensors that the probe foresaw move in one copy a page, ahead of their use and behind it. Everything else
    (step counts, tensors of an optimizer that could not be probed) is kept beside the pages and moved one by
    one. Slices without a page are kept as in a ``StateStore``.

    Args:
        plan: the slices; ``fitted`` makes one whose slices fit the pages.
        probe: tells what the base optimizer keeps for each.
        device_of: device of a parameter, by name.
        stream: True makes pages of ``page_bytes``, also of slices that are always active, and a ring of three
            slots; False makes one page of each chunk and a ring of two.
        page_bytes: see ``make_pages``.
        state_dir: directory for files that hold the state in place of host memory, or None.
        allocate: False waits with memory until ``realise``.
    """

    def __init__(
        self,
        plan: ChunkPlan,
        probe: StateProbe,
        device_of: Callable[[str], torch.device],
        *,
        stream: bool,
        page_bytes: int | None,
        state_dir: str | os.PathLike[str] | None,
        allocate: bool = True,
    ) -> None:
        super().__init__()
        self.probe = probe
        self._device_of = device_of
        self._stream = stream
        self.page_bytes = page_bytes
        # A relative path must mean the same directory when the process has gone to another one.
        self.state_dir = None if state_dir is None else os.path.abspath(state_dir)
        self.new_peak = 0  # most bytes at a time of state that had to be copied to its page, if pages stream
        groups: list[Sequence[Slice]] = [chunk.slices for chunk in plan.chunks]
        if stream:
            groups.insert(0, plan.always)
        self.pages: list[Page] = make_pages(groups, probe, device_of, page_bytes)
        self.page_of: dict[Slice, int] = {
            piece: number for number, page in enumerate(self.pages) for piece in page.pieces
        }
        if probe.failure is not None:
            warnings.warn(
                "the state of the base optimizer cannot be laid out ahead, so it is moved tensor by tensor and "
                f"waits for each copy: a step without memory failed with {probe.failure}",
                stacklevel=4,
            )
        self._pagers: dict[torch.device, Pager] = {}
        self._number: list[int] = []  # of a page in the pager of its device
        self._values: dict[Slice, State] = {}  # what is not on pages
        self._valid: dict[Slice, set[str]] = {}  # keys whose bytes on the page were written
        self._open: dict[int, Tensor] = {}
        self._ahead: list[int] = []  # pages that were fetched ahead and are not open yet
        self._pending: list[Callable[[], dict[Slice, State]]] = []
        if allocate:
            self._allocate()

    def successor(self, plan: ChunkPlan) -> PagedStore:
        """A store for a plan that takes its memory only when this one has given back its own."""
        return PagedStore(
            plan,
            self.probe,
            self._device_of,
            stream=self._stream,
            page_bytes=self.page_bytes,
            state_dir=self.state_dir,
            allocate=False,
        )

    def load(self, states: Callable[[], dict[Slice, State]]) -> None:
        """Read states when ``realise`` is called: host memory never holds them twice."""
        self._pending.append(states)

    def realise(self) -> None:
        """Take memory and read what ``load`` was told to."""
        self._allocate()
        pending, self._pending = self._pending, []
        for read in pending:
            self.put(read())

    def open(self, pairs: Sequence[tuple[Slice, nn.Parameter]]) -> dict[Slice, State]:
        """State of slices, in slots of their pages; each page stays there until ``close``."""
        for number in self._pages_of([piece for piece, _ in pairs]):
            if number not in self._open:
                pager, local = self._pager(number)
                if pager.state(local) == "IN_USE":  # an interrupted call acquired it, and nobody has it
                    pager.discard(local)
                self._make_room(number)
                load = any(self._valid.get(piece) for piece in self.pages[number].pieces)
                self._open[number] = pager.acquire(local, load=load)
        states: dict[Slice, State] = {}
        for piece, leaf in pairs:
            if piece not in self.page_of:
                states[piece] = self.take(piece, leaf.device)
                continue
            states[piece] = self._paged(piece, self._open[self.page_of[piece]])
            for key, value in self._values.get(piece, {}).items():
                loose = isinstance(value, Tensor) and value.dim() > 0
                states[piece][key] = value.to(leaf.device) if loose else value
        return states

    def close(self, pieces: Sequence[Slice], states: dict[Slice, State]) -> None:
        """Take back the pages of ``pieces``; their copy to the host runs behind what the device does."""
        numbers = self._pages_of(pieces)
        if self._stream:
            self.new_peak = max(self.new_peak, self._beside_pages(states))
        self.put(states)
        for number in numbers:
            if number in self._open:
                pager, local = self._pager(number)
                page = self.pages[number]
                if pager.state(local) == "IN_USE":  # or an interrupted call released it
                    pager.release(local, dirty=any(self._valid.get(piece) for piece in page.pieces))
                del self._open[number]

    def home(self, piece: Slice, key: str) -> Tensor | None:
        """The place of a tensor in the slot of its page, while that is open."""
        number = self.page_of.get(piece)
        if number is None or number not in self._open:
            return None
        region = self.pages[number].regions[piece].get(key)
        return None if region is None else region.of(self._open[number])

    def holds(self, piece: Slice, key: str, tensor: Tensor) -> bool:
        """Whether a tensor of a slice's state lies in the slot of its page, or in memory of the store."""
        home = self.home(piece, key)
        own = home is not None and home.data_ptr() == tensor.data_ptr()
        return own or super().holds(piece, key, tensor)

    def abandon(self, pieces: Sequence[Slice]) -> None:
        """Forget what happened on open pages of ``pieces``: the host's copy counts again."""
        for number in self._pages_of(pieces):
            if number in self._open:
                pager, local = self._pager(number)
                pager.discard(local)
                del self._open[number]

    def prefetch(self, pieces: Sequence[Slice]) -> None:
        """Begin to fetch the pages of slices, as far as slots are free."""
        for number in self._pages_of(pieces):
            self.prefetch_page(number)

    def prefetch_page(self, number: int) -> None:
        """Begin to fetch one page, if it holds anything and a slot is free."""
        if number in self._open or number in self._ahead:
            return
        pager, local = self._pager(number)
        written = any(self._valid.get(piece) for piece in self.pages[number].pieces)
        if written and len(self._in_slots(pager)) < pager.slots:
            with tracing.span("prefetch page %d", number):
                # Noted before: a page in a slot that nobody knows of would take the room of others for ever.
                self._ahead.append(number)
                try:
                    came = pager.prefetch(local)
                except BaseException:
                    self._ahead.remove(number)
                    raise
                if not came:
                    self._ahead.remove(number)

    def put(self, states: dict[Slice, State]) -> None:
        """Keep the states of these slices: on their page if it is open, otherwise in its host copy."""
        hosts: dict[int, Tensor] = {}
        for piece, state in states.items():
            if piece not in self.page_of:
                super().put({piece: state})
                continue
            number = self.page_of[piece]
            regions = self.pages[number].regions[piece]
            page = self._open.get(number)
            valid: set[str] = set()
            values: State = {}
            for key, value in state.items():
                region = regions.get(key)
                if not isinstance(value, Tensor):
                    values[key] = value
                elif region is None or region.shape != tuple(value.shape) or region.dtype != value.dtype:
                    values[key] = value.detach().cpu()
                else:
                    if page is None:
                        if number not in hosts:
                            hosts[number] = self._host_to_write(number)
                        page = hosts[number]
                    home = region.of(page)
                    if home.data_ptr() != value.data_ptr():
                        home.copy_(value.detach())
                    valid.add(key)
            self._valid[piece] = valid
            self._values[piece] = values

    def get(self, piece: Slice) -> State:
        """State of a slice in host memory. Not to be changed."""
        if piece not in self.page_of:
            return super().get(piece)
        if not self._valid.get(piece):
            return dict(self._values.get(piece, {}))
        return {**self._paged(piece, self._host(self.page_of[piece])), **self._values.get(piece, {})}

    def pieces(self) -> list[Slice]:
        """The slices that have state."""
        paged = [piece for piece in self.page_of if self._valid.get(piece) or self._values.get(piece)]
        return paged + super().pieces()

    def drop(self, piece: Slice) -> None:
        """Forget the state of one slice."""
        super().drop(piece)
        self._valid.pop(piece, None)
        self._values.pop(piece, None)

    def retain(self, piece: Slice, keys: set[str]) -> None:
        """Forget the state of one slice except for these keys."""
        if piece not in self.page_of:
            super().retain(piece, keys)
            return
        self._valid[piece] = self._valid.get(piece, set()) & keys
        kept = self._values.get(piece, {})
        self._values[piece] = {key: value for key, value in kept.items() if key in keys}

    def clear(self) -> None:
        """Forget all state and release its memory."""
        super().clear()
        self._open.clear()
        self._ahead.clear()
        self._values.clear()
        self._valid.clear()
        pagers, self._pagers = self._pagers, {}
        for pager in pagers.values():
            pager.close()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory, or of files, that hold state."""
        return super().nbytes + sum(sum(pager.pages) for pager in self._pagers.values())

    @property
    def arena_nbytes(self) -> int:
        """Bytes of host memory of state without a page."""
        return super().nbytes

    @property
    def slot_nbytes(self) -> int:
        """Bytes of the slots on all devices."""
        return sum(pager.slots * pager.slot_bytes for pager in self._pagers.values())

    @property
    def spare_nbytes(self) -> int:
        """Bytes of slots that no open page lies in."""
        return self.slot_nbytes - sum(self.pages[number].nbytes for number in self._open)

    def device_of(self, piece: Slice) -> torch.device | None:
        """Where the page of a slice comes to, or None if it has no page."""
        number = self.page_of.get(piece)
        return None if number is None else self.pages[number].device

    @property
    def pagers(self) -> dict[torch.device, Pager]:
        """The pager of each device."""
        return dict(self._pagers)

    def slots_for(self, pages: int) -> int:
        """How many slots so many pages of a device get."""
        return min(3 if self._stream else 2, pages)

    def _beside_pages(self, states: dict[Slice, State]) -> int:
        """Bytes of the tensors that are not where their page has a place for them."""
        total = 0
        for piece, state in states.items():
            for key, value in state.items():
                home = self.home(piece, key)
                if isinstance(value, Tensor) and home is not None and home.data_ptr() != value.data_ptr():
                    total += value.numel() * value.element_size()
        return total

    def _allocate(self) -> None:
        sizes: dict[torch.device, list[int]] = {}
        self._number = []
        for page in self.pages:
            on_device = sizes.setdefault(page.device, [])
            self._number.append(len(on_device))
            on_device.append(page.nbytes)
        for device, pages in sizes.items():
            slots = self.slots_for(len(pages))
            self._pagers[device] = Pager(pages, device=device, slots=slots, **self._tier(device))

    def _make_room(self, number: int) -> None:
        """See that a slot can be had for a page, at the cost of one that was fetched ahead and did not come."""
        if number in self._ahead:
            self._ahead.remove(number)
            return
        pager, _ = self._pager(number)
        in_slots = self._in_slots(pager)
        if len(in_slots) >= pager.slots:
            dropped = next((other for other in in_slots if other in self._ahead), None)
            if dropped is not None:
                pager.evict(self._number[dropped])
                self._ahead.remove(dropped)

    def _in_slots(self, pager: Pager) -> list[int]:
        return [number for number in [*self._ahead, *self._open] if self._pager(number)[0] is pager]

    def _tier(self, device: torch.device) -> dict[str, Any]:
        if self.state_dir is None:
            return {}
        return {"state_dir": os.path.join(self.state_dir, str(device).replace(":", "-"))}

    def _pages_of(self, pieces: Sequence[Slice]) -> list[int]:
        return list(dict.fromkeys(self.page_of[piece] for piece in pieces if piece in self.page_of))

    def _pager(self, number: int) -> tuple[Pager, int]:
        return self._pagers[self.pages[number].device], self._number[number]

    def _host(self, number: int) -> Tensor:
        pager, local = self._pager(number)
        return pager.read(local)

    def _host_to_write(self, number: int) -> Tensor:
        """The host copy, of which no copy in a slot is left: a page that was fetched ahead would stay as it was."""
        pager, local = self._pager(number)
        if pager.state(local) != "HOST":
            pager.flush()
        pager.discard(local)
        if number in self._ahead:
            self._ahead.remove(number)
        return pager.host(local)

    def _paged(self, piece: Slice, page: Tensor) -> State:
        valid = self._valid.get(piece, set())
        regions = self.pages[self.page_of[piece]].regions[piece]
        return {key: region.of(page) for key, region in regions.items() if key in valid}
