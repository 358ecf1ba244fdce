"""Any base optimizer; what a step does to gradients, weights and state; detaching; weights that move."""

import math

import pytest
import torch
from torch import nn
from toy_models import (
    assert_same_state,
    assert_same_weights,
    mlp,
    mlp_loss,
    tiny_loss,
    tiny_net,
    train,
    weights,
)

import chunkft

BASES = {
    "SGD": {"lr": 0.1},
    "SGD-momentum": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"lr": 1e-2},
    "AdamW-foreach": {"lr": 1e-2, "foreach": True},
    "AdamW-fused": {"lr": 1e-2, "fused": True},
    "Adagrad": {"lr": 1e-2, "initial_accumulator_value": 0.1},
    "Adafactor": {"lr": 1e-2},
    "Adamax": {"lr": 1e-2},
    "RAdam": {"lr": 1e-2},
    "NAdam": {"lr": 1e-2},
    "RMSprop": {"lr": 1e-2, "centered": True, "momentum": 0.5},
    "Adadelta": {"lr": 1.0},
    "ASGD": {"lr": 1e-2, "t0": 5},
    "Rprop": {"lr": 1e-2},
}


def base_of(name):
    return getattr(torch.optim, name.split("-")[0]), BASES[name]


@pytest.mark.parametrize("name", BASES)
def test_one_chunk_of_any_base_is_that_optimizer(name):
    base, options = base_of(name)
    plain, chunked = tiny_net(), tiny_net()
    reference = base(plain.parameters(), **options)
    optimizer = chunkft.ChunkOptimizer(chunked, base, chunks=1, interval=3, **options)
    for step in range(15):
        train(plain, reference, tiny_loss, [step])
        train(chunked, optimizer, tiny_loss, [step])
        assert_same_weights(plain, chunked)


@pytest.mark.parametrize("name", BASES)
def test_three_chunks_of_any_base_go_on_after_a_save(name, tmp_path):
    base, options = base_of(name)
    straight, model = tiny_net(), tiny_net()
    reference = chunkft.ChunkOptimizer(straight, base, chunks=3, interval=2, **options)
    train(straight, reference, tiny_loss, range(19))
    optimizer = chunkft.ChunkOptimizer(model, base, chunks=3, interval=2, **options)
    train(model, optimizer, tiny_loss, range(9))
    chunkft.save_checkpoint(optimizer, tmp_path / "c")
    optimizer.detach()
    again = chunkft.ChunkOptimizer(model, base, chunks=3, interval=2, **options)
    chunkft.load_checkpoint(again, tmp_path / "c")
    train(model, again, tiny_loss, range(9, 19))
    assert_same_weights(straight, model)
    assert_same_state(reference.state_dict(), again.state_dict())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_a_base_for_matrices_only_trains_matrices_and_refuses_vectors():
    def matrices():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(13, 37, bias=False), nn.ReLU(), nn.Linear(37, 9, bias=False))

    plain, chunked = matrices(), matrices()
    reference = torch.optim.Muon(plain.parameters(), lr=1e-2)
    optimizer = chunkft.ChunkOptimizer(chunked, torch.optim.Muon, lr=1e-2, chunks=1)
    for m, o in ((plain, reference), (chunked, optimizer)):
        train(m, o, mlp_loss, range(8))
    assert_same_weights(plain, chunked)
    model = mlp()
    with pytest.raises(ValueError, match="base=Muon does not take parameter group 0"):
        chunkft.ChunkOptimizer(model, torch.optim.Muon, lr=1e-2, chunks=2)
    assert all(p.requires_grad for p in model.parameters())
    assert "_chunkft" not in model.__dict__


class CountsInGroup(torch.optim.Optimizer):
    """Keeps a step count in its group rather than in its state, as some schedule-free optimizers do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] / (1 + group["k"]))
            group["k"] += 1


def test_values_that_a_base_keeps_in_its_groups_survive_switches():
    model = tiny_net()
    optimizer = chunkft.ChunkOptimizer(model, CountsInGroup, chunks=3, interval=2)
    train(model, optimizer, tiny_loss, range(9))
    assert optimizer.param_groups[0]["k"] == 9


def test_gradients_add_up_until_step_which_consumes_them():
    model = tiny_net(dtype=torch.float64)
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1)
    pieces = [piece for piece, _ in optimizer.active_parameters()]
    total: dict[chunkft.Slice, torch.Tensor] = {}
    for micro in range(4):
        alone = tiny_net(dtype=torch.float64)
        tiny_loss(alone, micro).backward()
        tiny_loss(model, micro).backward()
        assert [piece for piece, _ in optimizer.active_parameters()] == pieces
        for piece, leaf in optimizer.active_parameters():
            total[piece] = total.get(piece, 0) + piece.of(alone.get_parameter(piece.name).grad)
            torch.testing.assert_close(leaf.grad, total[piece], rtol=1e-12, atol=1e-14)
    old = [leaf for _, leaf in optimizer.active_parameters()]
    optimizer.step()
    assert all(leaf.grad is None for leaf in old)
    assert all(leaf.grad is None for _, leaf in optimizer.active_parameters())
    assert [piece for piece, _ in optimizer.active_parameters()] != pieces


def test_gradients_do_not_pile_up_when_only_the_model_is_zeroed():
    a, b = tiny_net(), tiny_net()
    first, second = (chunkft.ChunkAdamW(m, chunks=3, interval=2) for m in (a, b))
    for step in range(8):
        for m, o, zero in ((a, first, first.zero_grad), (b, second, b.zero_grad)):
            tiny_loss(m, step).backward()
            o.step()
            zero()
    assert_same_weights(a, b)


def test_a_step_without_gradients_is_no_step():
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1)
    before = weights(model)
    optimizer.step()
    assert (optimizer.updates, optimizer.skipped, optimizer.active, optimizer.interval_position) == (
        0,
        0,
        0,
        0,
    )
    assert_same_weights(model, before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("always", [None, "head"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_one_non_finite_gradient_anywhere_drops_the_step(value, always, clip):
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(
        model, chunks=2, interval=3, weight_decay=0.5, always_active=always, max_grad_norm=clip
    )
    train(model, optimizer, tiny_loss, range(4))
    leaves = [leaf for _, leaf in optimizer.active_parameters()]
    for number, leaf in enumerate(leaves):
        before, state = weights(model), optimizer.state_dict()
        tiny_loss(model, number).backward()
        leaf.grad.view(-1)[-1] = value
        optimizer.step()
        state["cursor"]["skipped"] = number + 1
        assert_same_weights(model, before)
        assert_same_state(optimizer.state_dict(), state)
        assert all(leaf.grad is None for leaf in leaves)
    assert (optimizer.updates, optimizer.interval_position, optimizer.skipped) == (4, 1, len(leaves))
    train(model, optimizer, tiny_loss, range(4, 6))
    assert optimizer.active == 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_detach_gives_the_model_back_and_ends_the_optimizer():
    model = tiny_net()
    model.norm.bias.requires_grad_(False)
    keys, forwards = list(model.state_dict()), [m.forward for m in model.modules()]
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1)
    train(model, optimizer, tiny_loss, range(4))
    trained, expected = weights(model), model(torch.arange(7)[None])
    optimizer.detach()
    assert_same_weights(model, trained)
    assert torch.equal(model(torch.arange(7)[None]), expected)
    assert list(model.state_dict()) == keys
    assert [m.forward for m in model.modules()] == forwards
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["norm.bias"]
    assert "_chunkft" not in model.__dict__
    assert not optimizer.state
    for call in (optimizer.step, optimizer.state_dict, lambda: optimizer.load_state_dict({})):
        with pytest.raises(RuntimeError, match="after detach"):
            call()
    # a second call does not touch the optimizer that came after
    successor = chunkft.ChunkAdamW(model, chunks=2, interval=1)
    optimizer.detach()
    train(model, successor, tiny_loss, range(3))
    assert successor.updates == 3


def test_parameters_frozen_between_attach_and_construction_stay_frozen():
    model = tiny_net()
    chunkft.attach(model)
    model.table.weight.requires_grad_(False)
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1)
    before = model.table.weight.detach().clone()
    train(model, optimizer, tiny_loss, range(5))
    assert torch.equal(model.table.weight, before)
    optimizer.detach()
    assert not model.table.weight.requires_grad


@pytest.mark.parametrize("keep_state", [True, False])
@pytest.mark.parametrize("move", ["assign", "storage"])
def test_moments_survive_a_weight_that_moves_in_the_middle_of_an_interval(keep_state, move):
    straight, moved = tiny_net(), tiny_net()
    for model in (straight, moved):
        optimizer = chunkft.ChunkAdamW(
            model, chunks=2, interval=4, always_active="head", keep_state=keep_state
        )
        for step in range(15):
            if model is moved and step in (2, 5, 6):
                if move == "assign":
                    fresh = {name: value.clone() for name, value in model.state_dict().items()}
                    model.load_state_dict(fresh, assign=True)
                else:
                    for parameter in model.parameters():
                        parameter.data = parameter.data.clone()
            train(model, optimizer, tiny_loss, [step])
    assert_same_weights(straight, moved)


class Branches(nn.Module):
    """Uses one of two layers; the other gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


@pytest.mark.parametrize("chunks", [1, 2])
def test_slices_without_gradient_are_neither_updated_nor_decayed_nor_counted(chunks):
    plain, chunked = Branches(), Branches()
    optimizer = chunkft.ChunkAdamW(
        chunked, lr=0.1, weight_decay=0.5, chunks=chunks, interval=2, partition="interleaved"
    )
    before = weights(chunked)
    for step in range(8):
        x = torch.full((3, 6), 1.0 + step)
        chunked(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(chunked.unused.weight, before["unused.weight"])
    assert torch.equal(chunked.unused.bias, before["unused.bias"])
    assert not torch.equal(chunked.used.weight, before["used.weight"])
    assert {name.split(".")[0] for name in optimizer.state_dict()["state"]} == {"used"}
    if chunks == 1:
        reference = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.5)
        for step in range(8):
            plain(torch.full((3, 6), 1.0 + step)).square().sum().backward()
            reference.step()
            reference.zero_grad()
        assert_same_weights(plain, chunked)


def test_gradients_whose_sum_overflows_are_not_taken_for_infinite():
    model = nn.Linear(3, 33, bias=False)
    optimizer = chunkft.ChunkOptimizer(model, torch.optim.SGD, chunks=1, interval=1, lr=0.0)
    for _, leaf in optimizer.active_parameters():
        leaf.grad = torch.full_like(leaf, torch.finfo(torch.float32).max)
    optimizer.step()
    assert (optimizer.updates, optimizer.skipped) == (1, 0)
