"""A compiled block has one graph, whichever slices of it are active, and trains them as eager code does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import chunkft
from chunkft.autograd import compilable, uncompilable


class Conv1D(nn.Module):
    """GPT-2's layer, as transformers has it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.1)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Block(nn.Module):
    def __init__(self, width, norm):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.up = nn.Linear(width, 3 * width, bias=False)
        self.gate = nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, width=8, depth=3, vocabulary=30, norm=True):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=3)
        self.blocks = nn.ModuleList(Block(width, norm) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def graphs():
    """A backend for ``torch.compile`` and the graphs that it was given."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return aot_eager(graph, inputs)

    yield backend, seen
    torch._dynamo.reset()


def train(model, optimizer, steps, shape=(4, 6)):
    generator = torch.Generator().manual_seed(1)
    losses, active = [], []
    for _ in range(steps):
        ids = torch.randint(0, 30, shape, generator=generator)
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.roll(1).flatten())
        loss.backward()
        active.append(optimizer.active)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, active


def compiled_run(model, backend, parts, steps=12, **options):
    settings = {"chunks": 5, "interval": 1, "lr": 1e-2, "always_active": ["*norm*"], **options}
    optimizer = chunkft.ChunkAdamW(model, **settings)
    compilable(model)
    for part in parts(model):
        part.compile(backend=backend, fullgraph=True)
    return optimizer, *train(model, optimizer, steps)


def everything(model):
    return [model.embed, *model.blocks, model.head]


@pytest.mark.parametrize("slice_dim", [0, 1])
def test_one_graph_a_block_for_all_chunks_and_the_bits_of_eager_training(graphs, slice_dim):
    backend, seen = graphs
    model = Model()
    eager = copy.deepcopy(model)
    reference = chunkft.ChunkAdamW(
        eager, chunks=5, interval=1, lr=1e-2, always_active=["*norm*"], slice_dim=slice_dim
    )
    expected, _ = train(eager, reference, 12)
    _, losses, active = compiled_run(model, backend, everything, slice_dim=slice_dim)
    assert set(active) == set(range(5))  # two sweeps and more
    # one for the embedding, one for the blocks (they share their code), one for the head
    names = [str(graph.code) for graph in seen]
    assert len(seen) == 3, names
    assert sum("sliced_embedding" in name for name in names) == 1
    assert sum(name.count("ops.chunkft.sliced_matmul") for name in names) == 3 + 1
    assert losses == expected
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_without_stable_forwards_chunks_compile_again(graphs):
    # what the test above counts is not given by itself
    backend, seen = graphs
    model = Model()
    optimizer = chunkft.ChunkAdamW(model, chunks=5, interval=1, always_active=["*norm*"])
    for part in model.blocks:
        part.compile(backend=backend)
    train(model, optimizer, 6)
    assert len(seen) > 3


def test_a_whole_model_is_one_graph_too(graphs):
    backend, seen = graphs
    model = Model()
    eager = copy.deepcopy(model)
    expected, _ = train(
        eager, chunkft.ChunkAdamW(eager, chunks=5, interval=1, lr=1e-2, always_active=["*norm*"]), 12
    )
    optimizer = chunkft.ChunkAdamW(model, chunks=5, interval=1, lr=1e-2, always_active=["*norm*"])
    compilable(model)
    losses, _ = train(torch.compile(model, backend=backend, fullgraph=True), optimizer, 12)
    assert len(seen) == 1
    assert losses == expected


def test_atomic_parameters_that_come_and_go_compile_a_block_twice_at_most(graphs):
    backend, seen = graphs
    _, _, active = compiled_run(Model(), backend, lambda model: model.blocks, 15, always_active=None)
    assert set(active) == set(range(5))
    assert len(seen) <= 4  # norms active or not, input with or without a gradient


def test_biases_and_input_major_weights(graphs, monkeypatch):
    from chunkft.autograd import operators
    from chunkft.autograd.operators import SlicedOperator

    operator = SlicedOperator(operators._conv1d, compiled=operators._compiled_conv1d)
    monkeypatch.setitem(operators._OPERATORS, Conv1D, operator)
    backend, seen = graphs
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), Conv1D(10, 7), nn.Tanh(), nn.Linear(7, 30))
    eager = copy.deepcopy(model)
    x, y = torch.randn(9, 6), torch.randint(0, 30, (9,))

    def run(module, optimizer):
        for _ in range(10):
            F.cross_entropy(module(x), y).backward()
            optimizer.step()

    settings = {"chunks": 4, "interval": 1, "lr": 1e-2}
    run(eager, chunkft.ChunkAdamW(eager, **settings))
    optimizer = chunkft.ChunkAdamW(model, **settings)
    assert compilable(model) == 3
    run(torch.compile(model, backend=backend, fullgraph=True), optimizer)
    assert len(seen) == 1
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_inputs_are_kept_for_active_slices_only(graphs):
    backend, _ = graphs
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    optimizer = chunkft.ChunkAdamW(model, chunks=8, interval=1, partition="layers")
    compilable(model)
    model.compile(backend=backend, fullgraph=True)
    x = torch.randn(32, 64)
    for _ in range(8):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.setdefault(id(t), t), lambda t: t
        ):
            y = model(x).square().sum()
        large = [t for t in kept.values() if t.numel() == 32 * 64]
        assert len(large) <= 2  # the input of the one active layer, and what the square keeps
        y.backward()
        optimizer.step()


def test_accumulation_hooks_and_evaluation(graphs):
    backend, seen = graphs
    model = Model()
    optimizer = chunkft.ChunkAdamW(model, chunks=5, interval=1, always_active=["*norm*"])
    compilable(model)
    ids = torch.randint(0, 30, (4, 6))
    model(ids).square().sum().backward()
    once = [leaf.grad.clone() for _, leaf in optimizer.active_parameters()]
    for part in everything(model):
        part.compile(backend=backend, fullgraph=True)
    optimizer.zero_grad()
    called = []
    for _, leaf in optimizer.active_parameters():
        leaf.register_post_accumulate_grad_hook(called.append)
    for _ in range(2):
        model(ids).square().sum().backward()
    assert len(called) == 2 * len(once)
    for (_, leaf), single in zip(optimizer.active_parameters(), once, strict=True):
        assert torch.equal(leaf.grad, 2 * single)
    before = len(seen)
    with torch.no_grad():
        evaluated = model(ids)
    assert torch.equal(evaluated, model(ids))
    assert len(seen) == before + 3  # one more for either mode, and no more
    with torch.no_grad():
        model(ids)
    assert len(seen) == before + 3


def test_a_switch_between_forward_and_backward_is_noticed(graphs):
    backend, _ = graphs
    model = nn.Sequential(nn.Linear(8, 64, bias=False), nn.Linear(64, 64, bias=False))
    optimizer = chunkft.ChunkAdamW(model, chunks=2, interval=1, partition="layers")
    compilable(model)
    model.compile(backend=backend)
    loss = model(torch.randn(5, 8)).sum()
    optimizer._attachment.activate(optimizer.plan.chunks[1].slices)
    with pytest.raises(RuntimeError, match="changed between its forward and its backward pass"):
        loss.backward()


def test_copies_and_detached_models_have_forwards_of_their_own(graphs):
    backend, _ = graphs
    model = Model()
    optimizer = chunkft.ChunkAdamW(model, chunks=5, always_active=["*norm*"])
    compilable(model)
    copied = copy.deepcopy(model)
    assert all("forward" not in module.__dict__ for module in copied.modules())
    optimizer.detach()
    assert all("forward" not in module.__dict__ for module in model.modules())
    compilable(model)
    ids = torch.randint(0, 30, (4, 6))
    model(ids).square().sum().backward()
    dense = [p.grad for p in model.parameters()]
    model.zero_grad()
    for part in everything(model):
        part.compile(backend=backend, fullgraph=True)
    model(ids).square().sum().backward()  # without an optimizer of ours: all weights are trained, as ever
    for ours, theirs in zip(model.parameters(), dense, strict=True):
        assert torch.equal(ours.grad, theirs)
    uncompilable(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_eager_calls_keep_their_bits_and_their_early_stop():
    model = Model()
    plain = copy.deepcopy(model)
    optimizers = [chunkft.ChunkAdamW(m, chunks=5, interval=1, lr=1e-2) for m in (model, plain)]
    compilable(model)
    assert train(model, optimizers[0], 8) == train(plain, optimizers[1], 8)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    while any(piece.name.startswith("embed") for piece, _ in optimizers[0].active_parameters()):
        train(model, optimizers[0], 1)
    assert not model.embed(torch.tensor([1])).requires_grad


@pytest.mark.slow
def test_the_default_backend_makes_one_graph_too():
    torch._dynamo.reset()
    model = Model(depth=1)
    eager = copy.deepcopy(model)
    expected, _ = train(
        eager, chunkft.ChunkAdamW(eager, chunks=5, interval=1, lr=1e-2, always_active=["*norm*"]), 6
    )
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    _, losses, _ = compiled_run(model, "inductor", lambda m: [m.embed, *m.blocks], 6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 2
    assert losses == pytest.approx(expected, rel=1e-4)
    torch._dynamo.reset()
