"""What a pager counted, and its copies as a timeline for chrome://tracing or Perfetto."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["PagerStats", "TraceRecord", "chrome_trace"]

_LANES = {
    "wait": (1, "caller waits for a load"),
    "load": (2, "host to device"),
    "store": (3, "device to host"),
    "read": (4, "file to host"),
    "write": (5, "host to file"),
}


# kind, page, slot, bytes; then when it was submitted, started and ended, in nanoseconds of the monotonic clock
TraceRecord = tuple[str, int, int, int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class PagerStats:
    """Counters of a pager since its construction.

    `loads` and `stores` are copies to and from slots, `waits` the acquires that came before the page's load was
    done. `stall_seconds` is how long `acquire` kept the calling thread waiting for loads, `exposed_seconds` how
    long the caller's streams stood still for them (on the CPU the thread is the stream; measured with
    `trace_events` only). `load_seconds` and `store_seconds` are the time that `timed_loaded_bytes` and
    `timed_stored_bytes` took on the link. `host_bytes` is what was asked for in host memory, `host_capacity`
    what it took, `pinned_bytes` what of it is page-locked. With a `state_dir`, host memory is the ring before
    the file, copies have the size of the largest page, and `file_*` counts what went through the file;
    `file_direct` says whether that bypasses the page cache, `file_bytes` is the size of the file.
    """

    loads: int
    stores: int
    loaded_bytes: int
    stored_bytes: int
    timed_loaded_bytes: int
    timed_stored_bytes: int
    load_seconds: float
    store_seconds: float
    acquires: int
    waits: int
    stall_seconds: float
    exposed_seconds: float
    events_created: int
    streams_created: int
    host_bytes: int
    host_capacity: int
    pinned_bytes: int
    device_bytes: int
    file_reads: int = 0
    file_writes: int = 0
    file_read_bytes: int = 0
    file_written_bytes: int = 0
    file_stall_seconds: float = 0.0
    file_direct: bool = False
    file_bytes: int = 0


def chrome_trace(records: Iterable[TraceRecord], device: str) -> dict[str, Any]:
    """Return records in the Chrome trace event format, one lane for each kind."""
    events: list[dict[str, Any]] = [
        {
            "ph": "M",
            "pid": 0,
            "tid": 0,
            "name": "process_name",
            "args": {"name": f"chunkft pager on {device}"},
        }
    ]
    events += [
        {"ph": "M", "pid": 0, "tid": lane, "name": "thread_name", "args": {"name": name}}
        for lane, name in _LANES.values()
    ]
    for kind, page, slot, nbytes, submitted, start, end in records:
        lane, _ = _LANES[kind]
        events.append(
            {
                "ph": "X",
                "pid": 0,
                "tid": lane,
                "name": f"{kind} {page}",
                "cat": kind,
                "ts": start / 1e3,
                "dur": (end - start) / 1e3,
                "args": {
                    "page": page,
                    "slot": slot,
                    "bytes": nbytes,
                    "queued_us": (start - submitted) / 1e3,
                    "GB/s": nbytes / max(end - start, 1),
                },
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
