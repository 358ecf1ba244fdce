"""Ranks that fail and go on, whose gradients are not finite, or that differ: all add up right, or all say so."""

import math

import pytest
import rank_fault_rigs as faults
import rigs
import torch
import torch.distributed as dist
from rank_fault_rigs import KINDS, STEPS, VICTIM, WHEN, build, loss_of, trained
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import chunkft
from chunkft.autograd import GradientView


def goes_on(group, kind, where, clears):
    """The victim fails once, catches it and takes the next batch; all make as many steps in the end."""
    rank = dist.get_rank(group)
    model, optimizer = build(kind, group)
    failed, batches, steps = rank != VICTIM, 0, 0
    while steps < STEPS:
        hook = None
        if steps == WHEN and not failed:
            failed, hook = True, PLACES[where](model, optimizer)
        batches += 1
        try:
            loss_of(model, batches, rank).backward()
        except ZeroDivisionError:
            if clears:
                optimizer.zero_grad()
            continue
        finally:
            if hook is not None:
                hook.remove()
        shown = [isinstance(weight.grad, GradientView) for weight in model.parameters()]
        assert any(shown), "norms of gradients see none"
        optimizer.step()
        steps += 1
    return trained(model, optimizer), batches


PLACES = {
    "data": lambda model, optimizer: model.register_forward_pre_hook(faults.fail),
    "forward": faults.in_forward(faults.fail),
    "backward": faults.in_backward(faults.fail),
}


@pytest.mark.parametrize(
    ("kind", "where", "clears"),
    [
        ("replicas", "forward", False),
        ("replicas", "forward", True),
        ("replicas", "backward", False),
        ("sharded", "data", False),
        ("sharded", "data", True),
    ],
)
def test_a_rank_that_catches_an_error_goes_on_with_the_others(pool, kind, where, clears):
    ranks = pool.run(2, goes_on, kind, where, clears)
    assert sorted(batches for _, batches in ranks) == [STEPS, STEPS + 1]
    assert ranks[0][0].updates == STEPS
    if kind == "replicas":
        assert ranks[0][0] == ranks[1][0]


def raises(group, action, *args):
    """What an action says that fails on all ranks; afterwards they train together again, as nothing is unmatched."""
    with pytest.raises(RuntimeError) as caught:
        action(group, *args)
    kind = args[0]
    model, optimizer = build(kind, group)
    for step in range(3):
        loss_of(model, step, dist.get_rank(group)).backward()
        optimizer.step()
    return str(caught.value), trained(model, optimizer)


def messages(pool, action, *args):
    """What both ranks say, after they trained together again."""
    ranks = pool.run(2, raises, action, *args)
    assert ranks[0][1].updates == ranks[1][1].updates == 3
    if args[0] == "replicas":
        assert ranks[0][1] == ranks[1][1]
    return [message for message, _ in ranks]


def test_gradients_that_one_rank_clears_after_others_have_some_are_refused_by_all(pool):
    for message in messages(pool, goes_on, "replicas", "backward", True):
        assert "cleared by zero_grad() on some ranks only" in message


# --- while the backward pass goes on


def leaves_when(group, kind, options):
    """How many buckets had left by the end of each backward pass, and how many there are."""
    model, optimizer = build(kind, group, **options)
    reducer = optimizer._team.rounds._reducer
    flush, left = reducer.flush, []

    def noting():
        left.append(reducer._next)
        flush()

    reducer.flush = noting
    for step in range(3):
        loss_of(model, step, dist.get_rank(group)).backward()
        optimizer.step()
    return left, len(optimizer._team._buckets(0))


@pytest.mark.parametrize(
    "options", [{}, {"residency": "stream", "update": "backward"}], ids=["step", "backward"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_leave_while_the_backward_pass_goes_on(pool, kind, options):
    for left, buckets in pool.run(2, leaves_when, kind, {"chunks": 1, **options}):
        assert left == [buckets] * 3
        assert buckets >= 6


# --- not finite


def meets(group, kind, value, mode):
    """One loss of the victim is not finite."""
    rank = dist.get_rank(group)
    options = {
        "clip": {"max_grad_norm": 0.05},
        "backward": {"residency": "stream", "update": "backward", "page_bytes": 600},
    }.get(mode, {})
    model, optimizer = build(kind, group, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=mode == "scaler")
    before = None
    for step in range(STEPS):
        loss = loss_of(model, step, rank)
        loss = loss * value if step == WHEN and rank == VICTIM else loss
        scaler.scale(loss).backward()
        if step == WHEN:
            before = rigs.digest(model)
        scaler.step(optimizer)
        scaler.update()
        if step == WHEN and mode != "backward":
            assert rigs.digest(model) == before
    return trained(model, optimizer), scaler.get_scale()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("value", "mode"),
    [
        (math.nan, "plain"),
        (math.inf, "clip"),
        (math.inf, "scaler"),
        (math.nan, "scaler"),
        (math.nan, "backward"),
    ],
)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(pool, kind, value, mode):
    ranks = pool.run(2, meets, kind, value, mode)
    for rank, scale in ranks:
        assert (rank.updates, rank.skipped) == (STEPS - 1, 1)
        assert scale == (4.0 if mode == "scaler" else 1.0)
    if kind == "replicas":
        assert ranks[0] == ranks[1]


def copies_meet(group, victim):
    """Two copies of two shards that update in the backward pass; a gradient of one row is not finite on one rank."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=1, residency="stream", update="backward")
    for step in range(3):
        loss = loss_of(model, step, dist.get_rank())
        if step == 1 and dist.get_rank() == victim:
            loss = loss + (model(faults.batch(9, 0))[:, 0] * math.nan).sum()
        loss.backward()
        optimizer.step()
    return rigs.digest(model), optimizer.updates, optimizer.skipped


def test_copies_of_shards_drop_a_gradient_that_is_not_finite_on_one_of_them(pool):
    ranks = pool.run(4, copies_meet, 3)
    assert all(rank[1:] == (2, 1) for rank in ranks)
    assert ranks[0] == ranks[2]
    assert ranks[1] == ranks[3]


# --- other numbers of batches

PARTS = [
    (3, 2),
    (2, 2),
    (2, 3),
    (2, 2),
    (0, 2),
    (1, 1),
    (3, 0),
    (2, 2),
]  # backward passes of the ranks, by step


def accumulate(group, kind, mode):
    """Ranks have other numbers of backward passes; one process alone makes those of all."""
    rank = None if group is None else dist.get_rank(group)
    options = {"max_grad_norm": 0.02} if mode == "clip" else {}
    model, optimizer = build(kind, group, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=mode == "scaler")
    norms = []
    for step, parts in enumerate(PARTS):
        if mode == "torch" and 0 in parts:
            continue  # who has no gradients does not look at them
        for each, count in enumerate(parts):
            for part in range(count if rank in (None, each) else 0):
                loss = loss_of(model, step, each, part)
                scaler.scale(loss / 2 if rank is None else loss).backward()
        if mode == "torch":
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.02)))
        if mode == "scaler" and rank is not None and not parts[rank]:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
            optimizer.step()  # a scaler refuses to step without gradients
            del optimizer.grad_scale, optimizer.found_inf
            continue
        scaler.step(optimizer)
        scaler.update()
    values = [p.full_tensor() if kind == "sharded" and group else p for p in model.parameters()]
    return trained(model, optimizer), [value.detach().clone() for value in values], norms


@pytest.mark.parametrize("mode", ["plain", "clip", "torch", "scaler"])
def test_ranks_with_other_numbers_of_backward_passes_add_up_what_all_have(pool, mode):
    ranks = pool.run(2, accumulate, "replicas", mode)
    _, expected, norms = accumulate(None, "replicas", mode)
    assert ranks[0][0] == ranks[1][0]
    for _, values, found in ranks:
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
        assert found == pytest.approx(norms, rel=1e-5)
    assert ranks[0][0].updates == len([parts for parts in PARTS if mode != "torch" or 0 not in parts])


def passes_twice(group, kind):
    model, optimizer = build(kind, group, residency="stream", update="backward", page_bytes=600)
    rank = dist.get_rank(group)
    for step in range(4):
        for part in range(1 + (step == 2 and rank == VICTIM)):
            loss_of(model, step, rank, part).backward()
        optimizer.step()


def looks(group, kind):
    model, optimizer = build(kind, group)
    rank = dist.get_rank(group)
    for step in range(4):
        loss_of(model, step, rank).backward()
        if step == 2 and rank == VICTIM:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def test_a_second_backward_pass_of_one_rank_is_refused_by_all_where_it_updates(pool):
    for message in messages(pool, passes_twice, "replicas"):
        assert "a second backward pass" in message


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_of_which_one_alone_looks_at_gradients_are_told(pool, kind):
    for message in messages(pool, looks, kind):
        assert "1 at the norm of gradients" in message
        assert "1 in step()" in message


# --- ranks that do not train alike


def later(index, chunks):
    return (index + (index > 1 and dist.get_rank() == VICTIM)) % chunks


DIFFERENCES = {
    "width": ({"width": 14}, "parameters"),
    "chunks": ({"chunks": 3}, "plan"),
    "seed": ({"seed": 4}, "seed"),
    "schedule": ({"schedule": "reverse"}, "schedule"),
    "callable": ({}, "position"),
    "interval": ({"interval": 3}, "interval"),
    "lr": ({"lr": 2e-2}, "learning rate"),
    "clipping": ({"max_grad_norm": 1.0}, "max_grad_norm"),
    "interval set later": ({}, "interval"),
    "frozen later": ({}, "what is frozen"),
}


def differ(group, kind, name):
    """Train with what differs on the victim."""
    rank = dist.get_rank(group)
    options = dict(DIFFERENCES[name][0]) if rank == VICTIM else {}
    if name == "callable":
        options["schedule"] = later
    model, optimizer = build(kind, group, **options)
    for step in range(2 * STEPS):
        if step == 2 * WHEN + 1 and name == "interval set later" and rank == VICTIM:
            optimizer.interval = 3
        if step == WHEN and name == "frozen later" and rank == VICTIM:
            active = optimizer.plan.chunks[optimizer.active].slices[0].name
            dict(model.named_parameters())[active].requires_grad_(False)
        try:
            loss_of(model, step, rank).backward()
            optimizer.step()
        except RuntimeError as error:
            raise RuntimeError(f"{error} (step {step})") from error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DIFFERENCES)
def test_ranks_that_do_not_train_alike_all_say_so(pool, kind, name):
    for message in messages(pool, differ, kind, name):
        assert "do not train alike: rank 1 of the group differs from rank 0" in message
        assert DIFFERENCES[name][1] in message
        if name == "interval set later":  # at once, not at the next switch
            assert f"(step {2 * WHEN + 1})" in message


def loads_another(group, kind):
    model, optimizer = build(kind, group)
    rank = dist.get_rank(group)
    saved = []
    for step in range(4):
        saved.append(optimizer.state_dict())
        loss_of(model, step, rank).backward()
        optimizer.step()
    with pytest.raises(ValueError, match="different checkpoints"):
        optimizer.load_state_dict(saved[1 + 2 * rank])
    loss_of(model, 4, rank).backward()
    optimizer.step()
    return trained(model, optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_load_different_checkpoints_all_say_so_and_go_on_as_they_were(pool, kind):
    ranks = pool.run(2, loads_another, kind)
    assert [rank.updates for rank in ranks] == [5, 5]
    assert kind == "sharded" or ranks[0] == ranks[1]
