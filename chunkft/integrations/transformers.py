"""Chunk optimizers in transformers' Trainer: a factory, a callback, complete-or-absent checkpoints, clean stops."""

import contextlib
import os
import signal
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from chunkft.attach import attach
from chunkft.autograd import compilable
from chunkft.integrations.checkpoints import clean_up, complete_checkpoints, publish, rotate, staging, writing
from chunkft.optim import ChunkAdamW, ChunkOptimizer, load_checkpoint, save_checkpoint

__all__ = [
    "ChunkAdamWFactory",
    "ChunkCallback",
    "ChunkTrainer",
    "GracefulStop",
    "NonFiniteGuard",
    "last_checkpoint",
    "unwrap_optimizer",
]

OPTIMIZER_FILE = "optimizer.safetensors"
SCHEDULER_FILE = "scheduler.pt"
STATE_FILE = "trainer_state.json"


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, or the optimizer itself."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def last_checkpoint(root: str | Path) -> Path | None:
    """The newest complete checkpoint under `root`, after removing what a killed run left half-written; None
    if none.
    """
    clean_up(root)
    found = complete_checkpoints(root)
    return found[-1] if found else None


class ChunkAdamWFactory:
    """For `Trainer(optimizer_cls_and_kwargs=(ChunkAdamWFactory, {"lr": ..., "chunks": ...}))`.

    The keywords are those of `ChunkAdamW`; Trainer passes no learning rate of its own. `weight_decay` counts for the
    parameters that Trainer decays, which are neither biases nor of norms. Raises what `ChunkAdamW` raises; the model is
    left as it was.
    """

    def __call__(self, model: torch.nn.Module, **kwargs: Any) -> ChunkAdamW:
        """The optimizer of a model."""
        decayed = set(Trainer.get_decay_parameter_names(None, model))
        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [weight for name, weight in trained if name in decayed]},
            {"params": [weight for name, weight in trained if name not in decayed], "weight_decay": 0.0},
        ]
        known = "_chunkft" in model.__dict__
        attachment = attach(model)
        try:
            return ChunkAdamW([group for group in groups if group["params"]], **kwargs)
        except BaseException:
            if not known:
                attachment.detach()
            raise


class ChunkCallback(TrainerCallback):
    """Adds `chunk` and `sweep` of the last step to what Trainer logs, and prepares the model for `torch_compile`.

    Raises ValueError when training begins with `update="backward"` and what it cannot do: `max_grad_norm` or
    `gradient_accumulation_steps` above 1.
    """

    def __init__(self) -> None:
        self._trained: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the arguments; with `torch_compile`, gives every module a forward that stays the same."""
        optimizer = unwrap_optimizer(kwargs["optimizer"])
        if not isinstance(optimizer, ChunkOptimizer):
            return
        backward = optimizer.updates_in_backward
        for name, value, allowed in (
            ("max_grad_norm", args.max_grad_norm, 0),
            ("gradient_accumulation_steps", args.gradient_accumulation_steps, 1),
        ):
            if backward and value > allowed:
                raise ValueError(
                    f"TrainingArguments({name}={value}) cannot be combined with update='backward', which uses each"
                    f" gradient up in the backward pass: set it to {allowed}, or use update='step'"
                )
        if args.torch_compile:
            compilable(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes which chunk the step trains."""
        optimizer = unwrap_optimizer(kwargs["optimizer"])
        if isinstance(optimizer, ChunkOptimizer):
            self._trained = {"chunk": optimizer.active, "sweep": optimizer.sweep}

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds to the logs of training steps, and to the history that Trainer saves."""
        logs = kwargs["logs"]
        if "loss" in logs:
            logs.update(self._trained)
            state.log_history[-1].update(self._trained)


class ChunkTrainer(Trainer):
    """A Trainer whose checkpoints are complete or absent, and whose optimizer may be a ChunkOptimizer.

    Pass `optimizers=(ChunkAdamW(model), None)`. Clipping, logging and resuming work in Trainer itself too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._staged: Path | None = None

    @property
    def chunk_optimizer(self) -> ChunkOptimizer | None:
        """The ChunkOptimizer that trains the model, or None for another optimizer."""
        inner = unwrap_optimizer(self.optimizer)
        return inner if isinstance(inner, ChunkOptimizer) else None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as Trainer does; `resume_from_checkpoint=True` takes the newest complete checkpoint."""
        clean_up(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        if self._staged is not None:
            return str(self._staged)
        return str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        root = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        root.mkdir(parents=True, exist_ok=True)
        with staging(root, name) as aside, writing(root / name, aside, self._checkpoint_bytes()):
            self._staged = aside
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staged = None
            self._correct_best_path(aside / name, root / name)
            publish(aside / name, root / name)
        best = self.state.best_model_checkpoint
        rotate(root, self.args.save_total_limit, Path(best) if best else None)

    def _correct_best_path(self, staged: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(staged / STATE_FILE))

    def _checkpoint_bytes(self) -> int:
        weights: int = sum(value.numel() * value.element_size() for value in self.model.state_dict().values())
        optimizer = self.chunk_optimizer
        if optimizer is None:
            trained: int = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
            return weights + 8 * trained
        memory: dict[str, int] = optimizer.memory()
        return weights + max(memory["state_host"], memory["state_active"] + memory["master_active"])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = self.chunk_optimizer
        if optimizer is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_checkpoint(optimizer, os.path.join(output_dir, OPTIMIZER_FILE))
        torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Trainer loads with strict=False, which leaves a family whose saved names differ at its initial
        # weights.
        model = self.model if model is None else model
        if not isinstance(model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        stored = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(stored.state_dict(), strict=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = self.chunk_optimizer
        if optimizer is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_checkpoint(optimizer, os.path.join(checkpoint, OPTIMIZER_FILE))
        scheduler = torch.load(os.path.join(checkpoint, SCHEDULER_FILE), weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)


class GracefulStop(TrainerCallback):
    """On SIGINT or SIGTERM: finishes the optimizer step, saves a checkpoint, stops. A second signal stops at
    once.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator["GracefulStop"]:
        """Handles both signals inside the block (main thread only) and puts the former handlers back."""
        former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in former:
            signal.signal(number, self._on_signal)
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Asks Trainer to save and stop once a signal has come."""
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True
        return control


class NonFiniteGuard(TrainerCallback):
    """Raises FloatingPointError after `limit` optimizer steps in a row whose gradients were not finite."""

    def __init__(self, limit: int = 10) -> None:
        self.limit = limit
        self._skipped = 0
        self._in_a_row = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compares the optimizer's count of skipped steps with the one before."""
        optimizer = unwrap_optimizer(kwargs["optimizer"])
        if not isinstance(optimizer, ChunkOptimizer):
            return
        skipped = optimizer.skipped
        self._in_a_row = self._in_a_row + 1 if skipped > self._skipped else 0
        self._skipped = skipped
        if self._in_a_row >= self.limit:
            raise FloatingPointError(
                f"the gradients of the last {self._in_a_row} steps were not finite (step"
                f" {state.global_step}):"
                " a smaller learning rate, or fp32 weights, may help"
            )
