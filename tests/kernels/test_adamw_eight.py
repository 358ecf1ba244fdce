"""AdamW over moments of 8 bits, in PyTorch: near the update of 32 bits, and nothing changes where it is refused."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkft.kernels import adamw
from chunkft.kernels.companding import blocks_of, decode_first, decode_second, encode_first, encode_second
from chunkft.kernels.precompile import _compile


def zeros(shape):
    blocks = blocks_of(torch.Size(shape).numel())
    return {
        "exp_avgs": [torch.zeros(shape, dtype=torch.int8)],
        "exp_avg_sqs": [torch.zeros(shape, dtype=torch.uint8)],
        "exp_avg_scales": [torch.zeros(blocks)],
        "exp_avg_sq_scales": [torch.zeros(blocks)],
        "steps": [torch.zeros(())],
    }


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=0, max_size=3).filter(lambda s: torch.Size(s).numel() < 500),
    st.integers(0, 2**31),
    st.sampled_from(["none", "fp32", "residual", "stochastic"]),
)
def test_an_update_is_decoding_updating_and_encoding(shape, seed, master):
    """The bits of the update of fp32 moments, whose moments are then encoded."""
    torch.manual_seed(seed)
    dtype = torch.float32 if master == "none" else torch.bfloat16
    param = torch.randn(shape).to(dtype)
    extra = {}
    if master == "fp32":
        extra["masters"] = [param.float()]
    if master == "residual":
        extra["residuals"] = [torch.zeros(shape, dtype=torch.int16)]
    ours, state = param.clone(), zeros(shape)
    theirs, step = param.clone(), torch.zeros(())
    m, v = torch.zeros(shape), torch.zeros(shape)
    same = {name: [tensor.clone() for tensor in tensors] for name, tensors in extra.items()}
    for number in range(3):
        grad = torch.randn(shape) * 10.0 ** torch.empty(shape).uniform_(-4, 0)
        options = {"lr": 0.1, "master": master, "seed": number}
        adamw([ours], [grad], **state, **extra, **options)
        adamw([theirs], [grad], [m], [v], [step], **same, **options)
        (codes, scales), (codes_sq, scales_sq) = encode_first(m), encode_second(v)
        assert torch.equal(ours, theirs)
        assert torch.equal(state["exp_avgs"][0], codes)
        assert torch.equal(state["exp_avg_sqs"][0], codes_sq)
        assert torch.equal(state["exp_avg_scales"][0], scales)
        assert torch.equal(state["exp_avg_sq_scales"][0], scales_sq)
        m, v = decode_first(codes, scales), decode_second(codes_sq, scales_sq)
    assert float(state["steps"][0]) == 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("exp_avg_scales", None, "exp_avg_scales and exp_avg_sq_scales belong together; give both, or neither"),
        ("exp_avg_scales", [], "exp_avg_scales must have one entry for each of the 1 params, got 0"),
        ("exp_avg_scales", [torch.zeros(1)], r"exp_avg_scales\[0\] must be .* of shape \(2,\) on cpu.*\(1,\)"),
        ("exp_avg_sq_scales", [torch.zeros(2).double()], r"exp_avg_sq_scales\[0\] must be .*got torch.float64"),
        ("exp_avg_sq_scales", [torch.zeros(4)[::2]], r"exp_avg_sq_scales\[0\] must be contiguous"),
        ("exp_avgs", [torch.zeros(3, 50)], r"exp_avgs\[0\] must be contiguous torch.int8 beside exp_avg_scales"),
        ("exp_avg_sqs", [torch.zeros(3, 50).char()], r"exp_avg_sqs\[0\] must be contiguous torch.uint8"),
        ("exp_avg_sqs", [torch.zeros(50, 3).byte().t()], r"exp_avg_sqs\[0\] .* got torch.uint8 of strides \(1, 3\)"),
        ("params", [torch.zeros(3, 50).double()], r"params\[0\] is torch.float64; moments of 8 bits need"),
        ("grads", [torch.zeros(3, 50).char()], "gradient and moments must be floating, got torch.int8"),
    ],
)  # fmt: skip
def test_codes_that_do_not_fit_are_refused_and_nothing_changes(name, value, message):
    arguments = {"params": [torch.ones(3, 50)], "grads": [torch.ones(3, 50)], **zeros((3, 50)), name: value}
    with pytest.raises(ValueError, match=message):
        adamw(**arguments, lr=0.1)
    assert arguments["steps"][0] == 0
    assert (arguments["params"][0] == arguments["params"][0][0, 0]).all()


def test_codes_without_scales_are_no_moments():
    state = zeros((4,))
    del state["exp_avg_scales"], state["exp_avg_sq_scales"]
    with pytest.raises(ValueError, match=r"gradient and moments must be floating, got torch\.int8"):
        adamw([torch.ones(4)], [torch.ones(4)], **state, lr=0.1)


def test_infinities_on_the_device_change_nothing():
    param, state = torch.ones(3, 50), zeros((3, 50))
    adamw([param], [torch.ones(3, 50)], **state, lr=0.1, found_inf=torch.ones(1))
    assert (param == 1).all()
    assert not any(tensor.any() for tensors in state.values() for tensor in tensors)


def test_kernels_of_8_bits_can_be_compiled_ahead(monkeypatch):
    """``precompile`` calls the update that training will."""
    calls = []
    module = sys.modules[_compile.__module__]  # the package has a function of that name
    monkeypatch.setattr(module.gpu, "available", lambda: True)
    monkeypatch.setattr(module.choice, "asks", lambda tensor: True)
    monkeypatch.setattr(
        module,
        "adamw",
        lambda *arguments, **options: calls.append(adamw(*arguments, **options | {"backend": "torch"})),
    )
    moments = (torch.int8, torch.uint8)
    cpu = torch.device("cpu")
    assert _compile(cpu, torch.bfloat16, "residual", [1, 3], moments, None, True, False) == 2
    assert len(calls) == 2
