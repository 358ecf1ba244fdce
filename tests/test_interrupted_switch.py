"""A switch of chunks that is cut short at any point is finished by the next call, and nothing is lost."""

import errno
import os
import sys

import pytest
import torch
from residencies import MODES, PAGE, adamw
from torch import nn
from toy_models import assert_same_state, assert_same_weights, through_file

import chunkft
from chunkft.attach import Attachment
from chunkft.optim.paged import PagedStore
from chunkft.optim.resident import ChunkResidency
from chunkft.optim.state import StateStore
from chunkft.optim.streamed import StreamResidency
from chunkft.places import Places
from chunkft.streaming import HostArena, Pager
from chunkft.wiring import Wiring

PLACES = {
    "host": {},
    "paged": MODES["paged"],
    "stream": MODES["stream"],
    "backward": MODES["backward"],
    "forgetting": {"keep_state": False, "master": "fp32", "always_active": ["2.*"]},
}
STEPS, CUT = 9, 6  # the seventh step ends in a switch to a chunk that has state already
PARTS = tuple(
    os.path.join("chunkft", part)
    for part in ("optim", "attach.py", "wiring.py", "places.py", "bound.py", "readers.py")
)
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def build(place, **more):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if "master" in PLACES[place] else torch.float32
    model = nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.LayerNorm(11), nn.Linear(11, 3)).to(dtype)
    return model, adamw(model, chunks=2, interval=1, **{**PLACES[place], **more})


def loss(model):
    return model(X.to(model[0].weight.dtype)).square().mean()


def run(model, optimizer, steps, cut=None):
    """Train; ``cut``, a context that lets the last call of ``step`` in it fail, is entered at step ``CUT``."""
    for number in steps:
        loss(model).backward()
        if number == CUT and cut is not None:
            with cut:
                optimizer.step()
        else:
            optimizer.step()


@pytest.fixture(scope="module")
def references():
    known = {}

    def reference(place):
        if place not in known:
            model, optimizer = build(place)
            run(model, optimizer, range(STEPS))
            known[place] = model, optimizer, optimizer.state_dict()
        return known[place]

    return reference


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line of the package that runs, from the call of ``begin`` on."""

    def __init__(self, n, begin):
        self.left, self.begin, self.armed, self.hit = n, begin, False, False

    def trace(self, frame, event, argument):
        if self.hit or not any(part in frame.f_code.co_filename for part in PARTS):
            return None
        if frame.f_code.co_name == self.begin:
            self.armed = True
        if event == "line" and self.armed:
            self.left -= 1
            if self.left < 0:
                self.hit = True
                raise KeyboardInterrupt
        return self.trace

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)

    def __exit__(self, kind, error, traceback):
        sys.settrace(self.before)
        return kind is KeyboardInterrupt


def sweep(begin, after, start, stride):
    n = start
    while True:
        cut = Interrupt(n, begin)
        after(cut)
        if not cut.hit:
            assert n > start, "nothing was interrupted"
            return
        n += stride


@pytest.mark.parametrize("place", PLACES)
def test_switch_interrupted_at_any_line_ends_as_if_it_was_not(place, references):
    model, _, state = references(place)

    def after(cut):
        ours, optimizer = build(place)
        run(ours, optimizer, range(STEPS), cut)
        assert_same_weights(ours, model)
        assert_same_state(optimizer.state_dict(), state)
        assert len(ours._forward_pre_hooks) == len(model._forward_pre_hooks), "a hook stayed"
        optimizer.detach()
        assert not ours._forward_pre_hooks

    sweep(
        "advance_if_due",
        after,
        int(os.environ.get("SWEEP_START", 0)),
        int(os.environ.get("SWEEP_STRIDE", 29)),
    )


@pytest.mark.parametrize("place", PLACES)
def test_optimizer_interrupted_at_any_line_of_a_step_can_be_saved_and_goes_on(place, tmp_path):
    def after(cut):
        ours, optimizer = build(place)
        run(ours, optimizer, range(CUT + 1), cut)
        optimizer.zero_grad()
        saved = optimizer.state_dict()
        chunkft.save_checkpoint(optimizer, tmp_path / "state")
        run(ours, optimizer, range(CUT + 1, STEPS))
        assert all(bool(p.isfinite().all()) for p in ours.parameters())
        optimizer.load_state_dict(saved)
        run(ours, optimizer, range(STEPS))
        optimizer.detach()
        assert all(p.requires_grad for p in ours.parameters())

    sweep("step", after, int(os.environ.get("SWEEP_START", 5)), int(os.environ.get("SWEEP_STRIDE", 97)))


PRIMITIVES = [
    *((ChunkResidency, name) for name in ("bind", "stash", "show")),
    *((StreamResidency, name) for name in ("bind", "stash")),
    *((StateStore, name) for name in ("take", "put", "_house", "drop")),
    *((PagedStore, name) for name in ("open", "close", "put", "retain", "prefetch_page")),
    *((Pager, name) for name in ("acquire", "release", "prefetch", "discard", "evict")),
    *((Attachment, name) for name in ("activate", "active")),
    *((Wiring, name) for name in ("bind", "active", "release", "_install")),
    (Places, "current"),
    (HostArena, "tensor"),
]


class Failing:
    """Lets the n-th call of a method fail, before or after it did its work."""

    def __init__(self, monkeypatch, owner, name, n, late, error):
        real = getattr(owner, name)
        self.calls = 0

        def call(*args, **kwargs):
            if self.calls < 0:
                return real(*args, **kwargs)
            self.calls += 1
            if self.calls != n:
                return real(*args, **kwargs)
            if late:
                real(*args, **kwargs)
            raise error

        self.error = error
        self.undo = monkeypatch.setattr(owner, name, call)

    def __enter__(self):
        self.calls = 0

    def __exit__(self, kind, error, traceback):
        self.reached, self.calls = error is self.error, -1
        return self.reached


@pytest.mark.parametrize("place", [name for name in PLACES if name != "backward"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_switch_goes_on_after_any_call_in_it_failed(place, late, references):
    model, _, state = references(place)
    reached = 0
    for owner, name in PRIMITIVES:
        for n in range(1, 30):
            with pytest.MonkeyPatch.context() as patch:
                error = MemoryError("no memory") if n % 2 else OSError(errno.EIO, "I/O error")
                ours, optimizer = build(place)
                failing = Failing(patch, owner, name, n, late, error)
                failing.calls = -1
                real = chunkft.optim.switch._advance

                def advance(optimizer, failing=failing, real=real):
                    with failing:
                        real(optimizer)

                for number in range(STEPS):
                    loss(ours).backward()
                    if number == CUT:
                        patch.setattr(chunkft.optim.switch, "_advance", advance)
                        optimizer.step()
                        patch.setattr(chunkft.optim.switch, "_advance", real)
                    else:
                        optimizer.step()
                if not failing.reached:
                    break
                reached += 1
                assert_same_weights(ours, model)
                assert_same_state(optimizer.state_dict(), state)
    assert reached > 5


@pytest.mark.parametrize("place", PLACES)
def test_cause_that_stays_is_told_each_time_and_forgotten_when_gone(place, monkeypatch, references):
    model, _, state = references(place)
    ours, optimizer = build(place)
    run(ours, optimizer, range(CUT))
    real = Attachment.activate

    def broken(self, slices):
        raise OSError(errno.EIO, "the disk is gone")

    loss(ours).backward()
    monkeypatch.setattr(Attachment, "activate", broken)
    for call in (optimizer.step, optimizer.state_dict, optimizer.step, lambda: ours(X), optimizer.memory):
        with pytest.raises(OSError, match="the disk is gone"):
            call()
    monkeypatch.setattr(Attachment, "activate", real)
    run(ours, optimizer, range(CUT + 1, STEPS))
    assert_same_weights(ours, model)
    assert_same_state(optimizer.state_dict(), state)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_switch_is_finished_by_an_evaluation_too(mode, references):
    model, _, state = references("host")
    ours, optimizer = build("host")
    run(ours, optimizer, range(CUT + 1), Interrupt(4, "release"))
    with mode():
        ours(X)
    run(ours, optimizer, range(CUT + 1, STEPS))
    assert_same_weights(ours, model)
    assert_same_state(optimizer.state_dict(), state)


def test_state_saved_after_an_interrupt_is_that_of_a_finished_switch(tmp_path, references):
    model, _, state = references("paged")
    ours, optimizer = build("paged")
    run(ours, optimizer, range(CUT + 1), Interrupt(3, "make_slices"))
    other, resumed = build("paged", page_bytes=PAGE)
    through_file(optimizer, resumed, tmp_path / "state")
    other.load_state_dict(ours.state_dict())
    run(other, resumed, range(CUT + 1, STEPS))
    assert_same_weights(other, model)
    assert_same_state(resumed.state_dict(), state)


def test_damaged_page_leaves_a_way_out(tmp_path):
    """A state that was saved before can be loaded though the switch cannot be finished."""
    model, optimizer = build("host")
    run(model, optimizer, range(4))
    saved = optimizer.state_dict()
    loss(model).backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkResidency, "bind", lambda self, pairs: (_ for _ in ()).throw(OSError("damaged")))
        with pytest.raises(OSError, match="damaged"):
            optimizer.step()
    optimizer.load_state_dict(saved)
    assert_same_state(optimizer.state_dict(), saved)
    run(model, optimizer, range(3))
