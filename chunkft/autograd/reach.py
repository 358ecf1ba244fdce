"""Lets the backward pass of a batch run whose loss does not depend on any active parameter.

A text-only batch of a vision-language model, a dropped layer, an expert without tokens: dense training goes on there,
with other parameters. Here the others are frozen, and PyTorch would refuse the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.utils._pytree import tree_leaves, tree_map


class _Reached(Function):
    """A copy of its input that requires grad in the name of an anchor, which gets no gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        return output.clone()  # a view could not be changed in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def reached(output: Any, inputs: Any) -> Any:
    """The output of a model in which every tensor can be the start of a backward pass.

    Args:
        output: what a forward pass in grad mode returned; its floating-point tensors may lack a graph.
        inputs: what the forward pass was called with; tensors that are passed through stay as they are.

    Returns:
        The output itself if every floating-point tensor in it requires grad, else one of the same structure, in which
        the others are copies.
    """
    if isinstance(output, Tensor):  # the usual case, without a walk
        return output if not _is_cut_off(output) else _anchored(output, inputs)
    if not any(_is_cut_off(leaf) for leaf in tree_leaves(output)):
        return output
    return tree_map(lambda leaf: _anchored(leaf, inputs) if _is_cut_off(leaf) else leaf, output)


def _is_cut_off(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not leaf.requires_grad and leaf.is_floating_point()


def _anchored(output: Tensor, inputs: Any) -> Tensor:
    if any(leaf is output for leaf in tree_leaves(inputs)):
        return output
    anchor = torch.zeros((), device=output.device, requires_grad=True)
    result: Tensor = _Reached.apply(output, anchor)  # type: ignore[no-untyped-call]
    return result
