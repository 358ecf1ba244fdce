"""What the arguments of a stream of weights may be."""

from __future__ import annotations

import os
from typing import Any

import torch


def resolved_device(device: Any) -> torch.device:
    """The device that a model computes on, by the argument of a stream."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device={device!r} is not known; allowed are 'auto', 'cpu', 'cuda' and 'cuda:N'"
        ) from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r} is not allowed; weights stream to 'cpu', 'cuda' or 'cuda:N'")
    if chosen.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(chosen)!r} needs a GPU that torch does not find; it finds {torch.cuda.device_count()}, and "
            "allowed besides is 'cpu'"
        )
    return torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)


def check_options(weights_dir: Any, pin: Any, poison: Any, device: torch.device) -> None:
    """Raise TypeError or ValueError that names one of these if it is not allowed."""
    if weights_dir is not None and not isinstance(weights_dir, str | os.PathLike):
        raise TypeError(f"weights_dir={weights_dir!r} is not allowed; needs the path of a directory, or None")
    if not (pin is True or pin is False or pin == "auto"):
        raise ValueError(f"pin={pin!r} is not allowed; needs True, False or 'auto'")
    if pin is True and device.type == "cpu":
        raise ValueError("pin=True is not allowed with device='cpu': page-locking serves copies to a GPU")
    if not isinstance(poison, bool):
        raise ValueError(f"poison={poison!r} is not allowed; needs True or False")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise ValueError if an argument is no integer of at least ``least``."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name}={value!r} is not allowed; needs an integer >= {least}")
