"""Training runs by Accelerate and by transformers' Trainer, whose FSDP2 is made to shard on a CPU.

Accelerate shards where it finds GPUs. The runs tell it that there are some, and that its device is the CPU; all of its
other steps are as they would be.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import rigs
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from rigs import Case, Trained
from tiny_transformers import VOCABULARY
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

import chunkft
from chunkft.integrations.accelerate import PreparedChunkAdamW, load_state, save_state
from chunkft.integrations.transformers import ChunkAdamWFactory, ChunkCallback, ChunkTrainer

KEYWORDS = {"lr": 2e-3, "betas": (0.9, 0.99), "weight_decay": 0.05, "chunks": 4, "interval": 2, "seed": 3}
DATA = torch.randint(3, VOCABULARY, (48, 7), generator=torch.Generator().manual_seed(3))
SHARED = {
    "max_grad_norm": 0.5,
    "max_steps": 10,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}
SHARED |= {
    "save_strategy": "no",
    "use_cpu": True,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "linear",
}


@contextmanager
def launched(group: Any) -> Iterator[None]:
    """The environment of a process that torchrun started, and no state of an accelerator before."""
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):  # plugins leave variables there
        if group.size() > 1:
            for name in ("RANK", "LOCAL_RANK"):
                patch.setenv(name, str(dist.get_rank(group)))
            for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                patch.setenv(name, str(group.size()))
            patch.setenv("MASTER_ADDR", "localhost")  # asked for, though the processes are joined already
            patch.setenv("MASTER_PORT", "0")
        else:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                patch.delenv(name, raising=False)
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def pretend_gpus() -> None:
    """Let accelerate shard on the CPU."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def accelerator_of(plugin: dict[str, Any] | None, **options: Any) -> Accelerator:
    """An accelerator that shards by FSDP2, or by DDP if there are no options of a plugin."""
    if plugin is None:
        return Accelerator(cpu=True, **options)
    pretend_gpus()
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **plugin})
    return Accelerator(cpu=True, fsdp_plugin=plugin, **options)


def train_accelerated(
    group: Any,
    case: Case,
    plugin: dict[str, Any] | None,
    precision: str = "no",
    place: str | None = None,
    steps: tuple[int, int] | None = None,
) -> Trained:
    """One rank of several.

    Args:
        group: of all processes.
        case: which run.
        plugin: options of FSDP2's, or None for DistributedDataParallel.
        precision: of accelerate.
        place: a directory, to which the state goes after the last of ``steps``, or from which the rest begins.
        steps: first and one past the last, of all steps of the case.
    """
    first, last = steps or (0, case.steps)
    with launched(group):
        accelerator = accelerator_of(
            plugin, gradient_accumulation_steps=case.accumulate, mixed_precision=precision
        )
        model = case.model()
        keywords = {name: value for name, value in case.keywords().items() if name != "max_grad_norm"}
        optimizer: Any = PreparedChunkAdamW(model, **keywords)
        model, optimizer = accelerator.prepare(model, optimizer)
        if first:
            load_state(accelerator, place)
        losses, norms = _loop(case, accelerator, model, optimizer, range(first, last))
        if place is not None and not first:
            save_state(accelerator, place)
        inner = optimizer.optimizer
        counts = inner.updates, inner.skipped, inner.active
        return Trained(losses, norms, rigs.digest(model), *counts, inner.plan.to_dict())


def _loop(
    case: Case, accelerator: Accelerator, model: Any, optimizer: Any, steps: range
) -> tuple[list[float], list[float]]:
    losses, norms = [], []
    for step in steps:
        total = 0.0
        for part in range(case.accumulate):
            with accelerator.accumulate(model):
                batch = rigs.batch_of(case, step, part, accelerator.process_index, accelerator.num_processes)
                loss = model(**batch).loss
                total += loss.item() / case.accumulate
                accelerator.backward(loss)
                if accelerator.sync_gradients and case.clip is not None:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), case.clip)))
                optimizer.step()
                optimizer.zero_grad()
        losses.append(total)
    return losses, norms


def train_sharded_bf16(group: Any, case: Case) -> Trained:
    """The same by hand: ``fully_shard`` with the dtypes that accelerate gives it, and its autocast."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    model = rigs.sharded(case.model(), group, mp_policy=policy)
    optimizer = chunkft.ChunkAdamW(model, **case.keywords())
    losses, norms = [], []
    for step in range(case.steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**rigs.batch_of(case, step, 0, dist.get_rank(group), group.size())).loss
        losses.append(loss.float().item())
        loss.float().backward()
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
    counts = optimizer.updates, optimizer.skipped, optimizer.active
    return Trained(losses, norms, rigs.digest(model), *counts, optimizer.plan.to_dict())


def scheduled(group: Any) -> list[float]:
    """Learning rates of the steps, by a scheduler that was made before anything was sharded."""
    case = Case("llama", 2, 4)
    with launched(group):
        accelerator = accelerator_of({}, step_scheduler_with_optimizer=False)
        model = case.model()
        optimizer: Any = PreparedChunkAdamW(model, lr=1.0, chunks=4)
        calls: list[Any] = []
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=4)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        rates = []
        for step in range(5):
            accelerator.backward(model(**rigs.batch_of(case, step, 0, accelerator.process_index, 2)).loss)
            rates.append(optimizer.optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert len(calls) == 5
        return rates


def refused(group: Any, what: str, place: str) -> str:
    """What is said to something that cannot be."""
    with launched(group), pytest.raises((RuntimeError, ValueError, AttributeError)) as error:
        _refused(group, what, place)
    return str(error.value)


def _refused(group: Any, what: str, place: str) -> None:
    case = Case("llama", 2, 4)
    accelerator = accelerator_of({"fsdp_version": 1 if what == "fsdp1" else 2})
    model = case.model()
    optimizer: Any = PreparedChunkAdamW(model, chunks=4)
    if what == "early":
        optimizer.step()
    model, optimizer = accelerator.prepare(model, optimizer)
    loss = model(**rigs.batch_of(case, 0, 0, dist.get_rank(group), group.size())).loss
    accelerator.backward(loss)
    optimizer.step()
    before = rigs.digest(model), optimizer.optimizer.updates, optimizer.param_groups[0]["lr"]
    try:
        accelerator.save_state(place)
    finally:
        after = rigs.digest(model), optimizer.optimizer.updates, optimizer.param_groups[0]["lr"]
        assert after == before
        assert all(leaf.grad is None for _, leaf in optimizer.optimizer.active_parameters())


def _trainer(
    place: str, family: str, plan: dict[str, Any] | None, rows: int, kind: type[Trainer], **changes: Any
) -> Trainer:
    args = TrainingArguments(place, **{**SHARED, "per_device_train_batch_size": rows, **changes})
    if args.fsdp:
        pretend_gpus()
    model = Case(family, 1, 1).model()
    keywords = dict(KEYWORDS)
    if plan is not None:
        keywords["partition"] = rigs.for_one_process(chunkft.ChunkPlan.from_dict(plan), model)
    return kind(
        model=model,
        args=args,
        train_dataset=[{"input_ids": row, "labels": row} for row in DATA],
        optimizer_cls_and_kwargs=(ChunkAdamWFactory, keywords),
        callbacks=[ChunkCallback()],
    )


def train_by_trainer(
    group: Any,
    place: str,
    family: str = "llama",
    plan: dict[str, Any] | None = None,
    rows: int = 2,
    resume: str | None = None,
    kind: type[Trainer] = Trainer,
    **changes: Any,
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], dict[str, Any], int]:
    """Logs of the steps, the weights at the end, the plan, and the number of groups of parameters."""
    with launched(group):
        trainer = _trainer(place, family, plan, rows, kind, **changes)
        trainer.train(resume_from_checkpoint=resume)
        weights = {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
            for name, value in trainer.model.state_dict().items()
        }
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        optimizer = trainer.optimizer.optimizer
        return logs, weights, optimizer.plan.to_dict(), len(optimizer.param_groups)


def refused_by_trainer(group: Any, place: str, **changes: Any) -> str:
    """What is said to arguments that cannot be."""
    with launched(group), pytest.raises((RuntimeError, ValueError)) as error:
        train_by_trainer(group, place, **changes)
    return str(error.value)


def fail_to_save(group: Any, place: str) -> tuple[str, list[str]]:
    """What is said on this rank, with notes, if the last one cannot write its part of a checkpoint."""

    def save_rng_state(trainer: Trainer, folder: str) -> None:
        if trainer.args.process_index == 1:
            raise OSError("no space left")

    with mock.patch.object(Trainer, "_save_rng_state", save_rng_state):
        options = {"kind": ChunkTrainer, "fsdp": True, "save_strategy": "steps", "save_steps": 3}
        with pytest.raises(OSError, match="no space left") as error:
            train_by_trainer(group, place, **options)
    return str(error.value), list(getattr(error.value, "__notes__", ()))
