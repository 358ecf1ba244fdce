"""`chunkft finetune`: one run from its settings to the model, the reports and the summary."""

import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments

import chunkft
from chunkft.cli.errors import UserError
from chunkft.cli.fsdp import shards_of, whole_weights
from chunkft.cli.job import Job, build_optimizer, chosen_interval, load_job, prefer_class
from chunkft.cli.launch import device_of, joined, launched
from chunkft.cli.models import quiet_transformers, resolve_device
from chunkft.cli.outputs import RunDirectory, open_run
from chunkft.cli.progress import Metrics, Progress, peak_resident_bytes
from chunkft.cli.ranks import Ranks
from chunkft.cli.report import (
    MemoryReport,
    human_bytes,
    plot_loss,
    read_metrics,
    table,
    trim_metrics,
    weight_sizes,
    write_json,
)
from chunkft.cli.settings import FinetuneSettings
from chunkft.cli.shared_trainer import SharedStop, SharedTrainer
from chunkft.cli.shares import RankRows
from chunkft.cli.trainer import FinetuneTrainer, activations_of_full_training
from chunkft.integrations.transformers import GracefulStop, NonFiniteGuard, last_checkpoint
from chunkft.weights import stream_of

__all__ = ["Finetuning", "finetune"]

KEPT_CHECKPOINTS = 2


def finetune(settings: FinetuneSettings, *, given: frozenset[str], resume: bool) -> int:
    """Runs `chunkft finetune` and returns its exit status; raises UserError for wrong input."""
    launch = launched()
    if launch is None:
        if settings.fsdp or "dist_timeout" in given:
            option = "--fsdp" if settings.fsdp else f"--dist-timeout {settings.dist_timeout}"
            raise UserError(
                f"{option} needs torchrun: torchrun --nproc-per-node N -m chunkft finetune ..., one process a GPU"
            )
        return _finetune(settings, given, resume, resolve_device(settings.device), Ranks())
    if launch.may_restart and settings.out is None:
        raise UserError(
            "--max-restarts of torchrun needs --out DIR, where a restarted run finds its checkpoints"
        )
    if launch.restarts and settings.out is not None:
        resume = resume or RunDirectory(Path(settings.out)).recorded
    device = device_of(launch, settings.device)
    with joined(launch, device, settings.dist_timeout) as ranks, ranks.watched():
        return _finetune(settings, given, resume, device, ranks)


def _finetune(
    settings: FinetuneSettings, given: frozenset[str], resume: bool, device: torch.device, ranks: Ranks
) -> int:
    with quiet_transformers():
        found: tuple[RunDirectory, FinetuneSettings] | None = None
        with ranks.agreed():
            if settings.model is None and not resume:
                from chunkft.cli.demo import demo_settings

                settings = demo_settings(settings, given)
            if ranks.first:
                found = open_run(settings, given, resume)
        directory, settings = ranks.of_first(found)
        if ranks.several and settings.weights == "stream":
            with ranks.agreed():
                raise UserError(
                    "--weights stream is for one process: leave torchrun out, or choose --weights resident or --fsdp"
                )
        if resume and "device" not in given and not ranks.launched:
            device = resolve_device(settings.device)
        if settings.fsdp and not ranks.launched:
            raise UserError(
                f"--resume: the run has --fsdp, which needs torchrun: {directory.resume_command(2)}"
            )
        if settings.model is None:
            from chunkft.cli.demo import run_demo

            return run_demo(directory, settings, device, resume, ranks)
        with ranks.agreed():
            job = load_job(settings, device)
        run = Finetuning(directory, settings, device, job, resume, ranks)
        return run.carry_out()


class Finetuning:
    """One run: checks, trains, saves, reports. `checkpoint` is where a resumed run goes on, or None."""

    def __init__(
        self,
        directory: RunDirectory,
        settings: FinetuneSettings,
        device: torch.device,
        job: Job,
        resume: bool,
        ranks: Ranks | None = None,
    ) -> None:
        self.directory = directory
        self.processes_before = settings.processes if resume else None
        self.ranks = ranks = Ranks() if ranks is None else ranks
        self.settings = settings = replace(settings, processes=ranks.world)
        self.device = device
        self.job = job
        self.global_batch = settings.batch_size * ranks.world
        if ranks.launched:
            job.train = RankRows(job.train, ranks.rank, settings.batch_size)
            if job.evaluation is not None:
                job.evaluation = RankRows(job.evaluation, ranks.rank, settings.batch_size)
        self.checkpoint = self._newest_checkpoint() if resume else None
        self.resumed_at = int(self.checkpoint.name.rpartition("-")[2]) if self.checkpoint is not None else 0
        self.steps = self._total_steps()
        self.use_cache = getattr(
            job.model.config, "use_cache", True
        )  # Trainer turns it off, also in what it saves
        self.interval = chosen_interval(settings, self.steps)
        sizes = weight_sizes(job.model.parameters())
        self.memory = MemoryReport(
            *sizes, shards=weight_sizes(shards_of(job.model)) if settings.fsdp else None
        )
        with ranks.agreed():
            self.optimizer = build_optimizer(job.model, settings, self.interval, ranks)
        self.chunk_optimizer = self.optimizer if isinstance(self.optimizer, chunkft.ChunkOptimizer) else None
        self.metrics = Metrics(directory.metrics if ranks.first else Path(os.devnull), device)
        self.stop = SharedStop() if ranks.launched else GracefulStop()
        with ranks.agreed():
            directory.make()  # before Trainer does, which does not know --out
        self.trainer = self._trainer()

    def _newest_checkpoint(self) -> Path | None:
        """The one that rank 0 sees; it alone clears away what a killed run left."""
        found: Path | None = None
        with self.ranks.agreed():
            if self.ranks.first:
                found = last_checkpoint(self.directory.checkpoints)
        found = self.ranks.of_first(found)
        with self.ranks.agreed():
            if found is not None and not found.is_dir():
                raise UserError(f"--out {self.directory.path}: rank {self.ranks.rank} does not see {found}")
        return found

    def _total_steps(self) -> int:
        settings = self.settings
        if settings.steps is not None:
            steps = settings.steps
        else:
            batches = math.ceil(len(self.job.train) / self.global_batch)
            steps = math.ceil((settings.epochs or 1.0) * math.ceil(batches / settings.grad_accum))
        if steps < self.resumed_at:
            raise UserError(
                f"--steps {steps}: the checkpoint to resume from is already at step {self.resumed_at}"
            )
        return steps

    def _arguments(self) -> TrainingArguments:
        settings = self.settings
        schedule = settings.lr_schedule
        if schedule == "constant" and settings.warmup:
            schedule = "constant_with_warmup"
        arguments = TrainingArguments(
            output_dir=str(self.directory.checkpoints),
            max_steps=self.steps,
            per_device_train_batch_size=self.global_batch,  # of which RankRows gives a share
            per_device_eval_batch_size=self.global_batch,
            gradient_accumulation_steps=settings.grad_accum,
            learning_rate=settings.lr,
            lr_scheduler_type=schedule,
            warmup_steps=settings.warmup,
            weight_decay=settings.weight_decay,
            max_grad_norm=0.0
            if self.ranks.launched and self.chunk_optimizer is not None
            else settings.clip_norm,
            logging_strategy="steps",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=settings.save_every,
            save_total_limit=KEPT_CHECKPOINTS,
            eval_strategy="no" if self.job.evaluation is None else "steps",
            eval_steps=settings.eval_every or self.steps,
            eval_on_start=self.job.evaluation is not None and self.checkpoint is None,
            seed=settings.seed,
            data_seed=settings.seed,
            use_cpu=self.device.type == "cpu",
            dataloader_pin_memory=self.device.type == "cuda",
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
            log_level="error",
        )
        arguments._n_gpu = min(
            arguments.n_gpu, 1
        )  # several GPUs would make Trainer wrap the model in DataParallel
        return arguments

    def _trainer(self) -> FinetuneTrainer:
        judged = self.job.compute_metrics is not None
        callbacks: list[Any] = [self.stop, NonFiniteGuard(), self.metrics]
        if not self.settings.quiet and self.ranks.first:
            chunks = len(self.chunk_optimizer.plan) if self.chunk_optimizer else None
            callbacks.append(Progress(self.metrics, chunks))
        arguments = self._arguments()
        arguments.prediction_loss_only = not judged
        kind: Callable[..., FinetuneTrainer] = FinetuneTrainer
        if isinstance(self.stop, SharedStop):
            kind = partial(SharedTrainer, ranks=self.ranks, stop=self.stop)
        trainer = kind(
            metrics=self.metrics,
            model=self.job.model,
            args=arguments,
            train_dataset=self.job.train,
            eval_dataset=self.job.evaluation,
            data_collator=self.job.collator,
            processing_class=self.job.tokenizer,
            compute_metrics=self.job.compute_metrics,
            preprocess_logits_for_metrics=prefer_class if judged else None,
            callbacks=callbacks,
            optimizers=(self.optimizer, None),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def introduce(self) -> None:
        """Prints what is about to happen."""
        if not self.ranks.first:
            return
        model, settings = self.job.model, self.settings
        count = sum(weight.numel() for weight in model.parameters())
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        print(
            f"chunkft {chunkft.__version__}  {self.job.name}: {count:,} parameters, {dtype}, on {self.device}"
        )
        for line in [*map(str, self.job.reports), *self.job.notes, *self._about_ranks()]:
            print(f"  {line}")
        if self.chunk_optimizer is None:
            print(f"  all parameters at every one of {self.steps:,} steps")
        else:
            chunks = len(self.chunk_optimizer.plan)
            sweeps = self.steps / (chunks * self.interval)
            print(
                f"  {chunks} chunks ({settings.partition}), the next one every {self.interval}"
                f" steps ({settings.schedule}):"
                f" {sweeps:.1f} sweeps in {self.steps:,} steps"
            )
            if sweeps < 1:
                print(
                    f"  note: only {math.ceil(sweeps * chunks)} of {chunks} chunks will be trained;"
                    f" lower --interval or --chunks"
                )
        if self.checkpoint is not None:
            print(f"  resuming at step {self.resumed_at} from {self.checkpoint}")
        print(f"  out: {self.directory.path}", flush=True)

    def _about_ranks(self) -> list[str]:
        world, settings = self.ranks.world, self.settings
        lines = []
        if self.ranks.several:
            kind = "shards of the weights" if settings.fsdp else "replicas"
            lines.append(
                f"{world} processes ({kind}): a step learns from {world} x {settings.batch_size} x"
                f" {settings.grad_accum} = {self.global_batch * settings.grad_accum:,} sequences"
            )
        if self.checkpoint is not None and self.processes_before not in (None, world):
            lines.append(
                f"note: the run was on {self.processes_before} processes, and is on {world} now: its global batch and"
                " the order of its data change here"
            )
        return lines

    def train(self) -> bool:
        """Trains to the end or until a signal; returns whether the end was reached."""
        with self.ranks.agreed():
            if self.ranks.first:
                self.directory.record(self.settings)
                trim_metrics(self.directory.metrics, -1 if self.checkpoint is None else self.resumed_at)
        if self.ranks.rank:
            torch.manual_seed(
                self.settings.seed + self.ranks.rank
            )  # dropout of its own; rows have their order
        if self.checkpoint is not None and self.resumed_at == self.steps:
            self.trainer._load_from_checkpoint(str(self.checkpoint))
            return True
        with self.metrics.open(), self.stop.listening():
            self.trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        return self.stop.received is None or self.trainer.state.global_step >= self.steps

    def carry_out(self) -> int:
        """Trains, saves, reports; returns the exit status."""
        try:
            self.introduce()
            if not self.train():
                return self.stopped()
            self.save()
            self.summarise()
            return 0
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Gives up the pages, or the file, of weights that stream."""
        stream = stream_of(self.job.model)
        if stream is not None:
            stream.detach()

    def stopped(self) -> int:
        """Says how to go on after a signal, and returns the exit status that shells expect for it."""
        assert self.stop.received is not None
        step = self.trainer.state.global_step
        if self.ranks.first:
            command = self.directory.resume_command(self.ranks.world)
            print(f"\nstopped at step {step}/{self.steps}; go on with: {command}", flush=True)
        return 128 + signal.Signals(self.stop.received).value

    def save(self) -> None:
        """Takes the chunk operators out of the model, and writes it with its picture and memory table."""
        trainer = self.trainer
        if self.chunk_optimizer is None:
            self.memory.full["saved activations"] = trainer.saved_peak
            self.memory.observe_full()
        else:
            self.memory.observe(self.chunk_optimizer.memory_report())
            self.chunk_optimizer.detach()
            # that of full training would need all weights on the device
            whole = self.settings.weights == "resident" and not self.settings.fsdp
            if trainer.peak_batch is not None and whole and self.ranks.first:
                full = activations_of_full_training(self.job.model, trainer.peak_batch)
                self.memory.full["saved activations"] = full
                self.memory.run["saved activations"] = trainer.saved_peak
        self._take_largest()
        self.job.model.config.use_cache = self.use_cache
        weights = whole_weights(self.job.model, self.ranks.first) if self.settings.fsdp else None
        with self.ranks.agreed():
            if self.ranks.first:
                self._write(weights)

    def _take_largest(self) -> None:
        """The memory of the rank that held most of each kind."""
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        own = (
            self.memory.held,
            self.memory.run,
            self.memory.host,
            self.memory.files,
            self.memory.new,
            peak_resident_bytes(),
            peak,
        )
        held, runs, hosts, files, new, processes, peaks = zip(*self.ranks.objects(own), strict=True)
        self.memory.held = max(held)
        for name in self.memory.run:
            self.memory.run[name] = max((run[name] for run in runs if run[name] is not None), default=None)
        self.memory.host, self.memory.files, self.memory.new = max(hosts), max(files), max(new)
        self.peak_process, self.peak_allocated = max(processes), max(peaks)

    def _write(self, weights: dict[str, torch.Tensor] | None) -> None:
        self.directory.save_model(self.job.model, self.job.tokenizer, self.memory.weights, weights)
        plot_loss(self.directory.metrics, self.directory.picture, self.job.name)
        report = self.memory.to_json() | {"device": str(self.device), "peak_process": self.peak_process}
        if self.device.type == "cuda":
            report["peak_allocated"] = self.peak_allocated
        if self.ranks.several:
            report["processes"] = self.ranks.world
        write_json(self.directory.memory, report)

    def summarise(self, *lines: str) -> None:
        """Prints the memory table, `lines`, and where everything is."""
        if not self.ranks.first:
            return
        records = [record for record in read_metrics(self.directory.metrics) if "loss" in record]
        window = max(len(records) // 20, 1)
        first, last = (
            sum(r["loss"] for r in part) / len(part) for part in (records[:window], records[-window:])
        )
        seconds = sum(record["step_seconds"] for record in records)
        print()
        for line in lines:
            print(line)
        print(
            f"loss {first:.4f} -> {last:.4f} in {len(records):,} steps, {seconds:.1f} s"
            f" ({seconds / len(records) * 1e3:.0f} ms a step)"
        )
        if self.chunk_optimizer is not None and self.chunk_optimizer.skipped:
            print(
                f"{self.chunk_optimizer.skipped} steps were skipped because their gradients were not finite"
            )
        print()
        print(table(self.memory.rows()))
        largest = "the largest process" if self.ranks.several else "the process"
        print(f"\npeak memory of {largest}: {human_bytes(self.peak_process)}")
        print(f"model, metrics.jsonl, loss.png, memory.json: {self.directory.path}", flush=True)
