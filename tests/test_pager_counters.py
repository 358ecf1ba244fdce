"""What a pager counts, takes and remembers: copies, bytes, memory, and the timeline."""

import dataclasses
import json

from pager_rigs import fill

from chunkft.streaming import Pager


def test_counters_count(rig):
    with rig.pager([4096] * 4, slots=2) as pager:
        fill(rig, pager)
        pager.flush()
        before = pager.stats()
        assert (before.loads, before.stores, before.stored_bytes) == (0, 4, 4 * 4096)
        for page in range(4):
            pager.prefetch(page)
            rig.read(pager.acquire(page))
            pager.release(page)
        pager.flush()
        after = pager.stats()
        assert (after.loads, after.stores) == (4, 8)
        assert (after.loaded_bytes, after.stored_bytes) == (4 * 4096, 8 * 4096)
        assert after.acquires == before.acquires + 4
        assert (after.events_created, after.streams_created) == (
            before.events_created,
            before.streams_created,
        )
        assert after.device_bytes == 2 * 4096
        for field in dataclasses.fields(after):
            assert getattr(after, field.name) >= 0


def test_host_memory_is_what_was_asked_for():
    sizes = [1_000_003, 2_000_000, 1_500_001] * 4
    with Pager(sizes, device="cpu") as pager:
        stats = pager.stats()
        assert sum(sizes) <= stats.host_bytes <= stats.host_capacity <= 1.01 * sum(sizes)


def test_trace_opens_in_trace_viewers(rig, tmp_path):
    with rig.pager([70_000] * 8, trace_events=64) as pager:
        fill(rig, pager)
        for page in range(8):
            pager.prefetch(page)
            rig.read(pager.acquire(page))
            pager.release(page)
        pager.flush()
        pager.save_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    kinds = {event["cat"] for event in spans}
    assert {"load", "store"} <= kinds
    if "file" in rig.name:
        assert {"read", "write"} <= kinds
    for event in spans:
        assert event["dur"] >= 0
        # The fake driver's clock has nothing to do with that of the host.
        assert event["args"]["queued_us"] >= 0 or rig.name.startswith("fake")
        assert event["args"]["bytes"] == 70_000
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"host to device", "device to host"} <= names


def test_no_trace_is_kept_where_none_is_asked_for(rig):
    with rig.pager([4096] * 2, trace_events=0) as pager:
        fill(rig, pager)
        pager.flush()
        assert all(event["ph"] == "M" for event in pager.trace()["traceEvents"])
