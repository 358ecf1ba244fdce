"""No collective without being asked for; a group or a DistributedDataParallel that is there is averaged over."""

import copy
import io
import re
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy_models import tiny_batch, tiny_net, weights

import chunkft

HALF = 3
STEPS = 6
ADAMW = {"lr": 1e-2, "chunks": 3, "interval": 2, "schedule": "random", "seed": 3}


def loss_of(model, step, part=slice(None)):
    ids, labels = tiny_batch(step, 2 * HALF)
    return F.cross_entropy(model(ids[part]), labels[part])


def share(rank):
    return slice(rank * HALF, (rank + 1) * HALF)


def train_wrapped(rank, *, build_first, accumulate=False, clip=False, chunks=3, **options):
    """One process of two: the model in a wrapper, the loop that torch's documentation shows."""
    model = tiny_net(dtype=torch.float64)
    if rank == 1:  # the wrapper hands out the weights of rank 0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    arguments = ADAMW | {"chunks": chunks}
    if build_first:
        optimizer = chunkft.ChunkAdamW(model, **arguments)
        wrapped = DistributedDataParallel(model, **options)
    else:
        wrapped = DistributedDataParallel(model, **options)
        optimizer = chunkft.ChunkAdamW(wrapped, **arguments)
    for step in range(STEPS):
        if accumulate:
            with wrapped.no_sync():
                loss_of(wrapped, step + 50, share(rank)).backward()
        loss_of(wrapped, step, share(rank)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    result = weights(model)
    optimizer.detach()
    return result, wrapped


def train_joined(*, accumulate=False, clip=False, chunks=3):
    model = tiny_net(dtype=torch.float64)
    optimizer = chunkft.ChunkAdamW(model, **ADAMW | {"chunks": chunks})
    for step in range(STEPS):
        if accumulate:
            loss_of(model, step + 50).backward()
        loss_of(model, step).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return weights(model)


WRAPPED = {
    "built first": {"build_first": True},
    "wrapped first": {"build_first": False},
    "one chunk, unused looked for": {"build_first": True, "chunks": 1, "find_unused_parameters": True},
    "views of buckets": {"build_first": True, "gradient_as_bucket_view": True},
    "clipped by torch": {"build_first": True, "clip": True},
    "accumulated": {"build_first": True, "accumulate": True, "clip": True},
}


def message_of(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def different(rank, **options):
    model = tiny_net()
    merged = {"lr": 1e-2, "chunks": 2, "interval": 1, "process_group": "default"} | options
    return message_of(lambda: chunkft.ChunkAdamW(model, **merged))


def own_model(rank):
    """Each rank trains another model, and rank 0 alone goes on."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4 + rank))
    optimizer = chunkft.ChunkAdamW(
        model, lr=1e-2, chunks=2, residency="stream", update="backward" if rank else "step"
    )
    for _ in range(3 if rank == 0 else 1):
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
    return optimizer.updates


def subgroups(rank):
    groups = [dist.new_group([0]), dist.new_group([1])]
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=2, process_group=groups[rank])
    loss_of(model, 0, share(rank)).backward()
    optimizer.step()
    foreign = message_of(lambda: chunkft.ChunkAdamW(tiny_net(), process_group=groups[1 - rank]))
    return weights(model), foreign


def refusals(rank):
    backward = {"residency": "stream", "update": "backward"}
    found = []
    for options, wrapper in (
        (backward, {}),
        ({}, {"static_graph": True}),
    ):
        model = tiny_net()
        optimizer = chunkft.ChunkAdamW(model, chunks=2, **options)
        wrapped = DistributedDataParallel(model, **wrapper)
        found.append(message_of(lambda wrapped=wrapped: loss_of(wrapped, 0)))
        optimizer.detach()
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, chunks=2)
    wrapped = DistributedDataParallel(model)
    with Join([wrapped]):
        found.append(message_of(lambda: loss_of(wrapped, 0)))
    optimizer.detach()
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, chunks=2)
    wrapped = DistributedDataParallel(model)
    loss_of(wrapped, 0).backward()
    optimizer.step()
    found.append(message_of(lambda: Join([wrapped])))
    optimizer.detach()
    model = tiny_net()
    optimizer = chunkft.ChunkAdamW(model, chunks=2)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    found.append(message_of(lambda: (loss_of(model, 0).backward(), optimizer.step())))
    holder = nn.ModuleList([DistributedDataParallel(nn.Linear(4, 4))])
    found.append(message_of(lambda: chunkft.ChunkAdamW(holder, chunks=1)))
    return found


def compiled(rank, order):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = chunkft.ChunkOptimizer(model, torch.optim.SGD, lr=0.1, chunks=2, interval=1)
    if order == "compiled, then wrapped":
        wrapped = DistributedDataParallel(torch.compile(model, backend="eager"))
    elif order == "wrapped, then compiled":
        wrapped = torch.compile(DistributedDataParallel(model), backend="eager")
    else:
        wrapped = DistributedDataParallel(model)
    for step in range(4):
        wrapped(torch.full((2, 8), 1.0 + rank + step)).square().mean().backward()
        optimizer.step()
    return weights(model)


COMPILED = ("compiled, then wrapped", "wrapped, then compiled")


def worker(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=20),
    )
    try:
        result = {"own": own_model(rank), "subgroups": subgroups(rank), "refusals": refusals(rank)}
        for name, options in WRAPPED.items():
            result[name], wrapped = train_wrapped(rank, **options)
        result["after detach"] = message_of(lambda: loss_of(wrapped, 0))
        for order in ("plain", *COMPILED):
            result[order] = compiled(rank, order)
        result["plan"] = different(rank, chunks=2 + rank)
        result["seed"] = different(rank, seed=rank, schedule="random")
        result["schedule"] = different(rank, schedule=("cyclic", "reverse")[rank], interval=1 + rank)
        torch.save(result, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(folder)), nprocs=2, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_without_a_group_every_process_trains_by_itself(results):
    assert [result["own"] for result in results] == [3, 1]


def test_a_subgroup_is_averaged_over_alone(results):
    for rank in range(2):
        model = tiny_net()
        optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=2)
        loss_of(model, 0, share(rank)).backward()
        optimizer.step()
        for name, value in weights(model).items():
            assert torch.equal(results[rank]["subgroups"][0][name], value)
        assert "not a member" in results[rank]["subgroups"][1]


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_replicas_stay_bit_identical_and_take_the_steps_of_the_joined_batch(results, name):
    options = {key: WRAPPED[name][key] for key in ("accumulate", "clip", "chunks") if key in WRAPPED[name]}
    for key, expected in train_joined(**options).items():
        assert torch.equal(results[0][name][key], results[1][name][key])
        torch.testing.assert_close(results[0][name][key], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("order", COMPILED)
def test_compiled_replicas_take_the_steps_of_plain_ones(results, order):
    for rank in range(2):
        for name, value in results[0]["plain"].items():
            torch.testing.assert_close(results[rank][order][name], value)
            assert torch.equal(results[rank][order][name], results[0][order][name])


@pytest.mark.parametrize("aspect", ["plan", "seed", "schedule"])
def test_ranks_that_do_not_train_alike_are_told_so_by_one_sentence(results, aspect):
    first, second = (result[aspect] for result in results)
    assert first == second
    assert first.startswith("RuntimeError: the processes of process_group do not train alike: rank 1")
    assert aspect in first


def test_what_cannot_be_averaged_is_refused_by_name(results):
    for result in results:
        wrapped, static, uneven, late, sharded, nested = result["refusals"]
        assert wrapped.startswith("ValueError: update='backward' cannot be used in a DistributedDataParallel")
        assert static.startswith("RuntimeError: DistributedDataParallel with static_graph=True")
        assert uneven.startswith(
            "RuntimeError: DistributedDataParallel with Join (uneven inputs) cannot wrap"
        )
        assert late == uneven
        assert re.match(r"RuntimeError: parameter '.*' is a DTensor now.* sharded", sharded)
        assert nested.startswith("ValueError: model has a DistributedDataParallel at '0'")


def test_a_wrapper_whose_optimizer_is_gone_refuses_to_train_unaveraged(results):
    for result in results:
        assert "was detached; wrap the module anew" in result["after detach"]


@pytest.mark.parametrize("value", [1, "gloo", object, True, "default"])
def test_other_values_are_refused_by_name(value):
    model = tiny_net()
    with pytest.raises(ValueError, match=r"^process_group="):
        chunkft.ChunkAdamW(model, process_group=value)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_copies_and_pickles_do_not_hold_the_optimizer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = chunkft.ChunkAdamW(model, chunks=2)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(torch.ones(1, 4)), model(torch.ones(1, 4)))
    optimizer.detach()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
