"""``create_graph=True`` through sliced operators: gradient penalties and Hessian products are those of plain torch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import window
from torch import nn

import chunkft
from chunkft.autograd import Slice, sliced_conv1d, sliced_embedding, sliced_linear


def critic():
    torch.manual_seed(0)
    layers = nn.Linear(4, 33), nn.Tanh(), nn.Linear(33, 17, bias=False), nn.Tanh(), nn.Linear(17, 1)
    return nn.Sequential(*layers).double()


def input_penalty(model):
    torch.manual_seed(1)
    x = torch.randn(2, 5, 4, dtype=torch.double, requires_grad=True)
    y = model(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y.mean() + 10 * ((slope.norm(dim=-1) - 1) ** 2).mean()


def walk_through_chunks(model, chunks, slice_dim, loss):
    """Yields each chunk's pairs with the loss of the whole model; weights stand still."""
    plan = chunkft.partition(model, chunks, slice_dim=slice_dim, row_multiple=1)
    attachment = chunkft.attach(model)
    attachment.freeze()
    for chunk in plan:
        yield attachment.activate(chunk.slices), loss(model)
    attachment.detach()


@pytest.mark.parametrize("slice_dim", [0, 1])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_gradient_penalties_are_those_of_dense_autograd(chunks, slice_dim):
    dense = critic()
    input_penalty(dense).backward()
    expected = dict(dense.named_parameters())
    for pairs, loss in walk_through_chunks(critic(), chunks, slice_dim, input_penalty):
        loss.backward()
        for piece, leaf in pairs:
            torch.testing.assert_close(leaf.grad, window(piece, expected[piece.name].grad))


@pytest.mark.parametrize("slice_dim", [0, 1])
@pytest.mark.parametrize("chunks", [1, 3])
def test_hessian_products_are_those_of_the_dense_block(chunks, slice_dim):
    def loss(model):
        torch.manual_seed(1)
        return model(torch.randn(7, 4, dtype=torch.double)).square().mean()

    dense = critic()
    parameters = dict(dense.named_parameters())
    first = torch.autograd.grad(loss(dense), list(parameters.values()), create_graph=True)
    first = dict(zip(parameters, first, strict=True))
    for pairs, own in walk_through_chunks(critic(), chunks, slice_dim, loss):
        leaves = [leaf for _, leaf in pairs]
        slopes = torch.autograd.grad(own, leaves, create_graph=True)
        products = torch.autograd.grad(sum(s.square().sum() for s in slopes), leaves)
        squares = sum(window(piece, first[piece.name]).square().sum() for piece, _ in pairs)
        whole = torch.autograd.grad(
            squares, list(parameters.values()), retain_graph=True, materialize_grads=True
        )
        whole = dict(zip(parameters, whole, strict=True))
        for (piece, _), product in zip(pairs, products, strict=True):
            torch.testing.assert_close(product, window(piece, whole[piece.name]))


@pytest.mark.parametrize(("dim", "start", "stop"), [(0, 1, 4), (1, 2, 5), (0, 0, 6), (1, 0, 5)])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_third_derivatives(kind, dim, start, stop):
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 5, dtype=torch.double), torch.randn(6, dtype=torch.double)
    if kind == "conv1d":
        bias = torch.randn(5, dtype=torch.double)
    piece = Slice("w", dim, start, stop, (6, 5))
    x = torch.randn(2, 3, 5 if kind == "linear" else 6, dtype=torch.double, requires_grad=True)
    leaf = nn.Parameter(piece.of(weight))
    operator = sliced_linear if kind == "linear" else sliced_conv1d

    def sliced(x, leaf, bias):
        return operator(x, weight, bias, [(piece, leaf)]).sin()

    def own(x, leaf, bias):
        matrix = torch.slice_scatter(weight, leaf, dim, start, stop)
        return (F.linear(x, matrix, bias) if kind == "linear" else x @ matrix + bias).sin()

    found = []
    for function in (sliced, own):
        inputs = [x, leaf, bias.requires_grad_(True)]
        value = function(*inputs).sum()
        terms = []
        for _ in range(3):
            slopes = torch.autograd.grad(value, inputs, create_graph=True)
            terms += slopes
            value = sum(slope.square().sum() for slope in slopes)
        found.append(terms)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("dim", "start", "stop"), [(0, 2, 7), (1, 1, 4), (0, 0, 9)])
@pytest.mark.parametrize("padding_idx", [None, 3, 8])
def test_second_derivatives_of_embeddings(dim, start, stop, padding_idx):
    torch.manual_seed(0)
    weight = torch.randn(9, 5, dtype=torch.double)
    ids = torch.randint(0, 9, (2, 11))
    piece = Slice("w", dim, start, stop, (9, 5))
    leaf, dense = nn.Parameter(piece.of(weight)), weight.clone().requires_grad_(True)
    found = []
    for table, rows in (
        (leaf, sliced_embedding(ids, weight, [(piece, leaf)], padding_idx)),
        (dense, F.embedding(ids, dense, padding_idx)),
    ):
        (slope,) = torch.autograd.grad(rows.sin().sum(), table, create_graph=True)
        # only rows of the slice: others have no part in its second derivative
        (curve,) = torch.autograd.grad((slope if table is leaf else piece.of(slope)).square().sum(), table)
        found.append((slope, curve))
    torch.testing.assert_close(found[0][0], piece.of(found[1][0]))
    torch.testing.assert_close(found[0][1], piece.of(found[1][1]))


def test_a_backward_pass_that_is_not_differentiated_keeps_no_graph():
    model = critic()
    optimizer = chunkft.ChunkAdamW(model, chunks=1)
    x = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    model(x).sum().backward()
    assert not x.grad.requires_grad
    assert not any(leaf.grad.requires_grad for _, leaf in optimizer.active_parameters())
    copied = copy.deepcopy(model)
    assert all(p.requires_grad for p in copied.parameters())
