"""Which modules have a sliced operator, and what their forward becomes while a slice of them is active."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from chunkft.autograd.embedding import sliced_embedding
from chunkft.autograd.linear import sliced_conv1d, sliced_linear
from chunkft.autograd.slices import Slice

Active = Sequence[tuple[Slice, Tensor]]


@dataclass(frozen=True)
class SlicedOperator:
    """How one kind of module computes with active slices of one of its parameters.

    Attributes:
        forward: ``forward(module, active, *args, **kwargs)``; must give what the module's own forward gives.
        weight: name of the parameter that can be sliced.
        dims: the dimensions along which it can be sliced.
        accepts: says of one module whether its settings are covered (None: always); it is atomic otherwise.
    """

    forward: Callable[..., Tensor]
    weight: str = "weight"
    dims: tuple[int, ...] = (0, 1)
    accepts: Callable[[Any], bool] | None = None


def register_operator(module_type: type[nn.Module], operator: SlicedOperator) -> None:
    """Give every module of a class (and of subclasses that inherit its forward) a sliced operator."""
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of torch.nn.Module, got {module_type!r}")
    _OPERATORS[module_type] = operator


def operator_for(module: nn.Module) -> SlicedOperator | None:
    """The sliced operator of a module, or None if its parameters are atomic.

    A module whose forward was overridden, by a subclass or on the instance, is atomic: what it computes is
    not known.
    """
    _register_loaded_libraries()
    if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], SlicedForward):
        return None
    for module_type, operator in _OPERATORS.items():
        if isinstance(module, module_type) and type(module).forward is module_type.forward:
            present = module._parameters.get(operator.weight) is not None
            accepted = operator.accepts is None or operator.accepts(module)
            return operator if present and accepted else None
    return None


class SlicedForward:
    """The forward of a module while slices of it are active; set on the instance, so the class stays as it is.

    ``verify`` is called first and lets the owner notice that the weight was moved.
    """

    def __init__(
        self,
        module: nn.Module,
        operator: SlicedOperator,
        active: Active,
        verify: Callable[[nn.Module], None] | None,
    ) -> None:
        self.module = module
        self.operator = operator
        self.active = active
        self.verify = verify

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.verify is not None:
            self.verify(self.module)
        return self.operator.forward(self.module, self.active, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> SlicedForward:
        # A copy of the model has weights of its own, which the leaves of this one do not share.
        import copy

        return SlicedForward(copy.deepcopy(self.module, memo), self.operator, (), None)

    def __reduce__(self) -> tuple[Any, ...]:
        return SlicedForward, (self.module, self.operator, (), None)


def _linear(module: nn.Linear, active: Active, input: Tensor) -> Tensor:
    return sliced_linear(input, module.weight, module.bias, active)


def _embedding(module: nn.Embedding, active: Active, input: Tensor) -> Tensor:
    return sliced_embedding(input, module.weight, active, module.padding_idx, module.scale_grad_by_freq)


def _conv1d(module: Any, active: Active, x: Tensor) -> Tensor:
    return sliced_conv1d(x, module.weight, module.bias, active)


def _has_fixed_rows(module: nn.Embedding) -> bool:
    """Embeddings with ``max_norm`` rewrite their weight in forward.

    ``sparse`` ones are taken: the gradient of a slice is dense, which every optimizer accepts.
    """
    return module.max_norm is None


def _register_loaded_libraries() -> None:
    library = sys.modules.get("transformers.pytorch_utils")
    conv1d = getattr(library, "Conv1D", None)
    if conv1d is not None and conv1d not in _OPERATORS:
        _OPERATORS[conv1d] = SlicedOperator(_conv1d)


_OPERATORS: dict[type[nn.Module], SlicedOperator] = {
    nn.Linear: SlicedOperator(_linear),
    nn.Embedding: SlicedOperator(_embedding, accepts=_has_fixed_rows),
}
