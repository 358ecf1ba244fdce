"""The gradients of a step as users see them by way of ``weight.grad``, while their parts are at their owners."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from chunkft.attach import Attachment
from chunkft.autograd import GradientView, Slice, records
from chunkft.parallel import DividedGradients, Ranks, Reducer


class Together(Protocol):
    """The ranks that divide the gradients."""

    ranks: Ranks
    copies: Ranks | None
    pairs: list[tuple[Slice, nn.Parameter]]

    def gather_gradients(self) -> None:
        """Bring all gradients to their owners; a collective."""

    def everywhere(self, values: Tensor) -> Tensor:
        """Sums over all ranks."""


class ShownGradients:
    """Puts views into ``weight.grad`` after a backward pass, answers for them, and notices when they are cleared.

    Args:
        team: of this rank.
        attachment: of the model.
    """

    def __init__(self, team: Together, attachment: Attachment) -> None:
        # Views are held by weights, in C++, out of sight of the garbage collector: they must not hold the team.
        self._team: Callable[[], Any] = weakref.ref(team)
        self._attachment = attachment
        self._shown: dict[str, GradientView] = {}
        # One for a weight as long as it is the same: whoever holds it, and gives it back, gives nothing new.
        self._views: dict[str, tuple[weakref.ref[Tensor], GradientView]] = {}
        # What this rank computed for weights that are leaves themselves, while a view has the place of it.
        self._unsent: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] | None = None

    # --- what views ask for

    def complete(self) -> None:
        """Bring all gradients to their owners; a collective."""
        self.squares()

    def squares(self) -> dict[str, Tensor]:
        """For each name with active slices the sum of squares of its gradients, over all ranks; a collective."""
        if self._squares is None:
            team: Together = self._team()
            self.make_way()
            team.gather_gradients()
            self.show()
            names = sorted(self._attachment.wiring.bound)
            device = self._attachment.device
            own = [sum_of_squares(self.parts(name)).to(device) for name in names]
            sums = team.everywhere(torch.stack(own))
            if team.copies is not None:
                sums = sums / team.copies.size
            self._squares = dict(zip(names, sums, strict=True))
        return self._squares

    def parts(self, name: str) -> list[Tensor]:
        """Gradients of a weight that are at this rank."""
        return [
            leaf.grad for piece, leaf in self._team().pairs if piece.name == name and leaf.grad is not None
        ]

    def changed(self) -> None:
        """Gradients were changed, or others came."""
        self._squares = None

    def cut(self, name: str, dense: Tensor) -> None:
        """Add a gradient of the whole weight to what this rank computed."""
        bound = self._attachment.wiring.bound[name]
        if bound.sliced:
            bound.gradients.add(dense)
            return
        known = self._unsent.get(name)
        self._unsent[name] = dense.clone() if known is None else known.add_(dense)

    # --- what a step does to them

    def show(self) -> None:
        """Let ``weight.grad`` stand for the gradients of all ranks."""
        for name, bound in self._attachment.wiring.bound.items():
            parameter = bound.forms()[0]
            if parameter.grad is not None and (bound.sliced or parameter.grad is self._shown.get(name)):
                continue
            if not bound.sliced:
                if not records(parameter):
                    continue
                if parameter.grad is not None and not isinstance(parameter.grad, GradientView):
                    self._unsent[name] = parameter.grad
            parameter.grad = self._shown[name] = self._view(name, parameter)

    def _view(self, name: str, parameter: Tensor) -> GradientView:
        of, view = self._views.get(name, (None, None))
        if view is None or of is None or of() is not parameter:
            view = GradientView(parameter, DividedGradients(self, name))
            self._views[name] = weakref.ref(parameter), view
        return view

    def make_way(self) -> None:
        """Let weights that are leaves themselves have in ``.grad`` what this rank computed and did not send."""
        bound = self._attachment.wiring.bound
        for name, view in list(self._shown.items()):
            parameter = self._parameter(name)
            if parameter is not None and not bound[name].sliced and parameter.grad is view:
                parameter.grad = self._unsent.pop(name, None)
                del self._shown[name]

    def settle_cleared(self, reducer: Reducer) -> None:
        """Gradients are about to come, or to be sent.

        Where somebody set ``weight.grad`` to None, as ``model.zero_grad()`` does, those of before are gone.
        """
        bound = self._attachment.wiring.bound
        cleared = 0
        for name, view in list(self._shown.items()):
            parameter = self._parameter(name)
            if parameter is None or parameter.grad is view:
                continue
            del self._shown[name]
            self._unsent.pop(name, None)
            self._squares = None
            cleared = reducer.rounds
            for piece, leaf in self._team().pairs:
                if piece.name == name:
                    leaf.grad = None
            for _, leaf in bound[name].pairs if bound[name].sliced else ():
                leaf.grad = None
        reducer.cleared += bool(cleared)
        self.make_way()

    def hide(self) -> None:
        """Take the views out of the weights."""
        for name, view in self._shown.items():
            parameter = self._parameter(name)
            if parameter is not None and parameter.grad is view:
                parameter.grad = None
        self._shown.clear()
        self._unsent.clear()

    def _parameter(self, name: str) -> Tensor | None:
        """What users hold as the weight of this name, while slices of it are active."""
        bound = self._attachment.wiring.bound.get(name)
        return None if bound is None else bound.forms()[0]


def sum_of_squares(gradients: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements, in fp64."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    norms = [torch.linalg.vector_norm(gradient, 2, dtype=torch.float64) for gradient in gradients]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()
