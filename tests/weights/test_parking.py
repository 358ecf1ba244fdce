"""Inputs of blocks that wait in host memory: gone from the device, and the same when they come back."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny_transformers import build, loss_of

import chunkft
from chunkft.weights import WeightStream
from chunkft.weights.parking import Parked, ParkingLot


def test_a_parked_tensor_is_let_go_and_comes_back_with_its_values():
    lot = ParkingLot(torch.device("cpu"))
    tensor = torch.randn(3, 5, requires_grad=True) * 2
    values, gone = tensor.detach().clone(), weakref.ref(tensor)
    parked = Parked(tensor, lot)
    assert parked.take() is tensor
    parked.park()
    del tensor
    gc.collect()
    assert gone() is None
    back = parked.take()
    assert torch.equal(back, values)
    assert back.requires_grad
    assert back.is_leaf


def test_memory_of_what_is_through_is_used_again():
    lot = ParkingLot(torch.device("cpu"))
    for _ in range(4):
        parked = Parked(torch.randn(8, 8), lot)
        parked.park()
        del parked
        gc.collect()
    assert lot.nbytes == 256
    first, second = Parked(torch.zeros(8, 8), lot), Parked(torch.ones(8, 8), lot)
    first.park()
    second.park()
    assert lot.nbytes == 512
    assert first.take().sum() == 0
    assert second.take().sum() == 64


@pytest.mark.parametrize("transformers_does_it_too", [False, True])
def test_no_activation_of_a_block_is_kept_and_its_input_only_in_host_memory(transformers_does_it_too):
    net = build("llama", num_hidden_layers=4)
    if transformers_does_it_too:
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stream = WeightStream(net, device="cpu", offload_inputs=True)
    optimizer = chunkft.ChunkAdamW(net, chunks=1)
    seen = []
    for block in net.model.layers:
        block.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    loss = loss_of("llama")(net)
    gc.collect()
    alive = [reference() is not None for reference in seen]
    assert alive == [False] * 4
    hidden = 3 * 9 * 36 * 4
    assert stream.lot is not None
    assert stream.lot.nbytes == 4 * hidden
    loss.backward()
    optimizer.step()
    for _ in range(2):
        loss_of("llama")(net).backward()
        optimizer.step()
    gc.collect()
    assert stream.lot.nbytes <= 8 * hidden


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # which hand their caches on by name, and by position
def test_a_recompute_fills_no_cache_again(family):
    net = build(family)
    WeightStream(net, device="cpu", offload_inputs=True)
    optimizer = chunkft.ChunkAdamW(net, chunks=1)
    blocks = net.model.layers if family == "llama" else net.transformer.h
    seen = []
    blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(
            value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")
        ),
        with_kwargs=True,
    )
    loss_of(family)(net).backward()
    assert seen
    assert all(cache.get_seq_length() == 0 for cache in seen)
    optimizer.detach()
