"""What a model on the meta device does as models do whose weights stream: products by tiles, parked inputs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from chunkft.autograd import TiledForward, put_tiles
from chunkft.weights import Table
from chunkft.weights.parking import without_caches

__all__ = ["parked", "tiled"]


class _EmptyTiles:
    """``Tiles`` without values: every one is a part of the same slot."""

    def __init__(self, table: Table) -> None:
        self.shape = table.shape
        self.device = torch.device("meta")
        self.slot = torch.empty(table.tile_rows, table.shape[1], dtype=table.dtype, device="meta")

    @property
    def count(self) -> int:
        """How many tiles there are."""
        return -(-self.shape[0] // len(self.slot))

    def holds(self, weight: Tensor) -> bool:
        """Nothing moves here."""
        return True

    def walk(self, *, backward: bool = False) -> Generator[tuple[int, int, Tensor]]:
        """Bounds and values of each tile."""
        starts = range(0, self.shape[0], len(self.slot))
        for start in reversed(starts) if backward else starts:
            stop = min(self.shape[0], start + len(self.slot))
            yield start, stop, self.slot[: stop - start]


@contextmanager
def tiled(model: nn.Module, table: Table) -> Iterator[Tensor]:
    """Let the layers of a table multiply by tiles inside of the block; gives the slot that these are in."""
    tiles = _EmptyTiles(table)
    weight = model.get_parameter(table.name)
    layers = [model.get_submodule(name) for name in table.multiplies]
    put_tiles(weight, tiles)
    for layer in layers:
        assert isinstance(layer, nn.Linear)
        layer.__dict__["forward"] = TiledForward(layer, layer.forward, tiles)
    try:
        yield tiles.slot
    finally:
        put_tiles(weight, None)
        for layer in layers:
            layer.__dict__.pop("forward", None)


@contextmanager
def parked(model: nn.Module, blocks: tuple[str, ...]) -> Iterator[None]:
    """Inside of it blocks are recomputed in the backward pass if a gradient flows through their input, as where that is
    parked; the input itself stays here.
    """
    layers = [model.get_submodule(name) for name in blocks]
    for layer in layers:
        layer.__dict__["forward"] = _recomputed(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _recomputed(inner: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        flows = any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves((args, kwargs)))
        if not flows or not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        args, kwargs = without_caches(args, kwargs)
        return checkpoint(inner, *args, use_reentrant=False, **kwargs)

    return forward
