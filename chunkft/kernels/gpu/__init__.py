"""Triton kernels and what they share. Triton is optional: nothing outside of this folder imports it at module level.

A module here may be imported only after ``available()``; the public functions of ``chunkft.kernels`` do that.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


@cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET, set before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def runs_on(tensor: Tensor) -> bool:
    """Whether a Triton kernel can be launched on this tensor."""
    return available() and (tensor.is_cuda or (interpreted() and tensor.device.type == "cpu"))


def require(tensor: Tensor) -> None:
    """Raise ValueError, naming the reason, where ``backend="triton"`` was asked for and cannot be had."""
    if not available():
        raise ValueError("backend='triton' needs the package triton: pip install 'chunkft[gpu]'")
    if not runs_on(tensor):
        raise ValueError(
            f"backend='triton' needs tensors on a CUDA device, got {tensor.device}; "
            "on a CPU it works only with TRITON_INTERPRET=1"
        )
    if interpreted():
        from .interpreter import fault

        if why := fault():
            raise ValueError(f"backend='triton' cannot be had with TRITON_INTERPRET: {why}")


def current(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's device the current one: Triton launches there, on that device's current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def is_captured(tensor: Tensor) -> bool:
    """Whether the current stream of a tensor's device is being captured into a CUDA graph."""
    if not tensor.is_cuda:
        return False
    with current(tensor):
        return bool(torch.cuda.is_current_stream_capturing())
