"""State that passes through a few slots inside every step (``residency="stream"``)."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor

from chunkft import tracing
from chunkft.autograd import Slice
from chunkft.optim.advanced import AdvancedValues
from chunkft.optim.kernel_slices import KernelSlices, make_slices
from chunkft.optim.master import STATE_KEYS
from chunkft.optim.paged import PagedStore
from chunkft.optim.resident import Pairs, beside_weight
from chunkft.optim.rule import UpdateRule
from chunkft.optim.state import State, StateStore


class StreamResidency:
    """Updates the active slices page by page: page i + 1 is fetched and page i - 1 written back meanwhile.

    Device memory for state is that of the slots, whatever the number of chunks.

    Args:
        rule: how slices are updated.
        store: where state lives.
    """

    def __init__(self, rule: UpdateRule, store: PagedStore) -> None:
        self.rule = rule
        self._store = store
        self._units: list[Pairs] = []  # the pairs of one page each; a slice without a page is one by itself
        self._advanced = AdvancedValues(rule.groups)

    def bind(self, pairs: Pairs) -> None:
        """These slices are active now."""
        units: dict[int | Slice, Pairs] = {}
        for piece, leaf in pairs:
            units.setdefault(self._store.page_of.get(piece, piece), []).append((piece, leaf))
        self._units = list(units.values())
        self._fetch(self._first())

    def use(self, store: StateStore) -> None:
        """Work with another store from now on."""
        assert isinstance(store, PagedStore)
        self._store = store

    def step(self, seed: str) -> None:
        """Update every active slice that has a gradient."""
        units = [unit for unit in self._units if any(leaf.grad is not None for _, leaf in unit)]
        try:
            for number, unit in enumerate(units):
                self.update(unit, seed, units[number + 1 : number + 3])
        finally:
            self.finish()
        self._fetch(self._first())

    def update(
        self, unit: Pairs, seed: str, following: Sequence[Pairs], found_inf: Tensor | None = None
    ) -> None:
        """Update the slices of one page; begin to fetch the pages that follow.

        ``found_inf`` is for slices that ``kernel_applies`` to: not zero, and nothing is updated.
        """
        with tracing.span("update %s and %d more", unit[0][0], len(unit) - 1):
            self._update(unit, seed, following, found_inf)

    def _update(self, unit: Pairs, seed: str, following: Sequence[Pairs], found_inf: Tensor | None) -> None:
        pieces = [piece for piece, _ in unit]
        try:
            states = self._store.open(unit)
            self._fetch(following)
            for piece, leaf in unit:
                states[piece] = beside_weight(self.rule, piece, leaf, states[piece])
            active = make_slices(unit, states, self.rule, self._store.home)
            if isinstance(active, KernelSlices):
                active.step(seed, found_inf)
            else:
                with self._advanced.held_back({self.rule.group_of[piece.name] for piece in pieces}):
                    active.step(seed)
            self._store.close(pieces, {piece: state for piece, state in active.states().items() if state})
        except BaseException:
            self._store.abandon(pieces)
            raise

    def finish(self) -> None:
        """All pages of this step are done."""
        self._advanced.apply()

    def prefetch(self, pieces: Sequence[Slice]) -> None:
        """Nothing to do long before: the first pages are fetched when the slices become active."""

    def stash(self, always: Sequence[Slice], keep_state: bool) -> None:
        """The active slices rest; their state is in the store already."""
        if not keep_state:
            stay = set(always)
            for piece in [piece for unit in self._units for piece, _ in unit if piece not in stay]:
                self._store.retain(piece, set(STATE_KEYS.values()))
        self._units = []

    def forget(self) -> None:
        """Let go of the active slices."""
        self._units = []

    def states(self) -> dict[Slice, State]:
        """The state of every slice that has some, in host memory."""
        states = {piece: self._store.get(piece) for piece in self._store.pieces()}
        return {piece: state for piece, state in states.items() if state}

    def show(self, target: MutableMapping[Tensor, Any]) -> None:
        """State is on no device between steps: nothing to show."""
        target.clear()

    def follow_devices(self) -> None:
        """Make sure that leaves are where their pages come to.

        Raises:
            RuntimeError: if a parameter was moved to another device.
        """
        for piece, leaf in [pair for unit in self._units for pair in unit]:
            home = self._store.device_of(piece)
            if home is not None and home != leaf.device:
                raise RuntimeError(
                    f"parameter {piece.name!r} was on {home} when the optimizer was built and is on {leaf.device} now; "
                    "with residency='stream' its state is paged to where it was: move the model first, then build the "
                    "optimizer"
                )

    def gradient_nbytes(self, leaves: Sequence[Tensor]) -> int:
        """Most bytes of gradients that exist at a time."""
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves)

    def nbytes(self) -> tuple[int, int]:
        """Bytes of the slots, which state of the base optimizer and masters share."""
        return self._store.slot_nbytes, 0

    def _first(self) -> Sequence[Pairs]:
        """The units that the next step begins with."""
        return self._units[:2]

    def _fetch(self, units: Sequence[Pairs]) -> None:
        for unit in units:
            self._store.prefetch([piece for piece, _ in unit])
