"""``requires_grad`` of a weight says whether it is trained, at any moment, active or not."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from residencies import MODES
from torch import nn

import chunkft
from chunkft.autograd import records

RESIDENCIES = {"memory": {}, **MODES}
X = torch.randint(0, 19, (6,), generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Embedding(19, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 4)
    return nn.Sequential(*layers).double()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def by_flag(weight: nn.Parameter) -> None:
    weight.requires_grad = False


def by_call(weight: nn.Parameter) -> None:
    weight.requires_grad_(False)


@pytest.mark.parametrize("freeze", [by_flag, by_call])
@pytest.mark.parametrize("name", RESIDENCIES)
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_frozen_weight_stays_and_the_others_train_on(
    name: str, chunks: int, freeze: Callable[[nn.Parameter], None]
) -> None:
    model = net()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=chunks, interval=1, **RESIDENCIES[name])
    for _ in range(3):
        step(model, optimizer)
    frozen = {"0.weight", "1.bias", "2.weight"}
    for key in frozen:
        freeze(model.get_parameter(key))
    before = values(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a whole chunk may be frozen
        for _ in range(2 * len(optimizer.plan)):
            step(model, optimizer)
    assert changed(model, before) == set(before) - frozen
    assert {key for key, p in model.named_parameters() if not p.requires_grad} == frozen
    for key in frozen:
        model.get_parameter(key).requires_grad_(True)
    for _ in range(2 * len(optimizer.plan)):
        step(model, optimizer)
    assert changed(model, before) == set(before)
    model[1].requires_grad_(False)
    optimizer.detach()
    assert [key for key, p in model.named_parameters() if not p.requires_grad] == ["1.weight", "1.bias"]
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_with_one_chunk_a_weight_that_rests_is_that_of_adamw() -> None:
    dense, chunked = net(), net()
    pairs = [(dense, torch.optim.AdamW(dense.parameters(), lr=1e-2))]
    pairs.append((chunked, chunkft.ChunkAdamW(chunked, lr=1e-2, chunks=1)))
    for model, optimizer in pairs:
        for number in range(9):
            model[4].requires_grad_(number not in (3, 4))
            model[2].requires_grad_(number % 4 != 1)
            step(model, optimizer)
    for a, b in zip(dense.parameters(), chunked.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_moment_of_requires_grad_changes_no_gradient() -> None:
    model = net()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=4, interval=1)
    listed = [p for p in model.parameters() if p.requires_grad]
    assert len(listed) == len(list(model.parameters()))
    for number in range(8):
        if number % 2:
            model.requires_grad_(False)
            model.requires_grad_(True)
        model(X).square().mean().backward()
        grads = [leaf.grad for _, leaf in optimizer.active_parameters() if leaf.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        for parameters in (listed, model.parameters()):
            assert torch.equal(torch.nn.utils.clip_grad_norm_(parameters, 1e9), norm)
        assert sum(p.grad is not None for p in model.parameters()) < len(listed)
        optimizer.step()


def test_autograd_records_the_active_parameters_only() -> None:
    model = net()
    optimizer = chunkft.ChunkAdamW(model, chunks=4, interval=1)
    active = {piece.name for piece, _ in optimizer.active_parameters()}
    assert {name for name, p in model.named_parameters() if records(p)} == active
    seen = []
    model[1].register_forward_pre_hook(lambda m, args: seen.append([p.requires_grad for p in m.parameters()]))
    model(X)
    assert seen == [[f"1.{name}" in active for name in ("weight", "bias")]]  # kernels ask while they run


def test_a_generator_trains_through_a_frozen_discriminator() -> None:
    def gan(chunk: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        a, b = nn.Linear(4, 8).double(), nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        make = (lambda m: chunkft.ChunkAdamW(m, lr=1e-2, chunks=1)) if chunk else _adamw
        of_a, of_b = make(a), make(b)
        for _ in range(4):
            noise = torch.randn(6, 4, dtype=torch.float64)
            b.requires_grad_(False)
            b(a(noise)).mean().backward()
            of_a.step()
            of_a.zero_grad()
            b.requires_grad_(True)
            (-b(a(noise).detach()).mean()).backward()
            of_b.step()
            of_b.zero_grad()
        return values(nn.ModuleList([a, b]))

    dense, chunked = gan(False), gan(True)
    for name, value in dense.items():
        assert torch.equal(value, chunked[name]), name


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
def test_a_copy_is_free_and_trains_what_was_not_frozen(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=4, interval=1)
    step(model, optimizer)
    model[2].requires_grad_(False)
    other = copied(model)
    assert torch.equal(other(X), model(X))
    assert all(type(p) is nn.Parameter for p in other.parameters())
    assert not any(key.startswith("_chunkft") and value is not None for key, value in vars(other).items())
    before = values(other)
    dense = _adamw(other)
    for _ in range(2):
        step(other, dense)
    assert changed(other, before) == set(before) - {"2.weight", "2.bias"}
    second = chunkft.ChunkAdamW(other, chunks=2, interval=1)
    for _ in range(2):
        step(other, second)


@pytest.mark.parametrize("way", ["set", "made frozen", "loaded part"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_what_replaces_a_weight_is_frozen_if_it_says_so(chunks: int, way: str) -> None:
    model = net()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=chunks, interval=1)
    if way == "loaded part":
        loaded = {key: value.clone() for key, value in model[4].state_dict().items()}
        model[4].load_state_dict(loaded, assign=True)
        assert all(p.requires_grad for p in model.parameters())
        model[4].requires_grad_(False)
    else:
        pretrained = torch.randn(4, 16, dtype=torch.float64)
        model[4].weight = nn.Parameter(pretrained, requires_grad=way == "set")
        model[4].requires_grad_(False)
    before = values(model)
    for _ in range(6):
        step(model, optimizer)
    assert [p.requires_grad for p in model.parameters()] == [True] * 5 + [False] * 2
    assert changed(model, before) == before.keys() - {"4.weight", "4.bias"}
    model[4].requires_grad_(True)
    for _ in range(6):
        step(model, optimizer)
    assert changed(model, before) == before.keys()


def test_a_weight_that_is_frozen_between_forward_and_backward_with_early_updates_is_named() -> None:
    model = net()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=1, **MODES["backward"])
    loss = model(X).square().mean()
    model[4].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"4\.weight.* frozen between its forward and its backward pass"):
        loss.backward()
    optimizer.zero_grad()
    step(model, optimizer)
