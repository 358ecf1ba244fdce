"""Weights that load_state_dict(assign=True) replaced have their gradients cleared and saved before the next step."""

import copy
import io

import pytest
import torch
from toy_models import mlp, mlp_loss, same_bits

import chunkft


def replaced():
    model = mlp()
    whole = chunkft.partition(model, 1, atomic="*")  # no sliced forward that would notice
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=None, partition=whole, interval=3)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    mlp_loss(model, 0).backward()
    return model, optimizer


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_of_the_optimizer_reaches_the_new_weights(set_to_none):
    model, optimizer = replaced()
    optimizer.zero_grad(set_to_none)
    gradients = [leaf.grad for _, leaf in optimizer.active_parameters()]
    assert all(p.grad is None or not p.grad.norm() for p in model.parameters())
    assert all(gradient is None or not gradient.any() for gradient in gradients)


def test_a_save_inside_of_an_accumulation_window_has_gradients_of_the_new_weights(tmp_path):
    expected = mlp()
    mlp_loss(expected, 0).backward()
    model, optimizer = replaced()
    saved = {entry["name"]: entry["tensor"] for entry in optimizer.state_dict()["gradients"]}
    assert saved.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(saved[name], parameter.grad)

    model, optimizer = replaced()
    chunkft.save_checkpoint(optimizer, tmp_path / "state.safetensors")
    other = copy.deepcopy(model)
    whole = chunkft.partition(other, 1, atomic="*")
    resumed = chunkft.ChunkAdamW(other, lr=1e-2, chunks=None, partition=whole, interval=3)
    chunkft.load_checkpoint(resumed, tmp_path / "state.safetensors")
    optimizer.step()
    resumed.step()
    for (name, ours), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert same_bits(ours, theirs), name


def test_a_state_dict_of_replaced_weights_still_loads_with_weights_only():
    _, optimizer = replaced()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
