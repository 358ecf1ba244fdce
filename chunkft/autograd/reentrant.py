"""Refuses reentrant activation checkpointing where it would lose the gradients of active slices."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chunkft.autograd.reach import reached


class ReentrantGuard:
    """Raises before ``torch.utils.checkpoint`` with ``use_reentrant=True`` drops a gradient.

    ``CheckpointFunction`` runs the forward pass without grad mode and, if none of its inputs requires grad, never
    comes back for the backward pass; with the parameters below frozen that is the usual case. Inside of a
    forward pass of ``model`` that was called without grad mode nothing can be lost, so nothing is raised.

    Attributes:
        running: whether a forward pass of the model runs.
        called: whether one began in grad mode since somebody set this to False.
        follow: weak reference to what looks for parameters that were replaced.
    """

    def __init__(self) -> None:
        self._without_grad = False
        self.running = False
        self.called = False
        self.follow: Callable[[], Callable[[], None] | None] | None = None
        self._model_hooks: list[RemovableHandle] = []
        self._handles: list[RemovableHandle] = []
        self._checked: list[Any] = []

    def watch(self, model: nn.Module) -> None:
        """Note from now on whether the model is called without grad mode; done once, until ``remove``."""
        if not self._model_hooks:
            self._model_hooks.append(model.register_forward_pre_hook(_Enter(self)))
            loaded = model.register_load_state_dict_post_hook(_Loaded(self))  # type: ignore[no-untyped-call]
            self._model_hooks.append(loaded)
            self._model_hooks.append(
                model.register_forward_hook(_Leave(self), with_kwargs=True, always_call=True)
            )

    def hold(self, handles: Iterable[RemovableHandle]) -> None:
        """Treat hooks of others as ours of the model: gone after ``remove``, and listed in ``hook_ids``."""
        self._model_hooks.extend(handles)

    def guard(self, module: nn.Module) -> None:
        """Check at every call of a module that has active parameters."""
        stable = module.__dict__.get("_chunkft_forward")
        if stable is not None:  # of a model that is compiled: hooks that come and go would compile it again
            stable.check = self.check
            self._checked.append(stable)
            return
        self._handles.append(module.register_forward_pre_hook(_Check(self)))

    def check(self, module: nn.Module) -> None:
        """Raise RuntimeError if the gradients of ``module`` are about to be lost."""
        if torch.is_grad_enabled() or self._without_grad:
            return
        inputs = _checkpointed_inputs(sys._getframe(1))
        if inputs is None or any(isinstance(arg, Tensor) and arg.requires_grad for arg in inputs):
            return
        raise RuntimeError(
            "reentrant activation checkpointing (use_reentrant=True) would lose the gradients of "
            f"{type(module).__name__}: no input of the checkpointed block requires grad. Use "
            "use_reentrant=False, or call model.enable_input_require_grads()"
        )

    def release(self) -> None:
        """Check no module any more. The hooks of the model stay: with other ones a compiler would start anew."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for stable in self._checked:
            stable.check = None
        self._checked.clear()

    def remove(self) -> None:
        """Take all hooks out again."""
        self.release()
        for handle in self._model_hooks:
            handle.remove()
        self._model_hooks.clear()

    def hook_ids(self) -> list[int]:
        """Keys of the hooks in their modules' hook dicts."""
        return [handle.id for handle in [*self._model_hooks, *self._handles]]


def move_checks(module: nn.Module) -> None:
    """Let the stable forward of a module make the checks that hooks made before it got one."""
    hooks = module._forward_pre_hooks
    for number, hook in list(hooks.items()):
        if isinstance(hook, _Check) and hook.guard is not None:
            del hooks[number]
            hook.guard.guard(module)


class _Hook:
    """A hook that survives pickling and copying of its module, but without its guard: a copy is not attached."""

    def __init__(self, guard: ReentrantGuard | None) -> None:
        self.guard = guard

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None,)


class _Enter(_Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.guard is not None:
            self.guard._without_grad = not torch.is_grad_enabled()
            self.guard.running = True
            if torch.is_grad_enabled():
                self.guard.called = True


class _Leave(_Hook):
    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.guard is None:
            return None
        self.guard._without_grad = False
        self.guard.running = False
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        return reached(output, (args, kwargs))


class _Loaded(_Hook):
    """After ``load_state_dict``, which may have put other parameters into the model."""

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        follow = None if self.guard is None or self.guard.follow is None else self.guard.follow()
        if follow is not None:
            follow()


class _Check(_Hook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.guard is not None:
            self.guard.check(module)


def _checkpointed_inputs(frame: FrameType | None) -> tuple[Any, ...] | None:
    """Inputs of the outermost ``CheckpointFunction.forward`` on the stack, or None.

    The outermost decides: blocks that are nested in it run again, with grad mode, when its backward pass comes.
    """
    inputs: tuple[Any, ...] | None = None
    while frame is not None:
        code = frame.f_code
        if (
            code.co_name == "forward"
            and code.co_filename.endswith("checkpoint.py")
            and "run_function" in frame.f_locals
        ):
            inputs = tuple(frame.f_locals["args"])
        frame = frame.f_back
    return inputs
