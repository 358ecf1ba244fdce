"""Wrong use of a pager: refused with the argument, its value and what is allowed, and nothing is changed."""

import gc

import numpy as np
import pytest
import torch
from pager_rigs import fill

from chunkft.streaming import HostArena, Pager


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
