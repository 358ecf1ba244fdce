"""The device functions that work around faults of the interpreter."""

import torch
import triton
import triton.language as tl

from chunkft.kernels import gpu
from chunkft.kernels.gpu.common import operand, rounded


@triton.jit
def _round(source, target, SIZE: tl.constexpr, INTERPRETED: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(target + at, rounded(tl.load(source + at), target.dtype.element_ty, INTERPRETED))


@triton.jit
def _product(a, b, c, SIZE: tl.constexpr, INTERPRETED: tl.constexpr):
    at = tl.arange(0, SIZE)
    place = at[:, None] * SIZE + at[None, :]
    left, right = operand(tl.load(a + place), INTERPRETED), operand(tl.load(b + place), INTERPRETED)
    tl.store(c + place, tl.dot(left, right, input_precision="ieee"))


def test_rounding_is_to_nearest_even_and_keeps_special_values(device):
    bits = torch.cat([torch.randint(-(2**31), 2**31 - 1, (900,)), torch.arange(124) * 0x8000])
    source = bits.to(torch.int32).view(torch.float32)
    source[:4] = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0])
    source[4] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    source = source.to(device)
    for dtype in (torch.bfloat16, torch.float32):
        target = torch.empty(1024, dtype=dtype, device=device)
        _round[(1,)](source, target, SIZE=1024, INTERPRETED=gpu.interpreted())
        torch.testing.assert_close(target, source.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_bf16_product_is_a_product(device):
    a, b = (torch.randn(32, 32, device=device).bfloat16() for _ in "ab")
    c = torch.empty(32, 32, device=device)
    _product[(1,)](a, b, c, SIZE=32, INTERPRETED=gpu.interpreted())
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
