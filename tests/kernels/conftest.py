"""Where the tests of Triton kernels run.

`numeric/` runs kernels: natively where there is a CUDA device, and in Triton's interpreter, which has to be chosen
before Triton is imported and therefore gets a process of its own a file (test_interpreted.py starts them; by hand:
`TRITON_INTERPRET=1 pytest tests/kernels/numeric`). Everything else here compiles kernels and never runs one.
"""

from pathlib import Path

import torch

from chunkft.kernels import gpu

NUMERIC = Path(__file__).parent / "numeric"


def pytest_ignore_collect(collection_path, config):
    if collection_path == NUMERIC and not (
        gpu.available() and (gpu.interpreted() or torch.cuda.is_available())
    ):
        return True
    # the interpreter replaces triton.language for the whole process: nothing can be compiled there
    return True if gpu.interpreted() and collection_path.name.startswith("test_aot") else None
