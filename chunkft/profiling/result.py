"""What a profile found out: the peak, who made it, and what would lower it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from chunkft.optim import MemoryReport
from chunkft.optim.report import human_bytes, table
from chunkft.profiling.ledger import CATEGORIES, Block
from chunkft.profiling.savings import Saving
from chunkft.profiling.timeline import Phase, Timeline

__all__ = ["Holder", "Peak", "Profile", "find_peak"]

LARGEST = 8


@dataclass(frozen=True)
class Holder:
    """What one module held at the peak, of one category."""

    module: str
    category: str
    nbytes: int
    tensors: int


@dataclass(frozen=True)
class Peak:
    """The moment at which most memory was held.

    Attributes:
        nbytes: how much.
        phase, step, chunk: what the training did; ``phase`` is "between steps" outside of the phases.
        by_category: bytes of each category.
        allocation: the tensor whose making led to it, or None if it was memory for state outside of torch.
        largest_tensor: the largest that existed then, weights and memory for state left out.
        largest: the modules that held most.
    """

    nbytes: int
    phase: str
    step: int | None
    chunk: int | None
    by_category: dict[str, int]
    allocation: Block | None
    largest_tensor: Block | None
    largest: list[Holder]

    def __str__(self) -> str:
        where = f"in the {self.phase} pass" if self.phase in ("forward", "backward") else f"in {self.phase}"
        if self.phase == "step":
            where = "in the optimizer step"
        chunk = "" if self.chunk is None else f", chunk {self.chunk}"
        step = "" if self.step is None else f" of step {self.step}{chunk}"
        return f"{human_bytes(self.nbytes)} {where}{step}"


@dataclass(frozen=True)
class Profile:
    """Results of ``chunkft.profiling.profile``.

    Attributes:
        steps: how many steps were profiled.
        interrupted: whether it was stopped early.
        peak: the moment at which most memory was held; None if no step was counted.
        savings: what would lower the peak, largest first.
        report: the memory report of a chunk optimizer.
        phases: parts of the timed steps.
        timeline: memory over time.
        files: what was written, by kind.
    """

    steps: int
    interrupted: bool
    peak: Peak | None
    savings: list[Saving]
    report: MemoryReport | None
    phases: list[Phase]
    timeline: Timeline | None
    files: dict[str, str]

    def summary(self) -> str:
        """The findings as text."""
        lines = [_times(self.phases)] if self.phases else []
        if self.peak is not None:
            lines += ["", *_peak_lines(self.peak), "", *_saving_lines(self.savings)]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for memory.json."""
        return {
            "steps": self.steps,
            "interrupted": self.interrupted,
            "peak": None if self.peak is None else asdict(self.peak),
            "savings": [asdict(saving) for saving in self.savings],
            "report": None if self.report is None else self.report.as_dict(),
            "milliseconds": {
                name: [(p.end - p.start) / 1e6 for p in self.phases if p.name == name]
                for name in ("forward", "backward", "step")
            },
        }


def find_peak(timeline: Timeline) -> Peak:
    """The moment at which most was held."""
    index, nbytes = timeline.peak()
    when = int(timeline.times[index])
    phase = timeline.phase_at(when)
    made = [block for block in timeline.blocks if block.born == when]
    alive = timeline.alive(when)
    held: dict[tuple[str, str], list[int]] = {}
    for block in alive:
        name = block.saved_by or block.module or block.op
        held.setdefault((name, block.category), []).append(block.nbytes)
    holders = [Holder(name, category, sum(sizes), len(sizes)) for (name, category), sizes in held.items()]
    return Peak(
        nbytes=nbytes,
        phase="between steps" if phase is None else phase.name,
        step=None if phase is None else phase.step,
        chunk=None if phase is None else phase.chunk,
        by_category={name: int(timeline.bytes[name][index]) for name in CATEGORIES},
        allocation=max(made, key=lambda block: block.nbytes, default=None),
        largest_tensor=max(alive, key=lambda block: block.nbytes, default=None),
        largest=sorted(holders, key=lambda holder: holder.nbytes, reverse=True)[:LARGEST],
    )


def _times(phases: Sequence[Phase]) -> str:
    steps = len({phase.step for phase in phases})
    parts = []
    for name in ("forward", "backward", "step"):
        spent = sum(phase.end - phase.start for phase in phases if phase.name == name) / 1e6 / steps
        parts.append(f"{name} {spent:.1f} ms")
    chunks = sorted({phase.chunk for phase in phases if phase.chunk is not None})
    seen = f"; chunks {', '.join(map(str, chunks))}" if chunks else ""
    return f"a step, of {steps}: {', '.join(parts)}{seen}"


def _peak_lines(peak: Peak) -> list[str]:
    lines = [f"peak: {peak}"]
    if peak.allocation is None:
        lines.append("made by: memory for optimizer state")
    else:
        lines.append(f"made by: {_described(peak.allocation)}")
    if peak.largest_tensor is not None:
        lines.append(f"largest tensor then: {_described(peak.largest_tensor)}")
    rows: list[tuple[str, ...]] = [("held at the peak", "bytes", "share")]
    rows += [
        (name, human_bytes(value), f"{value / peak.nbytes:.1%}")
        for name, value in peak.by_category.items()
        if value
    ]
    largest: list[tuple[str, ...]] = [("largest holders", "category", "tensors", "bytes")]
    largest += [(h.module, h.category, str(h.tensors), human_bytes(h.nbytes)) for h in peak.largest]
    return [*lines, "", table(rows), "", table(largest)]


def _described(block: Block) -> str:
    where = f"in {block.module}" if block.module else "in no module"
    return f"{block.op} of {human_bytes(block.nbytes)}, {block.dtype} {list(block.shape)}, {where}"


def _saving_lines(savings: Sequence[Saving]) -> list[str]:
    if not savings:
        return ["nothing that chunkft knows of would lower this peak"]
    lines = ["what would lower the peak, each by itself, estimated from these measurements:"]
    for number, saving in enumerate(savings, 1):
        less = f"{human_bytes(saving.saved_bytes)} less, {human_bytes(saving.peak_bytes)}"
        lines.append(f"  {number}. {saving.name}: {less}\n     {saving.how}")
    return lines
