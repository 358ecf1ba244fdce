"""What a backward pass of compiled layers does to leaves: the same as one of eager layers, whatever the graph does."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import chunkft
from chunkft.autograd import compilable, stash

others = [pytest.param(name, marks=pytest.mark.slow) for name in ("eager", "aot_eager_decomp_partition")]
BACKENDS = ["aot_eager", *others]


class Twice(nn.Module):
    """Equal calls, which compilers merge."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7)

    def forward(self, ids):
        x = self.embed(ids) + self.embed(ids)
        x = self.up(x) + self.up(x)
        return self.down(x.tanh()) + 0 * self.down(x.tanh())


class Repeated(nn.Module):
    """One layer in several places, each of which reads its weight for the gradient of its input."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7)

    def forward(self, ids):
        x = self.embed(ids)
        for _ in range(3):
            x = x + self.layer(x).tanh()
        return self.head(x)


class Tied(nn.Module):
    """Three modules hold one weight; two of them read it in the backward pass."""

    def __init__(self):
        super().__init__()
        self.embed, self.middle = nn.Embedding(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 8, bias=False)
        self.middle.weight = self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.middle(self.embed(ids)).tanh())


class Recomputed(nn.Module):
    """Blocks whose forward pass runs again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 8), nn.Linear(8, 7)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2)
        )

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x)


MODELS = [Twice, Repeated, Tied, Recomputed]
IDS = torch.arange(7).repeat(2, 1)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(make, **settings):
    """The same model eager and with forwards for a compiler, each with an optimizer."""
    torch.manual_seed(0)
    plain = make()
    model = copy.deepcopy(plain)
    optimizers = [chunkft.ChunkAdamW(m, **{"chunks": 1, "lr": 1e-2, **settings}) for m in (plain, model)]
    compilable(model)
    return (plain, optimizers[0]), (model, optimizers[1])


def gradients(optimizer):
    return {str(piece): leaf.grad for piece, leaf in optimizer.active_parameters()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", MODELS)
def test_gradients_are_those_of_eager_calls(make, backend):
    (plain, reference), (model, optimizer) = pair(make)
    plain(IDS).square().sum().backward()
    torch.compile(model, backend=backend)(IDS).square().sum().backward()
    ours = gradients(optimizer)
    for name, expected in gradients(reference).items():
        torch.testing.assert_close(ours[name], expected, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("blockwise", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", MODELS)
def test_updates_in_the_backward_pass_wait_for_all_reads(make, blockwise, backend):
    # Large steps: a gradient that went through a weight after its update would be far off.
    settings = {"residency": "stream", "page_bytes": 256, "lr": 0.1}
    (plain, reference), _ = pair(make, update="step", **settings)
    _, (model, optimizer) = pair(make, update="backward", **settings)
    if blockwise:
        for child in model.modules():
            if not list(child.children()):
                child.compile(backend=backend)
        call = model
    else:
        call = torch.compile(model, backend=backend)
    for _ in range(3):
        plain(IDS).square().mean().backward()
        call(IDS).square().mean().backward()
        reference.step()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("make", [Repeated, Tied])
def test_hooks_of_a_leaf_run_once_in_a_pass(make):
    _, (model, optimizer) = pair(make)
    called = []
    leaves = [leaf for _, leaf in optimizer.active_parameters()]
    for leaf in leaves:
        leaf.register_post_accumulate_grad_hook(called.append)
    torch.compile(model, backend="aot_eager")(IDS).square().sum().backward()
    assert sorted(map(id, called)) == sorted(map(id, leaves))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_inputs_alone_leave_the_leaves_as_they_are(backend):
    (base, _), (model, optimizer) = pair(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)))
    call = torch.compile(model, backend=backend)
    x = torch.randn(5, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(base(x).square().sum(), x)
    (ours,) = torch.autograd.grad(call(x).square().sum(), x)
    torch.testing.assert_close(ours, expected)
    call(x).square().sum().backward(inputs=[x])
    torch.testing.assert_close(x.grad, expected)
    assert all(grad is None for grad in gradients(optimizer).values())
    assert not list(stash._stashes.values())


def test_a_penalty_on_the_gradient_of_the_input_counts_once():
    (plain, reference), (model, optimizer) = pair(
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    )
    call = torch.compile(model, backend="aot_eager")
    x = torch.randn(5, 8, requires_grad=True)
    for run in (plain, call):
        weight = torch.autograd.grad(run(x).sum(), x)[0].norm().detach()
        (weight * run(x).square().sum()).backward()
    ours = gradients(optimizer)
    for name, expected in gradients(reference).items():
        torch.testing.assert_close(ours[name], expected, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_that_was_updated_since_its_forward_pass_is_noticed(backend):
    # as autograd does for eager calls: the gradient of the input would be that of another function
    _, (model, optimizer) = pair(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)))
    call = torch.compile(model, backend=backend)
    first, second = (call(torch.randn(5, 8)).square().sum() for _ in range(2))
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="was modified in place between its forward and its backward pass"):
        second.backward()
    call(torch.randn(5, 8)).sum().backward()


def test_a_pass_that_fails_keeps_no_gradients():
    _, (model, _optimizer) = pair(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)))
    first, last = torch.compile(model[0], backend="aot_eager"), torch.compile(model[2], backend="aot_eager")
    seen = []

    def fail(gradient):
        seen.extend(weakref.ref(found) for found in stash._stashes.values())
        raise ValueError("no gradient today")

    hidden = first(torch.randn(5, 8)).tanh()
    hidden.register_hook(fail)
    with pytest.raises(ValueError, match="no gradient today"):
        last(hidden).sum().backward()
    del hidden
    gc.collect()
    assert len(seen) == 1
    assert seen[0]() is None


def test_passes_inside_of_a_pass_have_stashes_of_their_own():
    (plain, reference), (model, optimizer) = pair(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))

    def run(block, last):
        x = torch.ones(3, 8, requires_grad=True)
        return last(checkpoint(block, last(x), use_reentrant=True)).square().sum()

    run(*plain).backward()
    block, last = (torch.compile(part, backend="aot_eager") for part in model)
    run(block, last).backward()
    ours = gradients(optimizer)
    for name, expected in gradients(reference).items():
        torch.testing.assert_close(ours[name], expected, msg=name)


def test_a_weight_of_a_compiled_and_an_eager_layer_is_not_updated_twice():
    _, (model, _optimizer) = pair(Tied, residency="stream", update="backward")
    model.head.compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match="a second backward pass reached"):
        model(IDS).square().sum().backward()


def test_the_backward_operator_alone_is_refused():
    _, (model, _optimizer) = pair(lambda: nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8)))
    number = model[0]._chunkft_forward.number
    with pytest.raises(RuntimeError, match="outside of a backward pass"):
        torch.ops.chunkft.sliced_embedding_backward(torch.ones(2, 8), torch.arange(2), number, "0")
