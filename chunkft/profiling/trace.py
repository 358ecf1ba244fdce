"""One Chrome trace of what torch computed, what the pager copied, which chunk was active and what memory was held."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.profiler import profile, record_function

from chunkft.optim import ChunkOptimizer
from chunkft.optim.paged import PagedStore
from chunkft.profiling.ledger import CATEGORIES
from chunkft.profiling.timeline import Phase, Timeline
from chunkft.streaming import Pager
from chunkft.weights import stream_of

__all__ = ["Clock", "combined_trace"]

MARK = "chunkft/clock"
MARKS = 8
RESIDENCY, MEMORY, COPIES = 990_001, 990_002, 990_010  # process numbers of our tracks, above those of Linux
POINTS = 4000


class Clock:
    """Ties the clock of torch's profiler to ``time.perf_counter_ns``, which is the clock of the pager.

    Call it while the profiler runs: each call leaves ranges in its trace, whose time by the other clock is known to
    lie between two readings.
    """

    def __init__(self) -> None:
        self._readings: list[tuple[int, int]] = []

    def __call__(self) -> None:
        for _ in range(MARKS):  # the process may be interrupted in some
            before = time.perf_counter_ns()
            with record_function(MARK):
                pass
            self._readings.append((before, time.perf_counter_ns()))

    def offset(self, events: Iterable[dict[str, Any]]) -> float:
        """Microseconds to add to ``perf_counter_ns() / 1e3`` for the time axis of these events.

        Raises:
            RuntimeError: if the ranges are not among the events.
        """
        marks = sorted((e["ts"], e["dur"]) for e in events if e.get("name") == MARK and e.get("ph") == "X")
        if not marks or len(marks) != len(self._readings):
            raise RuntimeError(
                f"the trace of torch's profiler has {len(marks)} of {len(self._readings)} marks of the clock"
            )
        pairs = zip(self._readings, marks, strict=True)
        # The closer the readings enclose the range, the less is unknown.
        (before, after), (start, duration) = min(pairs, key=lambda pair: pair[0][1] - pair[0][0])
        return float(start + duration / 2 - (before + after) / 2e3)


def combined_trace(
    profiler: profile,
    clock: Clock,
    optimizer: ChunkOptimizer | None,
    phases: Sequence[Phase],
    timeline: Timeline | None,
    scratch: Path,
) -> dict[str, Any]:
    """The profiler's trace with the tracks of chunkft on the same time axis.

    Args:
        profiler: has run and stopped.
        clock: was called while it ran.
        optimizer: whose pagers have traces.
        phases: of all steps.
        timeline: memory over time, if it was measured.
        scratch: a file that may be written and is removed.
    """
    profiler.export_chrome_trace(str(scratch))
    try:
        trace: dict[str, Any] = json.loads(scratch.read_text(encoding="utf-8"))
    finally:
        scratch.unlink(missing_ok=True)
    offset = clock.offset(trace["traceEvents"])
    started = min((phase.start for phase in phases), default=0)
    trace["traceEvents"] = [event for event in trace["traceEvents"] if event.get("name") != MARK]
    ours = [*_residency(phases), *_copies(optimizer, started)]
    if timeline is not None:
        ours += _memory(timeline)
    for event in ours:
        if event["ph"] != "M":
            event["ts"] += offset
    trace["traceEvents"] += ours
    return trace


def _named(process: int, name: str, lanes: dict[int, str]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": process, "tid": 0, "name": "process_name", "args": {"name": name}},
        {"ph": "M", "pid": process, "tid": 0, "name": "process_sort_index", "args": {"sort_index": process}},
    ]
    events += [
        {"ph": "M", "pid": process, "tid": lane, "name": "thread_name", "args": {"name": label}}
        for lane, label in lanes.items()
    ]
    return events


def _span(process: int, lane: int, name: str, start: int, end: int, **args: Any) -> dict[str, Any]:
    found = {"ph": "X", "pid": process, "tid": lane, "name": name, "cat": "chunkft", "ts": start / 1e3}
    return {**found, "dur": (end - start) / 1e3, "args": args}


def _residency(phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """Which chunk was active from its first phase to the first of the next one, and the phases themselves."""
    events = _named(RESIDENCY, "chunkft", {1: "active chunk", 2: "phase"})
    events += [_span(RESIDENCY, 2, phase.name, phase.start, phase.end, step=phase.step) for phase in phases]
    first: Phase | None = None
    last: Phase | None = None
    for phase in phases:
        if first is not None and last is not None and phase.chunk != first.chunk:
            events.append(_active(first, last.end))
            first = None
        first = first or phase
        last = phase
    if first is not None and last is not None:
        events.append(_active(first, last.end))
    return events


def _active(first: Phase, end: int) -> dict[str, Any]:
    name = "all parameters" if first.chunk is None else f"chunk {first.chunk}"
    return _span(RESIDENCY, 1, name, first.start, end, chunk=first.chunk)


def _copies(optimizer: ChunkOptimizer | None, started: int) -> list[dict[str, Any]]:
    """A track for each pager: of state, and of weights that stream, whose copies have the name of their block."""
    events = []
    for number, (title, pager, names) in enumerate(_pagers(optimizer)):
        for event in pager.trace()["traceEvents"]:
            if event["ph"] == "M":
                named = {"name": title} if title and event["name"] == "process_name" else event["args"]
                events.append({**event, "pid": COPIES + number, "args": named})
            elif event["ts"] * 1e3 >= started:
                name = f"{event['cat']} {names[event['args']['page']]}" if names else event["name"]
                events.append({**event, "pid": COPIES + number, "name": name})
    return events


def _pagers(optimizer: ChunkOptimizer | None) -> Iterator[tuple[str, Pager, Sequence[str]]]:
    """What a track is called, its pager, and the names of pages that have some."""
    if optimizer is None:
        return
    if isinstance(optimizer._store, PagedStore):
        for pager in optimizer._store.pagers.values():
            yield "", pager, ()
    stream = stream_of(optimizer._attachment.model)
    if stream is None:
        return
    for kind, pager in stream.pagers.items():
        names = [block.name for block in stream.streamed] if kind == "blocks" else ()
        yield f"chunkft weights, {kind}, to {stream.device}", pager, names


def _memory(timeline: Timeline) -> list[dict[str, Any]]:
    """Counters; thinned out to ``POINTS``, the peak among them."""
    events = _named(MEMORY, "chunkft memory (steps after those of the profiler)", {})
    count = len(timeline.times)
    chosen = sorted({*range(0, count, -(-count // POINTS)), count - 1, timeline.peak()[0]})
    for index in chosen:
        events.append(
            {
                "ph": "C",
                "pid": MEMORY,
                "tid": 0,
                "name": "bytes",
                "ts": int(timeline.times[index]) / 1e3,
                "args": {name: int(timeline.bytes[name][index]) for name in CATEGORIES},
            }
        )
    return events
