"""What moves pages between host memory and slots, and what is known of a page of a file that is in memory."""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from chunkft.streaming.place import Fence

__all__ = ["DIRTY", "HOST", "IN_USE", "LOADING", "POISONED", "STORING", "Engine", "Entry", "Phase"]

HOST, LOADING, IN_USE, DIRTY, STORING, POISONED = "HOST", "LOADING", "IN_USE", "DIRTY", "STORING", "POISONED"


class Engine(Protocol):
    """The calls of the native pager that moving pages needs."""

    def prefetch(self, page: int) -> bool: ...
    def acquire(self, page: int, stream: int, *, load: bool) -> int: ...
    def release(self, page: int, stream: int, *, dirty: bool, keep: bool) -> None: ...
    def discard(self, page: int) -> None: ...
    def evict(self, page: int) -> None: ...
    def flush(self) -> None: ...
    def state(self, page: int) -> str: ...
    def host_is_canonical(self, page: int) -> bool: ...
    def close(self) -> None: ...


class Phase(Enum):
    READING = "reading"
    READY = "ready"
    WRITING = "writing"


@dataclass(eq=False)
class Entry:
    index: int
    fence: Fence  # behind all that may read the entry's memory for a slot
    page: int | None = None
    phase: Phase = Phase.READY
    held: bool = False  # acquired by the caller
    dirty: bool = False  # the file is older than this entry or its device copy
    valid: bool = False  # the entry's memory holds the page, not the leavings of another
    stamp: int = 0
    error: BaseException | None = None
