"""When a block has to be on the device: in its forward pass, and from its recompute, or the gradient of its output, to
the end of its backward pass.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from chunkft.weights.endings import at_end_of_backward, in_backward
from chunkft.weights.ring import Ring

_OURS = "_chunkft"
Layout = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]


class Reference(NamedTuple):
    """What autograd keeps of a weight in place of its memory: where on the page of which block it is."""

    number: int
    layout: Layout
    thread: int
    version: int


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
    below the lowest block with something to train. A block that is called by itself, outside of a forward pass of a
    module that holds it, comes when it is called: the caller may change the weights of the next one before its turn.

    Args:
        ring: of the blocks.
        lowest: number of the lowest block that a backward pass comes to.
    """

    def __init__(self, ring: Ring, lowest: Callable[[], int]) -> None:
        self.ring = ring
        self._lowest = lowest
        self._users: dict[int, set[Visit]] = {}
        self._tasks: dict[
            int, list[Visit]
        ] = {}  # of backward passes that run, by number: what is open for them
        self._passes: dict[int, FrameType] = {}  # by thread the frame that called a module with blocks in it
        self._lock = threading.RLock()
        self.on_refresh: Callable[[], None] = lambda: None

    def begin(self, frame: FrameType) -> None:
        """A forward pass of a module with blocks begins, called from this frame: no page that came before it counts,
        since anybody may have changed weights.
        """
        if in_backward():
            return
        with self._lock:
            if self._inside():
                return
            drop_left_hooks()
            self._close_abandoned()
            self._refresh()
            self._passes[threading.get_ident()] = frame
            self.ring.fetch(0)

    def finish(self, frame: FrameType) -> None:
        """One that was called from this frame ends."""
        thread = threading.get_ident()
        if self._passes.get(thread) is frame or not self._inside():
            self._passes.pop(thread, None)

    def enter(self, visit: Visit) -> None:
        """The block of this visit is needed from now on, until ``leave``, which is to be called also if this fails."""
        with self._lock:
            number, back = visit.number, in_backward()
            if back:
                self._note(visit)
            follows = back or self._inside()
            if not follows:
                self._close_abandoned()
                self._refresh()
            self._users.setdefault(number, set()).add(visit)
            self.ring.hold(number)
            if back and number > self._lowest():
                self.ring.fetch(number - 1)
            elif follows and not back and number + 1 < len(self.ring.blocks):
                self.ring.fetch(number + 1)

    def leave(self, visit: Visit) -> None:
        """It is not needed for this visit any more."""
        with self._lock:
            users = self._users.get(visit.number)
            if users is None or visit not in users:
                return
            if len(users) == 1:
                self.ring.leave(visit.number)
            users.discard(visit)
            if not users:
                self._users.pop(visit.number, None)

    def demand(self, reference: Reference) -> Tensor:
        """The weight that autograd kept; its block is fetched if nothing did so before."""
        if not self.ring.holds(reference.number):
            if not in_backward():
                raise RuntimeError(
                    f"a tensor that autograd saved of block {self.ring.blocks[reference.number].name}, whose weights "
                    "stream, can be read in a backward pass only"
                )
            self.enter(Visit(reference.number, reference.thread))
        if self.ring.version(reference.number, _offset(reference.layout)) != reference.version:
            raise RuntimeError(
                f"a weight of block {self.ring.blocks[reference.number].name} was changed between its forward and its "
                "backward pass, which needs it as it was; call step() only after backward()"
            )
        return self.ring.view(reference.number, reference.layout)

    def settle(self) -> None:
        """Put in order what an interrupt left half done."""
        with self._lock:
            if not in_backward() and not self._inside():
                self._close_abandoned()

    def _refresh(self) -> None:
        self.ring.refresh()
        self.on_refresh()

    def _inside(self) -> bool:
        """Whether this thread is in a forward pass of a module with blocks; an interrupt may have ended one."""
        outermost = self._passes.get(threading.get_ident())
        if outermost is None:
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame is outermost:
                return True
            frame = frame.f_back
        return False

    def _note(self, visit: Visit) -> None:
        """Whatever happens, the visit is over at the end of the backward pass that runs."""
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            at_end_of_backward(lambda failed: self._end(task, failed))
            self._tasks[task] = []
        self._tasks[task].append(visit)

    def _end(self, task: int, failed: bool) -> None:
        with self._lock:
            if failed and self._tasks.get(task):
                self.ring.wait()
            for visit in self._tasks.pop(task, ()):
                self.leave(visit)

    def _close_abandoned(self) -> None:
        """End what this thread, or one that is gone, left open in a forward pass at an interrupt."""
        alive = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        current = {visit for visits in self._tasks.values() for visit in visits}
        for users in list(self._users.values()):
            for visit in [v for v in users if v.thread not in alive and v not in current]:
                self.leave(visit)
        self.ring.settle(self._users)
        for thread in [thread for thread in self._passes if thread not in alive]:
            del self._passes[thread]


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
            return Reference(number, layout, thread, ring.version(number, _offset(layout)))
        return _Kept(tensor, tensor._version) if outer is None else _Packed(outer[0](tensor), outer[1])

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Reference):
            return visits.demand(kept)
        if isinstance(kept, _Kept):
            # which autograd asks only of what passes no hooks
            if kept.tensor._version != kept.version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"a {kept.tensor.dtype} of shape {tuple(kept.tensor.shape)} in a block whose weights stream is at "
                    f"version {kept.tensor._version}; expected version {kept.version} instead"
                )
            return kept.tensor
        tensor: Tensor = kept.unpack(kept.value)
        return tensor

    pack.__dict__[_OURS] = True
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def drop_left_hooks() -> None:
    """Take out what an interrupt left of ``kept_as_references``, where no block is being called in this thread."""
    autograd = torch._C._autograd
    while (top := autograd._top_saved_tensors_default_hooks(False)) and getattr(top[0], _OURS, False):
        autograd._pop_saved_tensors_default_hooks()


class _Kept(NamedTuple):
    tensor: Tensor
    version: int


def _offset(layout: Layout) -> int:
    dtype, _, _, offset = layout
    return offset * dtype.itemsize


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
