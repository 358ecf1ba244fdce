"""Tables in host memory: their rows are gathered there, and the layers that multiply with all of one do so by tiles."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chunkft.streaming import HostArena, Pager
from chunkft.weights.ring import Holder, settle
from chunkft.weights.units import ALIGNMENT, TILE_SLOTS, Table


class TilePages:
    """The tiles of all tables that layers multiply with, on pages of one pager.

    Args:
        tables: with at least one tile each.
        device: where the slots are.
        pin: as for ``Pager``.
    """

    def __init__(self, tables: Sequence[Table], device: torch.device, pin: bool | Literal["auto"]) -> None:
        sizes = [size for table in tables for size in table.tiles]
        self.pager = Pager(sizes, device=device, slots=min(TILE_SLOTS, len(sizes)), pin=pin)
        self.first: dict[str, int] = {}
        count = 0
        for table in tables:
            self.first[table.name] = count
            count += len(table.tiles)
        self.kept: set[int] = set()
        self.lock = threading.RLock()

    def home(self, table: Table) -> Tensor:
        """The host memory of a table: its tiles one behind the other."""
        first = self.first[table.name]
        span = self.pager.host_span(first, first + len(table.tiles))
        return span[: table.nbytes].view(table.dtype).view(table.shape)

    def refresh(self) -> None:
        """Forget what is on the device: tables may have been changed since."""
        with self.lock:
            for page in self.kept:
                if self.pager.state(page) != "IN_USE":
                    self.pager.evict(page)
            self.kept.clear()


class StreamedTiles:
    """``Tiles`` of one table.

    Args:
        pages: of all tables.
        table: which.
        poison: overwrite what leaves a slot with NaN.
    """

    def __init__(self, pages: TilePages, table: Table, poison: bool) -> None:
        self.shape = table.shape
        self.device = pages.pager.device
        self._pages = pages
        self._table = table
        self._poison = poison
        self._first = pages.first[table.name]

    @property
    def count(self) -> int:
        """How many tiles there are."""
        return len(self._table.tiles)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # of a parameter that is pickled: it does not stream

    def walk(self, *, backward: bool = False) -> Iterator[tuple[int, int, Tensor]]:
        """Bounds and values of each tile; the next one is on its way meanwhile."""
        pager, rows, step = self._pages.pager, self.shape[0], self._table.tile_rows
        if not backward:
            self._pages.refresh()
        order = list(range(self.count))
        if backward:
            order.reverse()
        for place, number in enumerate(order):
            page = self._first + number
            slot = pager.acquire(page)
            try:
                if place + 1 < len(order):
                    following = self._first + order[place + 1]
                    if pager.prefetch(following):
                        self._pages.kept.add(following)
                start, stop = number * step, min(rows, (number + 1) * step)
                yield start, stop, slot.view(self._table.dtype).view(stop - start, self.shape[1])
            finally:
                if self._poison:
                    slot.fill_(0xFF)
                    pager.discard(page)
                else:
                    pager.release(page, dirty=False, keep=True)
                    self._pages.kept.add(page)


class Tables:
    """All tables of a model in host memory.

    Args:
        tables: which.
        parameters: the parameter of each, and where the model holds it.
        device: of the slots.
        pin: as for ``Pager``.
        poison: as for ``StreamedTiles``.

    Attributes:
        tiles: by name, of those that layers multiply with.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        parameters: Sequence[tuple[nn.Parameter, Sequence[Holder]]],
        device: torch.device,
        pin: bool | Literal["auto"],
        poison: bool,
    ) -> None:
        tiled = [table for table in tables if table.tiles]
        gathered = [table for table in tables if not table.tiles]
        self.pages = TilePages(tiled, device, pin) if tiled else None
        self._arena = HostArena(max(1, sum(_aligned(table.nbytes) for table in gathered)))
        self.homes: dict[str, Tensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.tiles: dict[str, StreamedTiles] = {}
        offset = 0
        for table, (parameter, holders) in zip(tables, parameters, strict=True):
            if table.tiles:
                assert self.pages is not None
                home = self.pages.home(table)
                self.tiles[table.name] = StreamedTiles(self.pages, table, poison)
            else:
                home = self._arena.tensor(offset, table.shape, table.dtype)
                offset += _aligned(table.nbytes)
            self.homes[table.name] = home
            self.parameters[table.name] = settle(parameter, home, holders)

    @property
    def host_nbytes(self) -> int:
        """Bytes of host memory."""
        tiles = 0 if self.pages is None else sum(self.pages.pager.pages)
        return tiles + (self._arena.nbytes if len(self.tiles) < len(self.homes) else 0)

    @property
    def device_nbytes(self) -> int:
        """Bytes of the slots for tiles."""
        return 0 if self.pages is None else self.pages.pager.slots * self.pages.pager.slot_bytes

    def refresh(self) -> None:
        """Forget what is on the device."""
        if self.pages is not None:
            self.pages.refresh()

    def close(self) -> None:
        """Give up the slots; host memory lives as long as somebody sees it."""
        if self.pages is not None:
            self.pages.pager.close()
        self._arena.close()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
