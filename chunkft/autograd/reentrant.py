"""Refuses reentrant activation checkpointing where it would lose the gradients of active slices."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chunkft.autograd.hooks import Hook, runs_as_it_is, undisturbed
from chunkft.autograd.passes import Passes


class ReentrantGuard:
    """Raises before ``torch.utils.checkpoint`` with ``use_reentrant=True`` drops a gradient.

    ``CheckpointFunction`` runs the forward pass without grad mode and, if none of its inputs requires grad, never
    comes back for the backward pass; with the parameters below frozen that is the usual case. Inside of a
    forward pass of the model that was called without grad mode nothing can be lost, so nothing is raised.

    Args:
        passes: those of the model.
    """

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._handles: list[RemovableHandle] = []
        self._checked: list[tuple[Any, _Check]] = []

    def guard(self, module: nn.Module, follow: Callable[[nn.Module], None]) -> None:
        """Check at every call of a module that has active parameters; ``follow`` is called then, too."""
        if isinstance(module, torch.jit.ScriptModule):
            return  # takes no hooks
        check = _Check((self, follow))
        stable = module.__dict__.get("_chunkft_forward")
        if stable is not None:  # of a model that is compiled: hooks that come and go would compile it again
            stable.checks.append(check)
            self._checked.append((stable, check))
            return
        self._handles.append(module.register_forward_pre_hook(check))

    def check(self, module: nn.Module) -> None:
        """Raise RuntimeError if the gradients of ``module`` are about to be lost."""
        if torch.is_grad_enabled() or self._passes.without_grad:
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
        for stable, check in self._checked:
            if check in stable.checks:
                stable.checks.remove(check)
        self._checked.clear()

    def hook_ids(self) -> list[int]:
        """Keys of the hooks in their modules' hook dicts."""
        return [handle.id for handle in self._handles]


def move_checks(module: nn.Module) -> None:
    """Let the stable forward of a module make the checks that hooks made before it got one."""
    hooks = module._forward_pre_hooks
    for number, hook in list(hooks.items()):
        if isinstance(hook, _Check) and hook.target is not None:
            del hooks[number]
            guard, follow = hook.target
            guard.guard(module, follow)


@runs_as_it_is
class _Check(Hook):
    """Its target is a guard with what follows replaced parameters."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.target is not None and not torch.compiler.is_compiling():
            undisturbed(self._look, module)

    def _look(self, module: nn.Module) -> None:
        guard, follow = self.target
        guard.check(module)
        follow(module)


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
