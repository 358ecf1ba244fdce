"""Where the slots of a pager are, and which stream the caller works on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

__all__ = ["Fence", "Place", "place_of"]


class Fence(Protocol):
    """A point in the work of torch's current stream that the host can wait for."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class _NoFence:
    """On the CPU: the caller's work is done when the call returns."""

    def record(self) -> None:
        return

    def synchronize(self) -> None:
        return


class _CudaFence:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def synchronize(self) -> None:
        self._event.synchronize()


@dataclass(frozen=True)
class Place:
    """A device as a pager needs it: slot memory through torch, the handle of torch's current stream, and a
    wait for all of the device's work.
    """

    device: torch.device
    backend: Literal["host", "cuda"]
    empty: Callable[[int], Tensor]
    stream: Callable[[], int]
    synchronize: Callable[[], None]
    fence: Callable[[], Fence]


def place_of(device: torch.device | str | int) -> Place:
    """Return the place of a torch device, "cpu" or "cuda"; raises ValueError or TypeError naming `device`."""
    if not isinstance(device, torch.device | str | int) or isinstance(device, bool):
        raise TypeError(f"Pager: device must be a torch.device or its name, got {device!r}")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"Pager: device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}") from error
    if chosen.type == "cpu":
        cpu = torch.device("cpu")
        return Place(cpu, "host", _empty_on(cpu), lambda: 0, lambda: None, _NoFence)
    if chosen.type != "cuda":
        raise ValueError(f"Pager: device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    if not torch.cuda.is_available():
        raise ValueError(
            f"Pager: device={str(device)!r} needs a GPU, but torch {torch.__version__} finds none"
            " (torch.cuda.is_available() is False); allowed here: 'cpu'"
        )
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"Pager: device={str(device)!r} does not exist; torch finds {torch.cuda.device_count()} GPUs"
        )
    cuda = torch.device("cuda", index)
    return Place(
        cuda,
        "cuda",
        _empty_on(cuda),
        lambda: int(torch.cuda.current_stream(cuda).cuda_stream),
        lambda: torch.cuda.synchronize(cuda),
        lambda: _CudaFence(cuda),
    )


def _empty_on(device: torch.device) -> Callable[[int], Tensor]:
    def empty(nbytes: int) -> Tensor:
        # A tensor made under inference_mode could not be updated outside it.
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=device)

    return empty
