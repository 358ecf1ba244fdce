"""Moments of 8 bits: what a code means, and that decoding and encoding again changes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkft.kernels.companding import (
    BLOCK,
    FIRST_LIMIT,
    SECOND_LIMIT,
    blocks_of,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
)

WAYS = {"first": (encode_first, decode_first), "second": (encode_second, decode_second)}
# both bounds of normal numbers, and mantissas that round in every direction
SCALES = [2.0**-126, *(2.0**e * f for e in range(-120, 120, 8) for f in (1.0, 1.2345678, 1.9999999))]


def every_code(moment):
    """Two blocks that have every code between them, and the largest one each."""
    if moment == "first":
        return torch.tensor([*range(-127, 1), *range(127, 0, -1), -127], dtype=torch.int8)
    return torch.tensor([*range(255, 127, -1), *range(1, 128), 255], dtype=torch.uint8)


@pytest.mark.parametrize("moment", WAYS)
@pytest.mark.parametrize("zeros", [False, True])
def test_every_code_comes_back_with_every_scale(moment, zeros):
    encode, decode = WAYS[moment]
    codes = every_code(moment)
    if zeros:
        codes[5:100] = 0
    most = SECOND_LIMIT if moment == "second" else FIRST_LIMIT
    scales = torch.tensor([*SCALES, most], dtype=torch.float32)
    again, same = encode(decode(codes.repeat(len(scales)), scales.repeat_interleave(2)))
    assert torch.equal(again, codes.repeat(len(scales)))
    assert torch.equal(same, scales.repeat_interleave(2))


def test_what_codes_mean():
    """Softsign and square, by the formulas in 64 bits."""
    c = torch.arange(-127, 128)
    y = c.abs().double() / 127
    m = decode_first(c.to(torch.int8), torch.tensor([3.0, 3.0]))
    torch.testing.assert_close(m.double(), c.sign() * y / (2 - y) * 3, rtol=3e-7, atol=0)
    c = torch.arange(256)
    v = decode_second(c.to(torch.uint8), torch.tensor([5.0, 5.0]))
    torch.testing.assert_close(v.double(), (c.double() / 255).square() * 5, rtol=3e-7, atol=0)
    assert m[-1] == -m[0] == 3
    assert v[-1] == 5


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=0, max_size=3).filter(lambda s: torch.Size(s).numel() < 400),
    st.integers(0, 2**31),
    st.floats(-30, 15),
)
def test_a_decoded_moment_is_near_and_is_encoded_the_same(shape, seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** torch.empty(shape).uniform_(-6, 0, generator=generator)
    m = torch.randn(shape, generator=generator) * spread * 10**exponent
    for encode, decode, value in ((encode_first, decode_first, m), (encode_second, decode_second, m.abs())):
        codes, scales = encode(value)
        assert codes.shape == value.shape
        assert codes.is_contiguous()
        assert scales.shape == (blocks_of(value.numel()),)
        near = decode(codes, scales)
        of = scales.repeat_interleave(BLOCK)[: value.numel()].view(value.shape)
        # half a step: (1 + |u|)^2 / 4 of 1 / 127 for softsign, 2 sqrt(u) / 255 and the rest of a square; 1 is the least
        u = (value.double() / of.double()).nan_to_num()
        if encode is encode_first:
            bound = (1 + u.abs() + 0.01).square() / 4 / 127
        else:
            bound = (u.sqrt() * 2 + 1.0 / 255) / 510 + 1.0 / 255**2
        assert ((near.double() - value.double()).abs() <= bound * of.double() * 1.001).all()
        if encode is encode_second:
            assert ((near > 0) == (value > 0)).all()
        again, same = encode(near)
        assert torch.equal(again, codes)
        assert torch.equal(same, scales)


@pytest.mark.parametrize("numel", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("moment", WAYS)
def test_each_block_has_its_own_scale_and_the_last_may_be_short(moment, numel):
    encode, decode = WAYS[moment]
    values = torch.arange(1.0, numel + 1)
    codes, scales = encode(values)
    ends = [min(start + BLOCK, numel) for start in range(0, numel, BLOCK)]
    assert scales.tolist() == ends
    assert (codes[torch.tensor(ends) - 1] == codes.max()).all()
    for start in (0, 1, 5, 128, 200):
        if start <= numel:
            assert torch.equal(decode(codes[start:], scales, start), decode(codes, scales)[start:])


def test_strided_values_are_taken_in_the_order_of_their_shape():
    values = torch.randn(70, 40).t()
    for encode, decode in WAYS.values():
        codes, scales = encode(values.abs())
        plain, same = encode(values.abs().flatten())
        assert torch.equal(codes.flatten(), plain)
        assert torch.equal(scales, same)
        assert torch.equal(decode(codes, scales), decode(codes.t().contiguous().t(), scales))


@pytest.mark.parametrize("moment", WAYS)
def test_blocks_of_zeros(moment):
    encode, decode = WAYS[moment]
    values = torch.zeros(3, BLOCK)
    values[1, 7] = 2.5
    codes, scales = encode(values)
    assert scales.tolist() == [0, 2.5, 0]
    assert codes.count_nonzero() == 1
    assert torch.equal(decode(codes, scales), values)


@pytest.mark.parametrize("moment", WAYS)
def test_infinities_saturate_and_a_nan_stays_in_its_block(moment):
    encode, decode = WAYS[moment]
    most = FIRST_LIMIT if moment == "first" else SECOND_LIMIT
    values = torch.ones(3, BLOCK)
    values[0, 3] = torch.inf
    values[1, 5] = torch.nan
    codes, scales = encode(values)
    near = decode(codes, scales)
    assert near[0, 3] == most
    assert near[0].isfinite().all()
    assert near[1].isnan().all()
    assert torch.equal(near[2], values[2])
    again, same = encode(near)
    assert torch.equal(again, codes)
    torch.testing.assert_close(same, scales, rtol=0, atol=0, equal_nan=True)


def test_subnormal_moments_stay_finite_and_keep_their_sign():
    values = torch.tensor([-1e-41, 0.0, 3e-44, 1e-39])
    codes, scales = encode_first(values)
    assert torch.equal(codes.sign(), torch.tensor([-1, 0, 0, 1], dtype=torch.int8))
    assert decode_first(codes, scales)[3] == values[3]
    codes, scales = encode_second(values.abs())
    assert ((codes > 0) == (values != 0)).all()
    assert decode_second(codes, scales)[3] == values[3]


def test_a_second_moment_never_becomes_zero():
    """Beside a first moment that is not, the update would be as large as it can be."""
    codes, _ = encode_second(torch.tensor([1.0, 1e-12, 1e-37, 0.0]))
    assert codes.tolist() == [255, 1, 1, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_first(torch.zeros(3, dtype=torch.float64)), r"moment must be float32, got torch\.float64"),
        (lambda: encode_second(torch.zeros(3).half()), r"moment must be float32, got torch\.float16"),
        (lambda: decode_first(torch.zeros(3), torch.zeros(1)), r"codes must be torch\.int8, got torch\.float32"),
        (lambda: decode_second(torch.zeros(3).char(), torch.zeros(1)), r"codes must be torch\.uint8"),
        (lambda: decode_first(torch.zeros(129).char(), torch.zeros(1)), r"n >= 2 for 129 codes from start=0"),
        (lambda: decode_first(torch.zeros(2).char(), torch.zeros(1), 127), r"n >= 2 for 2 codes from start=127"),
        (lambda: decode_first(torch.zeros(2).char(), torch.zeros(1).double()), r"scales must be float32"),
    ],
)  # fmt: skip
def test_what_is_not_a_moment_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
