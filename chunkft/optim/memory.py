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
    ranks: int = 1
    rank: int = 0

    @property
    def directory(self) -> str | os.PathLike[str] | None:
        """Where the files of this process are: ranks of one machine do not share one."""
        if self.state_dir is None or self.ranks == 1:
            return self.state_dir
        return os.path.join(self.state_dir, f"rank-{self.rank}-of-{self.ranks}")


def build_memory(
    choice: MemoryChoice,
    plan: ChunkPlan,
    rule: UpdateRule,
    attachment: Attachment,
    everywhere: ChunkPlan | None = None,
) -> tuple[ChunkPlan, StateStore, Residency]:
    """The plan, cut so that slices fit pages, the store of their state, and what moves it.

    Args:
        choice: what the user asked for, and which of how many ranks this process is.
        plan: what this process updates.
        rule: how.
        attachment: of the model.
        everywhere: what all ranks update, for what they must choose and refuse alike; None: ``plan``.

    Raises:
        ValueError: if the base optimizer cannot update the parts of the plan by themselves.
        OSError, RuntimeError: if the memory, or the files, cannot be had.
    """
    parameter_of = attachment.parameter
    everywhere = plan if everywhere is None else everywhere

    device_of = attachment.leaf_device
    stream = choice.residency == "stream"
    devices = {device_of(piece.name).type for piece in everywhere.slices()}
    paged = stream or choice.state_dir is not None or choice.state_device == "paged"
    in_place = choice.state_device != "auto" or devices == {"cpu"} or choice.on_host
    if not paged and in_place:
        check_coupling(rule, everywhere, parameter_of, 1, choice.ranks)
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
    check_coupling(rule, plan if choice.ranks == 1 else everywhere, parameter_of, units, choice.ranks)
    pages = PagedStore(
        plan, probe, device_of, stream=stream, page_bytes=page_bytes, state_dir=choice.directory
    )
    if not stream:
        return plan, pages, ChunkResidency(rule, pages)
    kind = BackwardResidency if backward else StreamResidency
    return plan, pages, kind(rule, pages)
