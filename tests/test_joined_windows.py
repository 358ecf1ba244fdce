"""Windows of rows of one weight share a product: their gradients are the rows of the dense one all the same."""

import pytest
import torch

import chunkft
from chunkft import Slice
from chunkft.autograd import linear, make_hollow, sliced_conv1d, sliced_linear

ROWS, COLUMNS, TOKENS = 67, 41, 23
APART = [(3, 10), (20, 37), (60, 61)]
ADJOINING = [(3, 10), (10, 37), (37, 61)]
MIXED = [(40, 67), (0, 5), (5, 9)]


@pytest.fixture
def products(monkeypatch):
    """How many rows each product had."""
    counted = []

    def counting(dy, x, **keywords):
        result = chunkft.kernels.wgrad(dy, x, **keywords)
        counted.append(tuple(result.shape))
        return result

    monkeypatch.setattr(linear, "wgrad", counting)
    return counted


def hollow(leaves):
    """Their gradients leave together."""
    for _, leaf in leaves:
        make_hollow(leaf)
    return leaves


def gradients(operator, dtype, windows, dim=0, together=True):
    shape = (ROWS, COLUMNS)
    weight = torch.randn(shape, dtype=dtype)
    width = COLUMNS if operator is sliced_linear else ROWS
    x = torch.randn(TOKENS, width, dtype=dtype)
    pieces = [Slice("w", dim, start, stop, shape) for start, stop in windows]
    leaves = [(piece, piece.of(weight).clone().requires_grad_()) for piece in pieces]
    y = operator(x, weight, None, hollow(leaves) if together else leaves)
    dy = torch.randn_like(y)
    y.backward(dy)
    whole = dy.t() @ x if operator is sliced_linear else x.t() @ dy
    return [leaf.grad for _, leaf in leaves], [piece.of(whole) for piece in pieces]


@pytest.mark.parametrize("operator", [sliced_linear, sliced_conv1d])
@pytest.mark.parametrize("windows", [APART, ADJOINING, MIXED], ids=["apart", "adjoining", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_windows_of_rows_take_one_product(products, operator, windows, dtype):
    found, expected = gradients(operator, dtype, windows)
    assert products == [(sum(stop - start for start, stop in windows), COLUMNS)]
    for gradient, rows in zip(found, expected, strict=True):
        assert gradient.is_contiguous()
        torch.testing.assert_close(gradient, rows)


def test_gradients_that_are_freed_one_by_one_share_no_memory(products):
    found, _ = gradients(sliced_linear, torch.float64, ADJOINING, together=False)
    assert len(products) == len(ADJOINING)
    assert len({gradient.untyped_storage().data_ptr() for gradient in found}) == len(ADJOINING)


@pytest.mark.parametrize(("windows", "count"), [(APART, 3), (ADJOINING, 1), (MIXED, 2)])
def test_in_fp32_on_a_cpu_the_bits_stay_those_of_the_dense_product(products, windows, count):
    found, expected = gradients(sliced_linear, torch.float32, windows)
    assert len(products) == count
    assert all(torch.equal(gradient, rows) for gradient, rows in zip(found, expected, strict=True))


def test_windows_of_columns_have_products_of_their_own(products):
    found, expected = gradients(sliced_linear, torch.float64, [(0, 7), (7, 20)], dim=1)
    assert products == [(ROWS, 7), (ROWS, 13)]
    for gradient, columns in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, columns)


def test_a_window_that_is_not_trained_is_left_out(products):
    shape = (ROWS, COLUMNS)
    weight = torch.randn(shape, dtype=torch.float64)
    x = torch.randn(TOKENS, COLUMNS, dtype=torch.float64)
    leaves = [
        (piece, piece.of(weight).clone().requires_grad_(number != 1))
        for number, piece in enumerate(Slice("w", 0, start, stop, shape) for start, stop in ADJOINING)
    ]
    y = sliced_linear(x, weight, None, hollow(leaves))
    y.sum().backward()
    assert products == [(7 + 24, COLUMNS)]
    assert leaves[1][1].grad is None
    torch.testing.assert_close(leaves[2][1].grad, x.sum(0).expand(24, -1))
