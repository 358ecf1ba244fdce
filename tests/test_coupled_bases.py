"""Bases whose update of a slice is not the slice of their update are found out when the optimizer is built."""

import random
import warnings

import pytest
import torch
from torch import nn
from toy_models import assert_same_weights, mlp, mlp_loss, train

import chunkft
from chunkft.optim import coupling
from chunkft.optim.rule import UpdateRule


class Base(torch.optim.Optimizer):
    def __init__(self, params, lr=0.05, **options):
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            for p in members:
                p.add_(self.direction(p, group, members), alpha=-group["lr"])


class TrustRatio(Base):
    def direction(self, p, group, members):
        return p.grad * (p.norm() / p.grad.norm())


class RowNorm(Base):
    """Exact on rows, and not on columns."""

    def direction(self, p, group, members):
        return p.grad / p.grad.norm(dim=-1, keepdim=True) if p.dim() > 1 else p.grad


class Late(Base):
    """Shows its coupling after some steps only, as preconditioners do that are built first."""

    def direction(self, p, group, members):
        state = self.state[p]
        state["seen"] = state.get("seen", 0) + 1
        return p.grad if state["seen"] < 3 else p.grad / p.grad.norm()


class ClipsAll(Base):
    def direction(self, p, group, members):
        return p.grad / sum(q.grad.square().sum() for q in members).sqrt()


class OneDistance(Base):
    """Of the shape of Prodigy: a step size for everything, estimated in the group, tiny at first."""

    def __init__(self, params, lr=1.0):
        super().__init__(params, lr, d=1e-6, up=0.0)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            size = 0.0
            for p in group["params"]:
                start = self.state[p].setdefault("start", p.clone())
                group["up"] += float((p.grad * (start - p)).sum())
                size += float(p.grad.abs().sum())
            group["d"] = max(group["d"], 10 * group["up"] / size)
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * group["d"])


class Noisy(Base):
    def direction(self, p, group, members):
        return p.grad + torch.randn_like(p)


class Fails(Base):
    def direction(self, p, group, members):
        if p.numel() < 64:
            raise RuntimeError("needs at least 64 elements")
        return p.grad


def built(base, **options):
    """The texts of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = chunkft.ChunkOptimizer(mlp(), base, **{"interval": 1, **options})
    optimizer.detach()
    return [str(entry.message) for entry in caught if entry.category is UserWarning]


@pytest.mark.parametrize("base", [TrustRatio, Late, torch.optim.Adafactor])
@pytest.mark.parametrize("lr", [1e-2, 0.0])
def test_statistics_of_a_slice_are_told_by_one_warning(base, lr):
    (text,) = built(base, chunks=3, lr=lr)
    assert f"base={base.__name__} does not update each element by itself" in text
    assert "partition='layers'" in text


@pytest.mark.parametrize("base", [TrustRatio, Late, torch.optim.Adafactor])
def test_whole_parameters_are_exact_and_silent(base):
    model, plain = mlp(), mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = chunkft.partition(model, 2, atomic="*")
        optimizer = chunkft.ChunkOptimizer(model, base, chunks=None, partition=plan, interval=1, lr=1e-2)
    names = [{piece.name for piece in chunk.slices} for chunk in plan.chunks]
    train(model, optimizer, mlp_loss, range(4))
    references = [base([p for n, p in plain.named_parameters() if n in inside], lr=1e-2) for inside in names]
    for step in range(4):
        train(plain, references[step % 2], mlp_loss, [step])
        plain.zero_grad()
    assert_same_weights(model, plain)


def test_what_is_exact_on_rows_is_told_on_columns_only():
    assert built(RowNorm, chunks=3) == []
    (text,) = built(RowNorm, chunks=3, slice_dim=1)
    assert "base=RowNorm does not update each element by itself" in text


def test_pages_that_cut_a_parameter_count_as_slices():
    assert built(TrustRatio, chunks=1) == []
    assert len(built(Late, chunks=1, residency="stream")) == 0
    model = nn.Linear(32, 64, bias=False)
    with pytest.warns(UserWarning, match="base=WithMoment does not update each element"):
        chunkft.ChunkOptimizer(model, WithMoment, chunks=1, residency="stream", page_bytes=1024)


class WithMoment(TrustRatio):
    def direction(self, p, group, members):
        moment = self.state[p].setdefault("moment", torch.zeros_like(p))
        moment.lerp_(p.grad, 0.1)
        return moment / moment.norm()


@pytest.mark.parametrize("base", [ClipsAll, OneDistance])
@pytest.mark.parametrize("options", [{"chunks": 3}, {"chunks": 1, "residency": "stream", "page_bytes": 512}])
def test_a_base_that_couples_parameters_is_refused_where_they_are_apart(base, options):
    model = mlp()
    with pytest.raises(ValueError, match=f"base={base.__name__} cannot be used with .* depends on the other"):
        chunkft.ChunkOptimizer(model, base, **options)
    assert all(p.requires_grad for p in model.parameters())
    assert "_chunkft" not in model.__dict__


@pytest.mark.parametrize("base", [ClipsAll, OneDistance])
def test_a_base_that_couples_parameters_is_exact_where_they_are_together(base):
    model, plain = mlp(), mlp()
    optimizer = chunkft.ChunkOptimizer(model, base, chunks=1)
    reference = base(plain.parameters())
    for m, o in ((model, optimizer), (plain, reference)):
        train(m, o, mlp_loss, range(5))
    assert_same_weights(model, plain)


@pytest.mark.parametrize(
    ("base", "reason"), [(Noisy, "its updates are random"), (Fails, "needs at least 64 elements")]
)
def test_what_cannot_be_tried_is_told_once(base, reason):
    (text,) = built(base, chunks=3)
    assert f"it is not known whether base={base.__name__}" in text
    assert reason in text


@pytest.mark.parametrize("base", sorted(coupling.ELEMENTWISE, key=lambda base: base.__name__))
@pytest.mark.parametrize("cut", [None, 0, 1])
def test_a_trial_of_the_bases_that_are_taken_for_elementwise_finds_nothing(base, cut):
    groups = [{"params": [], "lr": 1e-2}]
    rule = UpdateRule(base, lambda groups: base(groups), groups, {"weight": 0}, {"weight": "none"})
    found = coupling._try(rule, 0, 2, cut, True, torch.device("cpu"))
    assert found.failure is None
    assert found.rows < 1e-9
    assert found.others < 1e-9


def test_a_trial_leaves_random_numbers_and_values_as_they_are():
    states = torch.get_rng_state(), random.getstate()
    text = built(Noisy, chunks=3)
    assert text
    # mlp() seeds
    torch.set_rng_state(states[0])
    model = mlp()
    rate, state = torch.tensor(0.5), torch.get_rng_state()
    with pytest.warns(UserWarning, match="its updates are random"):
        chunkft.ChunkOptimizer(model, Noisy, chunks=3, lr=rate)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == states[1]
    assert rate.item() == 0.5
