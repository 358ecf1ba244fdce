"""The Triton kernels of grouped_wgrad and expert_wgrad: as accurate as PyTorch, ragged, empty, in several launches."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_close_to_exact

from chunkft.kernels import Blocks, expert_wgrad, grouped_wgrad, triton_grouped_wgrad
from chunkft.kernels.heuristics import Config

SMALL, SPLIT = Config(32, 32, 16, 4, 2), Config(16, 32, 16, 4, 2, splits=3)
RAGGED = [slice(3, 50), None, slice(1, 30), slice(7, 7), slice(39, 40)]
SIZES = (64, 40, 33, 9, 40)


def matrices(device, tokens=70, sizes=SIZES, dtype=torch.bfloat16):
    return [torch.randn(tokens, size, device=device).to(dtype) for size in sizes]


def compare(ours, dys, xs, rows, cols, base=None):
    for i, (got, dy, x, part) in enumerate(zip(ours, dys, xs, rows, strict=True)):
        part = slice(None) if part is None else part
        before = 0 if base is None else base[i].double()
        exact = before + (dy.double().t() @ x.double())[part, cols]
        theirs = (before + (dy.float().t() @ x.float())[part, cols]).to(got.dtype)
        assert got.shape == exact.shape
        assert_close_to_exact(got, theirs, exact)


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["plain", "split"])
@pytest.mark.parametrize("cols", [slice(0, 48), slice(3, 41)], ids=["all", "some"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_slices_that_share_an_input(device, config, cols, dtype):
    dys, (x,) = matrices(device, dtype=dtype), matrices(device, sizes=(48,), dtype=dtype)
    ours = grouped_wgrad(dys, x, RAGGED, cols, backend="triton", config=config)
    compare(ours, dys, [x] * 5, RAGGED, cols)
    again = grouped_wgrad(dys, x, RAGGED, cols, backend="triton", config=config)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["plain", "split"])
def test_programs_that_walk_over_tiles_give_the_same_bits(device, monkeypatch, config, programs):
    dys, (x,) = matrices(device), matrices(device, sizes=(48,))
    plain = grouped_wgrad(dys, x, RAGGED, slice(3, 41), backend="triton", config=config)
    few = replace(triton_grouped_wgrad.target_for(torch.device(device)), multiprocessors=programs)
    monkeypatch.setattr(triton_grouped_wgrad, "target_for", lambda device: few)
    count, asked = triton_grouped_wgrad._programs, []
    monkeypatch.setattr(triton_grouped_wgrad, "_programs", lambda *a: asked.append(count(*a)) or asked[-1])
    walked = grouped_wgrad(
        dys, x, RAGGED, slice(3, 41), backend="triton", config=replace(config, persistent=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(walked, plain, strict=True))
    assert asked == [2 * programs]  # two blocks of four warps a multiprocessor


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("accumulate", [True, False])
def test_results_in_place_and_inputs_of_their_own(device, accumulate, aligned):
    sizes = (64, 40, 32) if aligned else (61, 40, 33)
    dys, xs = matrices(device, sizes=sizes), matrices(device, sizes=(48, 48, 48))
    rows = [slice(3, 50), slice(0, 40), slice(1, 30)]
    buffer = torch.full((120, 64), 2.0, dtype=torch.bfloat16, device=device)
    outs = [buffer[:47, :48], buffer[47:87, 9:57], buffer[87:116, :48]]
    before = [out.clone() for out in outs]
    got = grouped_wgrad(dys, xs, rows, outs=outs, accumulate=accumulate, backend="triton", config=SMALL)
    assert all(a is b for a, b in zip(got, outs, strict=True))
    compare(outs, dys, xs, rows, slice(None), before if accumulate else None)
    for out, old in zip(outs, before, strict=True):
        out.copy_(old)
    assert bool((buffer == 2.0).all())


def test_inputs_of_different_shape_take_several_launches(device, monkeypatch):
    launched = []
    launch = triton_grouped_wgrad._launch_batch
    monkeypatch.setattr(
        triton_grouped_wgrad, "_launch_batch", lambda m, *a: launched.append(len(m)) or launch(m, *a)
    )
    dys = [
        *matrices(device, sizes=(16, 24)),
        *matrices(device, tokens=20, sizes=(16,)),
        *matrices(device, sizes=(8,)),
    ]
    xs = [
        *matrices(device, sizes=(48, 40)),
        *matrices(device, tokens=20, sizes=(48,)),
        *matrices(device, sizes=(48,)),
    ]
    ours = grouped_wgrad(dys, xs, backend="triton", config=SMALL)
    compare(ours, dys, xs, [None] * 4, slice(None))
    assert launched == [2, 1, 1]
    launched.clear()
    many, (x,) = matrices(device, sizes=(9, 16, 8) * 6), matrices(device, sizes=(24,))
    rows = [slice(1, 8)] * 18
    compare(grouped_wgrad(many, x, rows, backend="triton", config=SMALL), many, [x] * 18, rows, slice(None))
    assert launched == [16, 2]


def test_nothing_to_do(device):
    assert grouped_wgrad([], torch.zeros(3, 4, device=device), backend="triton") == []
    dys, (x,) = matrices(device, tokens=0), matrices(device, tokens=0, sizes=(48,))
    for got, size in zip(grouped_wgrad(dys, x, backend="triton", config=SMALL), SIZES, strict=True):
        assert torch.equal(got, torch.zeros(size, 48, dtype=torch.bfloat16, device=device))
    assert grouped_wgrad(dys, x, cols=slice(5, 5), backend="triton")[0].shape == (64, 0)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("experts", [None, slice(2, 5)], ids=["all", "some"])
@pytest.mark.parametrize(
    ("rows", "cols"), [(None, None), (slice(3, 60), slice(5, 48))], ids=["whole", "slice"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_experts(device, dtype, rows, cols, experts, accumulate):
    dy, x = matrices(device, sizes=(64, 48), dtype=dtype)
    ends = [5, 5, 40, 41, 63]
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    chosen = experts or slice(0, 5)
    r, c = rows or slice(0, 64), cols or slice(0, 48)
    shape = (chosen.stop - chosen.start, r.stop - r.start, c.stop - c.start)
    out = torch.full(shape, 2.0, device=device, dtype=torch.float32) if accumulate else None
    got = expert_wgrad(dy, x, offsets, experts, rows, cols, out, accumulate, backend="triton", config=SMALL)
    assert got.shape == shape
    for place, e in enumerate(range(chosen.start, chosen.stop)):
        t = slice(0 if e == 0 else ends[e - 1], ends[e])
        before = 2.0 if accumulate else 0.0
        exact = before + (dy[t].double().t() @ x[t].double())[r, c]
        theirs = (before + (dy[t].float().t() @ x[t].float())[r, c]).to(got.dtype)
        assert_close_to_exact(got[place], theirs, exact)


def test_the_picker_serves_where_no_configuration_is_given(device):
    dys, (x,) = matrices(device), matrices(device, sizes=(48,))
    compare(grouped_wgrad(dys, x, RAGGED, backend="triton"), dys, [x] * 5, RAGGED, slice(None))
    offsets = torch.tensor([30, 70], dtype=torch.int32, device=device)
    got = expert_wgrad(dys[0], x, offsets, backend="triton")
    compare(got, [dys[0][:30], dys[0][30:]], [x[:30], x[30:]], [None, None], slice(None))


def test_what_the_kernels_cannot_do_is_refused_before_anything_is_written(device):
    dys, (x,) = matrices(device, sizes=(16, 24)), matrices(device, sizes=(32,))
    outs = [torch.ones(16, 32, device=device), torch.ones(32, 24, device=device).t()]
    offsets = torch.tensor([70], dtype=torch.int32, device=device)
    for call, message in (
        (
            lambda: grouped_wgrad(dys, x, outs=outs, backend="triton", config=SMALL),
            r"outs\[1\] must have a contiguous",
        ),
        (lambda: grouped_wgrad(dys, x, backend="triton", config=Config(32, 32, 16, 3, 2)), "needs has_warps"),
        (
            lambda: grouped_wgrad(dys, x, backend="triton", config=Config(32, 32, 16, 4, 2, splits=9)),
            "splits between 1",
        ),
        (lambda: expert_wgrad(dys[0], x, offsets, backend="triton", config=SPLIT), "splits between 1 and 1"),
        (
            lambda: grouped_wgrad(dys, x, [Blocks(offsets, 8), None], backend="triton"),
            r"rows\[0\] must be a slice",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert bool((outs[0] == 1).all())
