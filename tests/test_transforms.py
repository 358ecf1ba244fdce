"""Function transforms, traces and exports of a model that is trained, and parameters that are made from its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vjp, vmap
from torch.nn.utils import parametrizations, prune

import chunkft

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3)).double()


def of_the_input(model: nn.Module) -> Any:
    return vjp(model, X)[1](torch.ones(5, 3, dtype=torch.float64))[0]


def jacobian(model: nn.Module) -> Any:
    return jacrev(model)(X)


def vectorized_jacobian(model: nn.Module) -> Any:
    return torch.autograd.functional.jacobian(model, X, vectorize=True)


def batched(model: nn.Module) -> Any:
    x = X.clone().requires_grad_()
    seeds = torch.ones(2, 5, 3, dtype=torch.float64)
    return torch.autograd.grad(model(x), x, seeds, is_grads_batched=True)[0]


def mapped(model: nn.Module) -> Any:
    return vmap(model)(X)


def of_the_head(model: nn.Module) -> Any:
    head = {"3.weight": model[3].weight.detach().clone()}
    return torch.func.grad(lambda values: functional_call(model, values, (X,)).square().mean())(head)[
        "3.weight"
    ]


def traced(model: nn.Module) -> Any:
    return torch.jit.trace(model, X, check_trace=False)(X)


def exported(model: nn.Module) -> Any:
    return torch.export.export(model, (X,)).module()(X)


PROBES = [of_the_input, jacobian, vectorized_jacobian, batched, mapped, of_the_head, traced, exported]


@pytest.mark.parametrize("probe", PROBES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_probe_in_grad_mode_is_that_of_the_plain_model_and_changes_no_training(
    probe: Callable[[nn.Module], Tensor], chunks: int
) -> None:
    model, undisturbed = net(), net()
    first = chunkft.ChunkAdamW(model, lr=1e-2, chunks=chunks, interval=1)
    second = chunkft.ChunkAdamW(undisturbed, lr=1e-2, chunks=chunks, interval=1)
    for _ in range(4):
        plain = copy.deepcopy(undisturbed)
        torch.testing.assert_close(probe(model), probe(plain), rtol=1e-12, atol=1e-12)
        for m in (model, undisturbed):
            m(X).square().mean().backward()
        for optimizer in (first, second):
            optimizer.step()
        for (name, a), b in zip(model.named_parameters(), undisturbed.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_parameters_may_be_made_of_parameters() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=2, interval=1)
    frozen = nn.Embedding.from_pretrained(model[0].weight)
    twin = nn.Parameter(model[1].weight, requires_grad=False)
    assert isinstance(frozen.weight, nn.Parameter)
    assert not frozen.weight.requires_grad
    assert not twin.requires_grad
    assert twin.requires_grad_(True).requires_grad
    twin.square().sum().backward()
    assert twin.grad is not None
    assert model[1].weight.grad is None
    assert type(model[1].weight.detach()) is Tensor
    assert type(copy.deepcopy(twin)) is nn.Parameter
    model(torch.arange(4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", ["prune", "parametrize", "wrap"])
def test_a_weight_that_was_taken_away_is_named_and_detach_gives_all_back(change: str) -> None:
    model = net()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=2, interval=1)
    if change == "prune":
        prune.l1_unstructured(model[3], "weight", 0.2)
    elif change == "parametrize":
        parametrizations.orthogonal(model[3])
    else:
        model[3] = nn.Sequential(model[3])

    def train() -> None:
        for _ in range(2):
            model(X).square().mean().backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match=r"'3\.weight' is no longer in the model; build a new optimizer"):
        train()
    optimizer.detach()
    model.zero_grad()
    model(X).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None, name
        assert type(parameter) is nn.Parameter, name


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_or_traced_part_trains_as_with_adamw(how: str) -> None:
    def build() -> nn.Module:
        inner = net()
        part = torch.jit.script(inner) if how == "script" else torch.jit.trace(inner, X)
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 6).double(), part)

    model, dense = build(), build()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=1)
    reference = torch.optim.AdamW(dense.parameters(), lr=1e-2)
    for _ in range(3):
        for m, o in ((model, optimizer), (dense, reference)):
            m(X).square().mean().backward()
            o.step()
            o.zero_grad()
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_is_refused_and_a_copy_of_an_attached_one_can_be_scripted() -> None:
    with pytest.raises(TypeError, match="RecursiveScriptModule: what is scripted or traced as a whole"):
        chunkft.ChunkAdamW(torch.jit.script(net()), lr=1e-2, chunks=2)
    model = net()
    chunkft.ChunkAdamW(model, lr=1e-2, chunks=2)
    scripted = torch.jit.script(copy.deepcopy(model))
    assert torch.equal(scripted(X), model(X))
