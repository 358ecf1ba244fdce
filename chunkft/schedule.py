"""The schedule: which chunk is active in which interval."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache

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
