"""Graphs of any shape through blocks whose weights stream have the gradients that they have with resident ones."""

import pytest
import torch
from tiny_transformers import build
from tiny_transformers import loss_of as family_loss
from torch import nn
from torch.utils.checkpoint import checkpoint
from weight_rigs import (
    assert_at_rest,
    assert_same,
    batch,
    gradients,
    loss_of,
    pair,
    streamed,
    tower,
    train,
)

import chunkft

UPDATES = ("host", "device")


@pytest.mark.parametrize("update", UPDATES)
def test_graphs_that_are_used_twice_or_in_part(update):
    pairs = pair(update, chunks=1)

    def everything(model):
        loss = loss_of(model)
        loss.backward(retain_graph=True)
        loss.backward()
        first, second = loss_of(model, 1), loss_of(model, 2)
        (first + second).backward()
        first, second = loss_of(model, 1), loss_of(model, 2)
        first.backward()
        second.backward()
        out = model(batch(4))
        out[:, 0, 3].sum().backward()
        with torch.no_grad():
            loss_of(model, 5)
        inputs = list(model.norm.parameters())
        torch.autograd.grad(loss_of(model, 6), inputs)

    for model, _ in pairs:
        everything(model)
    assert_same(pairs)
    assert_at_rest(pairs[0][0])
    for _, optimizer in pairs:
        optimizer.step()
    assert_same(pairs)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("order", [[3, 1, 0, 2], [0, 1, 1, 3], [0, 2], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("mode", ["none", "non-reentrant"])
def test_blocks_may_be_called_in_any_order_twice_or_not_at_all(mode, order, update):
    pairs = pair(update, make=lambda: tower(mode=mode), chunks=2)
    for model, _ in pairs:
        model.order = order
    for step in range(5):
        for model, _ in pairs:
            loss_of(model, step).backward()
        assert gradients(pairs[0][1]).keys() == gradients(pairs[1][1]).keys()
        assert_same(pairs)
        for _, optimizer in pairs:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(pairs)


class Inner(nn.Module):
    """A block that checkpoints a part of itself."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def part(self, x):
        return torch.tanh(self.up(x))

    def forward(self, x):
        if not torch.is_grad_enabled():
            return x + self.down(self.part(x))
        return x + self.down(checkpoint(self.part, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("update", UPDATES)
def test_checkpoints_inside_of_a_block(update, reentrant):
    def make():
        model = tower()
        torch.manual_seed(1)
        model.blocks = nn.ModuleList(Inner(reentrant) for _ in range(4))
        return model

    pairs = pair(update, make=make, chunks=1)
    train(pairs, range(3))
    assert_same(pairs)
    assert_at_rest(pairs[0][0])


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("mode", ["none", "non-reentrant"])
def test_autocast(mode, update):
    pairs = pair(update, make=lambda: tower(mode=mode), chunks=2)

    def loss(model, step):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, step)

    train(pairs, range(5), loss)
    assert_same(pairs)


def test_inference_mode_first_and_training_afterwards():
    pairs = pair("device", chunks=2)
    for model, _ in pairs:
        with torch.inference_mode():
            loss_of(model)
    train(pairs, range(4))
    assert_same(pairs)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("family", ["t5", "mixtral"])
def test_architectures_with_inputs_that_wait_in_host_memory(family, update):
    # Parked blocks compute without a cache and, at first, without a graph: torch then picks other kernels of attention,
    # whose bits are the same on some CPUs only.
    plain = {"use_cache": False, "attn_implementation": "eager"}
    models = build(family, **plain), build(family, **plain)
    streamed_ = streamed(models[0], update, stream={"offload_inputs": True, "tile_bytes": 1 << 30}, chunks=2)
    pairs = [
        (models[0], streamed_),
        (models[1], chunkft.ChunkAdamW(models[1], lr=1e-2, chunks=2, interval=1)),
    ]
    train(pairs, range(3), lambda model, step: family_loss(family, step)(model))
    assert_same(pairs)


def test_a_second_derivative_is_refused():
    model, _ = pair(chunks=1)[0]
    with pytest.raises(RuntimeError, match="create_graph=True"):
        loss_of(model).backward(create_graph=True)
    assert_at_rest(model)
