"""Fixtures of tests that run kernels, on the CPU in the interpreter or on a GPU."""

import pytest

from bench.rehearsal import mend
from chunkft.kernels import gpu

if gpu.interpreted():
    mend()


@pytest.fixture
def device():
    """Where the kernels of this process run."""
    return "cpu" if gpu.interpreted() else "cuda"


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory):
    """Every test here sees NaN where a kernel forgot to write."""
