"""Puts together what is trained: model, tokenizer, data, and the optimizer; everything that may be wrong with
them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from typing import Any

import torch

import chunkft
from chunkft.cli.data import (
    Collator,
    DataReport,
    causal_dataset,
    classification_dataset,
    label_map,
    label_names,
)
from chunkft.cli.errors import UserError
from chunkft.cli.fsdp import shard
from chunkft.cli.models import (
    Place,
    check_positions,
    config_of,
    enable_gradient_checkpointing,
    fit_embeddings,
    load_causal,
    load_classifier,
    load_tokenizer,
    longest_sequence,
    pad_token,
    resolve_dtype,
)
from chunkft.cli.ranks import Ranks
from chunkft.cli.settings import FinetuneSettings

__all__ = [
    "Job",
    "build_optimizer",
    "chosen_interval",
    "classification_metrics",
    "load_job",
    "matthews",
    "patterns_of",
    "place_of",
    "prefer_class",
]

SWEEPS_WANTED = 8
LONGEST_INTERVAL = 50


@dataclass
class Job:
    """A model with its tokenizer, tokenised data, and how to judge it."""

    name: str
    model: Any
    tokenizer: Any
    train: Any
    collator: Collator
    evaluation: Any = None
    compute_metrics: Callable[[Any], dict[str, float]] | None = None
    reports: list[DataReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_job(settings: FinetuneSettings, device: torch.device) -> Job:
    """Loads and checks what `settings` names; raises UserError for what cannot be trained.

    A model that is to be sharded is loaded into host memory, from where its blocks come to `device` one by one.
    """
    target = device
    device = torch.device("cpu") if settings.fsdp else target
    assert settings.model is not None
    assert settings.data is not None
    config = config_of(settings.model)
    longest = longest_sequence(config)
    if longest is not None and settings.seq_len > longest:
        raise UserError(
            f"--seq-len {settings.seq_len}: {settings.model} was made for at most {longest} tokens"
        )
    tokenizer = load_tokenizer(settings.model)
    dtype = resolve_dtype(settings.dtype, config, target)
    pad = pad_token(tokenizer, config)
    if settings.task == "causal-lm":
        job = _causal_job(settings, tokenizer, dtype, device, pad)
    else:
        job = _classification_job(settings, config, tokenizer, dtype, device, pad)
    check_positions(job.model, settings.model, settings.seq_len)
    largest = max(report.largest for report in job.reports)
    torch.manual_seed(settings.seed)  # new rows are drawn at random
    note = fit_embeddings(job.model, settings.model, len(tokenizer), largest, pad, settings.resize_embeddings)
    if note is not None:
        job.notes.append(note)
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(job.model)
    if settings.fsdp:
        shard(job.model, target, adds_up=settings.optimizer == "adamw" or settings.grad_accum > 1)
    return job


def _causal_job(
    settings: FinetuneSettings, tokenizer: Any, dtype: torch.dtype, device: torch.device, pad: int
) -> Job:
    assert settings.model is not None
    assert settings.data is not None
    train, report = causal_dataset(settings.data, tokenizer, settings.seq_len)
    reports = [report]
    evaluation = None
    if settings.eval_data is not None:
        evaluation, report = causal_dataset(settings.eval_data, tokenizer, settings.seq_len)
        reports.append(report)
    model = load_causal(settings.model, dtype, device, place_of(settings, device))
    return Job(
        settings.model, model, tokenizer, train, Collator(pad, settings.seq_len), evaluation, reports=reports
    )


def _classification_job(
    settings: FinetuneSettings,
    config: Any,
    tokenizer: Any,
    dtype: torch.dtype,
    device: torch.device,
    pad: int,
) -> Job:
    assert settings.model is not None
    assert settings.data is not None
    columns = (settings.text_column, settings.label_column)
    names = label_names(settings.data, *columns)
    trained = "ForSequenceClassification" in "".join(getattr(config, "architectures", None) or [])
    labels = label_map(names, config.label2id if trained else None)
    train, report = classification_dataset(settings.data, tokenizer, settings.seq_len, labels, *columns)
    reports = [report]
    evaluation = None
    if settings.eval_data is not None:
        evaluation, report = classification_dataset(
            settings.eval_data, tokenizer, settings.seq_len, labels, *columns
        )
        reports.append(report)
    torch.manual_seed(settings.seed)
    model, new_head = load_classifier(settings.model, dtype, device, labels, pad, place_of(settings, device))
    notes = [f"labels: {', '.join(labels)}"]
    if new_head:
        notes.append("the classification head is new (random)")
    collator = Collator(pad, settings.seq_len, left=tokenizer.padding_side == "left")
    metrics = partial(classification_metrics, classes=len(labels))
    return Job(settings.model, model, tokenizer, train, collator, evaluation, metrics, reports, notes)


def place_of(settings: FinetuneSettings, device: torch.device) -> Place | None:
    """What gives the weights of a model their place while it is loaded; None: they go to the device as a whole.

    Raises UserError if there is no place.
    """
    if settings.weights != "stream":
        return None

    def place(model: torch.nn.Module) -> chunkft.WeightStream:
        try:
            return chunkft.WeightStream(
                model,
                device=device,
                resident_blocks=settings.resident_blocks,
                weights_dir=settings.weights_dir,
                offload_inputs=settings.offload_inputs,
            )
        except ValueError as error:
            raise UserError(f"--weights stream: {error}") from error
        except OSError as error:
            raise UserError(f"--weights stream: there is no place for the weights: {error}") from error

    return place


def prefer_class(logits: Any, labels: Any) -> torch.Tensor:
    """Reduces logits (batch, classes) to the preferred class, so that evaluation keeps no logits."""
    scores: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
    return scores.argmax(dim=-1)


def classification_metrics(prediction: Any, classes: int) -> dict[str, float]:
    """Accuracy of the preferred classes, 0 to 1; of two classes also `matthews`, their correlation with the labels.

    Accuracy is high where one class is frequent and always preferred; Matthews' coefficient (Biochim. Biophys. Acta
    405, 1975), -1 to 1, is 0 then.
    """
    preferred, labels = prediction.predictions, prediction.label_ids
    metrics = {"accuracy": float((preferred == labels).mean())}
    if classes == 2:
        metrics["matthews"] = matthews(preferred, labels)
    return metrics


def matthews(preferred: Any, labels: Any) -> float:
    """Correlation of two arrays of 0 and 1; 0 if either is constant."""
    true_1, true_0 = (
        int(((preferred == 1) & (labels == 1)).sum()),
        int(((preferred == 0) & (labels == 0)).sum()),
    )
    false_1, false_0 = (
        int(((preferred == 1) & (labels == 0)).sum()),
        int(((preferred == 0) & (labels == 1)).sum()),
    )
    scale = (true_1 + false_1) * (true_1 + false_0) * (true_0 + false_1) * (true_0 + false_0)
    return (true_1 * true_0 - false_1 * false_0) / sqrt(scale) if scale else 0.0


def patterns_of(text: str, task: str) -> str | list[str] | None:
    """What --always-active means to chunkft: None, "head", or a list of name patterns."""
    if text == "auto":
        return "head" if task == "sequence-classification" else None
    if text in ("none", "head"):
        return None if text == "none" else "head"
    return [pattern.strip() for pattern in text.split(",") if pattern.strip()]


def chosen_interval(settings: FinetuneSettings, steps: int) -> int:
    """The interval asked for, or the longest of at most 50 steps that lets eight sweeps into the run."""
    if settings.interval is not None:
        return settings.interval
    return min(max(steps // (SWEEPS_WANTED * settings.chunks), 1), LONGEST_INTERVAL)


def _decay_groups(model: torch.nn.Module, decay: float) -> list[dict[str, Any]]:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.dim() >= 2], "weight_decay": decay},
        {"params": [weight for weight in weights if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: torch.nn.Module, settings: FinetuneSettings, interval: int, ranks: Ranks | None = None
) -> torch.optim.Optimizer:
    """Makes the optimizer; decay touches weights of two or more dimensions only.

    On several ranks it clips by itself, because only it knows the norm over all of them.

    Raises UserError for a value that the model does not allow, such as more chunks than rows, and if there is no place
    for its state.
    """
    decay = settings.weight_decay
    if settings.optimizer == "adamw":
        groups = _decay_groups(model, decay)
        return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=decay)
    try:
        if decay:
            chunkft.attach(model)
        return chunkft.ChunkAdamW(
            _decay_groups(model, decay) if decay else model,
            lr=settings.lr,
            weight_decay=decay,
            chunks=settings.chunks,
            interval=interval,
            partition=settings.partition,
            schedule=settings.schedule,
            slice_dim=settings.slice_dim,
            always_active=patterns_of(settings.always_active, settings.task),
            residency=settings.residency,
            update=settings.update,
            update_on=settings.update_on,
            page_bytes=settings.page_mib << 20,
            state_dir=settings.state_dir,
            state_bits=settings.state_bits,
            seed=settings.seed,
            **_of_ranks(settings, ranks),
        )
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"there is no place for the optimizer state: {error}") from error


def _of_ranks(settings: FinetuneSettings, ranks: Ranks | None) -> dict[str, Any]:
    if ranks is None or not ranks.launched:
        return {}
    options: dict[str, Any] = {"max_grad_norm": settings.clip_norm or None}
    if not settings.fsdp:  # a sharded model brings its group
        options["process_group"] = "default"
    return options
