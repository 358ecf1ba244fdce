"""State that lies on many ranks, brought block by block to the one that writes it, or to all of them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chunkft.autograd import Slice
from chunkft.optim.state import State
from chunkft.parallel import Ranks

BLOCK_BYTES = 32 << 20  # of a part of another rank, that is all that the writing one holds of it
GATHERING = "gathering the optimizer's state"


@dataclass(frozen=True)
class Part:
    """A tensor of one rank's state, as the other ranks know it.

    Attributes:
        owner: the rank that has it.
        piece, key: whose state it is.
        shape, dtype: of the tensor.
    """

    owner: int
    piece: Slice
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def dim(self) -> int:
        """Number of dimensions, by the name that tensors have for it."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


Described = dict[Slice, State]  # with a Part in the place of each tensor of one dimension or more
Own = dict[tuple[Slice, str], Tensor]


class Stopped(RuntimeError):
    """Another rank could not go on, and will say why."""


def described(states: Mapping[Slice, State], rank: int) -> tuple[Described, Own]:
    """States of slices without their tensors, and the tensors."""
    found: Described = {}
    own: Own = {}
    for piece, state in states.items():
        found[piece] = {}
        for key, value in state.items():
            found[piece][key] = value
            if isinstance(value, Tensor):
                if value.dim() == 0:
                    found[piece][key] = value.detach().cpu()
                    continue
                found[piece][key] = Part(rank, piece, key, tuple(value.shape), value.dtype)
                own[piece, key] = value.detach()
    return found, own


def known_to_all(ranks: Ranks, states: Described) -> Described:
    """The descriptions of all ranks; a collective."""
    everything: Described = {}
    for states_of_rank in ranks.objects(states, GATHERING):
        everything.update(states_of_rank)
    return everything


class Courier:
    """Brings parts to rank 0, or to all ranks, in rounds; every rank has the same rounds.

    Before each round all ranks agree that nobody has failed, so that nobody waits for a rank that gave up.

    Args:
        ranks: among whom the state is spread.
        device: of the ranks; tensors travel between CPUs where that can be.
        own: the tensors of this rank.
        rounds: the parts of each round, in order; those of no bytes are left out.
        everywhere: whether all ranks get everything; else rank 0 does, and the others call ``serve``.
    """

    def __init__(
        self,
        ranks: Ranks,
        device: torch.device,
        own: Own,
        rounds: Sequence[Sequence[Part]],
        everywhere: bool = False,
    ) -> None:
        self._ranks = ranks
        self._device = ranks.post(device)
        self._own = own
        self._everywhere = everywhere
        self._rounds = deque(tuple(part for part in one if part.nbytes) for one in rounds)
        self._rounds.append(())  # in which all learn whether the one before went well
        self._due: deque[Part] = deque()
        self._position = 0  # bytes that have come of the first of them
        self._failed: Exception | None = None

    def begin(self) -> None:
        """Begin the next round.

        Raises:
            Stopped: if another rank failed; there is no further round then.
        """
        self._due = deque(self._rounds.popleft())
        if not self._all_well(True):
            self._rounds.clear()
            raise Stopped("another rank could not read its state")

    def blocks(self, part: Part) -> Iterator[Tensor]:
        """The bytes of a part of this round, as flat tensors on the CPU, each to be used before the next one."""
        assert self._due[0] is part, "parts are taken in the order of their round"
        own = self._flat(part) if part.owner == self._ranks.rank else None
        if own is not None and not self._everywhere:
            self._due.popleft()
            yield own.cpu()
            return
        while self._due and self._due[0] is part:
            start = self._position
            block = self._next_block(None if own is None else own[start : start + BLOCK_BYTES])
            yield block.cpu()

    def tensor(self, part: Part) -> Tensor:
        """A part of this round as a tensor on the CPU."""
        whole = torch.empty(part.nbytes, dtype=torch.uint8)
        position = 0
        for block in self.blocks(part) if part.nbytes else ():
            whole[position : position + block.numel()] = block
            position += block.numel()
        return whole.view(part.dtype).view(part.shape)

    def serve(self) -> None:
        """Send what this rank has of every round, until rank 0 has all of it or some rank failed.

        Raises:
            What kept this rank from reading its state, once the others know of it.
        """
        while self._rounds:
            self._due = deque(self._rounds.popleft())
            if not self._all_well(self._failed is None):
                break
            for part in self._due:
                if part.owner == self._ranks.rank:
                    self._send(part)
        if self._failed is not None:
            raise self._failed

    def abandon(self) -> None:
        """Give up on this rank: take what the others send of this round, and stop them before the next one."""
        while self._due:
            if self._due[0].owner == self._ranks.rank and not self._everywhere:
                self._due.popleft()
            else:
                self._next_block(None)
        if self._rounds:
            self._rounds.clear()
            self._all_well(False)

    def _all_well(self, well: bool) -> bool:
        failed = torch.tensor([0.0 if well else 1.0], dtype=torch.float64)
        return not self._ranks.announce(failed, self._device, GATHERING)[0]

    def _send(self, part: Part) -> None:
        try:
            flat = self._flat(part)
        except (
            Exception
        ) as error:  # rank 0 waits for so many bytes; that they are none it learns with the next round
            self._failed = error
            flat = torch.zeros(part.nbytes, dtype=torch.uint8)
        for start in range(0, part.nbytes, BLOCK_BYTES):
            block = flat[start : start + BLOCK_BYTES].to(self._device)
            self._ranks.send(block, 0, GATHERING)

    def _next_block(self, own: Tensor | None) -> Tensor:
        """Move the next block of the first part that is due; if this rank has it and cannot read it, zeros."""
        part = self._due[0]
        size = min(BLOCK_BYTES, part.nbytes - self._position)
        self._position += size
        if self._position >= part.nbytes:
            self._due.popleft()
            self._position = 0
        if own is None:
            block = torch.zeros(size, dtype=torch.uint8, device=self._device)
        else:
            block = own.to(self._device, copy=True)
        if self._everywhere:
            self._ranks.share(block, part.owner, GATHERING)
        else:
            self._ranks.receive(block, part.owner, GATHERING)
        return block

    def _flat(self, part: Part) -> Tensor:
        return self._own[part.piece, part.key].contiguous().reshape(-1).view(torch.uint8)


def parts_in(values: Any) -> Iterator[Part]:
    """All parts inside of dicts, lists and tuples."""
    if isinstance(values, Part):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from parts_in(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from parts_in(value)
