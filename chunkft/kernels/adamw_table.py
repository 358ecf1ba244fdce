"""What the AdamW kernel reads of every slice: a table that is kept from step to step, of which few fields change.

A kept table is used again only if every tensor of a call has the address, device, dtype, shape and strides of then, so
that all that was checked and computed of them still holds. It holds no tensor alive. Gradients may move: they have to
agree in all but their address.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import eq
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from chunkft.kernels.adamw import Piece

# The table, int64: log(beta1) and log(beta2), then FIELDS of every slice; floats are fp64 by their bits.
HEADER = 2
FIELDS = 14
# Of a slice. EXTRA: master or residual; COUNTER: address of the step count, or 0: then STEP is the count; COLUMNS: of a
# row of the parameter; STRIDE: from row to row, in elements; WIDE: every tensor starts at a multiple of 16 bytes, and
# the parameter is contiguous.
(PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, EXTRA, COUNTER, STEP, NUMEL, COLUMNS, STRIDE, WIDE, SEED, LR, DECAY) = (
    range(FIELDS)
)
# Of a slice whose moments are codes: behind the others, the addresses of their scales.
FIELDS_EIGHT = 16
FIRST_SCALE, SECOND_SCALE = range(FIELDS, FIELDS_EIGHT)
# a contiguous slice is rows of this many elements, so that the position in a row fits into 32 bits
CONTIGUOUS = 1 << 30
LAST = 2**31 - 1
# slots in the table of starts: a power of 4, so that few variants are compiled
SLOTS_MIN = 16
SLOTS_MAX = 1024
# slices whose rows are kept, of all calls together: about 2 KB each
KEPT = 1 << 14

# of the slices of a call: parameters, first and second moments, masters or residuals, step counts; and the scales of
# the first and of the second moments, where these are codes of 8 bits
Columns = tuple[
    Sequence[Tensor],
    Sequence[Tensor],
    Sequence[Tensor],
    Sequence[Tensor | None],
    Sequence[Tensor],
    *tuple[Sequence[Tensor], ...],
]


class Tile(NamedTuple):
    """How the kernel is launched: elements a block, blocks a program, warps."""

    block: int
    loops: int
    warps: int


class Scalars(NamedTuple):
    """Numbers of each slice: count of updates with this one (NaN where only the device knows), rate, decay, seed."""

    steps: Sequence[float]
    rates: Sequence[float]
    decays: Sequence[float]
    seeds: Sequence[int]


@dataclass(frozen=True)
class Batch:
    """Slices of the same dtypes for one launch: their places in the call and their part of the table."""

    places: list[int]
    dtypes: tuple[torch.dtype, ...]
    # start of each slice in programs, padded to ``slots``; header; rows of so many fields
    fields: int
    content: npt.NDArray[np.int64]
    slots: int
    programs: int
    # WIDE but for the gradient
    wide: npt.NDArray[np.bool_]
    orders: list[tuple[int, ...] | None]

    def fill(
        self, grads: Sequence[Tensor], scalars: Scalars, betas: tuple[float, float]
    ) -> tuple[Tensor, list[Tensor]]:
        """The table as it is to be copied to the device, and the gradients, contiguous, that it points to."""
        members = [_ordered(grads[j], order) for j, order in zip(self.places, self.orders, strict=True)]
        rows = self.content[self.slots + HEADER :].reshape(-1, self.fields)
        floats = rows.view(np.float64)
        rows[:, GRAD] = [grad.data_ptr() for grad in members]
        rows[:, WIDE] = self.wide & (rows[:, GRAD] % 16 == 0)
        rows[:, SEED] = [scalars.seeds[j] for j in self.places]
        floats[:, STEP] = [scalars.steps[j] for j in self.places]
        rates = np.array([scalars.rates[j] for j in self.places])
        floats[:, LR] = rates
        floats[:, DECAY] = 1 - rates * np.array([scalars.decays[j] for j in self.places])
        logs = [math.log(beta) if beta else -math.inf for beta in betas]
        self.content.view(np.float64)[self.slots : self.slots + HEADER] = logs
        # a copy: the next step writes into ``content`` while this one may still be on its way
        return torch.from_numpy(self.content.copy()), members


class Tables:
    """The tables of the calls of late, found by their tensors."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._rows = 0
        self._known: OrderedDict[tuple[Any, ...], tuple[list[Any], list[Batch]]] = OrderedDict()
        self._lock = Lock()

    def find(self, name: tuple[Any, ...], columns: Columns, grads: Sequence[Tensor]) -> list[Batch] | None:
        """What was kept under ``name``, if all facts of these tensors are what they were."""
        with self._lock:
            found = self._known.get(name)
            # one after the other: a list of all would be work for the garbage collector
            if found is None or not all(map(eq, found[0], _facts(columns, grads))):
                return None
            self._known.move_to_end(name)
            return found[1]

    def keep(
        self, name: tuple[Any, ...], columns: Columns, grads: Sequence[Tensor], batches: list[Batch]
    ) -> None:
        """Keep the batches of these tensors; what was not used for longest makes room."""
        with self._lock:
            self._forget(name)
            self._known[name] = list(_facts(columns, grads)), batches
            self._rows += _count(batches)
            while self._rows > self._kept and len(self._known) > 1:
                self._forget(next(iter(self._known)))

    def __len__(self) -> int:
        return len(self._known)

    def _forget(self, name: tuple[Any, ...]) -> None:
        old = self._known.pop(name, None)
        if old is not None:
            self._rows -= _count(old[1])


TABLES = Tables()


def batches_of(pieces: Sequence[Piece], tile: Tile) -> list[Batch]:
    """Rows of checked slices, in a batch for each combination of dtypes and each SLOTS_MAX slices.

    Raises:
        ValueError: if a parameter is not a matrix with contiguous rows, or a batch has too many elements.
    """
    groups: dict[tuple[torch.dtype, ...], list[int]] = {}
    for j, piece in enumerate(pieces):
        if piece.param.numel():
            tensors = (piece.param, piece.grad, piece.exp_avg, piece.exp_avg_sq)
            groups.setdefault(tuple(tensor.dtype for tensor in tensors), []).append(j)
    return [
        _batch([pieces[j] for j in places[k : k + SLOTS_MAX]], places[k : k + SLOTS_MAX], dtypes, tile)
        for dtypes, places in groups.items()
        for k in range(0, len(places), SLOTS_MAX)
    ]


def _batch(pieces: list[Piece], places: list[int], dtypes: tuple[torch.dtype, ...], tile: Tile) -> Batch:
    starts, programs = [], 0
    for piece in pieces:
        starts.append(programs)
        programs += -(-piece.param.numel() // (tile.block * tile.loops))
    if programs >= LAST:
        raise ValueError(f"{programs} blocks are too many for one launch; update fewer slices at a time")
    slots = SLOTS_MIN
    while slots < len(pieces):
        slots *= 4
    fields = FIELDS if pieces[0].scales is None else FIELDS_EIGHT
    content = np.full(slots + HEADER + fields * len(pieces), LAST, np.int64)
    content[: len(starts)] = starts
    rows, wide = content[slots + HEADER :].reshape(-1, fields), np.empty(len(pieces), bool)
    for j, piece in enumerate(pieces):
        tensors = [piece.param, piece.exp_avg, piece.exp_avg_sq]
        extra = 0 if piece.extra is None else piece.extra.data_ptr()
        columns, stride = rows_of(piece.param)
        addresses = [tensor.data_ptr() for tensor in tensors]
        wide[j] = columns == CONTIGUOUS and all(address % 16 == 0 for address in (*addresses, extra))
        rows[j, [PARAM, EXP_AVG, EXP_AVG_SQ]] = addresses
        rows[j, EXTRA] = extra
        rows[j, COUNTER] = 0 if piece.counter.device.type == "cpu" else piece.counter.data_ptr()
        rows[j, NUMEL], rows[j, COLUMNS], rows[j, STRIDE] = piece.param.numel(), columns, stride
        if piece.scales is not None:
            rows[j, [FIRST_SCALE, SECOND_SCALE]] = [scale.data_ptr() for scale in piece.scales]
    return Batch(places, dtypes, fields, content, slots, programs, wide, [piece.order for piece in pieces])


def _facts(columns: Columns, grads: Sequence[Tensor]) -> Iterator[tuple[Any, ...] | None]:
    """All on which checks and rows depend, of the tensors of every slice; of gradients all but address and strides."""
    for column in columns:
        for tensor in column:
            if tensor is None:
                yield None
            else:
                yield (
                    tensor.data_ptr(),
                    tensor.get_device(),
                    tensor.dtype,
                    tensor.shape,
                    tensor.stride(),
                )
    for grad in grads:
        yield grad.get_device(), grad.dtype, grad.shape


def _ordered(grad: Tensor, order: tuple[int, ...] | None) -> Tensor:
    grad = grad.detach() if order is None else grad.detach().permute(order)
    return grad if grad.is_contiguous() else grad.contiguous()


def _count(batches: list[Batch]) -> int:
    # a call without elements takes room as well
    return 1 + sum(len(batch.places) for batch in batches)


def rows_of(param: Tensor) -> tuple[int, int]:
    """Elements of a row and elements from row to row, for a parameter whose rows are contiguous.

    Raises:
        ValueError: for other strides, or rows of more than 2^30 elements.
    """
    if param.is_contiguous():
        return CONTIGUOUS, CONTIGUOUS
    columns = 1
    for size, stride in zip(reversed(param.shape), reversed(param.stride()), strict=True):
        if size != 1 and stride != columns:
            break
        columns *= size
    try:
        stride = param.view(-1, columns).stride(0)
    except RuntimeError:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} and strides {param.stride()} is not a matrix with contiguous "
            "rows; its update needs backend='torch'"
        ) from None
    if columns > CONTIGUOUS:
        raise ValueError(f"rows of {columns} elements are too long; allowed are 2^30")
    return columns, stride
