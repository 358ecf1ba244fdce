"""Several ranks with nccl: the steps of one process on the joined batch, and weights of the same bits on all ranks."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from gpu_machine import rehearsing
from torch import nn

import chunkft

pytestmark = [pytest.mark.timeout(150)]

STEPS = 6
ROWS = 8  # samples of a rank
OPTIONS = {"chunks": 1, "interval": 2, "lr": 1e-2}
PLACES = {
    "device": {"state_device": "device", "max_grad_norm": 0.5},
    "paged": {"state_device": "paged"},
    "backward": {"residency": "stream", "update": "backward", "page_bytes": 1 << 14},
}


def net(device):
    torch.manual_seed(0)
    layers = [nn.Linear(48, 65), nn.GELU(), nn.LayerNorm(65), nn.Linear(65, 48), nn.GELU(), nn.Linear(48, 7)]
    return nn.Sequential(*layers).to(device)


def rows_of(step, world, device):
    return torch.randn(world * ROWS, 48, generator=torch.Generator().manual_seed(step)).to(device)


def train(model, optimizer, x_of):
    for step in range(STEPS):
        model(x_of(step)).square().mean().backward()
        optimizer.step()


def whole(parameter):
    value = parameter.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu()


def shard(model):
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[3], model):
        fully_shard(layer)


def work(rank, world, kind, folder):
    torch.set_num_threads(1)
    device = torch.device("cpu") if rehearsing() else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/ranks",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    result = {}
    try:
        for place, options in PLACES.items():
            model = net(device)
            if kind == "shards":
                shard(model)
            group = "default" if kind == "replicas" else None
            optimizer = chunkft.ChunkAdamW(model, process_group=group, **OPTIONS, **options)
            train(model, optimizer, lambda step: rows_of(step, world, device)[mine])
            result[place] = [whole(parameter) for parameter in model.parameters()]
            optimizer.detach()
        torch.save(result, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("kind", "world"), [("shards", 1), ("shards", 2), ("replicas", 2)])
def test_ranks_take_the_steps_of_one_process_on_the_joined_batch(machine, kind, world, tmp_path):
    if machine.real and torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices, this machine has {torch.cuda.device_count()}")
    torch.multiprocessing.spawn(work, (world, kind, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for place, options in PLACES.items():
        alone = net(machine.device)
        optimizer = chunkft.ChunkAdamW(alone, **OPTIONS, **options)
        train(alone, optimizer, lambda step: rows_of(step, world, machine.device))
        found = [rank[place] for rank in ranks]
        for values in zip(*found, [whole(parameter) for parameter in alone.parameters()], strict=True):
            for value in values[1:-1]:
                assert torch.equal(value, values[0])
            # a gradient near zero changes its sign with the order of a sum, and AdamW's first steps have the size of lr
            torch.testing.assert_close(values[0], values[-1], rtol=1e-3, atol=2e-3)
