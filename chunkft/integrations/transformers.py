"""Chunk optimizers in transformers' Trainer: a factory, a callback, complete-or-absent checkpoints, clean stops."""

import contextlib
import os
import signal
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import save_fsdp_model
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from chunkft.autograd import compilable
from chunkft.integrations.accelerate import PreparedChunkAdamW, unwrap_optimizer
from chunkft.integrations.checkpoints import (
    clean_up,
    complete_checkpoints,
    publish,
    rotate,
    staging,
    writing,
)
from chunkft.optim import ChunkAdamW, ChunkOptimizer, load_checkpoint, save_checkpoint
from chunkft.optim.together import Gather, shared, together

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

_saved_by_us: weakref.WeakSet[ChunkOptimizer] = weakref.WeakSet()  # those of a ChunkTrainer


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
    parameters that Trainer decays, which are neither biases nor of norms. Where Trainer shards the model (`fsdp=True`,
    version 2) the optimizer is built of the shards. Raises what `ChunkAdamW` raises, and ValueError for FSDP1 and
    DeepSpeed; the model is left as it was.
    """

    def __call__(self, model: torch.nn.Module, **kwargs: Any) -> ChunkAdamW:
        """The optimizer of a model."""
        decayed = set(Trainer.get_decay_parameter_names(None, model))
        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [weight for name, weight in trained if name in decayed]},
            {"params": [weight for name, weight in trained if name not in decayed], "weight_decay": 0.0},
        ]
        return PreparedChunkAdamW(model, [group for group in groups if group["params"]], **kwargs)


class ChunkCallback(TrainerCallback):
    """Adds `chunk` and `sweep` of the last step to what Trainer logs, and prepares the model for `torch_compile`.

    Raises ValueError when training begins with `update="backward"` and what it cannot do: `max_grad_norm` or
    `gradient_accumulation_steps` above 1; and with checkpoints of state that ranks divide, which `ChunkTrainer` writes.
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
        saves = args.save_strategy != "no" and not args.save_only_model
        if saves and optimizer.is_divided and optimizer not in _saved_by_us:
            raise ValueError(
                f"TrainingArguments(save_strategy={args.save_strategy.value!r}) cannot be used by Trainer itself with"
                " state that ranks have parts of: use chunkft.integrations.transformers.ChunkTrainer,"
                " save_only_model=True, or save_strategy='no'"
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

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer does."""
        made = super().create_optimizer(*args, **kwargs)
        if self.chunk_optimizer is not None:
            _saved_by_us.add(self.chunk_optimizer)
        return made

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as Trainer does; `resume_from_checkpoint=True` takes the newest complete checkpoint."""
        self._by_first(lambda: clean_up(self.args.output_dir))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves as Trainer does; what fails on one rank is raised on all."""
        parent = super().save_model
        self._together(lambda: parent(output_dir, _internal_call))

    def _get_output_dir(self, trial: Any) -> str:
        if self._staged is not None:
            return str(self._staged)
        return str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        root = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        parent = super()._save_checkpoint
        with contextlib.ExitStack() as held:

            def begin() -> Path:
                root.mkdir(parents=True, exist_ok=True)
                return held.enter_context(staging(root, name))

            aside = self._by_first(begin)

            def write() -> None:
                if not aside.is_dir():
                    raise FileNotFoundError(
                        f"{aside}, which rank 0 made, is not there: all ranks need to share output_dir={str(root)!r}"
                    )
                with writing(root / name, aside, self._checkpoint_bytes()):
                    parent(model, trial)

            self._staged = aside
            try:
                self._together(write)
            finally:
                self._staged = None
            self._correct_best_path(aside / name, root / name)
            self._by_first(lambda: publish(aside / name, root / name))
        best = self.state.best_model_checkpoint
        self._by_first(lambda: rotate(root, self.args.save_total_limit, Path(best) if best else None))

    def _by_first(self, action: Callable[[], Any]) -> Any:
        """What rank 0 does while the others wait: its result, or its error, on all."""
        first = self.args.process_index == 0
        gathers = self._gathers()
        return shared(
            gathers, together(gathers, self.args.process_index, lambda: action() if first else None)
        )

    def _together(self, action: Callable[[], None]) -> None:
        """What all ranks do; they end together, and what one raises is an error of all."""
        together(self._gathers(), self.args.process_index, action)

    def _gathers(self) -> list[Gather]:
        if self.args.world_size == 1:
            return []

        def gather(value: Any) -> list[Any]:
            found: list[Any] = [None] * self.args.world_size
            dist.all_gather_object(found, value)
            return found

        return [gather]

    def _correct_best_path(self, staged: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
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
        if self.is_fsdp_enabled:
            self._together(
                lambda: save_fsdp_model(
                    self.accelerator.state.fsdp_plugin,
                    self.accelerator,
                    self.model,
                    output_dir,
                    adapter_only=True,
                )
            )
        if optimizer.is_divided or self.args.should_save:
            save_checkpoint(optimizer, os.path.join(output_dir, OPTIMIZER_FILE))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Trainer loads with strict=False, which leaves a family whose saved names differ at its initial
        # weights.
        model = self.model if model is None else model
        if self.is_fsdp_enabled or not isinstance(model, PreTrainedModel):
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
