"""Host arenas: exact sizes, tensors that keep the memory alive, errors that say what is allowed."""

import errno
import gc
import math
import mmap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkft import _core
from chunkft.streaming import HostArena

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@pytest.fixture(autouse=True, scope="module")
def small_collector_heap():
    # torch's half a million long-lived objects would make each collection below cost 0.1 s.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_stays_mapped():
    gc.collect()
    before = HostArena.live_bytes()
    yield
    gc.collect()
    assert HostArena.live_bytes() == before


@pytest.mark.parametrize("nbytes", [0, 1, mmap.PAGESIZE - 1, mmap.PAGESIZE, mmap.PAGESIZE + 1, 5_000_003])
def test_capacity_is_the_size_in_whole_pages(nbytes):
    before = HostArena.live_bytes()
    with HostArena(nbytes) as arena:
        pages = max(1, math.ceil(nbytes / mmap.PAGESIZE))
        assert arena.nbytes == nbytes
        assert arena.capacity == pages * mmap.PAGESIZE
        assert HostArena.live_bytes() - before == arena.capacity


@pytest.mark.parametrize(
    "options", [{}, {"huge_pages": False}, {"pretouch": True, "threads": 3}, {"pretouch": True}]
)
def test_memory_is_zero_and_aligned(options):
    nbytes = 40 * 2**20 + 8
    with HostArena(nbytes, **options) as arena:
        words = arena.tensor(0, nbytes // 8, torch.int64)
        assert words.data_ptr() % (mmap.PAGESIZE if "huge_pages" in options else 2**21) == 0
        assert not words.any()
        words.fill_(-1)
        assert bool((arena.tensor(0, nbytes, torch.uint8) == 255).all())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_pretouch_commits_the_pages():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE

    size = 64 * 2**20
    before = resident()
    with HostArena(size):
        assert resident() - before < size // 2
    before = resident()
    with HostArena(size, pretouch=True):
        assert resident() - before > size * 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 1, 9), (0,), (4, 0, 3), 6], ids=str)
def test_tensor_is_contiguous_and_lies_at_its_offset(dtype, shape):
    with HostArena(4096) as arena:
        tensor = arena.tensor(64, shape, dtype)
        assert tensor.shape == torch.Size((shape,) if isinstance(shape, int) else shape)
        assert tensor.dtype == dtype
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
        assert tensor.stride() == torch.empty(tensor.shape).stride()
        tensor.fill_(1)
        whole = np.frombuffer(arena._arena.view(0, 4096), np.uint8)
        expected = np.zeros(4096, np.uint8)
        expected[64 : 64 + tensor.nbytes] = (
            torch.ones(tensor.shape, dtype=dtype).reshape(-1).view(torch.uint8).numpy()
        )
        np.testing.assert_array_equal(whole, expected)


@pytest.mark.parametrize("shape", [(40, 25), (0,), (0, 5), ()], ids=str)
@pytest.mark.parametrize("ending", ["close", "delete", "close_and_delete"])
def test_memory_lives_as_long_as_a_view_of_a_view(shape, ending):
    before = HostArena.live_bytes()
    arena = HostArena(3 * 2**20)
    tensor = arena.tensor(4096, shape, torch.float32)
    view = tensor.view(-1)[: max(1, tensor.numel() // 2)].view(torch.uint8)
    if "close" in ending:
        arena.close()
    del tensor
    if "delete" in ending:
        del arena
    gc.collect()
    assert HostArena.live_bytes() - before == 3 * 2**20
    view.fill_(0x3F)
    assert bool((view == 0x3F).all())
    # Memory that was unmapped would be handed out again: nothing new may lie where the view lies.
    others = [HostArena(3 * 2**20) for _ in range(4)]
    for other in others:
        other.tensor(0, other.nbytes, torch.uint8).fill_(0xEE)
    assert bool((view == 0x3F).all())
    del others, other, view
    if "delete" not in ending:
        assert arena.closed
    gc.collect()
    assert HostArena.live_bytes() == before


@pytest.mark.parametrize("shape", [(8,), (0,)], ids=str)
@pytest.mark.parametrize(
    "keep",
    [
        pytest.param(lambda t: torch.nn.Parameter(t).data, id="parameter"),
        pytest.param(lambda t: t.detach(), id="detach"),
        pytest.param(lambda t: t.untyped_storage(), id="storage"),
        pytest.param(lambda t: t.numpy(), id="numpy"),
        pytest.param(lambda t: torch.as_strided(t, (0,), (1,)), id="empty_view"),
    ],
)
def test_everything_that_shares_the_memory_keeps_it(keep, shape):
    before = HostArena.live_bytes()
    arena = HostArena(64)
    kept = keep(arena.tensor(0, shape, torch.float32))
    arena.close()
    gc.collect()
    assert HostArena.live_bytes() > before
    del kept
    gc.collect()
    assert HostArena.live_bytes() == before


def test_raw_views_keep_the_memory_through_buffers_and_both_kinds_of_capsule():
    before = HostArena.live_bytes()
    arena = _core.HostArena(32)
    view = arena.view(8, 16)
    view_only = [
        memoryview(view),
        np.from_dlpack(view),
        torch.from_dlpack(view.__dlpack__()),
        torch.from_dlpack(view.__dlpack__(max_version=(1, 0))),
    ]
    view_only[0][3] = 9
    assert [int(x[3]) for x in view_only] == [9, 9, 9, 9]
    arena.close()
    del view
    while view_only:
        assert HostArena.live_bytes() > before
        view_only.pop()
    gc.collect()
    assert HostArena.live_bytes() == before


@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_capsule_that_nobody_consumes_frees_its_hold(max_version):
    before = HostArena.live_bytes()
    arena = _core.HostArena(32)
    capsule = arena.view(0, 32).__dlpack__(max_version=max_version)
    arena.close()
    assert HostArena.live_bytes() > before
    del capsule
    assert HostArena.live_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"stream": 1}, ValueError, "stream"),
        ({"dl_device": (2, 0)}, BufferError, "dl_device"),
        ({"copy": True}, BufferError, "copy"),
    ],
)
def test_dlpack_requests_that_cannot_be_met_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        _core.HostArena(32).view(0, 8).__dlpack__(**arguments)


def test_tensor_made_in_inference_mode_can_be_updated_outside():
    with HostArena(64) as arena:
        with torch.inference_mode():
            tensor = arena.tensor(0, (4,), torch.float32)
        tensor.requires_grad_().sum().backward()
        with torch.no_grad():
            tensor -= tensor.grad
        assert tensor.tolist() == [-1.0] * 4


def test_tensors_over_the_same_bytes_share_memory():
    with HostArena(64) as arena:
        first, second = arena.tensor(0, (8,), torch.float32), arena.tensor(16, (4,), torch.float32)
        second.fill_(2)
        assert first.tolist() == [0, 0, 0, 0, 2, 2, 2, 2]


@given(
    nbytes=st.integers(0, 300),
    offset=st.integers(0, 320),
    shape=st.lists(st.integers(0, 9), max_size=3),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=300, deadline=None)
def test_tensor_is_given_exactly_when_it_fits(nbytes, offset, shape, dtype):
    with HostArena(nbytes) as arena:
        fits = offset % dtype.itemsize == 0 and offset + math.prod(shape) * dtype.itemsize <= nbytes
        if fits:
            assert arena.tensor(offset, shape, dtype).shape == torch.Size(shape)
        else:
            with pytest.raises(ValueError, match=f"offset.* {offset}|offset={offset}"):
                arena.tensor(offset, shape, dtype)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((2, (1,), torch.float32), ValueError, r"offset must be a multiple of 4 for torch.float32, got 2"),
        ((-4, (1,), torch.float32), ValueError, r"offset must not be negative, got -4"),
        ((0.0, (1,), torch.float32), TypeError, r"offset must be an integer, got 0.0"),
        ((0, (2, -1), torch.float32), ValueError, r"size in shape must not be negative, got -1"),
        ((0, (2, 1.5), torch.float32), TypeError, r"size in shape must be an integer, got 1.5"),
        ((0, "12", torch.float32), TypeError, r"shape must be .* got '12'"),
        ((0, None, torch.float32), TypeError, r"shape must be .* got None"),
        ((0, (26,), torch.float32), ValueError, r"shape=\(26,\).* ends at byte 104; .*100 bytes"),
        ((0, (2**40, 2**40), torch.float32), ValueError, r"must end within the arena's 100 bytes"),
        ((104, (0,), torch.float32), ValueError, r"offset=104 .*100 bytes"),
        ((0, (1,), "float32"), TypeError, r"dtype must be a torch.dtype, got 'float32'"),
        ((0, (1,), torch.qint8), ValueError, r"dtype must not be a quantized type, got torch.qint8"),
    ],
)
def test_bad_tensor_arguments_are_named(arguments, error, words):
    with HostArena(100) as arena, pytest.raises(error, match=words):
        arena.tensor(*arguments)


@pytest.mark.parametrize(
    ("nbytes", "options", "error", "words"),
    [
        (-1, {}, ValueError, r"nbytes must be .*got -1"),
        (2**63, {}, ValueError, r"nbytes must be .*got 9223372036854775808"),
        (1.5, {}, TypeError, r"nbytes must be .*got 1.5"),
        ("8", {}, TypeError, r"nbytes must be .*got '8'"),
        (8, {"threads": -2}, ValueError, r"threads must be .*got -2"),
        (8, {"threads": 5000}, ValueError, r"threads must be .*1024, got 5000"),
        (8, {"threads": None}, TypeError, r"threads must be .*got None"),
    ],
)
def test_bad_sizes_are_named(nbytes, options, error, words):
    with pytest.raises(error, match=words):
        HostArena(nbytes, **options)


def test_memory_that_the_system_refuses_is_an_oserror_with_errno_and_bytes():
    with pytest.raises(OSError, match=rf"mmap of {2**60} bytes") as caught:
        HostArena(2**60)
    assert caught.value.errno == errno.ENOMEM


def test_numpy_integers_are_sizes():
    with HostArena(np.int64(64)) as arena:
        assert arena.tensor(np.int32(8), (np.int64(2), np.int64(3)), torch.float32).shape == (2, 3)


def test_closed_arena_refuses_tensors_and_closes_again():
    arena = HostArena(64)
    assert not arena.closed
    assert repr(arena) == "HostArena(nbytes=64)"
    arena.close()
    arena.close()
    assert arena.closed
    assert "closed" in repr(arena)
    for shape in [(1,), (0,)]:
        with pytest.raises(RuntimeError, match="arena is closed"):
            arena.tensor(0, shape, torch.uint8)


def test_context_manager_closes_after_an_error():
    with pytest.raises(KeyError), HostArena(64) as arena:
        raise KeyError
    assert arena.closed


def test_threads_may_take_tensors_while_another_closes():
    unexpected = []

    def take(arena):
        try:
            for i in range(200):
                arena.tensor(8 * (i % 100), (2,), torch.float32).fill_(i)
        except RuntimeError as error:
            if "arena is closed" not in str(error):
                unexpected.append(error)

    for _ in range(10):
        arena = HostArena(2**20)
        threads = [threading.Thread(target=take, args=(arena,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        arena.close()
        for thread in threads:
            thread.join()
    assert unexpected == []


def test_pretouch_lets_other_python_threads_run():
    stop, ticks = threading.Event(), []

    def tick():
        while not stop.wait(0.001):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        before = len(ticks)
        arena = HostArena(256 * 2**20, huge_pages=False, pretouch=True, threads=1)
        during = len(ticks) - before
        arena.close()
    finally:
        stop.set()
        thread.join()
    assert during >= 5
