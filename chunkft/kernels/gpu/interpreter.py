"""Whether Triton's interpreter runs here, which depends on the releases of Triton and numpy together."""

from __future__ import annotations

from functools import cache

import numpy
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _count(total: tl.int32):
    """Loops up to a scalar, as almost every kernel does."""
    for _ in range(total):
        pass


@cache
def fault() -> str | None:
    """Why no kernel can be interpreted, naming both releases; None where they can.

    Found out by interpreting a loop: the interpreter of Triton 3.6 holds scalars as arrays of one element and calls
    int() on them for a loop's bound, which numpy >= 2.4 answers with a TypeError that names neither (Triton's issue
    9171).
    """
    try:
        _count[(1,)](1)
    except InterpreterError as error:
        return (
            f"Triton {triton.__version__}'s interpreter does not run with numpy {numpy.__version__}: a loop ends in "
            f"{error}; install triton>=3.7 or numpy<2.4, or unset TRITON_INTERPRET"
        )
    return None
