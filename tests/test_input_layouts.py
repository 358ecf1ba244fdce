"""Layers with active slices take what plain layers take: jagged, nested and sparse inputs, and lazy modules once they
have shapes."""

import copy
import warnings

import pytest
import torch
from helpers import window
from torch import nn

import chunkft

pytestmark = [
    pytest.mark.filterwarnings("ignore:the weight"),
    pytest.mark.filterwarnings("ignore:.*prototype stage"),
    pytest.mark.filterwarnings("ignore:Sparse CSR"),
]


def sequences(layout, *inner):
    return torch.nested.nested_tensor([torch.randn(n, *inner, 8) for n in (3, 5)], layout=layout)


INPUTS = {
    "jagged": lambda: sequences(torch.jagged),
    "jagged, 4-D": lambda: sequences(torch.jagged, 2),
    "nested": lambda: sequences(torch.strided),
    "coo": lambda: torch.randn(5, 8).relu().to_sparse(),
    "csr": lambda: torch.randn(5, 8).relu().to_sparse_csr(),
}


def total(y):
    if y.layout is torch.jagged:
        y = y.values()
    elif y.is_nested:
        y = torch.nested.to_padded_tensor(y, 0.0)
    return y.square().sum()


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("slice_dim", [0, 1])
def test_linear_layers_train_on_every_layout(kind, slice_dim):
    torch.manual_seed(0)
    x = INPUTS[kind]()
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8, bias=False))
    dense = copy.deepcopy(model)
    total(dense(x)).backward()
    optimizer = chunkft.ChunkAdamW(model, chunks=1, slice_dim=slice_dim)
    total(model(x)).backward()
    expected = dict(dense.named_parameters())
    for piece, leaf in optimizer.active_parameters():
        torch.testing.assert_close(leaf.grad, window(piece, expected[piece.name].grad))


def test_jagged_inputs_keep_the_savings_and_get_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
    dense = copy.deepcopy(model)
    chunkft.ChunkAdamW(model, chunks=1)
    ids = torch.nested.nested_tensor([torch.arange(3), torch.arange(5)], layout=torch.jagged)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a weight whose whole gradient is computed
        for net in (model, dense):
            h = net[0](ids)
            y = net[1](h) + h  # the same lengths, not only equal ones
            total(y).backward()
    assert torch.equal(model[0].weight.grad.norm(), dense[0].weight.grad.norm())
    x, plain = (sequences(torch.jagged).requires_grad_(True) for _ in range(2))
    plain = x.detach().clone().requires_grad_(True)
    total(model[1](x)).backward()
    total(dense[1](plain)).backward()
    torch.testing.assert_close(x.grad.values(), plain.grad.values())


def test_other_nested_inputs_get_the_answer_of_the_layer():
    model = nn.Sequential(nn.Linear(8, 6))
    chunkft.ChunkAdamW(model, chunks=1)
    bounds = torch.tensor([0, 1]), torch.tensor([3, 5])
    x = torch.nested.narrow(torch.randn(2, 7, 8), 1, *bounds, layout=torch.jagged)
    with pytest.raises(ValueError, match="contiguous jagged layout"):
        model(x)


LAZY = {
    "linear": lambda: nn.LazyLinear(4),
    "convolution": lambda: nn.LazyConv1d(4, 1),
    "norm": lambda: nn.LazyBatchNorm1d(),
}


@pytest.mark.parametrize("kind", LAZY)
def test_lazy_modules_are_asked_for_a_forward_pass(kind):
    model = nn.Sequential(nn.Linear(3, 3), LAZY[kind]())
    sentence = r"parameter '1\.\w+' is not initialised.*Run one forward pass"
    with pytest.raises(ValueError, match=sentence):
        chunkft.ChunkAdamW(model, chunks=2)
    with pytest.raises(ValueError, match=sentence):
        chunkft.partition(model, 2)
    assert not hasattr(model, "_chunkft")
    x = torch.randn(2, 3) if kind != "convolution" else torch.randn(2, 3, 3)
    model(x)
    optimizer = chunkft.ChunkAdamW(model, chunks=2)
    model(x).square().sum().backward()
    optimizer.step()
