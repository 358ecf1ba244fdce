"""Plans that cut inside of every shard: whole, without overlap, and with the same share of each rank."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from chunkft.autograd import Slice
from chunkft.parallel import expand, owner_of, rows_of, shard_specs
from chunkft.partitions import make_plan
from chunkft.plan import Chunk, ChunkPlan, ParameterSpec, check_plan


def spec(name, *shape, dims=(0, 1)):
    return ParameterSpec(name, shape, dims, 12)


@given(st.integers(1, 200), st.integers(1, 9))
def test_rows_are_those_of_torch_chunk(size, world):
    cut = [len(part) for part in torch.arange(size).chunk(world)]
    assert [stop - start for start, stop in rows_of(size, world)] == cut + [0] * (world - len(cut))
    assert rows_of(size, world)[0][0] == 0


@st.composite
def models(draw):
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    specs = []
    for number, size in enumerate(sizes):
        if draw(st.booleans()):
            specs.append(spec(f"w{number}", size, draw(st.integers(1, 5))))
        else:
            specs.append(spec(f"b{number}", size, dims=()))
    return specs


@settings(deadline=None)
@given(models(), st.integers(1, 5), st.integers(1, 4), st.sampled_from(["bytes", "interleaved"]))
def test_every_row_is_in_one_chunk_and_every_slice_in_one_shard(specs, world, chunks, by):
    spans = {one.name: rows_of(one.shape[0], world) for one in specs}
    virtual = shard_specs(specs, spans.__getitem__, world)
    try:
        inner = make_plan(nn.Module(), virtual, chunks, by, 0, None, row_multiple=1)
    except ValueError:  # fewer rows than chunks
        return
    plan = expand(inner, specs, spans.__getitem__)
    check_plan(plan, [ParameterSpec(s.name, s.shape, (0,), s.element_bytes) for s in specs])
    assert len(plan) == chunks
    for whole, one in zip(plan, inner, strict=True):
        owners = [owner_of(piece, spans.__getitem__) for piece in whole.slices]
        for rank in range(world):
            mine = sum(p.numel for p, owner in zip(whole.slices, owners, strict=True) if owner == rank)
            assert mine <= one.numel
            if rank == 0:
                assert mine == one.numel


def test_what_always_trains_stays_outside_of_the_chunks():
    specs = [spec("a", 5, 2), spec("b", 7, dims=())]
    inner = ChunkPlan((Chunk(0, (Slice("a", 0, 0, 3, (3, 2)),)),), (Slice("b", None, 0, 4, (4,)),))
    plan = expand(inner, specs, lambda name: rows_of({"a": 5, "b": 7}[name], 2))
    assert [str(piece) for piece in plan.always] == ["b[0:4]", "b[4:7]"]
    assert [str(piece) for piece in plan.chunks[0].slices] == ["a[0:3]", "a[3:5]"]


def test_a_slice_of_two_shards_has_no_owner():
    def rows(name):
        return rows_of(10, 2)

    assert owner_of(Slice("a", 0, 5, 10, (10, 2)), rows) == 1
    with pytest.raises(ValueError, match=r"a\[4:6\] lies in no single shard"):
        owner_of(Slice("a", 0, 4, 6, (10, 2)), rows)
    with pytest.raises(ValueError, match="lies in no single shard"):
        owner_of(Slice("a", 1, 0, 1, (10, 2)), rows)


def test_plans_along_columns_and_other_worlds_are_refused():
    specs = [spec("a", 6, 4)]
    columns = ChunkPlan((Chunk(0, (Slice("a", 1, 0, 4, (3, 4)),)),))
    with pytest.raises(ValueError, match="'a' along dim=1"):
        expand(columns, specs, lambda name: rows_of(6, 2))
    with pytest.raises(ValueError, match="has 2 shards; needs world=3"):
        shard_specs(specs, lambda name: rows_of(6, 2), 3)
