"""The residual restores an fp32 master bit for bit; stochastic rounding is unbiased and repeatable."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunkft.kernels import apply_residual, split_residual, stochastic_round

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def from_bits(values) -> Tensor:
    return torch.tensor([v - (1 << 32) if v >= 1 << 31 else v for v in values], dtype=torch.int32).view(
        torch.float32
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


# Every upper half with lower halves around ties and ends: zeros, denormals, all exponents, infinities and NaN.
UPPER = torch.arange(1 << 16, dtype=torch.int64)
LOWER = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFE, 0xFFFF])
INTERESTING = (UPPER[:, None] << 16 | LOWER).to(torch.int32).view(torch.float32)


def assert_round_trip(master: Tensor) -> None:
    weight, residual = split_residual(master)
    assert (weight.dtype, residual.dtype) == (torch.bfloat16, torch.int16)
    assert weight.shape == residual.shape == master.shape
    joined = apply_residual(weight, residual)
    number = ~torch.isnan(master)
    assert torch.equal(bits(joined)[number], bits(master)[number])
    assert torch.isnan(joined[~number]).all()
    assert torch.isnan(weight[~number]).all()


def test_every_kind_of_number_comes_back_bit_for_bit():
    assert_round_trip(INTERESTING)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=40))
def test_random_bits_come_back(values):
    assert_round_trip(from_bits(values))


def test_a_million_random_bit_patterns_come_back():
    assert_round_trip(
        torch.randint(-(1 << 31), 1 << 31, (1_000_003,), dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32)
    )


def test_quiet_nan_keeps_its_payload():
    nan = from_bits([0x7FC00000, 0x7FC12345, 0xFFFFFFFF, 0xFFC08000])
    assert torch.equal(bits(apply_residual(*split_residual(nan))), bits(nan))


def test_the_weight_is_the_nearest_bf16_and_ties_go_away_from_zero():
    finite = INTERESTING[torch.isfinite(INTERESTING)]
    weight, residual = split_residual(finite)
    nearest = finite.to(torch.bfloat16)
    tie = (bits(finite) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~tie].view(torch.int16), nearest[~tie].view(torch.int16))
    away = weight[tie].double().abs() > finite[tie].double().abs()
    assert away.all()
    assert residual[tie].eq(-0x8000).all()


def test_shapes_and_strides_are_kept():
    master = torch.randn(6, 10)[::2].t()
    assert_round_trip(master)
    assert_round_trip(torch.tensor(1.7))
    assert_round_trip(torch.empty(0, 3).fill_(0.0))
    weight, residual = split_residual(master)
    assert torch.equal(apply_residual(weight.t().contiguous().t(), residual), master)


def test_residual_master_follows_an_fp32_master_for_ten_thousand_steps():
    master = torch.randn(257) * 0.1
    weight, residual = split_residual(master)
    m, v = torch.zeros(257), torch.zeros(257)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 10_001):
        grad = torch.randn(257, generator=generator) + 0.05
        m.lerp_(grad, 0.1)
        v.mul_(0.999).addcmul_(grad, grad, value=0.001)
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        master.mul_(1 - 1e-5).sub_(update, alpha=1e-4)
        ours = apply_residual(weight, residual).mul_(1 - 1e-5).sub_(update, alpha=1e-4)
        weight, residual = split_residual(ours)
    assert torch.equal(apply_residual(weight, residual), master)
    # without the residual most of these updates would have been lost
    assert (weight.float() != master).float().mean() > 0.9


def neighbours(value: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 below (towards zero) and above a value."""
    low = (bits(value) >> 16 << 16).view(torch.float32)
    high = ((bits(value) >> 16) + 1 << 16).view(torch.float32)
    return low, high


@pytest.mark.parametrize("scale", [1.0, -3e-5, 1e30, 1e-39])
def test_stochastic_rounding_is_unbiased(scale):
    # 400 values, 10,000 draws each: the mean of a draw has variance p(1-p)/10,000 in units of the gap.
    value = torch.rand(400) * scale + scale
    draws = 10_000
    rounded = stochastic_round(value.expand(draws, 400), seed=3).double()
    low, high = neighbours(value)
    gap = high.double() - low.double()
    p = (value.double() - low.double()) / gap
    observed = ((rounded - low.double()) / gap).mean(0)
    error = (observed - p) / (p * (1 - p) / draws).sqrt().clamp_min(1e-6)
    # with 400 values the chance that any passes 5 standard deviations is 400 * 5.7e-7 = 2e-4
    assert error[(p > 0.001) & (p < 0.999)].abs().max() < 5
    # the mean over all of them has a standard deviation of 1/20
    assert abs(float(error[(p > 0.001) & (p < 0.999)].mean())) < 5 / 20


def test_stochastic_rounding_gives_one_of_the_two_neighbours():
    finite = INTERESTING[torch.isfinite(INTERESTING) & (INTERESTING.abs() < 3.3e38)]
    rounded = stochastic_round(finite, seed=11).float()
    low, high = neighbours(finite)
    assert ((bits(rounded) == bits(low)) | (bits(rounded) == bits(high))).all()
    exact = (bits(finite) & 0xFFFF) == 0
    assert torch.equal(bits(rounded[exact]), bits(finite[exact]))


def test_stochastic_rounding_keeps_infinity_and_nan():
    special = INTERESTING[~torch.isfinite(INTERESTING)]
    for seed in range(5):
        rounded = stochastic_round(special, seed)
        assert torch.equal(torch.isnan(rounded), torch.isnan(special))
        assert torch.equal(rounded[torch.isinf(special)].float(), special[torch.isinf(special)])


def test_stochastic_rounding_repeats_by_seed_and_leaves_the_global_generator_alone():
    value = torch.randn(100, 7)
    state = torch.get_rng_state()
    first = stochastic_round(value, seed=5)
    assert torch.equal(first, stochastic_round(value, seed=5))
    assert not torch.equal(first, stochastic_round(value, seed=6))
    assert torch.equal(torch.get_rng_state(), state)


def test_small_steps_move_a_bf16_weight_only_on_average():
    weight = torch.ones(4_000, dtype=torch.bfloat16)
    plain = weight.clone()
    for step in range(100):
        weight = stochastic_round(weight.float() + 1e-4, seed=step)
        plain = plain + 1e-4
    assert (plain == 1).all()
    # 100 steps of p = 1e-4 / 2^-7 each: the mean over 4,000 weights has a standard deviation of 1.4e-4
    assert math.isclose(float(weight.float().mean()), 1.01, abs_tol=7e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: split_residual(torch.zeros(2, dtype=torch.bfloat16)),
            r"master must be float32, got torch\.bfloat16",
        ),
        (lambda: split_residual(torch.zeros(2, dtype=torch.float64)), r"master must be float32"),
        (lambda: stochastic_round(torch.zeros(2).half(), 0), r"value must be float32, got torch\.float16"),
        (
            lambda: apply_residual(torch.zeros(2).bfloat16(), torch.zeros(3).short()),
            r"one shape, got torch\.bfloat16 \(2,\) and torch\.int16 \(3,\)",
        ),
        (
            lambda: apply_residual(torch.zeros(2).half(), torch.zeros(2).short()),
            r"bfloat16 and int16 .* torch\.float16",
        ),
        (lambda: apply_residual(torch.zeros(2).bfloat16(), torch.zeros(2).int()), r"torch\.int32"),
    ],
)
def test_other_dtypes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
