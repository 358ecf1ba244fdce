"""Where the leaves of active slices are while the weights stream, and how their updates reach the pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from chunkft.autograd import Slice, put_stand_in
from chunkft.plan import ParameterSpec
from chunkft.streaming import place_of
from chunkft.weights.inbox import Inbox, Watcher
from chunkft.weights.stream import WeightStream

CPU = torch.device("cpu")


class _OfStream:
    """What both have in common: modules hold the parameters by themselves, and are looked at as others are."""

    def bound(self, name: str) -> None:
        """What is to stand for a weight with active slices: the parameter."""

    def places(self, specs: Sequence[ParameterSpec]) -> None:
        """What is to look for parameters in the model: nothing of its own."""

    def leave(self) -> None:
        """The model is trained no more; it streams on until its stream is detached."""


class HostLeaves(_OfStream):
    """Leaves that are views of the pages in host memory, where they are updated; their gradients come down.

    Args:
        stream: of the model.
    """

    on_device = False
    copies = False

    def __init__(self, stream: WeightStream) -> None:
        self.stream = stream
        self.device = stream.device
        self._inbox = Inbox(stream.device)
        self._names: set[str] = set()

    def memory(self) -> dict[str, int]:
        """Bytes of the weights by place: see ``WeightStream.memory``."""
        return self.stream.memory()

    def streams(self, name: str) -> bool:
        """Whether this is about a parameter at all."""
        return self.stream.streams(name)

    def device_of(self, name: str) -> torch.device:
        """Where the leaves of a parameter that streams are."""
        return CPU

    def values(self, piece: Slice) -> Tensor:
        """The memory of a leaf."""
        return piece.of(self.stream.home(piece.name))

    def made(self, piece: Slice, leaf: nn.Parameter, watcher: Watcher | None) -> None:
        """There is a leaf with this memory now."""
        self._names.add(piece.name)
        self._inbox.expect(leaf, watcher)

    def settle(self) -> None:
        """Put in order where weights are that an interrupt left half moved."""
        self.stream.settle()

    def updating(self) -> None:
        """Leaves are about to be changed."""

    def publish(self) -> None:
        """Leaves were changed: what reads the weights next must see it."""
        self.stream.written(sorted(self._names))

    def forget(self) -> None:
        """The leaves are not used any more."""
        self.publish()
        self._inbox.forget()
        self._names.clear()

    def nbytes(self) -> int:
        """Bytes on the device of the leaves."""
        return 0


class DeviceLeaves(_OfStream):
    """Leaves on the device beside the ring: laid over their page whenever it comes, and written back after each update.

    Args:
        stream: of the model.
        updated_in_backward: whether the backward pass changes leaves: recomputes in it still need the values that the
            forward pass had.
    """

    on_device = True
    copies = True

    def __init__(self, stream: WeightStream, updated_in_backward: bool = False) -> None:
        self.stream = stream
        self.device = stream.device
        self._copies: dict[Slice, Tensor] = {}
        self._leaves: dict[Slice, nn.Parameter] = {}
        # Then all of them are written back before a pass begins, and its recomputes see their page as it was.
        self._in_backward = updated_in_backward
        if updated_in_backward and stream.ring is not None:
            stream.ring.lay_over_backward = False
        # Counts of changes of leaves and weights when both had the same values, and whether these can tell.
        self._versions: dict[Slice, tuple[int, int]] = {}
        self._updating = False
        self._stand_ins: list[Tensor] = []
        self._fence = place_of(stream.device).fence()
        stream.ask(self.catch_up)

    def memory(self) -> dict[str, int]:
        """Bytes of the weights by place: see ``WeightStream.memory``."""
        return self.stream.memory()

    def streams(self, name: str) -> bool:
        """Whether this is about a parameter at all."""
        return self.stream.streams(name)

    def device_of(self, name: str) -> torch.device:
        """Where the leaves of a parameter that streams are."""
        return self.stream.device

    def values(self, piece: Slice) -> Tensor:
        """The memory of a leaf: a copy of its part of the page."""
        if piece not in self._copies:
            part = piece.of(self.stream.home(piece.name))
            self._copies[piece] = torch.empty(part.shape, dtype=part.dtype, device=self.stream.device).copy_(
                part
            )
        return self._copies[piece]

    def made(self, piece: Slice, leaf: nn.Parameter, watcher: Watcher | None) -> None:
        """There is a leaf with this memory now."""
        before = self._leaves.get(piece)
        self._leaves[piece] = leaf
        self._note(piece)
        ring = self.stream.ring
        if self.stream.block_of(piece.name) is None or ring is None:
            # an embedding computes where its table is
            device = leaf.device
            if device != CPU:
                self._stand_ins.append(put_stand_in(leaf, CPU, lambda gradient: gradient.to(device)))
            return
        over = ring.overlays.setdefault(piece.name, [])
        ring.overlays[piece.name] = [entry for entry in over if entry[1] is not before] + [
            (piece, leaf, self._is_newer)
        ]

    @torch.no_grad()
    def publish(self) -> None:
        """Write leaves that were changed back into host memory; it is complete when this returns.

        The others may be older than their weights, into which somebody loaded others.
        """
        changed = [piece for piece in self._leaves if self._is_newer(piece)]
        self._updating = False
        if not changed:
            return
        for piece in changed:
            self.values_at_home(piece).copy_(self._leaves[piece].detach(), non_blocking=True)
            self._note(piece)
        self._fence.record()
        self._fence.synchronize()
        self.stream.written(sorted({piece.name for piece in changed}))

    def settle(self) -> None:
        """Put in order where weights are that an interrupt left half moved."""
        self.stream.settle()

    @torch.no_grad()
    def updating(self) -> None:
        """Leaves are about to be changed: what was done to their weights in host memory counts before."""
        for piece, leaf in self._leaves.items():
            if not self._is_newer(piece) and self._versions[piece][1] != self._counts(piece)[1]:
                leaf.data.copy_(self.values_at_home(piece), non_blocking=True)
        self._updating = True

    @torch.no_grad()
    def catch_up(self, tables_only: bool) -> None:
        """Give host memory the values of leaves that somebody changed in place, and leaves of tables those of host
        memory, which anybody may have changed; those of blocks are compared with their page when it comes.
        """
        tables = {
            piece: leaf for piece, leaf in self._leaves.items() if self.stream.block_of(piece.name) is None
        }
        some = tables_only and not self._in_backward
        if any(self._is_newer(piece) for piece in (tables if some else self._leaves)):
            self.publish()
        elif tables_only:
            for piece, leaf in tables.items():
                leaf.data.copy_(self.values_at_home(piece), non_blocking=True)

    def _is_newer(self, piece: Slice) -> bool:
        """Whether a leaf may have been changed since it had the values of its weight."""
        return self._updating or self._versions[piece][0] != self._counts(piece)[0]

    def _note(self, piece: Slice) -> None:
        self._versions[piece] = self._counts(piece)

    def _counts(self, piece: Slice) -> tuple[int, int]:
        return self._leaves[piece]._version, self.stream.parameter(piece.name)._version

    def values_at_home(self, piece: Slice) -> Tensor:
        """The part of the page that a leaf is a newer copy of."""
        return piece.of(self.stream.home(piece.name))

    def forget(self) -> None:
        """The leaves are not used any more; what they hold is written back first."""
        self.publish()
        ring = self.stream.ring
        if ring is not None:
            mine = {id(leaf) for leaf in self._leaves.values()}
            for name in {piece.name for piece in self._leaves} & set(ring.overlays):
                rest = [entry for entry in ring.overlays[name] if id(entry[1]) not in mine]
                if rest:
                    ring.overlays[name] = rest
                else:
                    del ring.overlays[name]
        self._leaves.clear()
        self._versions.clear()
        self._stand_ins.clear()
        self._copies.clear()

    def nbytes(self) -> int:
        """Bytes on the device of the leaves."""
        return sum(copy.numel() * copy.element_size() for copy in self._copies.values())
