"""Moments of 8 bits inside of a kernel: ``chunkft.kernels.companding`` operation by operation, to the same bits."""

from __future__ import annotations

import triton
import triton.language as tl

from chunkft.kernels import companding

BLOCK = tl.constexpr(companding.BLOCK)
# as bits of fp32: magnitudes are compared as integers, where a NaN is above all numbers
FIRST_LIMIT = tl.constexpr(0x7B800000)
SECOND_LIMIT = tl.constexpr(0x7F7FFFFF)
INFINITY = tl.constexpr(0x7F800000)
# added to a number between 0 and 2^22 it leaves the nearest integer, ties to even, in the lowest bits
ROUND = tl.constexpr(12582912.0)
ROUND_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _spread(scales, SIZE: tl.constexpr):
    """A value for each block, [SIZE / BLOCK], as one for each element, [SIZE]."""
    return tl.reshape(tl.broadcast_to(scales[:, None], (SIZE // BLOCK, BLOCK)), (SIZE,))


@triton.jit
def _largest(value, inside, LIMIT: tl.constexpr, SIZE: tl.constexpr):
    """Magnitude of each element, at most LIMIT, [SIZE]; the largest of each block, [SIZE / BLOCK]: NaN with a NaN."""
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.where((bits > LIMIT) & (bits <= INFINITY), LIMIT, bits)
    if inside is not None:
        bits = tl.where(inside, bits, 0)
    largest = tl.max(tl.reshape(bits, (SIZE // BLOCK, BLOCK)), 1)
    return bits.to(tl.float32, bitcast=True), largest.to(tl.float32, bitcast=True)


@triton.jit
def _nearest(value):
    """A number of 0 to 2^22 as the nearest int32, ties to even; 0 for NaN."""
    value = tl.where(value == value, value, 0.0)
    return (value + ROUND).to(tl.int32, bitcast=True) - ROUND_BITS


@triton.jit
def decode_first(codes, scales, SIZE: tl.constexpr):
    """``c / (254 - |c|) s``: int8 codes [SIZE] and scales [SIZE / BLOCK] to fp32 [SIZE]."""
    code = codes.to(tl.float32)
    return tl.math.div_rn(code, 254 - tl.abs(code)) * _spread(scales, SIZE)


@triton.jit
def encode_first(moment, inside, SIZE: tl.constexpr):
    """``rint(254 m / (s + |m|))``: fp32 [SIZE] to int8 codes [SIZE] and scales [SIZE / BLOCK]."""
    size, scales = _largest(moment, inside, FIRST_LIMIT, SIZE)
    code = _nearest(tl.math.div_rn(254 * size, _spread(scales, SIZE) + size))
    return tl.where(moment < 0, -code, code).to(tl.int8), scales


@triton.jit
def decode_second(codes, scales, SIZE: tl.constexpr):
    """``(c / 255)^2 s``: uint8 codes [SIZE] and scales [SIZE / BLOCK] to fp32 [SIZE]."""
    part = codes.to(tl.float32) * (1 / 255)
    return part * part * _spread(scales, SIZE)


@triton.jit
def encode_second(moment, root, inside, SIZE: tl.constexpr):
    """``rint(sqrt(v) (255 / sqrt(s)))``, at least 1 where ``v > 0``; ``root`` is ``sqrt(v)``."""
    _, scales = _largest(moment, inside, SECOND_LIMIT, SIZE)
    factor = tl.math.div_rn(tl.zeros_like(scales) + 255.0, tl.sqrt_rn(scales))
    exact = root * _spread(factor, SIZE)
    code = _nearest(tl.where(exact > 255, 255.0, exact))
    code = tl.where((code == 0) & (exact == exact) & (moment > 0), 1, code)
    return code.to(tl.uint8), scales
