"""Models whose weights FSDP2 shards take the steps of one process that has all of them and sees the joined batch."""

import pytest
import rigs
import torch
from rigs import BACKWARD, EXPERTS, HEAD, RANDOM, STREAM, Case

import chunkft
from chunkft import Chunk, ChunkPlan, Slice
from chunkft.plan import parameter_specs

CASES = [
    Case("llama", 2, 4, clip=0.5),
    Case("gpt2", 2, 7, accumulate=2),
    Case("mixtral", 2, 4, options=RANDOM, changes=EXPERTS),
    Case("llama", 2, 4, options=BACKWARD),
    Case("llama-tied", 3, 7, clip=0.5, options=RANDOM),
    Case("mixtral", 3, 7, clip=0.5, accumulate=2, changes=EXPERTS),
    Case("gemma3", 3, 4, options=HEAD),
    Case("t5", 3, 4, clip=0.5, dtype=torch.float64),
    Case("llama", 3, 4, clip=0.5, options=STREAM),
    Case("gpt2", 4, 4, clip=0.5, accumulate=2),
    Case("bert", 4, 7, options=RANDOM),
    Case("qwen3-moe", 4, 7, clip=0.5),
    Case("bert", 2, 1, clip=0.5, accumulate=2),
]
DENSE = [
    Case("llama-tied", 2, 1, clip=0.5, accumulate=2, steps=20),
    Case("mixtral", 3, 1, clip=0.5, changes=EXPERTS, steps=20),
    Case("gpt2", 4, 1, clip=0.5, steps=20),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_take_the_steps_of_one_process_on_the_joined_batch(pool, case):
    ranks = pool.run(case.world, rigs.train_sharded, case)
    plan = ranks[0].plan
    assert all(rank.plan == plan for rank in ranks)
    assert len(plan["chunks"]) == case.chunks
    # chunks follow the shards: one process trains the same elements in the same steps
    alone = pool.run(1, rigs.train_alone, case, plan)
    rigs.assert_same_run(case, ranks, alone)
    assert ranks[0].active == alone[0].active


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_one_chunk_takes_the_steps_of_dense_sharded_training(pool, case):
    ranks = pool.run(case.world, rigs.train_sharded, case)
    dense = pool.run(case.world, rigs.train_dense_sharded, case)
    rigs.assert_same_run(case, ranks, dense)


@pytest.mark.parametrize("case", DENSE[:2], ids=str)
def test_dense_sharded_training_takes_the_steps_of_one_process(pool, case):
    """What the comparison rests on: shards, shares and losses of these rigs are those of torch."""
    dense = pool.run(case.world, rigs.train_dense_sharded, case)
    rigs.assert_same_run(case, dense, pool.run(1, rigs.train_alone, case))


@pytest.mark.parametrize("world", [2, 3])
def test_a_loss_that_is_no_number_on_one_rank_is_skipped_by_all(pool, world):
    case = Case("llama", world, 4, clip=0.5, steps=12, nan=(5, world - 1))
    ranks = pool.run(world, rigs.train_sharded, case)
    assert [rank.skipped for rank in ranks] == [1] * world
    rigs.assert_same_run(case, ranks, pool.run(1, rigs.train_alone, case, ranks[0].plan))


def shard_aligned(plan: ChunkPlan, model: torch.nn.Module, world: int) -> ChunkPlan:
    """Another plan of as many chunks: of each rank's rows of a weight the k-th block; what is atomic stays there."""
    specs = {spec.name: spec for spec in parameter_specs(model)}
    count = len(plan)
    pieces: list[list[Slice]] = [[] for _ in range(count)]
    for name, spec in specs.items():
        rows = spec.shape[0]
        own = -(-rows // world)
        home = next(chunk.index for chunk in plan for piece in chunk.slices if piece.name == name)
        for rank in range(world):
            first, last = min(rank * own, rows), min((rank + 1) * own, rows)
            cuts = [first + (last - first) * k // count for k in range(count + 1)]
            for k in range(count):
                if cuts[k] < cuts[k + 1]:
                    pieces[k if 0 in spec.dims else home].append(spec.slice(0, cuts[k], cuts[k + 1]))
    return ChunkPlan(tuple(Chunk(k, tuple(found)) for k, found in enumerate(pieces)))


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_a_plan_of_shards_trains_in_one_process(pool, family):
    """What the comparison rests on: pieces are joined to what one process can train, and each element stays."""
    case = Case(family, 3, 4, steps=10)
    model = case.model()
    pieces = shard_aligned(chunkft.partition(model, chunks=case.chunks), model, case.world)
    joined = rigs.for_one_process(pieces, model)
    assert [chunk.numel for chunk in joined] == [chunk.numel for chunk in pieces]
    assert len(list(joined.slices())) < len(list(pieces.slices()))
    (alone,) = pool.run(1, rigs.train_alone, case, pieces.to_dict())
    assert alone.plan["chunks"] == joined.to_dict()["chunks"]
