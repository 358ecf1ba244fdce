"""What only a CUDA device can show: paging beside computation, the kernels inside of the optimizer, memory peaks."""

import gc

import pytest
import torch

import chunkft
from bench import plain_llama

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

DEVICE = torch.device("cuda")
PAGE = 1 << 20
PLACES = {
    "paged": {"state_device": "paged"},
    "stream": {"residency": "stream", "page_bytes": PAGE},
    "backward": {"residency": "stream", "page_bytes": PAGE, "update": "backward"},
}


def trained(steps, plan=None, dtype=torch.bfloat16, name="28M", **options):
    model = plain_llama.build(name, DEVICE, dtype)
    chosen = {"chunks": 4} if plan is None else {"chunks": None, "partition": plan}
    optimizer = chunkft.ChunkAdamW(model, lr=1e-3, interval=2, **chosen, **options)
    for step in range(steps):
        model(plain_llama.batch_of(name, DEVICE, 2, 64, seed=step)).backward()
        optimizer.step()
    return model, optimizer


def assert_same_bits(model, other):
    different = [
        name
        for (name, weight), same in zip(model.named_parameters(), other.parameters(), strict=True)
        if not torch.equal(weight, same)
    ]
    assert not different


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", PLACES)
def test_paging_changes_no_bit(kind, dtype):
    """Copies run on streams of their own; a missing edge would show as wrong weights."""
    model, optimizer = trained(20, dtype=dtype, **PLACES[kind])
    plain, _ = trained(20, optimizer.plan, dtype=dtype, state_device="device")
    assert_same_bits(model, plain)


@pytest.mark.parametrize("kind", PLACES)
def test_a_resumed_run_is_the_undisturbed_one(kind, tmp_path):
    model, optimizer = trained(11, **PLACES[kind])
    chunkft.save_checkpoint(optimizer, tmp_path / "saved.safetensors")
    other, resumed = trained(0, **PLACES[kind])
    other.load_state_dict(model.state_dict())
    chunkft.load_checkpoint(resumed, tmp_path / "saved.safetensors")
    for step in range(11, 20):
        for net, steps in ((model, optimizer), (other, resumed)):
            net(plain_llama.batch_of("28M", DEVICE, 2, 64, seed=step)).backward()
            steps.step()
    assert_same_bits(model, other)


def test_the_kernel_in_the_optimizer_follows_torch():
    """fp32, K=1: the trajectory of torch.optim.AdamW up to rounding in the last bits."""
    model = plain_llama.build("tiny", DEVICE, torch.float32)
    dense = plain_llama.build("tiny", DEVICE, torch.float32)
    optimizer = chunkft.ChunkAdamW(model, lr=1e-3, chunks=1)
    reference = torch.optim.AdamW(dense.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(10):
        for net, steps in ((model, optimizer), (dense, reference)):
            net(plain_llama.batch_of("tiny", DEVICE, 2, 32, seed=step)).backward()
            steps.step()
            steps.zero_grad()
    for weight, expected in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


def peak_of(**options):
    gc.collect()
    torch.cuda.empty_cache()
    model, optimizer = trained(4, **options)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    for step in range(4, 12):
        model(plain_llama.batch_of("28M", DEVICE, 2, 64, seed=step)).backward()
        optimizer.step()
    peak = torch.cuda.max_memory_allocated()
    optimizer.detach()
    del model, optimizer
    return base, peak


def test_streaming_bounds_the_peak():
    """With K=1 the state of all weights is 8 to 10 bytes a parameter; streamed it is three pages."""
    whole = peak_of(state_device="device", plan=None)[1]
    streamed = peak_of(**PLACES["stream"])[1]
    assert streamed < whole


def test_host_memory_is_page_locked_and_the_copies_are_counted():
    _, optimizer = trained(10, **PLACES["paged"])
    (pager,) = optimizer._store.pagers.values()
    stats = pager.stats()
    assert pager.pinned
    assert stats.pinned_bytes == stats.host_capacity
    assert stats.loaded_bytes > 0
    assert stats.stored_bytes > 0
    report = optimizer.paging()
    assert report.load_rate > 1e8
    assert 0 <= report.exposed_share <= 1


def test_a_steady_interval_creates_nothing():
    model, optimizer = trained(16, **PLACES["paged"])
    (pager,) = optimizer._store.pagers.values()
    before = pager.stats()
    for step in range(16, 24):
        model(plain_llama.batch_of("28M", DEVICE, 2, 64, seed=step)).backward()
        optimizer.step()
    after = pager.stats()
    assert (after.events_created, after.streams_created) == (before.events_created, before.streams_created)
    assert after.loads > before.loads
