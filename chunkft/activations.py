"""Measures what autograd keeps for the backward pass."""

from __future__ import annotations

import weakref
from types import TracebackType

import torch
from torch import Tensor, nn


class saved_activations:
    """Context manager that counts the bytes of activations that autograd saves.

    Storages are counted once, however many views of them are saved, for as long as autograd holds them. The
    model's parameters are not counted.

    Args:
        model: its parameters (and views of them) are left out; None leaves out nothing.

    Attributes:
        peak_bytes: the most bytes held at one time.
        live_bytes: bytes held now.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.peak_bytes = 0
        self.live_bytes = 0
        self._ignored = (
            set()
            if model is None
            else {p.untyped_storage().data_ptr() for p in model.parameters() if p.numel()}
        )
        self._holders: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> saved_activations:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        storage = tensor.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()
        if nbytes and address not in self._ignored:
            if self._holders.get(address, 0) == 0:
                self.live_bytes += nbytes
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            self._holders[address] = self._holders.get(address, 0) + 1
            weakref.finalize(saved, self._release, address, nbytes)
        return saved

    def _release(self, address: int, nbytes: int) -> None:
        self._holders[address] -= 1
        if self._holders[address] == 0:
            del self._holders[address]
            self.live_bytes -= nbytes


class _Saved:
    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor
