"""What is let go of is gone: the last chunk after a switch, all of chunkft after detach()."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from residencies import FILES, MODES
from toy_models import tiny_loss, tiny_net

import chunkft

PLACES = {"memory": {}, "forgotten": {"keep_state": False}, **MODES, **FILES}


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_walk():
    gc.collect()
    gc.freeze()  # what is older than these tests is not walked
    yield
    gc.unfreeze()


@pytest.fixture(params=sorted(PLACES))
def options(request, tmp_path):
    files = {"state_dir": tmp_path / "state"} if request.param in FILES else {}
    return {"lr": 1e-2, "chunks": 3, "interval": 2, **PLACES[request.param], **files}


def alive() -> Counter:
    """Objects of chunkft, and tensors, by type."""
    gc.collect()
    found = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        home = kind.__dict__.get("__module__")  # of some types it is a descriptor
        if isinstance(home, str) and home.partition(".")[0] == "chunkft":
            found[f"{home}.{kind.__qualname__}"] += 1
        elif issubclass(kind, torch.Tensor):
            found[kind.__name__] += 1
    return found


def test_nothing_of_the_last_chunk_is_alive_after_a_switch(options):
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, **options)
    for number in range(12):
        before = optimizer.active
        held = {
            piece: weakref.ref(leaf) for piece, leaf in optimizer.active_parameters() if piece.dim is not None
        }
        states = [weakref.ref(t) for state in optimizer.state.values() for t in state.values() if t.dim() > 0]
        tiny_loss(model, number).backward()
        gradients = [
            weakref.ref(leaf.grad) for _, leaf in optimizer.active_parameters() if leaf.grad is not None
        ]
        optimizer.step()
        assert not any(reference() is not None for reference in gradients)
        if optimizer.active == before:
            continue
        gc.collect()
        assert [piece for piece, reference in held.items() if reference() is not None] == []
        if len(options) > 3:  # else on a CPU what was used is what is kept, in host memory
            assert not any(reference() is not None for reference in states)
        inactive = {name for name, _ in model.named_parameters()} - {
            piece.name for piece, _ in optimizer.active_parameters()
        }
        assert all(model.get_parameter(name).grad is None for name in inactive)


def test_nothing_of_chunkft_is_alive_after_detach(options):
    tiny_loss(tiny_net(), 0).backward()  # what torch makes once is there now
    model = tiny_net()
    before = alive()
    optimizer = chunkft.ChunkAdamW(model, **options)
    for number in range(7):  # inside of an interval of the second sweep
        tiny_loss(model, number).backward()
        if number < 6:
            optimizer.step()
    optimizer.zero_grad()
    assert alive() - before  # the count sees what is there
    optimizer.detach()
    del optimizer
    assert alive() - before == Counter()


def test_a_model_that_is_dropped_takes_everything_along(options):
    before = alive()
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, **options)
    for number in range(3):
        tiny_loss(model, number).backward()
        optimizer.step()
    del model, optimizer
    assert alive() - before == Counter()


def test_after_detach_nothing_waits_for_the_garbage_collector(options):
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, **options)
    for batch in range(5):
        tiny_loss(model, batch).backward()
        optimizer.step()
    alive = weakref.ref(model), weakref.ref(optimizer), weakref.ref(optimizer._attachment)
    gc.collect()
    gc.disable()
    try:
        optimizer.detach()
        del optimizer
        assert alive[1]() is None
        assert alive[2]() is None
        del model
        assert alive[0]() is None
    finally:
        gc.enable()
