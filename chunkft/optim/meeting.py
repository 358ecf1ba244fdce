"""What ranks are about to do together: they tell each other before they do it, so that none waits for one elsewhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from chunkft.parallel import Ranks


class Phase(IntEnum):
    """Where a rank is."""

    REDUCE = 0
    READ = 1
    CLOSE = 2
    SPREAD = 3
    TELL = 4


DOING = {
    Phase.REDUCE: "reducing gradients",
    Phase.READ: "reading gradients",
    Phase.CLOSE: "closing a step",
    Phase.SPREAD: "closing a step of updates in the backward pass",
    Phase.TELL: "looking for infinite gradients",
}
PLACES = {
    Phase.REDUCE: "in a backward pass",
    Phase.READ: "at the norm of gradients, as clip_grad_norm_ takes it",
    Phase.CLOSE: "in step()",
    Phase.SPREAD: "behind the updates of a step",
    Phase.TELL: "at the end of a backward pass",
}
FLAGS = ("unsent", "again", "unscaled", "partial")  # that any rank can raise
_BITS = 20  # of a part of a hash: the sum of the squares of 8,192 such parts is exact in fp64


@dataclass(frozen=True)
class Report:
    """What a rank says of itself.

    Attributes:
        position: what has to be the same on all ranks.
        agrees: whether this rank has compared all that matters in this interval.
        unsent: whether it has gradients that it has not sent.
        again: whether these would be the second ones of a step that has one backward pass.
        unscaled: whether a GradScaler has divided gradients by the scale already.
        partial: whether the backward pass that begins brings no gradient to some leaf.
        cleared: how often gradients were forgotten after they had been sent.
        values: further numbers, fp64 on the CPU, that are summed.
    """

    position: Any
    agrees: bool
    unsent: bool
    again: bool
    unscaled: bool
    partial: bool
    cleared: int
    values: Tensor


@dataclass(frozen=True)
class Met:
    """What all ranks said.

    Attributes:
        at: number of ranks in each phase.
        alike: whether all have the same position.
        agreed, unsent, again, unscaled, partial: as in a report; the first of all ranks, the others of any.
        cleared_alike: whether all have cleared gradients equally often.
        values: sums.
    """

    at: dict[Phase, int]
    alike: bool
    agreed: bool
    unsent: bool
    again: bool
    unscaled: bool
    partial: bool
    cleared_alike: bool
    values: list[float]

    def __str__(self) -> str:
        return ", ".join(f"{count} {PLACES[phase]}" for phase, count in self.at.items() if count)


def meet(phase: Phase, report: Report, ranks: Ranks, copies: Ranks | None, device: torch.device) -> Met:
    """Sum up the reports of all ranks, whose models are on ``device``.

    The messages have one size in all phases: ranks in different ones meet, too.
    """
    words = _words(report.position)
    cleared = report.cleared
    head = [float(phase == each) for each in Phase]
    head += [float(not report.agrees), *map(float, (getattr(report, flag) for flag in FLAGS))]
    head += [float(value) for word in (*words, cleared) for value in (word, word * word)]
    numbers = torch.cat([torch.tensor(head, dtype=torch.float64), report.values])
    totals = ranks.announce(numbers, device, DOING[phase])
    if copies is not None:
        totals = copies.announce(torch.tensor(totals, dtype=torch.float64), device, DOING[phase])
    everyone = ranks.size * (1 if copies is None else copies.size)
    at = {each: int(count) for each, count in zip(Phase, totals, strict=False)}
    disagree, *flags = totals[len(Phase) : len(Phase) + 1 + len(FLAGS)]
    rest = totals[len(Phase) + 1 + len(FLAGS) :]
    alike = [
        everyone * int(squares) == int(total) ** 2
        for total, squares in zip(rest[:6:2], rest[1:6:2], strict=True)
    ]
    return Met(
        at=at,
        alike=all(alike[:2]),
        agreed=not disagree,
        **dict(zip(FLAGS, map(bool, flags), strict=True)),
        cleared_alike=alike[2],
        values=rest[6:],
    )


def _words(position: Any) -> tuple[int, int]:
    digest = int.from_bytes(hashlib.blake2b(repr(position).encode(), digest_size=8).digest(), "big")
    return digest % (1 << _BITS), (digest >> _BITS) % (1 << _BITS)
