"""`chunkft profile`: where the time and the memory of a few training steps go."""

import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.data import DataLoader

import chunkft
from chunkft.cli.demo import demo_job, demo_settings
from chunkft.cli.errors import UserError
from chunkft.cli.job import Job, build_optimizer, chosen_interval, load_job
from chunkft.cli.models import quiet_transformers, resolve_device
from chunkft.cli.outputs import EMBEDDED_NAME, unused, usable
from chunkft.cli.problems import generate
from chunkft.cli.settings import FinetuneSettings, ProfileSettings
from chunkft.integrations.transformers import GracefulStop
from chunkft.profiling import Profile, profile
from chunkft.weights import stream_of

__all__ = ["show_profile"]

DEMO_PROBLEMS = 512
BAR = 20


def show_profile(settings: ProfileSettings, *, given: frozenset[str]) -> int:
    """Profiles, prints the findings and returns the exit status; raises UserError for wrong input."""
    device = resolve_device(settings.training.device)
    if settings.nsight and device.type != "cuda":
        raise UserError("--nsight needs a GPU: nsys and ncu time its kernels; leave it out, or see --device")
    with quiet_transformers():
        job, training = _job(settings.training, device, given)
        directory = _directory(settings, training)
        optimizer = build_optimizer(job.model, training, chosen_interval(training, settings.steps))
        try:
            return _carry_out(job, optimizer, training, settings, directory)
        finally:
            if isinstance(optimizer, chunkft.ChunkOptimizer):
                optimizer.detach()


def _job(
    training: FinetuneSettings, device: torch.device, given: frozenset[str]
) -> tuple[Job, FinetuneSettings]:
    if training.model is not None:
        return load_job(training, device), training
    training = demo_settings(training, given)
    held_out = generate(1, training.seed, "heldout")
    return demo_job(training, device, held_out, DEMO_PROBLEMS), training


def _directory(settings: ProfileSettings, training: FinetuneSettings) -> Path:
    name = Path(training.model).name if training.model else EMBEDDED_NAME
    path = Path(settings.out) if settings.out else unused("profiles", name)
    with usable(path):
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path}: a file, expected a directory")
        if path.is_dir() and any(path.iterdir()):
            raise UserError(f"--out {path}: the directory is not empty")
        path.mkdir(parents=True, exist_ok=True)
    return path


def _carry_out(
    job: Job,
    optimizer: torch.optim.Optimizer,
    training: FinetuneSettings,
    settings: ProfileSettings,
    directory: Path,
) -> int:
    stream = stream_of(job.model)
    device = next(job.model.parameters()).device if stream is None else stream.device
    count = sum(weight.numel() for weight in job.model.parameters())
    print(f"chunkft {chunkft.__version__}  {job.name}: {count:,} parameters, on {device}")
    if isinstance(optimizer, chunkft.ChunkOptimizer):
        interval = optimizer.interval
        print(f"  {len(optimizer.plan)} chunks, the next one every {interval} steps ({training.schedule})")
    elif training.clip_norm:
        weights = [weight for weight in job.model.parameters() if weight.requires_grad]

        def clip(*_: Any) -> None:
            torch.nn.utils.clip_grad_norm_(weights, training.clip_norm)

        optimizer.register_step_pre_hook(clip)
    job.model.config.use_cache = False  # as Trainer does: keys and values are of no use in training
    stop = GracefulStop()
    bar = None if training.quiet else _Bar(sys.stdout)
    with stop.listening():
        result = profile(
            job.model,
            optimizer,
            _Batches(job, training, device),
            steps=settings.steps,
            warmup=settings.warmup,
            out=directory,
            accumulation=training.grad_accum,
            with_torch=not settings.nsight,
            title=f"{Path(job.name).name}, {training.chunks if training.optimizer != 'adamw' else 1} chunks",
            progress=bar,
            stop=lambda: stop.received is not None,
        )
    return _report(result, directory, stop.received)


def _report(result: Profile, directory: Path, received: int | None) -> int:
    print(f"\n{result.summary()}")
    if result.report is not None:
        print(f"\n{result.report}")
    if result.files:
        names = ", ".join(sorted(Path(file).name for file in result.files.values()))
        print(f"\n{names}: {directory}")
    if received is not None:
        print(f"stopped after {result.steps} timed steps", flush=True)
        return 128 + signal.Signals(received).value
    return 0


class _Batches:
    """Batches on the device, in an order that the seed gives, as often as they are iterated."""

    def __init__(self, job: Job, training: FinetuneSettings, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(training.seed)
        self._device = device
        self._loader: Any = DataLoader(
            job.train,
            batch_size=training.batch_size,
            shuffle=True,
            collate_fn=job.collator,
            generator=generator,
        )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self._loader:
            yield {name: value.to(self._device) for name, value in batch.items()}


class _Bar:
    """One line that is rewritten; off a terminal, a line for each part."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()

    def __call__(self, part: str, done: int, count: int) -> None:
        if self._live:
            filled = BAR * done // max(count, 1)
            full, empty = "█░" if "utf" in (self._stream.encoding or "").lower() else "#."
            line = f"{full * filled}{empty * (BAR - filled)} {part} {done}/{count}"
            self._stream.write(f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}")
            if part == "memory" and done == count:
                self._stream.write("\r\x1b[2K")
        elif done == count:
            self._stream.write(f"  {part}: {done} steps\n")
        self._stream.flush()
