"""Launches of Triton kernels whose arguments are known but for their tensors: bound and specialised once.

``JITFunction.run`` binds some thirty arguments, specialises each and builds a key of text at every call. What it
compiled is a ``CompiledKernel``, which launches by itself (``kernel[grid](*arguments)``, as in Triton's tutorial on
softmax). It is the same one as long as everything is that a specialisation depends on: types, integers that are 1 or
divisible by 16, constants, and pointers that are divisible by 16. All but the last are fixed here; that is asked for.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

_ALIGNMENT = 16
# entries of a memo; a training run with ragged batches has new shapes all the time
_MEMO_SIZE = 4096

Value = TypeVar("Value")


class Memo(Generic[Value]):
    """A dictionary that starts anew when it is full."""

    all: ClassVar[list[Memo[Any]]] = []

    def __init__(self) -> None:
        self.all.append(self)
        self._known: dict[Hashable, Value] = {}
        self.get = self._known.get

    def keep(self, key: Hashable, value: Value) -> Value:
        """Stores and returns ``value``."""
        if len(self._known) >= _MEMO_SIZE:
            self._known.clear()
        self._known[key] = value
        return value

    def clear(self) -> None:
        """Forgets everything."""
        self._known.clear()


def forget() -> None:
    """Forget all that was decided and prepared, as after a change of the table of measurements."""
    for memo in Memo.all:
        memo.clear()


class Launch:
    """A kernel with its grid, integers and constants; called with all arguments that are not constants, in order.

    Args:
        kernel: a ``triton.jit`` function whose constants (``tl.constexpr``) come last.
        grid: programs along each axis.
        constants: value of every constant, in the order of the signature.
        options: ``num_warps`` and others that the compiler takes.
    """

    __slots__ = ("_compiled", "_constants", "_grid", "_kernel", "_options", "_tail")

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], constants: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._constants = constants
        self._options = options
        self._tail = tuple(constants.values())
        self._compiled: dict[int, Any] = {}

    def __call__(self, aligned: int, *arguments: Any) -> None:
        """Launches; ``aligned`` is a number that differs where the alignment of any pointer does."""
        compiled = self._compiled.get(aligned)
        if compiled is not None:
            compiled[self._grid](*arguments, *self._tail)
            return
        found = self.through_jit(*arguments)
        # The interpreter returns nothing. What runs before each launch, or while something is compiled in the
        # background, belongs to Triton's own way.
        if (
            hasattr(found, "packed_metadata")
            and not hasattr(found, "result")
            and not self._kernel.pre_run_hooks
        ):
            self._compiled[aligned] = found

    def through_jit(self, *arguments: Any) -> Any:
        """Launches in Triton's own way, which compiles where that is needed; returns what was compiled."""
        return self._kernel[self._grid](*arguments, **self._constants, **self._options)


def has_memory(tensor: Tensor) -> bool:
    """Whether a kernel can read this tensor at its address: it stands for no other tensors, and for no batch of them.

    Subclasses (FakeTensor while something is traced, DTensor under FSDP) and what ``torch.func`` wraps are for PyTorch.
    """
    return type(tensor) in (Tensor, Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def alignment(*pointers: int) -> int:
    """A number with a bit for each of these addresses that is divisible by 16."""
    bits = 0
    for pointer in pointers:
        bits = bits * 2 + (pointer % _ALIGNMENT == 0)
    return bits
