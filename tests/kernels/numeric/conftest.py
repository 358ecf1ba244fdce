"""Fixtures of tests that run kernels, on the CPU in the interpreter or on a GPU."""

import numpy
import pytest
import triton
from triton.runtime import interpreter

from chunkft.kernels import gpu


def _release(module):
    return tuple(int(part) for part in module.__version__.split(".")[:2])


# Triton 3.6's interpreter calls int() on arrays of one element, which numpy 2.4 forbids; Triton 3.7 squeezes them.
# The same here, so that numbers are checked under this pair, too; users are told (chunkft.kernels.gpu.interpreter).
if gpu.interpreted() and _release(triton) == (3, 6) and _release(numpy) >= (2, 4):
    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor, scope):
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = _patch_tensor_and_index


@pytest.fixture
def device():
    """Where the kernels of this process run."""
    return "cpu" if gpu.interpreted() else "cuda"


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory):
    """Every test here sees NaN where a kernel forgot to write."""
