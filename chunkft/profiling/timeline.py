"""Bytes of each category over time, from the account of a ledger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from chunkft.profiling.ledger import CATEGORIES, STATE, WEIGHTS, Block

Bytes = npt.NDArray[np.int64]
__all__ = ["Phase", "Timeline"]


@dataclass(frozen=True)
class Phase:
    """A part of a training step.

    Attributes:
        name: ``forward``, ``backward`` or ``step``.
        step: number of the optimizer step, from 0.
        chunk: the active chunk, or None if everything is trained at once.
        start, end: nanoseconds of ``time.perf_counter_ns``.
    """

    name: str
    step: int
    chunk: int | None
    start: int
    end: int


class Timeline:
    """Bytes at every moment at which something was made or freed.

    Args:
        blocks: what existed when.
        polls: times and values of optimizer state outside of the blocks.
        weights: bytes of the model.
        phases: what the training did when.

    Attributes:
        times: nanoseconds, ascending.
        bytes: for each category its bytes from each of the times on.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        polls: Sequence[tuple[int, int]],
        weights: int,
        phases: Sequence[Phase],
    ) -> None:
        self.blocks = list(blocks)
        self.phases = list(phases)
        ends = [block.freed for block in blocks if block.freed is not None]
        moments = [block.born for block in blocks] + ends + [when for when, _ in polls]
        self.times: Bytes = np.unique(np.array(moments or [0], dtype=np.int64))
        self.bytes: dict[str, Bytes] = {}
        for name in CATEGORIES:
            self.bytes[name] = self.series(partial(_is, name))
        self.bytes[WEIGHTS] = self.bytes[WEIGHTS] + weights
        self.bytes[STATE] = self.bytes[STATE] + self._polled(polls)

    @property
    def total(self) -> Bytes:
        """Bytes of all categories."""
        summed: Bytes = np.sum(list(self.bytes.values()), axis=0)
        return summed

    def series(self, wanted: Callable[[Block], bool]) -> Bytes:
        """Bytes over time of the blocks that are wanted."""
        change = np.zeros(len(self.times) + 1, dtype=np.int64)
        for block in self.blocks:
            if wanted(block):
                change[np.searchsorted(self.times, block.born)] += block.nbytes
                if block.freed is not None:
                    change[np.searchsorted(self.times, block.freed)] -= block.nbytes
        return np.cumsum(change[:-1])

    def alive(self, when: int) -> list[Block]:
        """The blocks that exist at a time."""
        return [b for b in self.blocks if b.born <= when and (b.freed is None or b.freed > when)]

    def peak(self) -> tuple[int, int]:
        """Index of the moment at which most was held, and how much that was."""
        total = self.total
        index = int(np.argmax(total))
        return index, int(total[index])

    def phase_at(self, when: int) -> Phase | None:
        """What the training did at a time; None between steps."""
        return next((phase for phase in self.phases if phase.start <= when <= phase.end), None)

    def _polled(self, polls: Sequence[tuple[int, int]]) -> Bytes:
        change = np.zeros(len(self.times) + 1, dtype=np.int64)
        before = 0
        for number, (when, value) in enumerate(polls):
            # What is there when the account opens was there before the first block as well.
            change[0 if number == 0 else np.searchsorted(self.times, when)] += value - before
            before = value
        return np.cumsum(change[:-1])


def _is(category: str, block: Block) -> bool:
    return block.category == category
