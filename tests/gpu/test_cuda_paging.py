"""Pages move beside the work of streams: every order holds, whatever is late; bytes are those of a model."""

import random
import warnings

import pytest
import torch

import chunkft.streaming.pinning as pinning
from chunkft.streaming import HostArena, Pager

pytestmark = [pytest.mark.timeout(60)]
ODD = [1, 300, 4096, 70_001, 257]


@pytest.fixture(params=["memory", "file"])
def open_pager(request, machine, tmp_path):
    """Makes pagers on the device, with their home in memory or in files."""
    made = []

    def make(pages, **options):
        home = {} if request.param == "memory" else {"state_dir": tmp_path / f"state{len(made)}"}
        made.append(Pager(pages, device=machine.device, **home, **options))
        return made[-1]

    yield make
    for pager in made:
        pager.close()


def filled(pager, machine, start=10):
    for page in range(len(pager)):
        pager.acquire(page, load=False).fill_(start + page)
        pager.release(page)
    pager.flush()


def test_a_release_stands_for_work_that_is_not_done_yet(machine, open_pager):
    """The write-back begins behind the kernel that changes the page, not when the host says that it is released."""
    pager = open_pager([1 << 20] * 4, slots=3)
    filled(pager, machine)
    for turn, stream in enumerate((None, machine.stream())):
        with machine.on(stream):
            page = pager.acquire(0)
            machine.hold()
            page.add_(100)
            late = machine.mark()
            pager.release(0)
        assert machine.pick(not late.query(), True), "release() waited for the device"
        pager.flush()
        assert late.query()
        assert bool((pager.host(0) == 10 + 100 * (turn + 1)).all())


def test_a_slot_is_reused_behind_its_last_reader(machine, open_pager):
    """Another page is loaded into the slot while a kernel still reads the first one."""
    pager = open_pager([1 << 20] * 5, slots=2)
    filled(pager, machine)
    side = machine.stream()
    with machine.on(side):
        page = pager.acquire(0)
        machine.hold()
        copied = page.clone()
        pager.release(0, dirty=False)
    for other in (1, 2, 3, 4):  # all slots change hands, on another stream
        assert bool((pager.acquire(other) == 10 + other).all())
        pager.release(other, dirty=False)
    machine.synchronize()
    assert bool((copied == 10).all())


def test_who_acquires_on_another_stream_sees_what_was_written_on_the_first(machine, open_pager):
    pager = open_pager([1 << 20] * 4, slots=3)
    filled(pager, machine)
    first, second = machine.stream(), machine.stream()
    results = []
    for turn in range(machine.pick(8, 3)):
        with machine.on((first, second)[turn % 2]):
            page = pager.acquire(0)
            machine.hold(10)
            page.add_(1)
            results.append(page.clone())
            pager.release(0, keep=turn % 3 != 2)
    machine.synchronize()
    for turn, result in enumerate(results):
        assert bool((result == 11 + turn).all()), f"turn {turn}"
    pager.flush()
    assert bool((pager.host(0) == 10 + len(results)).all())


def test_no_call_waits_for_the_device(machine):
    """With memory for a home: prefetch, acquire, release and evict return while the stream is still held."""
    with Pager([1 << 20] * 6, device=machine.device, slots=3) as pager:
        filled(pager, machine)
        machine.hold(150)
        held = machine.mark()
        for page in range(6):
            pager.prefetch((page + 1) % 6)
            pager.acquire(page).add_(1)
            pager.release(page, keep=page % 2 == 0)
            pager.state(page)
        pager.evict(4)
        assert machine.pick(not held.query(), True), "a call waited for the device"
        pager.flush()
        assert [int(pager.host(page)[-1]) for page in range(6)] == [11 + page for page in range(6)]
        assert pager.pinned == machine.real


def test_pages_of_odd_sizes_are_copied_whole_into_poisoned_slots(machine, open_pager, poisoned_memory):
    pager = open_pager(ODD, slots=2)
    poison = int(torch.empty(1, dtype=torch.uint8, device=machine.device))
    contents = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in ODD]
    for page, content in enumerate(contents):
        slot = pager.acquire(page, load=False)
        assert page >= 2 or bool((slot == poison).all())
        slot.copy_(content)
        pager.release(page)
    for page in (3, 0, 4, 1, 2, 3, 3, 0):
        assert torch.equal(pager.acquire(page).cpu(), contents[page])
        pager.release(page, dirty=False, keep=page % 2 == 0)
    pager.flush()
    for page, content in enumerate(contents):
        assert torch.equal(pager.host(page).cpu(), content)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("pin", ["auto", False])
def test_bytes_are_those_of_a_model_after_thousands_of_random_moves(machine, slots, pin):
    """Three streams, no wait in between: every load is compared on the device, with what the page should hold."""
    rng, sizes = random.Random(f"{slots} {pin}"), [64, 4096, 8192 + 8, 40_000, 72, 1 << 16, 800]
    ramp = torch.arange(max(sizes) // 8, device=machine.device)
    streams = [machine.stream() for _ in range(3)]
    wrong = torch.zeros(len(streams), dtype=torch.int64, device=machine.device)
    versions = [0] * len(sizes)
    held: dict[int, tuple[torch.Tensor, int]] = {}

    def expected(page):
        return ramp[: sizes[page] // 8] * 1_000_003 + versions[page] * 101 + page if versions[page] else 0

    machine.synchronize()
    with Pager(sizes, device=machine.device, slots=slots, pin=pin) as pager:
        for _ in range(machine.pick(4000, 1500)):
            page, lane = rng.randrange(len(sizes)), rng.randrange(len(streams))
            if page in held:
                words, before = held.pop(page)
                machine.after(streams[lane], streams[before])  # who releases is behind who acquired
                with machine.on(streams[lane]):
                    versions[page] += 1
                    words.copy_(expected(page))
                    if rng.random() < 0.05:
                        machine.hold(0.2)
                    pager.release(page, keep=rng.random() < 0.5)
            elif rng.random() < 0.3:
                pager.prefetch(page)
            elif len(held) < slots:
                for other in range(len(sizes)):
                    if other not in (page, *held) and pager.state(other) == "LOADING":
                        pager.evict(other)  # was fetched ahead and keeps its slot
                with machine.on(streams[lane]):
                    load = not versions[page] or rng.random() < 0.8
                    words = pager.acquire(page, load=load).view(torch.int64)
                    if load:
                        wrong[lane] += (words != expected(page)).sum()
                    held[page] = words, lane
        machine.synchronize()
        for page in held:
            pager.discard(page)
        assert pager.pinned == (machine.real and pin == "auto")
        pager.flush()
        assert not wrong.any()
        for page in set(range(len(sizes))) - set(held):
            wanted = expected(page)
            assert bool((pager.host(page).view(torch.int64) == torch.as_tensor(wanted).cpu()).all())
        assert max(versions) > 20
        assert pager.stats().loads > 100


def test_memory_of_slots_is_no_longer_written_once_it_is_given_back(machine, open_pager):
    """torch hands it out again at once, on a stream that knows nothing of copies."""
    for _ in range(machine.pick(10, 2)):
        pager = open_pager([1 << 22] * 3, slots=3)
        for page in range(3):
            pager.acquire(page, load=False).fill_(1)
            pager.release(page)
        for page in range(3):
            pager.prefetch(page)
        addresses = {slot.data_ptr() for slot in pager._slots}
        pager.close()
        del pager._slots
        fresh = [torch.full((1 << 22,), 77, dtype=torch.uint8, device=machine.device) for _ in range(6)]
        if machine.real:
            assert addresses & {tensor.data_ptr() for tensor in fresh}, "no memory was handed out again"
        machine.synchronize()
        assert all(bool((tensor == 77).all()) for tensor in fresh)


def test_a_pager_gives_all_of_its_memory_back(machine, open_pager, clean):
    sizes = [1 << 20, 1 << 21]
    open_pager(sizes).close()  # what is made once
    before = torch.cuda.memory_allocated() if machine.real else 0
    arenas = HostArena.live_bytes()
    pager = open_pager(sizes, slots=2)
    assert not machine.real or torch.cuda.memory_allocated() - before == 2 << 21
    filled(pager, machine)
    pager.close()
    del pager._slots, pager._home
    assert HostArena.live_bytes() == arenas
    assert not machine.real or torch.cuda.memory_allocated() == before


def test_a_pager_on_a_device_that_is_not_the_current_one(second):
    with Pager([1 << 20] * 4, device=second.device) as pager:
        filled(pager, second)
        page = pager.acquire(2)
        assert page.device == second.device
        second.hold()
        page.add_(1)
        pager.release(2)
        pager.flush()
        assert bool((pager.host(2) == 13).all())
        if second.real:
            assert torch.cuda.current_device() == 0
            assert pager.pinned


def test_memory_that_cannot_be_locked_is_pageable_and_said_once(machine, monkeypatch):
    """Slower, and as right: copies of pageable memory go through the driver's own buffers."""
    monkeypatch.setattr(pinning, "_warned", False)

    def refuse(arena, device=0):
        raise RuntimeError("cuMemHostRegister_v2: the limit of locked memory is reached")

    monkeypatch.setattr(HostArena, "page_lock", refuse)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pagers = [Pager([1 << 20] * 4, device=machine.device) for _ in range(2)]
    told = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    assert len(told) == machine.pick(1, 0)
    assert all("could not be page-locked" in text for text in told)
    for pager in pagers:
        assert not pager.pinned
        filled(pager, machine)
        machine.hold()
        pager.acquire(1).add_(1)
        pager.release(1)
        pager.flush()
        assert [int(pager.host(page)[0]) for page in range(4)] == [10, 12, 12, 13]
        pager.close()
    if machine.real:
        with pytest.raises(RuntimeError, match="limit of locked memory"):
            Pager([1 << 20], device=machine.device, pin=True)


def test_memory_that_others_locked_is_refused_by_the_driver_and_usable_afterwards(machine):
    arena = HostArena(1 << 20)
    view = arena.tensor(0, 1 << 20, torch.uint8)
    machine.need("page-locked memory")
    runtime = torch.cuda.cudart()
    assert int(runtime.cudaHostRegister(view.data_ptr(), 1 << 20, 0)) == 0
    with pytest.raises(RuntimeError, match="cuMemHostRegister_v2"):
        arena.page_lock()
    assert not arena.page_locked
    assert int(runtime.cudaHostUnregister(view.data_ptr())) == 0
    arena.page_lock()
    assert arena.page_locked
    assert view.is_pinned()


def test_times_of_copies_are_those_of_the_device(machine):
    """Anchors of the time stream: a copy cannot be faster than the link, nor end before it began."""
    size = machine.pick(32 << 20, 1 << 16)
    with Pager([size] * 4, device=machine.device, slots=3) as pager:
        filled(pager, machine)
        for page in range(4):
            pager.acquire(page)
            pager.release(page)
        pager.flush()
        stats = pager.stats()
        assert stats.loads >= 4
        assert stats.stores == 8
        for nbytes, seconds in (
            (stats.timed_loaded_bytes, stats.load_seconds),
            (stats.timed_stored_bytes, stats.store_seconds),
        ):
            assert nbytes >= size
            assert 1e9 < nbytes / seconds < 1e12 or not machine.real
        events = [event for event in pager.trace()["traceEvents"] if event["ph"] == "X"]
        assert events
        assert all(event["dur"] >= 0 for event in events)
        assert stats.stall_seconds < 1
        machine.need("the speed of a link")
