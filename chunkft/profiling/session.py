"""Profiles a few training steps and writes what it saw."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import profile as torch_profile

from chunkft.optim.report import human_bytes
from chunkft.profiling.picture import draw_memory
from chunkft.profiling.recording import Loss, Recorder
from chunkft.profiling.result import Profile, find_peak
from chunkft.profiling.savings import Setting, savings
from chunkft.profiling.timeline import Timeline
from chunkft.profiling.trace import Clock, combined_trace

__all__ = ["profile"]

TRACE, MEMORY, PICTURE = "trace.json", "memory.json", "memory.png"
SNAPSHOT, ACCOUNT = "memory_snapshot.pickle", "memory_account.json"
SNAPSHOT_ENTRIES = 200_000


def profile(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    *,
    steps: int = 3,
    warmup: int = 1,
    out: str | Path = "profile",
    loss: Loss | None = None,
    accumulation: int = 1,
    with_torch: bool = True,
    title: str = "",
    progress: Callable[[str, int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Profile:
    """Train ``warmup + 2 * steps`` steps: to warm up, then under torch's profiler, then with an account of memory.

    Counting memory slows the operators down, so that times come from the steps without it. Writes into ``out``:
    ``trace.json``, ``memory.json``, ``memory.png``, and of the memory ``memory_snapshot.pickle`` (torch's, on a GPU) or
    ``memory_account.json`` (on the CPU: every tensor with its size, operator, module, and when it was made and freed).

    Args:
        model: is trained.
        optimizer: a ``ChunkOptimizer`` of it, or any other.
        batches: one batch for each backward pass; begins anew when it is over.
        steps: optimizer steps of each part, at least 1.
        warmup: optimizer steps before, at least 0.
        out: a directory, made if need be; what is in it is overwritten.
        loss: ``loss(model, batch)``, a scalar; by default ``model(**batch).loss``.
        accumulation: batches for each optimizer step.
        with_torch: False leaves the times to a program outside (``nsys``, ``ncu``): the timed steps have NVTX ranges
            and lie between ``cudaProfilerStart`` and ``cudaProfilerStop``, and nothing else is done.
        title: of the picture.
        progress: called with a part's name, steps done in it and their number.
        stop: asked after every step; True ends the run there, and what was seen so far is written.

    Raises:
        ValueError: if a number is not allowed, or ``batches`` is empty.
        OSError: if ``out`` cannot be written.
    """
    for name, value, least in (("steps", steps, 1), ("warmup", warmup, 0), ("accumulation", accumulation, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} is not allowed; needs an integer >= {least}")
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    told = progress or (lambda part, done, count: None)
    asked = stop or (lambda: False)
    recorder = Recorder(model, optimizer, loss or _model_loss, _windows(batches, accumulation))

    def run(part: str, count: int, step: Callable[[], None]) -> bool:
        """Whether all steps of a part were made."""
        told(part, 0, count)
        for done in range(count):
            step()
            told(part, done + 1, count)
            if asked():
                return False
        return True

    clock = Clock()
    going = run("warm-up", warmup, recorder.warm_up)
    profiler: torch_profile | None = None
    if going:
        with recorder.profiling(clock, with_torch) as profiler:
            going = run("profile", steps, recorder.timed_step)
    if not with_torch:
        return Profile(_count(recorder.phases), not going, None, [], None, recorder.phases, None, {})
    if going:
        with _snapshots(recorder.device, directory / SNAPSHOT), recorder.accounting():
            going = run("memory", steps, recorder.accounted_step)
    timeline = recorder.timeline() if recorder.memory_phases else None
    return _write(directory, recorder, profiler, clock, timeline, accumulation, not going, title)


def _write(
    directory: Path,
    recorder: Recorder,
    profiler: torch_profile | None,
    clock: Clock,
    timeline: Timeline | None,
    accumulation: int,
    interrupted: bool,
    title: str,
) -> Profile:
    files: dict[str, str] = {}
    chunked = recorder.chunked
    if profiler is not None and recorder.phases:
        phases = [*recorder.phases, *recorder.memory_phases]
        trace = combined_trace(profiler, clock, chunked, phases, timeline, directory / ".torch_trace.json")
        (directory / TRACE).write_text(json.dumps(trace), encoding="utf-8")
        files["trace"] = str(directory / TRACE)
    peak, found = None, []
    if timeline is not None:
        on_host = recorder.device.type == "cpu"
        again = _recomputes(recorder.model)
        setting = Setting(recorder.model, chunked, recorder.ledger.inputs, accumulation, again, on_host)
        peak, found = find_peak(timeline), savings(timeline, setting)
        note = f"peak {human_bytes(peak.nbytes)}, {peak.phase}"
        if peak.allocation is not None:
            note += f"\n{peak.allocation.op} in {peak.allocation.module or 'no module'}"
        process = _beside(recorder, timeline)
        draw_memory(timeline, process, directory / PICTURE, title or type(recorder.model).__name__, note)
        files["picture"] = str(directory / PICTURE)
        if on_host:
            account = {"polled_state": recorder.ledger.polls, "phases": [asdict(p) for p in timeline.phases]}
            account["blocks"] = [asdict(block) for block in timeline.blocks]
            (directory / ACCOUNT).write_text(json.dumps(account), encoding="utf-8")
            files["account"] = str(directory / ACCOUNT)
        else:
            files["snapshot"] = str(directory / SNAPSHOT)
    report = None if chunked is None else chunked.memory_report()
    result = Profile(
        _count(recorder.phases), interrupted, peak, found, report, recorder.phases, timeline, files
    )
    (directory / MEMORY).write_text(
        json.dumps(result.as_dict() | {"device": str(recorder.device)}, indent=2) + "\n", encoding="utf-8"
    )
    files["memory"] = str(directory / MEMORY)
    return result


def _beside(recorder: Recorder, timeline: Timeline) -> list[tuple[int, int]]:
    """The resident set of the process, moved so that it begins where the account does.

    What the interpreter, libraries and data take is left out so; what remains above the account is memory that no
    tensor is known for: working memory of operators, and what the allocator keeps.
    """
    if not recorder.process:
        return []
    first = recorder.process[0][1]
    base = int(timeline.total[0])
    return [(when, value - first + base) for when, value in recorder.process]


def _recomputes(model: nn.Module) -> bool:
    """Whether a transformers model has activation checkpointing on; the older name is of releases before 5.20."""
    new = getattr(type(model), "is_activation_checkpointing", None)
    name = "is_gradient_checkpointing" if new is None else "is_activation_checkpointing"
    return bool(getattr(model, name, False))


def _count(phases: Sequence[Any]) -> int:
    return len({phase.step for phase in phases})


def _model_loss(model: nn.Module, batch: Any) -> Tensor:
    found = model(**batch).loss
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model gave loss={found!r} for this batch; give loss=, a function of model and batch"
        )
    return found


def _windows(batches: Iterable[Any], accumulation: int) -> Iterator[list[Any]]:
    """Lists of ``accumulation`` batches, without end."""
    window: list[Any] = []
    while True:
        count = 0
        for batch in batches:
            count += 1
            window.append(batch)
            if len(window) == accumulation:
                yield window
                window = []
        if not count:
            raise ValueError(
                "batches is empty, or can be iterated once only and is over; needs a batch for each step"
            )


class _snapshots:
    """torch's own history of allocations, on a GPU."""

    def __init__(self, device: torch.device, path: Path) -> None:
        self._path = path if device.type == "cuda" else None

    def __enter__(self) -> None:
        if self._path is not None:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)

    def __exit__(self, *error: object) -> None:
        if self._path is not None:
            torch.cuda.memory._dump_snapshot(str(self._path))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
