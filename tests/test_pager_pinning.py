"""Host memory is page-locked where it can be, within the memory budget, and one warning says where it is not."""

import ctypes
import gc
import re
import warnings

import pytest
from pager_rigs import missing, opened

import chunkft.streaming.pinning as pinning
from chunkft.streaming import HostArena, Pager, memory_budget

PAGES = [70_000, 300, 4096]
REGISTRATIONS = 4


@pytest.fixture(params=["fakecuda", "fakecuda-file"])
def rig(request, tmp_path, monkeypatch):
    why = missing(request.param)
    if why:
        pytest.skip(why)
    monkeypatch.setattr(pinning, "_warned", False)
    with opened(request.param, tmp_path, monkeypatch) as rig:
        rig.driver.fakecuda_alive.restype = ctypes.c_size_t
        rig.driver.fakecuda_set_lockable.argtypes = [ctypes.c_size_t]
        yield rig


def locked(rig) -> int:
    return int(rig.driver.fakecuda_alive(REGISTRATIONS))


@pytest.mark.parametrize("pin", ["auto", True])
def test_memory_is_locked_and_unlocked(rig, pin):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pager = rig.pager(PAGES, pin=pin)
    assert pager.pinned
    assert locked(rig) == 1
    stats = pager.stats()
    assert stats.pinned_bytes == stats.host_capacity
    pager.close()
    assert locked(rig) == 0


def test_memory_stays_locked_while_a_view_lives(rig):
    if "file" in rig.name:
        pytest.skip("views are maps of the file")
    pager = rig.pager(PAGES)
    host = pager.host(0)
    pager.close()
    assert locked(rig) == 1
    del host
    gc.collect()
    assert locked(rig) == 0


def test_nothing_is_locked_where_it_is_not_wanted(rig):
    rig.driver.fakecuda_allow_pageable(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pager = rig.pager(PAGES, pin=False)
    assert not pager.pinned
    assert locked(rig) == pager.stats().pinned_bytes == 0
    pager.close()


def test_one_warning_says_why_memory_is_pageable_and_what_it_costs(rig):
    rig.driver.fakecuda_allow_pageable(1)
    rig.driver.fakecuda_set_lockable(4096)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        first = rig.pager(PAGES)
        second = rig.pager(PAGES)
    (warning,) = found
    assert warning.category is RuntimeWarning
    assert re.search(r"could not be page-locked \(.*OUT_OF_MEMORY.*slower.*pin=False", str(warning.message))
    for pager in (first, second):
        assert not pager.pinned
        rig.write(pager.acquire(1, load=False), b"a" * 300)
        pager.release(1)
        pager.flush()
        assert bytes(pager.host(1).numpy()) == b"a" * 300
        pager.close()


def test_memory_that_must_be_locked_and_cannot_be_is_an_error(rig):
    gc.collect()
    before = HostArena.live_bytes()
    rig.driver.fakecuda_set_lockable(4096)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        rig.pager(PAGES, pin=True)
    gc.collect()
    assert HostArena.live_bytes() == before
    assert locked(rig) == 0


def test_more_than_the_budget_is_refused_with_both_figures():
    budget = memory_budget()
    assert budget is not None
    page = 1 << 28
    with pytest.raises(OSError, match=r"\d+ bytes are available of the limit of \d+ bytes in /"):
        Pager([page] * (budget["available"] // page + 2))
    with pytest.raises(OSError, match="are available"):
        HostArena(budget["limit"] + 1, within_budget=True)


def test_the_user_may_state_the_memory_of_a_machine_that_shows_little_of_it(monkeypatch):
    monkeypatch.setenv("CHUNKFT_HOST_MEMORY", "1TiB")
    assert memory_budget()["limit"] == 1 << 40
    monkeypatch.setenv("CHUNKFT_HOST_MEMORY", "much")
    with pytest.raises(
        OSError, match=r"CHUNKFT_HOST_MEMORY=much, which is no number of bytes such as 128GiB"
    ):
        Pager([4096] * 2)
