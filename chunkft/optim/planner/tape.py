"""What a training step allocates and frees, written down by running it without memory."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Allocation", "Tape"]


@dataclass(slots=True, eq=False)
class Allocation:
    """One storage.

    Attributes:
        nbytes: its size.
        born: when it was made, in events of the tape.
        freed: when it was freed; None while it exists.
        gradient_of: name of the parameter whose gradient it is; empty for everything else.
    """

    nbytes: int
    born: int
    freed: int | None = None
    gradient_of: str = ""


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every storage that operators make on the meta device, until it is freed.

    A question to a boolean tensor (is all of a mask set?) is answered with yes, as it is for sequences of one length.

    Attributes:
        allocations: in the order in which they were made.
        clock: events so far.
        marks: the clock at named moments, in their order.
        complete: when the gradient of a parameter was, by its name.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocations: list[Allocation] = []
        self.clock = 0
        self.marks: list[tuple[str, int]] = []
        self.complete: list[tuple[str, int]] = []
        self._live: dict[int, Allocation] = {}
        self._given: set[int] = set()

    def given(self, tensor: Tensor) -> None:
        """A tensor that was there before, and is not counted."""
        self._given.add(tensor.untyped_storage()._cdata)

    def mark(self, name: str) -> None:
        """Something begins now."""
        self.clock += 1
        self.marks.append((name, self.clock))

    def gradient(self, name: str, tensor: Tensor) -> None:
        """Say that a tensor is the gradient of a parameter, from its beginning on, and complete now."""
        self.clock += 1
        self.complete.append((name, self.clock))
        found = self._live.get(tensor.untyped_storage()._cdata)
        if found is not None and found.nbytes == tensor.numel() * tensor.element_size():
            found.gradient_of = name

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operator and notes what it made."""
        asked = func is torch.ops.aten._local_scalar_dense.default
        if asked and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        result = func(*args, **(kwargs or {}))
        before: set[int] | None = None
        for tensor in _tensors(result):
            if not tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._live or key in self._given or not storage.nbytes():
                continue
            if before is None:
                before = {t.untyped_storage()._cdata for t in _tensors([*args, *(kwargs or {}).values()])}
            if key not in before:
                self._born(storage, key)
        return result

    def _born(self, storage: torch.UntypedStorage, key: int) -> None:
        self.clock += 1
        made = Allocation(storage.nbytes(), self.clock)
        self.allocations.append(made)
        self._live[key] = made
        weakref.finalize(storage, self._freed, key, made).atexit = False

    def _freed(self, key: int, made: Allocation) -> None:
        self.clock += 1
        made.freed = self.clock
        if self._live.get(key) is made:
            del self._live[key]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for entry in value for tensor in _tensors(entry)]
    return []
