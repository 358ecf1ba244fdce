"""The optimizer's state as flat entries of a checkpoint that many ranks write, each what it has."""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chunkft.optim.gathering import GATHERING, Part, described, known_to_all
from chunkft.optim.parts import joined
from chunkft.optim.recut import near, renamed
from chunkft.optim.serialize import (
    FORMAT,
    optimizer_header,
    range_entry,
    saved_gradients,
    states_by_parameter,
    states_to_save,
)
from chunkft.optim.state import detached
from chunkft.optim.together import gathers_of, shared, together

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer

HEADER = "chunkft-header"
SHARDED_FORMAT = "chunkft-state-sharded-1"
Read = Callable[
    [str, tuple[int, ...], torch.dtype], Tensor
]  # of an entry its tensor, whose shape and dtype are known


@dataclass
class ShardedEntries:
    """What one rank puts into a checkpoint.

    Attributes:
        header: the same on all ranks: everything but the tensors, and where these are.
        tensors: of this rank, by keys that no other rank has.
        nbytes: of the tensors of all ranks.
    """

    header: bytes
    tensors: dict[str, Tensor]
    nbytes: int

    def entries(self) -> dict[str, Any]:
        """Everything in one flat dict."""
        return {HEADER: self.header, **self.tensors}


def sharded_state(optimizer: ChunkOptimizer) -> ShardedEntries:
    """What this rank has of the state; a collective of the ranks that share it.

    Raises:
        RuntimeError: on all ranks, if one of them is not between two steps.
    """
    team = optimizer._team
    gathers, rank = gathers_of(team, GATHERING), 0 if team is None else team.ranks.rank
    states = together(gathers, rank, partial(states_to_save, optimizer, "sharded_state_dict"))
    # One checkpoint's keys are no other one's: nothing of it is read in place of what is not there.
    token = shared(gathers, secrets.token_hex(4))
    known, own = described(states, rank)
    if team is not None:
        known = known_to_all(team.ranks, known)
    state: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    nbytes = 0
    for name, shape, pieces in states_by_parameter(known):
        ranges = []
        for piece, values in pieces.items():
            entry = range_entry(piece, values)
            entry["tensors"] = {}
            for key, part in values.items():
                if not isinstance(part, Part):
                    continue
                where = f"{token}/{name}/{piece.start}-{piece.stop}/{key}"
                entry["tensors"][key] = [where, list(part.shape), part.dtype]
                entry["values"].pop(key, None)
                nbytes += part.nbytes
                if part.owner == rank:
                    tensors[where] = own[piece, key]
            ranges.append(detached(entry))
        state[name] = {"shape": list(shape), "ranges": ranges}
    header = {**optimizer_header(optimizer), "format": SHARDED_FORMAT, "token": token, "state": state}
    if team is None:
        header["gradients"] = saved_gradients(optimizer)
    buffer = io.BytesIO()
    torch.save(header, buffer)
    return ShardedEntries(buffer.getvalue(), tensors, nbytes)


def read_header(data: Any, where: str) -> dict[str, Any]:
    """The header of a checkpoint, from its bytes.

    Raises:
        ValueError: if it is none.
    """
    try:
        header = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{where} is damaged: its entry {HEADER!r} cannot be read ({error})") from error
    found = header.get("format") if isinstance(header, dict) else type(header).__name__
    if found != SHARDED_FORMAT:
        raise ValueError(f"{where} has format {found!r}; allowed is {SHARDED_FORMAT!r}")
    return header  # type: ignore[no-any-return]


def from_sharded(optimizer: ChunkOptimizer, header: dict[str, Any], read: Read) -> dict[str, Any]:
    """A ``state_dict`` with what this rank needs; its tensors are read when they are asked for.

    Raises:
        ValueError: if the header is damaged.
    """

    def source(entry: Any) -> tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]:
        where, shape, dtype = entry
        return tuple(shape), dtype, partial(read, where, tuple(shape), dtype)

    try:
        saved = _own(optimizer, header)
        state = {
            name: joined(name, entry["shape"], entry["ranges"], source)
            for name, entry in saved["state"].items()
        }
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the header of the checkpoint is damaged ({type(error).__name__}: {error})"
        ) from error
    return {**saved, "format": FORMAT, "state": state}


def wanted(
    optimizer: ChunkOptimizer, header: dict[str, Any]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The keys of the tensors that this rank needs, with shape and dtype."""
    return {
        where: (tuple(shape), dtype)
        for entry in _own(optimizer, header)["state"].values()
        for found in entry["ranges"]
        for where, shape, dtype in found["tensors"].values()
    }


def _own(optimizer: ChunkOptimizer, header: dict[str, Any]) -> dict[str, Any]:
    """The header with names of this model, without ranges that this rank does not need."""
    saved = renamed(header, [piece.name for piece in optimizer.plan.slices()])
    return {**saved, "state": near(saved["state"], optimizer._given_plan)}
