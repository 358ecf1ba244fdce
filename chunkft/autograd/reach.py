"""Lets the backward pass of a batch run whose loss does not depend on any active parameter.

A text-only batch of a vision-language model, a dropped layer, an expert without tokens: dense training goes on there,
with other parameters. Here the others are frozen, and PyTorch would refuse the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.utils._pytree import tree_leaves, tree_map


class _Reached(Function):
    """Its input, in the same memory, as a tensor that requires grad in the name of an anchor without a gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        return output.detach()  # no view, which could not be changed in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def reached(output: Any, model: nn.Module, inputs: Any) -> Any:
    """The output of a model in which every tensor can be the start of a backward pass.

    Args:
        output: what a forward pass in grad mode returned; its floating-point tensors may lack a graph.
        model: whose parameters and buffers stay as they are.
        inputs: what the forward pass was called with; tensors that are passed through stay as they are.

    Returns:
        The output itself if every floating-point tensor in it requires grad, else one of the same structure, in which
        others stand for the rest, in the same memory.
    """
    if not is_cut_off(output):
        return output
    leaves = [leaf for leaf in tree_leaves(output) if _lacks_graph(leaf)]
    kept = {id(tensor) for tensor in (*tree_leaves(inputs), *model.parameters(), *model.buffers())}
    wanted = {id(leaf) for leaf in leaves} - kept
    return tree_map(lambda leaf: _anchored(leaf) if id(leaf) in wanted else leaf, output)


def is_cut_off(output: Any) -> bool:
    """Whether some floating-point tensor in an output does not require grad."""
    if isinstance(output, Tensor):  # the usual case, without a walk
        return _lacks_graph(output)
    return any(_lacks_graph(leaf) for leaf in tree_leaves(output))


def _lacks_graph(leaf: Any) -> bool:
    if not isinstance(leaf, Tensor) or leaf.requires_grad:
        return False
    differentiable = leaf.is_floating_point() or leaf.is_complex()
    return differentiable and not (leaf.is_nested and leaf.layout == torch.strided)  # which no function takes


def _anchored(output: Tensor) -> Tensor:
    anchor = torch.zeros((), device=output.device, requires_grad=True)
    result: Tensor = _Reached.apply(output, anchor)  # type: ignore[no-untyped-call]
    return result
