"""Counting what autograd keeps for the backward pass."""

import gc

import pytest
import torch
from torch import nn

import chunkft
from chunkft import saved_activations


def test_bytes_of_a_chain_are_counted_and_released():
    x = torch.randn(100, 10, requires_grad=True)
    with saved_activations() as saved:
        y = x.exp().sin()
    # exp keeps its result, sin its input, which is the same memory
    assert saved.live_bytes == saved.peak_bytes == 100 * 10 * 4
    y.sum().backward()
    assert saved.live_bytes == 0
    assert saved.peak_bytes == 4000


def test_views_of_one_storage_count_once():
    x = torch.randn(8, 6, requires_grad=True)
    with saved_activations() as saved:
        y = (x[:4].sin() + x[4:].sin()).sum() + (x * x).sum()
    assert saved.live_bytes == 8 * 6 * 4
    del y
    gc.collect()
    assert saved.live_bytes == 0


def test_memory_counts_until_its_last_holder_is_gone():
    x = torch.randn(8, 6, requires_grad=True)
    with saved_activations() as saved:
        first, second = x.sin(), x.cos()
    assert saved.live_bytes == 192
    first.sum().backward()
    assert saved.live_bytes == 192
    second.sum().backward()
    assert saved.live_bytes == 0


def test_parameters_of_the_model_are_left_out():
    model = nn.Sequential(nn.Linear(30, 50), nn.Linear(50, 20))
    x = torch.randn(7, 30)
    with saved_activations(model) as ours:
        first = model(x)
    with saved_activations() as everything:
        second = model(x)
    assert ours.live_bytes == 7 * (30 + 50) * 4
    assert everything.live_bytes == ours.live_bytes + model[1].weight.numel() * 4
    (first.sum() + second.sum()).backward()
    assert ours.live_bytes == everything.live_bytes == 0


def test_the_peak_is_over_all_passes():
    x = torch.randn(50, requires_grad=True)
    with saved_activations() as saved:
        for size in (10, 50, 20):
            x[:size].clone().sin().sum().backward()
            assert saved.live_bytes == 0
    assert saved.peak_bytes == 200


def test_empty_tensors_and_errors_inside_are_harmless():
    def fail():
        torch.empty(0, requires_grad=True).sin()
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), saved_activations() as saved:
        fail()
    kept = torch.randn(9, requires_grad=True).sin()
    assert saved.peak_bytes == 0
    assert kept.requires_grad


def test_chunks_keep_less_than_full_fine_tuning():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(6)))
    x = torch.randn(40, 64)

    def measure():
        with saved_activations(model) as saved:
            loss = model(x).sum()
        loss.backward()
        return saved.peak_bytes

    full = measure()
    model.zero_grad()
    optimizer = chunkft.ChunkAdamW(model, chunks=6, interval=1)
    kept = []
    for _ in range(6):
        kept.append(measure())
        optimizer.step()
    # With the lowest layer active all ReLUs above are needed, and they are what the layers would have kept.
    assert max(kept) <= full
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == full // 7 * 2
