"""What ``weight.grad`` is while slices of the weight are active: their gradients, without memory of its own.

Code that knows nothing of slices clips and zeroes by way of ``model.parameters()``. A view answers for the gradients
that are there: their norm, scaling, clamping, zeroing. It is a tensor of the weight's shape, dtype and device whose
operations are redirected (``__torch_dispatch__``); whatever would need the dense gradient is refused.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor

_aten: Any = torch.ops.aten

_IN_PLACE = {
    _aten.mul_.Tensor,
    _aten.mul_.Scalar,
    _aten.div_.Tensor,
    _aten.div_.Scalar,
    _aten.clamp_.default,
    _aten.clamp_min_.default,
    _aten.clamp_max_.default,
    _aten.nan_to_num_.default,
    _aten.zero_.default,
}
_FOREACH = {
    _aten._foreach_mul_.Tensor,
    _aten._foreach_mul_.Scalar,
    _aten._foreach_div_.Tensor,
    _aten._foreach_div_.Scalar,
    _aten._foreach_clamp_min_.Scalar,
    _aten._foreach_clamp_max_.Scalar,
    _aten._foreach_zero_.default,
}


class Gradients(ABC):
    """What a view stands for."""

    @abstractmethod
    def norm(self, order: float, dtype: torch.dtype | None, beside: Collection[int]) -> Tensor | None:
        """Their joint norm as a scalar, or None if there are none; without those of an id in ``beside``."""

    @abstractmethod
    def tensors(self, operation: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
        """Those that an elementwise in-place operation is to change; raises RuntimeError if it cannot be done."""

    @abstractmethod
    def add(self, dense: Tensor) -> None:
        """Take a gradient of the whole weight, from who reads it without its module, in."""


class GradientView(Tensor):
    """Stands for the gradients of the active slices of one weight.

    ``torch.nn.utils.clip_grad_norm_``, ``clip_grad_value_``, ``get_total_norm``, ``norm()``, scaling by a number,
    in-place clamping and zeroing act on them, once, also where the gradients themselves are in the same list.
    Anything else raises RuntimeError.
    """

    gradients: Gradients

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        gradients: Gradients,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> GradientView:
        view: GradientView = torch.Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            dtype=dtype or like.dtype,
            device=device or like.device,
            storage_size=0,  # who asks for the memory itself finds none, rather than a null pointer to some
        )
        view.gradients = gradients
        return view

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        subject = args[0] if args else None
        if isinstance(subject, GradientView):
            if func in _IN_PLACE and _numbers(args[1:]):
                beside = _handled_by(sys._getframe(1))
                for gradient in subject.gradients.tensors(func, args[1:]):
                    if id(gradient) not in beside:
                        func(gradient, *args[1:], **kwargs)
                return subject
            if func is _aten.linalg_vector_norm.default and (len(args) < 3 or not args[2]):
                order = args[1] if len(args) > 1 else 2.0
                return _norm(subject, order, kwargs.get("dtype"), _handled_by(sys._getframe(1)))
            if func is _aten.add_.Tensor and len(args) == 2 and not isinstance(args[1], GradientView):
                subject.gradients.add(args[1])
                return subject
            if func is _aten.detach.default:
                return GradientView(subject, subject.gradients)
            if func is _aten._to_copy.default:
                return GradientView(subject, subject.gradients, kwargs.get("dtype"), kwargs.get("device"))
        elif isinstance(subject, list | tuple):
            beside = {id(one) for one in subject}
            if func in _FOREACH and _numbers(args[1:]):
                func(list(_expanded(subject, func, args[1:], beside)), *args[1:], **kwargs)
                return None
            if func is _aten._foreach_norm.Scalar:
                order, dtype = args[1] if len(args) > 1 else 2.0, (args[2] if len(args) > 2 else None)
                return [
                    _norm(one, order, dtype, beside)
                    if isinstance(one, GradientView)
                    else torch.linalg.vector_norm(one, order, dtype=dtype)
                    for one in subject
                ]
        _refuse(str(func))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GradientView(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse("pickling")


def joint_norm(gradients: Sequence[Tensor], order: float, dtype: torch.dtype | None = None) -> Tensor | None:
    """Norm over all elements of some tensors as a scalar; None if there are none."""
    norms = [torch.linalg.vector_norm(gradient, order, dtype=dtype) for gradient in gradients]
    return total_norm(norms, order)


def total_norm(norms: Sequence[Tensor], order: float) -> Tensor | None:
    """The norm of the parts' norms, on the device of the first; None without parts."""
    if len(norms) < 2:
        return norms[0] if norms else None
    parts = torch.stack([norm.to(norms[0].device) for norm in norms])
    return parts.sum() if order == 0 else torch.linalg.vector_norm(parts, order)


def _norm(view: GradientView, order: float, dtype: torch.dtype | None, beside: Collection[int]) -> Tensor:
    norm = view.gradients.norm(float(order), dtype, beside)
    return torch.zeros((), dtype=dtype or view.dtype, device=view.device) if norm is None else norm


def _expanded(
    tensors: Iterable[Tensor],
    operation: Callable[..., Any],
    arguments: Sequence[Any],
    beside: Collection[int],
) -> Iterable[Tensor]:
    for tensor in tensors:
        if isinstance(tensor, GradientView):
            parts = tensor.gradients.tensors(operation, arguments)
            yield from (part for part in parts if id(part) not in beside)
        else:
            yield tensor


def _handled_by(frame: FrameType | None) -> Collection[int]:
    """Ids of the tensors that torch's clipping handles one by one, a view being one of them."""
    while frame is not None and frame.f_code.co_filename.endswith("clip_grad.py"):
        names = frame.f_locals
        listed = names.get("tensors") or names.get("grads")
        if listed:
            return {id(one) for one in listed}
        frame = frame.f_back  # out of a comprehension, which has a frame of its own up to Python 3.11
    return ()


def _numbers(arguments: Iterable[Any]) -> bool:
    """Whether no argument has elements of its own for every element of the gradient."""
    return all(not isinstance(argument, Tensor) or argument.dim() == 0 for argument in arguments)


def _refuse(operation: str) -> NoReturn:
    raise RuntimeError(
        f"{operation} is not possible on the .grad of a weight that is trained in slices, because the gradient exists "
        "for the active slices only: norms, scaling by a number, clamping in place and zeroing are; the gradients "
        "themselves are those of optimizer.active_parameters()"
    )
