"""The contract of the pager, over every backend: content, order of eviction, errors, counters, lifetimes."""

import gc

import pytest
import torch
from pager_rigs import ODD, fill, noise

from chunkft.streaming import HostArena


@pytest.fixture(autouse=True, scope="module")
def small_collector_heap():
    # torch's half a million long-lived objects would make each collection below cost 0.1 s.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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


def test_copies_into_a_slot_wait_for_whoever_had_its_memory_before(rig):
    if not hasattr(rig, "busy_slots"):
        pytest.skip("the checker of the fake driver is what sees the race")
    rig.busy_slots = True  # torch hands memory out again while kernels that use it are still queued
    with rig.pager(ODD, slots=2) as pager:
        pager.prefetch(3)
        assert rig.read(pager.acquire(3)) == bytes(ODD[3])
        pager.release(3, dirty=False)


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
