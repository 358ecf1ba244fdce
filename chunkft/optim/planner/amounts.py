"""Bytes by kind."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GpuBytes", "HostBytes"]


@dataclass(frozen=True, kw_only=True)
class GpuBytes:
    """The moment of a step at which the GPU holds the most, by kind; ``reserve`` is beside it.

    Attributes:
        weights: parameters and buffers that stay.
        ring: slots that streamed weights pass through.
        leaves: copies of the active slices of streamed weights.
        state: optimizer state, or the slots that it passes through.
        gradients: of the active slices.
        activations: what the backward pass waits for, the batch included.
        working: what one block, the head or the loss takes while it computes.
        update: what the update takes beside all this.
        reserve: CUDA context and allocator.
    """

    weights: int
    ring: int
    leaves: int
    state: int
    gradients: int
    activations: int
    working: int
    update: int
    reserve: int

    @property
    def tensors(self) -> int:
        """All but the reserve."""
        return self.total - self.reserve

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class HostBytes:
    """Host memory by kind.

    Attributes:
        weights: pages and tables of streamed weights.
        state: optimizer state, or the buffers before its files.
        gradients: of streamed weights that are updated on the host.
        activations: inputs of blocks.
    """

    weights: int
    state: int
    gradients: int
    activations: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.state + self.gradients + self.activations
