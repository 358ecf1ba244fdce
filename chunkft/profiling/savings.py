"""What the peak would be with less of something: estimates from the measured bytes of every moment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from chunkft.autograd import Slice
from chunkft.kernels.linear_cross_entropy import chunk_size
from chunkft.optim import ChunkOptimizer
from chunkft.optim.backward import BackwardResidency
from chunkft.optim.forecast import gradient_peak, predict
from chunkft.optim.memory import DEFAULT_PAGE_BYTES
from chunkft.optim.paged import PagedStore
from chunkft.optim.pages import StateProbe, fitted, make_pages
from chunkft.optim.resident import ChunkResidency
from chunkft.partitions import block_prefixes, make_plan
from chunkft.plan import ChunkPlan
from chunkft.profiling.ledger import ACTIVATIONS, GRADIENTS, STATE, Block
from chunkft.profiling.timeline import Bytes, Timeline
from chunkft.streaming import file_tier_nbytes

__all__ = ["Saving", "Setting", "savings"]


@dataclass(frozen=True)
class Saving:
    """A way to lower the peak.

    Attributes:
        name: what to do.
        how: the keyword, option or function that does it, and what it costs.
        saved_bytes: by how much the measured peak would be lower.
        peak_bytes: what the peak would be.
    """

    name: str
    how: str
    saved_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Setting:
    """What was profiled.

    Attributes:
        model: the model.
        optimizer: its optimizer, or None if that is not one of chunkft.
        inputs: most bytes of the first input of each module.
        accumulation: backward passes for each optimizer step.
        checkpointed: whether activations are recomputed already.
        on_host: whether weights and state share the memory that is looked at.
    """

    model: nn.Module
    optimizer: ChunkOptimizer | None
    inputs: dict[str, int]
    accumulation: int
    checkpointed: bool
    on_host: bool


def savings(timeline: Timeline, setting: Setting, most: int = 3) -> list[Saving]:
    """The largest savings that are still possible, largest first.

    Each replaces the bytes of one part, at every moment of the measured run, by what they would be, and takes the
    maximum of the sum anew: what does not lower the peak because another moment is as high, saves nothing.
    """
    total = timeline.total
    peak = int(total.max())
    found = []
    for name, how, less in _candidates(timeline, setting):
        lower = int((total - less).max())
        if lower < peak:
            found.append(Saving(name, how, peak - lower, lower))
    return sorted(found, key=lambda saving: saving.saved_bytes, reverse=True)[:most]


Candidate = tuple[str, str, Bytes]


def _candidates(timeline: Timeline, setting: Setting) -> Iterator[Candidate]:
    """Name, explanation, and the bytes that would be gone at each moment."""
    if not setting.checkpointed:
        yield from _checkpointing(timeline, setting)
    yield from _logits(timeline, setting)
    yield from _half_weights(timeline, setting)
    optimizer = setting.optimizer
    if optimizer is None:
        yield from _any_chunks(timeline)
        return
    yield from _more_chunks(timeline, setting, optimizer)
    yield from _update_in_backward(timeline, setting, optimizer)
    yield from _elsewhere(timeline, setting, optimizer)
    yield from _smaller_state(timeline, optimizer)


def _checkpointing(timeline: Timeline, setting: Setting) -> Iterator[Candidate]:
    prefixes = [prefix.removesuffix(".") for prefix in block_prefixes(setting.model)]
    held = {prefix: timeline.series(_activation_of(prefix)) for prefix in prefixes}
    held = {prefix: series for prefix, series in held.items() if series.any()}
    if len(held) < 2:
        return
    together = np.sum(list(held.values()), axis=0)
    # One block is computed again at a time; of the others their inputs stay.
    most = int(together.max())
    kept = sum(setting.inputs.get(prefix, 0) for prefix in held) + max(int(s.max()) for s in held.values())
    if kept < most:
        how = "--gradient-checkpointing, model.gradient_checkpointing_enable(); about a third more compute"
        yield "activation checkpointing", how, together - together * kept // most


def _activation_of(prefix: str) -> Callable[[Block], bool]:
    inside = f"{prefix}."

    def wanted(block: Block) -> bool:
        name = block.saved_by or block.module
        return block.category == ACTIVATIONS and (name == prefix or name.startswith(inside))

    return wanted


def _logits(timeline: Timeline, setting: Setting) -> Iterator[Candidate]:
    head = _head(setting.model)
    blocks = [block for block in timeline.blocks if _is_logits(block, head)]
    if head is None or not blocks:
        return
    hidden = head.weight.shape[1]
    largest = max(blocks, key=lambda block: block.nbytes)
    tokens = math.prod(largest.shape[:-1])
    at_once = chunk_size(tokens, head.weight.dtype, False)
    # Logits and their gradient for some tokens at a time, and the gradient of the hidden states.
    kept = 2 * at_once * largest.nbytes // tokens + tokens * hidden * head.weight.element_size()
    series = timeline.series(lambda block: _is_logits(block, head))
    how = (
        "chunkft.autograd.sliced_linear_cross_entropy in place of head and loss: logits of shape "
        f"{largest.shape} never exist as a whole"
    )
    yield "loss without logits", how, np.maximum(series - kept, 0)


def _head(model: nn.Module) -> nn.Linear | None:
    """The layer that gives logits over the vocabulary, if the model says which it is."""
    find = getattr(model, "get_output_embeddings", None)
    found = None if find is None else find()
    return found if isinstance(found, nn.Linear) else None


def _is_logits(block: Block, head: nn.Linear | None) -> bool:
    if head is None or len(block.shape) < 2 or block.shape[-1] != head.weight.shape[0]:
        return False
    return "float" in block.dtype and block.category not in (GRADIENTS, STATE)


def _half_weights(timeline: Timeline, setting: Setting) -> Iterator[Candidate]:
    weights = [p for p in setting.model.parameters() if p.dtype == torch.float32]
    if not weights or not _is_adamw(setting.optimizer):
        return
    head = _head(setting.model)
    wide = timeline.series(
        lambda b: b.category == ACTIVATIONS and b.dtype == "float32" and not _is_logits(b, head)
    )
    less = wide // 2 + timeline.bytes[GRADIENTS] // 2 + sum(p.numel() * 2 for p in weights)
    # Beside two moments of 4 bytes an element the residual is 2 more.
    less = less - timeline.bytes[STATE] // 4
    how = "--dtype bf16, master='residual': fp32 masters in 2 bytes more of state an element, 16-bit products"
    yield "bf16 weights", how, less


def _is_adamw(optimizer: ChunkOptimizer | None) -> bool:
    return optimizer is not None and optimizer._base_class is torch.optim.AdamW


def _any_chunks(timeline: Timeline) -> Iterator[Candidate]:
    part = timeline.bytes[GRADIENTS]
    how = "chunkft.ChunkAdamW(model, chunks=16): gradients of 1/16 at a time"
    yield "chunks", how, part - part // 16


def _more_chunks(timeline: Timeline, setting: Setting, optimizer: ChunkOptimizer) -> Iterator[Candidate]:
    plan = _plan_of(optimizer, 2 * len(optimizer.plan))
    if plan is None:
        return
    before, after = predict(optimizer, optimizer.plan), predict(optimizer, plan)
    gradients = timeline.bytes[GRADIENTS]
    ratio = (after["gradients"] or 0) / max(before["gradients"] or 0, 1)
    less = gradients - (gradients * ratio).astype(np.int64)
    if (
        not setting.on_host
    ):  # where state of all chunks is in the same memory, K does not change how much that is
        old, new = ((side["state_device"] or 0) + (side["masters"] or 0) for side in (before, after))
        state = timeline.bytes[STATE]
        less = less + state - (state * (new / max(old, 1))).astype(np.int64)
    how = f"--chunks {len(plan)}, chunks={len(plan)} instead of {len(optimizer.plan)}: half as many updates a parameter"
    yield "more chunks", how, less


def _update_in_backward(
    timeline: Timeline, setting: Setting, optimizer: ChunkOptimizer
) -> Iterator[Candidate]:
    found = _streamed(optimizer)
    if setting.accumulation > 1 or found is None or isinstance(optimizer._residency, BackwardResidency):
        return
    gradients = timeline.bytes[GRADIENTS]
    less = gradients - np.minimum(gradients, gradient_peak(optimizer, found.plan, found.page_of))
    how = "--residency stream --update backward: no clipping, no accumulation"
    yield "updates in the backward pass", how, less + _state_of(timeline, setting, optimizer, found)


def _elsewhere(timeline: Timeline, setting: Setting, optimizer: ChunkOptimizer) -> Iterator[Candidate]:
    found = _streamed(optimizer)
    if found is None:
        return
    store = optimizer._store
    if not setting.on_host and isinstance(optimizer._residency, ChunkResidency):
        how = "--residency stream: state passes through three pages in every step"
        yield "streamed state", how, _state_of(timeline, setting, optimizer, found)
    if setting.on_host and not (isinstance(store, PagedStore) and store.state_dir is not None):
        buffers, _ = file_tier_nbytes(found.pages, found.slots)
        how = "--residency stream --state-dir DIR: state in files, as fast as the disk"
        less = timeline.bytes[STATE] - found.slots * max(found.pages) - buffers
        yield "state in files", how, np.maximum(less, 0)


def _state_of(timeline: Timeline, setting: Setting, optimizer: ChunkOptimizer, found: _Streamed) -> Bytes:
    """Bytes of state that go when it passes through three pages; negative where it takes more."""
    state = timeline.bytes[STATE]
    if not isinstance(optimizer._residency, ChunkResidency):
        return np.zeros_like(state)
    slots = found.slots * max(found.pages)
    if setting.on_host:
        return state - (sum(found.pages) + slots)
    return state - np.minimum(state, slots)


def _smaller_state(timeline: Timeline, optimizer: ChunkOptimizer) -> Iterator[Candidate]:
    rule = optimizer._residency.rule
    probe = StateProbe(rule, optimizer._attachment.parameter)
    bytes_of: dict[str, int] = {}
    for piece in optimizer.plan.slices():
        for key, (shape, dtype) in probe.layout(piece).items():
            bytes_of[key] = bytes_of.get(key, 0) + math.prod(shape) * dtype.itemsize
    everything = sum(bytes_of.values())
    if not everything:
        return
    state = timeline.bytes[STATE]
    wide_masters = bytes_of.get("master", 0)
    if wide_masters:
        share = wide_masters / everything / 2
        how = "master='residual': the missing 16 bits of each master instead of all 32; exact (bf16 weights)"
        yield "residual masters", how, (state * share).astype(np.int64)
    wide = rule.first_moment is None and rule.state_bits == 32
    if _is_adamw(optimizer) and wide and "exp_avg" in bytes_of:
        share = bytes_of["exp_avg"] / everything / 2
        how = "first_moment='bf16': a rounding error of at most 2^-8 in the first moment"
        yield "first moment in bf16", how, (state * share).astype(np.int64)


def _plan_of(optimizer: ChunkOptimizer, chunks: int) -> ChunkPlan | None:
    """The optimizer's plan with another number of chunks, or None if it cannot have so many."""
    plan = optimizer.plan
    if plan.by not in ("bytes", "interleaved", "layers"):
        return None
    dims = {piece.dim for chunk in plan.chunks for piece in chunk.slices} - {None}
    always = [piece.name for piece in plan.always] or None
    try:
        made = make_plan(
            optimizer._attachment.model, optimizer._specs, chunks, plan.by, 1 if dims == {1} else 0, always
        )
    except ValueError:
        return None
    store = optimizer._store
    if isinstance(store, PagedStore) and store.page_bytes is not None:
        made = fitted(made, store.probe, store.page_bytes)
    return made


@dataclass(frozen=True)
class _Streamed:
    """Plan, page of each slice and page sizes as ``residency="stream"`` would have them."""

    plan: ChunkPlan
    page_of: dict[Slice, int]
    pages: list[int]

    @property
    def slots(self) -> int:
        """How many pages are on the device."""
        return min(3, len(self.pages))


def _streamed(optimizer: ChunkOptimizer) -> _Streamed | None:
    weight_of = optimizer._attachment.parameter
    probe = StateProbe(optimizer._residency.rule, weight_of)
    store = optimizer._store
    page_bytes = (store.page_bytes if isinstance(store, PagedStore) else None) or DEFAULT_PAGE_BYTES
    plan = fitted(optimizer.plan, probe, page_bytes)
    groups = [plan.always, *(chunk.slices for chunk in plan.chunks)]
    pages = make_pages(groups, probe, lambda name: weight_of(name).device, page_bytes)
    if probe.failure is not None or not pages:
        return None
    page_of = {piece: number for number, page in enumerate(pages) for piece in page.pieces}
    return _Streamed(plan, page_of, [page.nbytes for page in pages])
