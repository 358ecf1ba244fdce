"""Whatever is put around sharded training, losses, norms and weights stay those of the plain run."""

from functools import partial

import pytest
import rigs
import torch
import torch.distributed as dist
import variant_rigs
from rigs import BACKWARD, STREAM, Case
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import chunkft
from chunkft.optim import team

CASE = Case("llama", 2, 4, clip=0.5, accumulate=2, steps=10)
SMALL = Case("llama", 2, 2, clip=0.5, steps=16, changes={"num_hidden_layers": 1})
SAME_BITS = ("kept gathered", "offloaded", "checkpointing", "reentrant checkpointing")
NEAR = ("compiled", "compiled replicas", "replicas in a wrapper")


@pytest.fixture(scope="module")
def plain(pool):
    """The plain runs of the comparisons, made once."""
    made = {}

    def of(case, variant="plain"):
        key = str(case), variant
        if key not in made:
            made[key] = pool.run(case.world, variant_rigs.train, case, variant)
        return made[key]

    return of


@pytest.mark.parametrize("variant", SAME_BITS)
def test_a_variant_of_sharded_training_has_the_bits_of_the_plain_one(pool, plain, variant):
    ranks = pool.run(2, variant_rigs.train, CASE, variant)
    assert ranks == plain(CASE)


def test_shards_that_stay_gathered_in_part_have_the_bits_of_the_plain_run(pool, plain):
    case = Case("llama", 4, 4, clip=0.5, steps=6)
    assert pool.run(4, variant_rigs.train, case, "gathered in part") == plain(case)


@pytest.mark.parametrize("variant", NEAR)
def test_a_variant_trains_as_the_plain_one(pool, plain, variant):
    ranks = pool.run(2, variant_rigs.train, SMALL, variant, timeout=120.0)  # compiling takes long
    rigs.assert_same_run(SMALL, ranks, plain(SMALL, "plain" if variant == "compiled" else "replicas"))


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_two_replicas_of_two_shards_train_as_one_process(pool, family):
    case = Case(family, 4, 4, clip=0.5, accumulate=2, steps=16)
    ranks = pool.run(4, variant_rigs.train, case, "hybrid")
    assert ranks[0].weights == ranks[2].weights != ranks[1].weights == ranks[3].weights
    rigs.assert_same_run(case, ranks, pool.run(1, rigs.train_alone, case, ranks[0].plan))


class Branches(nn.Module):
    """Uses some of its branches in a pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList([nn.Linear(5, 8) for _ in range(2)])

    def forward(self, x, used):
        return torch.stack([self.branches[each](x).tanh() for each in used]).sum(0)


def branches(group, ranks):
    """Weights after some steps; with ``ranks`` of one process on what so many ranks see."""
    model = Branches().double()
    rank = 0 if ranks else dist.get_rank()
    if not ranks:
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=1)
    for step in range(6):
        for seen in range(ranks) if ranks else [rank]:
            x = torch.randn(6, 5, generator=torch.Generator().manual_seed(10 * step + seen)).double()
            used = (
                (0, 1) if (seen + step) % 4 == 0 else (seen % 2,)
            )  # which one rank of each copy has, or none
            (model(x, used).square().mean() / (ranks or 1)).backward()
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    optimizer.detach()
    return [value.detach().clone() for value in whole]


def test_copies_of_shards_may_use_other_layers(pool):
    (alone,) = pool.run(1, branches, 4)
    for found in pool.run(4, branches, 0):
        for value, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


class Routed(nn.Module):
    """Blocks, each with an expert that some batches do not reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Route() for _ in range(5)])
        self.head = nn.Linear(6, 3)

    def forward(self, x, reached):
        for number, block in enumerate(self.blocks):
            x = block(x, number in reached)
        return self.head(x)


class Route(nn.Module):
    """A layer, and an expert beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.expert = nn.Linear(6, 6)

    def forward(self, x, reached):
        return torch.tanh(self.layer(x) + (self.expert(x) if reached else 0.0))


def routed(group, ranks, options):
    """As ``branches``: blocks are gathered one by one in the backward pass, and each weight travels alone."""
    model = Routed().double()
    if not ranks:
        mesh = DeviceMesh.from_group(group, "cpu")
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team, "make_buckets", partial(team.make_buckets, bucket_bytes=1))
        optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=1, **options)
    for step in range(8):
        for seen in range(ranks) if ranks else [dist.get_rank(group)]:
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + seen)).double()
            experts = range(5) if step % 4 == 3 else [(step + seen) % 5, 4 * (seen == step % 2)]
            (model(x, experts).square().mean() / (ranks or 1)).backward()
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    optimizer.detach()
    return [value.detach().clone() for value in whole]


@pytest.mark.parametrize("options", [{}, BACKWARD], ids=["step", "backward"])
def test_ranks_that_use_other_experts_wait_for_each_other_in_the_same_block(pool, options):
    ranks = pool.run(2, routed, 0, options, timeout=60.0)
    (alone,) = pool.run(1, routed, 2, {})
    for found in ranks:
        for value, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [STREAM, BACKWARD], ids=["stream", "backward"])
@pytest.mark.parametrize("variant", ["offloaded", "hybrid", "checkpointing"])
def test_pages_pass_in_variants(pool, plain, options, variant):
    world = 4 if variant == "hybrid" else 2
    case = Case("llama-tied", world, 3, options=options, steps=10)
    ranks = pool.run(world, variant_rigs.train, case, variant)
    if variant == "hybrid":
        rigs.assert_same_run(case, ranks, pool.run(1, rigs.train_alone, case, ranks[0].plan))
    else:
        assert ranks == plain(case)
