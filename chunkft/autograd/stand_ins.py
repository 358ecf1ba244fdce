"""Leaves whose memory is not where their layer computes: a tensor there stands for each in the graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

FIRST = 1 << 62
_ATTRIBUTE = "_chunkft_stand_in"
_HOLLOW = "_chunkft_hollow"


def stand_in_of(leaf: Tensor, device: torch.device) -> Tensor:
    """What autograd is to record in place of a leaf where a layer computes on ``device``: its stand-in there if it has
    one and is trained, else the leaf.
    """
    others = leaf.__dict__.get(_ATTRIBUTE)
    if others is None or not leaf.requires_grad:
        return leaf
    reference = others.get(device)
    other: Tensor | None = None if reference is None else reference()
    return leaf if other is None else other


def make_hollow(leaf: Tensor) -> None:
    """Note that a leaf has no values of its own: those of its part of the weight count."""
    leaf.__dict__[_HOLLOW] = True


def is_hollow(leaf: Tensor) -> bool:
    """Whether ``make_hollow`` was called for a leaf."""
    return _HOLLOW in leaf.__dict__


def put_stand_in(leaf: Tensor, device: torch.device, deliver: Callable[[Tensor], Tensor | None]) -> Tensor:
    """Let a tensor without memory stand for a leaf, of its shape and dtype.

    It is one for all uses of the leaf, so that autograd sums their gradients in a backward pass before they go on their
    way.

    Args:
        leaf: requires grad, or may do so later.
        device: where its layer computes.
        deliver: called in the backward pass with the gradient on that device; returns it on the leaf's device, or None
            and gives the leaf its gradient by itself. Must not hold the leaf.

    Returns:
        The tensor, to be held as long as it is to stand for the leaf. It holds the leaf, which must not hold it: that
        circle would go through the graph, where the garbage collector does not look.
    """
    trained = leaf.requires_grad
    with torch.enable_grad(), torch.inference_mode(False):
        leaf.requires_grad = True
        stand_in = _StandIn.apply(leaf, device, deliver)  # type: ignore[no-untyped-call]
    # Before all else that is ready: made before every layer, it would come last, and all gradients would wait for it.
    stand_in.grad_fn._set_sequence_nr(FIRST)
    leaf.__dict__.setdefault(_ATTRIBUTE, _StandIns())[device] = weakref.ref(stand_in)
    leaf.requires_grad = trained
    result: Tensor = stand_in
    return result


class _StandIns(dict[torch.device, "weakref.ref[Tensor]"]):
    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()  # of a leaf that is pickled: nothing stands for it


def put_early_stand_in(leaf: Tensor, device: torch.device, deliver: Callable[[Tensor], None]) -> Tensor:
    """The same for who gives the leaf its gradient by itself: called as soon as the gradients of all uses are summed.

    A node that leads on to the leaf is older than the forward pass, and autograd comes to it last, when all other work
    of the backward pass is done; a leaf of the graph it comes to at once.
    """
    with torch.inference_mode(False):
        stand_in = torch.empty((), dtype=leaf.dtype, device=device).expand(leaf.shape).requires_grad_()

    def at_gradient(stand_in: Tensor) -> None:
        gradient, stand_in.grad = stand_in.grad, None
        if gradient is not None:
            deliver(gradient)

    stand_in.register_post_accumulate_grad_hook(at_gradient)  # type: ignore[no-untyped-call]
    leaf.__dict__.setdefault(_ATTRIBUTE, _StandIns())[device] = weakref.ref(stand_in)
    return stand_in


class _StandIn(Function):
    @staticmethod
    def forward(
        ctx: Any, leaf: Tensor, device: torch.device, deliver: Callable[[Tensor], Tensor | None]
    ) -> Tensor:
        ctx.deliver = deliver
        return torch.empty((), dtype=leaf.dtype, device=device).expand(leaf.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.deliver(gradient), None, None
