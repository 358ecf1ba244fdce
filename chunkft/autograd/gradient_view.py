"""What ``weight.grad`` is while slices of the weight are active: their gradients, without memory of its own.

Code that knows nothing of slices clips, zeroes and reads gradients by way of ``model.parameters()``. A view answers for
the gradients that are there. It is a tensor of the weight's shape, dtype and device whose operations are redirected
(``__torch_dispatch__``). Norms, scaling, clamping by numbers and zeroing act on the slices where they are; for
everything else the dense gradient, zero outside of the slices, is made for the moment, and what an operation in place
wrote into it goes back to the slices.
"""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

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
    def tensors(self, operation: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor] | None:
        """Those that an elementwise in-place operation is to change, or None if they have no memory of their own.

        Raises RuntimeError if it cannot be done.
        """

    @abstractmethod
    def add(self, dense: Tensor) -> None:
        """Take a gradient of the whole weight, from who reads it without its module, in."""

    @abstractmethod
    def dense(self) -> Tensor:
        """A new tensor of the weight's shape that holds them, and zeros elsewhere."""

    @abstractmethod
    def replace(self, dense: Tensor) -> None:
        """Set them to their parts of a tensor of the weight's shape; the rest of it is dropped."""


class _Part(Gradients):
    """What a view of a view stands for: ``view[:4]``, ``view.t()``, whose changes are changes of the gradients."""

    def __init__(self, whole: Gradients, cut: Callable[[Tensor], Tensor]) -> None:
        self._whole = whole
        self._cut = cut

    def norm(self, order: float, dtype: torch.dtype | None, beside: Collection[int]) -> Tensor | None:
        norm: Tensor = torch.linalg.vector_norm(self.dense(), order, dtype=dtype)
        return norm

    def tensors(self, operation: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor] | None:
        return None

    def add(self, dense: Tensor) -> None:
        self.replace(self.dense() + dense)

    def dense(self) -> Tensor:
        return self._cut(self._whole.dense())

    def replace(self, dense: Tensor) -> None:
        whole = self._whole.dense()
        self._cut(whole).copy_(dense)
        self._whole.replace(whole)


class GradientView(Tensor):
    """Stands for the gradients of the active slices of one weight.

    ``torch.nn.utils.clip_grad_norm_``, ``clip_grad_value_``, ``get_total_norm``, ``norm()``, scaling by a number,
    in-place clamping and zeroing act on them, once, also where the gradients themselves are in the same list.
    Anything else behaves as on the dense gradient that is zero outside of the slices, and is made for it; results are
    ordinary tensors, and what is written outside of the slices is dropped.
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
            gradients = subject.gradients
            if func in _IN_PLACE and not kwargs and _numbers(args[1:]):
                parts = gradients.tensors(func, args[1:])
                if parts is not None:
                    beside = _handled_by(sys._getframe(1))
                    for gradient in parts:
                        if id(gradient) not in beside:
                            func(gradient, *args[1:])
                    return subject
            if func is _aten.linalg_vector_norm.default and (len(args) < 3 or not args[2]) and not args[3:]:
                order = args[1] if len(args) > 1 else 2.0
                return _norm(subject, order, kwargs.get("dtype"), _handled_by(sys._getframe(1)))
            if func is _aten.add_.Tensor and not kwargs and _is_whole(args[1], subject):
                gradients.add(args[1])
                return subject
            if func is _aten.detach.default:
                return GradientView(subject, gradients)
        elif isinstance(subject, list | tuple):
            beside = {id(one) for one in subject}
            if func in _FOREACH and not kwargs and _numbers(args[1:]):
                expanded = _expanded(subject, func, args[1:], beside)
                if expanded is not None:
                    func(expanded, *args[1:])
                    return None
            if func is _aten._foreach_norm.Scalar:
                order, dtype = args[1] if len(args) > 1 else 2.0, (args[2] if len(args) > 2 else None)
                return [
                    _norm(one, order, dtype, beside)
                    if isinstance(one, GradientView)
                    else torch.linalg.vector_norm(one, order, dtype=dtype)
                    for one in subject
                ]
        return _densely(func, args, kwargs)

    def numpy(self, *, force: bool = False) -> Any:
        """A copy as an array that cannot be written to: what is written there would be lost."""
        array = self.gradients.dense().numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def tolist(self) -> Any:
        """The dense gradient as nested lists."""
        return self.gradients.dense().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GradientView(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.gradients.dense(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.gradients.dense().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


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


def _densely(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The operation on dense gradients in place of the views, with what it writes handed back to them."""
    dense: dict[int, Tensor] = {}  # of the gradients of each view
    views: dict[int, GradientView] = {}  # by the tensor that stands for it

    def stand_in(value: Any) -> Any:
        if not isinstance(value, GradientView):
            return value
        key = id(value.gradients)
        if key not in dense:
            dense[key] = value.gradients.dense()
        views[id(dense[key])] = value
        return dense[key]

    plain_args, plain_kwargs = tree_map(stand_in, (list(args), kwargs))
    result = func(*plain_args, **plain_kwargs)
    formals = func._schema.arguments
    given = [(formal, value) for formal, value in zip(formals, plain_args, strict=False)]
    given += [(formal, plain_kwargs[formal.name]) for formal in formals if formal.name in plain_kwargs]
    for formal, value in given:
        if formal.alias_info is not None and formal.alias_info.is_write:
            for one in value if isinstance(value, list | tuple) else [value]:
                if id(one) in views:
                    views[id(one)].gradients.replace(one)
    shares = any(
        returned.alias_info is not None and not returned.alias_info.is_write
        for returned in func._schema.returns
    )
    if shares and isinstance(result, Tensor) and views and id(result) not in views:
        (view,) = views.values()
        rest, named = list(plain_args[1:]), dict(plain_kwargs)
        return GradientView(result, _Part(view.gradients, lambda whole: func(whole, *rest, **named)))
    if shares and isinstance(result, list | tuple) and views:
        (view,) = views.values()
        rest, named = list(plain_args[1:]), dict(plain_kwargs)
        return [
            GradientView(one, _Part(view.gradients, lambda whole, n=n: func(whole, *rest, **named)[n]))  # type: ignore[misc]
            for n, one in enumerate(result)
        ]
    return tree_map(lambda one: views.get(id(one), one), result)


def _is_whole(value: Any, view: GradientView) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, GradientView) and value.shape == view.shape


def _expanded(
    tensors: Iterable[Tensor],
    operation: Callable[..., Any],
    arguments: Sequence[Any],
    beside: Collection[int],
) -> list[Tensor] | None:
    """The tensors with those that views stand for in their place; None if a view is a part of one."""
    result: list[Tensor] = []
    for tensor in tensors:
        if isinstance(tensor, GradientView):
            parts = tensor.gradients.tensors(operation, arguments)
            if parts is None:
                return None
            result.extend(part for part in parts if id(part) not in beside)
        else:
            result.append(tensor)
    return result


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
