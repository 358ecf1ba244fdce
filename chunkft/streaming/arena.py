"""Host memory of exact size, handed out as tensors."""

import math
import operator
from collections.abc import Sequence
from types import TracebackType
from typing import Self, SupportsIndex

import torch
from torch.utils.dlpack import from_dlpack

try:
    from chunkft import _core as _core  # handed on to homes.py
except ImportError as error:
    raise ImportError(
        "chunkft's native module chunkft._core is missing or was built for another Python; "
        "build it with `pip install -e .` in the source tree, or install chunkft anew"
    ) from error

cuda_info = _core.cuda_info
memory_budget = _core.memory_budget
_QUANTIZED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})


class HostArena:
    """Zero-filled, page-aligned host memory of `nbytes` bytes, handed out as CPU tensors.

    The memory is mapped apart from malloc and rounded up to whole pages only (one at least). From 2 MiB up
    it starts on a 2 MiB boundary and asks for transparent huge pages, unless `huge_pages=False`. Pages are
    committed on first use; `pretouch=True` commits them at once with `threads` threads (0: one a core, at
    most 16). `within_budget=True` refuses to take more than the machine, or the container it is in, has left.

    Every tensor, and every view of it, keeps the memory alive: it is unmapped when the arena is closed, or
    collected, and the last of them is gone. All methods may be called from any thread.

    Raises TypeError or ValueError if `nbytes` or `threads` is not an integer in range, and OSError (with
    `errno`) if the system does not give the memory.
    """

    def __init__(
        self,
        nbytes: SupportsIndex,
        *,
        huge_pages: bool = True,
        pretouch: bool = False,
        threads: SupportsIndex = 0,
        within_budget: bool = False,
    ) -> None:
        self._arena = _core.HostArena(
            nbytes, huge_pages=huge_pages, pretouch=pretouch, threads=threads, within_budget=within_budget
        )

    @property
    def nbytes(self) -> int:
        """Usable size in bytes, as it was asked for."""
        return self._arena.nbytes

    @property
    def capacity(self) -> int:
        """Mapped size in bytes: `nbytes` rounded up to whole pages, at least one page."""
        return self._arena.capacity

    @property
    def huge_pages(self) -> bool:
        """Whether the kernel accepted the request for transparent huge pages."""
        return self._arena.huge_pages

    @property
    def closed(self) -> bool:
        """Whether `close()` was called."""
        return self._arena.closed

    @property
    def page_locked(self) -> bool:
        """Whether the memory is page-locked, and the arena open."""
        return self._arena.page_locked

    def page_lock(self, device: SupportsIndex = 0) -> None:
        """Page-lock the memory for copies to and from CUDA device `device`, until it is unmapped.

        Raises RuntimeError if there is no CUDA driver, if it refuses (the memory is pageable then, as before),
        or if the memory is locked already.
        """
        self._arena.page_lock(device)

    def tensor(
        self, offset: SupportsIndex, shape: Sequence[int] | SupportsIndex, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return a contiguous CPU tensor of `shape` and `dtype` over the bytes that start at `offset`.

        Two tensors over the same bytes share memory but neither a storage nor a version counter: autograd
        does not notice when one changes what the other saved.

        Raises TypeError or ValueError if an argument is of the wrong kind, if `offset` is not a multiple of
        the size of an element, or if the tensor would not end within `nbytes`; RuntimeError if the arena is
        closed.
        """
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"HostArena.tensor: dtype must be a torch.dtype, got {dtype!r}")
        if dtype in _QUANTIZED:
            raise ValueError(f"HostArena.tensor: dtype must not be a quantized type, got {dtype}")
        start = _index("offset", offset)
        sizes = _sizes(shape)
        if start % dtype.itemsize:
            raise ValueError(
                f"HostArena.tensor: offset must be a multiple of {dtype.itemsize} for {dtype}, got {start}"
            )
        length = math.prod(sizes) * dtype.itemsize
        end = start + length
        if end > self.nbytes:
            raise ValueError(
                f"HostArena.tensor: offset={start} with shape={sizes} of {dtype} ends at byte {end}; "
                f"it must end within the arena's {self.nbytes} bytes"
            )
        # DLPack: its deleter is plain C++, and unlike torch.frombuffer it takes zero bytes.
        storage = from_dlpack(self._arena.view(start, length)).untyped_storage()
        strides = [math.prod(max(size, 1) for size in sizes[i + 1 :]) for i in range(len(sizes))]
        # A tensor made under inference_mode could not be updated outside it.
        with torch.inference_mode(False):
            return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, sizes, strides)

    def buffer(self, offset: SupportsIndex, nbytes: SupportsIndex) -> memoryview:
        """Return the `nbytes` bytes that start at `offset` as a writable buffer that keeps the memory alive.

        Raises TypeError or ValueError if the range is not within the arena, RuntimeError if it is closed.
        """
        return memoryview(self._arena.view(offset, nbytes))

    def close(self) -> None:
        """Give up the arena's own hold on the memory; tensors keep theirs. Closing twice does nothing."""
        self._arena.close()

    @staticmethod
    def live_bytes() -> int:
        """Return the mapped bytes of all arenas of this process whose memory still exists."""
        return _core.HostArena.live_bytes()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"HostArena(nbytes={self.nbytes}{', closed' if self.closed else ''})"


def _index(name: str, value: SupportsIndex) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"HostArena.tensor: {name} must be an integer, got {value!r}") from None
    if number < 0:
        raise ValueError(f"HostArena.tensor: {name} must not be negative, got {number}")
    return number


def _sizes(shape: Sequence[int] | SupportsIndex) -> tuple[int, ...]:
    if isinstance(shape, (str, bytes)) or not isinstance(shape, (Sequence, SupportsIndex)):
        raise TypeError(f"HostArena.tensor: shape must be an integer or a sequence of them, got {shape!r}")
    if isinstance(shape, Sequence):
        return tuple(_index("every size in shape", size) for size in shape)
    return (_index("shape", shape),)
