"""An account of every tensor that exists while it is open: when, how large, made by which operator of which module."""

from __future__ import annotations

import bisect
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from chunkft.activations import saved_activations

__all__ = ["Block", "Ledger"]

WEIGHTS, GRADIENTS, STATE, ACTIVATIONS, OTHER = CATEGORIES = (
    "weights",
    "gradients",
    "state",
    "activations",
    "other",
)


BEFORE = "made before"


@dataclass(slots=True)
class Block:
    """Memory of one tensor (a storage).

    Attributes:
        nbytes: size.
        category: one of ``CATEGORIES``.
        op: the operator that made it.
        module: qualified name of the module whose forward or backward pass did so; empty outside of the model.
        phase: what the training step was doing: ``forward``, ``backward`` or ``step``.
        shape, dtype: of the first tensor that used it.
        born, freed: nanoseconds of ``time.perf_counter_ns``; ``freed`` is None while it exists.
        saved_by: module in whose forward pass autograd first kept it; empty if it did not.
    """

    nbytes: int
    category: str
    op: str
    module: str
    phase: str
    shape: tuple[int, ...]
    dtype: str
    born: int
    freed: int | None = None
    saved_by: str = ""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operators make, until they are freed, and says what each of them is.

    Memory that was there before counts only as what ``fixed`` and ``polled`` say of it. Storages of operators in
    compiled code are not seen.

    Args:
        model: its weights are not counted again; its modules give names.
        device: storages on other devices are left out.
        polled: bytes of optimizer state in memory that no operator makes (arenas, slots, files' buffers); asked while
            the optimizer works.
        at_modules: called at the end of each module's forward pass.

    Attributes:
        blocks: everything that was counted.
        polls: times and values of ``polled`` where it changed.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        polled: Callable[[], int],
        at_modules: Callable[[], None],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.blocks: list[Block] = []
        self.polls: list[tuple[int, int]] = []
        self.phase = ""
        self.inputs: dict[str, int] = {}  # most bytes of the first tensor that a module was called with
        self._device = device
        self._opened = 0
        self._polled = polled
        self._at_modules = at_modules
        self._live: dict[int, Block] = {}  # by address
        self._lock = threading.RLock()
        self._names = {module: name for name, module in model.named_modules()}
        self._stack: list[str] = []
        self._marks: list[int] = []  # sequence numbers of autograd at which the module changed
        self._marked: list[str] = []
        self._fixed: set[int] = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._saved = _Saved(model, self)
        self._hooks: list[Any] = []

    def __enter__(self) -> Ledger:
        self._poll()
        self._hooks = [
            module_hooks.register_module_forward_pre_hook(self._enter_module),
            module_hooks.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        self._saved.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._saved.__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def fixed(self, tensor: Tensor) -> None:
        """Leave out memory that was there before, and is counted elsewhere."""
        self._fixed.add(tensor.untyped_storage().data_ptr())

    def present(self, tensor: Tensor, category: str) -> None:
        """Count memory that was there before."""
        if not self._opened:
            self._opened = time.perf_counter_ns()
        self._born(tensor, BEFORE, category, self._opened)

    def label(self, tensor: Tensor, category: str) -> None:
        """Say what a tensor is, if it was counted; that holds from its beginning."""
        block = self._live.get(tensor.untyped_storage().data_ptr())
        if block is not None:
            block.category = category

    def forward_done(self, since: int) -> None:
        """What was made in the forward pass that began at this time and still exists is kept for the backward pass."""
        with self._lock:
            for block in self._live.values():
                made = block.born >= since and block.phase == "forward" and block.op != BEFORE
                if made and block.module and block.category == OTHER:
                    block.category = ACTIVATIONS

    def saved(self, tensor: Tensor) -> None:
        """Autograd keeps this tensor."""
        address = tensor.untyped_storage().data_ptr()
        if address in self._fixed:
            return
        if address not in self._live:
            self._born(tensor, BEFORE, OTHER)
        block = self._live.get(address)
        # What no pass of the model made is part of a batch.
        if block is not None and block.category == OTHER and block.phase and block.op != BEFORE:
            block.category = ACTIVATIONS
            block.saved_by = block.saved_by or self._module()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operator and counts what it made."""
        result = func(*args, **(kwargs or {}))
        if self.phase == "step":
            self._poll()
        known: set[int] | None = None
        for tensor in _tensors(result):
            address = tensor.untyped_storage().data_ptr()
            if not address or address in self._live or address in self._fixed:
                continue
            if known is None:
                known = {t.untyped_storage().data_ptr() for t in _tensors([*args, *(kwargs or {}).values()])}
            if address not in known:  # else a view, or an output argument, of memory from before
                self._born(tensor, str(func).removesuffix(".default"), OTHER)
        return result

    def _born(self, tensor: Tensor, op: str, category: str, when: int = 0) -> None:
        storage = tensor.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if not address or not nbytes or tensor.device != self._device:
            return
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        block = Block(
            nbytes, category, op, self._module(), self.phase, shape, dtype, when or time.perf_counter_ns()
        )
        with self._lock:
            self._live[address] = block
            self.blocks.append(block)
        weakref.finalize(storage, self._freed, address, block).atexit = False

    def _freed(self, address: int, block: Block) -> None:
        block.freed = time.perf_counter_ns()
        with self._lock:
            if self._live.get(address) is block:
                del self._live[address]

    def _poll(self) -> None:
        value = self._polled()
        if not self.polls or self.polls[-1][1] != value:
            self.polls.append((time.perf_counter_ns(), value))

    def _module(self) -> str:
        if self._stack:
            return self._stack[-1]
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return ""
        place = bisect.bisect_right(self._marks, node._sequence_nr()) - 1
        return self._marked[place] if 0 <= place < len(self._marked) else ""

    def _mark(self) -> None:
        """From this number on, nodes of the graph belong to the module that is innermost now."""
        number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self._marks.append(max(number, self._marks[-1] if self._marks else 0))
        self._marked.append(self._stack[-1] if self._stack else "")

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(module)
        if name is None:
            return
        self._stack.append(name or type(module).__name__)
        self._mark()
        first = next((arg for arg in args if isinstance(arg, Tensor)), None)
        if first is not None:
            size = first.numel() * first.element_size()
            self.inputs[name] = max(self.inputs.get(name, 0), size)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._names and self._stack:
            self._at_modules()
            self._stack.pop()
            self._mark()


class _Saved(saved_activations):
    """``saved_activations`` that tells a ledger."""

    def __init__(self, model: nn.Module, ledger: Ledger) -> None:
        super().__init__(model)
        self._ledger = weakref.ref(ledger)

    def _pack(self, tensor: Tensor) -> Any:
        ledger = self._ledger()
        if ledger is not None:
            ledger.saved(tensor)
        return super()._pack(tensor)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for entry in value for tensor in _tensors(entry)]
    return []
