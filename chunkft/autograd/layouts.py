"""Inputs that are no strided tensors: sequences of several lengths in one nested tensor, and sparse ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_strided(x: Any) -> bool:
    """Whether an input is an ordinary tensor, which sliced operators compute with."""
    return not isinstance(x, Tensor) or (x.layout is torch.strided and not x.is_nested)


def is_jagged(x: Any) -> bool:
    """Whether an input is a contiguous nested tensor of layout ``torch.jagged``, ragged in dimension 1 alone."""
    return x.layout is torch.jagged and x._ragged_idx == 1 and x._lengths is None


def on_values(function: Callable[[Tensor], Tensor], x: Any) -> Tensor:
    """Nested tensor of the same lengths with ``function`` of the values.

    Args:
        function: of all tokens of all sequences (T, ...) to (T, ...).
        x: one for which ``is_jagged`` holds.
    """
    longest, shortest = x._maybe_max_seqlen, x._maybe_min_seqlen  # None, rather than a wait for the device
    bounds = {"min_seqlen": shortest, "max_seqlen": longest}
    values = function(x.values())
    return torch.nested.nested_tensor_from_jagged(values, x.offsets(), **bounds)
