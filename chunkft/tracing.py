"""Named ranges in the timelines of profilers: NVTX for Nsight, ``record_function`` for torch's profiler.

Off by default; a range then costs one call and the test of one flag.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType

import torch

__all__ = ["enabled", "is_enabled", "span"]

PREFIX = "chunkft/"
VARIABLE = "CHUNKFT_TRACE"

_NOTHING: AbstractContextManager[None] = nullcontext()
_enabled = os.environ.get(VARIABLE, "") not in ("", "0")


def is_enabled() -> bool:
    """Whether ranges are emitted; from the start if the environment variable ``CHUNKFT_TRACE`` is set and not 0."""
    return _enabled


@contextmanager
def enabled(on: bool = True) -> Iterator[None]:
    """Emit ranges inside of the block, in all threads (``on=False``: none), and go back to what was before."""
    global _enabled
    before, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = before


def span(template: str, *values: object) -> AbstractContextManager[None]:
    """A range named ``chunkft/`` and ``template % values``, which is put together only where ranges are emitted.

    It belongs to the thread that enters it, as NVTX wants, so that it may be opened inside of a backward pass.
    Compilers do not see it.
    """
    if not _enabled or torch.compiler.is_compiling():
        return _NOTHING
    return _Span(PREFIX + (template % values if values else template))


class _Span:
    """One range of both kinds; NVTX's only where there is a GPU."""

    __slots__ = ("_name", "_nvtx", "_record")

    def __init__(self, name: str) -> None:
        self._name = name
        self._nvtx = False
        self._record = torch.profiler.record_function(name)

    def __enter__(self) -> None:
        self._record.__enter__()  # type: ignore[no-untyped-call]
        self._nvtx = torch.cuda.is_available()
        if self._nvtx:
            torch.cuda.nvtx.range_push(self._name)  # type: ignore[no-untyped-call]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._nvtx:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        self._record.__exit__(kind, error, trace)
