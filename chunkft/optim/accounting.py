"""What training holds, counted from the tensors and the memory that are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from chunkft.activations import saved_activations
from chunkft.optim.backward import BackwardResidency
from chunkft.optim.forecast import MASTER_KEYS, predict, predict_full, weight_nbytes
from chunkft.optim.paged import PagedStore
from chunkft.optim.report import MemoryPart, MemoryReport
from chunkft.optim.resident import ChunkResidency

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer


class MemoryMeter:
    """Keeps the peaks between two reports.

    Attributes:
        on_state: called when the state of the active slices is complete, before it can be put away; or None.
    """

    def __init__(self) -> None:
        self._peaks: dict[str, int] = {}
        self._watching: list[saved_activations] = []
        self.on_state: Callable[[], None] | None = None

    def watch(self, saved: saved_activations) -> None:
        """Count these activations in the next reports."""
        self._watching = [one for one in self._watching if one.live_bytes or one.peak_bytes]
        self._watching.append(saved)

    def observe_gradients(self, optimizer: ChunkOptimizer) -> None:
        """Gradients are complete, before the update that consumes them."""
        self._raise({**_gradients(optimizer), "leaves": weight_nbytes(optimizer._attachment)["leaves"]})

    def observe_sending(self, optimizer: ChunkOptimizer) -> None:
        """Gradients are about to leave for their owners, where others are already."""
        self._raise(_gradients(optimizer))

    def observe_state(self, optimizer: ChunkOptimizer) -> None:
        """The state of the active slices is complete: after the first update of an interval."""
        self._raise(_state(optimizer))
        if self.on_state is not None:
            self.on_state()

    def report(self, optimizer: ChunkOptimizer) -> MemoryReport:
        """What is there now, and the peaks since the last report."""
        now: dict[str, int] = {
            **weight_nbytes(optimizer._attachment),
            **_gradients(optimizer),
            **_state(optimizer),
        }
        self._raise(now)
        if isinstance(optimizer._residency, BackwardResidency):
            self._raise({"gradients": optimizer._residency.recent_peak})
            optimizer._residency.recent_peak = 0
        if isinstance(optimizer._store, PagedStore):
            self._raise({"state_new": optimizer._store.new_peak})
            optimizer._store.new_peak = 0
        predicted, full = predict(optimizer, optimizer._own_plan, optimizer.plan), predict_full(optimizer)
        parts = {
            name: MemoryPart(
                predicted=predicted[name], now=now[name], peak=self._peaks[name], full=full[name]
            )
            for name in now
        }
        parts["activations"] = self._activations()
        self._peaks = dict(now)
        device = optimizer._attachment.device
        in_place = (
            optimizer._attachment.wiring.residence is None
            and device.type == "cpu"
            and optimizer._store.in_arena
            and not isinstance(optimizer._store, PagedStore)
        )
        return MemoryReport(**parts, device=str(device), in_place=in_place)

    def _activations(self) -> MemoryPart:
        if not self._watching:
            return MemoryPart()
        part = MemoryPart(
            now=sum(saved.live_bytes for saved in self._watching),
            peak=max(saved.peak_bytes for saved in self._watching),
        )
        self._watching = [saved for saved in self._watching if saved.live_bytes]
        return part

    def _raise(self, counted: dict[str, int]) -> None:
        for name, value in counted.items():
            self._peaks[name] = max(self._peaks.get(name, 0), value)


def _gradients(optimizer: ChunkOptimizer) -> dict[str, int]:
    """Bytes of gradients by where they are; of many ranks also of those that came to their owner."""
    counted = {"gradients": 0, "gradients_host": 0}
    owned = () if optimizer._team is None else optimizer._team.pairs
    for piece, leaf in [*optimizer._attachment.active(), *owned]:
        if leaf.grad is not None:
            kind = "gradients_host" if optimizer._attachment.on_host(piece.name) else "gradients"
            counted[kind] += leaf.grad.numel() * leaf.grad.element_size()
    return counted


def _state(optimizer: ChunkOptimizer) -> dict[str, int]:
    """Bytes of state and masters by where they are."""
    store, residency = optimizer._store, optimizer._residency
    page_of = store.page_of if isinstance(store, PagedStore) else {}
    counted = {"state_device": 0, "masters": 0, "state_new": 0}
    beside = 0  # bytes in host memory that are not the store's yet
    seen: set[int] = set()
    states = residency.active_states() if isinstance(residency, ChunkResidency) else {}
    for piece, state in states.items():
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            home = store.home(piece, key)
            if home is not None and home.data_ptr() == value.data_ptr():
                continue  # in a slot
            seen.add(value.data_ptr())
            if optimizer._attachment.on_host(piece.name):
                beside += 0 if store.holds(piece, key, value) else value.numel() * value.element_size()
                continue
            kind = "state_new" if piece in page_of else "masters" if key in MASTER_KEYS else "state_device"
            counted[kind] += value.numel() * value.element_size()
    if not store.in_arena:  # what rests is on the device as well
        for piece in store.pieces():
            for key, value in store.get(piece).items():
                if isinstance(value, Tensor) and value.dim() > 0 and value.data_ptr() not in seen:
                    kind = "masters" if key in MASTER_KEYS else "state_device"
                    counted[kind] += value.numel() * value.element_size()
    if not isinstance(store, PagedStore):
        return counted | {"state_host": store.nbytes + beside, "state_files": 0}
    stats = [pager.stats() for pager in store.pagers.values()]
    counted["state_device"] += sum(entry.device_bytes for entry in stats)
    host = store.arena_nbytes + beside + sum(entry.host_bytes for entry in stats)
    return counted | {"state_host": host, "state_files": sum(entry.file_bytes for entry in stats)}
