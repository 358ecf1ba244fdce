"""Which rank keeps the state of which rows, and updates them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from chunkft.autograd import Slice
from chunkft.plan import Chunk, ChunkPlan

# Large enough for the rate of a link, small enough that the first is on its way while the others are computed.
BUCKET_BYTES = 32 << 20
ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class Bucket:
    """Slices whose gradients travel together: of one dtype, on one device.

    Attributes:
        leaves: the slices as autograd sees them, in the order of the stream.
        parts: for each rank what it owns of them.
    """

    leaves: tuple[Slice, ...]
    parts: tuple[tuple[Slice, ...], ...]

    def numels(self) -> list[int]:
        """Number of elements that each rank owns."""
        return [sum(piece.numel for piece in mine) for mine in self.parts]

    @cached_property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        """For each part of each rank the number of the leaf that it lies in."""
        by_name: dict[str, list[tuple[int, int]]] = {}
        for number, leaf in enumerate(self.leaves):
            by_name.setdefault(leaf.name, []).append((leaf.start, number))
        for starts in by_name.values():
            starts.sort()

        def source(piece: Slice) -> int:
            starts = by_name[piece.name]
            return starts[bisect_right(starts, (piece.start, len(self.leaves))) - 1][1]

        return tuple(tuple(map(source, mine)) for mine in self.parts)


def padded(numel: int, itemsize: int) -> int:
    """Elements of a part of a message, with those that fill it up: nccl copies what is not aligned byte by byte."""
    unit = max(1, ALIGNMENT // itemsize)
    return -(-numel // unit) * unit


def make_buckets(
    pieces: Sequence[Slice],
    ranks: int,
    kind_of: Callable[[Slice], tuple[torch.dtype, torch.device]],
    owner_of: Callable[[Slice], int] | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> list[Bucket]:
    """Gather slices in buckets, and give each rank an equal part of every bucket.

    A bucket is cut like the stream of the plan: into runs of whole rows (columns where a slice is one of columns) of
    nearly equal size, so that most slices have one owner. Parameters that are never split have one owner each.

    Args:
        pieces: slices that are active together, in the order of the stream.
        ranks: W.
        kind_of: dtype and device of the gradient of a slice.
        owner_of: who owns each slice as a whole, where that is given; None: they are cut.
        bucket_bytes: a bucket is full when the next slice would make it larger.

    Returns:
        The buckets, those first whose gradients come first in a backward pass: the end of the stream.
    """
    buckets: list[list[Slice]] = []
    filled = 0
    last: Any = None
    for piece in reversed(pieces):
        kind = kind_of(piece)
        size = piece.numel * kind[0].itemsize
        if not buckets or kind != last or filled + size > bucket_bytes:
            buckets.append([])
            filled, last = 0, kind
        buckets[-1].append(piece)
        filled += size
    return [Bucket(tuple(reversed(found)), _parts(found[::-1], ranks, owner_of)) for found in buckets]


def _parts(
    pieces: Sequence[Slice], ranks: int, owner_of: Callable[[Slice], int] | None
) -> tuple[tuple[Slice, ...], ...]:
    if owner_of is None:
        return _cut(pieces, ranks)
    parts: list[list[Slice]] = [[] for _ in range(ranks)]
    for piece in pieces:
        parts[owner_of(piece)].append(piece)
    return tuple(map(tuple, parts))


def _cut(pieces: Sequence[Slice], ranks: int) -> tuple[tuple[Slice, ...], ...]:
    """Runs of nearly equal numbers of elements, for each rank one."""
    total = sum(piece.numel for piece in pieces)
    ends = [total * (rank + 1) // ranks for rank in range(ranks)]
    parts: list[list[Slice]] = [[] for _ in range(ranks)]
    passed = 0
    for piece in pieces:
        if not piece.numel:
            continue
        if piece.dim is None:
            middle = passed + piece.numel // 2
            parts[min(bisect_right(ends, middle), ranks - 1)].append(piece)
            passed += piece.numel
            continue
        width = piece.numel // (piece.stop - piece.start)  # elements of a row
        start = piece.start
        for rank in range(min(bisect_right(ends, passed), ranks - 1), ranks):
            if start == piece.stop:
                break
            stop = min(piece.stop, max(start, piece.start + round((ends[rank] - passed) / width)))
            if rank == ranks - 1:
                stop = piece.stop
            if stop > start:
                parts[rank].append(replace(piece, start=start, stop=stop))
                start = stop
        passed += piece.numel
    return tuple(map(tuple, parts))


class Ownership:
    """The owners of all pieces of a plan.

    Args:
        buckets: of what is always active, and of each chunk.
        plan: that the buckets were made of.
    """

    def __init__(self, always: Sequence[Bucket], chunks: Sequence[Sequence[Bucket]], plan: ChunkPlan) -> None:
        self.always = list(always)
        self.chunks = [list(buckets) for buckets in chunks]
        self._windows: dict[tuple[str, int | None], list[tuple[int, int, int]]] = {}
        for bucket in self._buckets():
            for rank, part in enumerate(bucket.parts):
                for piece in part:
                    windows = self._windows.setdefault((piece.name, piece.dim), [])
                    windows.append((piece.start, piece.stop, rank))
        for windows in self._windows.values():
            windows.sort()
        self.plan = ChunkPlan(
            tuple(
                Chunk(chunk.index, _pieces(buckets))
                for chunk, buckets in zip(plan.chunks, self.chunks, strict=True)
            ),
            _pieces(self.always),
            plan.by,
        )

    def owner_of(self, piece: Slice) -> int:
        """The rank that owns a slice.

        Raises:
            ValueError: if it belongs to several, or to none.
        """
        windows = self._windows.get((piece.name, piece.dim), [])
        last = bisect_right(windows, piece.start, key=_start) - 1
        if last >= 0 and piece.stop <= windows[last][1]:
            return windows[last][2]
        raise ValueError(f"slice {piece} is no part of what one rank owns")

    def of(self, plan: ChunkPlan, rank: int) -> ChunkPlan:
        """What a rank owns of a plan whose slices have one owner each; chunks of it may be empty."""

        def mine(pieces: Sequence[Slice]) -> tuple[Slice, ...]:
            return tuple(piece for piece in pieces if self.owner_of(piece) == rank)

        chunks = tuple(Chunk(chunk.index, mine(chunk.slices)) for chunk in plan.chunks)
        return ChunkPlan(chunks, mine(plan.always), plan.by)

    def _buckets(self) -> Iterator[Bucket]:
        yield from self.always
        for buckets in self.chunks:
            yield from buckets


def _start(window: tuple[int, int, int]) -> int:
    return window[0]


def _pieces(buckets: Sequence[Bucket]) -> tuple[Slice, ...]:
    """All pieces, in the order of the stream."""
    return tuple(
        piece
        for bucket in reversed(buckets)
        for part in bucket.parts
        for piece in part
        if math.prod(piece.shape)
    )
