"""Batches that do not reach the active chunk are steps that change nothing, as in dense training."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from residencies import MODES
from torch import nn

import chunkft


class TwoTowers(nn.Module):
    """Text always, an image sometimes; returns what ``form`` says."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8))
        self.words = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 5)
        self.form = form

    def forward(self, ids: torch.Tensor, image: torch.Tensor | None = None) -> Any:
        hidden = self.words(ids)
        if image is not None:
            hidden = hidden + self.vision(image)
        out = self.head(hidden)
        forms = {"tensor": out, "tuple": (out, ids), "dict": {"out": out, "extra": [out * 2]}}
        return forms[self.form]


def loss_of(output: Any) -> torch.Tensor:
    if isinstance(output, dict):
        output = output["out"] + output["extra"][0]
    return (output[0] if isinstance(output, tuple) else output).square().mean()


IDS = torch.randint(0, 11, (4,), generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
BATCHES = [IMAGE, None, None, IMAGE, None, IMAGE, None] * 3


def build(form: str = "tensor") -> TwoTowers:
    torch.manual_seed(0)
    return TwoTowers(form).double()


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
@pytest.mark.parametrize("mode", ["memory", *MODES])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_training_is_masked_adamw(chunks: int, mode: str, form: str) -> None:
    model, dense = build(form), build(form)
    options = {"memory": {}, **MODES}[mode]
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=chunks, interval=2, **options)
    bases: dict[Any, tuple[nn.Parameter, torch.optim.Optimizer]] = {}
    said = []
    for image in BATCHES:
        pieces = [piece for piece, _ in optimizer.active_parameters()]
        dense.zero_grad()
        loss_of(dense(IDS, image)).backward()
        for piece in pieces:
            weight = dense.get_parameter(piece.name)
            if piece not in bases:
                part = nn.Parameter(piece.of(weight.detach()))
                bases[piece] = part, torch.optim.AdamW([part], lr=1e-2)
            part, base = bases[piece]
            part.grad = None if weight.grad is None else piece.of(weight.grad).contiguous()
            base.step()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            loss_of(model(IDS, image)).backward()
            optimizer.step()
            optimizer.zero_grad()
        said += [str(w.message) for w in seen]
        for (name, a), b in zip(model.named_parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)
    assert optimizer.sweep == len(BATCHES) // (2 * len(optimizer.plan))  # the schedule went on
    assert len([text for text in said if "had a gradient in this step" in text]) <= 1


def test_a_whole_batch_without_the_chunk_is_said_once() -> None:
    model = build()
    optimizer = chunkft.ChunkAdamW(model, chunks=None, partition="layers", interval=99)
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            model(IDS).square().mean().backward()
            optimizer.step()
    (said,) = seen
    assert "no parameter of chunk 0 had a gradient" in str(said.message)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (optimizer.interval_position, optimizer.updates) == (3, 0)
    assert not any(optimizer.state_dict()["state"].values())


def test_a_step_before_any_forward_pass_is_none() -> None:
    model = build()
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # schedulers of some trainers want one first
        with torch.no_grad():
            model(IDS)
        optimizer.step()
    assert (optimizer.active, optimizer.interval_position) == (0, 0)


def test_what_is_passed_through_stays_the_same_object_and_results_may_be_changed_in_place() -> None:
    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.b(x), mask

    model = Through()
    chunkft.ChunkAdamW(model, chunks=None, partition=[["a.weight", "a.bias"], ["b.weight", "b.bias"]])
    x, mask = torch.randn(2, 4), torch.ones(2)
    y, same = model(x, mask)
    assert same is mask
    assert not mask.requires_grad
    assert torch.equal(y, nn.functional.linear(x, model.b.weight, model.b.bias))
    y.div_(2).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert not model(x, mask)[0].requires_grad


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_loop_with_a_scaler_leaves_it_out_where_no_gradient_exists(chunks: int) -> None:
    """As docs/semantics.md says; PyTorch's scaler asserts that it saw a gradient."""
    model, plain = build().float(), build().float()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=chunks, interval=2)
    reference = chunkft.ChunkAdamW(plain, lr=1e-2, chunks=chunks, interval=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    left_out = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for image in BATCHES:
            image = None if image is None else image.float()
            scaler.scale(loss_of(model(IDS, image))).backward()
            if any(p.grad is not None for p in model.parameters()):
                scaler.step(optimizer)
                scaler.update()
            else:
                left_out += 1
                optimizer.step()
            loss_of(plain(IDS, image)).backward()
            reference.step()
    assert bool(left_out) == (chunks > 1)
    assert (optimizer.active, optimizer.updates) == (reference.active, reference.updates)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


class WithMetrics(TwoTowers):
    """Returns what loops log beside the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, ids: torch.Tensor, image: torch.Tensor | None = None) -> Any:
        out = super().forward(ids, image)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(out.mean(0) * 0.1)
        return {
            "loss": out.square().mean(),
            "mean": self.mean,
            "weight": self.head.weight,
            "best": out.argmax(1),
        }


def test_what_belongs_to_the_model_is_returned_as_it_is() -> None:
    model = WithMetrics()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=4, interval=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for image in BATCHES:
            out = model(IDS, None if image is None else image.float())
            assert out["mean"] is model.mean
            assert out["weight"] is model.head.weight
            assert not out["mean"].requires_grad
            out["loss"].backward()
            optimizer.step()


def test_outputs_that_stand_for_others_share_their_memory() -> None:
    model = build()
    chunkft.ChunkAdamW(model, lr=1e-2, chunks=4)
    kept = []
    model.head.register_forward_hook(lambda module, args, output: kept.append(output))
    out = model(IDS)
    assert out.requires_grad
    assert not kept[0].requires_grad
    assert out.data_ptr() == kept[0].data_ptr()
    out.mul_(2)


def test_outputs_of_a_model_of_which_all_is_frozen_need_no_gradient() -> None:
    model = build()
    chunkft.ChunkAdamW(model, lr=1e-2, chunks=4)
    model.requires_grad_(False)
    assert not model(IDS).requires_grad
    model.requires_grad_(True)
    assert model(IDS).requires_grad


def test_changing_an_output_in_place_that_the_backward_pass_needs_is_noticed() -> None:
    class Gated(TwoTowers):
        def forward(self, ids: torch.Tensor, image: torch.Tensor | None = None) -> Any:
            gate = torch.sigmoid(self.words(ids)).detach()
            return self.head(gate).square().mean(), gate

    model = Gated()
    chunkft.ChunkAdamW(model, lr=1e-2, chunks=1)
    loss, gate = model(IDS)
    with torch.no_grad():
        gate.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_outputs_that_no_function_takes_are_left_alone() -> None:
    class Nested(TwoTowers):
        def forward(self, ids: torch.Tensor, image: torch.Tensor | None = None) -> Any:
            out = super().forward(ids, image)
            return (
                out,
                torch.nested.nested_tensor([out[0].detach(), out[1, :2].detach()]),
                out.to(torch.complex64).detach(),
            )

    model = Nested()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=4, interval=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            out, nested, waves = model(IDS)
            assert nested.is_nested
            (out.square().mean() + waves.abs().mean()).backward()
            optimizer.step()
