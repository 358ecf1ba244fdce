"""Hooks on a weight see its whole gradient, as in dense training, and what they return counts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from residencies import MODES
from torch import nn

import chunkft

X = torch.randint(0, 20, (8,), generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 20)).double()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has a hook on its gradient")
        yield


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def rows_from(start: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def masked(gradient: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(gradient.shape[0], 1, dtype=gradient.dtype)
        mask[start:] = 1
        return gradient * mask

    return masked


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("mode", ["memory", *MODES])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_mask_on_the_gradient_keeps_old_rows(chunks: int, mode: str, when: str) -> None:
    model = net()
    masked = {"0.weight": 17, "3.weight": 12}
    hooks = [(model.get_parameter(name), rows_from(start)) for name, start in masked.items()]
    if when == "before":
        for weight, hook in hooks:
            weight.register_hook(hook)
    before = copy.deepcopy(dict(model.named_parameters()))
    options = {"memory": {}, **MODES}[mode]
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, weight_decay=0, chunks=chunks, interval=1, **options)
    if when == "after":
        for weight, hook in hooks:
            weight.register_hook(hook)
    train(model, optimizer, 2 * len(optimizer.plan))
    for name, weight in model.named_parameters():
        start = masked.get(name, 0)
        assert torch.equal(weight[:start], before[name][:start]), name
        assert not torch.equal(weight[start:], before[name][start:]), name


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_with_one_chunk_hooks_fire_as_often_as_in_dense_training_and_see_the_same(kind: str) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    runs = {}
    for name, make in (
        ("dense", lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2)),
        ("chunked", lambda m: chunkft.ChunkAdamW(m, lr=1e-2, chunks=1)),
    ):
        model = net()
        for key, weight in model.named_parameters():

            def hook(t: torch.Tensor, key: str = f"{name} {key}") -> None:
                gradient = t if kind == "register_hook" else t.grad
                seen.setdefault(key, []).append(gradient.clone())

            getattr(weight, kind)(hook)
        train(model, make(model), 3)
        runs[name] = list(model.parameters())
    for key, _ in net().named_parameters():
        assert len(seen[f"dense {key}"]) == len(seen[f"chunked {key}"]) == 3
        for a, b in zip(seen[f"dense {key}"], seen[f"chunked {key}"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(runs["dense"], runs["chunked"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_hook_fires_once_a_backward_pass_while_its_weight_is_active() -> None:
    model = net()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=6, interval=1, partition="interleaved")
    fired = []
    model[3].weight.register_hook(lambda gradient: fired.append(tuple(gradient.shape)))
    train(model, optimizer, 6)
    active = sum(any(p.name == "3.weight" for p in chunk.slices) for chunk in optimizer.plan)
    assert fired == [(20, 16)] * active


def test_a_hook_that_is_removed_gives_the_savings_back() -> None:
    model = net()
    chunkft.ChunkAdamW(model, lr=1e-2, chunks=1)
    handle = model[1].weight.register_hook(lambda gradient: None)
    assert "ExpandBackward" not in str(model(X).grad_fn)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model(X)
    assert [str(w.message)[:42] for w in seen] == []  # said at the first forward pass, once
    handle.remove()
    names = []
    model[1].register_forward_hook(lambda m, args, y: names.append(type(y.grad_fn).__name__))
    model(X)
    assert names == ["_SlicedMatmulBackward"]
