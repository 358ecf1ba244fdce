"""Weight gradient of a slice of a linear layer: ``dW[rows, cols] = dY[:, rows]^T X[:, cols]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chunkft.kernels.selection import Blocks, Selection, checked, gathered, selected_size

if TYPE_CHECKING:
    from chunkft.kernels.heuristics import Config

# A BLAS picks its micro-kernel by the shape of the product, so a few rows computed alone can differ in the
# last bit from the same rows of the whole product. Bounds that are rounded out to whole register blocks do
# not: measured on MKL over random shapes (tests/test_wgrad.py). 32 covers the block sizes of AVX2 and AVX-512.
BLAS_BLOCK = 32
# Products with fewer rows or columns than this are summed in an order that depends on the whole shape and the
# number of threads. They are so small that all of it is computed.
BLAS_SMALL = 16

BACKENDS = ("auto", "triton", "torch")


def wgrad(
    dy: Tensor,
    x: Tensor,
    rows: Selection = None,
    cols: Selection = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    *,
    tf32: bool = False,
    squared_norm: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Gradient of the selected rows and columns of a weight, without computing the others.

    Computes ``dY[:, rows]^T X[:, cols]``, the restriction of the dense weight gradient of
    ``Y = X W^T`` (ChunkFT, arXiv 2605.21177, section 3) to a slice. In fp32 on a CPU the result is
    bit for bit the same rows and columns of the dense product.

    Args:
        dy: (T, M) gradient of the output; any strides.
        x: (T, N) input; same dtype and device as ``dy``.
        rows: which of the M rows: a slice with step 1, a 1-D integer tensor, ``Blocks``, or None for all.
        cols: which of the N columns, in the same forms.
        out: (R, C) tensor that receives the result, any strides.
        accumulate: add to ``out`` instead of overwriting it; needs ``out``.
        out_dtype: dtype of a new result; the input's by default. Must agree with ``out`` where both are given.
        backend: ``"torch"``; ``"triton"`` (bf16, fp16 or fp32 on a CUDA device, last dimensions contiguous,
            accumulates in fp32); or ``"auto"``, which takes Triton where it is expected to be faster by a margin
            (docs/kernels.md) and PyTorch everywhere else.
        tf32: let the Triton kernel round fp32 inputs to 19 bits for the tensor cores; PyTorch has a switch of its own.
        squared_norm: fp32 tensor of one element on the same device; receives the sum of the squares of the
            result, as stored, without waiting for the device.
        config: tile of the Triton kernel instead of the picker's choice; with it, ``"auto"`` is not allowed.

    Returns:
        (R, C) tensor: ``out`` if given, otherwise a new one.

    Raises:
        ValueError: if shapes, dtypes, bounds or the backend do not fit.
        IndexError: if an index tensor on the CPU reaches outside of the weight. On a GPU, where looking would stop
            the host, PyTorch asserts on the device and Triton gives NaN.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; allowed are {', '.join(map(repr, BACKENDS))}")
    if config is not None and backend != "triton":
        raise ValueError(f"config is for backend='triton', got backend={backend!r}")
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
    if squared_norm is not None and (squared_norm.numel() != 1 or squared_norm.dtype != torch.float32):
        raise ValueError(
            f"squared_norm must be one float32, got {squared_norm.dtype} of shape {tuple(squared_norm.shape)}"
        )
    rows, cols = checked(rows, dy.shape[1], "rows"), checked(cols, x.shape[1], "cols")
    shape = (selected_size(rows, dy.shape[1]), selected_size(cols, x.shape[1]))
    if out is not None and out.shape != shape:
        raise ValueError(f"out must have shape {shape}, got {tuple(out.shape)}")
    wanted = out.dtype if out is not None else out_dtype or dy.dtype

    if backend == "triton" or (backend == "auto" and dy.is_cuda):
        from chunkft.kernels import triton_wgrad

        if backend == "auto":
            what = {"out_dtype": wanted, "accumulate": accumulate, "tf32": tf32}
            config = triton_wgrad.chosen(dy, x, rows, cols, **what)
        if backend == "triton" or config is not None:
            target = dy.new_empty(shape, dtype=wanted) if out is None else out
            triton_wgrad.launch(
                dy, x, rows, cols, target,
                accumulate=accumulate, tf32=tf32, squared_norm=squared_norm, config=config,
            )  # fmt: skip
            return target

    result = _result(dy, x, rows, cols, out, accumulate, wanted)
    if squared_norm is not None:
        squared_norm.copy_(result.float().square().sum().view(squared_norm.shape))
    return result


def _result(
    dy: Tensor,
    x: Tensor,
    rows: Selection,
    cols: Selection,
    out: Tensor | None,
    accumulate: bool,
    wanted: torch.dtype,
) -> Tensor:
    # the accumulator's digits would be lost in a 16-bit product
    wider = wanted if wanted.itemsize > dy.dtype.itemsize else None
    if wider is not None and not (dy.is_cuda and wider == torch.float32):
        dy, x, wider = dy.to(wider), x.to(wider), None
    result = _torch_wgrad(dy, x, rows, cols, wider)
    if out is None:
        return result.to(wanted)
    return out.add_(result) if accumulate else out.copy_(result)


def saved_columns(start: int, stop: int, size: int, outputs: int, reference: Tensor) -> tuple[int, int]:
    """Column window of an input that has to be kept for the gradient of columns ``[start, stop)`` of ``size``.

    Equal to ``(start, stop)`` except in fp32 on a CPU, where it is rounded out to whole blocks so that the
    gradient of the ``outputs`` x ``size`` weight keeps the bits of the dense one.
    """
    return _window(start, stop, size, outputs) if _needs_blocks(reference) else (start, stop)


def _torch_wgrad(
    dy: Tensor, x: Tensor, rows: Selection, cols: Selection, out_dtype: torch.dtype | None
) -> Tensor:
    outputs, inputs = dy.shape[1], x.shape[1]
    dy, row_crop = _narrow(dy, rows, inputs)
    x, col_crop = _narrow(x, cols, outputs)
    full = dy.t().mm(x) if out_dtype is None else torch.mm(dy.t(), x, out_dtype=out_dtype)
    if row_crop is None and col_crop is None:
        return full
    # A copy even of contiguous rows: a view would keep the whole block alive as a gradient.
    for dim, crop in enumerate((row_crop, col_crop)):
        full = full if crop is None else full.narrow(dim, crop.start, crop.stop - crop.start)
    return full.clone(memory_format=torch.contiguous_format)


def _narrow(matrix: Tensor, selection: Selection, other: int) -> tuple[Tensor, slice | None]:
    """Columns of ``matrix`` to multiply, and the part of the product that was asked for (None: all of it)."""
    if selection is None:
        return matrix, None
    if isinstance(selection, Tensor | Blocks):
        return gathered(matrix, selection), None
    low, high = start, stop = selection.start, selection.stop
    if _needs_blocks(matrix):
        low, high = _window(start, stop, matrix.shape[1], other)
    crop = None if (low, high) == (start, stop) else slice(start - low, stop - low)
    return matrix.narrow(1, low, high - low), crop  # indexing has no rule for batches of gradients


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
