"""How much of the paging was in the way of the training, and what would hide it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

from chunkft.streaming import PagerStats


@dataclass(frozen=True, kw_only=True)
class PagingReport:
    """What moved between host and device since the last report, and what it cost.

    Attributes:
        steps: optimizer steps.
        seconds: wall time.
        loaded_bytes, stored_bytes: to the device and back.
        load_rate, store_rate: bytes a second while a copy ran; NaN if none was timed.
        exposed_seconds: time that work waited for state to come.
        exposed_share: of ``seconds``, 0 to 1.
        hiding_chunks: the smallest number of chunks whose transfer fits beside the rest of a step, both directions
            at once, at these rates; None if nothing was timed. With ``residency="chunk"`` a longer interval does it
            too.
    """

    steps: int
    seconds: float
    loaded_bytes: int
    stored_bytes: int
    load_rate: float
    store_rate: float
    exposed_seconds: float
    exposed_share: float
    hiding_chunks: int | None

    def __str__(self) -> str:
        hidden = "" if self.hiding_chunks is None else f"; hidden from chunks={self.hiding_chunks} on"
        return (
            f"{self.steps} steps in {self.seconds:.3g} s: "
            f"{self.loaded_bytes / 1e9:.3g} GB in at {self.load_rate / 1e9:.3g} GB/s, "
            f"{self.stored_bytes / 1e9:.3g} GB out at {self.store_rate / 1e9:.3g} GB/s, "
            f"{self.exposed_share:.1%} of the time exposed{hidden}"
        )


class PagingMeter:
    """Makes reports from the counters of pagers, each since the one before."""

    def __init__(self) -> None:
        self._steps = 0
        self._time = time.perf_counter()
        self._totals = _Totals()

    def report(self, stats: Iterable[PagerStats], steps: int, chunks: int) -> PagingReport:
        """What happened since the last call.

        Args:
            stats: counters of all pagers.
            steps: optimizer steps so far.
            chunks: K.
        """
        now, totals = time.perf_counter(), _Totals.of(stats)
        moved = totals.minus(self._totals)
        seconds, done = now - self._time, steps - self._steps
        self._time, self._totals, self._steps = now, totals, steps
        load_rate = _rate(moved.timed_loaded_bytes, moved.load_seconds)
        store_rate = _rate(moved.timed_stored_bytes, moved.store_seconds)
        # What the link needs for all of it, if one direction does not hold up the other.
        busy = max(_duration(moved.loaded_bytes, load_rate), _duration(moved.stored_bytes, store_rate))
        rest = seconds - moved.exposed_seconds
        known = not math.isnan(busy) and rest > 0
        return PagingReport(
            steps=done,
            seconds=seconds,
            loaded_bytes=moved.loaded_bytes,
            stored_bytes=moved.stored_bytes,
            load_rate=load_rate,
            store_rate=store_rate,
            exposed_seconds=moved.exposed_seconds,
            exposed_share=min(1.0, moved.exposed_seconds / seconds) if seconds > 0 else 0.0,
            hiding_chunks=max(1, math.ceil(chunks * busy / rest)) if known else None,
        )


@dataclass(frozen=True)
class _Totals:
    loaded_bytes: int = 0
    stored_bytes: int = 0
    timed_loaded_bytes: int = 0
    timed_stored_bytes: int = 0
    load_seconds: float = 0.0
    store_seconds: float = 0.0
    exposed_seconds: float = 0.0

    @classmethod
    def of(cls, stats: Iterable[PagerStats]) -> _Totals:
        found = list(stats)
        return cls(*(sum(getattr(entry, name) for entry in found) for name in cls.__dataclass_fields__))

    def minus(self, before: _Totals) -> _Totals:
        names = self.__dataclass_fields__
        return _Totals(*(getattr(self, name) - getattr(before, name) for name in names))


def _rate(nbytes: int, seconds: float) -> float:
    return nbytes / seconds if seconds > 0 else math.nan


def _duration(nbytes: int, rate: float) -> float:
    return 0.0 if nbytes == 0 else nbytes / rate
