"""Where state lives changes no bit of what is trained: paged, streamed, updated in the backward pass, never moved."""

import pytest
import torch
from gpu_training import (
    PLACES,
    assert_moved,
    assert_same_bits,
    batch,
    model_of,
    optimizer_of,
    places,
    train,
    trained,
)

import chunkft

pytestmark = [pytest.mark.timeout(90)]
STEPS = (40, 5)  # on a GPU five sweeps, in a rehearsal one and a step


@pytest.fixture
def steps(machine):
    return machine.pick(*STEPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", PLACES)
def test_paging_changes_no_bit(machine, steps, kind, dtype):
    """Copies run on streams of their own; a missing edge would show as wrong weights."""
    model, optimizer = trained(machine, steps, dtype=dtype, **places(machine)[kind])
    plain, _ = trained(machine, steps, optimizer.plan, dtype=dtype, state_device="device")
    assert_same_bits(model, plain)
    assert_moved(model, machine, dtype)


@pytest.mark.parametrize("master", ["fp32", "stochastic", "none"])
@pytest.mark.parametrize("kind", ["paged", "stream"])
def test_masters_are_paged_without_a_change(machine, steps, kind, master):
    """``residual`` is what bf16 weights have in the other tests."""
    options = {"master": master}
    model, optimizer = trained(machine, machine.pick(steps // 2, steps), **places(machine)[kind], **options)
    plain, _ = trained(
        machine, machine.pick(steps // 2, steps), optimizer.plan, state_device="device", **options
    )
    assert_same_bits(model, plain)


@pytest.mark.parametrize("kind", PLACES)
def test_state_in_files_changes_no_bit(machine, kind, tmp_path):
    steps = machine.pick(16, 5)
    model, optimizer = trained(machine, steps, state_dir=tmp_path, **places(machine)[kind])
    plain, _ = trained(machine, steps, optimizer.plan, state_device="device")
    assert_same_bits(model, plain)
    optimizer.detach()


def test_moments_in_bf16_and_columns_for_chunks(machine, steps):
    """Leaves with strides, and a first moment of another dtype, in the kernel and on pages."""
    options = {"slice_dim": 1, "first_moment": "bf16"}
    model, optimizer = trained(
        machine, machine.pick(steps // 2, steps), **places(machine)["stream"], **options
    )
    plain, _ = trained(
        machine, machine.pick(steps // 2, steps), optimizer.plan, state_device="device", first_moment="bf16"
    )
    assert_same_bits(model, plain)


def test_state_that_is_forgotten_at_every_switch(machine, steps):
    model, optimizer = trained(
        machine, machine.pick(steps // 2, steps), keep_state=False, **places(machine)["paged"]
    )
    plain, _ = trained(
        machine, machine.pick(steps // 2, steps), optimizer.plan, keep_state=False, state_device="device"
    )
    assert_same_bits(model, plain)


@pytest.mark.parametrize("kind", PLACES)
def test_a_resumed_run_is_the_undisturbed_one(machine, kind, tmp_path):
    model, optimizer = trained(machine, machine.pick(11, 3), **places(machine)[kind])
    chunkft.save_checkpoint(optimizer, tmp_path / "saved.safetensors")
    other, resumed = trained(machine, 0, **places(machine)[kind])
    other.load_state_dict(model.state_dict())
    chunkft.load_checkpoint(resumed, tmp_path / "saved.safetensors")
    for net, steps in ((model, optimizer), (other, resumed)):
        train(machine, net, steps, machine.pick(range(11, 20), range(3, 6)))
    assert_same_bits(model, other)


@pytest.mark.parametrize(("saved", "loaded"), [("paged", "stream"), ("stream", "device")])
def test_a_run_goes_on_with_its_state_in_another_place(machine, saved, loaded, tmp_path):
    plan = trained(machine, 0, **places(machine)["stream"])[1].plan
    options = {**places(machine), "device": {"state_device": "device"}}
    model, optimizer = trained(machine, machine.pick(11, 3), plan, **options[saved])
    chunkft.save_checkpoint(optimizer, tmp_path / "saved.safetensors")
    other, resumed = trained(machine, 0, plan, **options[loaded])
    other.load_state_dict(model.state_dict())
    chunkft.load_checkpoint(resumed, tmp_path / "saved.safetensors")
    for net, steps in ((model, optimizer), (other, resumed)):
        train(machine, net, steps, machine.pick(range(11, 20), range(3, 6)))
    assert_same_bits(model, other)


@pytest.mark.parametrize("kind", ["paged", "stream"])
def test_accumulation_and_clipping_beside_paging(machine, kind):
    """Gradients of three batches add up, and their norm is that of all active slices."""
    options = {"max_grad_norm": 0.05, "micro": 3}
    steps = machine.pick(12, 5)
    model, optimizer = trained(machine, steps, **places(machine)[kind], **options)
    plain, other = trained(machine, steps, optimizer.plan, state_device="device", **options)
    assert_same_bits(model, plain)
    assert torch.equal(optimizer.grad_norm, other.grad_norm)
    assert float(optimizer.grad_norm) > 0.05  # it did clip


@pytest.mark.parametrize("kind", [*PLACES, "device"])
def test_recomputed_blocks_give_the_bits_of_kept_ones(machine, kind):
    options = {**places(machine), "device": {"state_device": "device"}}[kind]
    steps = machine.pick(12, 5)
    model, optimizer = trained(machine, steps, checkpointing=True, **options)
    plain, _ = trained(machine, steps, optimizer.plan, state_device="device")
    assert_same_bits(model, plain)


@pytest.mark.parametrize("kind", PLACES)
def test_gradients_that_are_not_finite_change_nothing(machine, kind):
    """The device finds out, and neither weights nor state nor step counts move."""
    model, optimizer = trained(machine, 3, **places(machine)[kind])
    plain, other = trained(machine, 3, optimizer.plan, **places(machine)[kind])
    before = [p.detach().clone() for p in model.parameters()]
    (model(batch(machine, 99)) * float("nan")).backward()
    optimizer.step()
    assert optimizer.skipped == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for net, steps in ((model, optimizer), (plain, other)):
        train(machine, net, steps, range(3, 9))
    assert_same_bits(model, plain)


@pytest.mark.parametrize("kind", PLACES)
def test_a_model_on_a_device_that_is_not_the_current_one(machine, second, kind):
    model, optimizer = trained(second, second.pick(9, 5), **places(second)[kind])
    plain, _ = trained(machine, machine.pick(9, 5), optimizer.plan, state_device="device")
    assert_same_bits(model, plain)
    assert next(model.parameters()).device == second.device


def test_a_model_that_is_moved_to_the_device_late(machine):
    """Moved by a trainer after the optimizer was made: leaves follow, and the update is the device's."""
    model = model_of(machine, torch.float32).cpu()
    optimizer = optimizer_of(model, state_device="host")
    model.to(machine.device)
    train(machine, model, optimizer, range(9))
    plain, _ = trained(machine, 9, optimizer.plan, torch.float32, state_device="device")
    for weight, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert weight.device == other.device
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6)


def test_the_kernel_in_the_optimizer_follows_torch(machine):
    """fp32, K=1: the trajectory of torch.optim.AdamW up to rounding in the last bits."""
    model, dense = (model_of(machine, torch.float32) for _ in range(2))
    optimizer = chunkft.ChunkAdamW(model, lr=1e-3, chunks=1)
    reference = torch.optim.AdamW(dense.parameters(), lr=1e-3, weight_decay=0.01)
    for net, steps in ((model, optimizer), (dense, reference)):
        train(machine, net, steps, range(machine.pick(10, 4)))
    for weight, expected in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


def test_host_memory_is_page_locked_and_the_copies_are_counted(machine):
    _, optimizer = trained(machine, 10, **places(machine)["paged"])
    (pager,) = optimizer._store.pagers.values()
    stats = pager.stats()
    assert stats.loaded_bytes > 0
    assert stats.stored_bytes > 0
    report = optimizer.paging()
    assert 0 <= report.exposed_share <= 1
    machine.need("page-locked memory")
    assert pager.pinned
    assert stats.pinned_bytes == stats.host_capacity
    assert report.load_rate > 1e8


@pytest.mark.parametrize("kind", PLACES)
def test_a_steady_interval_creates_nothing(machine, kind):
    model, optimizer = trained(machine, machine.pick(16, 5), **places(machine)[kind])
    (pager,) = optimizer._store.pagers.values()
    before = pager.stats()
    train(machine, model, optimizer, machine.pick(range(16, 24), range(5, 9)))
    after = pager.stats()
    assert (after.events_created, after.streams_created) == (before.events_created, before.streams_created)
    assert after.loads > before.loads
