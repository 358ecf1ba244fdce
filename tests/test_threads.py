"""Other threads that evaluate the model while it trains, and forward passes that an interrupt ended."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from residencies import MODES
from torch import nn

import chunkft

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
