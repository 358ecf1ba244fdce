"""Where the optimizer state of inactive slices lives: exact-size host memory, one arena a chunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chunkft.autograd import Slice
from chunkft.plan import ChunkPlan
from chunkft.streaming import HostArena

ALIGNMENT = 256
State = dict[str, Any]


class StateStore:
    """State of slices by slice; tensors are views into host arenas.

    State that is on the CPU is used in place: taking it out gives the views themselves, and putting it back
    copies nothing. State of another device is copied out and back.
    """

    def __init__(self, in_arena: bool = True) -> None:
        self.in_arena = in_arena
        self._states: dict[Slice, State] = {}
        self._arenas: list[HostArena] = []
        self._homes: dict[tuple[Slice, str], Tensor] = {}

    def successor(self, plan: ChunkPlan) -> StateStore:
        """A store of the same kind for a plan, without state."""
        return StateStore(self.in_arena)

    def load(self, states: Callable[[], dict[Slice, State]]) -> None:
        """Keep states that were read from a checkpoint, for slices that are active together."""
        self.put(states())

    def realise(self) -> None:
        """Called once a store takes the place of its predecessor; everything was read by then."""

    def open(self, pairs: Sequence[tuple[Slice, nn.Parameter]]) -> dict[Slice, State]:
        """State of slices for use where their leaves are; views of host memory if that is the CPU."""
        return {piece: self.take(piece, leaf.device) for piece, leaf in pairs}

    def close(self, pieces: Sequence[Slice], states: dict[Slice, State]) -> None:
        """Take back what ``open`` gave out for ``pieces``; only ``states`` is kept."""
        self.put(states)

    def prefetch(self, pieces: Sequence[Slice]) -> None:
        """``open`` will be called for these slices; nothing can be done ahead here."""

    def get(self, piece: Slice) -> State:
        """State of a slice where it is kept; empty if it has none yet. Not to be changed."""
        return self._states.get(piece, {})

    def pieces(self) -> list[Slice]:
        """The slices that have state."""
        return list(self._states)

    def put(self, states: dict[Slice, State]) -> None:
        """Keep the states of these slices, which are active together; makes one arena for what is new."""
        if not self.in_arena:
            self._states.update(states)
            return
        homeless: list[tuple[Slice, str, Tensor]] = []
        for piece, state in states.items():
            kept: State = {}
            for key, value in state.items():
                kept[key] = value
                if not isinstance(value, Tensor):
                    continue
                if value.dim() == 0 or value.numel() == 0:
                    kept[key] = value.detach().cpu()
                    continue
                home = self._homes.get((piece, key))
                if home is None or home.shape != value.shape or home.dtype != value.dtype:
                    homeless.append((piece, key, value))
                    continue
                if home.data_ptr() != value.data_ptr():
                    home.copy_(value.detach())
                kept[key] = home
            self._states[piece] = kept
        if homeless:
            self._house(homeless)

    def take(self, piece: Slice, device: torch.device) -> State:
        """State of a slice for use on a device; views of host memory if that is the CPU."""
        return {
            key: value.to(device) if isinstance(value, Tensor) and value.dim() > 0 else value
            for key, value in self._states.get(piece, {}).items()
        }

    def home(self, piece: Slice, key: str) -> Tensor | None:
        """Memory in which new state of an open slice may be made, so that keeping it copies nothing."""
        return None

    def holds(self, piece: Slice, key: str, tensor: Tensor) -> bool:
        """Whether a tensor of a slice's state lies in memory of the store."""
        home = self._homes.get((piece, key))
        return home is not None and home.data_ptr() == tensor.data_ptr()

    def clear(self) -> None:
        """Forget all state and release its memory."""
        self._states.clear()
        self._homes.clear()
        for arena in self._arenas:
            arena.close()
        self._arenas.clear()

    def drop(self, piece: Slice) -> None:
        """Forget the state of one slice; its place in the arena is used again when the slice returns."""
        self._states.pop(piece, None)

    def retain(self, piece: Slice, keys: set[str]) -> None:
        """Forget the state of one slice except for these keys."""
        self._states[piece] = {key: value for key, value in self.get(piece).items() if key in keys}

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that arenas hold."""
        return sum(arena.nbytes for arena in self._arenas)

    @property
    def spare_nbytes(self) -> int:
        """Bytes on devices that no state in use lies in."""
        return 0

    def _house(self, tensors: list[tuple[Slice, str, Tensor]]) -> None:
        offsets = []
        total = 0
        for _, _, tensor in tensors:
            offsets.append(total)
            total += math.ceil(tensor.numel() * tensor.element_size() / ALIGNMENT) * ALIGNMENT
        arena = HostArena(total)
        self._arenas.append(arena)
        for offset, (piece, key, tensor) in zip(offsets, tensors, strict=True):
            home = arena.tensor(offset, tuple(tensor.shape), tensor.dtype)
            home.copy_(tensor.detach())
            self._homes[piece, key] = home
            self._states[piece][key] = home


def tensor_nbytes(state: Mapping[str, Any]) -> int:
    """Bytes of the tensors of a state, scalars left out."""
    return sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor) and v.dim() > 0)


def detached(value: Any) -> Any:
    """Tensors inside of lists and dicts replaced by copies on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: detached(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(detached(entry) for entry in value)
    return value
