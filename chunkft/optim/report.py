"""The memory report: what an optimizer and its model hold, as a table, as plain values, and as metrics."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["MemoryPart", "MemoryReport", "human_bytes", "table"]

LABELS = {
    "weights": "weights",
    "leaves": "active slices beside the weights",
    "gradients": "gradients",
    "state_device": "optimizer state on the device",
    "masters": "master weights on the device",
    "state_new": "state before it has a page",
    "activations": "saved activations",
    "weights_host": "weights in host memory",
    "gradients_host": "gradients in host memory",
    "state_host": "state in host memory",
    "state_files": "state in files",
}


@dataclass(frozen=True, kw_only=True)
class MemoryPart:
    """Bytes of one kind; None where it is not known.

    Attributes:
        predicted: the most that the plan, the dtypes and the update rule let exist at a time.
        now: what was counted when the report was made.
        peak: the most that was counted at a time since the report before this one.
        full: what full fine-tuning with the same optimizer holds, with fp32 masters of 16-bit weights.
    """

    predicted: int | None = None
    now: int | None = None
    peak: int | None = None
    full: int | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """What training holds, by kind; no byte is in two parts, except where ``in_place`` says so.

    Attributes:
        weights: all parameters of the model; if they stream those that stay on the device and the slots for others.
        leaves: active slices of weights that stream, in copies on the device.
        gradients: of the active slices, on the device.
        state_device: what the base optimizer keeps, on the device of the parameters: that of the active slices, or
            with paging the slots that it passes through (the masters of paged slices are in them).
        masters: fp32 masters, or residuals, of the active slices outside of slots.
        state_new: state and masters that were made beside the slot of their page, until the page is first written.
        activations: what autograd kept for the backward pass, if ``ChunkOptimizer.saved_activations`` watched it.
        weights_host: host memory, or the file, of weights that stream.
        gradients_host: of active slices that are updated in host memory.
        state_host: host memory for state: of all chunks that have been active; with paging of all chunks, with
            ``state_dir`` the buffers before the files.
        state_files: the files of ``state_dir``.
        device: where the parameters are.
        in_place: whether ``state_device`` and ``masters`` are, from the second sweep on, a part of ``state_host``.
    """

    weights: MemoryPart
    leaves: MemoryPart
    gradients: MemoryPart
    state_device: MemoryPart
    masters: MemoryPart
    state_new: MemoryPart
    activations: MemoryPart
    weights_host: MemoryPart
    gradients_host: MemoryPart
    state_host: MemoryPart
    state_files: MemoryPart
    device: str
    in_place: bool

    def parts(self) -> dict[str, MemoryPart]:
        """Every part by its name."""
        return {
            field.name: value
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), MemoryPart)
        }

    def table(self) -> str:
        """The report as lines of text; a dash is what is not known."""
        rows: list[tuple[str, ...]] = [("held by training", "predicted", "now", "peak", "full fine-tuning")]
        for name, part in self.parts().items():
            values = asdict(part).values()
            if any(values) or name in ("weights", "gradients"):
                rows.append((LABELS[name], *("-" if v is None else human_bytes(v) for v in values)))
        note = " (on this device a part of that in host memory)" if self.in_place else ""
        return f"{table(rows)}\ndevice: {self.device}{note}"

    def __str__(self) -> str:
        return self.table()

    def as_dict(self) -> dict[str, Any]:
        """Plain values: for each part its ``predicted``, ``now``, ``peak`` and ``full`` bytes."""
        return asdict(self)

    def to_json(self) -> str:
        """``as_dict`` as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def metrics(self, prefix: str = "chunkft/") -> dict[str, int]:
        """A flat dict of what is known, for loggers, with keys such as ``chunkft/gradients_peak_bytes``."""
        return {
            f"{prefix}{name}_{kind}_bytes": value
            for name, part in self.parts().items()
            for kind, value in asdict(part).items()
            if value is not None
        }


def human_bytes(count: float) -> str:
    """Writes a number of bytes in binary units with three digits: 12.3 MiB."""
    size = float(count)
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    digits = 0 if unit == "B" or size >= 100 else 1 if size >= 10 else 2
    number = f"{size:,.{digits}f}"
    return f"{number.rstrip('0').rstrip('.') if digits else number} {unit}"


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Aligns rows of text: the first column to the left, the others to the right; the first row is underlined."""
    cells = [tuple(row) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
