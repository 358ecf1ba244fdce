"""Random bits by counter: the same as those of ``chunkft.kernels.rounding.noise_bits``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def noise16(seed, begin, SIZE: tl.constexpr):
    """16 random bits for each of the elements ``[begin, begin + SIZE)``, as int32; ``begin`` is a multiple of 8.

    One call of Philox-4x32-10 (Salmon et al., SC11) with the counter ``i // 8`` serves the elements
    ``8 (i // 8) ... + 7``: word 0's lower half, its upper half, word 1's lower half, and so on.
    """
    counter = (begin // 8).to(tl.int64) + tl.arange(0, SIZE // 8)
    a, b, c, d = tl.randint4x(seed, counter)  # each [SIZE / 8]
    even = tl.join(tl.join(a & 0xFFFF, c & 0xFFFF), tl.join(b & 0xFFFF, d & 0xFFFF))
    odd = tl.join(tl.join(a >> 16, c >> 16), tl.join(b >> 16, d >> 16))
    return tl.reshape(tl.join(even, odd), (SIZE,)).to(tl.int32) & 0xFFFF
