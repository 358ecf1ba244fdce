"""Bytes of optimizer state: pages, slots, host memory and files, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from chunkft.autograd import Slice
from chunkft.optim.kernel_slices import make_slices
from chunkft.optim.pages import ALIGNMENT, Layout, Page, StateProbe, fitted, make_pages, state_nbytes
from chunkft.optim.planner.tape import Tape
from chunkft.optim.rule import UpdateRule
from chunkft.plan import ChunkPlan
from chunkft.streaming import file_tier_nbytes

__all__ = ["LayoutOfState", "PagedState", "largest", "paged_state", "update_nbytes"]

MANY = 512  # pages from which on their sizes are not laid out one by one
META = torch.device("meta")


class LayoutOfState(StateProbe):
    """``StateProbe`` that asks an optimizer whose state has the shape of the parameter once, not for every shape.

    Args:
        rule: how slices are updated.
        parameter_of: the full parameter of a name.
        counts_on_pages: as for ``StateProbe``.
    """

    def __init__(
        self,
        rule: UpdateRule,
        parameter_of: Callable[[str], Tensor],
        counts_on_pages: bool = False,
    ) -> None:
        super().__init__(rule, parameter_of, counts_on_pages)
        self._sizes: dict[Any, int] = {}
        self._patterns: dict[tuple[int, torch.dtype, int], dict[str, tuple[bool, torch.dtype]] | None] = {}

    def nbytes(self, piece: Slice) -> int:
        """Bytes of a slice's state on a page."""
        key = (piece.shape, self._parameter_of(piece.name).dtype, self._rule.modes[piece.name])
        if key not in self._sizes:
            self._sizes[key] = state_nbytes(self.layout(piece))
        return self._sizes[key]

    def _probe(self, shape: tuple[int, ...], dtype: torch.dtype, group: int) -> Layout:
        key = (len(shape), dtype, group)
        if key not in self._patterns:
            sample = tuple(range(3, 3 + len(shape)))
            found = super()._probe(sample, dtype, group)
            alike = self.failure is None and all(entry[0] in (sample, ()) for entry in found.values())
            self._patterns[key] = {k: (bool(s), d) for k, (s, d) in found.items()} if alike else None
        pattern = self._patterns[key]
        if pattern is None:
            return super()._probe(shape, dtype, group)
        return {name: (shape if full else (), kept) for name, (full, kept) in pattern.items()}


@dataclass(frozen=True)
class PagedState:
    """Where the state of a plan lies.

    Attributes:
        plan: the chunks, cut so that their state fits pages.
        pages: of all chunks where state streams; None where there are too many to lay out, or it does not.
        slots: bytes of the slots.
        resting: bytes on the device of what is always active, outside of pages.
        chunk_nbytes: bytes of the pages of each chunk.
        host: bytes of host memory.
        files: bytes of files.
    """

    plan: ChunkPlan
    pages: list[Page] | None
    slots: int
    resting: int
    chunk_nbytes: tuple[int, ...]
    host: int
    files: int


def largest(states: Sequence[PagedState]) -> PagedState:
    """The most of each kind that one of several ranks has; slices and pages are those of the first."""
    if len(states) == 1:
        return states[0]
    return replace(
        states[0],
        slots=max(state.slots for state in states),
        resting=max(state.resting for state in states),
        chunk_nbytes=tuple(map(max, zip(*(state.chunk_nbytes for state in states), strict=True))),
        host=max(state.host for state in states),
        files=max(state.files for state in states),
    )


def paged_state(
    plan: ChunkPlan, probe: LayoutOfState, *, stream: bool, page_bytes: int, in_files: bool
) -> PagedState:
    """Lay out the state of a plan.

    Args:
        plan: the chunks.
        probe: tells what is kept for each slice.
        stream: whether state passes through three pages of ``page_bytes``, or that of a chunk stays on the device.
        page_bytes: size of a page.
        in_files: whether files hold the state in place of host memory.
    """
    sizes = [sum(probe.nbytes(piece) for piece in chunk.slices) for chunk in plan.chunks]
    always = sum(probe.nbytes(piece) for piece in plan.always)
    resting = 0
    if not stream:
        pages: list[Page] | None = None
        page_sizes = sizes
        resting = sum(_tensors(probe.layout(piece)) for piece in plan.always)
        always = 0
    elif sum(sizes) > MANY * page_bytes:
        # Pages are filled up to what the next slice would exceed; one row may be larger than a page.
        pages = None
        row = max(
            (probe.nbytes(p) // max(1, p.stop - p.start if p.dim is not None else 1) for p in plan.slices()),
            default=0,
        )
        most = max(page_bytes, row)
        page_sizes = [min(most, sum(sizes))] * max(3, -(-(sum(sizes) + always) // page_bytes))
    else:
        plan = fitted(plan, probe, page_bytes)
        groups = [plan.always, *(chunk.slices for chunk in plan.chunks)]
        pages = make_pages(groups, probe, lambda name: META, page_bytes)
        page_sizes = [page.nbytes for page in pages]
    page_sizes = [size for size in page_sizes if size]
    count = min(3 if stream else 2, len(page_sizes))
    slots = count * max(page_sizes, default=0)
    # Every cut adds tensors that begin at a multiple of their own.
    cuts = 4 * ALIGNMENT * len(page_sizes) if stream and pages is None else 0
    host, files = (sum(sizes) + always + cuts if pages is None else sum(page.nbytes for page in pages)), 0
    if in_files and page_sizes:
        host, files = file_tier_nbytes(page_sizes, count)
    return PagedState(plan, pages, slots, resting, tuple(sizes), host, files)


def update_nbytes(
    pieces: Iterable[Slice], probe: StateProbe, rule: UpdateRule, dtype_of: Callable[[str], torch.dtype]
) -> int:
    """What an update takes beside weights, gradients and the slots of state, where no kernel of chunkft does it."""
    if rule.state_bits == 8:  # the native core does
        return 0
    pairs: list[tuple[Slice, nn.Parameter]] = []
    for piece in pieces:
        leaf = nn.Parameter(torch.empty(piece.shape, dtype=dtype_of(piece.name), device="meta"))
        leaf.grad = torch.empty_like(leaf)
        pairs.append((piece, leaf))
    if not pairs or probe.failure is not None:
        return 0
    states: dict[Slice, dict[str, Any]] = {}
    for piece, _ in pairs:
        layout = probe.layout(piece).items()
        states[piece] = {key: torch.empty(shape, dtype=kept, device="meta") for key, (shape, kept) in layout}
        states[piece]["step"] = torch.ones(())
    tape = Tape()
    with tape, torch.no_grad():
        make_slices(pairs, states, rule, lambda piece, key: None).step("0")
    events: list[tuple[int, int]] = []
    for made in tape.allocations:
        events.append((made.born, made.nbytes))
        if made.freed is not None:
            events.append((made.freed, -made.nbytes))
    most = live = 0
    for _, change in sorted(events):
        live += change
        most = max(most, live)
    return most


def _tensors(layout: Layout) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values() if shape)
