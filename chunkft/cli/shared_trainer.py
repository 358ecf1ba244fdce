"""The trainer of `chunkft finetune` under torchrun: many processes that take the steps of one."""

import contextlib
import os
import signal
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from chunkft.cli.fsdp import load_whole, whole_weights
from chunkft.cli.progress import resident_bytes
from chunkft.cli.ranks import Ranks
from chunkft.cli.shares import targets_of
from chunkft.cli.trainer import FinetuneTrainer
from chunkft.integrations.transformers import GracefulStop
from chunkft.optim import save_checkpoint
from chunkft.parallel import is_sharded

__all__ = ["SharedStop", "SharedTrainer"]

ANOTHER_SIGNAL_AFTER = 1.0
MEETINGS = 2  # while a checkpoint is written: before and after what all ranks do together
RNG_FILE = "rng_state.pth"
OPTIMIZER_FILE = "optimizer.safetensors"
BASE_OPTIMIZER_FILE = "optimizer.pt"
SCHEDULER_FILE = "scheduler.pt"


class SharedStop(GracefulStop):
    """A stop that all ranks make at the end of the same step; the ranks ask each other in every step.

    torchrun passes a signal on to all, and some may get it twice: what comes within a second is one signal.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self._when = 0.0

    def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
        if not self.asked:
            self.asked, self._when = number, time.monotonic()
        elif time.monotonic() - self._when > ANOTHER_SIGNAL_AFTER:
            raise KeyboardInterrupt

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Leaves it to `agree`."""
        return control

    def agree(self, numbers: list[int], control: TrainerControl) -> None:
        """Stops after this step if any rank got a signal, which `numbers` has, or 0."""
        number = max(numbers)
        if number:
            self.received = signal.Signals(number)
            control.should_save = True
            control.should_training_stop = True


class SharedTrainer(FinetuneTrainer):
    """Trains a share of each global batch, and normalises the loss by the targets of all ranks and micro-batches.

    Trainer itself knows of one process, whose batch is the global one; the data set gives it this rank's share
    (`RankRows`). Rank 0 writes; the others wait until it is known that it could.
    """

    def __init__(self, *args: Any, ranks: Ranks, stop: SharedStop, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ranks = ranks
        self.stop = stop
        self.shards = is_sharded(self.model)
        self.measures = not self.shards
        takes_count = bool(getattr(self, "model_accepts_loss_kwargs", False))
        self._sums_loss = takes_count and self.compute_metrics is None
        self.model_accepts_loss_kwargs = True  # the loss is normalised here: Trainer must not divide it again
        self._told = 0
        self._met = 0
        self._rng: list[bytes] = []
        self._whole: dict[str, torch.Tensor] | None = None

    # loss and gradients

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """Shards are where they belong, and torch cannot move parameters that others refer to."""
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step, with the number of their targets on all ranks."""
        samples, _ = super().get_batch_samples(*args, **kwargs)
        count = torch.tensor([sum(map(targets_of, samples))], dtype=torch.float64)
        return samples, max(int(self.ranks.total(count)), 1)

    def _tokens(self, inputs: dict[str, Any]) -> int:
        return super()._tokens(inputs) if targets_of(inputs) else 0

    def _training_loss(
        self, model: Any, inputs: dict[str, Any], *args: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """World times this rank's part of the global mean, so that the mean over ranks is the global mean."""
        parent = super()._training_loss
        if self._sums_loss:
            loss = parent(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)
            return loss * self.ranks.world
        count = targets_of(inputs)
        loss, outputs = parent(model, inputs, return_outputs=True)
        if not count:
            return outputs["logits"].sum() * 0.0  # the mean over nothing is not a number
        return loss * (count * self.ranks.world / num_items_in_batch)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """A pass of Trainer; gradients of an optimizer that knows of no ranks are averaged after the last."""
        loss = super().training_step(*args, **kwargs)
        averaged = self.shards or self.chunk_optimizer is not None or not self.ranks.several
        if not averaged and self.accelerator.gradient_state.sync_gradients:
            for weight in self.model.parameters():
                if weight.requires_grad:
                    if weight.grad is None:
                        weight.grad = torch.zeros_like(weight)
                    torch.distributed.all_reduce(weight.grad)
                    weight.grad.div_(self.ranks.world)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return grad_norm  # never that of one rank

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any
    ) -> None:
        if self.state.global_step > self._told:
            self._told = self.state.global_step
            self._exchange(tr_loss)
            if self.chunk_optimizer is not None:
                grad_norm = self.chunk_optimizer.grad_norm
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _exchange(self, tr_loss: torch.Tensor) -> None:
        """One message a step: losses, stops, and what is shown of the slowest and largest rank."""
        metrics = self.metrics
        own = (
            float(tr_loss),
            float(self.stop.asked),
            metrics.last["step_seconds"],
            float(metrics.tokens),
            float(resident_bytes(metrics.device)),
        )
        losses, signals, seconds, tokens, held = zip(*self.ranks.table(own), strict=True)
        tr_loss.fill_(sum(losses) / self.ranks.world)
        metrics.last["step_seconds"] = max(seconds)
        metrics.tokens, metrics.held = int(sum(tokens)), int(max(held))
        self.stop.agree([int(number) for number in signals], self.control)

    # evaluation

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The loss and the metrics of one process with the global batch: batch means, weighted by their rows."""
        parts: list[tuple[float, float]] = []
        judged: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.model.eval()
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            with torch.no_grad():
                outputs = self.model(**inputs)
            count = targets_of(inputs)
            parts.append((float(outputs["loss"]) * count if count else 0.0, float(count)))
            if self.compute_metrics is not None and count:
                preferred = self.preprocess_logits_for_metrics(outputs["logits"], inputs["labels"])
                judged.append((preferred.cpu(), inputs["labels"].cpu()))
        sums = self.ranks.total(torch.tensor(parts, dtype=torch.float64))
        rows, batch_rows = len(dataloader.dataset), self.args.eval_batch_size
        weights = [min(batch_rows, rows - start) for start in range(0, rows, batch_rows)]
        losses = sums[:, 0] / sums[:, 1].clamp(min=1)
        loss = float((losses * torch.tensor(weights, dtype=torch.float64)).sum() / rows)
        metrics: dict[str, float] = {}
        if self.compute_metrics is not None:
            found = [part for of_rank in self.ranks.objects(judged) for part in of_rank]
            preferred = torch.cat([part[0] for part in found]).numpy()
            labels = torch.cat([part[1] for part in found]).numpy()
            metrics = dict(self.compute_metrics(EvalPrediction(predictions=preferred, label_ids=labels)))
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        named[f"{metric_key_prefix}_loss"] = loss
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=rows)

    # checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Rank 0 writes, all hand in their parts; an error of one is raised on all."""
        self._rng = self.ranks.objects(self._own_rng())
        self._whole = whole_weights(self.model, self.ranks.first) if self.shards else None
        self._met = 0
        error: Exception | None = None
        try:
            if self.ranks.first:
                super()._save_checkpoint(model, trial)
            else:
                self._save_optimizer("")
        except Exception as caught:
            error = caught
        finally:
            self._whole = None
            self._rng = []
        while self._met < MEETINGS:  # where the others wait
            with contextlib.suppress(Exception):
                self._meet(error)
        self.ranks.meet(error)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model of a checkpoint, as a whole."""
        if self._whole is None:
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir, state_dict=self._whole)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._save_optimizer(output_dir)
        torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_FILE))

    def _save_optimizer(self, output_dir: str) -> None:
        """What all ranks do together, once all know that rank 0 has written the model; they end together, too."""
        self._meet()
        error: Exception | None = None
        try:
            self._write_optimizer(self.ranks.of_first(output_dir))
        except Exception as caught:
            error = caught
        self._meet(error)

    def _meet(self, error: Exception | None = None) -> None:
        self._met += 1
        self.ranks.meet(error)

    def _write_optimizer(self, output_dir: str) -> None:
        optimizer = self.chunk_optimizer
        if optimizer is not None:
            save_checkpoint(optimizer, os.path.join(output_dir, OPTIMIZER_FILE))
            return
        if self.shards:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_optimizer_state_dict(self.model, self._base_optimizer(), options=options)
        else:
            state = self._base_optimizer().state_dict() if self.ranks.first else {}
        if self.ranks.first:
            torch.save(state, os.path.join(output_dir, BASE_OPTIMIZER_FILE))

    def _base_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _own_rng(self) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            super()._save_rng_state(folder)
            return (Path(folder) / RNG_FILE).read_bytes()

    def _save_rng_state(self, output_dir: str) -> None:
        for rank, state in enumerate(self._rng):
            (Path(output_dir) / rng_file(rank)).write_bytes(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The random state of this rank; a rank that the saved run did not have keeps its own."""
        file = Path(checkpoint or "") / rng_file(self.ranks.rank)
        if checkpoint is None or not file.is_file():
            return
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / RNG_FILE).write_bytes(file.read_bytes())
            super()._load_rng_state(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.shards:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        name = type(self.model).__name__.removeprefix("FSDP")
        family = next(kind for kind in type(self.model).__mro__ if kind.__name__ == name)
        stored: Any = family.from_pretrained(  # type: ignore[attr-defined]
            resume_from_checkpoint, dtype=next(self.model.parameters()).dtype
        )
        load_whole(self.model, stored.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.chunk_optimizer is not None or not self.shards or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        state = torch.load(os.path.join(checkpoint, BASE_OPTIMIZER_FILE), weights_only=True)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        set_optimizer_state_dict(self.model, self._base_optimizer(), state, options=options)
        self.lr_scheduler.load_state_dict(
            torch.load(os.path.join(checkpoint, SCHEDULER_FILE), weights_only=True)
        )


def rng_file(rank: int) -> str:
    """The file of a checkpoint with the random state of a rank; that of rank 0 is the one of a single process."""
    return RNG_FILE if rank == 0 else f"rng_state_{rank}.pth"
