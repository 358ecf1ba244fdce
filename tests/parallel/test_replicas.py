"""Replicas that see a share of the batch each take the steps of one process that sees the whole batch."""

import pytest
import rigs
import torch
import torch.distributed as dist
from rigs import EXPERTS, HEAD, RANDOM, STREAM, Case
from torch import Tensor, nn

import chunkft

CASES = [
    Case("llama", 2, 4, clip=0.5),
    Case("gpt2", 2, 7, accumulate=2),
    Case("mixtral", 2, 4, options=RANDOM, changes=EXPERTS),
    Case("bert", 2, 1, clip=0.5, accumulate=2),
    Case("llama-tied", 3, 7, clip=0.5, options=RANDOM),
    Case("mixtral", 3, 7, clip=0.5, accumulate=2, changes=EXPERTS),
    Case("gemma3", 3, 4, options=HEAD),
    Case("t5", 3, 4, clip=0.5, dtype=torch.float64),
    Case("llama", 3, 4, clip=0.5, options=STREAM),
    Case("gpt2", 4, 4, clip=0.5, accumulate=2, options=RANDOM),
    Case("qwen3-moe", 4, 7, clip=0.5),
    Case("mixtral", 2, 1, changes=EXPERTS),
    Case("bert", 4, 7, options=RANDOM),
    Case("t5", 4, 7),
]
DENSE = [
    Case("llama-tied", 2, 1, clip=0.5, accumulate=2, steps=20),
    Case("mixtral", 3, 1, clip=0.5, changes=EXPERTS, steps=20),
    Case("gpt2", 4, 1, clip=0.5, steps=20),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replicas_take_the_steps_of_one_process_on_the_joined_batch(pool, case):
    ranks = pool.run(case.world, rigs.train_replica, case)
    alone = pool.run(1, rigs.train_alone, case)
    rigs.assert_same_run(case, ranks, alone)
    assert ranks[0].active == alone[0].active
    rigs.assert_same_bits(ranks)


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_one_chunk_takes_the_steps_of_dense_data_parallel_training(pool, case):
    ranks = pool.run(case.world, rigs.train_replica, case)
    dense = pool.run(case.world, rigs.train_dense_replica, case)
    rigs.assert_same_run(case, ranks, dense)
    rigs.assert_same_bits(ranks)


def test_some_experts_get_no_token_on_some_ranks():
    """What the cases with experts rest on."""
    case = Case("mixtral", 3, 7, changes=EXPERTS)
    idle = []
    for rank in range(case.world):
        model = case.model()
        model(**rigs.batch_of(case, 0, 0, rank, case.world)).loss.backward()
        weights = [p for name, p in model.named_parameters() if p.dim() == 3]
        idle.append(torch.stack([(p.grad.flatten(1) == 0).all(1) for p in weights]))
    assert len(weights) == 4
    some, everywhere = torch.stack(idle).any(0), torch.stack(idle).all(0)
    assert bool((some & ~everywhere).any())


@pytest.mark.parametrize("world", [2, 4])
def test_a_loss_that_is_no_number_on_one_rank_is_skipped_by_all(pool, world):
    case = Case("llama", world, 4, clip=0.5, steps=12, nan=(5, world - 1))
    ranks = pool.run(world, rigs.train_replica, case)
    alone = pool.run(1, rigs.train_alone, case)
    assert [rank.skipped for rank in ranks] == [1] * world
    assert ranks[0].updates == 11
    rigs.assert_same_run(case, ranks, alone)
    rigs.assert_same_bits(ranks)


@pytest.mark.parametrize("world", [2, 3])
def test_16_bit_weights_with_residuals_are_the_same_bits_on_all_ranks(pool, world):
    case = Case(
        "llama-tied", world, 4, clip=0.5, steps=16, options={"master": "residual"}, dtype=torch.bfloat16
    )
    ranks = pool.run(world, rigs.train_replica, case)
    (alone,) = pool.run(1, rigs.train_alone, case)
    rigs.assert_same_bits(ranks)
    assert ranks[0].updates == 16
    assert ranks[0].norms == ranks[-1].norms
    # the gradients of the shares are rounded to 16 bit before they meet
    assert rigs.joined_losses(ranks) == pytest.approx(alone.losses, rel=5e-3)
    assert alone.losses[-1] < alone.losses[0]


class Branches(nn.Module):
    """Uses one of its branches in a pass; the last is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList([nn.Linear(5, 7) for _ in range(4)])
        self.last = nn.Linear(7, 3)

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.last(self.branches[which](x).tanh())


def branch_loss(model, step, rank):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(10 * step + rank))
    return model(x, (rank + step) % 3).square().mean()


def train_branches(group, chunks, ranks):
    """A share of the ranks' losses, or with ``ranks`` the mean of all of them."""
    model = Branches()
    optimizer = chunkft.ChunkAdamW(
        model, lr=1e-2, chunks=chunks, interval=2, process_group=None if ranks else group
    )
    for step in range(12):
        for rank in range(ranks) or [dist.get_rank(group)]:
            (branch_loss(model, step, rank) / (ranks or 1)).backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("world", "chunks"), [(2, 1), (2, 3), (3, 2), (4, 3)])
def test_a_parameter_that_a_rank_does_not_use_counts_as_zero_there(pool, world, chunks):
    ranks = pool.run(world, train_branches, chunks, 0)
    (alone,) = pool.run(1, train_branches, chunks, world)
    before = dict(Branches().named_parameters())
    for name, expected in alone.items():
        for rank in ranks:
            assert torch.equal(rank[name], ranks[0][name])
        torch.testing.assert_close(ranks[0][name], expected, rtol=1e-5, atol=1e-6)
        # weights that no rank used are left alone, also by weight decay
        assert torch.equal(expected, before[name]) == name.startswith("branches.3")
