"""Pages of odd sizes in a file, and a directory that holds them, for the tests of the file tier."""

from chunkft.streaming import Pager
from chunkft.streaming.files import BLOCK, padded

SIZES = [5000, 70_000, 1, 4096, 300_000, 64, 4097, 12_000]


def offset_of(page: int) -> int:
    """Where the bytes of a page start in the file."""
    return BLOCK + sum(BLOCK + padded(size) for size in SIZES[:page]) + BLOCK


def write_all(pager: Pager, value: int) -> None:
    for page in range(len(pager)):
        pager.acquire(page, load=False).fill_(value + page)
        pager.release(page)


def read_all(pager: Pager) -> list[set[int]]:
    found = []
    for page in range(len(pager)):
        found.append(set(pager.acquire(page).tolist()))
        pager.release(page, dirty=False)
    return found


def push_out(pager: Pager, page: int) -> None:
    """Leave no copy of a page in host memory: after a flush, the ring gives up what was used longest ago."""
    pager.flush()
    for other in range(len(pager)):
        if other != page:
            pager.acquire(other)
            pager.release(other, dirty=False)
