"""Other threads that evaluate the model while it trains, and forward passes that an interrupt ended."""

from __future__ import annotations

import contextlib
import copy
import pkgutil
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from residencies import MODES
from torch import nn
from torch.utils.checkpoint import checkpoint

import chunkft
from chunkft.autograd import Slice, SlicedForward, linear, operator_for, records
from chunkft.autograd.stand_ins import stand_in_of
from chunkft.optim.switch import at_work

X = torch.randn(60, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 3)).double()


def train(model: nn.Module, **options: object) -> None:
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=4, **options)
    for x in X:
        model(x).square().mean().backward()
        optimizer.step()


@pytest.fixture
def _fine_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_fine_switching")
@pytest.mark.parametrize("mode", ["memory", "stream", "backward"])
@pytest.mark.parametrize("interval", [1, 7])
@pytest.mark.parametrize("recorded", [False, True], ids=["no_grad", "grad"])
def test_evaluation_in_another_thread_changes_no_training(mode: str, interval: int, recorded: bool) -> None:
    model = net()
    alone = copy.deepcopy(model)
    options = {"interval": interval, **({} if mode == "memory" else MODES[mode])}
    train(alone, **options)
    stop, failed = threading.Event(), []

    def evaluate() -> None:
        try:
            while not stop.is_set():
                with torch.set_grad_enabled(recorded):
                    model(X[0])
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=evaluate)
    thread.start()
    try:
        train(model, **options)
    finally:
        stop.set()
        thread.join()
    assert not failed
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_switch_in_the_middle_of_a_call_leaves_it_the_slices_that_it_began_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = nn.Linear(6, 8)
    pieces = Slice("weight", 0, 0, 3, (8, 6)), Slice("weight", 0, 3, 8, (8, 6))
    active = [(piece, nn.Parameter(piece.of(layer.weight.detach()))) for piece in pieces]
    operator = operator_for(layer)
    assert operator is not None
    forward = SlicedForward(layer, operator, active, None)

    def stand_in(leaf: torch.Tensor, device: torch.device) -> torch.Tensor:
        active.clear()
        return stand_in_of(leaf, device)

    monkeypatch.setattr(linear, "stand_in_of", stand_in)
    leaves = [leaf for _, leaf in active]
    forward(torch.ones(2, 6)).sum().backward()
    assert not active
    assert [leaf.grad is not None for leaf in leaves] == [True, True]


def test_flags_are_those_of_training_while_another_thread_computes() -> None:
    model = net()
    chunkft.ChunkAdamW(model, lr=1e-2, chunks=3)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        go_on.wait(10)

    model[2].register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: model(X[0]))
    thread.start()
    assert inside.wait(10)
    seen = [p.requires_grad for p in model.parameters()]
    go_on.set()
    thread.join()
    assert all(seen)


@pytest.mark.parametrize("recorded", [False, True], ids=["no_grad", "grad"])
def test_flags_are_those_of_training_after_an_interrupt_in_the_forward_pass(recorded: bool) -> None:
    model = net()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=3, interval=1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model[4].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.set_grad_enabled(recorded):
        model(X[0])
    handle.remove()
    flags = [p.requires_grad for p in model.parameters()]
    assert all(flags)
    model.requires_grad_(False)
    for p, flag in zip(model.parameters(), flags, strict=True):  # a probe that puts back what it found
        p.requires_grad_(flag)
    before = [p.detach().clone() for p in model.parameters()]
    for x in X[:9]:
        model(x).square().mean().backward()
        optimizer.step()
    assert not any(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


def test_copies_of_data_parallel_are_refused_by_name() -> None:
    model = net()
    chunkft.ChunkAdamW(model, lr=1e-2, chunks=3)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"DataParallel.*DistributedDataParallel"):
        replica(X[0])


SITES = {
    "the update": ("chunkft.optim.resident.ChunkResidency", "step"),
    "the rest of a chunk": ("chunkft.optim.resident.ChunkResidency", "stash"),
    "taking out": ("chunkft.wiring.Wiring", "release"),
    "putting in": ("chunkft.attach.Attachment", "activate"),
    "binding": ("chunkft.optim.resident.ChunkResidency", "bind"),
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("what", ["evaluates", "saves"])
def test_a_signal_handler_in_the_middle_of_a_step(
    site: str, late: bool, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may evaluate, and is told that it cannot save; what it interrupted goes on."""
    model, alone = net(), net()
    optimizer, other = (chunkft.ChunkAdamW(m, lr=1e-2, chunks=3, interval=1) for m in (model, alone))
    path, method = SITES[site]
    owner = pkgutil.resolve_name(path)
    real, heard = getattr(owner, method), []

    def handler() -> None:
        if what == "evaluates":
            with torch.no_grad():
                heard.append(model(X[0]))
            return
        with pytest.raises(
            RuntimeError, match=r"state_dict\(\) inside of step\(\), as from a signal handler"
        ):
            optimizer.state_dict()
        heard.append(None)

    def interrupted(self: object, *args: object, **options: object) -> object:
        ours = self in (
            optimizer._residency,
            optimizer._attachment,
            optimizer._attachment.wiring,
        ) and at_work(optimizer)
        if ours and not late:
            handler()
        result = real(self, *args, **options)
        if ours and late:
            handler()
        return result

    monkeypatch.setattr(owner, method, interrupted)
    for x in X[:7]:
        for m, o in ((model, optimizer), (alone, other)):
            m(x).square().mean().backward()
            o.step()
    assert len(heard) == 7
    optimizer.state_dict()
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_saving_from_another_thread_gives_a_state_between_two_steps() -> None:
    model = net()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=4, interval=1)
    stop, saved = threading.Event(), []

    def save() -> None:
        while not stop.is_set():
            saved.append(optimizer.state_dict()["cursor"])

    thread = threading.Thread(target=save)
    thread.start()
    try:
        for x in X:
            model(x).square().mean().backward()
            optimizer.step()
    finally:
        stop.set()
        thread.join()
    assert saved
    assert optimizer.updates == len(X)


def test_a_thread_that_is_gone_leaves_nothing_behind() -> None:
    model = net()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=2)
    inputs = []

    def interrupt(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        raise KeyboardInterrupt

    def evaluate() -> None:
        x = X[0].clone()
        inputs.append(weakref.ref(x))
        with contextlib.suppress(KeyboardInterrupt):
            model(x)

    handle = model[2].register_forward_pre_hook(interrupt)
    thread = threading.Thread(target=evaluate)
    thread.start()
    thread.join()
    handle.remove()
    model(X[1]).sum().backward()
    optimizer.step()
    assert inputs[0]() is None


class Recursive(nn.Module):
    """Calls itself, and notes what it sees of its flags afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.seen: list[list[bool]] = []

    def forward(self, x: torch.Tensor, depth: int = 1) -> torch.Tensor:
        x = self.first(x)
        x = self(x, depth - 1) if depth else x
        self.seen.append([p.requires_grad for p in self.parameters()])
        return self.second(x)


def test_a_model_that_calls_itself_is_in_its_pass_until_the_outer_call_ends() -> None:
    model = Recursive().double()
    chunkft.ChunkAdamW(model, lr=1e-2, chunks=2)
    model(X[0]).sum().backward()
    assert model.seen[0] == model.seen[1] == [records(p) for p in model.parameters()]
    assert not all(model.seen[0])


class Choosing(nn.Module):
    """A layer whose path depends on whether its weight is to get a gradient, as fused kernels have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            torch.tanh(x @ self.weight)
            if self.weight.requires_grad
            else torch.tanh((x * 1.0) @ self.weight).exp().log()
        )


def test_flags_are_the_same_where_a_checkpoint_computes_again() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Choosing() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    model = Checkpointed().double()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=3, interval=1)
    for x in X[:6]:
        model(x.requires_grad_()).square().mean().backward()
        optimizer.step()
    assert optimizer.updates == 6


def test_a_pass_of_another_thread_that_is_about_to_begin_or_end_is_left_to_it() -> None:
    model = net()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=2)
    inside = optimizer._attachment._passes._inside
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    inside[thread.ident] = []  # as between the two halves of both
    model(X[0])
    assert thread.ident in inside
    ended.set()
    thread.join()
    other = threading.Thread(target=lambda: None)
    other.start()
    other.join()
    inside[other.ident or 0] = []
    model(X[0])
    model(X[0])
    assert list(inside) == []
