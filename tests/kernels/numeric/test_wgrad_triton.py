"""The Triton kernel of ``wgrad``: as accurate as PyTorch, on shapes that fit no tile, in every form of selection."""

import pytest
import torch
from helpers import assert_close_to_exact

from chunkft.kernels import Blocks, grouped_wgrad, wgrad
from chunkft.kernels.heuristics import Config

SMALL = Config(32, 32, 16, 4, 2)
TMA = Config(32, 32, 16, 4, 2, tma=True)
SPLIT = Config(16, 32, 16, 4, 2, splits=3)
CONFIGS = [SMALL, TMA, SPLIT, Config(32, 16, 32, 4, 2, splits=2, tma=True)]
IDS = ["plain", "tma", "split", "split-tma"]


def triton(dy, x, *args, config=SMALL, **kwargs):
    return wgrad(dy, x, *args, backend="triton", config=config, **kwargs)


def operands(tokens, outputs, inputs, dtype, device):
    return (torch.randn(tokens, size, device=device).to(dtype) for size in (outputs, inputs))


def exact(dy, x):
    return dy.double().t() @ x.double()


@pytest.mark.parametrize(
    ("config", "dtype"),
    [*((config, torch.bfloat16) for config in CONFIGS), (SPLIT, torch.float16), (TMA, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize(
    ("rows", "cols"),
    [
        (None, None),
        (slice(0, 72), None),
        (slice(13, 50), None),
        (slice(71, 72), slice(5, 6)),
        (None, slice(3, 44)),
        (slice(33, 66), slice(17, 56)),
    ],
    ids=str,
)
def test_slices_at_any_start(device, config, dtype, rows, cols):
    dy, x = operands(83, 72, 56, dtype, device)
    theirs, truth = (
        wgrad(dy, x, rows, cols, backend="torch"),
        exact(dy, x)[rows or slice(None), cols or slice(None)],
    )
    ours = triton(dy, x, rows, cols, config=config)
    assert ours.dtype == dtype
    assert_close_to_exact(ours, theirs, truth)
    again = triton(dy, x, rows, cols, config=config)
    assert torch.equal(ours, again)


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["plain", "split"])
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"), [(1, 3, 5), (37, 70, 41), (96, 33, 1), (61, 1, 67), (49, 1, 1)]
)
def test_odd_sizes(device, config, tokens, outputs, inputs):
    dy, x = operands(tokens, outputs, inputs, torch.bfloat16, device)
    config = Config(16, 32, 16, 4, 2, splits=min(config.splits, -(-tokens // 16)))
    assert_close_to_exact(triton(dy, x, config=config), dy.t() @ x, exact(dy, x))


@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
@pytest.mark.parametrize("wide", [False, True], ids=["same", "fp32"])
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_out_of_any_layout(device, config, wide, accumulate):
    dy, x = operands(70, 40, 48, torch.bfloat16, device)
    dtype = torch.float32 if wide else torch.bfloat16
    buffer = torch.full((60, 80), 3.0, dtype=dtype, device=device)
    for target in (buffer.t()[5:55:2, 10:42], buffer[1:26, 3:35]):
        before = target.clone()
        buffer_before = buffer.clone()
        got = triton(dy, x, slice(11, 36), slice(6, 38), out=target, accumulate=accumulate, config=config)
        assert got is target
        base = before if accumulate else torch.zeros_like(before)
        single = (dy.float().t() @ x.float())[11:36, 6:38]
        theirs = (base.float() + single).to(dtype)
        assert_close_to_exact(target, theirs, base.double() + exact(dy, x)[11:36, 6:38])
        target.copy_(before)
        assert torch.equal(buffer, buffer_before)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=["plain", "split"])
def test_single_indices(device, config, kind):
    dy, x = operands(50, 45, 61, torch.bfloat16, device)
    truth, dense = exact(dy, x), dy.t() @ x
    rows = torch.tensor([44, 0, 7, 7, 3] * 8, dtype=kind, device=device)
    cols = torch.tensor([60, 1, 33], dtype=kind, device=device)
    for r, c in ((rows, None), (None, cols), (rows, cols), (rows, slice(9, 40)), (slice(2, 41), cols)):
        i, j = (slice(None) if part is None else part for part in (r, c))
        assert_close_to_exact(triton(dy, x, r, c, config=config), dense[i][:, j], truth[i][:, j])
    # every second element of an index is a view that is not contiguous
    assert_close_to_exact(triton(dy, x, rows[::2], config=config), dense[rows[::2]], truth[rows[::2]])


@pytest.mark.parametrize(
    ("size", "config"),
    [(8, SMALL), (8, SPLIT), (24, SMALL), (32, SPLIT), (64, TMA), (32, CONFIGS[3])],
    ids=str,
)
def test_blocks_of_neighbours(device, size, config):
    outputs = 6 * size
    dy, x = operands(70, outputs, 48, torch.bfloat16, device)
    index = torch.tensor([5, 0, 3, 3], device=device)
    wide = (index[:, None] * size + torch.arange(size, device=device)).flatten()
    rows = Blocks(index, size)
    assert_close_to_exact(triton(dy, x, rows, config=config), (dy.t() @ x)[wide], exact(dy, x)[wide])
    if not config.tma:
        both = triton(x, dy, slice(3, 40), rows, config=config)
        assert_close_to_exact(both, (x.t() @ dy)[3:40, wide], exact(x, dy)[3:40, wide])


def test_an_index_outside_gives_nan_and_reads_nothing_else(device, monkeypatch):
    from chunkft.kernels import selection

    # as on a GPU, where looking at the index would stop the host
    monkeypatch.setattr(selection, "_check_index", lambda *_: None)
    dy, x = operands(20, 64, 32, torch.bfloat16, device)
    for rows, bad in (
        (torch.tensor([3, 64, 5, -1], device=device), [1, 3]),
        (Blocks(torch.tensor([8, 1], device=device), 8), range(8)),
        (Blocks(torch.tensor([1, -1], device=device), 32), range(32, 64)),
    ):
        for config in (SMALL, TMA) if isinstance(rows, Blocks) and rows.size == 32 else (SMALL,):
            result = triton(dy, x, rows, config=config)
            where = torch.zeros(len(result), dtype=torch.bool, device=device)
            where[list(bad)] = True
            assert bool(torch.equal(result.isnan(), where[:, None].expand_as(result)))
    result = triton(dy, x, None, torch.tensor([32, 0], device=device))
    assert bool(result[:, 0].isnan().all())
    assert not bool(result[:, 1].isnan().any())


@pytest.mark.parametrize("layout", ["window", "padded", "expanded"])
@pytest.mark.parametrize("config", [SMALL, TMA], ids=["plain", "tma"])
def test_strides(device, layout, config):
    def matrix(columns):
        if layout == "window":
            # 16-byte aligned for a descriptor, but not at the start of a row
            return torch.randn(40, columns + 24, device=device).bfloat16()[:, 8 : 8 + columns]
        if layout == "padded":
            return torch.randn(80, columns, device=device).bfloat16()[::2]
        return torch.randn(1, columns, device=device).bfloat16().expand(40, columns)

    dy, x = matrix(40), matrix(56)
    if layout == "expanded" and config.tma:
        with pytest.raises(ValueError, match="needs has_descriptors"):
            triton(dy, x, config=config)
        return
    ours = triton(dy, x, slice(7, 40), config=config)
    assert_close_to_exact(ours, (dy.t() @ x)[7:], exact(dy, x)[7:])


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
def test_few_tokens_and_empty_slices(device, tokens, accumulate):
    dy, x = operands(tokens, 40, 70, torch.bfloat16, device)
    out = torch.full((33, 70), 2.0, device=device)
    triton(dy, x, slice(3, 36), out=out, accumulate=accumulate)
    assert_close_to_exact(out, out, exact(dy, x)[3:36] + (2.0 if accumulate else 0.0))
    norm = torch.full((1,), float("nan"), device=device)
    assert triton(dy, x, slice(3, 3), squared_norm=norm).shape == (0, 70)
    assert norm.item() == 0
    assert triton(dy, x, None, slice(70, 70)).shape == (40, 0)
    assert triton(dy[:, :0], x).shape == (0, 70)
    assert triton(dy, x, torch.zeros(0, dtype=torch.int64, device=device)).shape == (0, 70)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
def test_squared_norm_is_that_of_the_stored_result(device, config, accumulate):
    dy, x = operands(70, 40, 48, torch.bfloat16, device)
    norm = torch.full((), float("nan"), device=device)
    out = torch.full((25, 39), 2.0, device=device, dtype=torch.bfloat16)
    triton(
        dy, x, slice(11, 36), slice(5, 44), out=out, accumulate=accumulate, squared_norm=norm, config=config
    )
    torch.testing.assert_close(norm, out.float().square().sum())


def test_nan_and_infinity_reach_the_result(device):
    dy, x = operands(40, 40, 40, torch.bfloat16, device)
    dy[3, 5], x[7, 9] = float("nan"), float("inf")
    ours, theirs = triton(dy, x), exact(dy, x)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize("config", [SMALL, TMA], ids=["plain", "tma"])
def test_offsets_beyond_two_to_the_31(device, config):
    # 20 rows of 2^27 elements, of which only a few pages are ever touched; a step of 16 rows is 2^31 elements
    tokens, pitch = 20, 1 << 27
    memory = torch.UntypedStorage(2 * tokens * pitch, device=device)
    storage = torch.tensor([], dtype=torch.bfloat16, device=device).set_(
        memory, 0, (tokens, pitch), (pitch, 1)
    )
    dy = storage[:, :64]
    dy.copy_(torch.randn(tokens, 64))
    x = torch.randn(tokens, 48, device=device).bfloat16()
    ours = triton(dy, x, slice(3, 61), config=config)
    assert_close_to_exact(ours, (dy.t() @ x)[3:61], exact(dy, x)[3:61])
    ours = triton(x, x, slice(0, 3), out=storage[::9, :48], config=SMALL)
    assert_close_to_exact(ours, (x.t() @ x)[:3], exact(x, x)[:3])


def test_the_picker_serves_where_no_configuration_is_given(device):
    dy, x = operands(130, 200, 150, torch.bfloat16, device)
    ours = triton(dy, x, slice(5, 134), config=None)
    assert_close_to_exact(ours, (dy.t() @ x)[5:134], exact(dy, x)[5:134])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "dy must be bfloat16, float16 or float32, got torch.float64"),
        ({"transposed": True}, r"dy must have a contiguous last dimension, got strides \(1, 20\)"),
        ({"out": torch.float64}, "out must be bfloat16, float16 or float32, got torch.float64"),
        ({"config": Config(48, 32, 16, 4, 2)}, "is not allowed on h100: needs is_power_of_two"),
        ({"config": Config(32, 32, 16, 3, 2)}, "needs has_warps"),
        ({"config": Config(256, 256, 64, 8, 4)}, "needs fits_shared_memory"),
        ({"config": Config(32, 32, 16, 4, 2, splits=3)}, "needs splits between 1 and 2"),
        ({"config": Config(32, 32, 16, 4, 2, splits=0)}, "needs splits between 1 and 2"),
        ({"config": TMA, "index": True}, "needs has_descriptors"),
    ],
    ids=lambda case: str(case)[:40],
)
def test_what_the_kernel_cannot_do_is_refused(device, change, message):
    dtype = change.get("dtype", torch.bfloat16)
    dy, x = operands(20, 64, 32, dtype, device)
    if "transposed" in change:
        dy = dy.t().contiguous().t()
    rows = torch.tensor([3], device=device) if "index" in change else None
    out = torch.ones(1 if "index" in change else 64, 32, dtype=change.get("out", dtype), device=device)
    if device == "cuda" and "h100" in message:
        message = "needs is_power_of_two"
    with pytest.raises(ValueError, match=message):
        triton(dy, x, rows, out=out, config=change.get("config", SMALL))
    assert bool((out == 1).all())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1)], ids=str)
def test_a_squared_norm_keeps_its_shape(device, shape):
    dy, x = operands(83, 72, 56, torch.float32, device)
    norm = torch.full(shape, torch.nan, device=device)
    result = triton(dy, x, slice(11, 36), squared_norm=norm)
    assert norm.shape == shape
    assert float(norm) == pytest.approx(float(result.square().sum()), rel=1e-5)


def test_a_view_that_negates_is_negated(device):
    """What lies at its address has the other sign."""
    dy, x = operands(83, 72, 56, torch.float32, device)
    expected = triton(dy, x, slice(8, 40))
    assert torch.equal(triton(torch._neg_view(dy), x, slice(8, 40)), -expected)
    assert torch.equal(triton(dy, torch._neg_view(x), slice(8, 40)), -expected)
    with pytest.raises(ValueError, match="must not be a view that negates"):
        grouped_wgrad([torch._neg_view(dy)] * 2, x, backend="triton")


def test_a_result_on_another_device_is_refused(device):
    dy, x = operands(83, 72, 56, torch.float32, device)
    with pytest.raises(ValueError, match="must be on one device"):
        triton(dy, x, slice(8, 40), out=torch.empty(32, 56, device="meta"))
