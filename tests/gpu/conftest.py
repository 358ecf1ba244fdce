"""Tests that want a CUDA device. Without one they are skipped, or, with CHUNKFT_REHEARSE=1, rehearsed on the CPU."""

import gc
from pathlib import Path

import pytest
import torch
from gpu_machine import ABSENT, Machine, rehearsing

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """All of this folder is marked, so that `-m cuda` chooses it, and ends in a time of its own."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            assert item.get_closest_marker("timeout"), f"{item.nodeid} needs a timeout mark"


def pytest_runtest_setup(item):
    if not torch.cuda.is_available() and not rehearsing():
        pytest.skip(ABSENT)


@pytest.fixture
def machine():
    """The GPU, or the CPU in its place."""
    machine = Machine(
        torch.device("cpu") if rehearsing() else torch.device("cuda", torch.cuda.current_device())
    )
    yield machine
    machine.synchronize()


@pytest.fixture
def device(machine):
    """The device that tests work on."""
    return machine.device


@pytest.fixture
def second():
    """A GPU that is not the current device; in a rehearsal the CPU, which is none of the GPUs either."""
    if rehearsing():
        return Machine(torch.device("cpu"))
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, this machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(0)
    return Machine(torch.device("cuda", 1))


@pytest.fixture
def clean():
    """No garbage and no cached memory of other tests; a matrix product's work space is there already."""
    if torch.cuda.is_available():
        for dtype in (torch.bfloat16, torch.float32):
            # forward and backward threads have a handle each, whose work space torch keeps
            weight = torch.zeros(64, 64, device="cuda", dtype=dtype, requires_grad=True)
            (weight @ weight).sum().backward()
            del weight
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
