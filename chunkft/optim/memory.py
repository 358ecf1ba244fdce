"""Which store and which residency an optimizer works with."""

from __future__ import annotations

import os
from dataclasses import dataclass

from chunkft.attach import Attachment
from chunkft.optim.backward import BackwardResidency
from chunkft.optim.coupling import check_coupling
from chunkft.optim.kernel_slices import kernel_applies
from chunkft.optim.paged import PagedStore
from chunkft.optim.pages import StateProbe, fitted, make_pages
from chunkft.optim.resident import ChunkResidency
from chunkft.optim.rule import UpdateRule
from chunkft.optim.state import StateStore
from chunkft.optim.streamed import StreamResidency
from chunkft.plan import ChunkPlan

# Large enough that a copy runs at the speed of the link, small enough that three of them are little memory.
DEFAULT_PAGE_BYTES = 64 << 20

Residency = ChunkResidency | StreamResidency


@dataclass(frozen=True)
class MemoryChoice:
    """The arguments of ``ChunkOptimizer`` that say where state lives; ``on_host``: it is used there, by weights that
    stream.
    """

    residency: str
    update: str
    state_device: str
    page_bytes: int
    state_dir: str | os.PathLike[str] | None
    on_host: bool = False


def build_memory(
    choice: MemoryChoice, plan: ChunkPlan, rule: UpdateRule, attachment: Attachment
) -> tuple[ChunkPlan, StateStore, Residency]:
    """The plan, cut so that slices fit pages, the store of their state, and what moves it.

    Raises:
        OSError, RuntimeError: if the memory, or the files, cannot be had.
    """
    parameter_of = attachment.model.get_parameter

    device_of = attachment.leaf_device
    stream = choice.residency == "stream"
    devices = {device_of(piece.name).type for piece in plan.slices()}
    paged = stream or choice.state_dir is not None or choice.state_device == "paged"
    in_place = choice.state_device != "auto" or devices == {"cpu"} or choice.on_host
    if not paged and in_place:
        check_coupling(rule, plan, parameter_of, units=1)
        store = StateStore(in_arena=choice.state_device != "device")
        return plan, store, ChunkResidency(rule, store)
    pairs = [(piece, attachment.sample(piece.name)) for piece in plan.slices()]
    backward = choice.update == "backward"
    probe = StateProbe(rule, parameter_of, counts_on_pages=backward and kernel_applies(pairs, rule))
    page_bytes = choice.page_bytes if stream else None
    units = 1
    if page_bytes is not None:
        plan = fitted(plan, probe, page_bytes)
        groups = [plan.always, *(chunk.slices for chunk in plan.chunks)]
        laid_out = make_pages(groups, probe, device_of, page_bytes)
        # a slice without a page is updated by itself
        units = len(laid_out) + len(list(plan.slices())) - sum(len(page.pieces) for page in laid_out)
    check_coupling(rule, plan, parameter_of, units)
    pages = PagedStore(
        plan, probe, device_of, stream=stream, page_bytes=page_bytes, state_dir=choice.state_dir
    )
    if not stream:
        return plan, pages, ChunkResidency(rule, pages)
    kind = BackwardResidency if backward else StreamResidency
    return plan, pages, kind(rule, pages)
