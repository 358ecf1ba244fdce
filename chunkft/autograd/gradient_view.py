"""What ``weight.grad`` is while slices of the weight are active: their gradients, without memory of its own.

Code that knows nothing of slices reads, clips and zeroes by way of ``model.parameters()``. A view answers for the
gradients that are there. It is a tensor of the weight's shape, dtype and device whose operations are redirected
(``__torch_dispatch__``): to the gradients themselves where each element counts alone, and else to the dense gradient,
zero outside of the slices, which is made for the one operation and whose changes inside of the slices are kept.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

_aten: Any = torch.ops.aten

# In-place operations on each element alone that have no tag that says so.
_ELEMENTWISE = {_aten.zero_.default, _aten.fill_.Scalar, _aten.fill_.Tensor, _aten.abs_.default}
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
    """What a view stands for.

    Attributes:
        readable: whether ``fill`` can be done at all.
    """

    readable = True

    @abstractmethod
    def norm(self, order: float, dtype: torch.dtype | None, beside: Collection[int]) -> Tensor | None:
        """Their joint norm as a scalar, or None if there are none; without those of an id in ``beside``."""

    @abstractmethod
    def tensors(self, operation: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
        """Those that an elementwise in-place operation is to change; raises RuntimeError if it cannot be done."""

    @abstractmethod
    def fill(self, dense: Tensor) -> None:
        """Write them into their places of a tensor of the weight's shape; raises RuntimeError if they are gone."""

    @abstractmethod
    def take(self, dense: Tensor) -> None:
        """Change them to what is in their places of a tensor of the weight's shape."""

    @abstractmethod
    def add(self, dense: Tensor) -> None:
        """Take a gradient of the whole weight, from who reads it without its module, in."""


class _Step(NamedTuple):
    """One view operation, and which of its results is meant."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | None  # in a list of results

    def of(self, tensor: Tensor) -> Tensor:
        views = self.func(tensor, *self.args, **self.kwargs)
        part: Tensor = views if self.place is None else views[self.place]
        return part


class GradientView(Tensor):
    """Stands for the gradients of the active slices of one weight, or for a part of them (``weight.grad[:4]``).

    It reads as the dense gradient that is zero outside of the active slices. What is changed in place, also through
    views of it, changes the gradients; what would lie outside of the slices is dropped. Clipping, norms over all
    elements and scaling by numbers make no dense gradient, and count once also where the gradients themselves are in
    the same list.

    Raises:
        RuntimeError: by whatever would change its shape or memory, and if the gradients are gone.
    """

    gradients: Gradients
    whole: GradientView | None  # what the steps start from, if there are any
    steps: tuple[_Step, ...]

    @staticmethod
    def __new__(
        cls,
        like: Tensor,
        gradients: Gradients,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        whole: GradientView | None = None,
        steps: tuple[_Step, ...] = (),
    ) -> GradientView:
        view: GradientView = torch.Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset() if steps else 0,
            dtype=dtype or like.dtype,
            device=device or like.device,
            storage_size=0,  # who asks for the memory itself finds none, rather than a null pointer to some
        )
        view.gradients = gradients
        view.whole = whole
        view.steps = steps
        return view

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        subject = args[0] if args else None
        if isinstance(subject, GradientView):
            if not subject.steps:
                done = _directly(subject, func, args, kwargs)
                if done is not None:
                    return done
            if func is _aten.detach_.default:
                return subject
            if _makes_views(func):
                return _parts(subject, func, args, kwargs)
        elif isinstance(subject, list | tuple):
            beside = {id(one) for one in subject}
            if func in _FOREACH and _numbers(args[1:]) and not any(_is_part(one) for one in subject):
                by_device: dict[torch.device, list[Tensor]] = {}
                for one in _expanded(subject, func, args[1:], beside):
                    by_device.setdefault(one.device, []).append(one)
                for device, ones in by_device.items():
                    func(ones, *_on(device, args[1:]), **kwargs)
                return None
            if func is _aten._foreach_norm.Scalar:
                order, dtype = args[1] if len(args) > 1 else 2.0, (args[2] if len(args) > 2 else None)
                return [
                    _norm(one, order, dtype, beside)
                    if isinstance(one, GradientView) and not one.steps and order >= 0
                    else torch.linalg.vector_norm(one, order, dtype=dtype)
                    for one in subject
                ]
        if torch.Tag.inplace_view in func.tags:
            _refuse(str(func))
        return _densely(func, args, kwargs)

    @property
    def data(self) -> Tensor:
        """Itself, for autograd; values that are assigned change the gradients."""
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        if values.shape != self.shape:
            raise RuntimeError(
                f".data of the .grad of a weight that is trained in slices must keep the shape {tuple(self.shape)}, "
                f"got {tuple(values.shape)}"
            )
        if (
            isinstance(values, GradientView)
            and values.gradients is self.gradients
            and not values.gradients.readable
        ):
            Tensor.data.__set__(self, values)  # type: ignore[attr-defined]  # the model moves: there are no values
        else:
            self.copy_(values)

    def numpy(self, *, force: bool = False) -> Any:
        """A copy that cannot be written to, since nothing that is written there would reach the gradients."""
        array = torch.clone(self).numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None) -> Any:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def tolist(self) -> Any:
        """The values as nested lists of numbers."""
        return torch.clone(self).tolist()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("sharing its memory (DLPack)")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = torch.clone(self)
        copied: Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return torch.clone(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self.gradients.readable:
            return f"GradientView({torch.clone(self)!r})"
        return f"GradientView(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


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


def _directly(view: GradientView, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What needs no dense gradient; None if this is not such an operation."""
    if _is_elementwise(func) and _numbers(args[1:]) and _numbers(kwargs.values()):
        beside = _handled_by(sys._getframe(2))
        for gradient in view.gradients.tensors(func, args[1:]):
            if id(gradient) not in beside:
                func(gradient, *_on(gradient.device, args[1:]), **kwargs)
        return view
    if func is _aten.linalg_vector_norm.default and not any(args[2:]):
        order = args[1] if len(args) > 1 else 2.0
        if order >= 0:  # else the zeros outside of the slices count
            return _norm(view, order, kwargs.get("dtype"), _handled_by(sys._getframe(2)))
    if (
        func is _aten.add_.Tensor
        and torch._C._current_graph_task_id() != -1  # autograd accumulates
        and not kwargs
        and not isinstance(args[1], GradientView)
        and args[1].shape == view.shape
    ):
        view.gradients.add(args[1])
        return view
    if func is _aten._to_copy.default and not view.gradients.readable:
        # there is no value that a copy could share, and model.to() must pass
        return GradientView(view, view.gradients, kwargs.get("dtype"), kwargs.get("device"))
    return None


def _is_elementwise(func: Any) -> bool:
    tags = func.tags
    return func in _ELEMENTWISE or (
        torch.Tag.pointwise in tags and _is_in_place(func) and torch.Tag.nondeterministic_seeded not in tags
    )


def _is_in_place(func: Any) -> bool:
    """Whether an operator writes into its first argument; torch 2.11 has no tag for that."""
    arguments = func._schema.arguments
    first = arguments[0] if arguments else None
    return (
        first is not None
        and first.alias_info is not None
        and first.alias_info.is_write
        and not first.kwarg_only
    )


def _makes_views(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _is_part(tensor: Any) -> bool:
    return isinstance(tensor, GradientView) and bool(tensor.steps)


def _parts(view: GradientView, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The views that an operation makes of a view."""
    if func in (_aten.detach.default, _aten.alias.default):
        return GradientView(view, view.gradients, whole=view.whole, steps=view.steps)
    like = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device="meta")
    whole = view if view.whole is None else view.whole

    def part(shown: Tensor, place: int | None) -> GradientView:
        steps = (*view.steps, _Step(func, tuple(args[1:]), kwargs, place))
        return GradientView(shown, view.gradients, device=view.device, whole=whole, steps=steps)

    shown = func(like, *args[1:], **kwargs)
    if isinstance(shown, Tensor):
        return part(shown, None)
    return [part(one, place) for place, one in enumerate(shown)]


def _densely(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Do an operation on dense gradients, and keep what it changed in the slices."""
    wholes: dict[int, Tensor] = {}  # views of the same gradients are views of one tensor
    made: dict[int, tuple[GradientView, Tensor]] = {}

    def dense(thing: Any) -> Any:
        if isinstance(thing, list | tuple):
            return type(thing)(dense(one) for one in thing)
        if not isinstance(thing, GradientView):
            return thing
        if id(thing) not in made:
            key = id(thing.gradients)
            if key not in wholes:
                wholes[key] = _filled(thing)
            tensor = wholes[key]
            for step in thing.steps:
                tensor = step.of(tensor)
            made[id(thing)] = thing, tensor
        return made[id(thing)][1]

    result = func(*dense(args), **{name: dense(value) for name, value in kwargs.items()})
    changed: dict[int, Gradients] = {}
    for view in _written(func, args, kwargs):
        tensor = made[id(view)][1]
        if tensor.shape != view.shape:
            raise RuntimeError(
                f"out= must have the shape {tuple(tensor.shape)} of the result, got the .grad of a weight that is "
                f"trained in slices with shape {tuple(view.shape)}"
            )
        changed[id(view.gradients)] = view.gradients
    for key, gradients in changed.items():
        gradients.take(wholes[key])
    back = {id(tensor): view for view, tensor in made.values()}

    def given(thing: Any) -> Any:
        if isinstance(thing, list | tuple) and type(thing) in (list, tuple):
            return type(thing)(given(one) for one in thing)
        return back.get(id(thing), thing)

    return given(result)


def _filled(view: GradientView) -> Tensor:
    """The whole dense gradient, zero outside of the slices."""
    like = view if view.whole is None else view.whole
    dense = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).zero_()
    view.gradients.fill(dense)
    return dense


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterable[GradientView]:
    """The views among the arguments that an operation changes."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, GradientView):
                yield one


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
    return all(
        not isinstance(argument, Tensor) or (argument.dim() == 0 and not isinstance(argument, GradientView))
        for argument in arguments
    )


def _on(device: torch.device, arguments: Iterable[Any]) -> list[Any]:
    """Numbers that are tensors where the gradients are, which may be elsewhere than their weight."""
    return [
        one.to(device) if isinstance(one, Tensor) and one.device.type != "cpu" else one for one in arguments
    ]


def _refuse(operation: str) -> NoReturn:
    raise RuntimeError(
        f"{operation} is not possible on the .grad of a weight that is trained in slices, which has no memory of its "
        "own: use .grad.clone() for a dense copy; the gradients themselves are those of optimizer.active_parameters()"
    )
