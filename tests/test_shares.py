"""Several optimizers on one model, each with parameters of its own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from residencies import MODES
from torch import nn

import chunkft

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
RESIDENCIES = {"memory": {}, **MODES}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    return nn.Sequential(*layers).double()


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    parameters = list(model.parameters())
    return [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() < 2]


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 4) -> None:
    for _ in range(steps):
        model(X).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name


@pytest.mark.parametrize("mode", RESIDENCIES)
def test_two_optimizers_train_as_two_of_torch_do(mode: str) -> None:
    model, dense = net(), net()
    chunkft.attach(model)
    matrices, rest = split(model)
    first = chunkft.ChunkOptimizer(
        matrices, torch.optim.SGD, lr=0.1, momentum=0.9, chunks=1, **RESIDENCIES[mode]
    )
    second = chunkft.ChunkAdamW(rest, lr=1e-2, chunks=1, **RESIDENCIES[mode])
    train(model, [first, second])
    matrices, rest = split(dense)
    train(dense, [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(rest, lr=1e-2)])
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(
            p, q, rtol=1e-12, atol=1e-12, msg=name
        )  # small slices, other order of sums


@pytest.mark.parametrize("order", ["torch first", "chunkft first"])
def test_an_optimizer_of_torch_trains_what_is_left(order: str) -> None:
    model, dense = net(), net()
    chunkft.attach(model)
    matrices, rest = split(model)
    makes: list[Callable[[], torch.optim.Optimizer]] = [
        lambda: torch.optim.AdamW(rest, lr=1e-2),
        lambda: chunkft.ChunkAdamW(matrices, lr=1e-2, chunks=1),
    ]
    optimizers = [make() for make in (makes if order == "torch first" else reversed(makes))]
    train(model, optimizers)
    train(dense, [torch.optim.AdamW(dense.parameters(), lr=1e-2)])
    assert_same(model, dense)


def test_each_has_a_schedule_of_its_own() -> None:
    model = net()
    chunkft.attach(model)
    learners = [
        chunkft.ChunkAdamW(list(model[:2].parameters()), lr=1e-2, chunks=2, interval=1),
        chunkft.ChunkAdamW(list(model[3:].parameters()), lr=1e-2, chunks=3, interval=2),
    ]
    for _ in range(12):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        active = {piece.name for learner in learners for piece, _ in learner.active_parameters()}
        train(model, learners, steps=1)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == active
    assert [learner.sweep for learner in learners] == [6, 2]


def test_detaching_one_leaves_the_other() -> None:
    model = net()
    chunkft.attach(model)
    matrices, rest = split(model)
    first = chunkft.ChunkAdamW(matrices, lr=1e-2, chunks=2, interval=1)
    second = chunkft.ChunkAdamW(rest, lr=1e-2, chunks=2, interval=1)
    train(model, [first, second], steps=1)
    first.detach()
    assert all(type(p) is nn.Parameter and p.requires_grad for p in matrices)
    before = copy.deepcopy(model)
    train(model, [second, torch.optim.SGD(matrices, lr=0.1)], steps=2)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    with pytest.raises(RuntimeError, match=r"step\(\) after detach\(\)"):
        first.step()
    again = chunkft.ChunkAdamW(matrices, lr=1e-2, chunks=1)
    train(model, [again, second], steps=1)
    again.detach()
    second.detach()
    assert "_chunkft" not in vars(model)
    assert all(type(p) is nn.Parameter and p.requires_grad and p.grad is None for p in model.parameters())
    chunkft.ChunkAdamW(model, chunks=2)


def test_detaching_the_model_ends_both() -> None:
    model = net()
    chunkft.attach(model)
    matrices, rest = split(model)
    optimizers = [chunkft.ChunkAdamW(part, chunks=1) for part in (matrices, rest)]
    chunkft.attach(model).detach()
    for optimizer in optimizers:
        with pytest.raises(RuntimeError, match=r"after detach\(\)"):
            optimizer.step()
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())


def test_a_parameter_belongs_to_one_optimizer() -> None:
    model = net()
    chunkft.attach(model)
    matrices, rest = split(model)
    first = chunkft.ChunkAdamW(matrices, lr=1e-2, chunks=1)
    with pytest.raises(ValueError, match=r"'3.weight' is trained by another optimizer.*detach\(\)"):
        chunkft.ChunkAdamW([model[3].weight, *rest], chunks=1)
    with pytest.raises(ValueError, match=r"another optimizer.*detach\(\)"):
        chunkft.ChunkAdamW(model, chunks=1)
    with pytest.raises(ValueError, match="chunks"):
        chunkft.ChunkAdamW(rest, chunks=0)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in rest)
    second = chunkft.ChunkAdamW(rest, lr=1e-2, chunks=1)
    train(model, [first, second])


def test_state_of_each_is_saved_and_goes_on() -> None:
    def build() -> tuple[nn.Module, list[chunkft.ChunkOptimizer]]:
        model = net()
        chunkft.attach(model)
        matrices, rest = split(model)
        return model, [chunkft.ChunkAdamW(part, lr=1e-2, chunks=2, interval=1) for part in (matrices, rest)]

    model, optimizers = build()
    train(model, optimizers, steps=3)
    saved = [optimizer.state_dict() for optimizer in optimizers]
    other, others = build()
    other.load_state_dict(model.state_dict())
    for optimizer, state in zip(others, saved, strict=True):
        optimizer.load_state_dict(state)
    for m, o in ((model, optimizers), (other, others)):
        train(m, o, steps=4)
    assert_same(model, other)


def test_a_copy_of_a_model_with_two_is_free() -> None:
    model = net()
    chunkft.attach(model)
    matrices, rest = split(model)
    optimizers = [chunkft.ChunkAdamW(part, chunks=2) for part in (matrices, rest)]
    train(model, optimizers, steps=1)
    other = copy.deepcopy(model)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in other.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(other, [torch.optim.AdamW(other.parameters())], steps=1)
        train(model, optimizers, steps=1)


@pytest.mark.parametrize("change", ["assign", "new head"])
def test_what_came_into_the_model_before_its_optimizer_is_known_after_attaching_again(change: str) -> None:
    model = net()
    chunkft.attach(model)
    parts = [list(part.parameters()) for part in model]
    first = chunkft.ChunkAdamW([p for part in parts[:-1] for p in part], lr=1e-2, chunks=1)
    if change == "assign":
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    else:
        model[-1] = nn.Linear(model[-1].in_features, 7).to(model[-1].weight.dtype)
    chunkft.attach(model)
    second = chunkft.ChunkAdamW(model[-1].parameters(), lr=1e-2, chunks=1)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, [first, second])
    assert not any(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_a_copy_leaves_flags_alone_that_no_optimizer_of_ours_owns() -> None:
    model = net()
    chunkft.attach(model)
    chunkft.ChunkAdamW(model[-1].parameters(), lr=1e-2, chunks=1)
    model[0].requires_grad_(False)
    copied = copy.deepcopy(model)
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not any(p.requires_grad for p in copied[0].parameters())
