"""The schedule: which chunk is active in which interval."""

from __future__ import annotations

import random
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import lru_cache

from chunkft.plan import ChunkPlan

Schedule = str | Callable[[int, int], int]
SCHEDULES = ("cyclic", "reverse", "random")


def active_chunk(schedule: Schedule, interval: int, chunks: int, seed: int = 0) -> int:
    """The chunk that is active in the n-th interval.

    A pure function, so that a run resumes in the same order without any random state of its own.

    Args:
        schedule: ``"cyclic"``: 0, 1, ..., K-1; ``"reverse"``: from the last (top) chunk down; ``"random"``: a new
            order each sweep, each chunk once; or a callable ``f(interval, chunks) -> chunk``.
        interval: n >= 0, counted over the whole run; a sweep is ``chunks`` intervals.
        chunks: K, the number of chunks.
        seed: of the random order.

    Returns:
        An index in [0, K).

    Raises:
        ValueError: if the schedule is not known or a callable gives something else than such an index.
    """
    check_schedule(schedule)
    if callable(schedule):
        chunk = schedule(interval, chunks)
        if isinstance(chunk, bool) or not isinstance(chunk, int) or not 0 <= chunk < chunks:
            raise ValueError(
                f"schedule returned {chunk!r} for interval {interval}; needs an integer with 0 <= chunk < {chunks}"
            )
        return chunk
    sweep, position = divmod(interval, chunks)
    if schedule == "cyclic":
        return position
    if schedule == "reverse":
        return chunks - 1 - position
    return _order(seed, sweep, chunks)[position]


def seldom(plan: ChunkPlan, pattern: str, order: str = "random", seed: int = 0) -> Callable[[int, int], int]:
    """A schedule that visits the chunks made of certain parameters seldom: one of them in each round of the others.

    Meant for embedding tables: a batch touches few of their rows, so that a chunk of rows learns little in its
    turn, while in a small model such chunks can be half of all. docs/quality.md has what it brings.

    Args:
        plan: the plan that the optimizer gets as ``partition=``.
        pattern: shell-style name pattern; a chunk counts if more than half of its elements match.
        order: ``"random"`` (a new order each round), ``"cyclic"`` or ``"reverse"`` for the other chunks.
        seed: of the random order.

    Returns:
        A callable for ``schedule=``. A sweep, as the optimizer counts it, is still K intervals.

    Raises:
        ValueError: if the pattern takes no chunk, or all of them, or ``order`` is not known.
    """
    if order not in SCHEDULES:
        raise ValueError(f"order={order!r} is not known; allowed are {', '.join(map(repr, SCHEDULES))}")
    rare = [
        chunk.index
        for chunk in plan.chunks
        if 2 * sum(piece.numel for piece in chunk.slices if fnmatchcase(piece.name, pattern)) > chunk.numel
    ]
    often = [chunk.index for chunk in plan.chunks if chunk.index not in rare]
    if not rare or not often:
        raise ValueError(
            f"pattern={pattern!r} takes {len(rare)} of {len(plan)} chunks; needs at least one, and not all of them"
        )

    def visit(interval: int, chunks: int) -> int:
        if chunks != len(plan):
            raise ValueError(
                f"schedule was made for a plan of {len(plan)} chunks, the optimizer has {chunks}"
            )
        turn, position = divmod(interval, len(often) + 1)
        if position == len(often):
            return rare[-1 - turn % len(rare)]
        return often[active_chunk(order, turn * len(often) + position, len(often), seed)]

    return visit


def check_schedule(schedule: Schedule) -> None:
    """Raise ValueError if this is not a schedule."""
    if not callable(schedule) and schedule not in SCHEDULES:
        raise ValueError(
            f"schedule={schedule!r} is not known; allowed are {', '.join(map(repr, SCHEDULES))} and a callable"
        )


@lru_cache(maxsize=8)
def _order(seed: int, sweep: int, chunks: int) -> tuple[int, ...]:
    order = list(range(chunks))
    random.Random(f"{seed}/{sweep}").shuffle(order)
    return tuple(order)
