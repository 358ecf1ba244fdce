"""Chooses the fastest setting that fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chunkft.optim.planner.amounts import GpuBytes, HostBytes
from chunkft.optim.planner.estimate import Model
from chunkft.optim.planner.result import Alternative, MemoryPlan
from chunkft.optim.planner.setting import Machine, Setting
from chunkft.optim.planner.sizes import written
from chunkft.optim.planner.timing import Clock

__all__ = ["CHUNKS", "TIE", "Space", "search"]

CHUNKS = (1, 2, 4, 8, 16, 32, 64, 128)
TIE = 1.05  # steps of which one is no more than this much longer count as equally fast
CLEARLY_LESS = 0.9


@dataclass(frozen=True)
class Space:
    """The values that each choice may take."""

    chunks: Sequence[int] = CHUNKS
    residency: Sequence[str] = ("chunk", "stream")
    update: Sequence[str] = ("step", "backward")
    weights: Sequence[str] = ("resident", "stream")
    update_on: Sequence[str] = ("device", "host")
    resident_blocks: Sequence[int] | None = None
    state_bits: Sequence[int] = (32, 8)
    checkpointing: Sequence[bool | None] = (False, True)
    master: Sequence[str] = ("auto",)
    in_files: Sequence[bool] = (False,)
    offload_inputs: Sequence[bool] = (False, True)

    def settings(self, blocks: int, can_stream: bool) -> Iterator[Setting]:
        """Every combination that makes sense, for a model of so many blocks."""
        resident = self.resident_blocks
        if resident is None:
            resident = sorted({blocks * part // 4 for part in range(4)})
        for chunks, checkpointing, master, bits, in_files in itertools.product(
            self.chunks, self.checkpointing, self.master, self.state_bits, self.in_files
        ):
            common: dict[str, Any] = {
                "chunks": chunks, "checkpointing": checkpointing, "master": master, "state_bits": bits,
                "in_files": in_files,
            }  # fmt: skip
            paged: list[dict[str, Any]] = [
                {"residency": residency, "update": update}
                for residency, update in itertools.product(self.residency, self.update)
                if update == "step" or residency == "stream"
            ]
            if "resident" in self.weights:
                for choice in paged:
                    yield Setting(**common, **choice)
            if "stream" not in self.weights or not can_stream or checkpointing is False:
                continue  # blocks whose weights come and go are recomputed
            for count, offload in itertools.product(resident, self.offload_inputs):
                if count >= blocks or (offload and count):  # blocks that stay are not recomputed there
                    continue
                streamed: dict[str, Any] = {
                    "weights": "stream", "resident_blocks": count, "offload_inputs": offload,
                }  # fmt: skip
                if "device" in self.update_on:
                    for choice in paged:
                        yield Setting(**common, **choice, **streamed, update_on="device")
                if "host" in self.update_on and not in_files and "chunk" in self.residency:
                    yield Setting(**common, **streamed, update_on="host")


@dataclass(frozen=True)
class _Candidate:
    setting: Setting
    seconds: float

    @property
    def simplicity(self) -> tuple[Any, ...]:
        """Of equally fast ones the least comes first: the fewest extras, then the fewest chunks."""
        return (self.setting.complexity, self.setting.chunks, self.seconds, str(self.setting))


class _Search:
    def __init__(self, model: Model, machine: Machine, space: Space, interval: int) -> None:
        self.model, self.machine, self.interval = model, machine, interval
        self.clock = Clock(model, machine)
        blocks = len(model.units.blocks) if model.units is not None else 0
        self.candidates = []
        impossible: set[int] = set()
        for setting in space.settings(blocks, model.units is not None):
            if setting.chunks in impossible:
                continue
            try:
                model.plan(setting.chunks)
            except ValueError:  # more chunks than rows
                impossible.add(setting.chunks)
                continue
            seconds = self.clock.seconds(setting, interval).total
            self.candidates.append(_Candidate(setting, seconds))
        self.candidates.sort(key=lambda candidate: (candidate.seconds, candidate.simplicity))

    def host_fits(self, setting: Setting) -> bool:
        machine = self.machine
        within = machine.host is None or self.host(setting).total * machine.processes <= machine.host
        files = self.model.state(setting).files * machine.processes
        return within and (files == 0 or (machine.disk is not None and files <= machine.disk))

    def host(self, setting: Setting) -> HostBytes:
        return self.model.host(setting)

    def fits(self, setting: Setting, gpu: int | None = None) -> bool:
        """Whether it does; the cheap bounds first."""
        return self.host_fits(setting) and self.fits_gpu(setting, gpu)

    def fits_gpu(self, setting: Setting, gpu: int | None = None) -> bool:
        """Whether the GPU holds it."""
        gpu = self.machine.gpu if gpu is None else gpu
        if self.model.floor(setting) > gpu:
            return False
        return self.model.gpu(setting, exact=False, limit=gpu).total <= gpu

    def best(self) -> _Candidate | None:
        return self.best_of(self.candidates, self.machine.gpu)

    def best_of(self, candidates: Sequence[_Candidate], gpu: int) -> _Candidate | None:
        """The simplest of those that fit and are as fast as the fastest that does."""
        fastest = next((c for c in candidates if self.fits(c.setting, gpu)), None)
        if fastest is None:
            return None
        tied = [c for c in candidates if c.seconds <= TIE * fastest.seconds]
        tied.sort(key=lambda c: c.simplicity)
        return next(c for c in tied if self.fits(c.setting, gpu))

    def smaller(self, chosen: _Candidate, held: int) -> _Candidate | None:
        """The fastest that needs clearly less of the GPU."""
        return self.best_of([c for c in self.candidates if c != chosen], int(held * CLEARLY_LESS))

    def faster(self, chosen: _Candidate) -> _Candidate | None:
        """Of those that are faster and do not fit the one that needs the least of the GPU."""
        before = self.candidates[: self.candidates.index(chosen)]
        before = [c for c in before if c.seconds * TIE < chosen.seconds and self.host_fits(c.setting)]
        return self.least(before)

    def least(self, candidates: Sequence[_Candidate]) -> _Candidate | None:
        """The one that needs the least of the GPU; what cannot be it by its floor is not looked at."""
        found: tuple[int, _Candidate] | None = None
        for floor, candidate in sorted(
            ((self.model.floor(c.setting), c) for c in candidates), key=lambda p: p[0]
        ):
            if found is not None and floor >= found[0]:
                break
            needs = self.rough(candidate.setting)
            if found is None or needs < found[0]:
                found = needs, candidate
        return None if found is None else found[1]

    def rough(self, setting: Setting) -> int:
        return self.model.gpu(setting, exact=False).total


def search(
    model: Model,
    machine: Machine,
    space: Space,
    *,
    interval: int,
    fixed: tuple[tuple[str, Any], ...] = (),
    shorter: Callable[[int], Model] | None = None,
) -> MemoryPlan:
    """The fastest setting of a space that fits a machine.

    Args:
        model: what is trained.
        machine: where.
        space: what may be chosen.
        interval: steps of a chunk.
        fixed: keywords for the optimizer that the plan carries along.
        shorter: makes the same model with fewer tokens, to see whether that would fit.

    Raises:
        ValueError: if the space is empty.
    """
    work = _Search(model, machine, space, interval)
    if not work.candidates:
        raise ValueError("no combination of the given choices is possible for this model")
    chosen = work.best()
    change = ""
    if chosen is None:
        chosen, change = _nearest(work, machine, space, interval, shorter)
    setting = chosen.setting
    gpu = model.gpu(setting)
    alternatives = []
    if not change:
        others = (work.faster(chosen), work.smaller(chosen, gpu.total))
        alternatives = [_alternative(work, chosen, gpu, other) for other in others if other is not None]
    return MemoryPlan(
        fits=not change,
        change=change,
        setting=setting,
        gpu=gpu,
        host=model.host(setting),
        disk=model.state(setting).files,
        traffic=work.clock.traffic(setting, interval),
        seconds=work.clock.seconds(setting, interval),
        machine=machine,
        batch=model.batch,
        tokens=model.tokens,
        interval=interval,
        parameters=sum(p.numel() for p in model.parameters.values()),
        alternatives=tuple(alternatives),
        fixed=fixed,
    )


def _alternative(work: _Search, chosen: _Candidate, gpu: GpuBytes, other: _Candidate) -> Alternative:
    needs = work.model.gpu(other.setting).total
    host, before = work.host(other.setting).total, work.host(chosen.setting).total
    words = [_more(needs - gpu.total, "GPU memory")]
    if host != before:
        words.append(_more(host - before, "host memory"))
    ratio = other.seconds / chosen.seconds
    words.append(f"a step of {ratio:.2f} times the length")
    return Alternative(
        setting=other.setting,
        gpu_bytes=needs,
        host_bytes=host,
        step_seconds=other.seconds,
        difference=", ".join(words),
    )


def _more(nbytes: int, what: str) -> str:
    return f"{written(abs(nbytes))} {'more' if nbytes > 0 else 'less'} {what}"


def _nearest(
    work: _Search,
    machine: Machine,
    space: Space,
    interval: int,
    shorter: Callable[[int], Model] | None,
) -> tuple[_Candidate, str]:
    """The candidate that lacks the least, and what it lacks, in a sentence."""
    ways: list[tuple[float, _Candidate, str]] = []
    fitting = [c for c in work.candidates if work.host_fits(c.setting)]
    least = work.least(fitting)
    if least is not None:
        lacks = work.model.gpu(least.setting).total - machine.gpu
        ways.append((lacks / machine.gpu, least, f"needs {written(lacks)} more GPU memory"))
    if machine.host is not None:
        others = [c for c in work.candidates if not work.host_fits(c.setting) and not c.setting.in_files]
        others.sort(key=lambda c: work.host(c.setting).total)
        least = next((c for c in others if work.fits_gpu(c.setting)), None)
        if least is not None:
            lacks = work.host(least.setting).total * machine.processes - machine.host
            ways.append((lacks / machine.host, least, f"needs {written(lacks)} more host memory"))
            if machine.disk is None:
                ways += _with_files(work, space)
    if shorter is not None and work.model.tokens >= 2 and (not ways or min(w[0] for w in ways) > 0.1):
        tokens = work.model.tokens // 2
        while tokens >= 64:
            fewer = _Search(shorter(tokens), machine, space, interval)
            found = fewer.best()
            if found is not None:
                same = next(c for c in work.candidates if c.setting == found.setting)
                ways.append(
                    (
                        0.1,
                        same,
                        f"needs no more than {tokens} tokens a sequence instead of {work.model.tokens}",
                    )
                )
                break
            tokens //= 2
    if not ways:
        least = work.least(work.candidates)
        assert least is not None
        lacks = max(0, work.model.gpu(least.setting).total - machine.gpu)
        host = max(0, work.host(least.setting).total * machine.processes - (machine.host or 0))
        sentence = f"needs {written(lacks)} more GPU memory and {written(host)} more host memory"
        ways.append((math.inf, least, sentence))
    _, chosen, sentence = min(ways, key=lambda way: way[0])
    return chosen, sentence


def _with_files(work: _Search, space: Space) -> list[tuple[float, _Candidate, str]]:
    """What would fit if state were in files."""
    found = []
    boundless = replace(work.machine, disk=1 << 62)
    other = _Search(work.model, boundless, replace(space, in_files=(True,)), work.interval)
    by_size = sorted(other.candidates, key=lambda c: (work.model.state(c.setting).files, c.seconds))
    least = next((c for c in by_size if other.fits(c.setting)), None)
    if least is not None:
        size = work.model.state(least.setting).files * work.machine.processes
        found.append((0.05, least, f"needs a disk for {written(size)} of optimizer state"))
    return found
