"""Which rows or columns of a weight are meant: a slice, single indices, or blocks of neighbours by index."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of neighbouring rows (or columns), block i being ``[i * size, (i + 1) * size)``.

    Blocks of 64 can be read as fast as a contiguous slice, blocks of 8 nearly so; single indices cannot, because
    neighbouring rows of a weight gradient are neighbouring elements in memory of dY.
    """

    index: Tensor
    """1-D int32 or int64 numbers of blocks, in the order of the result; may repeat."""
    size: int
    """Rows a block, at least 8, a divisor of the number of rows of the weight."""


Selection = slice | Tensor | Blocks | None


def checked(selection: Selection, size: int, name: str) -> Selection:
    """The selection with explicit bounds, after checking that it fits ``size`` rows or columns.

    Raises:
        ValueError: if its form or its bounds do not fit.
        IndexError: if an index, which can be seen without waiting for a device, lies outside.
    """
    if selection is None:
        return None
    # slices first: to ask whether something is a Tensor takes as long as all of this
    if isinstance(selection, slice):
        start, stop, step = selection.start, selection.stop, selection.step
        start, stop = 0 if start is None else start, size if stop is None else stop
        if (step is not None and step != 1) or not 0 <= start <= stop <= size:
            raise ValueError(
                f"{name}={selection} is not allowed; needs 0 <= start <= stop <= {size} and step 1"
            )
        if not are_numbers(selection):
            start, stop = int(start), int(stop)
        return slice(start, stop)
    if isinstance(selection, Blocks):
        if not isinstance(selection.size, int) or selection.size < 8 or size % selection.size:
            raise ValueError(
                f"{name} has blocks of size={selection.size}; needs at least 8 and a divisor of {size}"
            )
        _check_index(selection.index, size // selection.size, name)
        return selection
    _check_index(selection, size, name)
    return selection


def are_numbers(selection: Selection) -> bool:
    """Whether this is a slice of bounds that stay what they are, which tensors do not."""
    return isinstance(selection, slice) and not any(
        isinstance(bound, Tensor) for bound in (selection.start, selection.stop)
    )


def selected_size(selection: Selection, size: int) -> int:
    """How many of ``size`` rows or columns a checked selection has."""
    if selection is None:
        return size
    if isinstance(selection, slice):
        return int(selection.stop - selection.start)
    return selection.index.numel() * selection.size if isinstance(selection, Blocks) else selection.numel()


def gathered(matrix: Tensor, selection: Tensor | Blocks) -> Tensor:
    """Copy of the selected columns of a (T, M) matrix."""
    if isinstance(selection, Blocks):
        tokens, columns = matrix.shape
        parts = matrix.reshape(tokens, columns // selection.size, selection.size)
        return parts.index_select(1, selection.index).reshape(
            tokens, selection.index.numel() * selection.size
        )
    return matrix.index_select(1, selection)


def _check_index(index: Tensor, size: int, name: str) -> None:
    if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name} must be a 1-D int32 or int64 tensor, got {index.dtype} of shape {tuple(index.shape)}"
        )
    # On a GPU the check would wait for the device; index_select asserts there, the Triton kernel gives NaN.
    if index.device.type == "cpu" and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= size:
            raise IndexError(f"{name} has indices from {low} to {high}; needs 0 <= index < {size}")
