"""What the planner says."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from chunkft.optim.planner.amounts import GpuBytes, HostBytes
from chunkft.optim.planner.setting import Machine, Setting
from chunkft.optim.planner.timing import Seconds, Traffic
from chunkft.optim.report import human_bytes, table

__all__ = ["Alternative", "MemoryPlan"]

LABELS = {
    "weights": "weights",
    "ring": "slots of streamed weights",
    "leaves": "copies of active slices",
    "state": "optimizer state",
    "gradients": "gradients",
    "activations": "activations",
    "working": "working memory of a block or the head",
    "update": "working memory of the update",
    "reserve": "reserve: CUDA context, allocator",
}


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another setting, and what it wins and loses.

    Attributes:
        setting: the choices.
        gpu_bytes, host_bytes: what it holds.
        step_seconds: how long its step takes.
        difference: both in words.
    """

    setting: Setting
    gpu_bytes: int
    host_bytes: int
    step_seconds: float
    difference: str


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The fastest predicted setting that fits, or the one that needs the least where none does.

    Attributes:
        fits: whether it does.
        change: where nothing fits, the smallest change with which something would, in a sentence; else empty.
        setting: the choices.
        gpu: bytes on the GPU at the largest moment of a step, by kind.
        host: bytes of host memory of one process, by kind.
        disk: bytes of files.
        traffic: bytes of a step over the link.
        seconds: predicted parts of a step.
        machine: what was given, and the speeds that the times are predicted with.
        batch, tokens: sequences of a step, and tokens of each.
        interval: steps of a chunk.
        parameters: of the model.
        alternatives: the nearest others: one that needs more and is faster, one that needs less.
        fixed: keywords that were asked for and are part of ``optimizer_arguments``.
    """

    fits: bool
    change: str
    setting: Setting
    gpu: GpuBytes
    host: HostBytes
    disk: int
    traffic: Traffic
    seconds: Seconds
    machine: Machine
    batch: int
    tokens: int
    interval: int
    parameters: int
    alternatives: tuple[Alternative, ...]
    fixed: tuple[tuple[str, Any], ...] = ()

    def optimizer_arguments(self) -> dict[str, Any]:
        """Keywords for ``ChunkAdamW(model, **arguments)``; a plan with state in files needs ``state_dir`` beside them.

        Activation checkpointing is the model's: ``setting.checkpointing`` says whether to turn it on.
        """
        return {**dict(self.fixed), **self.setting.arguments()}

    def table(self) -> str:
        """The plan as lines of text."""
        gpu = [(LABELS[n], human_bytes(v)) for n, v in asdict(self.gpu).items() if v]
        host = [(f"host: {n}", human_bytes(v)) for n, v in asdict(self.host).items() if v]
        limit = self.machine.host
        rows = [("on the GPU, at the largest moment", ""), *gpu]
        rows += [("in all, of " + human_bytes(self.machine.gpu), human_bytes(self.gpu.total)), *host]
        if host:
            given = "" if limit is None else ", of " + human_bytes(limit)
            rows.append((f"host memory in all{given}", human_bytes(self.host.total * self.machine.processes)))
        if self.disk:
            rows.append(("files", human_bytes(self.disk)))
        rows += [
            ("to the device, a step", human_bytes(self.traffic.to_device)),
            ("to the host, a step", human_bytes(self.traffic.to_host)),
        ]
        parts = self.seconds
        lines = [
            ("plan: " if self.fits else "nothing fits; nearest: ") + str(self.setting),
            *([self.change] if self.change else []),
            table(rows),
            f"a step of {self.batch} x {self.tokens} tokens: {_seconds(parts.total)}, of which "
            f"{_seconds(parts.compute)} compute at {self.machine.flops / 1e12:g} TFLOP/s, "
            f"{_seconds(parts.exposed)} exposed transfer at {self.machine.link / 1e9:g} GB/s, "
            f"{_seconds(parts.update)} update",
        ]
        lines += [f"else: {other.setting}: {other.difference}" for other in self.alternatives]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        found = asdict(self)
        found["gpu"]["total"] = self.gpu.total
        found["host"]["total"] = self.host.total
        found["seconds"]["total"] = self.seconds.total
        found["optimizer_arguments"] = self.optimizer_arguments()
        found["fixed"] = dict(self.fixed)
        return found

    def to_json(self) -> str:
        """``as_dict`` as JSON."""
        return json.dumps(self.as_dict(), indent=1)


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
