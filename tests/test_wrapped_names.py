"""State saved from a wrapped model goes into the plain one and back."""

import copy
import threading

import pytest
import torch
from toy_models import WAYS, assert_same_weights, mlp, mlp_loss

import chunkft
from chunkft.names import matched


class Wrap(torch.nn.Module):
    def __init__(self, model, attribute):
        super().__init__()
        self.add_module(attribute, model)
        self.attribute = attribute

    def forward(self, x):
        return getattr(self, self.attribute)(x)


def inner(model, attribute, index):
    model[index] = Wrap(model[index], attribute)
    return model


WRAPS = {
    "compile": lambda m: Wrap(m, "_orig_mod"),
    "DDP": lambda m: Wrap(m, "module"),
    "any-prefix": lambda m: Wrap(m, "student"),
    "compiled-DDP": lambda m: Wrap(Wrap(m, "module"), "_orig_mod"),
    "FSDP1": lambda m: inner(Wrap(m, "_fsdp_wrapped_module")._fsdp_wrapped_module, "_fsdp_wrapped_module", 0),
    "checkpointed": lambda m: inner(m, "_checkpoint_wrapped_module", 3),
    "part-compiled": lambda m: inner(m, "_orig_mod", 0),
    "part-in-DDP": lambda m: inner(m, "module", 2),
}


def build(model):
    return chunkft.ChunkAdamW(model, lr=1e-2, chunks=3, interval=2, max_grad_norm=1.0)


def train(model, optimizer, steps, first=0):
    for number in range(first, first + steps):
        mlp_loss(model, number).backward()
        optimizer.step()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("saved_wrapped", [True, False], ids=["wrapped-to-plain", "plain-to-wrapped"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_run_goes_on_bit_exactly_across_wrappers(wrap, saved_wrapped, way, tmp_path):
    base = mlp()
    straight = copy.deepcopy(base)
    train(straight, build(straight), 9)
    first, second = copy.deepcopy(base), copy.deepcopy(base)
    source = WRAPS[wrap](first) if saved_wrapped else first
    optimizer = build(source)
    train(source, optimizer, 5)
    mlp_loss(source, 5).backward()  # inside of an accumulation window
    for a, b in zip(second.parameters(), source.parameters(), strict=True):
        a.data.copy_(b.detach())
    target = second if saved_wrapped else WRAPS[wrap](second)
    resumed = build(target)
    WAYS[way](optimizer, resumed, tmp_path / "state")
    resumed.step()
    train(target, resumed, 3, first=6)
    for a, b in zip(target.parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_model_is_refused_still():
    first, second = mlp(), torch.nn.Sequential(torch.nn.Linear(13, 37), torch.nn.Linear(37, 9))
    a, b = build(first), build(second)
    with pytest.raises(ValueError, match="another model"):
        b.load_state_dict(a.state_dict())


def test_names_that_become_the_same_are_both_told():
    with pytest.raises(ValueError, match=r"'a\._orig_mod\.w' and 'a\.w'"):
        matched(["a._orig_mod.w", "a.w"], ["a.w", "b.w"], "state_dict")


@pytest.mark.parametrize(
    ("saved", "ours"),
    [
        (["xa.w", "xb.w"], ["a.w", "b.w"]),
        (["p.a.w", "q.b.w"], ["a.w", "b.w"]),
        (["module.a.w"], ["a.w", "b.w"]),
        (["left.a.w"], ["right.a.w"]),
    ],
)
def test_names_that_only_look_alike_do_not_fit(saved, ours):
    assert matched(saved, ours, "state_dict") is None


def test_threads_that_save_to_one_path_leave_a_whole_checkpoint(tmp_path):
    model = mlp()
    optimizer = build(model)
    train(model, optimizer, 5)
    errors = []

    def save():
        try:
            for _ in range(15):
                chunkft.save_checkpoint(optimizer, tmp_path / "state")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    other = mlp()
    chunkft.load_checkpoint(resumed := build(other), tmp_path / "state")
    other.load_state_dict(model.state_dict())
    train(model, optimizer, 3)
    train(other, resumed, 3)
    assert_same_weights(other, model)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_save_that_was_interrupted_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = mlp()
    optimizer = build(model)
    train(model, optimizer, 2)
    chunkft.save_checkpoint(optimizer, tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    train(model, optimizer, 2)

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        chunkft.save_checkpoint(optimizer, tmp_path / "state")
    monkeypatch.undo()
    assert (tmp_path / "state").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    chunkft.save_checkpoint(optimizer, tmp_path / "state")
    assert (tmp_path / "state").read_bytes() != before


@pytest.mark.parametrize("wrap", WRAPS)
def test_plan_of_a_wrapped_model_fits_the_plain_one_and_back(wrap):
    plain, wrapped = mlp(), WRAPS[wrap](mlp())
    ours, theirs = chunkft.partition(plain, chunks=3), chunkft.partition(wrapped, chunks=3)
    assert chunkft.partition(plain, chunks=None, by=theirs) == ours
    assert chunkft.partition(wrapped, chunks=None, by=ours) == theirs
