"""Pages of a file behind a bounded ring of host memory: what `Pager(state_dir=...)` runs on."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from threading import Condition
from typing import Any

import torch
from torch import Tensor

from chunkft.streaming.engine import DIRTY, HOST, IN_USE, LOADING, POISONED, STORING, Engine, Entry, Phase
from chunkft.streaming.files import PageFile
from chunkft.streaming.place import Place
from chunkft.streaming.stats import TraceRecord
from chunkft.streaming.workers import Workers

__all__ = ["StagedEngine"]

# A write-back takes milliseconds, the write to the disk behind it longer.
POLL_SECONDS = 2e-4


class StagedEngine:
    """Moves pages between a file and a ring of host buffers, and from there through a native pager whose own
    pages are the buffers.

    `buffers` are the ring: more of them than the native pager has slots. Checksums are taken and compared by
    worker threads while pages are read and written, never by the caller.
    """

    def __init__(
        self, file: PageFile, core: Engine, buffers: Sequence[memoryview], place: Place, trace_events: int
    ) -> None:
        self._file = file
        self._core = core
        self._buffers = buffers
        self._place = place
        self._entries = [Entry(index, place.fence()) for index in range(len(buffers))]
        self._entry_of: dict[int, Entry] = {}
        self._exposed: set[int] = set()
        self._closing = False
        self._releasing = 0  # calls whose changes `close` has to wait for
        self._acquiring = 0  # calls that may take the slot of another page
        self._changed = Condition()
        self._clock = 0
        # One reads ahead while the other writes behind.
        self._jobs = Workers(2, "chunkft-pages")
        self.trace: deque[TraceRecord] = deque(maxlen=trace_events)
        self.reads = self.writes = self.read_bytes = self.written_bytes = self.stall_ns = 0

    def prefetch(self, page: int) -> bool:
        """Start to bring a page into host memory, and from there into a slot; False if neither has room."""
        with self._changed:
            self._check_open("prefetch")
            self._raise_failure()
            self._write_behind()
            entry = self._entry_of.get(page)
            if entry is not None and entry.phase is not Phase.READING:
                return bool(self._call(entry, self._core.prefetch, entry.index))
            if entry is None:
                entry = self._room()
                if entry is None:
                    return False
                self._read_ahead(entry, page)
            return True

    def acquire(self, page: int, stream: int, *, load: bool) -> int:
        """Return the slot of a page, waiting for the file if it was not prefetched in time."""
        with self._changed:
            self._check_open("acquire")
            self._raise_failure()
            entry = self._settled(page, load)
            if entry.held:
                raise ValueError(f"Pager.acquire: page {page} is acquired; release it first")
            entry.held = True
            self._touch(entry)
            self._acquiring += 1
        try:
            return int(self._call(entry, self._core.acquire, entry.index, stream, load=load))
        except BaseException:
            with self._changed:
                entry.held = False
                self._forget_unless_used(entry)
            raise
        finally:
            with self._changed:
                self._acquiring -= 1
                self._changed.notify_all()

    def release(self, page: int, stream: int, *, dirty: bool, keep: bool) -> None:
        """Give an acquired page back."""
        with self._changed:
            self._check_open("release")
            entry = self._entry_of.get(page)
            if entry is None or not entry.held:
                raise ValueError(f"Pager.release: page {page} is not acquired; acquire it first")
            self._releasing += 1
        try:
            # A clean page leaves no write-back to wait for, but its load may still be on its way.
            entry.fence.record()
            self._call(entry, self._core.release, entry.index, stream, dirty=dirty, keep=keep)
            with self._changed:
                entry.held = False
                entry.dirty |= dirty
                self._forget_unless_used(entry)
                self._write_behind()
        finally:
            with self._changed:
                self._releasing -= 1
                self._changed.notify_all()

    def discard(self, page: int) -> None:
        """Forget the device copy of a page, and what was never stored from there."""
        with self._changed:
            self._check_open("discard")
            self._write_behind()
            while (entry := self._entry_of.get(page)) is not None and entry.phase is not Phase.READY:
                self._wait("discard")
            if entry is None:
                return
            if self._core.state(entry.index) == LOADING:
                self._call(entry, self._core.acquire, entry.index, self._place.stream())
            self._call(entry, self._core.discard, entry.index)
            # The load that brought it may still read the entry's memory, on a stream that nobody waited for.
            self._place.synchronize()
            entry.held = False
            if not (entry.dirty and entry.valid):
                self._forget(entry)
            self._changed.notify_all()

    def evict(self, page: int) -> None:
        """Give up the slot of a page; its changes go on to the file."""
        with self._changed:
            self._check_open("evict")
            while (entry := self._entry_of.get(page)) is not None and entry.phase is Phase.READING:
                self._wait("evict")
            if entry is None:
                return
            self._call(entry, self._core.evict, entry.index)
            self._write_behind()

    def flush(self) -> None:
        """Bring every page that is not acquired into the file, and the file to the disk."""
        with self._changed:
            self._check_open("flush")
        self._flush(closing=False)

    def settle(self) -> None:
        """Bring every page that is not acquired into the file; the system may still have it in memory."""
        with self._changed:
            self._check_open("read")
        self._core.flush()
        with self._changed:
            self._settle(closing=False)

    def _flush(self, *, closing: bool) -> None:
        self._core.flush()
        with self._changed:
            self._settle(closing)
            for page in list(self._exposed):
                self._seal(page)
            self._file.commit()

    def _settle(self, closing: bool) -> None:
        for entry in self._entries:
            if entry.dirty:
                entry.error = None
        while True:
            self._write_behind()
            if all(entry.phase is Phase.READY for entry in self._entries):
                break
            if closing:
                self._changed.wait()
            else:
                self._wait("flush")
        self._raise_failure()

    def host_is_canonical(self, page: int) -> bool:
        """Whether the file holds the page's newest content."""
        with self._changed:
            self._check_open("host")
            self._write_behind()
            entry = self._entry_of.get(page)
            return entry is None or not (entry.held or entry.dirty or entry.phase is Phase.WRITING)

    def host(self, page: int) -> Tensor:
        """Return the page's bytes in the file as a tensor."""
        with self._changed:
            self._check_open("host")
            while (entry := self._entry_of.get(page)) is not None and entry.phase is not Phase.READY:
                self._wait("host")
            if entry is not None and self._idle(entry):
                self._forget(entry)
            self._file.open_for_change()
            tensor = self._mapped(page)
            self._exposed.add(page)
        return tensor

    def read(self, page: int) -> Tensor:
        """Return the page's bytes in the file, to be read only, after a look at their checksum."""
        with self._changed:
            self._check_open("read")
            tensor = self._mapped(page)
            if page in self._exposed:
                self._seal(page)
            self._file.check(page)
        return tensor

    def state(self, page: int) -> str:
        """Where a page is: as the native pager says, with the file taken for the host."""
        with self._changed:
            self._check_open("state")
            entry = self._entry_of.get(page)
            if entry is None:
                return HOST
            if entry.phase is Phase.READING:
                return LOADING
            state = self._core.state(entry.index)
            return STORING if state == HOST and (entry.dirty or entry.phase is Phase.WRITING) else state

    def close(self) -> None:
        """Write back what was changed, discard what is acquired, and give up file and threads whatever happens."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while self._releasing:
                self._changed.wait()
        try:
            self._flush(closing=True)
        finally:
            self._jobs.close()
            try:
                self._core.close()
            finally:
                self._file.close()
                # They would keep the memory that is given up now.
                self._buffers = ()

    def _check_open(self, method: str) -> None:
        if self._closing:
            raise RuntimeError(f"Pager.{method}: the pager is closed")

    def _wait(self, method: str) -> None:
        """Wait for something to happen; raises if that is the end of the pager."""
        self._changed.wait()
        self._check_open(method)

    def _settled(self, page: int, load: bool) -> Entry:
        """The entry of a page once neither reads nor writes of the file need it."""
        start = time.perf_counter_ns()
        try:
            while True:
                self._write_behind()
                entry = self._entry_of.get(page)
                if entry is not None and entry.error is not None and not entry.valid:
                    error = entry.error
                    self._forget(entry)
                    raise error
                if entry is not None and (entry.held or entry.phase is Phase.READY):
                    return entry
                if entry is None and (room := self._room()) is not None:
                    if load:
                        self._read_ahead(room, page)
                    else:
                        self._assign(room, page)
                    continue
                moving = self._releasing or self._acquiring  # other threads, which may make room
                if not moving and all(other.phase is Phase.READY for other in self._entries):
                    self._raise_failure()
                    raise RuntimeError(
                        f"Pager.acquire: no room for page {page}: all slots and buffers are in use"
                    )
                self._wait("acquire")
        finally:
            self.stall_ns += time.perf_counter_ns() - start

    def _room(self) -> Entry | None:
        """The entry that was used longest ago, of those that neither slot nor file needs."""
        free = [entry for entry in self._entries if entry.page is None or self._idle(entry)]
        if not free:
            return None
        entry = min(free, key=lambda entry: (entry.page is not None, entry.stamp))
        self._forget(entry)
        return entry

    def _idle(self, entry: Entry) -> bool:
        return (
            entry.phase is Phase.READY
            and not (entry.held or entry.dirty)
            and self._core.state(entry.index) == HOST
        )

    def _assign(self, entry: Entry, page: int) -> None:
        entry.page = page
        self._entry_of[page] = entry
        self._touch(entry)

    def _forget(self, entry: Entry) -> None:
        if entry.page is not None:
            del self._entry_of[entry.page]
        entry.page = entry.error = None
        entry.valid = entry.dirty = False

    def _forget_unless_used(self, entry: Entry) -> None:
        if not entry.valid and not entry.dirty:
            self._forget(entry)

    def _touch(self, entry: Entry) -> None:
        self._clock += 1
        entry.stamp = self._clock

    def _read_ahead(self, entry: Entry, page: int) -> None:
        self._assign(entry, page)
        entry.phase = Phase.READING
        submitted = time.monotonic_ns()
        self._submit(entry, lambda: self._read(entry, page, submitted))

    def _read(self, entry: Entry, page: int, submitted: int) -> None:
        start = time.monotonic_ns()
        error: BaseException | None = None
        try:
            self._quiet(entry)
            with self._changed:
                if page in self._exposed:
                    self._seal(page)
            self._file.read(page, self._buffers[entry.index])
        except BaseException as caught:
            error = caught
        with self._changed:
            self._record("read", page, submitted, start)
            entry.error = error
            entry.valid = error is None
            entry.phase = Phase.READY
            if error is None:
                self.reads += 1
                self.read_bytes += self._file.sizes[page]
                self._into_slot(entry)
            self._changed.notify_all()

    def _into_slot(self, entry: Entry) -> None:
        try:
            self._core.prefetch(entry.index)
        except (RuntimeError, OSError):
            # acquire() tries again, and raises to the one who asked for the page.
            return

    def _quiet(self, entry: Entry) -> None:
        """Wait until no copy reads or writes the entry's memory."""
        entry.fence.synchronize()
        while not self._core.host_is_canonical(entry.index):
            if self._core.state(entry.index) == POISONED:
                self._core.prefetch(entry.index)  # raises, saying why
            time.sleep(POLL_SECONDS)

    def _write_behind(self) -> None:
        """Start to write each page whose newest content is, or is about to be, in host memory."""
        for entry in self._entries:
            if not entry.dirty or entry.held or entry.error is not None or entry.phase is not Phase.READY:
                continue
            if self._core.state(entry.index) in (DIRTY, IN_USE, POISONED):
                continue
            entry.phase = Phase.WRITING
            entry.dirty = False
            entry.valid = True
            submitted = time.monotonic_ns()
            self._submit(entry, partial(self._write, entry, submitted))

    def _write(self, entry: Entry, submitted: int) -> None:
        assert entry.page is not None
        start = time.monotonic_ns()
        error: BaseException | None = None
        try:
            self._quiet(entry)
            start = time.monotonic_ns()
            self._file.write(entry.page, self._buffers[entry.index])
        except BaseException as caught:
            error = caught
        with self._changed:
            self._record("write", entry.page, submitted, start)
            entry.phase = Phase.READY
            entry.error = error
            entry.dirty = error is not None
            if error is None:
                self.writes += 1
                self.written_bytes += self._file.sizes[entry.page]
            self._changed.notify_all()

    def _submit(self, entry: Entry, job: Callable[[], None]) -> None:
        def run() -> None:
            try:
                job()
            except BaseException as error:  # whatever it is: somebody waits for this entry
                with self._changed:
                    entry.dirty |= entry.phase is Phase.WRITING
                    entry.phase = Phase.READY
                    entry.error = error
                    self._changed.notify_all()

        self._jobs.submit(run)

    def _record(self, kind: str, page: int, submitted: int, start: int) -> None:
        self.trace.append((kind, page, 0, self._file.sizes[page], submitted, start, time.monotonic_ns()))

    def _mapped(self, page: int) -> Tensor:
        room, offset = self._file.map(page)
        with torch.inference_mode(False):
            return torch.frombuffer(room, dtype=torch.uint8, offset=offset, count=self._file.sizes[page])

    def _seal(self, page: int) -> None:
        self._file.seal(page)
        self._exposed.discard(page)

    def _raise_failure(self) -> None:
        for entry in self._entries:
            if entry.error is not None and entry.dirty:
                raise entry.error

    def _call(self, entry: Entry, function: Any, *arguments: Any, **named: Any) -> Any:
        """Calls the native pager, whose errors name the buffer instead of the page."""
        try:
            return function(*arguments, **named)
        except (RuntimeError, OSError, ValueError) as error:
            raise type(error)(f"page {entry.page} of {self._file.path}: {error}") from error
