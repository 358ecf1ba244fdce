"""What ``weight.grad`` is after a backward pass that has updated the weights already (``update="backward"``)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from chunkft.autograd import Gradients, GradientView, joint_norm, total_norm

Carrier = tuple[Tensor, Gradients | None]

_aten: Any = torch.ops.aten
_SCALING = {
    _aten.mul_.Tensor,
    _aten.mul_.Scalar,
    _aten._foreach_mul_.Tensor,
    _aten._foreach_mul_.Scalar,
}
_ZEROING = {_aten.zero_.default, _aten._foreach_zero_.default}


class Keeper(Protocol):
    """Who has the gradients that are not used up yet."""

    def unspent(self) -> list[Tensor]:
        """The gradients that exist."""


class SpentGradients(Gradients):
    """Gradients of which only the norm is left.

    The ``.grad`` of one weight, the carrier, tells the Euclidean norm of all of them, so that a trainer can log it and
    a limit that would not have been reached is honoured. A scaling by anything else than 1, and reading, raise.
    """

    readable = False

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = weakref.ref(keeper)
        self._norms: list[Tensor] = []
        self._weight: weakref.ref[Tensor] | None = (
            None  # weak, because its .grad holds us out of sight of the gc
        )
        self._readers: Gradients | None = None

    def show(self, carrier: Carrier) -> None:
        """Be the ``.grad`` of the carrier; its own gradients get what readers of the whole weight add."""
        weight, self._readers = carrier
        weight.grad = GradientView(weight, self)
        self._weight = weakref.ref(weight)

    def hide(self) -> None:
        """Leave the carrier, and forget the norms."""
        weight = None if self._weight is None else self._weight()
        if weight is not None and isinstance(weight.grad, GradientView):
            weight.grad = None
        self._weight = self._readers = None
        self._norms = []

    def spend(self, gradients: Sequence[Tensor]) -> None:
        """Note the norm of gradients that are about to be used up."""
        self._norms.extend(torch._foreach_norm(list(gradients), 2.0))

    def norm(self, order: float, dtype: torch.dtype | None, beside: Collection[int] = ()) -> Tensor | None:
        """Joint norm of the gradients of this backward pass; of order 2 only."""
        if order != 2.0:
            raise RuntimeError(
                f"norm_type={order:g} is not known with update='backward', whose gradients are gone by now; "
                "allowed is 2"
            )
        keeper = self._keeper()
        rest = joint_norm([] if keeper is None else keeper.unspent(), 2.0, dtype)
        norms = [norm if dtype is None else norm.to(dtype) for norm in self._norms]
        return total_norm(norms if rest is None else [*norms, rest], 2.0)

    def tensors(self, operation: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
        """None, if there is nothing to change."""
        if operation in _ZEROING or (operation in _SCALING and float(arguments[0]) == 1.0):
            return []
        raise RuntimeError(
            "gradients cannot be clipped or scaled with update='backward', which has used them to update the weights "
            "in the backward pass: switch the clipping off (max_grad_norm=0 in transformers.TrainingArguments), or use "
            "update='step'"
        )

    def fill(self, dense: Tensor) -> None:
        """Raise, since there is nothing left to read."""
        raise RuntimeError(
            "gradients cannot be read or changed with update='backward', which has used them to update the weights in "
            "the backward pass: only their norm is left; use update='step'"
        )

    def take(self, dense: Tensor) -> None:
        """Raise, since there is nothing left to change."""
        self.fill(dense)

    def add(self, dense: Tensor) -> None:
        """Give the gradient of a whole weight to the slices of that weight."""
        if self._readers is not None:
            self._readers.add(dense)
