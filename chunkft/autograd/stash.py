"""Gradients that operators of a compiled graph computed for leaves which are no part of that graph.

They reach the leaves only if the backward pass accumulates into leaves at all: ``torch.autograd.grad`` does not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection

import torch
from torch import Tensor


class Stash:
    """What one backward pass computed so far, by the number of the module that it belongs to."""

    def __init__(self, shared: Collection[int]) -> None:
        """``shared``: numbers of modules whose leaves other modules have too."""
        self._shared = shared
        self._gradients: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        self._late: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, number: int, leaf: Tensor, gradient: Tensor) -> None:
        """One more use of a leaf by a module of this number."""
        _sum_up(self._gradients.setdefault(number, {}), leaf, gradient)

    def arrive(self, number: int) -> None:
        """Nothing is missing of this module: its leaves get their gradients, shared ones at the end of the pass."""
        gradients = self._gradients.pop(number, {})
        if number not in self._shared:
            return _hand_over(gradients)
        for leaf, gradient in gradients.values():
            _sum_up(self._late, leaf, gradient)

    def finish(self) -> None:
        """The pass is over: nobody reads a weight any more; what did not arrive belongs to no leaf."""
        self._gradients.clear()
        _hand_over(self._late)


# A pass that failed frees its callbacks, and with them its stash.
_stashes: weakref.WeakValueDictionary[int, Stash] = weakref.WeakValueDictionary()


def current_stash(shared: Callable[[], Collection[int]]) -> Stash:
    """The stash of the backward pass that calls this; ``shared()`` is asked when it is made.

    Raises:
        RuntimeError: outside of a backward pass.
    """
    task = torch._C._current_graph_task_id()
    if task < 0:
        raise RuntimeError(
            "the backward operator of a compiled sliced layer was called outside of a backward pass"
        )
    stash = _stashes.get(task)
    if stash is None:
        stash = _stashes[task] = Stash(shared())
        torch.autograd.Variable._execution_engine.queue_callback(stash.finish)
    return stash


def arrive(number: int) -> None:
    """All gradients of a module of this number are there in the backward pass that calls this."""
    stash = _stashes.get(torch._C._current_graph_task_id())
    if stash is not None:
        stash.arrive(number)


def _sum_up(gradients: dict[int, tuple[Tensor, Tensor]], leaf: Tensor, gradient: Tensor) -> None:
    before = gradients.get(id(leaf))
    gradients[id(leaf)] = leaf, gradient if before is None else before[1] + gradient


def _hand_over(gradients: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Through the engine, so that hooks of the leaves run; what has arrived is let go of at once."""
    for key in list(gradients):
        leaf, gradient = gradients.pop(key)
        torch.autograd.backward([leaf], [gradient])
