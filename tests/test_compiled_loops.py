"""Compiled models give the gradients of eager ones, also where a compiler may merge, move or leave out operators."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import chunkft
from chunkft.autograd import compilable

BACKENDS = ["eager", "aot_eager", "aot_eager_decomp_partition"]
IDS = torch.arange(7)


class Twice(nn.Module):
    """Equal calls, as shared layers make them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(7, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.table(ids)
        return self.layer(x) + self.layer(x)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: str) -> nn.Module:
    compilable(model)
    return torch.compile(model, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", [1, 2])
def test_equal_calls_count_each(backend: str, chunks: int) -> None:
    model, eager = Twice(), Twice()
    optimizers = [chunkft.ChunkAdamW(m, lr=1e-2, chunks=chunks, interval=1) for m in (model, eager)]
    call = compiled(model, backend)
    for _ in range(2 * chunks):
        call(IDS).square().sum().backward()
        eager(IDS).square().sum().backward()
        pairs = zip(*(optimizer.active_parameters() for optimizer in optimizers), strict=True)
        for (piece, a), (_, b) in pairs:
            torch.testing.assert_close(a.grad, b.grad, msg=f"{piece}")
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_updates_in_the_backward_pass_come_after_the_weight_was_read(backend: str) -> None:
    torch.manual_seed(0)
    layers = (
        nn.Linear(16, 16, bias=False),
        nn.Tanh(),
        nn.Linear(16, 16, bias=False),
        nn.Tanh(),
        nn.Linear(16, 4),
    )
    model = nn.Sequential(*layers)
    eager = copy.deepcopy(model)
    options = {"lr": 1e-1, "chunks": 1, "residency": "stream", "page_bytes": 256}
    backward = chunkft.ChunkAdamW(model, update="backward", **options)
    step = chunkft.ChunkAdamW(eager, update="step", **options)
    call, x = compiled(model, backend), torch.randn(8, 16)
    for _ in range(2):
        call(x).square().sum().backward()
        eager(x).square().sum().backward()
        backward.step()
        step.step()
    for (name, a), b in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_gradients_of_an_input_alone_leave_the_leaves_alone(backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    plain = copy.deepcopy(model)
    optimizer = chunkft.ChunkAdamW(model, chunks=1)
    call = compiled(model, backend)
    x, y = (torch.randn(8, 16).requires_grad_() for _ in range(2))
    (ours,) = torch.autograd.grad(call(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(plain(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs)
    call(y).square().sum().backward(inputs=[y])
    assert all(leaf.grad is None for _, leaf in optimizer.active_parameters())
    call(x).square().sum().backward()
    assert all(leaf.grad is not None for _, leaf in optimizer.active_parameters())


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("late", [False, True], ids=["before-compiling", "after-a-step"])
def test_a_hook_on_a_sliced_weight_is_refused_by_name(backend: str, late: bool) -> None:
    model = Twice()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=1)
    call = compiled(model, backend)
    if late:
        call(IDS).square().sum().backward()
        optimizer.step()
    handle = model.layer.weight.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(RuntimeError, match=r"'layer\.weight' has a hook.*compiled layer"):
        call(IDS).square().sum().backward()
    handle.remove()
    optimizer.zero_grad()
    call(IDS).square().sum().backward()
    optimizer.step()


def test_a_hook_on_an_atomic_weight_of_a_compiled_model_is_called() -> None:
    model = Twice()
    plan = chunkft.partition(model, 1, atomic="layer.weight")
    chunkft.ChunkAdamW(model, lr=1e-2, chunks=None, partition=plan)
    call, seen = compiled(model, "aot_eager"), []
    model.layer.weight.register_hook(lambda gradient: seen.append(gradient.shape))
    call(IDS).square().sum().backward()
    assert seen == [(8, 8)]


@pytest.mark.parametrize("way", ["wrapper", "in place", "function"])
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_chunk_that_is_frozen_as_a_whole_is_a_step_that_changes_nothing(backend: str, way: str) -> None:
    model, eager = Twice(), Twice()
    optimizers = [chunkft.ChunkAdamW(m, lr=1e-2, chunks=2, interval=1) for m in (model, eager)]
    call = model if way == "in place" else torch.compile(model, backend=backend)
    if way == "in place":
        model.compile(backend=backend)
    if way == "function":
        call = torch.compile(lambda ids: model(ids) * 1.0, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(6):
            for m, forward, optimizer in ((model, call, optimizers[0]), (eager, eager, optimizers[1])):
                m.table.requires_grad_(step // 2 % 2 == 1)
                forward(IDS).square().sum().backward()
                optimizer.step()
    assert optimizers[0].active == optimizers[1].active
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_blocks_without_fullgraph_have_one_graph_too() -> None:
    model, graphs = Twice(), []

    class Block(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids)

    block = Block(model)
    optimizer = chunkft.ChunkAdamW(block, lr=1e-2, chunks=2, interval=1)
    compilable(block)
    call = torch.compile(block.inner.forward, backend=lambda graph, inputs: (graphs.append(graph), graph)[1])
    for _ in range(4):
        call(IDS).square().sum().backward()
        optimizer.step()
    assert len(graphs) == 1
