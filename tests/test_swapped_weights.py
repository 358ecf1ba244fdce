"""Weights that are swapped for a call, or given other memory: what counts is what the model holds."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from residencies import MODES
from torch import nn
from torch.func import functional_call, grad, vmap

import chunkft

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
RESIDENCIES = {"memory": {}, **MODES}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 8)).double()


def detached(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() * 0.9 for name, p in model.named_parameters()}


def teacher(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return functional_call(model, detached(model), (X,))


def parameters_of_another(model: nn.Module) -> torch.Tensor:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    return functional_call(model, dict(other.named_parameters()), (X,)).detach()


def other_precision(model: nn.Module) -> torch.Tensor:
    halves = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    with torch.no_grad():
        return functional_call(model, halves, (X.bfloat16(),))


def some_only(model: nn.Module) -> torch.Tensor:
    return functional_call(model, {"3.weight": model[3].weight.detach() * 2}, (X,)).detach()


def per_sample(model: nn.Module) -> torch.Tensor:
    def loss(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_call(model, values, (x[None],)).square().mean()

    return vmap(grad(loss), in_dims=(None, 0))(detached(model), X)["3.weight"]


def inner_step(model: nn.Module) -> torch.Tensor:
    fast = {name: value.requires_grad_() for name, value in detached(model).items()}
    return torch.autograd.grad(functional_call(model, fast, (X,)).square().mean(), fast["0.weight"])[0]


def swapped_data(model: nn.Module) -> torch.Tensor:
    kept = [p.data for p in model.parameters()]
    for p in model.parameters():
        p.data = p.data * 0.9
    with torch.no_grad():
        result = model(X)
    for p, data in zip(model.parameters(), kept, strict=True):
        p.data = data
    return result


PROBES = [
    teacher,
    parameters_of_another,
    other_precision,
    some_only,
    per_sample,
    inner_step,
    swapped_data,
]


@pytest.mark.parametrize("probe", PROBES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", RESIDENCIES)
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_swap_for_one_call_changes_no_training(
    chunks: int, mode: str, probe: Callable[[nn.Module], torch.Tensor]
) -> None:
    model, undisturbed = net(), net()
    first = chunkft.ChunkAdamW(model, lr=1e-2, chunks=chunks, interval=1, **RESIDENCIES[mode])
    second = chunkft.ChunkAdamW(undisturbed, lr=1e-2, chunks=chunks, interval=1, **RESIDENCIES[mode])
    plain = copy.deepcopy(undisturbed)
    for _ in range(5):
        plain.load_state_dict(undisturbed.state_dict())
        assert torch.equal(probe(model), probe(plain))
        for m in (model, undisturbed):
            m(X).square().mean().backward()
        between = probe(model)
        if "backward" not in mode:  # which has updated the weights by now
            assert torch.equal(between, probe(plain))
        for optimizer in (first, second):
            optimizer.step()
        for (name, a), b in zip(model.named_parameters(), undisturbed.parameters(), strict=True):
            assert torch.equal(a, b), name


class Assigning(torch.optim.Optimizer):
    """SGD as it is written by hand: every parameter gets other memory."""

    def __init__(self, params, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad.data


@pytest.mark.parametrize("slice_dim", [0, 1])
@pytest.mark.parametrize("mode", RESIDENCIES)
def test_a_base_that_assigns_data_trains_the_model(mode: str, slice_dim: int) -> None:
    model, dense = net(), net()
    options = {**RESIDENCIES[mode], "slice_dim": slice_dim}
    optimizer = chunkft.ChunkOptimizer(model, Assigning, chunks=1, lr=0.1, **options)
    reference = torch.optim.SGD(dense.parameters(), lr=0.1)
    for _ in range(4):
        for m, o in ((model, optimizer), (dense, reference)):
            m(X).square().mean().backward()
            o.step()
            o.zero_grad()
        for (name, a), b in zip(model.named_parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


def test_leaves_that_others_assign_between_steps_count() -> None:
    """As the second step of SAM does, which puts the weights back that the first one moved."""
    model, dense = net(), net()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=1)
    reference = torch.optim.AdamW(dense.parameters(), lr=1e-2)
    for _ in range(4):
        for m, o in ((model, optimizer), (dense, reference)):
            m(X).square().mean().backward()
            leaves = [p for group in o.param_groups for p in group["params"]]
            kept = [p.data.clone() for p in leaves]
            with torch.no_grad():
                for p in leaves:
                    p.add_(p.grad * 0.05)
            o.zero_grad()
            m(X).square().mean().backward()
            for p, data in zip(leaves, kept, strict=True):
                p.data = data
            o.step()
            o.zero_grad()
        for (name, a), b in zip(model.named_parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


def test_a_leaf_of_another_shape_is_refused() -> None:
    model = net()
    optimizer = chunkft.ChunkAdamW(model, chunks=1)
    _, leaf = next(iter(optimizer.active_parameters()))
    leaf.data = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"\.data of the leaf of 0\.weight.*\(3, 3\); needs \(16, 8\)"):
        model(X)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids))


def test_weights_that_loading_untied_are_refused_until_they_are_tied_again() -> None:
    model = Tied()
    optimizer = chunkft.ChunkAdamW(model, chunks=1)
    ids = torch.arange(6)
    model(ids).square().mean().backward()
    optimizer.step()
    values = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(values, assign=True)  # the next line may tie them again
    for call in (lambda: model(ids), optimizer.step, lambda: model(ids)):
        with pytest.raises(
            RuntimeError, match=r"'words.weight' was shared.*load_state_dict\(assign=True\).*tie"
        ):
            call()
    model.head.weight = model.words.weight
    before = model.words.weight.detach().clone()
    model(ids).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.words.weight, before)
    assert model.head.weight is model.words.weight


@pytest.mark.parametrize("mode", RESIDENCIES)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trainable"])
def test_parameters_that_are_put_in_for_one_call_and_taken_out_by_hand_change_no_training(
    mode: str, trained: bool
) -> None:
    """A mean teacher by hand, in grad mode, between the student's forward and its backward pass."""
    model, undisturbed = net(), net()
    optimizers = [
        chunkft.ChunkAdamW(m, lr=1e-2, chunks=3, interval=1, **RESIDENCIES[mode])
        for m in (model, undisturbed)
    ]
    for _ in range(5):
        loss = model(X).square().mean()
        kept = {
            name: (module, module.weight)
            for name, module in model.named_children()
            if hasattr(module, "weight")
        }
        for module, weight in kept.values():
            module.weight = nn.Parameter(weight.detach() * 0.9, requires_grad=trained)
        teacher_says = model(X).detach()
        for module, weight in kept.values():
            module.weight = weight
        assert not torch.equal(teacher_says, model(X))
        loss.backward()
        undisturbed(X).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        for (name, a), b in zip(model.named_parameters(), undisturbed.parameters(), strict=True):
            assert a.requires_grad, name
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


def test_a_weight_that_was_taken_out_is_an_ordinary_one() -> None:
    model = net()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=1)
    old = model[3].weight
    model[3].weight = nn.Parameter(old.detach().clone())
    model(X).square().mean().backward()
    optimizer.step()
    assert old.requires_grad
    assert type(old) is nn.Parameter
    old.requires_grad_(False)
    assert model[3].weight.requires_grad
    before = model[3].weight.detach().clone()
    model(X).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model[3].weight)
    old.requires_grad_(True)
    (old * 2).sum().backward()
    assert old.grad is not None


def test_weights_that_change_places_are_followed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=2, interval=1)
    model[2].weight.requires_grad_(False)
    model[0].weight, model[2].weight = model[2].weight, model[0].weight
    before = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    for _ in range(4):
        model(X).square().mean().backward()
        optimizer.step()
    assert [model[0].weight.requires_grad, model[2].weight.requires_grad] == [False, True]
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[2].weight, before[1])
