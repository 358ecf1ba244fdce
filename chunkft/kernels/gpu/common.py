"""Device functions that several kernels share.

Triton's interpreter multiplies the raw bits of bf16 operands in ``tl.dot`` and truncates where the hardware rounds.
Both are worked around here, under a constexpr that is false on a GPU and then costs nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def operand(tile, INTERPRETED: tl.constexpr):
    """A tile as ``tl.dot`` can take it: fp32 under the interpreter, itself on a GPU."""
    if INTERPRETED:
        return tile.to(tl.float32)
    return tile


@triton.jit
def rounded(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 to DTYPE, to nearest, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        # the sum would turn a NaN of all ones into zero
        bits = tl.where(value == value, nearest, bits | 0x00400000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)
