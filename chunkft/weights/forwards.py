"""The forward of a block whose weights stream, and what its layers outside of blocks need."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from chunkft.autograd import Hook, copied_forward, is_transformed, runs_as_it_is, undisturbed
from chunkft.weights.endings import in_backward
from chunkft.weights.parking import ParkingLot, parked_call
from chunkft.weights.visits import Visit, Visits, kept_as_references, latest

_CHECKPOINTING = "gradient_checkpointing"


@runs_as_it_is
class StreamedForward:
    """The forward of one block; set on the instance, so that its class stays as it is.

    The block is on the device from the beginning of a call to its end, and in the backward pass from the gradient of an
    output, or a recompute, until the gradient of its input is there.

    Args:
        module: the block.
        inner: its forward until now.
        number: of the block in the ring.
        visits: of the stream; None once it is gone, where a wrapper kept this forward.
        lot: where its input waits for a recompute; None: the model does its own checkpointing, or none.
    """

    __slots__ = ("__weakref__", "checkpointed", "inner", "lot", "module", "number", "visits")

    def __init__(
        self, module: nn.Module, inner: Any, number: int, visits: Visits | None, lot: ParkingLot | None = None
    ) -> None:
        self.module = module
        self.inner = inner
        self.number = number
        self.visits = visits
        self.lot = lot
        self.checkpointed: Any = None  # what transformers' own checkpointing was set to
        if lot is not None:
            self._checkpoint_alone()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return undisturbed(self._compute, args, kwargs)

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.visits is None:
            return self.inner(*args, **kwargs)
        if is_transformed():
            raise RuntimeError(
                f"{type(self.module).__name__}: a block whose weights stream cannot be traced, exported or transformed "
                "(torch.func); detach() the stream first"
            )
        visits, recorded, recomputes = self.visits, torch.is_grad_enabled(), in_backward()
        visit = Visit(self.number)
        released = False
        try:
            visits.enter(visit)
            if recorded:
                _at_gradient(latest((args, kwargs)), visits, visit, begins=False)
                with kept_as_references(visits):
                    output = self._recorded(args, kwargs)
            else:
                output = self.inner(*args, **kwargs)
            if recorded and not recomputes:
                visits.leave(visit)
                released = True
                for tensor in tree_leaves(output):
                    if isinstance(tensor, Tensor) and tensor.requires_grad:
                        _at_gradient(tensor, visits, visit, begins=True)
            return output
        finally:
            # What is recomputed is used by the backward pass that runs: until the gradient of its input, or its end.
            if not released and not (recorded and recomputes):
                visits.leave(visit)

    def release(self) -> None:
        """The stream is gone: from now on this is what was there before."""
        self.visits = None
        if self.checkpointed is not None:
            self.module.__dict__[_CHECKPOINTING] = self.checkpointed

    def _recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        main = latest((args, kwargs))
        if self.lot is None:
            return self.inner(*args, **kwargs)
        self._checkpoint_alone()
        if main is None:
            return self.inner(*args, **kwargs)
        return parked_call(self.inner, main, self.lot, args, kwargs)

    def _checkpoint_alone(self) -> None:
        """Turn transformers' checkpointing of the block off, which would keep its input."""
        if self.module.__dict__.get(_CHECKPOINTING):
            self.checkpointed = self.module.__dict__[_CHECKPOINTING]
            self.module.__dict__[_CHECKPOINTING] = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the model has weights of its own, which do not stream.
        return copied_forward(self.module, self.inner, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, "forward")


def _at_gradient(tensor: Tensor | None, visits: Visits, visit: Visit, *, begins: bool) -> None:
    """When the gradient of a tensor is there, the backward pass of a block begins, or is over."""
    if tensor is None:
        return
    # The graph outlives the stream where somebody keeps it.
    reference = weakref.ref(visits)

    def at_gradient(gradient: Tensor) -> None:
        current = reference()
        if current is None:
            return
        if begins and torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True is not possible while weights stream: second derivatives would need all blocks at "
                "once; detach() the stream first"
            )
        (current.enter if begins else current.leave)(visit)

    tensor.register_hook(at_gradient)  # type: ignore[no-untyped-call]


class ToHost(Hook):
    """Before an embedding whose table is in host memory: its ids go there. Its target is a weak reference to the
    stream.
    """

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        stream = None if self.target is None else self.target()
        if stream is None:
            return None
        stream.catch_up(True)
        return tree_map(lambda one: one.cpu() if isinstance(one, Tensor) else one, (args, kwargs))


class ToDevice(Hook):
    """After it: the rows go to the device. Its target is the device."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output if self.target is None else output.to(self.target, non_blocking=True)


@runs_as_it_is
class Begin(Hook):
    """Before a module that holds blocks: a forward pass begins. Its target is a weak reference to the visits."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        visits = None if self.target is None else self.target()
        if visits is not None and not torch.compiler.is_compiling():
            undisturbed(visits.begin, sys._getframe(1))


@runs_as_it_is
class Finish(Hook):
    """After it, also if it failed. Its target is the same."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        visits = None if self.target is None else self.target()
        if visits is not None and not torch.compiler.is_compiling():
            undisturbed(visits.finish, sys._getframe(1))
