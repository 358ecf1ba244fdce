"""What a run leaves behind for people: the memory table, metrics.jsonl, and a picture of the loss."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from chunkft import optim
from chunkft.cli.errors import UserError
from chunkft.optim.report import human_bytes, table

__all__ = [
    "MemoryReport",
    "human_bytes",
    "plot_loss",
    "read_metrics",
    "table",
    "trim_metrics",
    "weight_sizes",
    "write_json",
]

ADAM_MOMENTS = 2
FP32_BYTES = 4
HELD = ("gradients", "optimizer state", "master weights", "saved activations")


class MemoryReport:
    """Bytes beside the weights: what full fine-tuning with AdamW holds, and what this run held on its device
    and host.

    `trained` and `trained_bytes`: elements and bytes of all trainable weights, tied ones once; `shards`: the three
    numbers of this process, if it has a shard of each weight. Gradients of full fine-tuning have the weights' dtype,
    moments are fp32, and 16-bit weights have an fp32 master.
    """

    def __init__(
        self, weights: int, trained: int, trained_bytes: int, shards: tuple[int, int, int] | None = None
    ) -> None:
        self.weights = weights
        self.full = _of_adamw(trained, trained_bytes)
        self.held, *own = shards or (weights, trained, trained_bytes)
        self._full_here = _of_adamw(*own)
        self.run: dict[str, int | None] = dict.fromkeys(HELD, 0)
        self.run["saved activations"] = None
        self.host = 0
        self.files = 0
        self.new = 0  # state, until it is on its page

    def observe(self, report: optim.MemoryReport) -> None:
        """Takes the peaks that the optimizer counted in the run."""
        self.run |= {
            "gradients": report.gradients.peak,
            "optimizer state": report.state_device.peak,
            "master weights": report.masters.peak,
        }
        self.new = report.state_new.peak or 0
        self.host, self.files = report.state_host.peak or 0, report.state_files.peak or 0

    def observe_full(self) -> None:
        """Says that the run itself was full fine-tuning."""
        self.run = self._full_here | {"saved activations": self.full["saved activations"]}

    def rows(self) -> list[tuple[str, ...]]:
        """Rows for `table`: part, full fine-tuning, this run, ratio."""
        rows: list[tuple[str, ...]] = [("held beside the weights", "full AdamW", "this run", "ratio")]
        for name in HELD:
            full, run = self.full[name], self.run[name]
            if full is None or run is None or full == run == 0:
                continue
            rows.append((name, human_bytes(full), human_bytes(run), f"{run / full:.3f}" if full else "-"))
        full_sum, run_sum = (sum(value or 0 for value in side.values()) for side in self._comparable())
        rows.append(
            ("together", human_bytes(full_sum), human_bytes(run_sum), f"{run_sum / max(full_sum, 1):.3f}")
        )
        share = f"{self.held / self.weights:.3f}" if self.held < self.weights else "1"
        rows.append(("weights", human_bytes(self.weights), human_bytes(self.held), share))
        rows.append(("state of all chunks, on the host", "0 B", human_bytes(self.host), "-"))
        if self.new:
            rows.append(("state before it has a page", "0 B", human_bytes(self.new), "-"))
        if self.files:
            rows.append(("state of all chunks, in files", "0 B", human_bytes(self.files), "-"))
        return rows

    def _comparable(self) -> tuple[dict[str, int | None], dict[str, int | None]]:
        known = [name for name in HELD if self.full[name] is not None and self.run[name] is not None]
        return {name: self.full[name] for name in known}, {name: self.run[name] for name in known}

    def to_json(self) -> dict[str, Any]:
        """Bytes of every row, for memory.json; a part that was not measured is null."""
        return {
            "weights": self.weights,
            "weights_held": self.held,
            "full_adamw": self.full,
            "this_run": self.run,
            "host": self.host,
            "new": self.new,
            "files": self.files,
        }


def weight_sizes(weights: Iterable[torch.Tensor]) -> tuple[int, int, int]:
    """Bytes of all weights; elements and bytes of those that are trained."""
    held = list(weights)
    trained = [weight for weight in held if weight.requires_grad]
    return _nbytes(held), sum(weight.numel() for weight in trained), _nbytes(trained)


def _nbytes(weights: list[torch.Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _of_adamw(trained: int, trained_bytes: int) -> dict[str, int | None]:
    return {
        "gradients": trained_bytes,
        "optimizer state": ADAM_MOMENTS * FP32_BYTES * trained,
        "master weights": FP32_BYTES * trained if trained_bytes < trained * FP32_BYTES else 0,
        "saved activations": None,
    }


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside `path` and renames it."""
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of metrics.jsonl; an unfinished last line, which a killed run leaves, is passed
    over.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").split("\n")
    for line in lines[:-1]:
        yield json.loads(line)


def trim_metrics(path: Path, last_step: int) -> None:
    """Drops the records after `last_step`, which a resumed run writes again."""
    records = [record for record in read_metrics(path) if record["step"] <= last_step]
    aside = path.with_name(f".{path.name}.new")
    aside.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(aside, path)


def plot_loss(metrics: Path, picture: Path, title: str) -> None:
    """Draws the loss over steps (each step, a running mean, and the evaluations) from metrics.jsonl as
    a PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = list(read_metrics(metrics))
    train = [(record["step"], record["loss"]) for record in records if "loss" in record]
    held = [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
    if not train:
        raise UserError(f"{metrics}: no step was recorded, so there is no loss to draw")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    steps, losses = zip(*train, strict=True)
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="each step")
    axes.plot(steps, running_mean(losses), color="#08519c", linewidth=1.8, label="running mean")
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color="#d94801", markersize=4, label="held-out")
    axes.set(xlabel="optimizer step", ylabel="loss", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(picture)
    pyplot.close(figure)


def running_mean(values: Iterable[float], weight: float = 0.95) -> list[float]:
    """Exponential mean that is not drawn towards zero at the start."""
    means, total, mass = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        means.append(total / mass)
    return means
