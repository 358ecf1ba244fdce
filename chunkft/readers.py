"""Weights that are read, or watched, beside their modules: their whole gradient is computed and cut."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from chunkft.bound import Bound


class Notices:
    """What is said once for a weight and those like it in other layers."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def hooks(self, name: str, compiled: bool) -> None:
        """Say that the hooks of a weight cost the savings of its slices.

        Raises:
            RuntimeError: if its layer is compiled, which has no whole gradient to hand to them.
        """
        if compiled:
            raise RuntimeError(
                f"the weight {name!r} has a hook on its gradient, which a compiled layer cannot call; leave this "
                "layer out of what is compiled, or train the weight as a whole: chunkft.partition(..., "
                f"atomic={_pattern(name)!r})"
            )
        self._say(
            "hooks",
            name,
            f"the weight {name!r} has a hook on its gradient, so its whole gradient is computed, handed to the "
            "hook, and its active slice cut out: exact, but without the savings",
        )

    def reader(self, name: str) -> None:
        """Say that whoever reads a weight beside its module costs the savings of its slices."""
        self._say(
            "reader",
            name,
            f"the weight {name!r} is used without a call of the module that holds it, so its whole gradient is "
            "computed before its active slice is cut out: exact, but without the savings. "
            f"chunkft.partition(..., atomic={_pattern(name)!r}) counts its gradient as a whole",
        )

    def _say(self, kind: str, name: str, message: str) -> None:
        key = kind, _pattern(name)
        if key not in self._said:
            self._said.add(key)
            warnings.warn(message, stacklevel=4)


class Owner(Protocol):
    """The attachment that a weight belongs to."""

    shows_gradients: bool
    before_weight: dict[str, Callable[[], None]]
    after_weight: dict[str, Callable[[], None]]
    notices: Notices


def cutter(owner: Owner, name: str, bound: Bound) -> Callable[[Tensor], None]:
    """Hook that hands the gradient of a whole weight, from who read it without its module, to the leaves."""
    # The hook lives in C++, out of sight of the garbage collector: it must not hold us.
    attachment, target = weakref.ref(owner), weakref.ref(bound)

    def cut(parameter: Tensor) -> None:
        owner, active = attachment(), target()
        if owner is None or active is None:
            parameter.grad = None
            return
        if name in owner.before_weight:
            owner.before_weight[name]()
        active.gradients.follow(owner.shows_gradients)
        # Calls of the module end here too, with nothing for the weight itself.
        if active.gradients.take_arrival() and not (active.cut_anyway or active.has_hooks()):
            owner.notices.reader(name)
        if name in owner.after_weight:
            owner.after_weight[name]()

    return cut


def _pattern(name: str) -> str:
    """The name with a star in place of each number, which stands for all layers."""
    return re.sub(r"(^|(?<=\.))\d+(?=\.)", "*", name)
