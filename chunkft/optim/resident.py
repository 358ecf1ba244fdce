"""State of the active chunk that stays on the device for the whole interval (``residency="chunk"``)."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from torch import Tensor, nn

from chunkft.autograd import Slice
from chunkft.optim.active import ActiveSlices
from chunkft.optim.kernel_slices import KernelSlices, make_slices
from chunkft.optim.rule import UpdateRule
from chunkft.optim.state import State, StateStore

Pairs = list[tuple[Slice, nn.Parameter]]


class ChunkResidency:
    """Takes the state of a chunk out of the store when it becomes active, and puts it back when another one does.

    Args:
        rule: how slices are updated.
        store: where state lives that is not in use.
    """

    def __init__(self, rule: UpdateRule, store: StateStore) -> None:
        self.rule = rule
        self._store = store
        self._active: ActiveSlices | KernelSlices | None = None
        self._carried: dict[Slice, State] = {}  # state that stays while leaves are replaced

    def bind(self, pairs: Pairs) -> None:
        """These slices are active now; those that were so before keep their state where it is."""
        # Until the end, state that is carried over stays in ``_carried``: whatever fails here can be done again.
        if self._active is not None:
            self._carried = self._active.states()
            self._active = None
        carried = self._carried
        opened = self._store.open([(piece, leaf) for piece, leaf in pairs if piece not in carried])
        states = {piece: dict(carried[piece] if piece in carried else opened[piece]) for piece, _ in pairs}
        for piece, leaf in pairs:
            states[piece] = beside_weight(self.rule, piece, leaf, states[piece])
        self._active = make_slices(pairs, states, self.rule, self._store.home)
        self._carried = {}

    def use(self, store: StateStore) -> None:
        """Work with another store from now on."""
        self._store = store

    def step(self, seed: str) -> None:
        """Update every active slice that has a gradient."""
        self._slices().step(seed)

    def prefetch(self, pieces: Sequence[Slice]) -> None:
        """These slices become active after the next step: their state may come now."""
        self._store.prefetch(pieces)

    def stash(self, always: Sequence[Slice], keep_state: bool) -> None:
        """Put the state of the active slices into the store, or drop it; that of ``always`` stays.

        If this fails, the slices are active still, and it can be called again.
        """
        if self._active is None:
            return  # done by an earlier try
        states = self._active.states()
        masters = self._active.masters()  # these are part of the weights, not of the moments
        self._carried = {piece: states.pop(piece) for piece in always}
        opened = list(states)
        if not keep_state:
            for piece in states:
                self._store.drop(piece)
            states = {piece: masters[piece] for piece in states}
        self._store.close(opened, {piece: state for piece, state in states.items() if state})
        self._active = None

    def forget(self) -> None:
        """Let go of all active state."""
        self._active = None
        self._carried = {}

    def states(self) -> dict[Slice, State]:
        """The state of every slice that has some, where it is now."""
        active = self._slices().states()
        stored = {piece: self._store.get(piece) for piece in self._store.pieces() if piece not in active}
        return {piece: state for piece, state in {**stored, **active}.items() if state}

    def active_states(self) -> dict[Slice, State]:
        """State and masters of the active slices, the tensors themselves."""
        return {} if self._active is None else self._active.states()

    def show(self, target: MutableMapping[Tensor, Any]) -> None:
        """Put the base optimizer's state of each leaf into ``target``, in place of what was there."""
        self._slices().show(target)

    def follow_devices(self) -> None:
        """Bring state to where its leaf is now."""
        self._slices().follow_devices()

    def gradient_nbytes(self, leaves: Sequence[Tensor]) -> int:
        """Most bytes of gradients that exist at a time."""
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves)

    def nbytes(self) -> tuple[int, int]:
        """Bytes on the device of the base optimizer's state, free slots included, and of the masters."""
        state, masters = (0, 0) if self._active is None else self._active.nbytes()
        return state + self._store.spare_nbytes, masters

    def _slices(self) -> ActiveSlices | KernelSlices:
        if self._active is None:
            raise RuntimeError(
                "no slice is active, because a switch of chunks was interrupted; call step() or state_dict() of the "
                "optimizer, which finish it"
            )
        return self._active


def beside_weight(rule: UpdateRule, piece: Slice, leaf: Tensor, state: State) -> State:
    """The state of a slice, with its step count on the device where the implementation wants it there."""
    group = rule.groups[rule.group_of[piece.name]]
    if not (group.get("fused") or group.get("capturable")):
        return state
    return {
        key: value.to(leaf.device) if isinstance(value, Tensor) else value for key, value in state.items()
    }
