"""Operators that ``torch.compile`` does not look into: which slices are active is looked up when they run.

A compiled block has one graph for all chunks. An operator finds its module by a number that is a tensor (its value is
no part of the graph), computes with the slices that are active at that moment, and adds their gradients to the leaves
itself. The graph sees an *anchor* in their place: a scalar that always requires grad and gets a gradient of zero.
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
from chunkft.autograd.linear import Window, kept_inputs, kept_spans, linear_output, slice_gradient
from chunkft.autograd.trained import records
from chunkft.kernels import embedding_grad

# CUDA graphs replay kernels without the Python code that looks up what is active.
_TAGS = (torch.Tag.cudagraph_unsafe,)
_numbers = itertools.count()
_anchored: weakref.WeakValueDictionary[int, Anchored] = weakref.WeakValueDictionary()


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
        self.accumulator = torch.autograd.graph.get_gradient_edge(self.anchor).node
        _anchored[number] = self

    @abstractmethod
    def pairs(self) -> list[tuple[Window, Tensor]]:
        """Windows of the weight that get a gradient now, each with its leaf."""

    @abstractmethod
    def name(self) -> str:
        """What the backward pass of these windows is called in a timeline."""


@torch.library.custom_op("chunkft::sliced_matmul", mutates_args=(), tags=_TAGS)
def sliced_matmul(
    x: Tensor, anchor: Tensor, number: Tensor, outputs: int, input_major: bool, recorded: bool
) -> tuple[Tensor, Tensor]:
    """``x W^T + b`` (``x W + b`` if input-major), and what the backward pass will need of the input, flat.

    Args:
        x: (..., N) input.
        anchor: scalar in whose name gradients flow.
        number: of the ``Anchored`` whose weight and bias are used; int64 scalar on the CPU.
        outputs: M, size of the last dimension of the result.
        input_major: the layout of the weight.
        recorded: whether there will be a backward pass.

    Returns:
        (..., M) result and a copy, of any number of elements, of the part of x that active slices need.
    """
    owner = _anchored[int(number)]
    pairs = owner.pairs() if recorded else []
    weight, bias = _weight_and_bias(owner, x.dtype)
    y = linear_output(x, weight, bias, input_major)
    if not pairs:
        return y, x.new_empty(0)
    _, kept = kept_inputs(x, weight, [window for window, _ in pairs], input_major)
    return y, torch.cat([part.reshape(-1) for part in kept]) if len(kept) > 1 else kept[0].reshape(-1).clone()


@sliced_matmul.register_fake
def _(
    x: Tensor, anchor: Tensor, number: Tensor, outputs: int, input_major: bool, recorded: bool
) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size() if recorded else 0
    return x.new_empty((*x.shape[:-1], outputs)), x.new_empty((size,))


@torch.library.custom_op("chunkft::sliced_matmul_backward", mutates_args=(), tags=_TAGS)
def sliced_matmul_backward(
    dy: Tensor, kept: Tensor, number: Tensor, width: int, input_major: bool, need_dx: bool
) -> tuple[Tensor, Tensor]:
    """dX, or an empty tensor, and the gradient of the anchor; those of the active slices are added to the leaves."""
    owner = _anchored[int(number)]
    with tracing.span("backward %s", owner.name() if tracing.is_enabled() else ""):
        return _matmul_gradients(owner, dy, kept, width, input_major, need_dx)


def _matmul_gradients(
    owner: Anchored, dy: Tensor, kept: Tensor, width: int, input_major: bool, need_dx: bool
) -> tuple[Tensor, Tensor]:
    accumulates = _accumulates(owner)
    pairs = owner.pairs() if accumulates else []
    flat = dy.reshape(-1, dy.shape[-1])
    weight, _ = _weight_and_bias(owner, dy.dtype)
    dx = dy.new_empty(0)
    if need_dx:  # first: a leaf may be updated as soon as it has its gradient
        dx = flat.mm(weight.t() if input_major else weight).view(*dy.shape[:-1], width)
    if pairs:
        windows = [window for window, _ in pairs]
        whole, parts = _unpack(kept, weight, windows, flat.shape[0], width, input_major, owner)
        for position, (window, leaf) in enumerate(pairs):
            x = parts[0] if whole else parts[position]
            _accumulate(leaf, slice_gradient(flat, x, window, width, whole, input_major))
    bias = owner.module._parameters.get("bias")
    if accumulates and bias is not None and records(bias):
        _accumulate(bias, flat.sum(0))
    return dx, torch.zeros(())


@sliced_matmul_backward.register_fake
def _(
    dy: Tensor, kept: Tensor, number: Tensor, width: int, input_major: bool, need_dx: bool
) -> tuple[Tensor, Tensor]:
    shape = (*dy.shape[:-1], width) if need_dx else (0,)
    return dy.new_empty(shape), torch.empty((), device="cpu")


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, number, _, ctx.input_major, _ = inputs
    ctx.width = x.shape[-1]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], number)


def _matmul_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    kept, number = ctx.saved_tensors
    need_dx = ctx.needs_input_grad[0]
    dx, anchor = sliced_matmul_backward(dy, kept, number, ctx.width, ctx.input_major, need_dx)
    return dx if need_dx else None, anchor, None, None, None, None


sliced_matmul.register_autograd(_matmul_backward, setup_context=_matmul_setup)


@torch.library.custom_op("chunkft::sliced_embedding", mutates_args=(), tags=_TAGS)
def sliced_embedding(
    ids: Tensor, anchor: Tensor, number: Tensor, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows of the table of the ``Anchored`` of this number: (...) ids to (..., width) of ``dtype``; and a ticket.

    The ticket is empty. To a compiler its size is unknown, so that no two calls look alike to it.
    """
    owner = _anchored[int(number)]
    owner.pairs()  # binds the leaves anew if the weight was moved
    return F.embedding(ids, _weight(owner)), ids.new_empty(0)


@sliced_embedding.register_fake
def _(ids: Tensor, anchor: Tensor, number: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty((*ids.shape, width), dtype=dtype), ids.new_empty((size,))


@torch.library.custom_op("chunkft::sliced_embedding_backward", mutates_args=(), tags=_TAGS)
def sliced_embedding_backward(dy: Tensor, ids: Tensor, number: Tensor, ticket: Tensor) -> Tensor:
    """The gradient of the anchor; those of the active slices are added to the leaves."""
    owner = _anchored[int(number)]
    table: Any = owner.module
    with tracing.span("backward %s", owner.name() if tracing.is_enabled() else ""):
        for (dim, start, stop), leaf in owner.pairs() if _accumulates(owner) else ():
            rows, cols = ((start, stop), None) if dim == 0 else (None, (start, stop))
            settings = table.padding_idx, table.scale_grad_by_freq
            _accumulate(leaf, embedding_grad(dy, ids, table.num_embeddings, rows, cols, *settings))
    return torch.zeros(())


@sliced_embedding_backward.register_fake
def _(dy: Tensor, ids: Tensor, number: Tensor, ticket: Tensor) -> Tensor:
    return torch.empty((), device="cpu")


def _embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ids, _, number, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(ids, number, output[1])


def _embedding_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return None, sliced_embedding_backward(dy, *ctx.saved_tensors), None, None, None


sliced_embedding.register_autograd(_embedding_backward, setup_context=_embedding_setup)


def _weight(owner: Anchored) -> Tensor:
    weight = owner.module._parameters[owner.weight_name]
    assert weight is not None  # operators are given to modules that have one
    return weight.detach()


def _weight_and_bias(owner: Anchored, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    bias = owner.module._parameters.get("bias")
    return _weight(owner).to(dtype), None if bias is None else bias.detach().to(dtype)


def _accumulates(owner: Anchored) -> bool:
    """Whether this backward pass adds gradients to leaves: not in autograd.grad(), nor for other inputs alone."""
    try:
        return bool(torch._C._will_engine_execute_node(owner.accumulator))
    except RuntimeError:  # what it says of a leaf in autograd.grad()
        return False


def _accumulate(leaf: Tensor, gradient: Tensor) -> None:
    """Through the engine, so that hooks of the leaf run."""
    torch.autograd.backward([leaf], [gradient.to(leaf.dtype)])


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
