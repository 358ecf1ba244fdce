"""Checkpoints: bit-exact resume at any step, other plans, and how much memory they take."""

import io
from pathlib import Path

import pytest
import torch
from toy_models import (
    WAYS,
    Allocations,
    assert_same_state,
    assert_same_weights,
    leaves,
    mlp,
    mlp_loss,
    through_file,
    tiny_loss,
    tiny_net,
    train,
)

import chunkft

BASES = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "amsgrad": (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "tensor-lr": (torch.optim.AdamW, {"lr": torch.tensor(1e-2)}),
    "momentum": (torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
    "adafactor": (torch.optim.Adafactor, {"lr": 1e-2}),
    "nadam": (torch.optim.NAdam, {"lr": 1e-2}),
}


@pytest.fixture
def saved(tmp_path):
    """A trained optimizer in the middle of an interval, and its checkpoint."""
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=4)
    train(model, optimizer, tiny_loss, range(10))
    path = tmp_path / "old.safetensors"
    chunkft.save_checkpoint(optimizer, path)
    return model, optimizer, path


def resumed(model, build, way, source, path):
    """A new optimizer on a copy of the weights, continued from the source."""
    copy = tiny_net(seed=9, dtype=next(model.parameters()).dtype)
    copy.load_state_dict(model.state_dict())
    target = build(copy)
    way(source, target, path)
    return copy, target


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "random", "seed": 11},
        {"always_active": "head", "keep_state": False},
        {"partition": "interleaved", "slice_dim": 1, "max_grad_norm": 0.5},
        {"partition": "layers", "schedule": "reverse", "state_device": "device"},
    ],
    ids=["default", "random", "head-forget", "columns", "layers-device"],
)
def test_resume_is_bit_exact_at_every_step_and_micro_batch(way, options, tmp_path):
    def build(model):
        return chunkft.ChunkAdamW(model, lr=1e-2, chunks=3, interval=2, **options)

    straight = tiny_net()
    reference = build(straight)
    train(straight, reference, tiny_loss, range(9), accumulate=2)
    final = reference.state_dict()
    model = tiny_net()
    optimizer = build(model)
    for micro in range(18):
        # continue a copy from here to the end; in odd numbers a gradient is pending
        copy, twin = resumed(model, build, WAYS[way], optimizer, tmp_path / "c")
        assert twin.active == optimizer.active
        for later in range(micro, 18):
            (tiny_loss(copy, later) / 2).backward()
            if later % 2:
                twin.step()
        assert_same_weights(copy, straight)
        assert_same_state(twin.state_dict(), final)
        twin.detach()
        (tiny_loss(model, micro) / 2).backward()
        if micro % 2:
            optimizer.step()
    assert optimizer.sweep == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BASES)
def test_every_base_resumes_bit_exactly(way, name, tmp_path):
    base, options = BASES[name]

    def build(model):
        return chunkft.ChunkOptimizer(model, base, chunks=4, interval=2, partition=by_rows, **options)

    def by_rows(specs):
        # one-row slices: there the shape of a factored second moment equals the shape of the slice
        table = next(spec for spec in specs if spec.name == "table.weight")
        rest = [spec.whole() for spec in specs if not spec.dims]
        whole = [s.slice(0, 0, s.shape[0]) for s in specs if s.dims and s is not table]
        return [[table.slice(0, 0, 1)], [table.slice(0, 1, 2), table.slice(0, 2, 19)], whole, rest]

    model = tiny_net()
    optimizer = build(model)
    train(model, optimizer, tiny_loss, range(11))
    copy, twin = resumed(model, build, WAYS[way], optimizer, tmp_path / "c")
    assert_same_state(twin.state_dict(), optimizer.state_dict())
    train(model, optimizer, tiny_loss, range(11, 24))
    train(copy, twin, tiny_loss, range(11, 24))
    assert_same_weights(copy, model)
    assert_same_state(twin.state_dict(), optimizer.state_dict())


def test_state_dict_is_of_tensors_and_plain_values_and_shares_no_memory(saved):
    model, optimizer, _ = saved
    tiny_loss(model, 3).backward()
    state = optimizer.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert_same_state(torch.load(buffer, weights_only=True), state)
    before = {path: v.clone() for path, v in leaves(state)}
    optimizer.step()
    train(model, optimizer, tiny_loss, range(20, 32))
    for path, value in leaves(state):
        assert torch.equal(value, before[path]), path


def test_loading_takes_copies(saved):
    model, optimizer, _ = saved
    state = optimizer.state_dict()
    before = {path: v.clone() for path, v in leaves(state)}
    copy = tiny_net()
    copy.load_state_dict(model.state_dict())
    twin = chunkft.ChunkAdamW(copy, chunks=3, interval=4)
    twin.load_state_dict(state)
    train(copy, twin, tiny_loss, range(10, 25))
    for path, value in leaves(state):
        assert torch.equal(value, before[path]), path


def dense_moments(optimizer):
    return {
        (name, key): tensor
        for name, entry in optimizer.state_dict()["state"].items()
        for key, tensor in entry["tensors"].items()
    }


def step_counts(optimizer, name):
    """Step count of every row of a parameter, 0 where there is none."""
    entry = optimizer.state_dict()["state"].get(name)
    counts = torch.zeros(entry["shape"][0])
    for found in entry["ranges"]:
        counts[found["start"] : found["stop"]] = float(found["values"]["step"])
    return counts


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("partition", ["bytes", "interleaved"])
@pytest.mark.parametrize("steps", [5, 22])
def test_another_plan_takes_over_moments_and_step_counts_of_every_row(
    way, chunks, partition, steps, tmp_path
):
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=4)
    train(model, optimizer, tiny_loss, range(steps))
    other, target = resumed(
        model,
        lambda m: chunkft.ChunkAdamW(m, chunks=chunks, interval=4, partition=partition),
        WAYS[way], optimizer, tmp_path / "c",
    )  # fmt: skip
    assert len(target.plan) == chunks
    assert target.sweep == optimizer.sweep
    assert target.active == 0
    assert target.interval_position == 0
    assert target.updates == steps
    moments, taken = dense_moments(optimizer), dense_moments(target)
    assert moments.keys() == taken.keys()
    for key in moments:
        assert torch.equal(moments[key], taken[key]), key
    for name in {name for name, _ in moments}:
        assert torch.equal(step_counts(optimizer, name), step_counts(target, name)), name
    # it trains on, and what it saves goes back into the first plan unchanged
    back_model, back = resumed(
        other, lambda m: chunkft.ChunkAdamW(m, chunks=3, interval=4), WAYS[way], target, tmp_path / "d"
    )
    for key, value in dense_moments(back).items():
        assert torch.equal(value, moments[key]), key
    for name in {name for name, _ in moments}:
        assert torch.equal(step_counts(optimizer, name), step_counts(back, name)), name
    for m, o in ((other, target), (back_model, back)):
        train(m, o, tiny_loss, range(steps, steps + 25))
        assert all(torch.isfinite(p).all() for p in m.parameters())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("keep_state", [True, False])
def test_a_run_that_was_cut_anew_resumes_bit_exactly_itself(way, keep_state, tmp_path):
    first = tiny_net()
    optimizer = chunkft.ChunkAdamW(first, chunks=3, interval=4, keep_state=keep_state)
    train(first, optimizer, tiny_loss, range(7))

    def build(model):
        return chunkft.ChunkAdamW(model, chunks=2, interval=3, keep_state=keep_state)

    model, cut = resumed(first, build, WAYS[way], optimizer, tmp_path / "c")
    assert sum(1 for _ in cut.plan.slices()) > sum(1 for _ in build(tiny_net()).plan.slices())
    train(model, cut, tiny_loss, range(7, 12))
    tiny_loss(model, 12).backward()  # pending
    copy, twin = resumed(model, build, WAYS[way], cut, tmp_path / "d")
    assert (twin.active, twin.interval_position, twin.sweep) == (cut.active, cut.interval_position, cut.sweep)
    for o, m in ((cut, model), (twin, copy)):
        o.step()
        train(m, o, tiny_loss, range(13, 25))
    assert_same_weights(copy, model)
    assert_same_state(twin.state_dict(), cut.state_dict())


def test_loading_again_and_again_does_not_splinter_the_plan(saved):
    _, optimizer, _ = saved
    other = chunkft.ChunkAdamW(tiny_net(), chunks=2, interval=4)
    fresh = [str(piece) for piece in other.plan.slices()]
    other.load_state_dict(optimizer.state_dict())
    once = [str(piece) for piece in other.plan.slices()]
    other.load_state_dict(optimizer.state_dict())
    assert [str(piece) for piece in other.plan.slices()] == once
    other.load_state_dict(chunkft.ChunkAdamW(tiny_net(), chunks=5).state_dict())
    assert [str(piece) for piece in other.plan.slices()] == fresh
    assert once != fresh


def test_a_shorter_interval_ends_at_the_next_step_and_a_longer_one_goes_on(saved):
    model, optimizer, path = saved
    assert optimizer.interval_position == 2
    for interval, switches in ((1, 1), (2, 1), (3, 1), (7, 5)):
        copy, twin = resumed(
            model,
            lambda m, t=interval: chunkft.ChunkAdamW(m, chunks=3, interval=t),
            through_file,
            optimizer,
            path,
        )
        assert twin.active == 2
        for step in range(switches):
            assert twin.active == 2, interval
            train(copy, twin, tiny_loss, [step])
        assert twin.active == 0, interval


def test_resume_keeps_group_values_and_their_dicts(tmp_path):
    def build(model, lr):
        chunkft.attach(model)
        parameters = list(model.parameters())
        return chunkft.ChunkAdamW(
            [{"params": parameters[:2], "lr": lr, "note": "first"}, {"params": parameters[2:]}],
            lr=2 * lr,
            chunks=2,
        )

    model = mlp()
    optimizer = build(model, 1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer, mlp_loss, range(3))
    scheduler.step()
    other = mlp()
    twin = build(other, 7.0)
    groups = list(twin.param_groups)
    twin_scheduler = torch.optim.lr_scheduler.StepLR(twin, 1, 0.5)
    through_file(optimizer, twin, tmp_path / "c")
    twin_scheduler.load_state_dict(scheduler.state_dict())
    assert all(a is b for a, b in zip(groups, twin.param_groups, strict=True))
    assert [group["lr"] for group in twin.param_groups] == [5e-3, 1e-2]
    scheduler.step()
    twin_scheduler.step()
    assert [group["lr"] for group in twin.param_groups] == [2.5e-3, 5e-3]
    assert twin.param_groups[0]["note"] == "first"


@pytest.mark.parametrize("slice_dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_holds_no_second_copy_of_the_state(slice_dim, dtype, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 192)).to(dtype)
    optimizer = chunkft.ChunkAdamW(model, chunks=8, interval=1, slice_dim=slice_dim)
    for _ in range(9):
        model(torch.randn(4, 256, dtype=dtype)).float().square().sum().backward()
        optimizer.step()
    largest = 512 * 256 * 4
    with Allocations() as control:
        torch.zeros(largest // 4)
    assert control.largest == largest
    with Allocations() as seen:
        chunkft.save_checkpoint(optimizer, tmp_path / "c")
    # rows are written from where they are; columns of one parameter are put together first
    assert seen.largest <= (largest if slice_dim else 64)
    assert (tmp_path / "c").stat().st_size > 2 * largest


def test_loading_holds_one_slice_beside_the_state(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 192))
    optimizer = chunkft.ChunkAdamW(model, chunks=8, interval=1)
    for _ in range(9):
        model(torch.randn(4, 256)).square().sum().backward()
        optimizer.step()
    chunkft.save_checkpoint(optimizer, tmp_path / "c")
    target = chunkft.ChunkAdamW(
        torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 192)), chunks=8
    )
    slice_bytes = max(piece.numel * 4 for piece in optimizer.plan.slices())
    with Allocations() as seen:
        chunkft.load_checkpoint(target, tmp_path / "c")
    assert 0 < seen.largest <= slice_bytes
    assert_same_state(target.state_dict(), optimizer.state_dict())


def test_a_checkpoint_of_a_fresh_optimizer_resumes(tmp_path):
    model, copy = tiny_net(), tiny_net()
    source = chunkft.ChunkAdamW(model, chunks=3, interval=2)
    target = chunkft.ChunkAdamW(copy, chunks=3, interval=2)
    through_file(source, target, Path(tmp_path / "c"))
    train(model, source, tiny_loss, range(9))
    train(copy, target, tiny_loss, range(9))
    assert_same_weights(model, copy)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_always_active_may_change_between_runs(way, tmp_path):
    model = tiny_net()
    source = chunkft.ChunkAdamW(model, chunks=3, interval=2, always_active="head")
    train(model, source, tiny_loss, range(7))
    copy, target = resumed(
        model, lambda m: chunkft.ChunkAdamW(m, chunks=3, interval=2), WAYS[way], source, tmp_path / "c"
    )
    assert not target.plan.always
    assert float(step_counts(target, "head.weight").min()) == 7
    for key, value in dense_moments(source).items():
        assert torch.equal(value, dense_moments(target)[key]), key
    again, back = resumed(
        copy,
        lambda m: chunkft.ChunkAdamW(m, chunks=2, interval=2, always_active="head"),
        WAYS[way],
        target,
        tmp_path / "d",
    )
    assert float(step_counts(back, "head.weight").min()) == 7
    train(again, back, tiny_loss, range(7, 12))
    assert float(step_counts(back, "head.weight").min()) == 12
