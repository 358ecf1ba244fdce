"""Host memory for copies to a device: page-locked where that can be had."""

import warnings
from typing import Literal

from chunkft.streaming.arena import HostArena
from chunkft.streaming.place import Place

__all__ = ["host_memory"]

_warned = False


def host_memory(nbytes: int, pin: bool | Literal["auto"], place: Place) -> HostArena:
    """Return an arena of `nbytes` within the memory budget, page-locked for `place` as `pin` says.

    Raises OSError if there is no room for it; with pin=True also RuntimeError if it cannot be page-locked.
    """
    on_gpu = place.backend == "cuda"
    # Pages that are locked are committed anyway; several threads do it faster than the driver.
    arena = HostArena(nbytes, within_budget=True, pretouch=on_gpu)
    if on_gpu and pin is not False:
        try:
            arena.page_lock(place.device.index or 0)
        except (RuntimeError, OSError) as error:
            if pin is True:
                arena.close()
                raise
            _warn_once(nbytes, error)
    return arena


def _warn_once(nbytes: int, error: Exception) -> None:
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"chunkft: {nbytes} bytes of host memory could not be page-locked ({error}). Copies to and from the GPU"
        " now go through the driver's own buffers: slower, and they hold up the calling thread; `chunkft doctor`"
        " shows how much may be locked and what the link gives. Pass pin=False to accept this silently.",
        RuntimeWarning,
        stacklevel=2,
    )
