"""Gradients of leaves in host memory, computed on the device: they come down while the backward pass goes on."""

from __future__ import annotations

import math
import threading
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from chunkft.autograd import put_early_stand_in
from chunkft.streaming import host_memory, place_of
from chunkft.weights.endings import at_end_of_backward

ALIGNMENT = 256


class Watcher(Protocol):
    """Who shows the gradients of leaves elsewhere, as ``weight.grad``."""

    def settle(self) -> None:
        """A gradient is about to arrive."""

    def show(self) -> None:
        """It is there."""


@dataclass
class _Arrival:
    leaf: weakref.ReferenceType[Tensor]
    watcher: Watcher | None
    gradient: Tensor | None  # on the device, until the copy is done
    copy: Tensor
    done: Any  # an event, or None on a CPU


class Inbox:
    """Gives leaves in host memory their gradients by the end of the backward pass.

    The copies run on a stream of their own beside the rest of the backward pass; its end waits for the last of them.

    Args:
        device: where gradients are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._events: list[Any] = []
        self._arrivals: list[_Arrival] = []
        self._tasks: set[int] = set()
        self._lock = threading.RLock()
        self._rooms: list[
            _Room
        ] = []  # the first one for gradients, the second for those that are added to them
        self._places: dict[int, int] = {}  # of each leaf in a room
        self._size = 0
        self._stand_ins: list[Tensor] = []

    def forget(self) -> None:
        """No leaf is expected any more; memory is kept for the next ones."""
        with self._lock:
            self._places.clear()
            self._size = 0
            self._arrivals.clear()
            self._stand_ins.clear()

    def expect(self, leaf: Tensor, watcher: Watcher | None) -> None:
        """Deliver the gradients of this leaf from now on."""
        size = leaf.numel() * leaf.element_size()
        key = id(leaf)
        with self._lock:
            self._places[key] = self._size
            self._size += math.ceil(size / ALIGNMENT) * ALIGNMENT
        # The graph of the stand-in must hold neither the leaf, which holds it, nor us.
        me, target = weakref.ref(self), weakref.ref(leaf)
        seen = None if watcher is None else weakref.ref(watcher)

        def deliver(gradient: Tensor) -> None:
            inbox, owner = me(), target()
            if inbox is not None and owner is not None:
                inbox._receive(owner, None if seen is None else seen(), gradient, key)

        self._stand_ins.append(put_early_stand_in(leaf, self.device, deliver))

    def _receive(self, leaf: Tensor, watcher: Watcher | None, gradient: Tensor, key: int) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True is not possible while weights stream and are updated on the host; detach() first"
            )
        with self._lock:
            self._at_end()
            if any(other.leaf() is leaf for other in self._arrivals):
                self._deliver()  # of a checkpoint with a backward pass of its own: there is one place only
            if self._on_gpu:
                self._arrivals.append(self._copied(leaf, watcher, gradient, key))
            else:
                self._arrivals.append(_Arrival(weakref.ref(leaf), watcher, None, gradient.clone(), None))

    def _copied(self, leaf: Tensor, watcher: Watcher | None, gradient: Tensor, key: int) -> _Arrival:
        """A copy that is under way. The gradient is kept until it is done, and not longer."""
        for other in self._arrivals:
            if other.gradient is not None and other.done.query():
                other.gradient = None
        copy = self._room(0 if leaf.grad is None else 1).tensor(self._places[key], leaf)
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            copy.copy_(gradient, non_blocking=True)
            done = self._events.pop() if self._events else torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return _Arrival(weakref.ref(leaf), watcher, gradient, copy, done)

    def _room(self, number: int) -> _Room:
        while len(self._rooms) <= number:
            self._rooms.append(_Room(self.device))
        self._rooms[number].reserve(self._size)
        return self._rooms[number]

    def _at_end(self) -> None:
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            at_end_of_backward(lambda failed: self._end(task))
            self._tasks.add(task)

    def _end(self, task: int) -> None:
        with self._lock:
            self._tasks.discard(task)
            self._deliver()

    @torch.no_grad()
    def _deliver(self) -> None:
        arrivals, self._arrivals = self._arrivals, []
        for arrival in arrivals:
            if arrival.done is not None:
                arrival.done.synchronize()
                self._events.append(arrival.done)
            leaf = arrival.leaf()
            if leaf is None:
                continue
            if arrival.watcher is not None:
                arrival.watcher.settle()
            if leaf.grad is None:
                leaf.grad = arrival.copy
            else:
                leaf.grad.add_(arrival.copy)
            if arrival.watcher is not None:
                arrival.watcher.show()


class _Room:
    """Page-locked memory for the gradients of a chunk."""

    def __init__(self, device: torch.device) -> None:
        self._place = place_of(device)
        self._arena: Any = None

    def reserve(self, nbytes: int) -> None:
        if self._arena is None or self._arena.nbytes < nbytes:
            self._arena = host_memory(max(1, nbytes), "auto", self._place)

    def tensor(self, offset: int, like: Tensor) -> Tensor:
        tensor: Tensor = self._arena.tensor(offset, tuple(like.shape), like.dtype)
        return tensor
