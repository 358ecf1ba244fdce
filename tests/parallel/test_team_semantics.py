"""What loops do with gradients, and what models are made of, means on many ranks what it means in one process."""

import math
import sys
from functools import partial
from unittest import mock

import pytest
import rigs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

import chunkft
from chunkft import ChunkPlan
from chunkft.parallel import Ownership, Ranks, make_buckets, owner_of, rows_of
from chunkft.parallel import ranks as parallel_ranks
from chunkft.plan import ParameterSpec

ROWS = 12
STEPS = 8
SGD = torch.optim.SGD  # linear in the gradients, so that runs can be compared closely


class Images(nn.Module):
    """Most parameters are atomic: a rank owns whole ones, and nothing of some chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x.view(-1, 3, 4, 4))).relu()
        return self.head(self.second(x).mean((2, 3)))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(48, 24)
        self.blocks = nn.ModuleList([nn.Linear(24, 24) for _ in range(3)])
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(self.norm(x))


class Odd(nn.Module):
    """A scalar, an empty parameter, a single element, and fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.single = nn.Parameter(torch.ones(1))
        self.first = nn.Linear(48, 2)
        self.last = nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh() * self.scale * self.single) + self.empty.sum()


class Rows(nn.Module):
    """Fewer rows than ranks, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(48, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


def loss_of(model: nn.Module, step: int, rank: int, world: int) -> Tensor:
    x = torch.randn(ROWS, 48, generator=torch.Generator().manual_seed(step))
    out = model(x[rank * ROWS // world : (rank + 1) * ROWS // world])
    return (out - torch.linspace(-1, 1, out.shape[-1])).square().mean()


def clipped(model, optimizer, loss, step, norms):
    """More or fewer backward passes than in the step before, and clipping by torch."""
    passes = (1, 3, 2)[step % 3]
    for part in range(passes):
        (loss(step + part) / passes).backward()
    norm = clip_grad_norm_(model.parameters(), 0.05)
    norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
    optimizer.step()


def dropped(model, optimizer, loss, step, norms, set_to_none=True):
    """Gradients of one pass are dropped."""
    loss(step + 1).backward()
    (optimizer if step % 2 else model).zero_grad(set_to_none=set_to_none)
    loss(step).backward()
    optimizer.step()


def frozen(model, optimizer, loss, step, norms):
    """Some parameters are frozen for a while, others are switched meanwhile."""
    if step in (3, 7):
        for parameter in list(model.parameters())[:3]:
            parameter.requires_grad_(step == 7)
    plain(model, optimizer, loss, step, norms)


def scaled(model, optimizer, loss, step, norms):
    """A GradScaler, whose unscale_() looks at what this rank owns, which may be nothing."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(loss(step)).backward()
    scaler.step(optimizer)
    scaler.update()


def overflowing(model, optimizer, loss, step, norms, scalers):
    """The last rank meets an infinity that the others have to know of, also those that own nothing."""
    scaler = scalers.setdefault(id(optimizer), torch.amp.GradScaler("cpu", init_scale=256.0))
    value = loss(step)
    if step == 1 and loss.keywords["rank"] == loss.keywords["world"] - 1:
        value = value * math.inf
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    norms.append(scaler.get_scale())


def plain(model, optimizer, loss, step, norms):
    loss(step).backward()
    optimizer.step()


def train(group, kind, how, sharded=False, alone=None, **keywords):
    """Norms, weights and plan of a run of many ranks, or of one with their plan (``alone``)."""
    torch.manual_seed(1)
    model = kind()
    world, rank = (1, 0) if alone else (group.size(), dist.get_rank(group))
    keywords = {"base": SGD, "lr": 0.1, "chunks": 3, "interval": 2} | keywords
    if alone:
        keywords |= {
            "partition": rigs.for_one_process(ChunkPlan.from_dict(alone), model),
            "always_active": None,
        }
    elif sharded:
        rigs.sharded(model, group)
    else:
        keywords["process_group"] = group
    optimizer = chunkft.ChunkOptimizer(model, **keywords)
    norms: list[float] = []
    for step in range(STEPS):
        how(model, optimizer, partial(loss_of, model, rank=rank, world=world), step, norms)
    optimizer.memory_report(), optimizer.paging(), optimizer.state_dict()
    weights = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.state_dict().items()
    }
    plan = optimizer.plan.to_dict()
    optimizer.detach()
    return weights, norms, plan


def train_without_cpus(group, **keywords):
    """As with nccl, whose communicators have no CPUs: what ranks announce travels elsewhere."""
    groups = []

    def announced(self, *arguments):
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            found = announce(self, *arguments)
        groups.extend((call.kwargs["group"], self.channel) for call in reduced.call_args_list)
        return found

    announce = Ranks.announce
    with (
        mock.patch.object(parallel_ranks, "_has_cpus", return_value=False),
        mock.patch.object(Ranks, "announce", announced),
    ):
        found = train(group, **keywords)
    assert len(groups) >= STEPS
    assert all(voice is not channel for voice, channel in groups)
    return found


def check(pool, world, kind, how, sharded=False, work=train, **keywords):
    """All ranks end with the same bits, and where one process with their plan ends."""
    job = partial(train, kind=kind, how=how, **keywords)
    ranks = pool.run(world, partial(work, kind=kind, how=how, sharded=sharded, **keywords))
    ((expected, norms, _),) = pool.run(1, partial(job, alone=ranks[0][2]))
    for weights, found, _ in ranks:
        assert found == ranks[0][1]
        assert found == pytest.approx(norms, rel=1e-5)
        for name, value in expected.items():
            assert torch.equal(weights[name], ranks[0][0][name]), name
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6, msg=f"{name} is off")


@pytest.mark.parametrize(("kind", "world"), [(Layers, 2), (Images, 3)])
@pytest.mark.parametrize("how", [clipped, dropped, partial(dropped, set_to_none=False)])
def test_gradients_of_whole_parameters_are_clipped_and_cleared_with_those_of_slices(pool, kind, world, how):
    check(pool, world, kind, how)


@pytest.mark.parametrize("how", [clipped, dropped, partial(dropped, set_to_none=False)])
def test_gradients_of_sharded_parameters_are_clipped_and_cleared(pool, how):
    check(pool, 2, Layers, how, sharded=True)


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_whose_group_has_no_cpus_announce_themselves_in_one_that_has(pool, sharded):
    check(pool, 2, Layers, clipped, sharded, train_without_cpus)


def test_parameters_of_replicas_may_be_frozen_and_trained_again(pool):
    check(pool, 2, Layers, frozen)


@pytest.mark.parametrize("how", [plain, scaled])
@pytest.mark.parametrize(
    ("kind", "world", "keywords"),
    [
        (Images, 3, {"momentum": 0.9}),
        (Odd, 4, {"momentum": 0.9}),
        (Rows, 4, {"chunks": 1, "momentum": 0.9}),
        (Images, 4, {"chunks": 6, "residency": "stream", "momentum": 0.9}),
        (Images, 4, {"chunks": 6, "state_device": "paged", "momentum": 0.9}),
    ],
)
def test_a_rank_may_own_nothing_of_a_chunk(pool, kind, world, keywords, how):
    check(pool, world, kind, how, **keywords)


def test_an_infinity_of_one_rank_lowers_the_scale_of_ranks_that_own_nothing(pool):
    check(pool, 4, Rows, partial(overflowing, scalers={}), chunks=1)


def test_a_rank_may_hold_nothing_of_a_weight_that_is_sharded(pool):
    check(pool, 4, Rows, plain, sharded=True, chunks=1, momentum=0.9)


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_of_one_machine_keep_state_in_files_of_their_own(pool, tmp_path, sharded):
    keywords = {"residency": "stream", "page_bytes": 3000, "momentum": 0.9, "state_dir": tmp_path}
    check(pool, 2, Layers, plain, sharded=sharded, **keywords)
    assert {"rank-0-of-2", "rank-1-of-2"} <= {path.name for path in tmp_path.iterdir()}


class Coupled(torch.optim.Optimizer):
    """Its step length depends on the gradients of all of its parameters."""

    def __init__(self, params, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in found]).norm()
        for parameter in found:
            parameter.sub_(0.1 * parameter.grad / norm)


def build_coupled(group, kind):
    model = kind()
    with pytest.raises(
        ValueError, match="base=Coupled cannot be used with 2 processes that each update a part"
    ):
        chunkft.ChunkOptimizer(model, Coupled, chunks=1, process_group=group)
    chunkft.ChunkOptimizer(model, SGD, chunks=1, process_group=group, lr=0.1).detach()  # it is as it was


def test_a_base_that_couples_parameters_is_refused_by_all_ranks(pool):
    pool.run(2, build_coupled, Rows)
    model = Rows()
    chunkft.ChunkOptimizer(model, Coupled, chunks=1).detach()  # one process knows all gradients


def build_with_places(group):
    said = []
    for sharded in (False, True):
        for keywords in ({"memory_budget": "1GiB"}, {"weights": "stream"}):
            model = Layers() if not sharded else rigs.sharded(Layers(), group)
            with pytest.raises(ValueError, match="cannot be combined with") as refused:
                chunkft.ChunkAdamW(model, process_group=None if sharded else group, **keywords)
            said.append(str(refused.value))
            chunkft.ChunkAdamW(model, process_group=None if sharded else group, chunks=2).detach()
    return said


def test_what_counts_with_one_process_is_refused_on_many(pool):
    said = pool.run(2, build_with_places)[0]
    for message, words in zip(
        said, ["process_group=", "process_group=", "fully_shard", "fully_shard"], strict=True
    ):
        assert words in message


class LeavesData(torch.optim.Optimizer):
    """Gives parameters other memory in place of writing into theirs."""

    def __init__(self, params, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data = parameter.data - group["lr"] * parameter.grad


@pytest.mark.parametrize("sharded", [False, True])
def test_a_base_may_assign_data(pool, sharded):
    check(pool, 2, Layers, plain, sharded=sharded, base=LeavesData)


def calls_of(function) -> int:
    """Calls of functions, those in C included, that it takes."""
    count = 0

    def counted(frame, event, argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def divide(world: int) -> None:
    """One weight and four vectors, cut for a number of ranks that hold shards."""
    specs = [ParameterSpec("weight", (64 * world, 4), (0,), 4)]
    specs += [ParameterSpec(f"vector{n}", (64 * world,), (), 4) for n in range(4)]
    rows = {spec.name: rows_of(spec.shape[0], world) for spec in specs}
    pieces = [spec.slice(0, *span) for spec in specs for span in rows[spec.name]]
    plan = ChunkPlan((chunkft.Chunk(0, tuple(pieces)),))
    kind = torch.float32, torch.device("cpu")
    buckets = make_buckets(pieces, world, lambda piece: kind, partial(owner_of, rows=rows.__getitem__))
    ownership = Ownership([], [buckets], plan)
    ownership.of(ownership.plan, world - 1)
    for bucket in buckets:
        for part, numbers in zip(bucket.parts, bucket.sources, strict=True):
            assert [bucket.leaves[number] for number in numbers] == list(part)


def test_dividing_a_plan_takes_work_in_proportion_to_its_pieces():
    few, many = calls_of(partial(divide, 32)), calls_of(partial(divide, 128))
    assert many < 5 * few


def test_owners_are_found_whatever_part_of_theirs_is_asked_for():
    specs = [
        ParameterSpec("a", (50, 3), (0,), 4),
        ParameterSpec("b", (7,), (), 4),
        ParameterSpec("c", (9, 5), (0,), 4),
    ]
    pieces = [specs[0].slice(0, 0, 30), specs[0].slice(0, 30, 50), specs[1].whole(), specs[2].slice(0, 2, 9)]
    buckets = make_buckets(pieces, 5, lambda piece: (torch.float32, torch.device("cpu")), bucket_bytes=300)
    ownership = Ownership([], [buckets], ChunkPlan((chunkft.Chunk(0, tuple(pieces)),)))
    seen = 0
    for bucket in buckets:
        for rank, (part, numbers) in enumerate(zip(bucket.parts, bucket.sources, strict=True)):
            for piece, number in zip(part, numbers, strict=True):
                leaf = bucket.leaves[number]
                assert leaf.name == piece.name
                assert leaf.start <= piece.start < piece.stop <= leaf.stop
                assert ownership.owner_of(piece) == rank
                seen += piece.numel
                if piece.dim == 0:
                    last = specs["abc".index(piece.name)].slice(0, piece.stop - 1, piece.stop)
                    assert ownership.owner_of(last) == rank
    assert seen == sum(piece.numel for piece in pieces)
    for wrong in (specs[0].slice(0, 0, 50), specs[2].slice(0, 1, 3)):
        with pytest.raises(ValueError, match="no part of what one rank owns"):
            ownership.owner_of(wrong)


def gradient_parts(group, sharded):
    """What a rank and its report say of gradients: before a step, between steps, and after a sweep; and one chunk's."""
    model = Layers()
    if sharded:
        rigs.sharded(model, group)
    keywords = {} if sharded else {"process_group": group}
    optimizer = chunkft.ChunkAdamW(model, lr=1e-3, chunks=3, interval=1, **keywords)
    x = torch.ones(4, 48)
    model(x).sum().backward()
    owned = sum(leaf.numel() * 4 for _, leaf in optimizer.active_parameters())
    first = 4 * sum(piece.numel for piece in [*optimizer.plan.always, *optimizer.plan.chunks[0].slices])
    found = [optimizer.memory_report().gradients]
    optimizer.step()
    for _ in range(3):
        model(x).sum().backward()
        optimizer.step()
    found.append(optimizer.memory_report().gradients)
    optimizer.detach()
    return owned, first, found


@pytest.mark.parametrize("sharded", [False, True], ids=["replicas", "shards"])
def test_the_peak_of_gradients_is_that_of_all_that_a_rank_computed(pool, sharded):
    for owned, first, (before, after) in pool.run(2, gradient_parts, sharded):
        assert 0 < owned < first
        assert (before.now, before.peak) == (owned, first)
        assert after.now == 0
        assert after.peak == after.predicted
