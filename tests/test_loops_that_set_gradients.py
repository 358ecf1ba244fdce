"""Loops that change ``weight.grad``, or put gradients of their own in its place, train as with AdamW."""

import pytest
import torch
from helpers import small, small_loss
from residencies import MODES
from torch import nn

import chunkft


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def manual_loop(p):
    p.grad = p.grad * 0.5 + 0.01 * p.detach()


def noisy(p):
    p.grad += 0.1 * noise(*p.shape)


def decayed(p):
    p.grad.add_(p.detach(), alpha=0.01)


def masked_rows(p):
    p.grad[: p.shape[0] // 2] = 0


def sam_like(p):
    p.grad = p.grad.detach().clone().mul_(2)


def turned(p):
    p.grad = p.grad.flatten().view_as(p)  # a view, put back


@pytest.mark.parametrize("change", [manual_loop, noisy, decayed, masked_rows, sam_like, turned])
@pytest.mark.parametrize("mode", [name for name in MODES if name != "backward"])
def test_loops_that_change_gradients_train_as_with_adamw(change, mode):
    chunked, plain = small().eval(), small().eval()
    ours = chunkft.ChunkAdamW(chunked, lr=1e-2, chunks=1, **MODES[mode])
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for _ in range(3):
        for model, optimizer in ((chunked, ours), (plain, theirs)):
            small_loss(model).backward()
            for p in model.parameters():
                change(p)
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in zip(chunked.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_gradients_that_change_places_go_with_their_values():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    optimizer = chunkft.ChunkAdamW(model, chunks=1)
    model(torch.randn(4, 6)).square().sum().backward()
    one, two = (p.grad.clone() for p in model.parameters())
    model[0].weight.grad, model[1].weight.grad = model[1].weight.grad.clone(), model[0].weight.grad.t()
    found = {piece.name: leaf.grad for piece, leaf in optimizer.active_parameters()}
    assert torch.equal(found["0.weight"], two)
    assert found["1.weight"].shape == one.shape


@pytest.mark.parametrize("look", [None, "active_parameters", "memory", "state_dict"])
def test_a_gradient_that_is_put_in_the_place_of_another_counts_alone(look):
    """As loops do that compute gradients elsewhere: private or federated training."""
    model = nn.Sequential(nn.Linear(6, 16, bias=False), nn.Tanh(), nn.Linear(16, 6, bias=False))
    optimizer = chunkft.ChunkOptimizer(model, torch.optim.SGD, lr=1.0, chunks=1)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if look is not None:
        getattr(optimizer, look)()
    assert all(p.grad.mean() == 1 for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    for p, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(was - p, torch.full_like(p, 2.0))


@pytest.mark.parametrize("clear", ["optimizer", "model", "nothing"])
def test_gradients_that_are_put_into_all_weights_move_the_active_ones(clear):
    model = nn.Sequential(nn.Linear(6, 16, bias=False), nn.Tanh(), nn.Linear(16, 6, bias=False))
    optimizer = chunkft.ChunkOptimizer(model, torch.optim.SGD, lr=1.0, chunks=2, interval=1)
    for number in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        if clear != "nothing":
            {"optimizer": optimizer, "model": model}[clear].zero_grad()
        moved = [(was - p).mean().item() for p, was in zip(model.parameters(), before, strict=True)]
        assert moved == pytest.approx([1.0, 0.0] if number % 2 == 0 else [0.0, 1.0], abs=1e-6)
