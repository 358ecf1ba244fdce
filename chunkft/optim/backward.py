"""Updates inside of the backward pass (``update="backward"``)."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from chunkft.autograd import Slice
from chunkft.optim.gradients import all_finite, non_finite
from chunkft.optim.kernel_slices import kernel_applies
from chunkft.optim.resident import Pairs
from chunkft.optim.spent import Carrier, SpentGradients
from chunkft.optim.streamed import StreamResidency

READ_ELSEWHERE = (
    "the gradient of {piece} grew after the slice was updated, because its weight is also used without a call of its "
    "module; update='backward' cannot be used for it, update='step' can"
)


class Weights(Protocol):
    """Who knows when a backward pass is through with a weight of which slices are active."""

    after_weight: dict[str, Callable[[], None]]

    def updating(self) -> None:
        """Leaves are about to be updated."""

    def backward_reaches(self, name: str) -> bool:
        """Whether the backward pass that runs comes to the weight itself."""


class BackwardResidency(StreamResidency):
    """Updates the slices of a page as soon as the last of their gradients is complete, and frees the gradients.

    That is not before all readers of a weight have computed their gradients with it, those that read it without its
    module included.

    Gradients and state of the active slices are then never resident together. Pages are fetched ahead in the order
    in which the previous backward pass completed them; the first time in reverse order of the stream.

    ``dropped`` says after ``step()`` whether a gradient of that step was not finite.

    One backward pass belongs to each ``step()``, which updates what no gradient hook saw and closes the step.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seed = ""  # names the noise of stochastic rounding
        # finds a weight that tells clippers of the gradients
        self.carrier: Callable[[], Carrier | None] = lambda: None
        self.weights: Weights | None = None
        self.is_fed = False  # somebody else calls ``complete``, in place of hooks of leaves
        self._waiting: dict[str, list[Slice]] = {}  # slices whose weight still has readers
        self._read: set[str] = set()  # weights that have no more
        self._spent = SpentGradients(self)
        self._warned = False
        self._unit_of: dict[Slice, int] = {}
        self._together: dict[str, int] = {}  # bytes of the active slices of a parameter
        self._arrived: set[str] = set()
        self._missing: list[set[Slice]] = []
        self._done: list[int] = []  # units in the order of their update in this step
        self._order: list[int] = []  # the same of the step before
        self._handles: list[RemovableHandle] = []
        self.dropped = False
        self._dropping = False
        self._begun = False
        self._flags: dict[torch.device, Tensor] = {}
        self._held = 0  # bytes of gradients that exist now
        self._peak = 0
        self.recent_peak = 0  # the same since somebody set it to 0

    def bind(self, pairs: Pairs) -> None:
        """These slices are active now; watch their gradients.

        Where they are the same as before, with other leaves (a weight was replaced), the step that began goes on.
        """
        self._unwatch()
        before, order = self._unit_of, self._order
        self._order = []
        super().bind(pairs)
        self._unit_of = {piece: n for n, unit in enumerate(self._units) for piece, _ in unit}
        again = self._begun and self._unit_of == before
        self._order = order if again else list(reversed(range(len(self._units))))
        self._together = {}
        for piece, leaf in pairs:
            size = leaf.numel() * leaf.element_size()
            self._together[piece.name] = self._together.get(piece.name, 0) + size
        if not again:
            self._begin()
        # Hooks live in C++, out of sight of the garbage collector: they must not hold us.
        me = weakref.ref(self)
        for piece, leaf in pairs:
            if self.weights is not None and piece.dim is not None and not self.is_fed:

                def through(name: str = piece.name) -> None:
                    residency = me()
                    if residency is not None:
                        residency._weight_done(name)

                self.weights.after_weight[piece.name] = through

            def complete(leaf: Tensor, piece: Slice = piece) -> None:
                residency = me()
                if residency is not None:
                    residency.complete(piece, leaf)

            if leaf.requires_grad and not self.is_fed:  # not if it was frozen
                self._handles.append(leaf.register_post_accumulate_grad_hook(complete))  # type: ignore[no-untyped-call]

    @property
    def begun(self) -> bool:
        """Whether a gradient arrived since the last ``step()``."""
        return self._begun

    def gradient_nbytes(self, leaves: Sequence[Tensor]) -> int:
        """Most bytes of gradients that existed at a time so far."""
        return self._peak

    def step(self, seed: str) -> None:
        """Update the slices that have a gradient still, and close the step.

        Raises:
            RuntimeError: if a gradient grew after its update.
        """
        self.seed = seed
        try:
            for number, unit in enumerate(self._units):
                if all(leaf.grad is None for _, leaf in unit):
                    continue
                if number in self._done:
                    grown = next(piece for piece, leaf in unit if leaf.grad is not None)
                    raise RuntimeError(READ_ELSEWHERE.format(piece=grown))
                self._update_unit(number)
        finally:
            if self._done:
                self._order = list(self._done)
            self.dropped = self._dropping or any(bool(flag) for flag in self._flags.values())
            self.reset()
        self._fetch(self._first())

    def reset(self) -> None:
        """Begin a new step; what was updated stays updated."""
        for unit in self._units:
            for _, leaf in unit:
                leaf.grad = None
        self._begin()
        self.finish()

    def stash(self, always: Any, keep_state: bool) -> None:
        """The active slices rest."""
        self._unwatch()
        super().stash(always, keep_state)

    def forget(self) -> None:
        """Let go of the active slices."""
        self._unwatch()
        super().forget()

    def _first(self) -> list[Pairs]:
        return [self._units[n] for n in self._order[:2]] if self._order else self._units[:-3:-1]

    def _begin(self) -> None:
        self._missing = []
        self._done = []
        self._dropping = False
        self._begun = False
        self._spent.hide()
        self._flags = {}
        self._held = 0
        self._arrived = set()
        self._waiting = {}
        self._read = set()

    def note_spoiled(self, flag: Tensor) -> None:
        """Not 0: a gradient of this step that is elsewhere was not finite."""
        before = self._flags.get(flag.device)
        self._flags[flag.device] = flag if before is None else torch.maximum(before, flag)

    @torch.no_grad()
    def complete(self, piece: Slice, leaf: Tensor) -> None:
        """The gradient of a slice is complete, unless its weight is read by others."""
        number = self._unit_of[piece]
        if not self._begun:  # what is frozen is known now
            self._missing = [{piece for piece, leaf in unit if leaf.requires_grad} for unit in self._units]
        missing = self._missing[number]
        if piece not in missing and not leaf.requires_grad:
            raise RuntimeError(
                f"{piece} was frozen between its forward and its backward pass; update='backward' has to know before "
                "the forward pass what is trained in a step"
            )
        if piece not in missing:
            raise RuntimeError(
                f"a second backward pass reached {piece} before step(): update='backward' updates a slice as soon as "
                "its gradient is complete, so it cannot accumulate gradients; call step() after each backward pass, "
                "or use update='step'"
            )
        if not self._begun:
            self._begun = True
            if self.weights is not None:
                self.weights.updating()
            self._tell_clippers()
        # one product of the backward pass gave those of all slices of a parameter
        if piece.name not in self._arrived:
            self._arrived.add(piece.name)
            self._held += self._together[piece.name]
            self._peak = max(self._peak, self._held)
            self.recent_peak = max(self.recent_peak, self._held)
        waits = self.weights is not None and not self.is_fed and piece.name not in self._read
        if not waits or self.weights is None or not self.weights.backward_reaches(piece.name):
            self._finish(piece)
        else:
            self._waiting.setdefault(piece.name, []).append(piece)

    @torch.no_grad()
    def _weight_done(self, name: str) -> None:
        """The backward pass will not use this weight any more."""
        self._read.add(name)
        for piece in self._waiting.pop(name, ()):
            self._finish(piece)

    def _finish(self, piece: Slice) -> None:
        number = self._unit_of[piece]
        self._missing[number].discard(piece)
        if not self._missing[number]:
            self._update_unit(number)

    def _tell_clippers(self) -> None:
        carrier = self.carrier()
        if carrier is not None:
            self._spent.show(carrier)
        elif not self._warned:
            self._warned = True
            warnings.warn(
                "no parameter of this model is cut or inactive, so torch.nn.utils.clip_grad_norm_ and the like cannot "
                "be told that update='backward' leaves nothing to clip: they will do nothing",
                stacklevel=2,
            )

    def _update_unit(self, number: int) -> None:
        """Update the slices of a page and free their gradients.

        After a gradient that is not finite nothing more is updated in this step; what was so before stands. Where
        the kernel does the update, the device decides that by itself, and the host asks once, in ``step()``.
        """
        unit = self._units[number]
        gradients = [leaf.grad for _, leaf in unit if leaf.grad is not None]
        following = [self._units[n] for n in self._upcoming(number)]
        self._spent.spend(gradients)
        if kernel_applies(unit, self.rule):
            self.update(unit, self.seed, following, self._found_inf(gradients))
            self._done.append(number)
        else:
            elsewhere = self.is_fed and any(bool(flag) for flag in self._flags.values())
            self._dropping = self._dropping or elsewhere or not all_finite(gradients)
            if not self._dropping:
                self.update(unit, self.seed, following)
                self._done.append(number)
        self._held -= sum(gradient.numel() * gradient.element_size() for gradient in gradients)
        for _, leaf in unit:
            leaf.grad = None

    def _found_inf(self, gradients: list[Tensor]) -> Tensor:
        """Whether a gradient of this step was not finite so far, as 0 or 1 on the device of these."""
        flag = non_finite(gradients)
        for before in (
            self._flags.values()
        ):  # of other devices, too: gradients come from one, and are updated on another
            flag = torch.maximum(flag, before.to(flag.device, flag.dtype))
        self._flags[flag.device] = flag
        return flag

    def _upcoming(self, number: int) -> list[int]:
        if number not in self._order:
            return []
        place = self._order.index(number)
        return [n for n in self._order[place + 1 : place + 3] if n not in self._done]

    def unspent(self) -> list[Tensor]:
        """Gradients that exist still."""
        return [leaf.grad for unit in self._units for _, leaf in unit if leaf.grad is not None]

    def _unwatch(self) -> None:
        self._spent.hide()
        for handle in self._handles:
            handle.remove()
        self._handles = []
