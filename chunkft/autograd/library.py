"""Operators that ``torch.compile`` does not look into: which slices are active is looked up when they run.

A compiled block has one graph for all chunks. An operator finds its module by a number that is a tensor (its value is
no part of the graph) and computes with the slices that are active at that moment. The graph sees an *anchor* in their
place: a scalar that always requires grad and gets a gradient of zero. The gradients of the leaves wait in a stash until
autograd has accumulated that of the anchor: once in a backward pass, after the last use of the module, and not at all
for ``torch.autograd.grad``.
"""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chunkft import tracing
from chunkft.autograd.linear import Window, kept_inputs, kept_spans, linear_output, slice_gradients
from chunkft.autograd.stand_ins import is_hollow
from chunkft.autograd.stash import arrive, current_stash
from chunkft.autograd.trained import records
from chunkft.kernels import embedding_grad

# CUDA graphs replay kernels without the Python code that looks up what is active.
_TAGS = (torch.Tag.cudagraph_unsafe,)
_numbers = itertools.count()
_calls: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_anchored: weakref.WeakValueDictionary[int, Anchored] = weakref.WeakValueDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def next_call() -> str:
    """A name for one call of an operator that no other call in the graph which is being traced has.

    It is text, since a compiler takes numbers that differ for inputs. It begins anew with each graph, so that caches
    of compiled code find the same graph again.
    """
    graph = torch._guards.TracingContext.try_get()
    if graph is None:
        return "0"
    _calls[graph] = _calls.get(graph, -1) + 1
    return str(_calls[graph])


class Anchored(ABC):
    """A module and what of its weight is active; base of what the operators find by number."""

    def __init__(self, module: nn.Module, weight: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        number = next(_numbers)
        self.module = module
        self.weight_name = weight
        self.weight_shape, self.weight_dtype = shape, dtype
        # On the CPU: reading it waits for no device.
        self.number = torch.tensor(number)
        self.anchor = torch.zeros((), requires_grad=True)

        # The hook lives in C++, out of sight of the garbage collector: it holds the number only.
        def accumulated(anchor: Tensor) -> None:
            anchor.grad = None
            arrive(number)

        self.anchor.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]
        _anchored[number] = self

    @abstractmethod
    def pairs(self) -> list[tuple[Window, Tensor]]:
        """Windows of the weight that get a gradient now, each with its leaf."""

    @abstractmethod
    def name(self) -> str:
        """What the backward pass of these windows is called in a timeline."""


@torch.library.custom_op("chunkft::sliced_matmul", mutates_args=(), tags=_TAGS)
def sliced_matmul(
    x: Tensor, anchor: Tensor, number: Tensor, call: str, outputs: int, input_major: bool, recorded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``x W^T + b`` (``x W + b`` if input-major), and what the backward pass will need of the input, flat.

    Args:
        x: (..., N) input.
        anchor: scalar in whose name gradients flow.
        number: of the ``Anchored`` whose weight and bias are used; int64 scalar on the CPU.
        call: tells this call in a graph from others; compilers merge equal ones, in the backward pass too.
        outputs: M, size of the last dimension of the result.
        input_major: the layout of the weight.
        recorded: whether there will be a backward pass.

    Returns:
        (..., M) result; a copy, of any number of elements, of the part of x that active slices need; and the version
        of the weight, which the gradient of x must be computed with: int64 scalar on the CPU.
    """
    owner = _anchored[int(number)]
    pairs = owner.pairs() if recorded else []
    weight, bias = _weight_and_bias(owner, x.dtype)
    y = linear_output(x, weight, bias, input_major)
    version = torch.tensor(_version(owner) if recorded else 0)
    if not pairs:
        return y, x.new_empty(0), version
    _, kept = kept_inputs(x, weight, [window for window, _ in pairs], input_major)
    flat = torch.cat([part.reshape(-1) for part in kept]) if len(kept) > 1 else kept[0].reshape(-1).clone()
    return y, flat, version


@sliced_matmul.register_fake
def _(
    x: Tensor, anchor: Tensor, number: Tensor, call: str, outputs: int, input_major: bool, recorded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size() if recorded else 0
    version = torch.empty((), dtype=torch.int64, device="cpu")
    return x.new_empty((*x.shape[:-1], outputs)), x.new_empty((size,)), version


@torch.library.custom_op("chunkft::sliced_matmul_backward", mutates_args=(), tags=_TAGS)
def sliced_matmul_backward(
    dy: Tensor,
    kept: Tensor,
    version: Tensor,
    number: Tensor,
    call: str,
    width: int,
    input_major: bool,
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    """dX, or an empty tensor, and the gradient of the anchor; those of the active slices are stashed."""
    owner = _anchored[int(number)]
    if need_dx and _version(owner) != int(version):
        raise RuntimeError(
            f"the weight of a compiled {type(owner.module).__name__} was modified in place between its forward and its "
            "backward pass; call backward() before step()"
        )
    with tracing.span("backward %s", owner.name() if tracing.is_enabled() else ""):
        return _matmul_gradients(owner, int(number), dy, kept, width, input_major, need_dx)


def _matmul_gradients(
    owner: Anchored, number: int, dy: Tensor, kept: Tensor, width: int, input_major: bool, need_dx: bool
) -> tuple[Tensor, Tensor]:
    pairs, stash = owner.pairs(), current_stash(_shared)
    flat = dy.reshape(-1, dy.shape[-1])
    weight, _ = _weight_and_bias(owner, dy.dtype)
    if pairs:
        windows = [window for window, _ in pairs]
        whole, parts = _unpack(kept, weight, windows, flat.shape[0], width, input_major, owner)
        together = all(is_hollow(leaf) for _, leaf in pairs)
        gradients = slice_gradients(flat, parts, windows, width, whole, input_major, "auto", together)
        for (_, leaf), gradient in zip(pairs, gradients, strict=True):
            stash.add(number, leaf, gradient.to(leaf.dtype))
    bias = owner.module._parameters.get("bias")
    if bias is not None and records(bias):
        stash.add(number, bias, flat.sum(0).to(bias.dtype))
    dx = dy.new_empty(0)
    if need_dx:
        dx = flat.mm(weight.t() if input_major else weight).view(*dy.shape[:-1], width)
    return dx, torch.zeros(())


@sliced_matmul_backward.register_fake
def _(
    dy: Tensor,
    kept: Tensor,
    version: Tensor,
    number: Tensor,
    call: str,
    width: int,
    input_major: bool,
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    shape = (*dy.shape[:-1], width) if need_dx else (0,)
    return dy.new_empty(shape), torch.empty((), device="cpu")


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, number, ctx.call, _, ctx.input_major, _ = inputs
    ctx.width = x.shape[-1]
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[1], output[2], number)


def _matmul_backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    need_dx = ctx.needs_input_grad[0]
    dx, anchor = sliced_matmul_backward(dy, *ctx.saved_tensors, ctx.call, ctx.width, ctx.input_major, need_dx)
    return dx if need_dx else None, anchor, None, None, None, None, None


sliced_matmul.register_autograd(_matmul_backward, setup_context=_matmul_setup)


@torch.library.custom_op("chunkft::sliced_embedding", mutates_args=(), tags=_TAGS)
def sliced_embedding(
    ids: Tensor, anchor: Tensor, number: Tensor, call: str, width: int, dtype: torch.dtype
) -> Tensor:
    """Rows of the table of the ``Anchored`` of this number: (...) ids to (..., width) of ``dtype``."""
    owner = _anchored[int(number)]
    owner.pairs()  # binds the leaves anew if the weight was moved
    return F.embedding(ids, _weight(owner))


@sliced_embedding.register_fake
def _(ids: Tensor, anchor: Tensor, number: Tensor, call: str, width: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty((*ids.shape, width), dtype=dtype)


@torch.library.custom_op("chunkft::sliced_embedding_backward", mutates_args=(), tags=_TAGS)
def sliced_embedding_backward(dy: Tensor, ids: Tensor, number: Tensor, call: str) -> Tensor:
    """The gradient of the anchor; those of the active slices are stashed."""
    owner, stash = _anchored[int(number)], current_stash(_shared)
    table: Any = owner.module
    with tracing.span("backward %s", owner.name() if tracing.is_enabled() else ""):
        for (dim, start, stop), leaf in owner.pairs():
            rows, cols = ((start, stop), None) if dim == 0 else (None, (start, stop))
            settings = table.padding_idx, table.scale_grad_by_freq
            gradient = embedding_grad(dy, ids, table.num_embeddings, rows, cols, *settings)
            stash.add(int(number), leaf, gradient.to(leaf.dtype))
    return torch.zeros(())


@sliced_embedding_backward.register_fake
def _(dy: Tensor, ids: Tensor, number: Tensor, call: str) -> Tensor:
    return torch.empty((), device="cpu")


def _embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, _, number, ctx.call, _, _ = inputs
    ctx.save_for_backward(ids, number)


def _embedding_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return None, sliced_embedding_backward(dy, *ctx.saved_tensors, ctx.call), None, None, None, None


sliced_embedding.register_autograd(_embedding_backward, setup_context=_embedding_setup)


def _weight(owner: Anchored) -> Tensor:
    weight = owner.module._parameters[owner.weight_name]
    assert weight is not None  # operators are given to modules that have one
    return weight.detach()


def _version(owner: Anchored) -> int:
    """Of the parameter itself: inside of an operator, ``detach`` begins a count of its own."""
    weight = owner.module._parameters[owner.weight_name]
    return 0 if weight is None else weight._version


def _weight_and_bias(owner: Anchored, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    bias = owner.module._parameters.get("bias")
    return _weight(owner).to(dtype), None if bias is None else bias.detach().to(dtype)


def _shared() -> set[int]:
    """Numbers of the modules that hold a weight or bias which another one holds too."""
    holders: dict[int, dict[int, int]] = {}
    for number, owner in list(_anchored.items()):
        for parameter in owner.module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), {})[number] = id(owner.module)
    tied = (found for found in holders.values() if len(found) > 1 and len(set(found.values())) > 1)
    return {number for found in tied for number in found}


def _unpack(
    kept: Tensor,
    weight: Tensor,
    windows: Sequence[Window],
    tokens: int,
    width: int,
    input_major: bool,
    owner: Anchored,
) -> tuple[bool, list[Tensor]]:
    """Take the copy of the input apart that the forward pass made for these windows."""
    spans = kept_spans(kept, width, weight, windows, input_major)
    sizes = [width] if spans is None else [stop - start for start, stop in spans]
    if kept.numel() != tokens * sum(sizes):
        raise RuntimeError(
            f"the active slices of a compiled {type(owner.module).__name__} changed between its forward and its "
            "backward pass; call step() only after backward()"
        )
    parts = torch.split(kept, [tokens * size for size in sizes])
    return spans is None, [part.view(tokens, size) for part, size in zip(parts, sizes, strict=True)]
