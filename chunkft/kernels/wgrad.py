"""Weight gradient of a slice of a linear layer: ``dW[rows, cols] = dY[:, rows]^T X[:, cols]``."""

from __future__ import annotations

import torch
from torch import Tensor

# A BLAS picks its micro-kernel by the shape of the product, so a few rows computed alone can differ in the
# last bit from the same rows of the whole product. Bounds that are rounded out to whole register blocks do
# not: measured on MKL over random shapes (tests/test_wgrad.py). 32 covers the block sizes of AVX2 and AVX-512.
BLAS_BLOCK = 32
# Products with fewer rows or columns than this are summed in an order that depends on the whole shape and the
# number of threads. They are so small that all of it is computed.
BLAS_SMALL = 16

Selection = slice | Tensor | None


def wgrad(
    dy: Tensor,
    x: Tensor,
    rows: Selection = None,
    cols: Selection = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Gradient of the selected rows and columns of a weight, without computing the others.

    Computes ``dY[:, rows]^T X[:, cols]``, the restriction of the dense weight gradient of
    ``Y = X W^T`` (ChunkFT, arXiv 2605.21177, section 3) to a slice. In fp32 on a CPU the result is
    bit for bit the same rows and columns of the dense product.

    Args:
        dy: (T, M) gradient of the output; any strides.
        x: (T, N) input; same dtype and device as ``dy``.
        rows: which of the M rows: a slice with step 1, a 1-D integer tensor, or None for all.
        cols: which of the N columns, in the same forms.
        out: (R, C) tensor that receives the result, any strides.
        accumulate: add to ``out`` instead of overwriting it; needs ``out``.
        out_dtype: dtype of a new result; the input's by default. Must agree with ``out`` where both are given.
        backend: ``"auto"`` or ``"torch"``.

    Returns:
        (R, C) tensor: ``out`` if given, otherwise a new one.

    Raises:
        ValueError: if shapes, dtypes, bounds or the backend do not fit.
        IndexError: if an index tensor reaches outside of the weight.
    """
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend={backend!r} is not known; allowed are 'auto' and 'torch'")
    if dy.dim() != 2 or x.dim() != 2 or dy.shape[0] != x.shape[0]:
        raise ValueError(
            f"dy and x must be (T, M) and (T, N) with the same T, got {tuple(dy.shape)} and {tuple(x.shape)}"
        )
    if dy.dtype != x.dtype or not dy.is_floating_point():
        raise ValueError(f"dy and x must share one floating dtype, got {dy.dtype} and {x.dtype}")
    if accumulate and out is None:
        raise ValueError("accumulate=True needs out=, the tensor to add to")
    if out is not None and out_dtype is not None and out.dtype != out_dtype:
        raise ValueError(f"out_dtype={out_dtype} disagrees with out.dtype={out.dtype}; give one of them")
    wanted = out_dtype if out is None else out.dtype
    if wanted is not None and wanted.itemsize > dy.dtype.itemsize:
        dy, x = dy.to(wanted), x.to(wanted)  # the accumulator's digits would be lost in a 16-bit product
    result = _torch_wgrad(dy, x, _checked(rows, dy.shape[1], "rows"), _checked(cols, x.shape[1], "cols"))
    if out is None:
        return result if out_dtype is None else result.to(out_dtype)
    if out.shape != result.shape:
        raise ValueError(f"out must have shape {tuple(result.shape)}, got {tuple(out.shape)}")
    return out.add_(result) if accumulate else out.copy_(result)


def saved_columns(start: int, stop: int, size: int, outputs: int, reference: Tensor) -> tuple[int, int]:
    """Column window of an input that has to be kept for the gradient of columns ``[start, stop)`` of ``size``.

    Equal to ``(start, stop)`` except in fp32 on a CPU, where it is rounded out to whole blocks so that the
    gradient of the ``outputs`` x ``size`` weight keeps the bits of the dense one.
    """
    return _window(start, stop, size, outputs) if _needs_blocks(reference) else (start, stop)


def _torch_wgrad(dy: Tensor, x: Tensor, rows: Selection, cols: Selection) -> Tensor:
    outputs, inputs = dy.shape[1], x.shape[1]
    dy, row_crop = _narrow(dy, rows, inputs)
    x, col_crop = _narrow(x, cols, outputs)
    full = dy.t().mm(x)
    if row_crop is None and col_crop is None:
        return full
    # A copy even of contiguous rows: a view would keep the whole block alive as a gradient.
    return full[row_crop or slice(None), col_crop or slice(None)].clone(memory_format=torch.contiguous_format)


def _narrow(matrix: Tensor, selection: Selection, other: int) -> tuple[Tensor, slice | None]:
    """Columns of ``matrix`` to multiply, and the part of the product that was asked for (None: all of it)."""
    if selection is None:
        return matrix, None
    if isinstance(selection, Tensor):
        return matrix.index_select(1, selection), None
    if not _needs_blocks(matrix):
        return matrix[:, selection], None
    low, high = _window(selection.start, selection.stop, matrix.shape[1], other)
    if (low, high) == (selection.start, selection.stop):
        return matrix[:, selection], None
    return matrix[:, low:high], slice(selection.start - low, selection.stop - low)


def _needs_blocks(matrix: Tensor) -> bool:
    return matrix.device.type == "cpu" and matrix.dtype == torch.float32


def _window(start: int, stop: int, size: int, other: int) -> tuple[int, int]:
    if other < BLAS_SMALL:
        return 0, size
    low = start // BLAS_BLOCK * BLAS_BLOCK
    high = min(size, -(-stop // BLAS_BLOCK) * BLAS_BLOCK)
    if high - low < BLAS_BLOCK:
        low = max(0, low - BLAS_BLOCK)
    return low, high


def _checked(selection: Selection, size: int, name: str) -> Selection:
    if selection is None:
        return None
    if isinstance(selection, Tensor):
        if selection.dim() != 1 or selection.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{name} must be a 1-D int32 or int64 tensor, got {selection.dtype} of shape {tuple(selection.shape)}"
            )
        # On a GPU the check would wait for the device; index_select asserts there.
        if selection.device.type == "cpu" and selection.numel():
            low, high = int(selection.min()), int(selection.max())
            if low < 0 or high >= size:
                raise IndexError(f"{name} has indices from {low} to {high}; needs 0 <= index < {size}")
        return selection
    start = 0 if selection.start is None else selection.start
    stop = size if selection.stop is None else selection.stop
    if selection.step not in (None, 1) or not 0 <= start <= stop <= size:
        raise ValueError(f"{name}={selection} is not allowed; needs 0 <= start <= stop <= {size} and step 1")
    return slice(start, stop)
