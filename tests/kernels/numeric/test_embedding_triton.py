"""The embedding kernel sums the rows that PyTorch's dense gradient has, in an order that never changes."""

import pytest
import torch
import torch.nn.functional as F

from chunkft.kernels import embedding_grad


def dense(dy, ids, vocabulary, padding_idx=None, by_frequency=False):
    table = torch.zeros(vocabulary, dy.shape[-1], dtype=torch.float64, requires_grad=True)
    F.embedding(ids.cpu().long(), table, padding_idx, scale_grad_by_freq=by_frequency).backward(
        dy.cpu().double()
    )
    return table.grad


def assert_near(part, exact, dtype):
    # sums of at most a hundred terms of about one
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(part.cpu().double(), exact, rtol=2 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("by_frequency", [False, True])
@pytest.mark.parametrize(("rows", "padding"), [((0, 13), None), ((4, 11), 7), ((4, 11), 2), ((12, 13), None)])
def test_rows_of_the_dense_gradient(device, dtype, by_frequency, rows, padding):
    ids = torch.randint(0, 13, (6, 17), device=device)
    ids[0] = 7  # more of one token than a program reads at a time
    dy = torch.randn(6, 17, 37, device=device).to(dtype)
    part = embedding_grad(dy, ids, 13, rows, None, padding, by_frequency, backend="triton")
    exact = dense(dy, ids, 13, padding, by_frequency)
    assert part.dtype == dtype
    assert_near(part, exact[slice(*rows)], dtype)
    again = embedding_grad(dy, ids, 13, rows, None, padding, by_frequency, backend="triton")
    assert torch.equal(part, again)


def test_columns_wide_rows_and_strides(device):
    ids = torch.randint(0, 5, (21,), dtype=torch.int32, device=device)
    dy = torch.randn(21, 2100, device=device)
    exact = dense(dy, ids, 5)
    part = embedding_grad(dy, ids, 5, (1, 5), (3, 2077), backend="triton")
    assert_near(part, exact[1:5, 3:2077], torch.float32)
    turned = torch.randn(64, 21, device=device).t()
    part = embedding_grad(turned, ids, 5, None, (1, 60), backend="triton")
    assert_near(part, dense(turned, ids, 5)[:, 1:60], torch.float32)
    expanded = torch.randn(1, 64, device=device).expand(21, 64)
    assert_near(embedding_grad(expanded, ids, 5, backend="triton"), dense(expanded, ids, 5), torch.float32)


def test_rows_that_no_token_hits_are_zero(device):
    ids = torch.tensor([3, 9, 3], device=device)
    dy = torch.ones(3, 4, device=device)
    assert torch.equal(embedding_grad(dy, ids, 10, (4, 9), backend="triton").cpu(), torch.zeros(5, 4))
    assert (embedding_grad(dy, ids, 10, (3, 4), backend="triton") == 2).all()


def test_nothing_in_nothing_out(device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert torch.equal(
        embedding_grad(torch.zeros(0, 4, device=device), none, 10, (2, 9), backend="triton").cpu(),
        torch.zeros(7, 4),
    )
    ids, dy = torch.tensor([1], device=device), torch.ones(1, 4, device=device)
    assert embedding_grad(dy, ids, 10, (3, 3), backend="triton").shape == (0, 4)
    assert embedding_grad(dy[:, :0], ids, 10, backend="triton").shape == (10, 0)


def test_fp64_is_refused(device):
    with pytest.raises(ValueError, match=r"takes dy of 16 or 32 bits, got torch\.float64"):
        embedding_grad(
            torch.zeros(1, 4, dtype=torch.float64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            3,
            backend="triton",
        )
