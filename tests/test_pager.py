"""The contract of the pager, over every backend: content, order of eviction, errors, counters, lifetimes."""

import dataclasses
import gc
import json
import random

import numpy as np
import pytest
import torch
from pager_rigs import Rig, missing, names, opened

from chunkft.streaming import HostArena, Pager

ODD = [1, 300, 4096, 70_001, 257]


@pytest.fixture(autouse=True, scope="module")
def small_collector_heap():
    # torch's half a million long-lived objects would make each collection below cost 0.1 s.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=names())
def rig(request, tmp_path, monkeypatch):
    why = missing(request.param)
    if why:
        pytest.skip(why)
    with opened(request.param, tmp_path, monkeypatch) as rig:
        yield rig


def noise(nbytes: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def fill(rig: Rig, pager: Pager, seed: int = 0) -> list[bytes]:
    contents = [noise(size, seed + page) for page, size in enumerate(pager.pages)]
    for page, content in enumerate(contents):
        rig.write(pager.acquire(page, load=False), content)
        pager.release(page)
    return contents


def test_properties_tell_what_was_asked_for(rig):
    with rig.pager(ODD, slots=3) as pager:
        assert (pager.pages, pager.slots, pager.slot_bytes, len(pager)) == (tuple(ODD), 3, 70_001, 5)
        assert pager.device.type == rig.options()["device"]
        assert not pager.closed
        assert "5 pages of at most 70001 bytes, 3 slots" in repr(pager)
    assert pager.closed
    assert "closed" in repr(pager)


def test_pages_are_zero_at_first(rig):
    with rig.pager(ODD) as pager:
        for page, size in enumerate(ODD):
            assert rig.read(pager.acquire(page)) == bytes(size)
            pager.release(page, dirty=False)
            assert not pager.host(page).any()


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_content_survives_visits_to_the_device(rig, slots):
    with rig.pager(ODD, slots=slots) as pager:
        contents = fill(rig, pager)
        for sweep in range(3):
            for page in range(len(ODD)):
                tensor = pager.acquire(page)
                assert tensor.shape == (ODD[page],)
                assert tensor.dtype == torch.uint8
                assert tensor.device.type == pager.device.type or rig.name.startswith("fake")
                pager.prefetch((page + 1) % len(ODD))
                assert rig.read(tensor) == contents[page]
                contents[page] = noise(ODD[page], 100 * sweep + page)
                rig.write(tensor, contents[page])
                pager.release(page)
        pager.flush()
        for page, content in enumerate(contents):
            assert bytes(pager.host(page).numpy()) == content


def test_a_page_is_a_tensor_of_any_dtype(rig):
    with rig.pager([64, 256], slots=2) as pager:
        pager.acquire(0)
        state = pager.acquire(1).view(torch.float32)
        rig.settle()
        state.fill_(2.5)
        pager.release(0)
        pager.release(1)
        pager.flush()
        assert pager.host(1).view(torch.float32).tolist() == [2.5] * 64


def test_host_copy_is_refused_until_it_is_the_page(rig):
    with rig.pager([4096] * 3, slots=2) as pager:
        tensor = pager.acquire(0)
        with pytest.raises(RuntimeError, match=r"page 0 .* IN_USE.*flush\(\)"):
            pager.host(0)
        rig.write(tensor, b"\7" * 4096)
        pager.release(0, keep=True)
        with pytest.raises(RuntimeError, match=r"page 0 .* DIRTY.*flush\(\)"):
            pager.host(0)
        assert not pager.host(1).any()
        pager.flush()
        assert bytes(pager.host(0).numpy()) == b"\7" * 4096


def test_flush_leaves_acquired_pages_alone(rig):
    with rig.pager([512] * 3, slots=2) as pager:
        held = pager.acquire(0)
        rig.write(held, b"a" * 512)
        rig.write(pager.acquire(1), b"b" * 512)
        pager.release(1, keep=True)
        pager.flush()
        assert bytes(pager.host(1).numpy()) == b"b" * 512
        assert pager.state(0) == "IN_USE"
        assert rig.read(held) == b"a" * 512
        pager.release(0)
        pager.flush()
        assert bytes(pager.host(0).numpy()) == b"a" * 512


def test_states_follow_the_page(rig):
    with rig.pager([4096] * 4, slots=2) as pager:
        assert pager.state(0) == "HOST"
        assert pager.prefetch(0)
        assert pager.state(0) == "LOADING"
        tensor = pager.acquire(0)
        assert pager.state(0) == "IN_USE"
        pager.release(0, dirty=False, keep=True)
        assert pager.state(0) == "RESIDENT"
        tensor = pager.acquire(0)
        rig.write(tensor, b"x" * 4096)
        pager.release(0, keep=True)
        assert pager.state(0) == "DIRTY"
        pager.flush()
        assert pager.state(0) == "RESIDENT"
        pager.evict(0)
        assert pager.state(0) == "HOST"


def test_kept_pages_leave_in_the_order_of_their_release(rig):
    with rig.pager([4096] * 5, slots=3) as pager:
        for page in range(3):
            pager.acquire(page)
        for page in (1, 2, 0):
            pager.release(page, dirty=False, keep=True)
        for newcomer, leaves in ((3, 1), (4, 2)):
            pager.acquire(newcomer)
            assert pager.state(leaves) == "HOST"
            assert pager.state(0) == "RESIDENT"


def test_kept_changes_are_written_back_when_the_slot_is_needed(rig):
    with rig.pager([4096] * 3, slots=1) as pager:
        rig.write(pager.acquire(0), b"k" * 4096)
        pager.release(0, keep=True)
        pager.acquire(1)
        pager.release(1, dirty=False)
        assert rig.read(pager.acquire(0)) == b"k" * 4096


def test_clean_release_writes_nothing_back(rig):
    with rig.pager([4096] * 2) as pager:
        for keep in (False, True):
            pager.acquire(0)
            pager.release(0, dirty=False, keep=keep)
        pager.flush()
        assert pager.stats().stores == 0


def test_unread_page_that_nobody_wrote_keeps_its_content(rig):
    with rig.pager([4096] * 4, slots=2) as pager:
        contents = fill(rig, pager)
        for end in (lambda: pager.release(2, dirty=False), lambda: pager.discard(2)):
            rig.write(pager.acquire(2, load=False), bytes(4096))
            end()
            assert rig.read(pager.acquire(2)) == contents[2]
            pager.release(2, dirty=False)


def test_discard_returns_to_the_host_copy(rig):
    with rig.pager([4096] * 3, slots=2) as pager:
        contents = fill(rig, pager)
        rig.write(pager.acquire(1), bytes(4096))
        pager.discard(1)
        assert rig.read(pager.acquire(1)) == contents[1]
        rig.write(pager.acquire(0), bytes(4096))
        pager.release(0, keep=True)
        pager.discard(0)
        assert rig.read(pager.acquire(0)) == contents[0]
        pager.discard(2)


def test_what_is_written_to_the_host_copy_of_a_discarded_page_is_loaded(rig):
    with rig.pager([5000] * 3, slots=2) as pager:
        fill(rig, pager)
        pager.acquire(0)
        pager.release(0, dirty=False, keep=True)
        pager.flush()
        for page in range(3):
            pager.discard(page)
            pager.host(page).copy_(torch.full((5000,), 40 + page, dtype=torch.uint8))
        for page in range(3):
            pager.prefetch(page)
            assert rig.read(pager.acquire(page)) == bytes([40 + page]) * 5000
            pager.release(page, dirty=False)


def test_exception_between_acquire_and_release_leaves_a_usable_pager(rig):
    with rig.pager([4096] * 3, slots=2) as pager:
        contents = fill(rig, pager)
        sizes = [4, 0]

        def step() -> None:
            for page in range(3):
                pager.acquire(page)
                assert 8 // sizes[page]

        with pytest.raises(ZeroDivisionError):
            step()
        pager.discard(0)
        pager.release(1, dirty=False)
        for page in range(3):
            assert rig.read(pager.acquire(page)) == contents[page]
            pager.release(page)


@pytest.mark.parametrize("leave", ["clean", "discard", "prefetch_and_discard", "claim_and_discard", "dirty"])
def test_memory_is_taken_for_another_page_only_behind_what_reads_it(rig, leave):
    # Nothing here waits for the device: what is missing shows as a race in the fake driver, or as wrong content.
    with rig.pager([70_000] * 16, slots=2) as pager:
        contents = fill(rig, pager)
        for page in [*range(16), *range(16)]:
            if leave == "prefetch_and_discard":
                pager.prefetch(page)
            else:
                pager.acquire(page, load=leave != "claim_and_discard")
            if leave in ("clean", "dirty"):
                pager.release(page, dirty=leave == "dirty")
            else:
                pager.discard(page)
        for page in range(16):
            assert rig.read(pager.acquire(page)) == contents[page]
            pager.release(page, dirty=False)


def test_closing_discards_what_is_acquired_and_keeps_the_rest(rig):
    pager = rig.pager([4096] * 3, slots=3)
    contents = fill(rig, pager)
    pager.flush()
    hosts = [pager.host(page) for page in range(3)]
    rig.write(pager.acquire(0), bytes(4096))
    rig.write(pager.acquire(1), b"z" * 4096)
    pager.release(1, keep=True)
    with pytest.raises(OverflowError), pager:
        raise OverflowError
    assert [bytes(host.numpy()) for host in hosts] == [contents[0], b"z" * 4096, contents[2]]


def test_every_slot_in_use_is_an_error_that_names_the_page(rig):
    with rig.pager([4096] * 6, slots=2) as pager:
        pager.acquire(0)
        pager.acquire(1)
        if "file" not in rig.name:
            assert not pager.prefetch(2)
            assert pager.state(2) == "HOST"
        with pytest.raises(RuntimeError, match=r"page 2\b.*slots"):
            pager.acquire(2)
        pager.release(0)
        assert rig.read(pager.acquire(2)) == bytes(4096)


def test_wrong_use_is_refused_and_changes_nothing(rig):
    with rig.pager([4096] * 3, slots=2) as pager:
        contents = fill(rig, pager)
        held = pager.acquire(0)
        with pytest.raises(ValueError, match=r"acquire.*page 0\b.*release it first"):
            pager.acquire(0)
        with pytest.raises(ValueError, match=r"page 1\b.*acquire it first"):
            pager.release(1)
        for bad in (-1, 3):
            for call in (
                pager.prefetch,
                pager.acquire,
                pager.release,
                pager.discard,
                pager.evict,
                pager.host,
            ):
                with pytest.raises(ValueError, match=f"page must be from 0 to 2, got {bad}"):
                    call(bad)
        with pytest.raises(TypeError, match="page must be an int, got 'a'"):
            pager.prefetch("a")
        assert rig.read(held) == contents[0]
        pager.release(0)


def test_closed_pager_refuses_everything_but_its_counters(rig):
    pager = rig.pager([4096] * 2)
    fill(rig, pager)
    pager.close()
    pager.close()
    for name in ("prefetch", "acquire", "release", "discard", "evict", "host", "state"):
        with pytest.raises(RuntimeError, match=f"Pager.{name}: the pager is closed"):
            getattr(pager, name)(0)
    with pytest.raises(RuntimeError, match="closed"):
        pager.flush()
    assert pager.stats().stores == 2
    assert pager.trace()["traceEvents"]


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


@pytest.mark.parametrize("order", ["pager", "host", "slot"])
def test_views_outlive_the_pager_in_any_order(rig, order):
    gc.collect()
    before = HostArena.live_bytes()
    pager = rig.pager([4096] * 2)
    fill(rig, pager)
    things = {"pager": pager, "host": None, "slot": None}
    pager.flush()
    content = bytes(pager.host(0).numpy())
    things["host"], things["slot"] = pager.host(0), pager.acquire(0)
    rig.settle()
    del pager
    del things[order]
    gc.collect()
    if "host" in things:
        assert bytes(things["host"].numpy()) == content
    if "slot" in things:
        things["slot"].fill_(9)
    things.clear()
    gc.collect()
    assert HostArena.live_bytes() == before


def test_collected_pager_writes_back_first(rig):
    pager = rig.pager([4096] * 2)
    host = pager.host(0)
    if "file" in rig.name:
        pager.discard(0)
    rig.write(pager.acquire(0), b"q" * 4096)
    pager.release(0)
    del pager
    gc.collect()
    assert bytes(host.numpy()) == b"q" * 4096


def test_two_pagers_do_not_meet(rig):
    with rig.pager([4096] * 3) as one, rig.pager([4096] * 3) as two:
        contents = fill(rig, one, seed=1), fill(rig, two, seed=2)
        for page in range(3):
            a, b = one.acquire(page), two.acquire(page)
            assert (rig.read(a), rig.read(b)) == (contents[0][page], contents[1][page])
            one.release(page)
            two.release(page)


def test_pages_acquired_in_inference_mode_can_be_changed_outside(rig):
    with torch.inference_mode():
        pager = rig.pager([4096])
    with pager:
        with torch.inference_mode():
            tensor = pager.acquire(0)
        rig.settle()
        tensor.add_(1)
        with torch.inference_mode():
            pager.release(0)
            pager.flush()
            host = pager.host(0)
        host.add_(1)
        assert (host == 2).all()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"pages": []}, ValueError, "pages must hold at least one size"),
        ({"pages": 5}, TypeError, "pages must be a sequence"),
        ({"pages": "44"}, TypeError, "pages must be a sequence"),
        ({"pages": [4, 0]}, ValueError, r"pages\[1\] must be from 1 .* got 0"),
        ({"pages": [4, 1.5]}, TypeError, r"pages\[1\] must be an integer, got 1.5"),
        ({"slots": 0}, ValueError, "slots must be from 1 to 1024, got 0"),
        ({"slots": "2"}, TypeError, "slots must be an integer, got '2'"),
        ({"trace_events": -1}, ValueError, "trace_events must be from 0"),
        ({"device": "tpu"}, ValueError, "device must be 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
        ({"device": "mps"}, ValueError, "device must be 'cpu', 'cuda' or 'cuda:N', got 'mps'"),
        ({"device": None}, TypeError, "device must be"),
        ({"pin": "yes"}, ValueError, "pin must be True, False or 'auto', got 'yes'"),
        ({"pin": True}, ValueError, "pin=True needs a GPU, got device='cpu'"),
        ({"state_dir": 3}, TypeError, "state_dir must be a path or None, got 3"),
        ({"reopen": True}, ValueError, "reopen=True needs state_dir"),
        ({"reopen": 1, "state_dir": "x"}, TypeError, "reopen must be True or False, got 1"),
    ],
)
def test_bad_arguments_name_themselves_and_leave_nothing(options, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gc.collect()
    before = HostArena.live_bytes()
    with pytest.raises(error, match=words):
        Pager(**{"pages": [4, 4]} | options)
    gc.collect()
    assert HostArena.live_bytes() == before
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"device='cuda:1' needs a GPU.*is_available\(\) is False.*'cpu'"):
        Pager([4], device="cuda:1")


def test_more_memory_than_there_is_raises_at_once():
    with pytest.raises(OSError, match="bytes failed") as caught:
        Pager([2**30] * 2**14)
    assert caught.value.errno


def test_numpy_integers_are_sizes():
    with Pager(list(np.array([8, 16]))) as pager:
        assert pager.pages == (8, 16)
        assert all(type(size) is int for size in pager.pages)
