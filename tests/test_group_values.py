"""Group values that a user sets at any moment, and values that a base advances by itself, page by page."""

import pytest
import torch
from toy_models import assert_same_weights, mlp, mlp_loss, train

import chunkft

PAGED = {
    "stream": {"residency": "stream", "page_bytes": 512},
    "backward": {"residency": "stream", "page_bytes": 512, "update": "backward"},
}


class Advances(torch.optim.Optimizer):
    """Counts its steps in its groups in every way seen in the wild, and lets the counts act on the update."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, {"lr": lr, "k": 0, "t": torch.zeros(()), "log": [], "d": torch.ones(())})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["t"].add_(1)
            group["log"].append(group["k"])
            group["d"] = group["d"] * 0.9
            group["late"] = group.get("late", 0) + 1
            scale = group["k"] + group["t"].item() + len(group["log"]) + group["late"] + group["d"].item()
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] / scale)


@pytest.mark.parametrize("kind", PAGED)
def test_every_page_starts_from_the_values_before_the_step(kind):
    models = mlp(), mlp()
    paged = chunkft.ChunkOptimizer(models[0], Advances, chunks=2, interval=2, **PAGED[kind])
    plain = chunkft.ChunkOptimizer(models[1], Advances, chunks=None, partition=paged.plan, interval=2)
    for model, optimizer in zip(models, (paged, plain), strict=True):
        train(model, optimizer, mlp_loss, range(7))
    assert_same_weights(*models)
    for key in ("k", "t", "log", "d"):
        assert paged.param_groups[0][key] == plain.param_groups[0][key]
    assert paged.param_groups[0]["k"] == 7


@pytest.mark.parametrize(("key", "value"), [("lr", 0.5), ("weight_decay", 0.3), ("betas", (0.5, 0.6))])
@pytest.mark.parametrize("kind", PAGED)
def test_a_value_set_between_backward_and_step_stands(kind, key, value):
    model = mlp()
    optimizer = chunkft.ChunkAdamW(model, chunks=1, **PAGED[kind])
    for step in range(2):
        mlp_loss(model, step).backward()
        optimizer.param_groups[0][key] = value
        optimizer.step()
        assert optimizer.param_groups[0][key] == value


@pytest.mark.parametrize("kind", PAGED)
def test_a_learning_rate_in_a_tensor_is_set_in_place(kind):
    model = mlp()
    rate = torch.tensor(1e-3)
    optimizer = chunkft.ChunkAdamW(model, lr=rate, foreach=False, chunks=1, **PAGED[kind])
    mlp_loss(model, 0).backward()
    optimizer.param_groups[0]["lr"].fill_(0.5)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"].item() == 0.5


@pytest.mark.parametrize("kind", PAGED)
def test_a_scheduler_before_step_counts_from_the_next_update(kind):
    model, plain = mlp(), mlp()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=1, **PAGED[kind])
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    rates = []
    for m, o in ((model, optimizer), (plain, reference)):
        scheduler = torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5)
        for step in range(4):
            mlp_loss(m, step).backward()
            o.step()
            scheduler.step()
            o.zero_grad()
            rates.append(o.param_groups[0]["lr"])
    assert rates[:4] == rates[4:]
    assert_same_weights(model, plain)


def test_a_value_that_the_base_and_the_user_changed_is_the_users():
    model = mlp()
    optimizer = chunkft.ChunkOptimizer(model, Advances, chunks=1, **PAGED["backward"])
    mlp_loss(model, 0).backward()
    optimizer.param_groups[0]["k"] = 40
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 40
