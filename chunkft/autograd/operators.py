"""Which modules have a sliced operator, and what their forward becomes while a slice of them is active."""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chunkft.autograd.embedding import sliced_embedding
from chunkft.autograd.experts import EXPERT_WEIGHTS, has_sliceable_experts, sliced_experts
from chunkft.autograd.hooks import runs_as_it_is, undisturbed
from chunkft.autograd.layouts import is_jagged, is_strided, on_values
from chunkft.autograd.library import Anchored, next_call, sliced_matmul
from chunkft.autograd.library import sliced_embedding as library_embedding
from chunkft.autograd.linear import Window, sliced_conv1d, sliced_linear
from chunkft.autograd.reentrant import move_checks
from chunkft.autograd.slices import Slice, traced_name
from chunkft.autograd.tiled import TiledForward
from chunkft.autograd.trained import records

Active = Sequence[tuple[Slice, Tensor]]


@dataclass(frozen=True)
class SlicedOperator:
    """How one kind of module computes with active slices of one or several of its parameters.

    Attributes:
        forward: ``forward(module, active, *args, **kwargs)``; must give what the module's own forward gives.
        weight: name of the parameter that can be sliced.
        dims: the dimensions along which it can be sliced.
        accepts: says of one module whether its settings are covered (None: always); it is atomic otherwise.
        compiled: ``compiled(compiled_forward, *args, **kwargs)``: the same by an operator that a compiler does not look
            into; None if there is none.
        weights: names of the parameters that can be sliced, in place of ``weight``, for modules with several. Then
            ``active`` is a dict: for each name with active slices its pairs.
    """

    forward: Callable[..., Tensor]
    weight: str = "weight"
    dims: tuple[int, ...] = (0, 1)
    accepts: Callable[[Any], bool] | None = None
    compiled: Callable[..., Tensor] | None = None
    weights: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters that can be sliced."""
        return self.weights or (self.weight,)


def register_operator(module_type: type[nn.Module], operator: SlicedOperator) -> None:
    """Give every module of a class (and of subclasses that inherit its forward) a sliced operator."""
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of torch.nn.Module, got {module_type!r}")
    _OPERATORS[module_type] = operator
    _FORWARDS[module_type] = module_type.forward


def operator_for(module: nn.Module) -> SlicedOperator | None:
    """The sliced operator of a module, or None if its parameters are atomic.

    A module whose forward was overridden, by a subclass or on the instance, is atomic: what it computes is
    not known.
    """
    _register_loaded_libraries()
    if not _is_known(module):
        return None
    for module_type, operator in _OPERATORS.items():
        own = _FORWARDS.get(module_type, module_type.forward)
        if isinstance(module, module_type) and type(module).forward is own:
            present = any(module._parameters.get(name) is not None for name in operator.names)
            accepted = operator.accepts is None or operator.accepts(module)
            return operator if present and accepted else None
    return _EXPERTS if has_sliceable_experts(module) else None


@runs_as_it_is
class SlicedForward:
    """The forward of a module while slices of it are active; set on the instance, so the class stays as it is.

    Compilers stay out of it: they would compile anew for each chunk, and not all of them can compare addresses.

    ``verify`` is called first, with the module and whether the call is one of compiled code, and lets the owner notice
    that the weight was moved; False says that the module is to compute by itself in this call, with whatever it holds.
    ``attribute`` is the name of the weight, for operators with several; ``parts`` holds what is active of each.
    """

    # no __dict__: functools.update_wrapper would copy it into whatever is put around this forward
    __slots__ = ("__weakref__", "active", "module", "operator", "parts", "stands_for", "verify")

    def __init__(
        self,
        module: nn.Module,
        operator: SlicedOperator,
        active: Active,
        verify: Callable[[nn.Module, bool], bool] | None,
        attribute: str | None = None,
    ) -> None:
        self.module = module
        self.operator = operator
        self.active = active
        self.verify = verify
        self.stands_for = type(module).forward
        self.parts = {attribute or operator.names[0]: (active, verify)}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return undisturbed(self._compute, args, kwargs)  # type: ignore[no-any-return]

    def checked(self) -> Active | None:
        """The active slices that count in this call; None: the module is to compute by itself."""
        # A class whose forward was replaced since computes as it says, and its weight gets a gradient as a whole.
        sliced = type(self.module).forward is self.stands_for
        for _, verify in self.parts.values():
            if verify is not None:
                sliced = verify(self.module, False) and sliced
        # A copy, as of the parts below: another thread may switch the chunk in the middle of the call.
        return tuple(self.active) if sliced else None

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        active = self.checked()
        parts = {attribute: tuple(part) for attribute, (part, _) in self.parts.items()}
        if active is None or not any(parts.values()):
            result: Tensor = type(self.module).forward(self.module, *args, **kwargs)
            return result
        if not self.operator.weights:
            return self.operator.forward(self.module, active, *args, **kwargs)
        return self.operator.forward(self.module, parts, *args, **kwargs)

    def without(self, active: Active) -> SlicedForward | None:
        """A forward without one of the parts; None if that was the only one. This one stays as it is."""
        rest = {name: part for name, part in self.parts.items() if part[0] is not active}
        if not rest:
            return None
        forward = SlicedForward(self.module, self.operator, *next(iter(rest.values())))
        forward.parts, forward.stands_for = rest, self.stands_for
        return forward

    def __deepcopy__(self, memo: dict[int, Any]) -> SlicedForward:
        # A copy of the model has weights of its own, which the leaves of this one do not share.
        return SlicedForward(copy.deepcopy(self.module, memo), self.operator, (), None)

    def __reduce__(self) -> tuple[Any, ...]:
        # A module that was pickled is not attached: it has the forward of its class.
        return getattr, (self.module, "forward")


class CompiledForward(Anchored):
    """How a module in a model that is compiled finds its active slices: the same object, whatever is active.

    It is kept beside the module's forward, which is ``_stable_forward``: a compiler takes a function that is the same
    for all modules, where it would compile anew for each object.
    """

    def __init__(
        self, module: nn.Module, operator: SlicedOperator, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        super().__init__(module, operator.weight, shape, dtype)
        self.operator = operator
        self.current: SlicedForward | None = None
        self.checks: list[Callable[[nn.Module, Any], None]] = []  # before eager calls

    def pairs(self) -> list[tuple[Window, Tensor]]:
        """Active windows with their leaves; the weight itself where it is trained as a whole."""
        weight = self.module._parameters[self.weight_name]
        if self.current is None:
            whole = weight is not None and records(weight)
            return [((0, 0, weight.shape[0]), weight)] if whole and weight is not None else []
        if self.current.verify is not None:
            self.current.verify(self.module, True)
        active = self.current.active
        return [
            ((p.dim, p.start, p.stop), leaf) for p, leaf in active if p.dim is not None and leaf.requires_grad
        ]

    def name(self) -> str:
        """What the backward pass of the active slices is called in a timeline."""
        active = () if self.current is None else self.current.active
        return traced_name(piece for piece, _ in active) or type(self.module).__name__

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledForward:
        # the copy of the module has no parameters yet
        return CompiledForward(
            copy.deepcopy(self.module, memo), self.operator, self.weight_shape, self.weight_dtype
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledForward, (self.module, self.operator, self.weight_shape, self.weight_dtype)


def _stable_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    owner: CompiledForward = module._chunkft_forward  # type: ignore[assignment]
    if torch.compiler.is_compiling() and owner.operator.compiled is not None:
        return owner.operator.compiled(owner, *args, **kwargs)
    for check in owner.checks:
        check(module, args)
    if owner.current is not None:
        return owner.current(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def put_forward(module: nn.Module, forward: SlicedForward) -> None:
    """Let a module compute with active slices from now on, beside those of its other weights."""
    stable = module.__dict__.get("_chunkft_forward")
    if isinstance(stable, CompiledForward):
        stable.current = forward
        return
    place = _place(module)
    present = module.__dict__.get(place)
    if isinstance(present, TiledForward):
        present.current = forward
        return
    if isinstance(present, SlicedForward) and present.operator.weights:
        forward.parts = {**present.parts, **forward.parts}
    module.__dict__[place] = forward


def take_forward(module: nn.Module, active: Active) -> None:
    """Give a module its own forward back, or the one for active slices of its other weights."""
    stable = module.__dict__.get("_chunkft_forward")
    if isinstance(stable, CompiledForward):
        stable.current = None
        return
    place = _place(module)
    present = module.__dict__.get(place)
    if isinstance(present, TiledForward):
        present.current = None
    if not isinstance(present, SlicedForward):
        return
    rest = present.without(active)
    if rest is None:
        _restore(module.__dict__, place, module)
    else:
        module.__dict__[place] = rest


def strip_forward(attributes: dict[str, Any]) -> None:
    """Remove every forward of ours from the ``__dict__`` of a module, or of a copy of one."""
    for place in ("forward", "_old_forward"):
        present: Any = attributes.get(place)
        if _is_ours(present):
            bound = isinstance(present, types.MethodType)
            _restore(attributes, place, present.__self__ if bound else present.module)
    attributes.pop("_chunkft_forward", None)


def _restore(attributes: dict[str, Any], place: str, module: Any) -> None:
    if place == "forward":
        del attributes[place]
        return
    attributes[place] = own = types.MethodType(type(module).forward, module)
    around: Any = attributes.get("forward")
    if _is_ours(getattr(around, "__wrapped__", None)):
        around.__wrapped__ = own


def _is_ours(forward: Any) -> bool:
    return (
        isinstance(forward, SlicedForward | TiledForward)
        or getattr(forward, "__func__", None) is _stable_forward
    )


def _is_known(module: nn.Module) -> bool:
    """Whether a call of a module ends in the forward of its class, or in ours."""
    forward = module.__dict__.get(_place(module))
    own = isinstance(forward, types.MethodType) and forward.__self__ is module
    return forward is None or _is_ours(forward) or (own and forward.__func__ is type(module).forward)


def _place(module: nn.Module) -> str:
    """Name of the attribute that holds a module's forward: accelerate's hooks keep it while theirs is called first."""
    forward: Any = module.__dict__.get("forward")
    hooked = isinstance(forward, functools.partial) and "_old_forward" in module.__dict__
    return "_old_forward" if hooked and forward.func.__module__ == "accelerate.hooks" else "forward"


def compilable(model: nn.Module) -> int:
    """Let ``torch.compile`` make one graph of each block for all chunks; call it before the first compiled call.

    Every module with a sliced operator gets a forward that stays the same object whatever is active. In compiled code
    that is an operator which the compiler does not look into; eager calls compute as before. The price: the backward
    pass of compiled code runs through all blocks, also through those below the active slices. Parameters without a
    sliced operator (norms, biases) still require grad only while they are active, and a block that holds some is
    compiled once for either case: make them ``always_active``. ``uncompilable`` undoes it, except for
    ``torch._dynamo.config.capture_dynamic_output_shape_ops``, which is on from then on: how much of an input is kept
    depends on what is active.

    Args:
        model: a module; whether an optimizer was built for it does not matter.

    Returns:
        How many modules got such a forward.
    """
    if model.__dict__.get("_chunkft_weights") is not None:
        raise RuntimeError(
            "a model whose weights stream cannot be compiled: where its weights are changes with every block; detach() "
            "the stream first"
        )
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    count = 0
    for module in model.modules():
        operator = operator_for(module)
        if operator is None or operator.compiled is None or _place(module) != "forward":
            continue
        if "_chunkft_forward" not in module.__dict__:
            present = module.__dict__.get("forward")
            weight = module.get_parameter(operator.weight)
            stable = CompiledForward(module, operator, tuple(weight.shape), weight.dtype)
            module.__dict__["_chunkft_forward"] = stable
            module.__dict__["forward"] = types.MethodType(_stable_forward, module)
            stable.current = present if isinstance(present, SlicedForward) else None
            move_checks(module)
        count += 1
    return count


def uncompilable(model: nn.Module) -> None:
    """Take the forwards of ``compilable`` out again; active slices stay active."""
    for module in model.modules():
        stable = module.__dict__.get("_chunkft_forward")
        if isinstance(stable, CompiledForward):
            strip_forward(module.__dict__)
            if stable.current is not None:
                module.__dict__["forward"] = stable.current


def _linear(module: nn.Linear, active: Active, input: Tensor) -> Tensor:
    def compute(x: Tensor) -> Tensor:
        return sliced_linear(x, module.weight, module.bias, active)

    return compute(input) if is_strided(input) and _plain_functions() else _as_it_is(module, compute, input)


def _embedding(module: nn.Embedding, active: Active, input: Tensor) -> Tensor:
    def compute(ids: Tensor) -> Tensor:
        return sliced_embedding(ids, module.weight, active, module.padding_idx, module.scale_grad_by_freq)

    return compute(input) if is_strided(input) and _plain_functions() else _as_it_is(module, compute, input)


def _conv1d(module: Any, active: Active, x: Tensor) -> Tensor:
    def compute(x: Tensor) -> Tensor:
        return sliced_conv1d(x, module.weight, module.bias, active)

    return compute(x) if is_strided(x) and _plain_functions() else _as_it_is(module, compute, x)


def _as_it_is(module: nn.Module, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What the module itself makes, with its weight's gradient as a whole; of a jagged input the values, sliced."""
    if is_jagged(x) and _plain_functions():
        return on_values(compute, x)
    result: Tensor = type(module).forward(module, x)
    return result


def _plain_functions() -> bool:
    """Whether the functions that layers call are PyTorch's own, which the operators stand for."""
    if torch.compiler.is_compiling():
        return True
    embedding = getattr(F.embedding, "__globals__", None)
    return isinstance(F.linear, types.BuiltinFunctionType) and embedding is vars(F)


def _compiled_linear(owner: CompiledForward, input: Tensor) -> Tensor:
    return _compiled_matmul(owner, input, 0)


def _compiled_conv1d(owner: CompiledForward, x: Tensor) -> Tensor:
    return _compiled_matmul(owner, x, 1)


def _compiled_matmul(owner: CompiledForward, x: Tensor, output_dim: int) -> Tensor:
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    outputs, recorded = owner.weight_shape[output_dim], torch.is_grad_enabled()
    y: Tensor = sliced_matmul(x, owner.anchor, owner.number, next_call(), outputs, output_dim == 1, recorded)[
        0
    ]
    return y


def _compiled_embedding(owner: CompiledForward, input: Tensor) -> Tensor:
    width, dtype = owner.weight_shape[1], owner.weight_dtype
    y: Tensor = library_embedding(input, owner.anchor, owner.number, next_call(), width, dtype)
    return y


def _has_fixed_rows(module: nn.Embedding) -> bool:
    """Embeddings with ``max_norm`` rewrite their weight in forward.

    ``sparse`` ones are taken: the gradient of a slice is dense, which every optimizer accepts.
    """
    return module.max_norm is None


def _register_loaded_libraries() -> None:
    library = sys.modules.get("transformers.pytorch_utils")
    conv1d = getattr(library, "Conv1D", None)
    if conv1d is not None and conv1d not in _OPERATORS:
        register_operator(conv1d, SlicedOperator(_conv1d, compiled=_compiled_conv1d))
        _FORWARDS[conv1d] = _inherited(conv1d)


_OPERATORS: dict[type[nn.Module], SlicedOperator] = {
    nn.Linear: SlicedOperator(_linear, compiled=_compiled_linear),
    nn.Embedding: SlicedOperator(_embedding, accepts=_has_fixed_rows, compiled=_compiled_embedding),
}


def _inherited(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """The forward of a class of PyTorch, None if it was replaced before we were imported."""
    forward = kind.forward
    original = getattr(forward, "__globals__", None) is vars(sys.modules[kind.__module__])
    return forward if original else None


# As they were when the operators were registered: code may replace the forward of a class, for the whole process.
_FORWARDS: dict[type[nn.Module], Callable[..., Any] | None] = {kind: _inherited(kind) for kind in _OPERATORS}
_EXPERTS = SlicedOperator(sliced_experts, weights=EXPERT_WEIGHTS, dims=(0,))
