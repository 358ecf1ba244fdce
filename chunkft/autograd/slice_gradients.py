"""The gradients of the active slices of one weight, and when ``weight.grad`` shows them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from chunkft.autograd.gradient_view import Gradients, GradientView, joint_norm
from chunkft.autograd.slices import Slice


class Sliced(Protocol):
    """A weight and its active slices."""

    parameter: Tensor
    pairs: list[tuple[Slice, nn.Parameter]]


class SliceGradients(Gradients):
    """The gradients of the leaves of one weight.

    ``weight.grad`` is a view of them from the moment that a leaf has a gradient. Whoever sets it to None, as
    ``model.zero_grad()`` does, has cleared them: that is noticed when the next gradient arrives or when they are read.
    """

    def __init__(self, owner: Sliced) -> None:
        # Hooks and the .grad of a weight live in C++, out of sight of the garbage collector: they hold nobody.
        self._owner = weakref.ref(owner)
        self._shown = False
        self._arrived = False

    def watch(self, leaf: Tensor) -> None:
        """Show the gradient of a leaf as soon as it has one."""
        reference = weakref.ref(self)

        def before(gradient: Tensor) -> None:
            gradients = reference()
            if gradients is not None:
                gradients.settle()

        def after(leaf: Tensor) -> None:
            gradients = reference()
            if gradients is not None:
                gradients.show()

        leaf.register_hook(before)  # type: ignore[no-untyped-call]
        leaf.register_post_accumulate_grad_hook(after)  # type: ignore[no-untyped-call]

    def show(self) -> None:
        """Let ``weight.grad`` stand for the leaves' gradients, if there are any."""
        owner = self._sliced()
        if owner is None or not self._present():
            return
        if not isinstance(owner.parameter.grad, GradientView):
            owner.parameter.grad = GradientView(owner.parameter, self)
        self._shown = True

    def hide(self) -> None:
        """Set ``weight.grad`` to None again; the leaves keep theirs."""
        owner = self._sliced()
        if self._shown and owner is not None and isinstance(owner.parameter.grad, GradientView):
            owner.parameter.grad = None
        self._shown = False

    def follow(self, shows: bool) -> None:
        """``settle``, then ``show`` if ``weight.grad`` shows gradients at all."""
        owner = self._owner()
        grad = None if owner is None else owner.parameter.grad
        if self._shown and isinstance(grad, GradientView) and grad.gradients is self and not grad.steps:
            return
        if self._shown or grad is not None:
            self.settle()
        if shows:
            self.show()

    def settle(self) -> None:
        """Do to the leaves what was done to ``weight.grad``: clear them, or take a dense gradient in its place."""
        owner = self._sliced()
        if owner is None:
            return
        grad = owner.parameter.grad
        if isinstance(grad, GradientView):
            if not grad.gradients.readable or (grad.gradients is self and not grad.steps):
                return
            # the view of another weight, or of a part of this one: its values count from now on, as a gradient
            owner.parameter.grad = grad.clone()
        if self._shown:
            self._shown = False
            for _, leaf in owner.pairs:
                leaf.grad = None
        if owner.parameter.grad is not None:
            dense, owner.parameter.grad = owner.parameter.grad, None
            self.add(dense)

    @torch.no_grad()
    def add(self, dense: Tensor) -> None:
        """Cut a gradient of the whole weight and add its parts to the leaves."""
        self._arrived = True
        owner = self._sliced()
        dense = dense.to_dense() if dense.is_sparse else dense
        for piece, leaf in owner.pairs if owner is not None else ():
            part = piece.of(dense).to(leaf.device, leaf.dtype)  # the weight may have moved, the leaf not yet
            leaf.grad = part.contiguous().clone() if leaf.grad is None else leaf.grad + part

    def take_arrival(self) -> bool:
        """Whether a gradient of the whole weight came since this was asked last."""
        arrived, self._arrived = self._arrived, False
        return arrived

    def norm(self, order: float, dtype: torch.dtype | None, beside: Collection[int]) -> Tensor | None:
        """Joint norm of the leaves' gradients, without those of an id in ``beside``."""
        return joint_norm([grad for grad in self._present() if id(grad) not in beside], order, dtype)

    def tensors(self, operation: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
        """The leaves' gradients."""
        return self._present()

    @torch.no_grad()
    def fill(self, dense: Tensor) -> None:
        """Copy the leaves' gradients into their places."""
        for piece, leaf in self._pairs():
            if leaf.grad is not None:
                piece.of(dense).copy_(leaf.grad)

    @torch.no_grad()
    def take(self, dense: Tensor) -> None:
        """Copy the places of the leaves' gradients back; nothing happens once they are cleared."""
        if not self._present():
            return
        for piece, leaf in self._pairs():
            part = piece.of(dense)
            if leaf.grad is None:
                leaf.grad = part.contiguous().clone()
            else:
                leaf.grad.copy_(part)

    def _pairs(self) -> list[tuple[Slice, nn.Parameter]]:
        owner = self._sliced()
        return [] if owner is None else owner.pairs

    def _sliced(self) -> Sliced | None:
        """The weight, unless it is gone or active as a whole, through ordinary autograd."""
        owner = self._owner()
        return None if owner is None or not owner.pairs or owner.pairs[0][0].dim is None else owner

    def _present(self) -> list[Tensor]:
        return [leaf.grad for _, leaf in self._pairs() if leaf.grad is not None]
