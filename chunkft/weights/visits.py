"""When a block has to be on the device: in its forward pass, and from its recompute, or the gradient of its output, to
the end of its backward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from chunkft.weights.ring import Ring, in_backward

Layout = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]


class Reference(NamedTuple):
    """What autograd keeps of a weight in place of its memory: where on the page of which block it is."""

    number: int
    layout: Layout
    thread: int


class Visit:
    """One use of a block: a call of it, or the backward pass of one.

    Attributes:
        number: of the block.
        thread: in which the block was called.
    """

    __slots__ = ("__weakref__", "number", "thread")

    def __init__(self, number: int, thread: int | None = None) -> None:
        self.number = number
        self.thread = threading.get_ident() if thread is None else thread


class Visits:
    """Holds blocks of a ring while somebody uses them, and fetches the next one meanwhile.

    The order is that of the blocks in the forward pass, and the reverse in the backward pass, where nothing is fetched
    below the lowest block with something to train.

    Args:
        ring: of the blocks.
        lowest: number of the lowest block that a backward pass comes to.
    """

    def __init__(self, ring: Ring, lowest: Callable[[], int]) -> None:
        self.ring = ring
        self._lowest = lowest
        self._users: dict[int, set[Visit]] = {}
        # Of backward passes that run, by number: what is open for them, and the thread whose pass it is.
        self._tasks: dict[int, tuple[list[Visit], int]] = {}
        self._last = (
            -1
        )  # the block that was called last in a forward pass; beyond all once a backward pass began
        self._lock = threading.RLock()
        self.on_refresh: Callable[[], None] = lambda: None

    def begin(self) -> None:
        """A forward pass begins: no page that came before it counts, since anybody may have changed weights."""
        with self._lock:
            if in_backward():
                return
            self._close_abandoned()
            self.ring.refresh()
            self.on_refresh()
            self._last = -1
            self.ring.fetch(0)

    def enter(self, visit: Visit) -> None:
        """The block of this visit is needed from now on."""
        with self._lock:
            number, back = visit.number, in_backward()
            if not back:
                if number <= self._last:
                    self.begin()
                self._last = number
            self._users.setdefault(number, set()).add(visit)
            try:
                self.ring.hold(number)
            except BaseException:
                self.leave(visit)
                raise
            if back:
                self._last = len(self.ring.blocks)
                self._note(visit)
                if number > self._lowest():
                    self.ring.fetch(number - 1)
            elif number + 1 < len(self.ring.blocks):
                self.ring.fetch(number + 1)

    def leave(self, visit: Visit) -> None:
        """It is not needed for this visit any more."""
        with self._lock:
            users = self._users.get(visit.number)
            if users is None or visit not in users:
                return
            users.discard(visit)
            if not users:
                del self._users[visit.number]
                self.ring.leave(visit.number)

    def demand(self, reference: Reference) -> Tensor:
        """The weight that autograd kept; its block is fetched if nothing did so before."""
        if not self.ring.holds(reference.number):
            if not in_backward():
                raise RuntimeError(
                    f"a tensor that autograd saved of block {self.ring.blocks[reference.number].name}, whose weights "
                    "stream, can be read in a backward pass only"
                )
            self.enter(Visit(reference.number, reference.thread))
        return self.ring.view(reference.number, reference.layout)

    def _note(self, visit: Visit) -> None:
        """Whatever happens, the visit is over at the end of the backward pass that runs."""
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._tasks[task] = [], visit.thread
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end(task))
        self._tasks[task][0].append(visit)

    def _end(self, task: int) -> None:
        with self._lock:
            visits, _ = self._tasks.pop(task, ((), 0))
            for visit in visits:
                self.leave(visit)

    def _close_abandoned(self) -> None:
        """End what a backward pass of this thread, or of one that is gone, left open at an error or an interrupt."""
        alive = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        for task, (_, thread) in list(self._tasks.items()):
            if thread not in alive:
                self._end(task)


@contextmanager
def kept_as_references(visits: Visits) -> Iterator[None]:
    """What autograd saves in here of weights on the device it keeps as references; everything else as outside.

    A checkpoint around the block sees neither in the forward pass nor in its recompute what is a weight.
    """
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
    ring, thread = visits.ring, threading.get_ident()

    def pack(tensor: Tensor) -> Any:
        number = None
        if (type(tensor) is Tensor or isinstance(tensor, nn.Parameter)) and tensor.layout is torch.strided:
            number = ring.owner(tensor.untyped_storage().data_ptr())
        if number is not None:
            layout = (tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
            return Reference(number, layout, thread)
        return tensor if outer is None else _Packed(outer[0](tensor), outer[1])

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Reference):
            return visits.demand(kept)
        if isinstance(kept, _Packed):
            tensor: Tensor = kept.unpack(kept.value)
            return tensor
        plain: Tensor = kept
        return plain

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Packed(NamedTuple):
    value: Any
    unpack: Callable[[Any], Tensor]


def latest(tensors: Any) -> Tensor | None:
    """Of tensors that require grad the one that was computed last: the block's own input, not one that many share."""
    found = [t for t in tree_leaves(tensors) if isinstance(t, Tensor) and t.requires_grad]
    return max(found, key=_sequence, default=None)


def _sequence(tensor: Tensor) -> int:
    node = tensor.grad_fn
    return -1 if node is None else int(node._sequence_nr())
