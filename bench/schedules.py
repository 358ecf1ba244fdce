"""Schedules that the quality benchmark tries beside the built-in ones; each is a callable for `schedule=`."""

from __future__ import annotations

import random
from collections.abc import Callable

from chunkft.plan import ChunkPlan

Visit = Callable[[int, int], int]


def embedding_chunks(plan: ChunkPlan, pattern: str = "embeddings.") -> list[int]:
    """Indices of the chunks that are more than half embedding rows (`pattern` in the name)."""
    return [
        chunk.index
        for chunk in plan.chunks
        if sum(s.numel for s in chunk.slices if pattern in s.name) > chunk.numel / 2
    ]


def rare(plan: ChunkPlan, seldom: list[int], seed: int, order: str = "random") -> Visit:
    """All other chunks once, then one of `seldom`, and so on: one of `seldom` a round.

    `order` of the others is "random" (new each round, from `seed`) or "reverse". Raises ValueError where no
    chunk is left that is visited often.
    """
    often = [i for i in range(len(plan)) if i not in set(seldom)]
    if not often:
        raise ValueError(f"seldom={seldom}: leave at least one of {len(plan)} chunks to visit often")
    period = len(often) + (1 if seldom else 0)

    def visit(interval: int, chunks: int) -> int:
        round_, position = divmod(interval, period)
        if position == len(often):
            return seldom[-1 - round_ % len(seldom)]
        turn = often[::-1]
        if order == "random":
            turn = random.Random(f"{seed}/{round_}").sample(often, len(often))
        return turn[position]

    return visit
