"""Weights that stream to a device: the bits of resident ones, the forecast memory, and a host that runs ahead."""

import gc
import warnings
from pathlib import Path

import pytest
import torch
from gpu_training import (
    assert_same_bits,
    batch,
    model_of,
    optimizer_of,
    places,
    same_bits,
    train,
)
from test_cuda_waits import ASKED, debug

import chunkft
from bench import plain_llama, predict
from chunkft.streaming import HostArena
from chunkft.weights import WeightStream, stream_of

pytestmark = [pytest.mark.timeout(120)]


def updates(machine):
    """Options by the place of the update."""
    backward = {**places(machine)["backward"], "update_on": "device"}
    return {
        "host": {"update_on": "host"},
        "device": {"update_on": "device", "state_device": "device"},
        "paged": {"update_on": "device", "state_device": "paged"},
        "backward": backward,
    }


UPDATES = ("host", "device", "paged", "backward")


def without_table(model):
    """Its gradient would be summed on the host for the one model and on the device for the other, in another order."""
    model.table.requires_grad_(False)
    return model


def resident(machine, steps, plan, dtype=torch.bfloat16, micro=1, checkpointing=True, **options):
    """A model whose weights stay on the device, after the same steps, and its optimizer."""
    model = without_table(model_of(machine, dtype, checkpointing))
    optimizer = optimizer_of(model, plan, state_device="device", **options)
    train(machine, model, optimizer, range(steps), micro)
    return model, optimizer


def streamed(machine, steps, kind, dtype=torch.bfloat16, micro=1, **options):
    """A streamed model after some steps, its optimizer, and the stream."""
    model = without_table(model_of(machine, dtype, options.pop("checkpointing", True)))
    optimizer = optimizer_of(
        model, weights="stream", device=machine.device, **{**updates(machine)[kind], **options}
    )
    train(machine, model, optimizer, range(steps), micro)
    return model, optimizer, stream_of(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", UPDATES[1:])
def test_streaming_changes_no_bit(machine, kind, dtype):
    """A slot that is handed on too early, or read too early, would show as wrong weights."""
    steps = machine.pick(24, 5)
    model, optimizer, _ = streamed(machine, steps, kind, dtype)
    plain, _ = resident(machine, steps, optimizer.plan, dtype)
    assert_same_bits(model, plain)
    before = model_of(machine, dtype).named_parameters()
    same = [n for (n, q), p in zip(before, model.parameters(), strict=True) if torch.equal(p.cpu(), q.cpu())]
    assert [name for name in same if "norm" not in name] == ["table.weight"]  # the rest was trained


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_gradients_that_come_down_have_the_bits_of_those_of_resident_weights(machine, dtype):
    """The update on the host is another one than the device's: what it is given must not be."""
    model, optimizer, _ = streamed(machine, 0, "host", dtype)
    plain, other = resident(machine, 0, optimizer.plan, dtype)
    for index in range(len(optimizer.plan)):
        optimizer._attachment.activate(optimizer.plan.chunks[index].slices)
        other._attachment.activate(optimizer.plan.chunks[index].slices)
        for net in (model, plain):
            with same_bits():
                net(batch(machine, index)).backward()
        pairs = zip(optimizer._attachment.active(), other._attachment.active(), strict=True)
        for (piece, leaf), (_, expected) in pairs:
            assert torch.equal(leaf.grad, expected.grad.to(leaf.device)), piece


@pytest.mark.parametrize("kind", UPDATES)
def test_slots_that_are_poisoned_when_they_are_left_change_nothing(machine, kind):
    """Everything that reads a block does so while it is held."""
    steps = machine.pick(16, 5)
    model, optimizer, stream = streamed(machine, steps, kind)
    poisoned = without_table(model_of(machine, checkpointing=True))
    other_stream = WeightStream(poisoned, device=machine.device, poison=True)
    other = optimizer_of(poisoned, optimizer.plan, weights=other_stream, **updates(machine)[kind])
    train(machine, poisoned, other, range(steps))
    assert_same_bits(model, poisoned)
    assert stream.ring.slots < len(stream.streamed) or not machine.real


def test_accumulation_clipping_and_blocks_that_keep_their_activations(machine):
    options = {"max_grad_norm": 0.05}
    steps = machine.pick(12, 5)
    model, optimizer, _ = streamed(machine, steps, "device", micro=3, checkpointing=False, **options)
    plain, _ = resident(machine, steps, optimizer.plan, micro=3, checkpointing=False, **options)
    assert_same_bits(model, plain)


@pytest.mark.parametrize("kind", UPDATES)
def test_blocks_that_stay_on_the_device_change_no_bit(machine, kind):
    steps = machine.pick(12, 5)
    model, optimizer, _ = streamed(machine, steps, kind)
    other, _, stream = streamed(
        machine, steps, kind, partition=optimizer.plan, chunks=None, resident_blocks=1
    )
    assert len(stream.streamed) == len(stream.units.blocks) - 1
    if kind == "host":  # a block that stays is updated on the device
        for one, same in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one.cpu(), same.cpu(), rtol=0.02, atol=1e-4)
    else:
        assert_same_bits(model, other)


@pytest.mark.parametrize("kind", UPDATES)
def test_a_step_waits_for_its_token_ids_and_for_nothing_of_the_weights(machine, kind):
    """Rows of the embedding are gathered on the host, so that the ids come down; else the forward pass runs ahead.

    The update waits once, whether gradients are finite; on the host it waits for the gradients.
    """
    model, optimizer, _ = streamed(machine, machine.pick(8, 4), kind)
    batches = [batch(machine, step) for step in range(machine.pick(8, 4))]
    machine.synchronize()
    waits = []
    for ids in batches:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with debug(machine, "warn"):
                model(ids).backward()
        waits.append([Path(w.filename).name for w in caught if ASKED in str(w.message)])
        optimizer.step()
    if kind != "backward":  # which asks whether gradients are finite by itself
        assert all(found == machine.pick(["forwards.py"], []) for found in waits), waits


def test_a_forward_pass_returns_while_the_device_is_busy(machine):
    """With ids in host memory nothing of it waits, whatever the device has to do before."""
    model, _, _ = streamed(machine, machine.pick(4, 2), "device")
    ids = batch(machine, 0)
    machine.hold(200)
    behind = machine.mark()
    rows = model.table(ids.cpu())  # gathered on the host, and sent behind what the device does
    assert rows.device == machine.device
    machine.need("a device that is busy")
    assert not behind.query()


def test_the_model_keeps_its_pages_on_the_host_wherever_it_is_moved(machine):
    model, optimizer, stream = streamed(machine, machine.pick(4, 2), "host")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.to(machine.device)
    if machine.real:
        model.cuda()
    for name, parameter in model.named_parameters():
        at_home = (
            parameter.device.type == "cpu" if stream.streams(name) else parameter.device == machine.device
        )
        assert at_home, name
        assert torch.equal(parameter.detach().cpu(), before[name].cpu()), name
    train(machine, model, optimizer, range(machine.pick(4, 2), machine.pick(8, 3)))
    with pytest.raises(RuntimeError, match="cannot be converted"):
        model.half()


def test_host_pages_are_page_locked_and_their_copies_are_counted(machine):
    _, optimizer, stream = streamed(machine, machine.pick(8, 4), "host")
    blocks = stream.pagers["blocks"]
    stats = blocks.stats()
    assert stats.loaded_bytes >= len(stream.streamed) * stream.streamed[0].nbytes
    assert stats.stored_bytes == 0  # the device changes no weight
    before = (stats.events_created, stats.streams_created)
    train(machine, stream.model, optimizer, range(machine.pick(8, 4), machine.pick(16, 6)))
    stats = blocks.stats()
    assert (stats.events_created, stats.streams_created) == before
    machine.need("page-locked memory")
    assert blocks.pinned


TOKENS, CHUNKS = 1024, 16


@pytest.mark.parametrize("kind", ["host", "backward"])
def test_the_peak_is_within_the_forecast(machine, kind, clean):
    """About 1B parameters in bf16, 1,024 tokens, blocks recomputed, no logits: not above what shapes foretell."""
    shape, tokens = machine.pick(("1B", TOKENS), ("tiny", 8))
    foretold = predict.streamed(predict.shape_of(shape), 1, tokens, CHUNKS, on_host=kind == "host")
    gc.collect()
    before = torch.cuda.memory_allocated() if machine.real else 0
    with torch.device("meta"):
        model = plain_llama.PlainLlama(plain_llama.SHAPES[shape], checkpointing=True).to(torch.bfloat16)
    stream = WeightStream(model.train(), device=machine.device)
    model.active_rows_of_head = lambda: [
        pair for pair in optimizer.active_parameters() if pair[0].name == "lm_head.weight"
    ]
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    options = {**updates(machine)[kind], "page_bytes": predict.PAGE_BYTES}
    optimizer = chunkft.ChunkAdamW(model, lr=1e-4, chunks=CHUNKS, interval=1, weights=stream, **options)
    ids = plain_llama.batch_of(shape, machine.device, 1, tokens)
    if machine.real:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(len(optimizer.plan) + 1):
        model(ids).backward()
        optimizer.step()
    machine.synchronize()
    counted = optimizer.memory_report()
    assert counted.weights.now == foretold["weights"]
    assert counted.weights_host.now == foretold["host"]
    peak = torch.cuda.max_memory_allocated() - before if machine.real else 0
    arenas = HostArena.live_bytes()
    optimizer.detach()
    stream.detach()
    assert HostArena.live_bytes() <= arenas
    machine.need("a measured peak")
    parts = ", ".join(f"{part} {size / 2**20:.0f}" for part, size in foretold.items())
    assert peak <= 1.03 * foretold["peak"], f"measured {peak / 2**20:.0f} MiB, foretold in MiB: {parts}"
