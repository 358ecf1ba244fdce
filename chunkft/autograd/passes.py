"""Forward passes of an attached model: which thread is in one, and what is done at their ends."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterable
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from chunkft.autograd.hooks import Hook, runs_as_it_is, undisturbed
from chunkft.autograd.reach import is_cut_off, reached


class Owner(Protocol):
    """Who wants to know of forward passes."""

    @property
    def trains(self) -> bool:
        """Whether anything in the model is trained."""

    def before_forward(self) -> None:
        """A forward pass begins in grad mode."""

    def after_loading(self) -> None:
        """``load_state_dict`` is through, and may have put other parameters into the model."""


class Passes:
    """The forward passes of a model.

    Attributes:
        called: whether one began in grad mode since somebody set this to False.
    """

    def __init__(self, owner: Owner) -> None:
        self.called = False
        self._owner = weakref.ref(owner)
        # By thread, of each pass that runs, the frame that called the hook at the beginning, and whether it was without
        # grad mode. What ended by an interrupt never came to the hook at the end: the frame tells.
        self._inside: dict[int, list[tuple[FrameType, bool]]] = {}
        self._handles: list[RemovableHandle] = []

    def watch(self, model: nn.Module) -> None:
        """Note the forward passes of ``model`` from now on; done once, until ``remove``."""
        if not self._handles:
            self._handles.append(model.register_forward_pre_hook(_Enter(self)))
            loaded = model.register_load_state_dict_post_hook(_Loaded(self))  # type: ignore[no-untyped-call]
            self._handles.append(loaded)
            self._handles.append(
                model.register_forward_hook(_Leave(self), with_kwargs=True, always_call=True)
            )

    def hold(self, handles: Iterable[RemovableHandle]) -> None:
        """Treat hooks of others as ours of the model: gone after ``remove``, and listed in ``hook_ids``."""
        self._handles.extend(handles)

    def remove(self) -> None:
        """Take all hooks out again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def hook_ids(self) -> list[int]:
        """Keys of the hooks in the model's hook dicts."""
        return [handle.id for handle in self._handles]

    @property
    def running(self) -> bool:
        """Whether this thread is in a forward pass of the model."""
        return self._current() is not None

    @property
    def without_grad(self) -> bool:
        """Whether it is in one that was called without grad mode."""
        current = self._current()
        return current is not None and current[1]

    def enter(self, module: nn.Module, frame: FrameType) -> None:
        """A forward pass begins, called from this frame."""
        if module.__dict__.get("_is_replica"):
            raise RuntimeError(
                "nn.DataParallel copies the model in every call, and the copies would compute with the slices of the "
                "first device; use DistributedDataParallel, which is one process a device"
            )
        recorded = torch.is_grad_enabled()
        owner = self._owner()
        if recorded and owner is not None:
            owner.before_forward()
        if self._inside:
            self._forget_ended()
        self._inside.setdefault(threading.get_ident(), []).append((frame, not recorded))
        self.called = self.called or recorded

    def leave(self, module: nn.Module, output: Any, inputs: Any) -> Any:
        """It ends; None, or what is to be returned in place of ``output``."""
        if self._current() is not None:
            thread = threading.get_ident()
            self._inside[thread].pop()
            if not self._inside[thread]:
                del self._inside[thread]
        owner = self._owner()
        if owner is None or not torch.is_grad_enabled() or is_transformed() or not owner.trains:
            return None
        return reached(output, module, inputs)

    def loaded(self) -> None:
        """Weights were loaded into the model."""
        owner = self._owner()
        if owner is not None:
            owner.after_loading()

    def _current(self) -> tuple[FrameType, bool] | None:
        """The innermost pass of this thread that has not ended."""
        passes = self._inside.get(threading.get_ident(), [])
        while passes:
            frame: FrameType | None = sys._getframe(1)
            while frame is not None:
                if frame is passes[-1][0]:
                    return passes[-1]
                frame = frame.f_back
            passes.pop()
        return None

    def _forget_ended(self) -> None:
        """Let go of what threads left that are gone; those that run look after their own."""
        alive = {thread.ident for thread in threading.enumerate()}
        for thread in list(self._inside):
            if thread not in alive:
                self._inside.pop(thread, None)


def is_transformed() -> bool:
    """Whether the operators that run are those of a function transform (``torch.func``) or of a trace.

    Neither knows our functions; what the layers do by themselves they transform and record.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._are_functorch_transforms_active() or torch._C._is_tracing())


@runs_as_it_is
class _Enter(Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.target is None:
            return
        if torch.compiler.is_compiling():  # flags are asked for while it is traced only
            self.target.called = True
        else:
            undisturbed(self.target.enter, module, sys._getframe(1))


@runs_as_it_is
class _Leave(Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.target is None:
            return None
        if torch.compiler.is_compiling() and not (torch.is_grad_enabled() and is_cut_off(output)):
            return None
        return undisturbed(self.target.leave, module, output, (args, kwargs))


class _Loaded(Hook):
    """After ``load_state_dict``, which may have put other parameters into the model."""

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        if self.target is not None:
            self.target.loaded()
