"""Columns and channels_last weights: slices whose memory is not contiguous, under bases that take it for contiguous."""

import pytest
import torch
from torch import nn
from toy_models import mlp, mlp_loss, train

import chunkft

FUSED = {
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1},
    "Adam": {"lr": 1e-2},
    "SGD": {"lr": 1e-1, "momentum": 0.9},
    "Adagrad": {"lr": 1e-2},
}
PLACES = {
    "chunk": {},
    "stream": {"residency": "stream", "page_bytes": 512},
    "backward": {"residency": "stream", "page_bytes": 512, "update": "backward"},
}


class Flat(torch.optim.Optimizer):
    """Momentum in flat memory, like kernels that take a pointer and a number of elements."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["flat"] = torch.zeros_like(p)
                flat = [t.as_strided((t.numel(),), (1,)) for t in (p, p.grad, state["flat"])]
                flat[2].mul_(0.9).add_(flat[1])
                flat[0].add_(flat[2], alpha=-group["lr"])


def assert_close(model, other):
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FUSED)
def test_fused_columns_train_as_unfused_columns(name, place):
    base = getattr(torch.optim, name)
    models = mlp(), mlp()
    for model, fused in zip(models, (True, False), strict=True):
        options = {**FUSED[name], "fused": fused}
        optimizer = chunkft.ChunkOptimizer(
            model, base, chunks=3, interval=2, slice_dim=1, **options, **PLACES[place]
        )
        train(model, optimizer, mlp_loss, range(8))
    assert_close(*models)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES)
def test_a_base_of_flat_memory_trains_columns_as_sgd_does(place, dtype):
    models = mlp(dtype=dtype), mlp(dtype=dtype)
    for model, (base, options) in zip(
        models, ((Flat, {}), (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})), strict=True
    ):
        optimizer = chunkft.ChunkOptimizer(
            model, base, chunks=3, interval=2, slice_dim=1, **options, **PLACES[place]
        )
        train(model, optimizer, mlp_loss, range(8))
    assert_close(*models)


@pytest.mark.parametrize("place", ["chunk", "stream"])
def test_a_channels_last_weight_under_a_fused_base_trains_as_torch_does(place):
    def build():
        torch.manual_seed(0)
        return nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)

    plain, chunked = build(), build()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, foreach=False, fused=False)
    optimizer = chunkft.ChunkAdamW(chunked, lr=1e-2, chunks=1, fused=True, **PLACES[place])
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    for model, o in ((plain, reference), (chunked, optimizer)):
        for _ in range(5):
            model(x).square().mean().backward()
            o.step()
            o.zero_grad()
    assert_close(plain, chunked)


def test_moments_saved_by_an_unfused_run_on_columns_go_on_fused():
    straight, model = mlp(), mlp()
    options = {"lr": 1e-2, "chunks": 3, "interval": 2, "slice_dim": 1}
    reference = chunkft.ChunkAdamW(straight, **options)
    train(straight, reference, mlp_loss, range(9))
    optimizer = chunkft.ChunkAdamW(model, **options)
    train(model, optimizer, mlp_loss, range(5))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["fused"] = True
    optimizer.detach()
    again = chunkft.ChunkAdamW(model, fused=True, **options)
    again.load_state_dict(saved)
    train(model, again, mlp_loss, range(5, 9))
    assert_close(straight, model)


@pytest.mark.parametrize("mode", PLACES.values(), ids=PLACES)
def test_momenta_that_some_slices_have_and_others_not_go_together_with_fused_sgd(mode):
    """What is always active has its momentum when a new chunk comes, which has none."""
    models = []
    for fused in (False, True):
        model = mlp()
        optimizer = chunkft.ChunkOptimizer(
            model,
            torch.optim.SGD,
            chunks=3,
            interval=2,
            always_active="2.*",
            lr=0.1,
            momentum=0.9,
            fused=fused,
            **mode,
        )
        for batch in range(14):
            mlp_loss(model, batch).backward()
            optimizer.step()
        models.append(model)
    for (name, ours), theirs in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
