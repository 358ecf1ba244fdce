"""Pages of bytes that live in host memory and visit a few slots on a device, ordered on torch's streams."""

import json
import logging
import operator
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, SupportsIndex

import torch
from torch import Tensor

from chunkft.streaming.homes import FileHome, Home, MemoryHome
from chunkft.streaming.place import Place, place_of
from chunkft.streaming.stats import PagerStats, chrome_trace

__all__ = ["Pager"]

_log = logging.getLogger("chunkft")

# Another object in every child of a fork: quicker to compare than a process number is to be had. A child that Python
# does not know of is refused by the native pager, which asks for the number.
_family = object()


def _found_family() -> None:
    global _family
    _family = object()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_found_family)


class Pager:
    """Keeps `len(pages)` pages of bytes in host memory and brings them, few at a time, into slots on a device.

    `pages` gives the size of each page in bytes, at least 1. There are `slots` slots, each of the size of the
    largest page, allocated through torch on `device`, "cpu" or "cuda". All memory is taken at construction,
    that of the host zero-filled::

        with Pager([4096] * 8, device="cuda") as pager:
            for page in range(8):
                pager.prefetch((page + 1) % 8)               # starts the copy of the next page
                state = pager.acquire(page).view(torch.float32)
                state.add_(1)                                 # any work on the current stream
                pager.release(page)                           # starts the write-back, behind that work

    **The contract is ordered by streams, not by the host.** The current stream is torch's current stream on
    `device` at the time of the call; on the CPU it is the calling thread itself.

    - `acquire` returns a tensor over the slot. Work given to the current stream *afterwards* sees the page's
      content: the stream waits for the copy, the host does not (on the CPU, where the thread is the stream, it
      does).
    - `release` says that the work given to the current stream *so far* is the last that uses the tensor. The
      slot is written back, and taken for another page, only behind that work. A tensor must not be used after
      `release`. Where a page is used on several streams, let one wait for the others (`Stream.wait_stream`)
      and release on that one.
    - Copies run on two streams of the pager's own, one a direction, beside the caller's work.
    - The host copy of a page, `host(page)`, is the page except while it is acquired, or was changed and is not
      yet written back. `flush` makes it so for all pages that are not acquired. To write into the host copy,
      `discard` the page first; it is loaded from there the next time.
    - A page is acquired by one at a time. All methods may be called from any thread, and a page may be
      released by another thread than the one that acquired it. In a forked child every method raises
      RuntimeError; make a new pager there.

    If a load fails it may be tried again. If a write-back fails the page is poisoned: its slot is kept, `flush`
    and every use of the page raise RuntimeError naming it, until `discard` returns to the host copy. After an
    exception between `acquire` and `release`, call `release` to keep what was written or `discard` to return
    to the host copy; `close` discards pages that are still acquired.

    `pin` says whether host memory is page-locked, which copies to and from a GPU need to run at full speed
    without holding up the host: "auto" tries and otherwise warns once and goes on with pageable memory, True
    raises OSError or RuntimeError instead, False does not try. On the CPU nothing is locked.

    `state_dir` keeps the pages in a file in that directory, behind a ring of `slots + 2` pages of host memory;
    with `reopen` it takes up what a pager left there that was closed or flushed (see docs/streaming.md for
    what a crash leaves). `trace_events` is how many of the latest copies `trace` remembers; 0 times nothing.

    A pager is closed by `close`, at the end of a `with` block, when it is collected, or when the interpreter
    exits. Raises TypeError or ValueError naming the argument, its value and what is allowed, and OSError if
    the system gives no memory or the file system no room.
    """

    def __init__(
        self,
        pages: Sequence[SupportsIndex],
        *,
        device: torch.device | str | int = "cpu",
        slots: SupportsIndex = 2,
        pin: bool | Literal["auto"] = "auto",
        state_dir: str | os.PathLike[str] | None = None,
        reopen: bool = False,
        trace_events: SupportsIndex = 4096,
    ) -> None:
        self._pages = _page_sizes(pages)
        count = _integer("slots", slots, 1, 1024)
        events = _integer("trace_events", trace_events, 0, 1 << 24)
        place = place_of(device)
        _check_options(pin, place, state_dir, reopen)
        self._place = place
        self._family = _family
        self._process = os.getpid()
        self._slots = tuple(place.empty(max(self._pages)) for _ in range(count))
        # torch may have queued work on what was this memory, and our copies run on streams that it knows nothing of.
        place.synchronize()
        self._home: Home
        if state_dir is None:
            self._home = MemoryHome(self._pages, self._slots, place, pin, events)
        else:
            self._home = FileHome(self._pages, self._slots, place, pin, events, state_dir, reopen)
        _log.info(
            "pager: %d pages, %d bytes of host memory (%s), %d slots of %d bytes on %s",
            len(self._pages),
            self._home.host_bytes,
            "page-locked" if self._home.pinned else "pageable",
            count,
            self.slot_bytes,
            place.device,
        )
        # Also at exit, before torch and the threads are gone. Holds neither this object nor views of its memory.
        self._closer = weakref.finalize(self, _close, self._home, place, self._process)

    @property
    def pages(self) -> tuple[int, ...]:
        """Size of each page in bytes."""
        return self._pages

    @property
    def slots(self) -> int:
        """How many slots there are on the device."""
        return len(self._slots)

    @property
    def slot_bytes(self) -> int:
        """Size of a slot in bytes: that of the largest page."""
        return max(self._pages)

    @property
    def device(self) -> torch.device:
        """Where the slots are."""
        return self._place.device

    @property
    def pinned(self) -> bool:
        """Whether host memory is page-locked."""
        return self._home.pinned

    @property
    def closed(self) -> bool:
        """Whether the pager was closed."""
        return not self._closer.alive

    def prefetch(self, page: int) -> bool:
        """Start to bring a page into a slot; True if it is there or on its way.

        False, with nothing done, if every slot holds a page that is acquired, or prefetched and not acquired
        since. With a `state_dir` it is enough that the page is on its way into host
        memory. Raises ValueError for a page that does not exist, RuntimeError if the page is poisoned, the pager
        closed or the process forked, or the driver refuses.
        """
        self._check("prefetch", page)
        return self._home.engine.prefetch(page)

    def acquire(self, page: int, *, load: bool = True) -> Tensor:
        """Return the page as a uint8 tensor of shape (pages[page],) over its slot, for work given to the
        current stream from now on.

        With `load=False` a page that is not on the device is not copied: the tensor's content is undefined
        until the caller writes it. Raises ValueError if the page does not exist or is acquired, RuntimeError
        if it is poisoned, if every slot is in use, if the pager is closed or the process forked.
        """
        self._check("acquire", page)
        slot = self._home.engine.acquire(page, self._place.stream(), load=load)
        return self._slots[slot][: self._pages[page]]

    def release(self, page: int, *, dirty: bool = True, keep: bool = False) -> None:
        """Give an acquired page back, behind the work given to the current stream so far.

        `dirty=False` says that the page was not changed: nothing is written back. `keep=True` leaves the page
        in its slot, changes included, until the slot is needed (the page that was released first goes first)
        or `flush`; without it the write-back starts at once. Raises ValueError if the page is not acquired.
        """
        self._check("release", page)
        self._home.engine.release(page, self._place.stream(), dirty=dirty, keep=keep)

    def discard(self, page: int) -> None:
        """Forget the page's slot and all changes that were not yet written back: the host copy is the page."""
        self._check("discard", page)
        self._home.engine.discard(page)

    def evict(self, page: int) -> None:
        """Give up the slot of a page that is not acquired, behind its write-back if it was changed. On a
        poisoned page this tries the write-back again.
        """
        self._check("evict", page)
        self._home.engine.evict(page)

    def flush(self) -> None:
        """Write back every page that was changed and is not acquired, and wait until that is done; with a
        `state_dir`, until it is on the disk. Raises RuntimeError or OSError naming a page that was not written.
        """
        self._check("flush", 0)
        self._home.engine.flush()

    def host(self, page: int) -> Tensor:
        """Return the host copy of a page as a uint8 CPU tensor of shape (pages[page],) that shares its memory.

        The tensor outlives the pager. With a `state_dir` it is a map of the file, and what is written into it
        counts if it is written before the page is next prefetched, acquired or flushed. Raises RuntimeError if
        the host copy is not the page now: after `flush` it is, unless the page is acquired.
        """
        self._check("host", page)
        if not self._home.engine.host_is_canonical(page):
            raise RuntimeError(
                f"Pager.host: the host copy of page {page} is not up to date, the page is {self.state(page)};"
                " release it if it is acquired, then call flush()"
            )
        return self._home.host(page)

    def host_span(self, first: int, last: int) -> Tensor:
        """Return the host copies of pages [first, last), one behind the other, as one uint8 CPU tensor.

        Raises ValueError if they do not follow each other without a gap: all but the last must be of a multiple of 256
        bytes, and in memory. Raises RuntimeError as `host` does.
        """
        for page in range(first, last):
            self.host(page)
        return self._home.span(first, last)

    def read(self, page: int) -> Tensor:
        """Return what `host` does, at any moment at which the page is not acquired: what was changed is written
        back first. The tensor must not be written into; with a `state_dir` its checksum was compared.

        Raises RuntimeError if the page is acquired, RuntimeError or OSError if a page cannot be written back,
        CorruptPageError if the file does not hold what was written to it.
        """
        self._check("read", page)
        if not self._home.engine.host_is_canonical(page):
            self._home.settle()
            if not self._home.engine.host_is_canonical(page):
                raise RuntimeError(
                    f"Pager.read: page {page} is {self.state(page)}, its newest content is on the device only;"
                    " release it first"
                )
        return self._home.read(page)

    def state(self, page: int) -> str:
        """Return where a page is: HOST, LOADING, RESIDENT, IN_USE, DIRTY, STORING or POISONED."""
        self._check("state", page)
        return self._home.engine.state(page)

    def stats(self) -> PagerStats:
        """Return what was counted since construction; also of a closed pager. Waits for nothing."""
        self._check_process("stats")
        return self._home.stats(sum(slot.nbytes for slot in self._slots))

    def trace(self) -> dict[str, Any]:
        """Return the latest copies, and waits for them, in the Chrome trace event format; also of a closed
        pager.
        """
        self._check_process("trace")
        return chrome_trace(self._home.trace(), str(self.device))

    def save_trace(self, path: str | os.PathLike[str]) -> None:
        """Write `trace()` as JSON, to be opened in chrome://tracing or ui.perfetto.dev."""
        Path(path).write_text(json.dumps(self.trace()))

    def close(self) -> None:
        """Write back what was changed, wait for all copies and give the memory up; tensors keep theirs.

        Pages that are still acquired are discarded. Always ends closed; raises as `flush` does if a page could
        not be written. Closing twice does nothing.
        """
        self._check_process("close")
        self._closer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._pages)

    def __repr__(self) -> str:
        return (
            f"Pager({len(self._pages)} pages of at most {self.slot_bytes} bytes, {self.slots} slots on"
            f" {self.device}{', closed' if self.closed else ''})"
        )

    def _check(self, name: str, page: int) -> None:
        # For every page that moves: what is in order is found out without a system call.
        if (
            self._family is _family
            and self._closer.alive
            and type(page) is int
            and 0 <= page < len(self._pages)
        ):
            return
        self._check_process(name)
        if self.closed:
            raise RuntimeError(f"Pager.{name}: the pager is closed")
        if type(page) is not int:
            raise TypeError(f"Pager.{name}: page must be an int, got {page!r}")
        if not 0 <= page < len(self._pages):
            raise ValueError(f"Pager.{name}: page must be from 0 to {len(self._pages) - 1}, got {page}")

    def _check_process(self, name: str) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"Pager.{name}: the pager belongs to process {self._process} and this is its child"
                f" {os.getpid()}; make a new pager here"
            )


def _close(home: Home, place: Place, process: int) -> None:
    if os.getpid() != process:
        return
    try:
        home.close()
    finally:
        # The slots go back to torch, which may hand them out on a stream that does not wait for their last user.
        place.synchronize()


def _integer(name: str, value: SupportsIndex, least: int, most: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"Pager: {name} must be an integer, got {value!r}") from None
    if not least <= number <= most:
        raise ValueError(f"Pager: {name} must be from {least} to {most}, got {number}")
    return number


def _page_sizes(pages: Sequence[SupportsIndex]) -> tuple[int, ...]:
    if isinstance(pages, str | bytes) or not isinstance(pages, Sequence):
        raise TypeError(f"Pager: pages must be a sequence of sizes in bytes, got {pages!r}")
    if not pages:
        raise ValueError("Pager: pages must hold at least one size in bytes, got none")
    return tuple(_integer(f"pages[{i}]", size, 1, 1 << 62) for i, size in enumerate(pages))


def _check_options(pin: object, place: Place, state_dir: object, reopen: object) -> None:
    if pin not in (True, False, "auto"):
        raise ValueError(f"Pager: pin must be True, False or 'auto', got {pin!r}")
    if pin is True and place.backend == "host":
        raise ValueError(
            "Pager: pin=True needs a GPU, got device='cpu': page-locking serves copies to a GPU; allowed here"
            " are 'auto' and False"
        )
    if state_dir is not None and not isinstance(state_dir, str | os.PathLike):
        raise TypeError(f"Pager: state_dir must be a path or None, got {state_dir!r}")
    if not isinstance(reopen, bool):
        raise TypeError(f"Pager: reopen must be True or False, got {reopen!r}")
    if reopen and state_dir is None:
        raise ValueError("Pager: reopen=True needs state_dir, the directory that a pager was closed in")
