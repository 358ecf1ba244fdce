"""Gradients that do not stay until the step: updated inside of the backward pass, or copied to host memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from chunkft.autograd import Slice
from chunkft.optim.pages import Page
from chunkft.optim.planner.timeline import Held
from chunkft.optim.planner.windows import Window

__all__ = ["SentDown", "SpentByPage", "SpentInBulk"]


class SpentByPage(Held):
    """``update="backward"``: gradients are freed once all of a page are there.

    Args:
        window: what is active, cut so that state fits pages.
        pages: where its state lies.
        element_bytes: of the gradient of a parameter.
        update_nbytes: what the update of some slices takes meanwhile.
    """

    def __init__(
        self,
        window: Window,
        pages: Sequence[Page],
        element_bytes: Callable[[str], int],
        update_nbytes: Callable[[tuple[Slice, ...]], int],
    ) -> None:
        super().__init__(window)
        self._update = update_nbytes
        own = set(window.pieces)
        self._units = [tuple(p for p in page.pieces if p in own) for page in pages]
        self._units = [unit for unit in self._units if unit]
        paged = {piece for unit in self._units for piece in unit}
        self._units += [(piece,) for piece in window.pieces if piece not in paged]
        self._bytes = [sum(p.numel * element_bytes(p.name) for p in unit) for unit in self._units]
        self._missing = [{p.name for p in unit} for unit in self._units]
        self._of: dict[str, list[int]] = {}
        for number, names in enumerate(self._missing):
            for name in names:
                self._of.setdefault(name, []).append(number)

    def complete(self, name: str) -> tuple[int, int]:
        update = gone = 0
        for number in self._of.get(name, ()):
            if name not in self._missing[number]:
                continue
            self._missing[number].discard(name)
            if not self._missing[number]:
                update = max(update, self._update(self._units[number]))
                gone += self._bytes[number]
        return update, gone


class SpentInBulk(Held):
    """The same where pages are too many to look at each: less than a page waits for the rest of its page.

    Args:
        window: what is active.
        waiting: bytes of the gradients of a page.
    """

    def __init__(self, window: Window, waiting: int) -> None:
        super().__init__(window)
        self._waiting = waiting

    def complete(self, name: str) -> tuple[int, int]:
        return 0, max(0, self.nbytes - self._waiting)


class SentDown(Held):
    """Gradients of weights in host memory go there as soon as they are complete; others stay.

    Args:
        window: what is active.
        goes: whether that of a parameter does.
        at_once: whether it is gone then. On a GPU the copy takes its time: in the worst case, which is taken here, all
            of them wait for the link.
        never: those that are computed in host memory.
    """

    def __init__(
        self, window: Window, goes: Callable[[str], bool], at_once: bool, never: Collection[str]
    ) -> None:
        super().__init__(window)
        self._goes = goes
        self._at_once = at_once
        self._never = never

    def arrive(self, name: str) -> None:
        if name not in self._never:
            super().arrive(name)

    def complete(self, name: str) -> tuple[int, int]:
        gone = self._at_once and self._goes(name) and name not in self._never
        return 0, self.window.gradients.get(name, 0) if gone else 0
