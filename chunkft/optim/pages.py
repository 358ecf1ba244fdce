"""Where on which page each tensor of optimizer state lies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from chunkft.autograd import Slice
from chunkft.optim.advanced import copied
from chunkft.optim.eight_bit import moment_layout
from chunkft.optim.master import MASTER_DTYPES, STATE_KEYS
from chunkft.optim.rule import UpdateRule
from chunkft.plan import Chunk, ChunkPlan

ALIGNMENT = 256
ROW_MULTIPLE = 64
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Region:
    """Bytes of a page that hold one tensor."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def of(self, page: Tensor) -> Tensor:
        """The tensor, as a view of the bytes of its page."""
        return page[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Page:
    """Slices whose state moves in one copy.

    Attributes:
        pieces: the slices.
        regions: where the tensors of each slice lie, by state key.
        nbytes: size of the page.
        device: where the slices are.
    """

    pieces: tuple[Slice, ...]
    regions: dict[Slice, dict[str, Region]]
    nbytes: int
    device: torch.device


class StateProbe:
    """Which tensors an optimizer keeps for a slice, found out by one step on a tensor without memory.

    Args:
        rule: how slices are updated.
        parameter_of: the full parameter of a name.
        counts_on_pages: lay out step counts as well, for updates that decide on the device whether they count.

    Attributes:
        failure: why the base optimizer could not be probed, or None. Its state is then not laid out ahead.
    """

    def __init__(
        self, rule: UpdateRule, parameter_of: Callable[[str], Tensor], counts_on_pages: bool = False
    ) -> None:
        self._rule = rule
        self._counts_on_pages = counts_on_pages
        self._parameter_of = parameter_of
        self._known: dict[tuple[tuple[int, ...], torch.dtype, int], Layout] = {}
        self.failure: str | None = None

    def layout(self, piece: Slice) -> Layout:
        """Shape and dtype of each tensor that is kept for a slice, masters included, by state key."""
        dtype = self._parameter_of(piece.name).dtype
        mode = self._rule.modes[piece.name]
        group = self._rule.group_of[piece.name]
        working = torch.float32 if mode != "none" else dtype
        known = (piece.shape, working, group)
        if known not in self._known:
            self._known[known] = self._probe(*known)
        layout = dict(self._known[known])
        if self._rule.first_moment is not None and "exp_avg" in layout:
            layout["exp_avg"] = (layout["exp_avg"][0], self._rule.first_moment)
        if self._rule.state_bits == 8 and "exp_avg" in layout:
            layout |= moment_layout(piece.shape)
        if mode in STATE_KEYS and piece.numel:
            layout[STATE_KEYS[mode]] = (piece.shape, MASTER_DTYPES[mode])
        return layout

    def _probe(self, shape: tuple[int, ...], dtype: torch.dtype, group: int) -> Layout:
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        parameter.grad = torch.empty_like(parameter)
        # Implementations for devices refuse tensors without one; what they keep has the same shapes.
        switches = ("fused", "foreach", "capturable")
        plain: dict[str, Any] = {key: False for key in switches if key in self._rule.groups[group]}
        # Copies, because a step may change values in place.
        values = {key: copied(value) for key, value in self._rule.values()[group].items()} | plain
        try:
            base = self._rule.make_base([{**values, "params": [parameter]}])
            for entry in base.param_groups:
                entry.update(plain)
            base.step()
        except (
            Exception
        ) as error:  # any optimizer may be given: what fails here is moved tensor by tensor instead
            self.failure = f"{type(error).__name__}: {error}"
            return {}
        return {
            key: (tuple(value.shape), value.dtype)
            for key, value in base.state[parameter].items()
            if isinstance(value, Tensor) and value.numel() > 0 and (value.dim() > 0 or self._counts_on_pages)
        }


def make_pages(
    groups: Iterable[Sequence[Slice]],
    probe: StateProbe,
    device_of: Callable[[str], torch.device],
    page_bytes: int | None,
) -> list[Page]:
    """Lay slices out on pages, in their order.

    Args:
        groups: slices that are in use together; a page never holds slices of two groups, or of two devices.
        probe: tells what is kept for each.
        device_of: device of a parameter, by name.
        page_bytes: a page is full when the next slice would make it larger than this; None makes one page of
            each group and device. A slice that is larger has a page of its own.
    """
    pages: list[Page] = []
    for group in groups:
        open_pages: dict[torch.device, list[Slice]] = {}
        filled: dict[torch.device, int] = {}
        for piece in group:
            device = device_of(piece.name)
            size = state_nbytes(probe.layout(piece))
            if not size:
                continue
            members = open_pages.setdefault(device, [])
            if page_bytes is not None and members and filled[device] + size > page_bytes:
                pages.append(_laid_out(members, probe, device))
                members.clear()
            filled[device] = size + (filled[device] if members else 0)
            members.append(piece)
        pages += [_laid_out(members, probe, device) for device, members in open_pages.items() if members]
    return pages


def fitted(plan: ChunkPlan, probe: StateProbe, page_bytes: int) -> ChunkPlan:
    """The plan with slices cut finer, so that the state of each fits a page where the slice can be cut so far."""

    def cut(pieces: Iterable[Slice]) -> tuple[Slice, ...]:
        return tuple(part for piece in pieces for part in _cut(piece, probe, page_bytes))

    chunks = tuple(Chunk(chunk.index, cut(chunk.slices)) for chunk in plan.chunks)
    return ChunkPlan(chunks, cut(plan.always), plan.by)


def state_nbytes(layout: Layout) -> int:
    """Bytes that state of this layout takes on a page."""
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in layout.values())


def _cut(piece: Slice, probe: StateProbe, page_bytes: int) -> list[Slice]:
    size = state_nbytes(probe.layout(piece))
    if piece.dim is None or size <= page_bytes:
        return [piece]
    length = piece.stop - piece.start
    most = max(1, length * page_bytes // size)
    # Whole blocks of rows keep the products of a GPU on their fast path.
    step = most // ROW_MULTIPLE * ROW_MULTIPLE or most
    bounds = [*range(piece.start, piece.stop, step), piece.stop]
    return [replace(piece, start=a, stop=b) for a, b in itertools.pairwise(bounds)]


def _laid_out(pieces: Sequence[Slice], probe: StateProbe, device: torch.device) -> Page:
    regions: dict[Slice, dict[str, Region]] = {}
    offset = 0
    for piece in pieces:
        regions[piece] = {}
        for key, (shape, dtype) in probe.layout(piece).items():
            regions[piece][key] = region = Region(offset, shape, dtype)
            offset += _aligned(region.nbytes)
    return Page(tuple(pieces), regions, offset, device)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
