"""What a slice of a parameter is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows (``dim=0``) or columns (``dim=1``) ``[start, stop)`` of one parameter, or all of it (``dim=None``).

    Attributes:
        name: qualified name of the parameter, as in ``model.named_parameters()``.
        dim: the dimension that is cut; None for a parameter that is never split (*atomic*).
        start: first row or column; 0 for an atomic parameter.
        stop: one past the last row or column; the size of dimension 0 for an atomic parameter.
        parameter_shape: shape of the whole parameter.
        element_bytes: bytes that one element takes in the stream: its weight and its optimizer state.
    """

    name: str
    dim: int | None
    start: int
    stop: int
    parameter_shape: tuple[int, ...]
    element_bytes: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the slice."""
        if self.dim is None:
            return self.parameter_shape
        size = list(self.parameter_shape)
        size[self.dim] = self.stop - self.start
        return tuple(size)

    @property
    def numel(self) -> int:
        """Number of elements of the slice."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the slice in the stream: weight and optimizer state."""
        return self.numel * self.element_bytes

    def of(self, tensor: Tensor) -> Tensor:
        """The view of a whole-parameter tensor that this slice names."""
        if self.dim is None:
            return tensor
        return tensor.narrow(self.dim, self.start, self.stop - self.start)

    def __str__(self) -> str:
        if self.dim is None:
            return self.name
        window = f"{self.start}:{self.stop}"
        return f"{self.name}[{window}]" if self.dim == 0 else f"{self.name}[:, {window}]"


def traced_name(pieces: Iterable[Slice]) -> str:
    """How slices of one parameter are called in timelines: ``model.layers.0.mlp.up_proj[0:64,128:192]``."""
    windows, name, dim = [], "", None
    for piece in pieces:
        name, dim = piece.name.removesuffix(".weight"), piece.dim
        windows.append(f"{piece.start}:{piece.stop}")
    joined = ",".join(windows)
    if dim is None:
        return name
    return f"{name}[{joined}]" if dim == 0 else f"{name}[:, {joined}]"
