"""``torch.compile``, ``compilable`` and the optimizer may come in any order, and train the same model."""

import copy

import pytest
import torch
from torch import nn

import chunkft
from chunkft.autograd import compilable

SETTINGS = {"chunks": 2, "interval": 1, "lr": 1e-2}


def compiled(model):
    return torch.compile(model, backend="eager")


def wrapper_built(model):
    call = compiled(model)
    return chunkft.ChunkAdamW(call, **SETTINGS), call


def wrapper_built_and_compilable(model):
    call = compiled(model)
    optimizer = chunkft.ChunkAdamW(call, **SETTINGS)
    compilable(call)
    return optimizer, call


def groups_of_wrapper_built(model):
    call = compiled(model)
    chunkft.attach(call)
    return chunkft.ChunkAdamW([{"params": list(call.parameters())}], **SETTINGS), call


def plan_of_wrapper_for_model(model):
    call = compiled(model)
    return chunkft.ChunkAdamW(
        model, **{**SETTINGS, "chunks": None}, partition=chunkft.partition(call, 2)
    ), call


def model_built_after(model):
    call = compiled(model)
    return chunkft.ChunkAdamW(model, **SETTINGS), call


def compilable_first(model):
    compilable(model)
    call = compiled(model)
    return chunkft.ChunkAdamW(call, **SETTINGS), call


def blocks_wrapped(model):
    model[0] = compiled(model[0])
    return chunkft.ChunkAdamW(model, **SETTINGS), model


ORDERS = [
    wrapper_built,
    wrapper_built_and_compilable,
    groups_of_wrapper_built,
    plan_of_wrapper_for_model,
    model_built_after,
    compilable_first,
    blocks_wrapped,
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(call, optimizer, x):
    for _ in range(3):
        call(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_trains_as_eager_code_does(order):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    model, x = copy.deepcopy(plain), torch.randn(4, 8)
    train(plain, chunkft.ChunkAdamW(plain, **SETTINGS), x)
    optimizer, call = order(model)
    train(call, optimizer, x)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    optimizer.detach()
    assert all(p.requires_grad for p in model.parameters())
    assert "_chunkft" not in model.__dict__


def test_a_state_that_was_saved_through_the_wrapper_belongs_to_the_model():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    other = copy.deepcopy(model)
    call = compiled(model)
    optimizer = chunkft.ChunkAdamW(call, **SETTINGS)
    train(call, optimizer, torch.randn(4, 8))
    assert {piece.name for chunk in optimizer.plan.chunks for piece in chunk.slices} == {
        name for name, _ in model.named_parameters()
    }
    resumed = chunkft.ChunkAdamW(other, **SETTINGS)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.active == optimizer.active


def test_a_model_has_one_optimizer_whether_it_is_given_wrapped_or_not():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    call = compiled(model)
    kept = chunkft.ChunkAdamW(call, **SETTINGS)
    with pytest.raises(ValueError, match="optimizer"):
        chunkft.ChunkAdamW(model, **SETTINGS)
    kept.detach()
    assert chunkft.attach(call) is chunkft.attach(model)
