"""Tables in host memory: their rows are gathered there, and the layers that multiply with all of one do so by tiles."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chunkft.streaming import HostArena, Pager
from chunkft.weights.ring import POISON, Holder, settle
from chunkft.weights.units import ALIGNMENT, TILE_SLOTS, Table


class TilePages:
    """The tiles of all tables that layers multiply with, on pages of one pager.

    Args:
        tables: with at least one tile each.
        device: where the slots are.
        pin: as for ``Pager``.
        poison: overwrite what leaves a slot with NaN.

    Attributes:
        before: weak reference to what is called before tables are read, with True.
    """

    def __init__(
        self, tables: Sequence[Table], device: torch.device, pin: bool | Literal["auto"], poison: bool
    ) -> None:
        self._poison = poison
        self.before: Callable[[], Callable[[bool], None] | None] = lambda: None
        sizes = [size for table in tables for size in table.tiles]
        self.pager = Pager(sizes, device=device, slots=min(TILE_SLOTS, len(sizes)), pin=pin)
        self.first: dict[str, int] = {}
        count = 0
        for table in tables:
            self.first[table.name] = count
            count += len(table.tiles)
        self._kept: list[int] = []  # may be in a slot, and is not in use
        self._slots: dict[int, Tensor] = {}  # of the tiles that are in use
        self._users: dict[int, set[tuple[int, object]]] = {}  # by tile: thread, and a walk of it
        self._free = threading.Condition(threading.RLock())

    def home(self, table: Table) -> Tensor:
        """The host memory of a table: its tiles one behind the other."""
        first = self.first[table.name]
        span = self.pager.host_span(first, first + len(table.tiles))
        with torch.inference_mode(False):
            return span[: table.nbytes].view(table.dtype).view(table.shape)

    def refresh(self) -> None:
        """Forget what is on the device: tables may have been changed since."""
        with self._free:
            for page in self._kept:
                self.pager.evict(page)
            self._kept.clear()

    @contextmanager
    def tile(self, page: int, following: int | None) -> Iterator[Tensor]:
        """The memory of a tile on the device, while the one that follows comes; other threads may use the same one."""
        user = threading.get_ident(), object()
        try:
            with self._free:
                while page not in self._slots and len(self._slots) == self.pager.slots:
                    self._free.wait()
                self._users.setdefault(page, set()).add(user)
                if page not in self._slots:
                    if page not in self._kept and len(self._slots) + len(self._kept) >= self.pager.slots:
                        self.pager.evict(self._kept.pop(0))
                    self._slots[page] = self.pager.acquire(page)
                    self._kept = [kept for kept in self._kept if kept != page]
                if following is not None and following not in self._slots and self.pager.prefetch(following):
                    self._kept = [*(kept for kept in self._kept if kept != following), following]
            yield self._slots[page]
        finally:
            self._leave(page, user)

    def settle(self) -> None:
        """Give up tiles that this thread, or one that is gone, left in use at an interrupt."""
        with self._free:
            alive = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
            for page, users in list(self._users.items()):
                for user in [user for user in users if user[0] not in alive]:
                    self._leave(page, user)

    def _leave(self, page: int, user: tuple[int, object]) -> None:
        with self._free:
            users = self._users.get(page, set())
            if user not in users:
                return
            if len(users) == 1:
                slot = self._slots.get(page)
                if slot is not None and self._poison:
                    slot.fill_(POISON)
                if self.pager.state(page) == "IN_USE":
                    if slot is None or self._poison:
                        self.pager.discard(page)
                    else:
                        self.pager.release(page, dirty=False, keep=True)
                        self._kept.append(page)
                self._slots.pop(page, None)
                del self._users[page]
            users.discard(user)
            self._free.notify_all()


class StreamedTiles:
    """``Tiles`` of one table.

    Args:
        pages: of all tables.
        table: which.
    """

    def __init__(self, pages: TilePages, table: Table) -> None:
        self.shape = table.shape
        self.device = pages.pager.device
        self._pages = pages
        self._table = table
        self._first = pages.first[table.name]
        self._address = pages.home(table).data_ptr()

    @property
    def count(self) -> int:
        """How many tiles there are."""
        return len(self._table.tiles)

    def holds(self, weight: Tensor) -> bool:
        """Whether a weight is where its values were put."""
        return weight.data_ptr() == self._address

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # of a parameter that is pickled: it does not stream

    def walk(self, *, backward: bool = False) -> Generator[tuple[int, int, Tensor]]:
        """Bounds and values of each tile; the next one is on its way meanwhile."""
        rows, step = self.shape[0], self._table.tile_rows
        self._pages.settle()
        if not backward:
            before = self._pages.before()
            if before is not None:
                before(True)
            self._pages.refresh()
        order = list(range(self.count))
        if backward:
            order.reverse()
        for number, following in zip_longest(order, order[1:]):
            ahead = None if following is None else self._first + following
            with self._pages.tile(self._first + number, ahead) as slot:
                start, stop = number * step, min(rows, (number + 1) * step)
                yield start, stop, slot.view(self._table.dtype).view(stop - start, self.shape[1])


class Tables:
    """All tables of a model in host memory.

    Args:
        tables: which.
        device: of the slots.
        pin: as for ``Pager``.
        poison: overwrite what leaves a slot with NaN.

    Attributes:
        tiles: by name, of those that layers multiply with.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        device: torch.device,
        pin: bool | Literal["auto"],
        poison: bool,
    ) -> None:
        tiled = [table for table in tables if table.tiles]
        gathered = [table for table in tables if not table.tiles]
        self.pages = TilePages(tiled, device, pin, poison) if tiled else None
        self._arena = HostArena(max(1, sum(_aligned(table.nbytes) for table in gathered)))
        self.homes: dict[str, Tensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.tiles: dict[str, StreamedTiles] = {}
        offset = 0
        for table in tables:
            if table.tiles:
                assert self.pages is not None
                home = self.pages.home(table)
                self.tiles[table.name] = StreamedTiles(self.pages, table)
            else:
                home = self._arena.tensor(offset, table.shape, table.dtype)
                offset += _aligned(table.nbytes)
            self.homes[table.name] = home

    def place(self, parameters: Callable[[str], tuple[nn.Parameter, Sequence[Holder]]]) -> None:
        """Move the weights into this memory.

        Args:
            parameters: the parameter of a name, and where the model holds it.
        """
        for name, home in self.homes.items():
            self.parameters[name] = settle(parameters(name)[0], home, parameters(name)[1])

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
