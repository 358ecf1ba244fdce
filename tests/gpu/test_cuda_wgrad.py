"""Gradients of slices in the tiles that a GPU is given: accurate in every dtype, at every start, and always the same.

What tests/kernels/numeric shows in small tiles, here with pipelines full, several waves of programs, and descriptors.
"""

import pytest
import torch
from helpers import assert_close_to_exact

from chunkft.kernels import expert_wgrad, grouped_wgrad, wgrad
from chunkft.kernels.heuristics import Config, broken_limits
from chunkft.kernels.triton_wgrad import is_described, problem_of, target_for

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("poisoned_memory")]
TILES = {
    "wide": Config(128, 256, 64, 8, 3),
    "wide-4": Config(128, 256, 64, 8, 4),
    "wide-tma": Config(128, 256, 64, 8, 3, tma=True),
    "square": Config(128, 128, 64, 8, 3),
    "flat-tma": Config(64, 128, 64, 4, 3, tma=True),
    "split": Config(64, 128, 64, 4, 3, splits=5),
    "split-tma": Config(128, 128, 64, 8, 3, splits=7, tma=True),
}
FULL = [(torch.float32, Config(64, 64, 16, 4, 3), False), (torch.float32, Config(128, 128, 32, 8, 3), True)]
CASES = [(torch.bfloat16, tile, False) for tile in TILES.values()] + FULL
CASES += [(torch.float16, TILES[name], False) for name in ("wide-tma", "split")]
# Sizes that are neither 1 nor multiples of 16: Triton would compile each tile anew for those, and seconds are few.
STARTS = [None, slice(0, 65), slice(64, 129), slice(75, 148), slice(7, 16)]


def operands(machine, dtype, tokens, outputs, inputs):
    return (machine.randn(tokens, size, dtype=dtype) for size in (outputs, inputs))


def in_full(dy, x):
    """PyTorch's product with all digits of the accumulator: of a tensor core for 16 bits, which rounds as it likes."""
    if dy.is_cuda and dy.dtype != torch.float32:
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return dy.float().t() @ x.float()


def fits(machine, config, dy, x, rows=None, tf32=False):
    described = is_described(dy) and is_described(x)
    problem = problem_of(dy, x, rows, None, dy.dtype, False, tf32, described)
    return broken_limits(config, problem, target_for(machine.device))


@pytest.mark.parametrize(("dtype", "config", "tf32"), CASES, ids=str)
def test_slices_at_any_start_in_full_tiles(machine, dtype, config, tf32):
    outputs, inputs = machine.pick((1112, 776), (152, 136))
    dy, x = operands(machine, dtype, machine.pick(1003, 505), outputs, inputs)
    broken = fits(machine, config, dy, x, tf32=tf32)
    if broken:
        pytest.skip(f"this device cannot: {', '.join(broken)}")
    exact = dy.double().t() @ x.double()
    for rows in STARTS[:: machine.pick(1, 3)]:
        chosen = rows or slice(None)
        for cols in (slice(0, inputs), slice(5, inputs - 2)):
            ours = wgrad(dy, x, rows, cols, tf32=tf32, **machine.kernel(config))
            assert ours.dtype == dtype
            if tf32:
                # inputs of 11 digits, cut off or rounded: a sum of so many products of about one
                atol = 2**-10 * 4 * len(dy) ** 0.5
                torch.testing.assert_close(ours.double(), exact[chosen, cols], rtol=2**-9, atol=atol)
                assert machine.pick(not torch.equal(ours, wgrad(dy, x, rows, cols, backend="torch")), True)
            else:
                theirs = wgrad(dy, x, rows, cols, backend="torch")
                assert_close_to_exact(ours, theirs, exact[chosen, cols])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_default_adds_into_fp32_without_loss(machine, dtype, backend):
    """What a sliced layer asks for: the picker's or PyTorch's choice, into a gradient of another dtype."""
    outputs, inputs = machine.pick((1112, 776), (152, 136))
    dy, x = operands(machine, dtype, machine.pick(2050, 130), outputs, inputs)
    exact = dy.double().t() @ x.double()
    single = in_full(dy, x)
    for rows in (slice(0, 64), slice(75, 148), slice(1, 2)):
        out = torch.full((rows.stop - rows.start, inputs), 3.0, device=machine.device)
        norm = torch.full((1,), float("nan"), device=machine.device)
        wgrad(dy, x, rows, out=out, accumulate=True, backend=backend, squared_norm=norm)
        assert_close_to_exact(out, 3.0 + single[rows], 3.0 + exact[rows])
        torch.testing.assert_close(norm[0], out.square().sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 2, 15, 63, 64, 65, 127, 129, 4093])
def test_tails_of_tokens(machine, tokens):
    """The last step of tokens is short, and the first may be the last."""
    dy, x = operands(machine, torch.bfloat16, machine.pick(tokens, min(tokens, 200)), 152, 136)
    steps = -(-len(dy) // 64)
    exact = dy.double().t() @ x.double()
    for config in (Config(64, 128, 64, 4, 3, splits=min(3, steps)), Config(64, 128, 64, 4, 3, tma=True)):
        if fits(machine, config, dy, x):
            continue  # descriptors on devices that have none
        ours = wgrad(dy, x, slice(13, 99), **machine.kernel(config))
        assert_close_to_exact(ours, wgrad(dy, x, slice(13, 99), backend="torch"), exact[13:99])


@pytest.mark.parametrize("layout", ["window", "padded", "expanded", "transposed result"])
def test_strides_that_models_make(machine, layout):
    tokens, outputs, inputs = machine.pick(517, 70), 152, 136
    dy, x = operands(machine, torch.bfloat16, tokens, outputs, inputs)
    out = None
    if layout == "window":  # one of three projections that were computed together
        dy = machine.randn(tokens, 3 * outputs, dtype=torch.bfloat16)[:, outputs : 2 * outputs]
    elif layout == "padded":
        x = machine.randn(2 * tokens, inputs, dtype=torch.bfloat16)[::2]
    elif layout == "expanded":
        dy = machine.randn(1, outputs, dtype=torch.bfloat16).expand(tokens, outputs)
    else:
        out = torch.empty(inputs, 86, dtype=torch.bfloat16, device=machine.device).t()
    rows = slice(13, 99)
    for config in (Config(64, 128, 64, 4, 3), Config(64, 128, 64, 4, 3, tma=True)):
        if fits(machine, config, dy, x):
            continue
        ours = wgrad(dy, x, rows, out=out, **machine.kernel(config))
        exact = (dy.double().t() @ x.double())[rows]
        assert_close_to_exact(ours, wgrad(dy, x, rows, backend="torch"), exact)


@pytest.mark.parametrize("kind", ["wgrad", "grouped_wgrad"])
def test_split_sums_have_the_same_bits_however_often(machine, kind):
    """The parts of a tile come in any order, while another stream takes multiprocessors away."""
    config = Config(32, 64, 64, 4, 3, splits=8)
    dy, x = operands(machine, torch.bfloat16, machine.pick(4093, 520), 136, 264)
    other, noise = machine.stream(), torch.randn(machine.pick(2048, 16), machine.pick(2048, 16))
    noise = noise.to(machine.device)
    wanted, different = None, torch.zeros((), dtype=torch.int64, device=machine.device)
    for _ in range(machine.pick(300, 3)):
        with machine.on(other):
            noise @ noise
        if kind == "wgrad":
            found = [wgrad(dy, x, slice(3, 131), **machine.kernel(config))]
        else:
            found = grouped_wgrad([dy, dy[:, :40]], x, [slice(3, 131), None], **machine.kernel(config))
        wanted = wanted or [part.clone() for part in found]
        for part, first in zip(found, wanted, strict=True):
            different += (part != first).sum()
    assert int(different) == 0
    assert_close_to_exact(wanted[0], (dy.t() @ x)[3:131], (dy.double().t() @ x.double())[3:131])


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_projections_that_share_an_input(machine, dtype, accumulate):
    """q, k and v of a model with grouped queries, and what a plan cuts out of them."""
    sizes, inputs = machine.pick((1024, 256, 256), (72, 40, 40)), machine.pick(1000, 104)
    dys = [machine.randn(machine.pick(777, 70), size, dtype=dtype) for size in sizes]
    x = machine.randn(len(dys[0]), inputs, dtype=dtype)
    for rows in ([None, None, None], [slice(19, 70), slice(0, 40), slice(33, 33)]):
        spans = [part or slice(0, size) for part, size in zip(rows, sizes, strict=True)]
        outs = None
        if accumulate:
            outs = [
                torch.full((part.stop - part.start, inputs), 2.0, device=machine.device) for part in spans
            ]
        found = grouped_wgrad(dys, x, rows, outs=outs, accumulate=accumulate, **machine.kernel())
        before = 2.0 if accumulate else 0.0
        for got, dy, part in zip(found, dys, spans, strict=True):
            exact = before + (dy.double().t() @ x.double())[part]
            theirs = (before + in_full(dy, x)[part]).to(got.dtype)
            assert_close_to_exact(got, theirs, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_experts_of_any_load(machine, dtype):
    """One expert has most tokens, some have one or none, and the last ends before the tokens do."""
    tokens, outputs, inputs = machine.pick((2051, 392, 520), (121, 72, 56))
    dy, x = operands(machine, dtype, tokens, outputs, inputs)
    ends = [0, 1, tokens - 60, tokens - 60, tokens - 31, tokens - 1]
    offsets = torch.tensor(ends, dtype=torch.int32, device=machine.device)
    rows, cols = slice(3, outputs - 5), slice(5, inputs)
    got = expert_wgrad(dy, x, offsets, None, rows, cols, **machine.kernel())
    for place, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
        own, given = dy[start:stop], x[start:stop]
        exact = (own.double().t() @ given.double())[rows, cols]
        assert_close_to_exact(got[place], (own.float().t() @ given.float())[rows, cols].to(dtype), exact)
