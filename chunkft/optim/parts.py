"""State of many ranks as one state_dict: joined from what each of them saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chunkft.autograd import Slice
from chunkft.optim.gathering import GATHERING, Courier, Stopped, described, known_to_all, parts_in
from chunkft.optim.serialize import (
    FORMAT,
    PART_FORMAT,
    optimizer_header,
    states_by_parameter,
    states_to_save,
    whole_entry,
)
from chunkft.optim.state import State, detached
from chunkft.optim.together import gathers_of, together

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer

Pieces = list[tuple[Slice, Callable[[], Tensor]]]


class Joined:
    """A tensor of the shape of a parameter that is read piece by piece, as the lazy slices of a safetensors file are.

    Args:
        shape: of the parameter.
        dtype: of the tensor.
        pieces: slices, and what reads the tensor of each; what none of them covers is zero.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, pieces: Pieces) -> None:
        self.shape = list(shape)
        self.dtype = dtype
        self.pieces = sorted(pieces, key=lambda one: one[0].start)
        self._last: tuple[Slice, Tensor] | None = (
            None  # blocks of one piece are asked for one after the other
        )

    def get_shape(self) -> list[int]:
        """The shape of the whole tensor."""
        return self.shape

    def __getitem__(self, index: Any) -> Tensor:
        """Rows, columns, or columns of rows, given by slices, as a tensor on the CPU."""
        window = [range(size)[one] for size, one in zip(self.shape, _both(index), strict=False)]
        result = torch.zeros([*map(len, window), *self.shape[len(window) :]], dtype=self.dtype)
        for piece, read in self.pieces:
            dim = 0 if piece.dim is None else piece.dim
            asked = window[dim] if dim < len(window) else range(self.shape[dim])
            first, last = max(asked.start, piece.start), min(asked.stop, piece.stop)
            if first >= last or not result.numel():
                continue
            part = self._read(piece, read).narrow(dim, first - piece.start, last - first)
            for other, span in enumerate(window):
                if other != dim:
                    part = part.narrow(other, span.start, len(span))
            result.narrow(dim, first - asked.start, last - first).copy_(part)
        return result

    def _read(self, piece: Slice, read: Callable[[], Tensor]) -> Tensor:
        if self._last is None or self._last[0] is not piece:
            self._last = None  # two are not held at a time
            self._last = piece, read()
        return self._last[1]


def _both(index: Any) -> tuple[slice, ...]:
    return index if isinstance(index, tuple) else (index,)


def slice_of(name: str, shape: Sequence[int], saved_range: dict[str, Any]) -> Slice:
    """The slice that a saved range is about."""
    return Slice(name, saved_range["dim"], saved_range["start"], saved_range["stop"], tuple(shape), 0)


def from_part(saved: dict[str, Any]) -> dict[str, Any]:
    """A ``state_dict`` of one rank in the form of one of the whole state, of which it has some ranges.

    Raises:
        KeyError, TypeError, AttributeError: if it is damaged.
        ValueError: if a tensor has not the shape of its slice.
    """
    state = {
        name: joined(name, entry["shape"], entry["ranges"], _of_tensor)
        for name, entry in saved["state"].items()
    }
    return {**saved, "format": FORMAT, "state": state}


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Join what ``state_dict()`` gave on all ranks of a process group to the ``state_dict`` of one process.

    Args:
        states: of all ranks, saved after the same step, in any order.

    Returns:
        A ``state_dict`` that any number of processes loads; its tensors are copies, of whole parameters.

    Raises:
        ValueError: if they are not the parts of one whole.
    """
    parts = list(states)
    for part in parts:
        found = part.get("format") if isinstance(part, dict) else type(part).__name__
        if found != PART_FORMAT:
            raise ValueError(
                f"states has an entry of format {found!r}; allowed is {PART_FORMAT!r}, made by state_dict() of a rank "
                "of a process group"
            )
    if not parts:
        raise ValueError("states is empty; needs the state_dict of every rank")
    try:
        return _merged(parts)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"states has an entry that is damaged ({type(error).__name__}: {error})") from error


def full_state(optimizer: ChunkOptimizer, everywhere: bool) -> dict[str, Any] | None:
    """``ChunkOptimizer.full_state_dict``."""
    team = optimizer._team
    if team is None:
        return optimizer.state_dict()
    gathers, rank = gathers_of(team, GATHERING), team.ranks.rank
    states = together(gathers, rank, partial(states_to_save, optimizer, "full_state_dict"))
    if team.copies is not None and team.copies.rank and not everywhere:
        return together(gathers, rank, lambda: None)  # other ranks have the same
    known, own = described(states, rank)
    found = list(states_by_parameter(known_to_all(team.ranks, known)))
    rounds = [list(parts_in(list(pieces.values()))) for _, _, pieces in found]
    courier = Courier(team.ranks, team.device, own, rounds, everywhere)
    if rank and not everywhere:
        return together(gathers, rank, courier.serve)
    return together(gathers, rank, partial(_collect, optimizer_header(optimizer), found, courier))


def _collect(
    header: dict[str, Any], found: list[tuple[str, tuple[int, ...], dict[Slice, State]]], courier: Courier
) -> dict[str, Any] | None:
    state: dict[str, Any] = {}
    try:
        for name, shape, pieces in found:
            courier.begin()
            state[name] = whole_entry(shape, pieces, courier.tensor)
        courier.begin()
    except Stopped:
        return None  # why is told by the rank that failed
    except BaseException:
        courier.abandon()
        raise
    return {**header, "state": state}


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    first = parts[0]
    ranks = first["part"]["ranks"]
    have = sorted(part["part"]["rank"] for part in parts)
    if have != list(range(ranks)) or any(part["part"]["ranks"] != ranks for part in parts):
        raise ValueError(
            f"states has the parts of ranks {have}; needs each rank of one group of {ranks} once"
        )
    for key in ("base", "master", "cursor", "plan"):
        if any(part[key] != first[key] for part in parts):
            raise ValueError(
                f"states has parts that differ in {key!r}; needs those that were saved after one step"
            )
    ranges: dict[str, list[dict[str, Any]]] = {}
    shapes: dict[str, list[int]] = {}
    for part in parts:
        for name, entry in part["state"].items():
            ranges.setdefault(name, []).extend(entry["ranges"])
            shapes[name] = list(entry["shape"])
    state = {}
    for name in sorted(ranges):
        found = sorted(ranges[name], key=lambda one: int(one["start"]))
        entry = joined(name, shapes[name], found, _of_tensor)
        tensors = {key: tensor[:] for key, tensor in entry["tensors"].items()}
        state[name] = {**entry, "tensors": tensors, "ranges": detached(entry["ranges"])}
    header = {key: detached(value) for key, value in first.items() if key not in ("part", "state")}
    return {**header, "format": FORMAT, "state": state}


Source = Callable[[Any], tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]]


def joined(
    name: str, shape: Sequence[int], ranges: Sequence[dict[str, Any]], source: Source
) -> dict[str, Any]:
    """The entry of a parameter in a ``state_dict``, from ranges that have ``tensors`` of their own.

    Args:
        name: of the parameter.
        shape: of the parameter.
        ranges: of it; tensors that are not elementwise become values.
        source: gives for what a range has as a tensor its shape, its dtype and what reads it.

    Raises:
        ValueError: if a tensor has not the shape of its slice, or dtypes differ.
    """
    pieces: dict[str, Pieces] = {}
    dtypes: dict[str, torch.dtype] = {}
    plain = []
    for found in ranges:
        piece = slice_of(name, shape, found)
        values = dict(found["values"])
        for key, entry in found["tensors"].items():
            own, dtype, read = source(entry)
            if key not in found["elementwise"]:
                values[key] = read()
                continue
            if tuple(own) != piece.shape:
                raise ValueError(
                    f"state_dict is damaged: {name!r} has {key} of shape {tuple(own)} in {piece}, which has shape "
                    f"{piece.shape}"
                )
            if dtypes.setdefault(key, dtype) != dtype:
                raise ValueError(f"state_dict is damaged: {name!r} has {key} in several dtypes")
            pieces.setdefault(key, []).append((piece, read))
        rest = {key: value for key, value in found.items() if key not in ("tensors", "values")}
        plain.append({**rest, "values": values})
    tensors = {key: Joined(shape, dtypes[key], parts) for key, parts in pieces.items()}
    return {"shape": list(shape), "tensors": tensors, "ranges": plain}


def _of_tensor(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]:
    return tuple(tensor.shape), tensor.dtype, tensor.detach
