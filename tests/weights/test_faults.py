"""After an error or an interrupt anywhere in a step weights are at rest, and the next step is that of resident ones."""

import itertools
import linecache
import sys
import threading

import pytest
import torch
from weight_rigs import assert_at_rest, assert_same, loss_of, pair, tower, train

from chunkft.streaming import Pager

UPDATES = ("host", "device")
MODES = ("none", "non-reentrant", "reentrant")


class Boom(Exception):
    """Raised by what a test breaks."""


def boom(*_):
    raise Boom


def at(where, model):
    """Break the model at a place until the handle is removed."""
    block = model.blocks[1]
    if where == "forward":
        return block.down.register_forward_hook(boom)
    if where == "between":
        return model.norm.register_forward_hook(boom)
    if where == "recompute":
        calls = itertools.count()
        return block.down.register_forward_pre_hook(lambda *_: boom() if next(calls) else None)
    if where == "backward":
        return block.norm.register_full_backward_hook(boom)
    return model.norm.register_full_backward_hook(boom)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["forward", "between", "recompute", "backward", "above"])
def test_a_step_after_an_error_is_as_if_there_was_none(where, mode, update):
    if where == "recompute" and mode == "none":
        pytest.skip("nothing is recomputed")
    pairs = pair(update, None, lambda: tower(mode=mode), chunks=1)
    for model, optimizer in pairs:
        for _ in range(4):  # more often than there are slots
            handle = at(where, model)
            with pytest.raises(Boom):
                loss_of(model).backward()
            handle.remove()
        if hasattr(optimizer._attachment.model, "_chunkft_weights"):
            assert_at_rest(model)
        optimizer.zero_grad()
    train(pairs, range(2))
    assert_same(pairs)
    assert_at_rest(pairs[0][0])


@pytest.mark.parametrize("update", UPDATES)
def test_gradients_that_came_before_an_error_are_there(update):
    pairs = pair(update, make=lambda: tower(mode="non-reentrant"), chunks=1)
    for model, _ in pairs:
        handle = at("backward", model)
        with pytest.raises(Boom):
            loss_of(model).backward()
        handle.remove()
    assert_same(pairs)
    assert any("blocks.3" in str(p) and leaf.grad is not None for p, leaf in pairs[0][1].active_parameters())


class Interrupts:
    """A KeyboardInterrupt at the n-th line of the package's own code that runs, as a signal may bring it."""

    def __init__(self, number):
        self.number = number
        self.count = 0

    def __call__(self, frame, event, argument):
        if "chunkft/weights" not in frame.f_code.co_filename or frame.f_code.co_name == "__del__":
            return None
        return self.line

    def line(self, frame, event, argument):
        # At the end of a "with" that line is traced before __exit__, where no signal comes.
        if event == "line" and not source(frame).startswith("with "):
            self.count += 1
            if self.count == self.number:
                raise KeyboardInterrupt
        return self.line


def source(frame):
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


def lines_of(call):
    counter = Interrupts(0)
    before = sys.gettrace()
    sys.settrace(counter)
    try:
        call()
    finally:
        sys.settrace(before)
    return counter.count


@pytest.mark.parametrize("update", UPDATES)
def test_an_interrupt_at_any_line_leaves_weights_that_train_on(update):
    """Every line of ``chunkft.weights`` that a forward and a backward pass run may be the last one of a call."""
    model, optimizer = pair(update, None, lambda: tower(3, "non-reentrant"), chunks=1)[0]
    reference = gradients_of(model, optimizer)
    total = lines_of(lambda: loss_of(model).backward())
    assert total > 300
    for number in range(1, total, 37 if update == "host" else 53):
        optimizer.zero_grad()
        interrupts, before = Interrupts(number), sys.gettrace()
        sys.settrace(interrupts)
        try:
            loss_of(model).backward()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        found = gradients_of(model, optimizer)
        for name, gradient in reference.items():
            assert torch.equal(found[name], gradient), (number, name)
        assert_at_rest(model)


@pytest.mark.parametrize("method", ["acquire", "release", "prefetch"])
def test_an_interrupt_behind_a_call_of_the_pager(method, monkeypatch):
    """What the pager has done is undone, though nobody could note it."""
    pairs = pair("host", {"poison": False}, chunks=1)
    model, _ = pairs[0]
    original = getattr(Pager, method)
    for place in range(4):
        calls = itertools.count()

        def interrupted(pager, *args, calls=calls, place=place, **kwargs):
            result = original(pager, *args, **kwargs)
            if next(calls) == place:
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patch:
            patch.setattr(Pager, method, interrupted)
            with pytest.raises(KeyboardInterrupt):
                loss_of(model).backward()
    pairs[0][1].zero_grad()
    train(pairs, range(2))
    assert_same(pairs)
    assert_at_rest(model)


def gradients_of(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    return {str(p): leaf.grad.clone() for p, leaf in optimizer.active_parameters()}


@pytest.mark.parametrize("update", UPDATES)
def test_an_error_in_step_is_no_end(update, monkeypatch):
    pairs = pair(update, chunks=2)
    for model, optimizer in pairs:
        loss_of(model).backward()
        with monkeypatch.context() as patch:
            patch.setattr("chunkft.optim.switch.activate", boom)
            with pytest.raises(Boom):
                optimizer.step()
    train(pairs, range(1, 4))
    assert_same(pairs)


@pytest.mark.parametrize("update", UPDATES)
def test_weights_loaded_after_a_failed_backward_pass_count(update):
    pairs = pair(update, chunks=1)
    values = {name: value * 1.5 for name, value in tower(seed=3).state_dict().items()}
    for model, optimizer in pairs:
        handle = at("backward", model)
        with pytest.raises(Boom):
            loss_of(model).backward()
        handle.remove()
        model.load_state_dict(values)
        optimizer.zero_grad()
    train(pairs, range(2))
    assert_same(pairs)


def test_a_fork_is_told_that_the_pages_are_its_parents():
    import os

    model, optimizer = pair()[0]
    train([(model, optimizer)], range(1))
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            loss_of(model)
            told = "nothing was raised"
        except RuntimeError as error:
            told = str(error)
        os.write(write, told.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert "belongs to process" in os.read(read, 4096).decode()
    train([(model, optimizer)], range(1))


def test_threads_evaluate_between_and_during_steps():
    pairs = pair("host", {"slots": 4}, chunks=2)
    (model, _), (plain, _) = pairs
    with torch.no_grad():
        expected = model(batch_ids()).clone()
    found, failures = [], []

    def evaluate():
        try:
            for _ in range(10):
                with torch.no_grad():
                    found.append(model(batch_ids()))
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=evaluate) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(5):  # the weights do not change
            loss_of(model).backward()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures, failures
    assert all(torch.equal(one, expected) for one in found)
    for _ in range(5):
        loss_of(plain).backward()
    assert_same(pairs)
    assert_at_rest(model)


def batch_ids():
    return torch.arange(15).view(3, 5)
