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


@pytest.mark.parametrize("atomic", ["*", "*bias"])
def test_updates_in_the_backward_pass_go_on_with_weights_that_loading_replaced(atomic):
    """Replaced weights are updated in their first backward pass, with the rate that is set then, and counted once."""
    models = []
    for replace in (False, True):
        model = mlp()
        plan = chunkft.partition(model, 2, atomic=atomic)
        optimizer = chunkft.ChunkAdamW(
            model, lr=1e-2, chunks=None, partition=plan, interval=2, residency="stream", update="backward"
        )
        for batch in range(6):
            if replace:
                values = {key: value.clone() for key, value in model.state_dict().items()}
                model.load_state_dict(values, assign=True)
            mlp_loss(model, batch).backward()
            optimizer.param_groups[0]["lr"] = 1e-2 * 0.5**batch  # of the next step
            optimizer.step()
        assert optimizer.updates == 6
        models.append(model)
    for (name, ours), theirs in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        assert same_bits(ours, theirs), name


def test_a_step_that_began_counts_where_a_weight_is_replaced_before_it_ends():
    model = mlp()
    plan = chunkft.partition(model, 1, atomic="0.bias")
    optimizer = chunkft.ChunkAdamW(
        model, lr=1e-2, chunks=None, partition=plan, interval=3, residency="stream", update="backward"
    )
    mlp_loss(model, 0).backward()
    assert model[0].bias.grad is None  # it was updated
    model[0].bias = torch.nn.Parameter(model[0].bias.detach().clone())
    optimizer.step()
    assert (optimizer.updates, optimizer.interval_position) == (1, 1)
