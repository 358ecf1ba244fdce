"""Mixtures of experts whose weights are 3-D parameters, one matrix an expert, sliced along the experts.

transformers computes them by one of several implementations, which a configuration names. Two are covered: ``eager``
takes the matrix of one expert after the other, ``grouped_mm`` multiplies all experts in one call. Both run as they
are, with a stand-in for each weight that has active slices.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.utils._pytree import tree_map

from chunkft import tracing
from chunkft.autograd.linear import backward_name, differentiated_again, own_tensor
from chunkft.autograd.slices import Slice
from chunkft.autograd.stand_ins import is_hollow, stand_in_of

Active = Sequence[tuple[Slice, Tensor]]

EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
IMPLEMENTATIONS = (None, "eager", "grouped_mm")  # None: a module of its own, which runs eagerly
_GROUPED = {
    function
    for function in (getattr(torch, "_grouped_mm", None), getattr(torch.nn.functional, "grouped_mm", None))
    if function is not None
}


def has_sliceable_experts(module: nn.Module) -> bool:
    """Whether a module runs one of the covered implementations of transformers' experts interface."""
    library = sys.modules.get("transformers.integrations.moe")
    forward = type(module).forward
    if library is None or getattr(forward, "__globals__", None) is not vars(library):
        return False
    own = getattr(forward, "__wrapped__", None)
    # super() needs the module itself, which the forward does not get while a stand-in is in place
    if own is None or "__class__" in own.__code__.co_freevars:
        return False
    count = getattr(module, "num_experts", None)
    weights = [module._parameters.get(name) for name in EXPERT_WEIGHTS]
    if any(weight is not None and (weight.dim() != 3 or weight.shape[0] != count) for weight in weights):
        return False
    return getattr(getattr(module, "config", None), "_experts_implementation", "") in IMPLEMENTATIONS


# Single matrices are taken by number: a compiler would break the graph at each of them.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def sliced_experts(module: nn.Module, active: Mapping[str, Active], *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, in which the gradients of its weights are those of the active experts only.

    Args:
        module: a module for which ``has_sliceable_experts`` holds.
        active: for each attribute with active slices its pairs of a slice (dim 0) and a leaf of shape
            (experts, M, N) that shares memory with the weight.
        args: arguments of the forward pass.
        kwargs: the same by name.

    Returns:
        What the module's own forward returns, bit for bit. Leaves whose experts got no token get a gradient of zeros,
        as their rows of the dense gradient do.
    """
    forward = type(module).forward
    if not torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    weights = {
        name: ExpertWeight(module.get_parameter(name), pairs) for name, pairs in active.items() if pairs
    }
    if not weights:
        return forward(module, *args, **kwargs)
    output = forward(_Stage(module, weights), *args, **kwargs)
    idle = [leaf for weight in weights.values() for leaf in weight.idle()]
    output = _Idle.apply(output, *idle) if idle else output  # type: ignore[no-untyped-call]
    if isinstance(output, Tensor) and output.requires_grad:
        versions = [weight.version() for weight in weights.values()]
        output.register_hook(_unchanged(type(module).__name__, versions))  # type: ignore[no-untyped-call]
    return output


def _unchanged(owner: str, versions: list[tuple[Tensor, int]]) -> Callable[[Tensor], None]:
    """What autograd asks of every tensor, of weights whose matrices have no count of changes of their own."""

    def check(gradient: Tensor) -> None:
        if any(weight._version != version for weight, version in versions):
            raise RuntimeError(
                f"the weights of a {owner} were modified in place between its forward and its backward pass; call "
                "step() only after backward()"
            )

    return check


class ExpertWeight:
    """Stands for a weight (experts, M, N): the matrix of one expert is that of a leaf if it is active.

    ``torch.nn.functional.grouped_mm`` takes it as its second argument. Everything else gets the weight itself, whose
    gradient, if one arrives there, is cut as that of every weight which is read without its module.
    """

    def __init__(self, weight: Tensor, active: Active, transposed: bool = False) -> None:
        self.weight = weight
        self.active = [(piece, stand_in_of(leaf, weight.device)) for piece, leaf in active]
        self._given = active
        self.transposed = transposed
        self._frozen = weight.detach()
        # Without the count of changes that all slices share: one of another expert may be updated in place while the
        # backward pass still needs the matrix of this one.
        self._uncounted = weight.data
        self._matrices: dict[int, tuple[int, Tensor]] | None = None
        self._used: set[int] = set()

    def version(self) -> tuple[Tensor, int]:
        """The weight, and how often it was changed in place."""
        return self._frozen, self._frozen._version

    def idle(self) -> list[Tensor]:
        """Leaves that require grad and that nothing was computed with."""
        return [
            leaf
            for number, (_, leaf) in enumerate(self.active)
            if number not in self._used and leaf.requires_grad
        ]

    def transpose(self, first: int, second: int) -> Any:
        """The stand-in with its last two dimensions swapped; of other dimensions, the weight's."""
        if {first % 3, second % 3} != {1, 2}:
            return self._whole().transpose(first, second)
        other = ExpertWeight(self.weight, self._given, not self.transposed)
        other._used = self._used
        return other

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, tuple | slice | list | bool) or getattr(index, "ndim", 0) != 0:
            return self._whole()[index]
        expert = operator.index(index)
        if self._matrices is None:
            self._matrices = {
                expert: (number, matrix)
                for number, (piece, leaf) in enumerate(self.active)
                for expert, matrix in enumerate(_Matrices.apply(leaf, self._values(number)), piece.start)  # type: ignore[no-untyped-call]
            }
        number, matrix = self._matrices.get(expert, (None, None))
        if number is None or matrix is None:
            matrix = self._uncounted[expert]
        else:
            self._used.add(number)
        return matrix.t() if self.transposed else matrix

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole(), name)

    def __len__(self) -> int:
        return len(self.weight)

    def _values(self, number: int) -> Tensor:
        """The values of an active slice: those of its leaf, or of the weight where that is elsewhere."""
        piece, leaf = self.active[number]
        own = leaf is self._given[number][1] and not is_hollow(leaf)
        return leaf.detach() if own else piece.of(self._uncounted)

    def _whole(self) -> Tensor:
        weight: Tensor = self.__dict__["weight"]
        return weight.transpose(-2, -1) if self.__dict__["transposed"] else weight

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (
            function in _GROUPED
            and len(args) == 2
            and isinstance(args[1], ExpertWeight)
            and not isinstance(args[0], ExpertWeight)
            and kwargs.get("offs") is not None
            and all(value is None for name, value in kwargs.items() if name != "offs")
        ):
            return args[1]._grouped(args[0], kwargs["offs"])
        whole = tree_map(lambda one: one._whole() if isinstance(one, ExpertWeight) else one, (args, kwargs))
        return function(*whole[0], **whole[1])

    def _grouped(self, x: Tensor, offsets: Tensor) -> Tensor:
        self._used.update(range(len(self.active)))
        windows = tuple((piece.start, piece.stop) for piece, _ in self.active)
        leaves = [leaf for _, leaf in self.active]
        name = backward_name(self.active)
        frozen = self._frozen.transpose(-2, -1) if self.transposed else self._frozen
        return _GroupedMatmul.apply(x, frozen, offsets, self.transposed, windows, name, *leaves)  # type: ignore[no-any-return, no-untyped-call]


class _Stage:
    """What a forward function sees as ``self``: the module, with stand-ins for some of its weights."""

    def __init__(self, module: nn.Module, weights: dict[str, ExpertWeight]) -> None:
        self.__dict__.update(weights, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


class _GroupedMatmul(Function):
    """``x[tokens of e] @ matrices[e]`` for every expert; gradients of x, and of windows of experts.

    ``output_major`` says that the matrices (E, N, M) are transposed views of weights (E, M, N).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrices: Tensor,
        offsets: Tensor,
        output_major: bool,
        windows: tuple[tuple[int, int], ...],
        name: str,
        *leaves: Tensor,
    ) -> Tensor:
        ctx.output_major, ctx.windows, ctx.name, ctx.leaves = output_major, windows, name, leaves
        wanted = any(ctx.needs_input_grad[6:])
        ctx.save_for_backward(x if wanted else None, matrices if ctx.needs_input_grad[0] else None, offsets)
        return own_tensor(_grouped_mm(x, matrices, offsets))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        with tracing.span("backward %s", ctx.name):
            x, matrices, offsets = ctx.saved_tensors
            twice = differentiated_again()
            dx = None
            if ctx.needs_input_grad[0]:
                across = matrices.transpose(-2, -1)
                if twice:  # a product of the other layout, with the same windows
                    options = not ctx.output_major, ctx.windows, ""
                    dx = _GroupedMatmul.apply(dy, across, offsets, *options, *ctx.leaves)  # type: ignore[no-untyped-call]
                else:
                    dx = _grouped_mm(dy, across, offsets)
            ends = [0, *offsets.tolist()]  # waits for the device, once a weight
            grads: list[Tensor | None] = []
            for (start, stop), leaf, need in zip(
                ctx.windows, ctx.leaves, ctx.needs_input_grad[6:], strict=True
            ):
                if not need:
                    grads.append(None)
                    continue
                low, high = ends[start], ends[stop]
                if low == high:
                    grads.append(dy.new_zeros(leaf.shape))
                    continue
                left, right = (dy, x) if ctx.output_major else (x, dy)
                if twice:
                    bounds = zip(ends[start:stop], ends[start + 1 : stop + 1], strict=True)
                    grads.append(torch.stack([left[a:b].t().mm(right[a:b]) for a, b in bounds]))
                    continue
                part = offsets[start:stop] - low
                grads.append(_grouped_mm(left[low:high].t(), right[low:high], part))
            return (dx, None, None, None, None, None, *grads)


class _Matrices(Function):
    """The matrices of ``values``, one an expert; the backward pass stacks their gradients for the leaf, once for all.

    They are no views to autograd: views share one count of changes with all other slices of the weight, one of which
    may be updated in place while the backward pass still needs these.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.like = leaf.shape[1:], leaf.dtype, leaf.device
        return tuple(torch.ops.aten._unsafe_view(matrix, matrix.shape) for matrix in values.unbind(0))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        shape, dtype, device = ctx.like
        zero = torch.zeros(shape, dtype=dtype, device=device)
        return torch.stack([zero if gradient is None else gradient for gradient in gradients]), None


class _Idle(Function):
    """The input as it is; leaves that took no part get gradients of zeros."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward()
        ctx.like = [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]
        # A copy: one that shared memory could be changed in place without anybody who kept the other noticing.
        return output.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return (dy, *(torch.zeros(s, dtype=d, device=device) for s, d, device in ctx.like))


def _grouped_mm(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    function: Any = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    result: Tensor = function(left, right, offs=offsets)
    return result
