"""Where the leaves of active slices are while the weights stream, and how their updates reach the pages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chunkft.autograd import Slice, put_stand_in
from chunkft.streaming import place_of
from chunkft.weights.inbox import Inbox, Watcher
from chunkft.weights.stream import WeightStream

CPU = torch.device("cpu")


class HostLeaves:
    """Leaves that are views of the pages in host memory, where they are updated; their gradients come down.

    Args:
        stream: of the model.
    """

    on_device = False

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


class DeviceLeaves:
    """Leaves on the device beside the ring: laid over their page whenever it comes, and written back after each update.

    Args:
        stream: of the model.
        updated_in_backward: whether the backward pass changes leaves: recomputes in it still need the values that the
            forward pass had.
    """

    on_device = True

    def __init__(self, stream: WeightStream, updated_in_backward: bool = False) -> None:
        self.stream = stream
        self.device = stream.device
        self._copies: dict[Slice, Tensor] = {}
        self._leaves: dict[Slice, nn.Parameter] = {}
        if updated_in_backward and stream.ring is not None:
            stream.ring.lay_over_backward = False
        self._versions: dict[Slice, int] = {}  # of the leaves, when they were written back
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
        self._versions[piece] = leaf._version
        ring = self.stream.ring
        if self.stream.block_of(piece.name) is None or ring is None:
            # an embedding computes where its table is
            device = leaf.device
            if device != CPU:
                self._stand_ins.append(put_stand_in(leaf, CPU, lambda gradient: gradient.to(device)))
            return
        over = ring.overlays.setdefault(piece.name, [])
        ring.overlays[piece.name] = [(p, other) for p, other in over if other is not before] + [(piece, leaf)]

    @torch.no_grad()
    def publish(self) -> None:
        """Write the leaves back into host memory; it is complete when this returns."""
        if not self._leaves:
            return
        for piece, leaf in self._leaves.items():
            self.values_at_home(piece).copy_(leaf.detach(), non_blocking=True)
            self._versions[piece] = leaf._version
        self._fence.record()
        self._fence.synchronize()
        self.stream.written(sorted({piece.name for piece in self._leaves}))

    def catch_up(self, tables_only: bool) -> None:
        """Write the leaves back if somebody changed one in place, of weights that are not laid over a page."""
        for piece, leaf in self._leaves.items():
            if leaf._version != self._versions[piece] and not (
                tables_only and self.stream.block_of(piece.name) is not None
            ):
                self.publish()
                return

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
                rest = [(piece, leaf) for piece, leaf in ring.overlays[name] if id(leaf) not in mine]
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
