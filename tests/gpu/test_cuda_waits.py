"""The host runs ahead of the device: a step asks it once, whether gradients are finite, and for nothing else.

Where the code has to wait: `chunkft/optim/gradients.py` (`all_finite`, once in `step()`), or with update="backward"
`chunkft/optim/backward.py` (`BackwardResidency.step`, once); and at a switch with `state_device="host"`, whose copies
are of pageable memory.
"""

import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from gpu_training import PLACES, batch, optimizer_of, places, trained

from bench import plain_llama
from chunkft.optim import stepping
from chunkft.optim.gradients import all_finite

pytestmark = [pytest.mark.timeout(60)]
ASKED = "called a synchronizing CUDA operation"
WHERE = {
    "device": "gradients.py",
    "paged": "gradients.py",
    "stream": "gradients.py",
    "backward": "backward.py",
}


def options_of(machine, kind):
    return {**places(machine), "device": {"state_device": "device"}}[kind]


@contextmanager
def debug(machine, mode):
    """torch's own look at calls that wait; in a rehearsal nothing waits."""
    if not machine.real:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("kind", WHERE)
def test_a_step_waits_once_and_a_switch_not_at_all(machine, kind):
    """Two sweeps, switches included, in the steady state: as many waits as steps, all at the one place."""
    model, optimizer = trained(machine, machine.pick(8, 4), **options_of(machine, kind))
    batches = [batch(machine, step) for step in range(machine.pick(16, 4))]
    switches = optimizer._interval_index
    machine.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with debug(machine, "warn"):
            for ids in batches:
                model(ids).backward()
                optimizer.step()
    assert optimizer._interval_index - switches == len(batches) / optimizer.interval
    waits = [w for w in caught if ASKED in str(w.message)]
    places_of = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in waits})
    assert all(Path(w.filename).name == WHERE[kind] for w in waits), places_of
    assert len(waits) == machine.pick(len(batches), 0), places_of


@pytest.mark.parametrize("kind", WHERE)
def test_nothing_else_in_a_steady_interval_may_wait(machine, kind, monkeypatch):
    """The same with errors for warnings, which no library in between can swallow."""
    model, optimizer = trained(machine, 8, **{**options_of(machine, kind), "interval": 4})
    assert optimizer.interval_position == 0

    def asked(grads):
        with debug(machine, "default"):
            return all_finite(grads)

    monkeypatch.setattr(stepping, "all_finite", asked)
    batches = [batch(machine, step) for step in range(3)]
    machine.synchronize()
    for ids in batches:
        with debug(machine, "error"):
            model(ids).backward()
        with debug(machine, "default" if kind == "backward" else "error"):
            optimizer.step()
    assert optimizer.interval_position == 3


@pytest.mark.parametrize("kind", WHERE)
def test_the_look_at_waits_sees_one(machine, kind):
    """Without the permission the same step is an error: the tests above do not pass because nothing is looked at."""
    model, optimizer = trained(machine, 3, **options_of(machine, kind))
    model(batch(machine, 3)).backward()
    machine.need("torch's look at waits")
    with debug(machine, "error"), pytest.raises(RuntimeError, match=ASKED):
        optimizer.step()


@pytest.mark.parametrize("kind", PLACES)
def test_a_backward_pass_is_queued_while_the_device_is_busy(machine, kind):
    """Forward, backward and, with update="backward", the whole update are given to a stream that is held."""
    # few launches: a stream takes about a thousand before the host has to wait
    model = plain_llama.build("tiny", machine.device, torch.bfloat16)
    optimizer = optimizer_of(model, **{**places(machine)[kind], "interval": 8})
    batches = [plain_llama.batch_of("tiny", machine.device, 2, 9, seed=step) for step in range(3)]
    for ids in batches[:2]:
        model(ids).backward()
        optimizer.step()
    ids = batches[2]
    machine.synchronize()
    machine.hold(500)
    held = machine.mark()
    model(ids).backward()
    assert machine.pick(not held.query(), True), "the host waited for the device"
    optimizer.step()
    assert held.query()


def test_state_in_pageable_memory_waits_at_a_switch_and_nowhere_else(machine):
    """`state_device="host"` copies tensor by tensor: the price of no pages, paid once an interval."""
    model, optimizer = trained(machine, 16, state_device="host", interval=4)
    batches = [batch(machine, step) for step in range(8)]
    machine.synchronize()
    waits = []
    for ids in batches:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with debug(machine, "warn"):
                model(ids).backward()
                optimizer.step()
        waits.append(sum(ASKED in str(w.message) for w in caught))
    machine.need("torch's look at waits")
    switched = [number for number, count in enumerate(waits) if count > 1]
    assert switched == [3, 7], waits
    assert [waits[number] for number in (0, 1, 2, 4, 5, 6)] == [1] * 6
