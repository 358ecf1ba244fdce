"""Moments of 8 bits in the AdamW kernel: codes, scales and parameters of the reference, bit for bit."""

import pytest
import torch
from test_adamw_kernel import KINDS, assert_same, chunk, exact_sqrt, on_cpu, run_both

from chunkft.kernels.adamw import adamw
from chunkft.kernels.companding import encode_first, encode_second

assert exact_sqrt  # a fixture of that file
# less than a block, nothing, blocks that end within a tile, one element, rows of no block, several programs
SHAPES = [(3, 5), (0, 7), (9, 130), (), (5, 3, 11), (4225,)]
MASTERS = [kind[:2] + kind[3:] for kind in KINDS if kind[2] == torch.float32 and kind[0] != torch.float16]


def coded(shapes, device, dtype=torch.float32, grad=None, master="none"):
    arguments = chunk(shapes, device, dtype, grad, torch.float32, master)
    firsts = [encode_first(m) for m in arguments["exp_avgs"]]
    seconds = [encode_second(v) for v in arguments["exp_avg_sqs"]]
    for name, pairs in (("exp_avg", firsts), ("exp_avg_sq", seconds)):
        arguments[f"{name}s"], arguments[f"{name}_scales"] = map(list, zip(*pairs, strict=True))
    return arguments


@pytest.mark.parametrize(("dtype", "grad", "master"), MASTERS, ids=str)
@pytest.mark.usefixtures("exact_sqrt")
def test_the_bits_of_the_reference(device, dtype, grad, master):
    arguments = coded(SHAPES, device, dtype, grad, master)
    for step in range(1 + (master == "residual")):
        arguments["steps"] = [s.to(device if step else "cpu") for s in arguments["steps"]]
        assert_same(arguments, run_both(arguments, lr=1e-2, master=master, seed=2**62 + step))


@pytest.mark.usefixtures("exact_sqrt")
def test_columns_and_misaligned_rows(device):
    """Parameters are strided or misaligned, their state is dense: blocks follow the elements of the slice."""
    weight = torch.randn(50, 177, device=device)
    kept = weight.clone()
    pieces = [weight[1:9], weight[9:41, 5:170], weight[41:, 176:]]
    arguments = coded([piece.shape for piece in pieces], device)
    arguments["params"] = pieces
    assert_same(arguments, run_both(arguments, lr=1e-2))
    outside = torch.ones(50, 177, dtype=torch.bool, device=device)
    outside[1:9] = outside[9:41, 5:170] = outside[41:, 176:] = False
    assert torch.equal(weight[outside], kept[outside])


@pytest.mark.usefixtures("exact_sqrt")
@pytest.mark.parametrize("size", [1024, 517], ids=["whole tiles", "an end within a block"])
def test_blocks_of_zeros_of_huge_gradients_and_of_nan(device, size):
    arguments = coded([(size,)], device)
    for tensors in arguments.values():
        tensors[0].zero_()
    gradient = arguments["grads"][0]
    # squares that are infinite, squares that are 0, a block of zeros, and a NaN that stays in its block
    gradient[:128] = torch.linspace(-1, 1, 128, device=device) * 3e38
    gradient[128:256] = torch.logspace(-44, -18, 128, device=device)
    gradient[384:512] = torch.nan
    gradient[512:] = torch.randn(size - 512, device=device)
    for _ in range(2):
        reference = run_both(arguments, lr=1e-2)
        assert_same(arguments, reference)
    scales = arguments["exp_avg_sq_scales"][0]
    assert scales[2] == 0
    assert scales.isnan().tolist() == [number == 3 for number in range(len(scales))]
    assert not arguments["params"][0][512:].isnan().any()


def test_found_inf_leaves_codes_and_scales_alone(device):
    arguments = coded([(70, 90), (3,)], device, torch.bfloat16, master="residual")
    before = on_cpu(arguments)
    adamw(**arguments, lr=0.1, master="residual", backend="triton", found_inf=torch.ones(1, device=device))
    assert_same(arguments, before)


def test_ties_of_codes_are_those_of_the_reference(device):
    """With both betas almost 1 moments stay, and are decoded and encoded: codes and scales do not change at all."""
    codes = torch.arange(-127, 129, device=device).clamp(max=127)
    second = torch.arange(256, device=device).flip(0)
    second[128] = 255
    arguments = coded([(256,)], device)
    arguments["exp_avgs"] = [codes.to(torch.int8)]
    arguments["exp_avg_sqs"] = [second.to(torch.uint8)]
    arguments["exp_avg_scales"] = [torch.tensor([1.2345e-7, 3e5], device=device)]
    arguments["exp_avg_sq_scales"] = [torch.tensor([2.5e-17, 7.7], device=device)]
    arguments["grads"] = [torch.zeros(256, device=device)]
    before = on_cpu(arguments)
    adamw(**arguments, lr=0.0, betas=(1 - 2**-40, 1 - 2**-40), backend="triton")
    for name in ("exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales"):
        assert torch.equal(arguments[name][0].cpu(), before[name][0]), name
