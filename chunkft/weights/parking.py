"""Inputs of checkpointed blocks that wait for the backward pass in host memory."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from chunkft.streaming import HostArena, host_memory, place_of

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")  # in transformers


class ParkingLot:
    """Page-locked memory for inputs of blocks; what was used once is used again.

    Args:
        device: where the blocks compute.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._place = place_of(device)
        on_gpu = device.type == "cuda"
        self.down = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self.up = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._free: dict[int, list[_Space]] = {}
        self._lock = threading.Lock()
        self.latest: Callable[[], Parked | None] = lambda: None
        self.nbytes = 0

    def space(self, nbytes: int) -> _Space:
        """Memory of exactly this size, for the caller alone until ``give_back``."""
        with self._lock:
            free = self._free.get(nbytes)
            if free:
                return free.pop()
            self.nbytes += nbytes
        return _Space(host_memory(nbytes, "auto", self._place))

    def give_back(self, space: _Space) -> None:
        """Nobody waits for what is in there any more."""
        with self._lock:
            self._free.setdefault(space.arena.nbytes, []).append(space)


class _Space:
    def __init__(self, arena: HostArena) -> None:
        self.arena = arena
        self.read: Any = None  # event behind the last copy out of it


class Parked:
    """One tensor: where it was computed at first, and in host memory after ``park``."""

    def __init__(self, tensor: Tensor, lot: ParkingLot) -> None:
        self._tensor: Tensor | None = tensor
        self._like = tuple(tensor.shape), tensor.dtype, tensor.requires_grad
        self._lot = lot
        self._space: _Space | None = None
        self._there: Any = None  # event behind the copy to the host
        self._coming: tuple[Tensor, Any] | None = None  # on its way back
        self._before = lot.latest()  # parked before it, and needed after it
        lot.latest = weakref.ref(self)

    def park(self) -> None:
        """Copy it to host memory and let go of it."""
        tensor, self._tensor = self._tensor, None
        if tensor is None or not tensor.numel():
            self._tensor = tensor
            return
        values, lot = tensor.detach(), self._lot
        self._space = space = lot.space(values.numel() * values.element_size())
        weakref.finalize(self, lot.give_back, space)
        if lot.down is None:
            self._host(space).copy_(values)
            return
        lot.down.wait_stream(torch.cuda.current_stream(lot.device))
        if space.read is not None:
            lot.down.wait_event(space.read)
        with torch.cuda.stream(lot.down):
            self._host(space).copy_(values, non_blocking=True)
            self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._there.record(lot.down)
        values.record_stream(lot.down)

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self._space is None or self._coming is not None or self._lot.up is None:
            return
        shape, dtype, _ = self._like
        up, device = self._lot.up, self._lot.device
        back = torch.empty(shape, dtype=dtype, device=device)
        up.wait_stream(torch.cuda.current_stream(device))
        up.wait_event(self._there)
        with torch.cuda.stream(up):
            back.copy_(self._host(self._space), non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(up)
        back.record_stream(up)
        self._space.read = done
        self._coming = back, done

    def take(self) -> Tensor:
        """The tensor, or after ``park`` one with its values that requires grad if it did."""
        if self._tensor is not None:
            return self._tensor
        assert self._space is not None
        with torch.no_grad():
            if self._lot.up is None:
                back = self._host(self._space).clone()
            else:
                self.fetch()
                assert self._coming is not None
                back, done = self._coming
                self._coming = None
                torch.cuda.current_stream(self._lot.device).wait_event(done)
                if self._before is not None:
                    self._before.fetch()
        return back.requires_grad_(self._like[2])

    def _host(self, space: _Space) -> Tensor:
        return space.arena.tensor(0, self._like[0], self._like[1])


def _is_cache(value: Any) -> bool:
    """Whether an argument is a cache of transformers."""
    return callable(getattr(value, "get_seq_length", None)) and callable(getattr(value, "update", None))


def without_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a block without transformers' caches of keys and values, which a recompute would fill again."""
    kept = {n: None if n in _CACHES or _is_cache(value) else value for n, value in kwargs.items()}
    if kept.get("use_cache"):
        kept["use_cache"] = False
    return tuple(None if _is_cache(value) else value for value in args), kept


def parked_call(
    forward: Callable[..., Any], main: Tensor, lot: ParkingLot, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a block that is recomputed in the backward pass, from its input ``main`` in host memory.

    The other arguments are kept as they are (``torch.utils.checkpoint``, not reentrant), except for caches of keys and
    values, which a recompute would fill again.
    """
    args, kwargs = without_caches(args, kwargs)
    parked = Parked(main, lot)
    put = tree_map(lambda one: parked if one is main else one, (args, kwargs))

    def run(*given: Any, **named: Any) -> Any:
        taken = parked.take()
        back = tree_map(lambda one: taken if one is parked else one, (given, named))
        return forward(*back[0], **back[1])

    output = checkpoint(run, *put[0], use_reentrant=False, **put[1])
    parked.park()
    return output
