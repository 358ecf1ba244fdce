"""Pages in one preallocated file: checksums and generations, a lock, and a mark that tells a torn file.

Layout, all little-endian, every part starting on 4096 bytes: a superblock, then for each page a header block
and the page's bytes. A page's header is written after its bytes; the superblock is marked as open before the
first write that follows a `commit`, and as whole by `commit`, each time behind a sync. So whatever a crash
leaves is either whole or known to be torn.
"""

import errno
import fcntl
import mmap
import os
import struct
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from chunkft.streaming.workers import Workers

__all__ = ["BLOCK", "CorruptPageError", "PageFile", "padded"]

NAME = "pages.chunkft"
BLOCK = 4096
SEGMENT = 8 << 20
_MAGIC = b"CHUNKFT\x01"
_PAGE_MAGIC = b"CFTPAGE\x01"
# magic, pages, process, whole, generation, checksums of the sizes, of the page generations, of this record
_SUPER = struct.Struct("<8sQQQQIII")
# magic, page, bytes, generation, checksum of the bytes, of this record
_PAGE = struct.Struct("<8sQQQII")
_open_files: "weakref.WeakSet[PageFile]" = weakref.WeakSet()


class CorruptPageError(RuntimeError):
    """A page file does not hold what was written to it; `path` and `page` (None: the file as a whole) say where."""

    def __init__(self, path: Path, page: int | None, what: str) -> None:
        self.path = path
        self.page = page
        where = f"{path}" if page is None else f"page {page} of {path}"
        super().__init__(f"{where} {what}")


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to whole blocks."""
    return -(-nbytes // BLOCK) * BLOCK


def file_nbytes(sizes: Sequence[int]) -> int:
    """Bytes of a file for pages of these sizes: a superblock, then a header and whole blocks for each page."""
    return BLOCK + sum(BLOCK + padded(size) for size in sizes)


class PageFile:
    """The file of `sizes` pages in `directory`, made anew with zero-filled pages, or with `reopen` taken up as
    its last `commit` left it.

    Buffers that are read into or written from start on a multiple of 4096 bytes and hold `padded` bytes. Input
    and output bypass the page cache where the file system allows it (`direct`).

    Raises OSError (ENOSPC) before anything is changed if the file system has too little room; RuntimeError if
    another process or pager has the directory open; ValueError if the file is not one of these, or with
    `reopen` has other sizes; CorruptPageError if with `reopen` it is torn, truncated or damaged.
    """

    def __init__(
        self, directory: str | os.PathLike[str], sizes: Sequence[int], workers: Workers, *, reopen: bool
    ) -> None:
        # A relative path must mean the same directory when the process has gone to another one.
        self.path = Path(os.path.abspath(directory)) / NAME
        self.sizes = tuple(sizes)
        self._workers = workers
        self._offsets: list[int] = []
        end = BLOCK
        for size in self.sizes:
            self._offsets.append(end)
            end += BLOCK + padded(size)
        self.nbytes = file_nbytes(self.sizes)
        self._generations = [0] * len(self.sizes)
        self._checksums = [0] * len(self.sizes)
        self._generation = 0
        self._whole = False
        self._data = -1
        self._map: weakref.ref[mmap.mmap] | None = None
        self._checked: dict[int, int] = {}  # generation of each page that `check` has read through this map
        if not reopen:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        elif not self.path.exists():
            raise FileNotFoundError(errno.ENOENT, f"state_dir={str(directory)!r} holds no {NAME} to reopen")
        # This descriptor has the lock; it goes through the page cache, for headers and maps.
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._lock()
            _open_files.add(self)
            if reopen:
                self._take_up()
            else:
                self._create()
            self._data, self.direct = _data_descriptor(self.path)
        except BaseException:
            self.close()
            raise

    def read(self, page: int, buffer: memoryview) -> None:
        """Fill `buffer` with a page; raises CorruptPageError if it is not what was written, OSError if it
        cannot be read.
        """
        size = self.sizes[page]
        if self._generations[page] == 0:
            self._zero(buffer[:size])
            return
        parts = self._workers.map(lambda start: self._read_segment(page, start, buffer), self._segments(page))
        found = _sum_up(parts)
        self._compare(page, found)

    def write(self, page: int, buffer: memoryview) -> None:
        """Write a page from `buffer`; raises OSError naming the file if that fails, and may be tried again."""
        self.open_for_change()
        self._generation += 1
        generation = self._generation
        parts = self._workers.map(
            lambda start: self._write_segment(page, start, buffer), self._segments(page)
        )
        self._seal(page, generation, _sum_up(parts))

    def map(self, page: int) -> tuple[mmap.mmap, int]:
        """Return a shared map of the file, and where in it the page's bytes start; what is written there counts
        once `seal` is called. Raises CorruptPageError if the file is shorter than that.
        """
        self._check_length(page)
        offset = self._offsets[page] + BLOCK
        # One for all pages, as each map keeps a descriptor; and none for longer than somebody uses it.
        room = None if self._map is None else self._map()
        if room is None or len(room) < offset + padded(self.sizes[page]):
            # Not of the descriptor with the lock, which the map would keep for as long as a tensor is left.
            room = mmap.mmap(self._data, 0)
            self._map = weakref.ref(room)
            self._checked.clear()
        return room, offset

    def check(self, page: int) -> None:
        """Raise CorruptPageError if the bytes that `map` shows are not what was written."""
        generation = self._generations[page]
        if self._checked.get(page) == generation:
            return
        self._check_length(page)
        if generation:
            self._compare(
                page,
                _sum_up(
                    self._workers.map(lambda start: self._sum_segment(page, start), self._segments(page))
                ),
            )
        self._checked[page] = generation

    def seal(self, page: int) -> None:
        """Take what is in the file now as the page's content."""
        self.open_for_change()
        self._generation += 1
        generation = self._generation
        parts = self._workers.map(lambda start: self._sum_segment(page, start), self._segments(page))
        self._seal(page, generation, _sum_up(parts))

    def open_for_change(self) -> None:
        """Mark the file as torn until the next `commit`."""
        if self._whole:
            self._write_super(whole=False)

    def commit(self) -> None:
        """Make all that was written durable, and mark the file as whole."""
        if not self._whole:
            os.fdatasync(self._fd)
            self._write_super(whole=True)

    def close(self) -> None:
        """Close the file and give up its lock; what was not committed stays marked as torn."""
        for fd in (self._data, self._fd):
            if fd >= 0:
                os.close(fd)
        self._data = self._fd = -1

    def _compare(self, page: int, found: int) -> None:
        if found != self._checksums[page]:
            raise CorruptPageError(
                self.path,
                page,
                f"is damaged: its {self.sizes[page]} bytes have checksum {found:08x}, but"
                f" {self._checksums[page]:08x} was written",
            )

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            owner = self._parse_super(os.pread(self._fd, BLOCK, 0))
            who = "another run" if owner is None else f"process {owner[2]}"
            raise RuntimeError(
                f"state_dir={str(self.path.parent)!r} is in use by {who}; give each run a directory of its own"
            ) from None

    def _create(self) -> None:
        status = os.fstat(self._fd)
        if status.st_size and self._parse_super(os.pread(self._fd, BLOCK, 0)) is None:
            raise ValueError(f"{self.path} exists and is no page file of chunkft; it is left as it is")
        room = os.fstatvfs(self._fd)
        available = room.f_bavail * room.f_frsize + status.st_blocks * 512
        if available < self.nbytes:
            if status.st_size == 0:
                os.unlink(self.path)
            self._no_room(available)
        os.ftruncate(self._fd, 0)
        try:
            os.posix_fallocate(self._fd, 0, self.nbytes)
        except OSError as error:
            os.unlink(self.path)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self._no_room(available, error)
            raise
        self._write_super(whole=True)

    def _no_room(self, available: int, cause: OSError | None = None) -> NoReturn:
        why = "" if cause is None else f": {cause.strerror}"
        raise OSError(
            errno.ENOSPC if cause is None else cause.errno,
            f"state_dir={str(self.path.parent)!r} must have room for {self.nbytes} bytes, {available} are free{why}",
        )

    def _take_up(self) -> None:
        found = self._parse_super(os.pread(self._fd, BLOCK, 0))
        if found is None:
            if os.fstat(self._fd).st_size == 0:
                raise CorruptPageError(self.path, None, "is empty")
            raise ValueError(f"{self.path} is no page file of chunkft, or its first block is damaged")
        _, count, _, whole, generation, sizes, generations, _ = found
        if count != len(self.sizes) or sizes != self._layout_sum():
            raise ValueError(
                f"{self.path} holds {count} pages of other sizes than the {len(self.sizes)} that were asked for"
            )
        if not whole:
            raise CorruptPageError(
                self.path,
                None,
                "is torn: its run ended without close() or flush() after pages were changed, so that they"
                " stem from different moments. Start anew without reopen and load a checkpoint",
            )
        for page in range(count):
            self._check_length(page)
            self._take_up_page(page)
        if generations != self._generations_sum() or generation < max(self._generations):
            raise CorruptPageError(self.path, None, "has pages that were written after its last commit")
        self._generation = generation
        self._write_super(whole=True)

    def _take_up_page(self, page: int) -> None:
        block = os.pread(self._fd, BLOCK, self._offsets[page])
        if not any(block):
            return
        record = block[: _PAGE.size]
        magic, number, size, generation, checksum, own = _PAGE.unpack(record)
        if magic != _PAGE_MAGIC or own != zlib.crc32(record[:-4]):
            raise CorruptPageError(self.path, page, "has a damaged header")
        if number != page or size != self.sizes[page]:
            raise CorruptPageError(self.path, page, f"has the header of page {number} with {size} bytes")
        self._generations[page], self._checksums[page] = generation, checksum

    def _check_length(self, page: int) -> None:
        end = self._offsets[page] + BLOCK + padded(self.sizes[page])
        length = os.fstat(self._fd).st_size
        if length < end:
            raise CorruptPageError(
                self.path, page, f"is cut off: it ends at byte {end}, the file at {length}"
            )

    def _segments(self, page: int) -> range:
        return range(0, padded(self.sizes[page]), SEGMENT)

    def _read_segment(self, page: int, start: int, buffer: memoryview) -> int:
        stop = min(start + SEGMENT, padded(self.sizes[page]))
        done = start
        while done < stop:
            got = os.preadv(self._data, [buffer[done:stop]], self._offsets[page] + BLOCK + done)
            if got == 0:
                raise CorruptPageError(self.path, page, f"ends after {done} of {self.sizes[page]} bytes")
            done += got
        return zlib.crc32(buffer[start : min(stop, self.sizes[page])])

    def _sum_segment(self, page: int, start: int) -> int:
        stop = min(start + SEGMENT, self.sizes[page])
        checksum = 0
        while start < stop:
            part = os.pread(self._fd, min(stop - start, 1 << 20), self._offsets[page] + BLOCK + start)
            if not part:
                raise CorruptPageError(self.path, page, f"ends after {start} of {self.sizes[page]} bytes")
            checksum = zlib.crc32(part, checksum)
            start += len(part)
        return checksum

    def _write_segment(self, page: int, start: int, buffer: memoryview) -> int:
        stop = min(start + SEGMENT, padded(self.sizes[page]))
        # First the checksum: the bytes are in the cache afterwards, and the write follows it.
        checksum = zlib.crc32(buffer[start : min(stop, self.sizes[page])])
        done = start
        while done < stop:
            try:
                done += os.pwrite(self._data, buffer[done:stop], self._offsets[page] + BLOCK + done)
            except OSError as error:
                raise OSError(
                    error.errno, f"page {page} could not be written to {self.path}: {error.strerror}"
                ) from error
        return checksum

    def _seal(self, page: int, generation: int, checksum: int) -> None:
        record = _PAGE.pack(_PAGE_MAGIC, page, self.sizes[page], generation, checksum, 0)[:-4]
        block = (record + struct.pack("<I", zlib.crc32(record))).ljust(BLOCK, b"\0")
        self._write_block(block, self._offsets[page])
        self._generations[page], self._checksums[page] = generation, checksum

    def _write_super(self, *, whole: bool) -> None:
        record = _SUPER.pack(
            _MAGIC,
            len(self.sizes),
            os.getpid(),
            whole,
            self._generation,
            self._layout_sum(),
            self._generations_sum(),
            0,
        )[:-4]
        self._write_block((record + struct.pack("<I", zlib.crc32(record))).ljust(BLOCK, b"\0"), 0)
        os.fdatasync(self._fd)
        self._whole = whole

    def _write_block(self, block: bytes, offset: int) -> None:
        if os.pwrite(self._fd, block, offset) != len(block):
            raise OSError(errno.EIO, f"{self.path}: a block at byte {offset} was written in part only")

    def _layout_sum(self) -> int:
        return zlib.crc32(struct.pack(f"<{len(self.sizes)}Q", *self.sizes))

    def _generations_sum(self) -> int:
        return zlib.crc32(struct.pack(f"<{len(self._generations)}Q", *self._generations))

    @staticmethod
    def _parse_super(block: bytes) -> tuple[bytes, int, int, int, int, int, int, int] | None:
        record = block[: _SUPER.size]
        if len(record) < _SUPER.size or zlib.crc32(record[:-4]) != struct.unpack("<I", record[-4:])[0]:
            return None
        fields = _SUPER.unpack(record)
        return fields if fields[0] == _MAGIC else None

    @staticmethod
    def _zero(buffer: memoryview) -> None:
        zeros = bytes(min(len(buffer), 1 << 20))
        for start in range(0, len(buffer), len(zeros)):
            part = buffer[start : start + len(zeros)]
            part[:] = zeros[: len(part)]


def _sum_up(parts: Sequence[int]) -> int:
    """One checksum of those of the segments."""
    return zlib.crc32(struct.pack(f"<{len(parts)}I", *parts))


def _data_descriptor(path: Path) -> tuple[int, bool]:
    """A descriptor for the pages' bytes, and whether it bypasses the page cache."""
    if hasattr(os, "O_DIRECT"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            with mmap.mmap(-1, BLOCK) as room:
                try:
                    os.preadv(fd, [memoryview(room)], 0)
                    return fd, True
                except OSError as error:
                    os.close(fd)
                    if error.errno != errno.EINVAL:
                        raise
    return os.open(path, os.O_RDWR | os.O_CLOEXEC), False


def _let_go_in_child() -> None:
    # flock belongs to the open file, which a child shares: it would keep the lock of a parent that is gone.
    for file in list(_open_files):
        file.close()


os.register_at_fork(after_in_child=_let_go_in_child)
