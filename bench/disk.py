"""Bandwidth of a disk by the ways that a file tier could take, and of the one that it takes; for bench.pager."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from chunkft.streaming import HostArena, Pager

MIB = 1 << 20


def files(directory: Path, nbytes: int, part: int = 8 * MIB) -> dict[str, dict[str, float]]:
    """GB/s of one thread, without checksums: direct, through the page cache and mapped; then the file tier."""
    room = HostArena(nbytes, pretouch=True)
    room.tensor(0, nbytes, torch.uint8).random_(0, 256)
    buffer = room.buffer(0, nbytes)
    path = directory / "bench-pager.bin"
    found: dict[str, dict[str, float]] = {}
    starts = range(0, nbytes, part)

    def timed(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return nbytes / (time.perf_counter() - start) / 1e9

    for name, flag in (("buffered", 0), ("direct", getattr(os, "O_DIRECT", 0))):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | flag)
        try:
            os.posix_fallocate(fd, 0, nbytes)
            for _ in range(2):  # the first pass writes into new blocks

                def write(fd: int = fd) -> None:
                    for start in starts:
                        os.pwrite(fd, buffer[start : start + part], start)
                    os.fdatasync(fd)

                def read(fd: int = fd) -> None:
                    for start in starts:
                        os.preadv(fd, [buffer[start : start + part]], start)

                found[name] = {"write": timed(write)}
                os.posix_fadvise(fd, 0, nbytes, os.POSIX_FADV_DONTNEED)
                found[name]["read"] = timed(read)
        finally:
            os.close(fd)
    fd = os.open(path, os.O_RDWR)
    try:
        mapped = torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.uint8)
        memory = room.tensor(0, nbytes, torch.uint8)

        def write_mapped() -> None:
            mapped.copy_(memory)
            os.fdatasync(fd)

        os.posix_fadvise(fd, 0, nbytes, os.POSIX_FADV_DONTNEED)
        found["mapped"] = {"read": timed(lambda: memory.copy_(mapped))}
        found["mapped"]["write"] = timed(write_mapped)
    finally:
        os.close(fd)
        path.unlink()
    found["file_tier"] = file_tier(directory, nbytes)
    return found


def file_tier(directory: Path, nbytes: int) -> dict[str, float]:
    """GB/s of a pager over a file, checksums included: written and synced, read ahead, and both at once."""
    pages = 16
    page = nbytes // pages
    state = directory / "bench-pager-state"
    with Pager([page] * pages, state_dir=state, slots=2) as pager:

        def write() -> None:
            for index in range(pages):
                pager.acquire(index, load=False)
                pager.release(index)
            pager.flush()

        def read() -> None:
            for index in range(pages):
                pager.prefetch((index + 1) % pages)
                pager.acquire(index)
                pager.release(index, dirty=False)

        def both() -> None:
            for index in range(pages):
                pager.prefetch((index + 1) % pages)
                pager.acquire(index)
                pager.release(index)
            pager.flush()

        def timed(work: Callable[[], object], count: int) -> float:
            start = time.perf_counter()
            work()
            return count * nbytes / (time.perf_counter() - start) / 1e9

        write()
        found = {"write": timed(write, 1), "read": timed(read, 1), "both": timed(both, 2)}
    for path in state.iterdir():
        path.unlink()
    state.rmdir()
    return found
