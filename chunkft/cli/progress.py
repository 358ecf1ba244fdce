"""Trainer callbacks that watch a run: the progress line, metrics.jsonl, and the memory that was held."""

import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chunkft.cli.report import human_bytes
from chunkft.integrations.transformers import unwrap_optimizer
from chunkft.optim import ChunkOptimizer

__all__ = ["Metrics", "Progress", "peak_resident_bytes", "resident_bytes"]

PLAIN_LINES = 20
EVALUATED = ("eval_loss", "eval_accuracy", "eval_matthews")


def resident_bytes(device: torch.device) -> int:
    """Memory that is held now: of the process on the CPU, allocated by torch on a GPU, in bytes."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Largest resident set of the process so far, in bytes."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _duration(seconds: float) -> str:
    whole = max(int(seconds + 0.5), 0)
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


class Metrics(TrainerCallback):
    """Appends a record for every optimizer step and every evaluation to a jsonl file, and tells `watchers` of
    it.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self.device = device
        self.tokens = 0
        self.held: int | None = None  # of the largest process; None: of this one
        self.last: dict[str, Any] = {}
        self._started = 0.0
        self._trained: tuple[int | None, int | None] = (None, None)
        self._stream: RawIOBase | None = None

    @contextmanager
    def open(self) -> Iterator["Metrics"]:
        """Keeps the file open inside the block."""
        with self.path.open("ab", buffering=0) as stream:
            self._stream = stream
            try:
                yield self
            finally:
                self._stream = None

    def _write(self, record: dict[str, Any]) -> None:
        assert self._stream is not None
        try:
            self._stream.write(f"{json.dumps(record)}\n".encode())
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error.strerror}") from error

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock of a step."""
        self._started = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes which chunk the step trains, while its gradients are there."""
        optimizer = unwrap_optimizer(kwargs["optimizer"])
        if isinstance(optimizer, ChunkOptimizer):
            self._trained = optimizer.active, optimizer.sweep

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops the clock of a step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.last = {"step_seconds": time.perf_counter() - self._started}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Writes the record of a step, or of an evaluation."""
        if "loss" in logs:
            chunk, sweep = self._trained
            self.last = {
                "step": state.global_step,
                "loss": logs["loss"],
                "lr": logs["learning_rate"],
                "chunk": chunk,
                "sweep": sweep,
                "step_seconds": round(self.last["step_seconds"], 6),
                "grad_norm": logs.get("grad_norm"),
                "tokens": self.tokens,
                "rss": resident_bytes(self.device) if self.held is None else self.held,
            }
            self.tokens = 0
            self._write(self.last)
        evaluated = {name: value for name, value in logs.items() if name in EVALUATED}
        if evaluated:
            self._write({"step": state.global_step, **evaluated})


class Progress(TrainerCallback):
    """Shows one line that is rewritten after every step; off a terminal, about twenty plain lines a run."""

    def __init__(self, metrics: Metrics, chunks: int | None, stream: TextIO | None = None) -> None:
        self.metrics = metrics
        self.chunks = chunks
        self.stream = stream if stream is not None else sys.stdout
        self.live = self.stream.isatty()
        self._first_step = 0
        self._started = 0.0
        self._loss: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock that the time left is told from."""
        self._first_step = state.global_step
        self._started = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Shows a step, or an evaluation."""
        evaluated = [f"{name[5:]} {logs[name]:.4f}" for name in EVALUATED if name in logs]
        if evaluated:
            self._line(f"step {state.global_step}: held-out {', '.join(evaluated)}", keep=True)
        if "loss" not in logs:
            return
        loss = float(logs["loss"])
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        every = -(-state.max_steps // PLAIN_LINES)
        last = state.global_step == state.max_steps
        if self.live or last or state.global_step % every == 0 or state.global_step == self._first_step + 1:
            self._line(self._describe(state), keep=last)

    def _describe(self, state: TrainerState) -> str:
        record = self.metrics.last
        done = state.global_step - self._first_step
        left = (time.perf_counter() - self._started) / done * (state.max_steps - state.global_step)
        parts = [f"step {state.global_step}/{state.max_steps}", f"loss {self._loss:.4f}"]
        if record["chunk"] is not None:
            parts.append(f"chunk {record['chunk'] + 1}/{self.chunks} sweep {record['sweep'] + 1}")
        parts += [
            f"{record['step_seconds'] * 1e3:.0f} ms",
            human_bytes(record["rss"]),
            f"{_duration(left)} left",
        ]
        line = "  ".join(parts)
        if self.live:
            filled = round(20 * state.global_step / state.max_steps)
            full, empty = "█░" if "utf" in (self.stream.encoding or "").lower() else "#."
            line = f"{full * filled}{empty * (20 - filled)} {line}"[: shutil.get_terminal_size().columns - 1]
        return line

    def _line(self, text: str, *, keep: bool) -> None:
        if self.live:
            self.stream.write(f"\r\x1b[2K{text}" + ("\n" if keep else ""))
        else:
            self.stream.write(f"{text}\n")
        self.stream.flush()
