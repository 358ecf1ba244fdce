"""The tensors in what a model returns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in an output, however nested."""
    parts: Iterable[Any] = ()
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, list | tuple):
        parts = output
    elif is_dataclass(output) and not isinstance(output, type):
        parts = (getattr(output, field.name) for field in fields(output))
    for part in parts:
        yield from tensors_in(part)
