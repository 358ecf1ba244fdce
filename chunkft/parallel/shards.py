"""Rows of parameters that are sharded along dimension 0: plans that cut inside of every shard."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from chunkft.autograd import Slice
from chunkft.plan import Chunk, ChunkPlan, ParameterSpec

Span = tuple[int, int]  # rows [start, stop)
Rows = Callable[[str], Sequence[Span]]  # by name of a parameter those of each rank


def rows_of(size: int, world: int) -> list[Span]:
    """Rows of each of ``world`` shards of ``size`` rows, as ``torch.chunk`` cuts them; the last ones may be empty.

    The first shard is never smaller than another one.
    """
    step = -(-size // world)
    return [(min(rank * step, size), min((rank + 1) * step, size)) for rank in range(world)]


def shard_specs(specs: Iterable[ParameterSpec], rows: Rows, world: int) -> list[ParameterSpec]:
    """What a partition is to cut in place of the parameters: the largest shard of each.

    Args:
        specs: of the whole parameters.
        rows: gives for a name the rows of each shard.
        world: number of shards.

    Returns:
        Specs with the number of rows of the first shard. What cannot be cut along dimension 0 stays atomic: its shards
        are one slice each.

    Raises:
        ValueError: if a parameter has another number of shards.
    """
    virtual = []
    for spec in specs:
        spans = rows(spec.name)
        if len(spans) != world:
            raise ValueError(f"parameter {spec.name!r} has {len(spans)} shards; needs world={world}")
        size = max(stop - start for start, stop in spans)
        dims = (0,) if 0 in spec.dims else ()
        virtual.append(replace(spec, shape=(size, *spec.shape[1:]), dims=dims))
    return virtual


def expand(plan: ChunkPlan, specs: Iterable[ParameterSpec], rows: Rows) -> ChunkPlan:
    """The plan of whole parameters that cuts each shard as ``plan`` cuts the first one.

    Args:
        plan: of the specs that ``shard_specs`` made.
        specs: of the whole parameters.
        rows: gives for a name the rows of each shard.

    Returns:
        A plan of slices along dimension 0, each inside of one shard; a slice of ``plan`` becomes one in every shard
        that reaches so far. A chunk may have none of one shard, and has at least one of the first.

    Raises:
        ValueError: if the plan cuts along another dimension, or has a parameter that is not in ``specs``.
    """
    by_name = {spec.name: spec for spec in specs}

    def part(pieces: Sequence[Slice]) -> tuple[Slice, ...]:
        return tuple(one for piece in pieces for one in _in_shards(piece, by_name, rows))

    chunks = tuple(Chunk(chunk.index, part(chunk.slices)) for chunk in plan.chunks)
    return ChunkPlan(chunks, part(plan.always), plan.by)


def owner_of(piece: Slice, rows: Rows) -> int:
    """The rank whose shard holds a slice.

    Raises:
        ValueError: if it is not cut along dimension 0, or no single shard holds all of it.
    """
    if piece.dim == 0:
        spans = rows(piece.name)
        rank = bisect_right(spans, (piece.start, math.inf)) - 1
        if rank >= 0 and piece.stop <= spans[rank][1]:
            return rank
    raise ValueError(f"slice {piece} lies in no single shard; they have rows {list(rows(piece.name))}")


def _in_shards(piece: Slice, specs: dict[str, ParameterSpec], rows: Rows) -> list[Slice]:
    spec = specs.get(piece.name)
    if spec is None:
        raise ValueError(f"plan has a slice of {piece.name!r}, which is not among the parameters")
    if piece.dim not in (0, None):
        raise ValueError(
            f"plan cuts {piece.name!r} along dim={piece.dim}; shards are cut along dim 0 only, as they are sharded"
        )
    found = []
    for first, last in rows(piece.name):
        low = first + piece.start
        high = last if piece.dim is None else min(first + piece.stop, last)
        if low < high:
            found.append(spec.slice(0, low, high))
    return found
