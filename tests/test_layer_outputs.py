"""Outputs of sliced layers are ordinary tensors: changed in place, differentiated twice, asked for by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import chunkft

SHAPES = {"1-D": (8,), "2-D": (5, 8), "3-D": (2, 5, 8), "4-D": (2, 3, 5, 8), "empty": (0, 8)}


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    from transformers.pytorch_utils import Conv1D as TransformersConv1D

    return {
        "linear": nn.Linear(8, 8),
        "linear without bias": nn.Linear(8, 8, bias=False),
        "conv1d": TransformersConv1D(8, 8),
    }


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "relu": lambda y: nn.functional.relu(y, inplace=True),
    "add": lambda y: y.add_(1.0),
    "mul": lambda y: y.mul_(0.5),
    "row": lambda y: y.view(-1)[:1].zero_(),
    "dropout": lambda y: nn.functional.dropout(y, 0.0, training=True, inplace=True),
}


def gradients(model: nn.Module, x: Tensor, change: Callable[[Tensor], object]) -> list[Tensor]:
    y = model(x)
    change(y)
    y.square().sum().backward()
    return [y.detach()]


@pytest.mark.parametrize("slice_dim", [0, 1])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
def test_outputs_may_be_changed_in_place(
    kind: str, shape: tuple[int, ...], change: Callable[[Tensor], object], slice_dim: int
) -> None:
    layer = nn.Sequential(layers()[kind]).double()
    dense = copy.deepcopy(layer)
    optimizer = chunkft.ChunkAdamW(layer, chunks=1, slice_dim=slice_dim)
    for strided in (False, True) if kind != "conv1d" else (False,):  # which takes no gaps
        x = torch.randn(*shape, dtype=torch.float64)
        x = x.transpose(0, 1).contiguous().transpose(0, 1) if strided and len(shape) > 2 else x
        ours, theirs = gradients(layer, x, change), gradients(dense, x, change)
        torch.testing.assert_close(ours, theirs)
    for piece, leaf in optimizer.active_parameters():
        torch.testing.assert_close(leaf.grad, piece.of(dense.get_parameter(piece.name).grad))


def test_rows_of_a_table_may_be_changed_in_place() -> None:
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(9, 8))
    chunkft.ChunkAdamW(table, chunks=2)
    y = table(torch.arange(6).view(2, 3))
    y += 1
    torch.relu_(y)
    y.sum().backward()


@pytest.fixture
def restored() -> Iterator[None]:
    forwards = nn.Linear.forward, nn.Embedding.forward
    yield
    nn.Linear.forward, nn.Embedding.forward = forwards


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["linear", "embedding", "subclass"])
@pytest.mark.usefixtures("restored")
@pytest.mark.filterwarnings("ignore:the weight")
def test_a_forward_that_is_replaced_on_the_class_counts(kind: str, when: str) -> None:
    linear, embedding = nn.Linear.forward, nn.Embedding.forward
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    x = torch.arange(6)

    def patch(model: nn.Sequential) -> None:
        if kind == "linear":
            nn.Linear.forward = lambda self, x: linear(self, x) * 2
        elif kind == "embedding":
            nn.Embedding.forward = lambda self, x: embedding(self, x) + 0.5
        else:
            forward = {"forward": lambda self, x: linear(self, x) * 2}
            model[1].__class__ = type("Doubled", (nn.Linear,), forward)

    results = []
    for make in (
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
        lambda m: chunkft.ChunkAdamW(m, lr=1e-2, chunks=1),
    ):
        nn.Linear.forward, nn.Embedding.forward = linear, embedding
        model = copy.deepcopy(base)
        if when == "before":
            patch(model)
        optimizer = make(model)
        if when == "after":
            patch(model)
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(list(model.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slice_dim", [0, 1])
def test_a_gradient_penalty_is_that_of_dense_training(slice_dim: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1)).double()
    dense = copy.deepcopy(model)
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1, slice_dim=slice_dim)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def penalty(net: nn.Module) -> Tensor:
        (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return (gradient.norm(dim=1) - 1).square().mean() + net(x).square().mean()

    for _ in range(3):
        for net in (model, dense):
            net.zero_grad()
            penalty(net).backward()
        for piece, leaf in optimizer.active_parameters():
            expected = piece.of(dense.get_parameter(piece.name).grad)
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-9, atol=1e-12, msg=f"{piece}")
        optimizer.step()
        dense.load_state_dict(model.state_dict())


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.filterwarnings("ignore:the weight")
def test_gradients_asked_for_by_the_weights_are_those_of_the_slices(chunks: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    dense = copy.deepcopy(model)
    optimizer = chunkft.ChunkAdamW(model, chunks=chunks, interval=1)
    x = torch.arange(7)
    for _ in range(chunks):
        pieces = [piece for piece, _ in optimizer.active_parameters()]
        names = list(dict.fromkeys(piece.name for piece in pieces))
        ours = torch.autograd.grad(model(x).square().mean(), [model.get_parameter(name) for name in names])
        theirs = torch.autograd.grad(dense(x).square().mean(), [dense.get_parameter(name) for name in names])
        for name, a, b in zip(names, ours, theirs, strict=True):
            expected = torch.zeros_like(b)
            for piece in pieces:
                if piece.name == name:
                    piece.of(expected).copy_(piece.of(b))
            torch.testing.assert_close(a, expected, msg=name)
        assert all(leaf.grad is None for _, leaf in optimizer.active_parameters())
        model(x).square().mean().backward(inputs=[model.get_parameter(name) for name in names])
        dense.zero_grad()
        dense(x).square().mean().backward()
        for piece, leaf in optimizer.active_parameters():
            torch.testing.assert_close(leaf.grad, piece.of(dense.get_parameter(piece.name).grad))
        optimizer.step()
        dense.load_state_dict(model.state_dict())
