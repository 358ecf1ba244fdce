"""A step that a GradScaler found infinities for is skipped, whatever made the gradients finite since."""

import math

import pytest
import torch
from helpers import small, small_loss
from residencies import MODES
from torch.nn.utils import clip_grad_value_

import chunkft


def poison(model, chunked):
    """One element of every gradient overflows, as fp16 ones do."""
    owners = chunked.active_parameters() if chunked else ((None, p) for p in model.parameters())
    for _, leaf in owners:
        if leaf.grad is not None:
            leaf.grad.view(-1)[1] = math.inf


def finite_again(model):
    for p in model.parameters():
        if p.grad is not None:
            p.grad.nan_to_num_(nan=0.0, posinf=1.0, neginf=-1.0)


REPAIRS = {
    "clip_grad_value_": lambda model: clip_grad_value_(model.parameters(), 1.0),
    "nan_to_num_": finite_again,
    "zeroing": lambda model: model.zero_grad(set_to_none=False),
    "nothing": lambda model: None,
}


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("unscales", [True, False])
def test_what_the_scaler_found_skips_the_step_as_torch_does(repair, unscales):
    chunked, plain = small().eval(), small().eval()
    ours = chunkft.ChunkAdamW(chunked, lr=1e-2, chunks=1)
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    scales = []
    for model, optimizer in ((chunked, ours), (plain, theirs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        for step in range(5):
            scaler.scale(small_loss(model)).backward()
            if step in (1, 3):
                poison(model, optimizer if optimizer is ours else None)
            if unscales:
                scaler.unscale_(optimizer)
                REPAIRS[repair](model)
            scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1]
    assert (ours.updates, ours.skipped) == (3, 2)
    assert all(map(torch.equal, chunked.parameters(), plain.parameters()))
    assert all(leaf.grad is None for _, leaf in ours.active_parameters())


@pytest.mark.parametrize("mode", [name for name in MODES if name != "backward"])
def test_columns_and_pages_skip_it_too(mode):
    model = small().eval()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=2, slice_dim=1, **MODES[mode])
    before = [p.detach().clone() for p in model.parameters()]
    small_loss(model).backward()
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert (optimizer.updates, optimizer.skipped, optimizer.interval_position) == (0, 1, 0)
    assert all(map(torch.equal, model.parameters(), before))
    small_loss(model).backward()
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    assert (optimizer.updates, optimizer.skipped) == (1, 1)


def test_a_scaler_that_unscaled_before_is_refused_with_updates_in_the_backward_pass():
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=2, **MODES["backward"])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(small_loss(model)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"update='backward' cannot be used with a GradScaler"):
        scaler.step(optimizer)
