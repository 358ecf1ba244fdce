"""What ``weight.grad`` is where the gradients of a weight's active slices are divided among ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from chunkft.autograd import Gradients

_aten: Any = torch.ops.aten
_SCALING = {
    _aten.mul_.Tensor,
    _aten.mul_.Scalar,
    _aten.div_.Tensor,
    _aten.div_.Scalar,
    _aten.zero_.default,
    _aten._foreach_mul_.Tensor,
    _aten._foreach_mul_.Scalar,
    _aten._foreach_div_.Tensor,
    _aten._foreach_div_.Scalar,
    _aten._foreach_zero_.default,
}


class Divided(Protocol):
    """Who holds this rank's part of the gradients."""

    def complete(self) -> None:
        """Bring all gradients to their owners; a collective if some are not there yet."""

    def squares(self) -> dict[str, Tensor]:
        """For each name the sum of the squares of all elements, on all ranks; a collective at the first call."""

    def parts(self, name: str) -> list[Tensor]:
        """Gradients of a weight that are at this rank."""

    def changed(self) -> None:
        """Gradients were changed."""

    def cut(self, name: str, dense: Tensor) -> None:
        """Add a gradient of the whole weight to what this rank computed."""


class DividedGradients(Gradients):
    """The gradients of one weight, each part of which is at its owner.

    Norms and scaling work as for a ``DTensor``: all ranks have to ask for them. The values themselves are not put
    together.
    """

    readable = False

    def __init__(self, owner: Divided, name: str) -> None:
        self._owner = owner
        self._name = name

    def norm(self, order: float, dtype: torch.dtype | None, beside: Collection[int]) -> Tensor | None:
        """Euclidean norm over all ranks, without what is in the same list by itself."""
        if order != 2.0:
            self._refuse(f"a norm of order {order}")
        if any(id(part) in beside for part in self._owner.parts(self._name)):
            return None
        norm = self._owner.squares()[self._name].sqrt()
        return norm.to(dtype or torch.float32)

    def tensors(self, operation: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
        """The parts that are at this rank."""
        if operation not in _SCALING:
            self._refuse(str(operation))
        self._owner.complete()
        self._owner.changed()
        return self._owner.parts(self._name)

    def fill(self, dense: Tensor) -> None:
        """Not possible."""
        self._refuse("reading its values")

    def take(self, dense: Tensor) -> None:
        """Not possible."""
        self._refuse("writing its values")

    def add(self, dense: Tensor) -> None:
        """Cut a gradient of the whole weight, from who reads it without its module."""
        self._owner.cut(self._name, dense)

    def _refuse(self, operation: str) -> NoReturn:
        raise RuntimeError(
            f"{operation} is not possible for the .grad of {self._name!r}, whose parts are at different ranks; "
            "possible are its norm and scaling by numbers, on all ranks alike; the parts of this rank are the "
            ".grad of optimizer.active_parameters()"
        )
