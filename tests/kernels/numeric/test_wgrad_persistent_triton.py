"""The persistent kernel of ``wgrad`` has the bits of the plain one, whatever a program's number of tiles and parts."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_close_to_exact

from chunkft.kernels import heuristics, launches, triton_persistent, triton_wgrad, wgrad
from chunkft.kernels.heuristics import Config

PLAIN = Config(32, 32, 16, 4, 2, tma=True)
PERSISTENT = replace(PLAIN, persistent=True)


@pytest.fixture(params=[3, 132], ids="{} programs".format)
def programs(request, monkeypatch, device):
    """How many programs share the tiles."""
    target = replace(triton_wgrad.target_for(torch.device(device)), multiprocessors=request.param)
    monkeypatch.setattr(triton_wgrad, "target_for", lambda device: target)
    launches.forget()  # what was prepared for another number
    yield request.param
    launches.forget()


@pytest.fixture
def described(monkeypatch):
    """What was said of every result: whether a descriptor stores it."""
    launches.forget()
    answers = []
    asked = triton_persistent.can_describe
    monkeypatch.setattr(
        triton_persistent, "can_describe", lambda *a: answers.append(asked(*a)) or answers[-1]
    )
    return answers


def operands(tokens, outputs, inputs, dtype, device):
    return (torch.randn(tokens, size, device=device).to(dtype) for size in (outputs, inputs))


def both(dy, x, rows, cols, **options):
    """Results of the persistent and of the plain kernel, each in memory of its own."""
    results = []
    for config in (PERSISTENT, PLAIN):
        out = options.get("out")
        own = options | ({} if out is None else {"out": out.clone(memory_format=torch.preserve_format)})
        results.append(wgrad(dy, x, rows, cols, backend="triton", config=config, **own))
    return results


@pytest.mark.parametrize("part_bytes", [1 << 20, 1024], ids=["whole", "parts"])
@pytest.mark.parametrize(
    ("rows", "cols", "by_descriptor"),
    [
        (None, None, True),
        (slice(13, 110), None, True),
        (slice(8, 9), slice(8, 16), True),
        (slice(33, 66), slice(17, 57), False),
        (None, slice(8, 91), False),
    ],
    ids=str,
)
def test_slices_have_the_bits_of_the_plain_kernel(
    device, monkeypatch, programs, described, part_bytes, rows, cols, by_descriptor
):
    monkeypatch.setattr(heuristics, "_PART_BYTES", part_bytes)
    dy, x = operands(83, 120, 96, torch.bfloat16, device)
    ours, plain = both(dy, x, rows, cols)
    assert torch.equal(ours, plain)
    exact = dy.double().t() @ x.double()
    assert_close_to_exact(
        ours, wgrad(dy, x, rows, cols, backend="torch"), exact[rows or slice(None), cols or slice(None)]
    )
    assert described == [by_descriptor]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["same", "fp32"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
def test_results_in_place(device, monkeypatch, programs, described, dtype, wide, accumulate):
    monkeypatch.setattr(heuristics, "_PART_BYTES", 2048)
    dy, x = operands(70, 72, 80, dtype, device)
    buffer = torch.randn(100, 104, device=device).to(torch.float32 if wide else dtype)
    for target in (buffer[3:58, 8:80], buffer[1:56, 3:75], buffer.t()[5:60, 10:82]):
        kept = buffer.clone()
        window = target.clone()
        plain = target.clone()
        options = {"accumulate": accumulate, "backend": "triton"}
        wgrad(dy, x, slice(11, 66), slice(8, 80), out=plain, config=PLAIN, **options)
        got = wgrad(dy, x, slice(11, 66), slice(8, 80), out=target, config=PERSISTENT, **options)
        assert got is target
        assert torch.equal(target, plain)
        target.copy_(window)
        assert torch.equal(buffer, kept)
    assert described == [True, False, False]


@pytest.mark.parametrize("cols", [slice(8, 48), slice(5, 44)], ids=["descriptor", "pointers"])
def test_squared_norm_is_that_of_the_stored_result(device, programs, cols):
    dy, x = operands(70, 80, 48, torch.bfloat16, device)
    norm = torch.full((), float("nan"), device=device)
    out = torch.full((57, cols.stop - cols.start), 2.0, device=device, dtype=torch.bfloat16)
    options = {"out": out, "accumulate": True, "squared_norm": norm, "backend": "triton"}
    wgrad(dy, x, slice(11, 68), cols, config=PERSISTENT, **options)
    torch.testing.assert_close(norm, out.float().square().sum())


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"), [(1, 3, 5), (37, 200, 41), (96, 33, 1), (16, 1, 67)]
)
def test_odd_sizes(device, tokens, outputs, inputs):
    dy, x = (
        torch.randn(tokens, -(-size // 8) * 8, device=device).bfloat16()[:, :size]
        for size in (outputs, inputs)
    )
    ours, plain = both(dy, x, None, None)
    assert torch.equal(ours, plain)
    assert_close_to_exact(ours, dy.t() @ x, dy.double().t() @ x.double())


@pytest.mark.parametrize(
    "change", [{"tma": False}, {"splits": 2}, {"index": True}], ids=lambda change: next(iter(change))
)
def test_what_it_cannot_do_is_refused(device, change):
    dy, x = operands(40, 64, 32, torch.bfloat16, device)
    rows = torch.tensor([3], device=device) if change.pop("index", False) else None
    with pytest.raises(ValueError, match="can_persist"):
        wgrad(dy, x, rows, backend="triton", config=replace(PERSISTENT, **change))


def test_the_picker_may_choose_it(device):
    target = triton_wgrad.target_for(torch.device(device))
    problem = heuristics.Problem(4096, 8192, 8192)
    assert heuristics.pick(problem, target).persistent == (target.capability >= 90)


def test_a_result_at_another_address_is_stored_as_it_can_be(device, described):
    """What was prepared for an aligned result of the same shape and strides must not serve one that is not."""
    dy, x = operands(70, 40, 48, torch.bfloat16, device)
    memory = torch.zeros(40 * 48 + 8, dtype=torch.bfloat16, device=device)
    expected = wgrad(dy, x, backend="torch")
    for offset in (0, 1, 0):
        out = memory[offset : offset + 40 * 48].view(40, 48).fill_(float("nan"))
        wgrad(dy, x, out=out, backend="triton", config=PERSISTENT)
        assert_close_to_exact(out, expected, dy.double().t() @ x.double())
    assert described == [True, False]
