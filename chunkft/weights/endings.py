"""The end of a backward pass, whichever way it comes."""

from __future__ import annotations

from collections.abc import Callable

import torch


def in_backward() -> bool:
    """Whether a backward pass runs in this thread."""
    return torch._C._current_graph_task_id() != -1


def at_end_of_backward(end: Callable[[bool], None]) -> None:
    """Call a function once, at the end of the backward pass that runs, and tell it whether that was an error or an
    interrupt. Then it may be called in any thread, beside any stream.
    """
    torch.autograd.Variable._execution_engine.queue_callback(_Ending(end))


class _Ending:
    """A callback of the engine, which calls those of passes that succeed, and drops all."""

    def __init__(self, end: Callable[[bool], None]) -> None:
        self._end: Callable[[bool], None] | None = end

    def __call__(self) -> None:
        self._call(False)

    def __del__(self) -> None:
        self._call(True)

    def _call(self, failed: bool) -> None:
        end = self._end
        if end is not None:
            end(failed)  # again, if an interrupt stopped it: it has to bear that
            self._end = None
