"""Where the host copies of a pager's pages live: in memory, or in a file behind a ring of memory."""

import os
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from chunkft.streaming.arena import _core
from chunkft.streaming.engine import Engine
from chunkft.streaming.files import BLOCK, PageFile, file_nbytes, padded
from chunkft.streaming.pinning import host_memory
from chunkft.streaming.place import Place
from chunkft.streaming.staging import StagedEngine
from chunkft.streaming.stats import PagerStats, TraceRecord
from chunkft.streaming.workers import Workers

__all__ = ["FileHome", "Home", "MemoryHome", "file_tier_nbytes"]

ALIGNMENT = 256
# Beyond one page for each slot: one that is read ahead, and one that is written behind.
SPARE_BUFFERS = 2
SEGMENT_WORKERS = 4


def file_tier_nbytes(pages: Sequence[int], slots: int) -> tuple[int, int]:
    """Bytes of host memory and of the file that a pager with a `state_dir` takes for pages of these sizes."""
    return padded(max(pages)) * (slots + SPARE_BUFFERS), file_nbytes(pages)


class Home(Protocol):
    """Host copies of pages, and the engine that moves them into slots and back."""

    engine: Engine
    host_bytes: int
    pinned: bool

    def host(self, page: int) -> Tensor: ...
    def span(self, first: int, last: int) -> Tensor: ...
    def read(self, page: int) -> Tensor: ...
    def settle(self) -> None: ...
    def stats(self, device_bytes: int) -> PagerStats: ...
    def trace(self) -> list[TraceRecord]: ...
    def close(self) -> None: ...


class _Memory:
    """One arena for ranges of the given sizes, each on a multiple of `alignment` bytes, page-locked if it can be,
    and a native pager that moves them.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        alignment: int,
        slots: Sequence[Tensor],
        place: Place,
        pin: bool | Literal["auto"],
        trace_events: int,
    ) -> None:
        self.offsets: list[int] = []
        end = 0
        for size in sizes:
            self.offsets.append(end)
            end += -(-size // alignment) * alignment
        self.arena = host_memory(end, pin, place)
        self.pinned = self.arena.page_locked
        self.nbytes = end
        address = self.arena.tensor(0, 1, torch.uint8).data_ptr()
        self.core = _core.Pager(
            list(sizes),
            [address + offset for offset in self.offsets],
            [slot.data_ptr() for slot in slots],
            slots[0].nbytes,
            backend=place.backend,
            device=place.device.index or 0,
            keep=(self.arena, tuple(slots)),
            trace_events=trace_events,
        )

    def stats(self, device_bytes: int) -> dict[str, Any]:
        """The counters of `PagerStats` but for those of a file."""
        found = self.core.stats()
        loads, stores = found["loads"], found["stores"]
        return {
            "loads": loads["copies"],
            "stores": stores["copies"],
            "loaded_bytes": loads["bytes"],
            "stored_bytes": stores["bytes"],
            "timed_loaded_bytes": loads["timed_bytes"],
            "timed_stored_bytes": stores["timed_bytes"],
            "load_seconds": loads["timed_ns"] / 1e9,
            "store_seconds": stores["timed_ns"] / 1e9,
            "acquires": found["acquires"],
            "waits": found["waits"],
            "stall_seconds": found["host_stall_ns"] / 1e9,
            "exposed_seconds": found["exposed_ns"] / 1e9,
            "events_created": found["events_created"],
            "streams_created": found["streams_created"],
            "host_bytes": self.nbytes,
            "host_capacity": self.arena.capacity,
            "pinned_bytes": self.arena.capacity if self.pinned else 0,
            "device_bytes": device_bytes,
        }

    def close(self) -> None:
        try:
            self.core.close()
        finally:
            self.arena.close()


class MemoryHome:
    """Pages one behind the other in one arena."""

    def __init__(
        self,
        pages: Sequence[int],
        slots: Sequence[Tensor],
        place: Place,
        pin: bool | Literal["auto"],
        trace_events: int,
    ) -> None:
        self._pages = pages
        self._memory = _Memory(pages, ALIGNMENT, slots, place, pin, trace_events)
        self.engine: Engine = self._memory.core
        self.host_bytes = self._memory.nbytes
        self.pinned = self._memory.pinned

    def host(self, page: int) -> Tensor:
        return self._memory.arena.tensor(self._memory.offsets[page], self._pages[page], torch.uint8)

    def span(self, first: int, last: int) -> Tensor:
        sizes = self._pages[first:last]
        if not sizes or any(size % ALIGNMENT for size in sizes[:-1]):
            raise ValueError(
                f"Pager.host_span: pages {first} to {last} do not follow each other without a gap: sizes are {sizes}, "
                f"all but the last must be multiples of {ALIGNMENT}"
            )
        return self._memory.arena.tensor(self._memory.offsets[first], sum(sizes), torch.uint8)

    def read(self, page: int) -> Tensor:
        return self.host(page)

    def settle(self) -> None:
        self.engine.flush()

    def stats(self, device_bytes: int) -> PagerStats:
        return PagerStats(**self._memory.stats(device_bytes))

    def trace(self) -> list[TraceRecord]:
        return list(self._memory.core.trace())

    def close(self) -> None:
        self._memory.close()


class FileHome:
    """Pages in a file; in memory are one for each slot, one that is read ahead and one that is written behind."""

    def __init__(
        self,
        pages: Sequence[int],
        slots: Sequence[Tensor],
        place: Place,
        pin: bool | Literal["auto"],
        trace_events: int,
        state_dir: str | os.PathLike[str],
        reopen: bool,
    ) -> None:
        self._workers = Workers(SEGMENT_WORKERS, "chunkft-segments")
        try:
            file = PageFile(state_dir, pages, self._workers, reopen=reopen)
        except BaseException:
            self._workers.close()
            raise
        try:
            # The native pager's own pages are the buffers; each takes any page of the file.
            sizes = [max(pages)] * (len(slots) + SPARE_BUFFERS)
            self._memory = _Memory(sizes, BLOCK, slots, place, pin, trace_events)
            buffers = [
                self._memory.arena.buffer(offset, padded(max(pages))) for offset in self._memory.offsets
            ]
            self._staged = StagedEngine(file, self._memory.core, buffers, place, trace_events)
        except BaseException:
            file.close()
            self._workers.close()
            raise
        self._file = file
        self.engine: Engine = self._staged
        self.host_bytes = self._memory.nbytes
        self.pinned = self._memory.pinned

    def host(self, page: int) -> Tensor:
        return self._staged.host(page)

    def span(self, first: int, last: int) -> Tensor:
        raise ValueError(
            f"Pager.host_span: pages {first} to {last} are in a file, where there are gaps between them"
        )

    def read(self, page: int) -> Tensor:
        return self._staged.read(page)

    def settle(self) -> None:
        self._staged.settle()

    def stats(self, device_bytes: int) -> PagerStats:
        staged = self._staged
        return PagerStats(
            **self._memory.stats(device_bytes),
            file_reads=staged.reads,
            file_writes=staged.writes,
            file_read_bytes=staged.read_bytes,
            file_written_bytes=staged.written_bytes,
            file_stall_seconds=staged.stall_ns / 1e9,
            file_direct=self._file.direct,
            file_bytes=self._file.nbytes,
        )

    def trace(self) -> list[TraceRecord]:
        return sorted([*self._memory.core.trace(), *self._staged.trace], key=lambda record: record[4])

    def close(self) -> None:
        try:
            self._staged.close()
        finally:
            self._workers.close()
            self._memory.arena.close()
