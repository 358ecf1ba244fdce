"""Linear layers whose weight visits the device tile by tile: rows of it, one after the other."""

from __future__ import annotations

import copy
import types
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from chunkft import tracing
from chunkft.autograd.hooks import runs_as_it_is, undisturbed
from chunkft.autograd.linear import backward_name, kept_inputs, linear_output, slice_gradient, split_active
from chunkft.autograd.slices import Slice

Active = Sequence[tuple[Slice, Tensor]]
_ATTRIBUTE = "_chunkft_tiles"


class Tiles(Protocol):
    """A weight (V, H) that is on the device in parts only."""

    shape: tuple[int, int]
    device: torch.device

    @property
    def count(self) -> int:
        """How many tiles there are."""

    def holds(self, weight: Tensor) -> bool:
        """Whether a weight is where its values were put."""

    def walk(self, *, backward: bool = False) -> Generator[tuple[int, int, Tensor]]:
        """Bounds and values of each tile; a tile is there until the next one is asked for.

        The way back begins with the last tile.
        """


def tiles_of(weight: Tensor) -> Tiles | None:
    """The tiles of a weight that streams, or None."""
    return weight.__dict__.get(_ATTRIBUTE)


def put_tiles(weight: Tensor, tiles: Tiles | None) -> None:
    """Let layers compute with the tiles of a weight from now on; None: with the weight again."""
    if tiles is None:
        weight.__dict__.pop(_ATTRIBUTE, None)
    else:
        weight.__dict__[_ATTRIBUTE] = tiles


class Checked(Protocol):
    """A forward of active slices that can be asked which of them count in this call."""

    def checked(self) -> Active | None:
        """The active slices and their leaves; None: the module is to compute by itself."""


@runs_as_it_is
class TiledForward:
    """The forward of a linear layer whose weight is there in tiles only; set on the instance.

    Args:
        module: the layer.
        inner: its forward until now.
        tiles: of its weight.

    Attributes:
        module: the layer.
        inner: its forward until now.
        current: the forward for active slices of its weight, while there are some.
    """

    __slots__ = ("__weakref__", "_tiles", "current", "inner", "module")

    def __init__(self, module: nn.Linear, inner: Any, tiles: Tiles) -> None:
        self.module = module
        self.inner = inner
        self.current: Checked | None = None
        self._tiles: Tiles | None = tiles

    def __call__(self, input: Tensor) -> Tensor:
        return undisturbed(self._compute, input)  # type: ignore[no-any-return]

    def _compute(self, x: Tensor) -> Tensor:
        if self._tiles is None:
            result: Tensor = self.inner(x)
            return result
        active = () if self.current is None else self.current.checked()
        weight = self.module._parameters.get("weight")
        if (
            active is None
            or weight is None
            or tiles_of(weight) is not self._tiles
            or not self._tiles.holds(weight)
        ):
            raise RuntimeError(
                f"a weight of shape {self._tiles.shape} streams by tiles, which gives no gradient to hooks of the "
                "weight and cannot be moved, swapped for another (functional_call) or transformed; detach() the stream "
                "first"
            )
        bias = self.module._parameters.get("bias")
        return tiled_linear(x, self._tiles, bias, active)

    def release(self) -> None:
        """The tiles are gone: from now on this is what was there before."""
        self._tiles = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the model has weights of its own, which do not stream.
        return copied_forward(self.module, self.inner, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, "forward")


def copied_forward(module: nn.Module, inner: Any, memo: dict[int, Any]) -> Any:
    """What a copy of a module computes with, in place of a forward of ours that is around ``inner``."""
    if isinstance(inner, types.MethodType) and inner.__self__ is module:
        return types.MethodType(inner.__func__, memo[id(module)])
    return copy.deepcopy(inner, memo)


def tiled_linear(x: Tensor, tiles: Tiles, bias: Tensor | None, active: Active) -> Tensor:
    """``x W^T + b`` with one tile of W at a time, and gradients of x, b and the active slices of W.

    With one tile the bits are those of ``sliced_linear``. With several, gradients of x are summed over the tiles in
    fp32 (fp64 for fp64).

    Args:
        x: (..., H) input on the tiles' device.
        tiles: of W, (V, H).
        bias: (V,) or None.
        active: pairs of a slice and its leaf.

    Returns:
        (..., V) tensor.
    """
    device = x.device.type
    casts = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if casts else None
    if dtype is not None and x.dtype != torch.float64:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if not torch.is_grad_enabled():
        return _product(x, tiles, bias)
    windows, leaves = split_active(active, x.device)
    wanted = [window for window, leaf in zip(windows, leaves, strict=True) if leaf.requires_grad]
    shape_only = torch.empty((), dtype=x.dtype, device=x.device).expand(tiles.shape)
    whole, kept = kept_inputs(x, shape_only, wanted, False)
    options = tiles, windows, whole, bool(wanted), backward_name(active)
    return _TiledMatmul.apply(x, bias, options, *leaves, *([] if whole else kept))  # type: ignore[no-any-return, no-untyped-call]


class _TiledMatmul(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, options: Any, *tensors: Tensor) -> Tensor:
        ctx.tiles, ctx.windows, ctx.whole, wanted, ctx.name = options
        ctx.leaf_dtypes = [leaf.dtype for leaf in tensors[: len(ctx.windows)]]
        columns = tensors[len(ctx.windows) :]
        ctx.unused = (None,) * len(columns)
        ctx.input_shape, ctx.input_dtype = x.shape, x.dtype
        kept = (x,) if ctx.whole and wanted else columns
        ctx.save_for_backward(*kept)
        return _product(x, ctx.tiles, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        with tracing.span("backward %s", ctx.name):
            kept = ctx.saved_tensors
            dy = dy.reshape(-1, dy.shape[-1])
            dx = _input_gradient(dy, ctx.tiles).reshape(ctx.input_shape) if ctx.needs_input_grad[0] else None
            dbias = dy.sum(0) if ctx.needs_input_grad[1] else None
            inputs = iter(kept)
            grads: list[Tensor | None] = []
            for window, dtype, need in zip(
                ctx.windows, ctx.leaf_dtypes, ctx.needs_input_grad[3 : 3 + len(ctx.windows)], strict=True
            ):
                if not need:
                    grads.append(None)
                    continue
                x = kept[0] if ctx.whole else next(inputs)
                gradient = slice_gradient(dy, x, window, ctx.input_shape[-1], ctx.whole, False)
                grads.append(gradient.to(dtype))
            return (dx, dbias, None, *grads, *ctx.unused)


def _product(x: Tensor, tiles: Tiles, bias: Tensor | None) -> Tensor:
    y: Tensor | None = None
    with closing(tiles.walk()) as walk:
        for start, stop, tile in walk:
            part = None if bias is None else bias[start:stop]
            product = linear_output(x, tile.to(x.dtype), part, False)
            if tiles.count == 1:
                return product
            y = x.new_empty((*x.shape[:-1], tiles.shape[0])) if y is None else y
            y[..., start:stop] = product
    assert y is not None
    return y


def _input_gradient(dy: Tensor, tiles: Tiles) -> Tensor:
    exact = torch.float64 if dy.dtype == torch.float64 else torch.float32
    total: Tensor | None = None
    with closing(tiles.walk(backward=True)) as walk:
        for start, stop, tile in walk:
            product = dy[:, start:stop].mm(tile.to(dy.dtype))
            if tiles.count == 1:
                return product
            total = product.to(exact) if total is None else total.add_(product)
    assert total is not None
    return total.to(dy.dtype)
