"""PyTorch's form of ``wgrad``: one product, of views where the selection allows, into the result where it can.

A slice of dY or X is a strided view, which every BLAS takes as it is. A result that is given is written by the product
itself, also where it is added to: in 16 bits the sum is then rounded once, and with an fp32 result of 16-bit operands,
which torch has on CUDA only (``out_dtype``), there is no pass but that of the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from chunkft.kernels.selection import Selection, gathered

# A BLAS picks its micro-kernel by the shape of the product, so a few rows computed alone can differ in the
# last bit from the same rows of the whole product. Bounds that are rounded out to whole register blocks do
# not: measured on MKL over random shapes (tests/test_wgrad.py). 32 covers the block sizes of AVX2 and AVX-512.
BLAS_BLOCK = 32
# Products with fewer rows or columns than this are summed in an order that depends on the whole shape and the
# number of threads. They are so small that all of it is computed.
BLAS_SMALL = 16


def torch_wgrad(
    dy: Tensor,
    x: Tensor,
    rows: Selection,
    cols: Selection,
    out: Tensor | None,
    accumulate: bool,
    wanted: torch.dtype,
) -> Tensor:
    """``dY[:, rows]^T X[:, cols]`` of checked arguments, as ``wanted``: the dtype of ``out`` if that is given."""
    mixed = False
    if wanted != dy.dtype:
        # the accumulator's digits would be lost in a 16-bit product
        wider = wanted.itemsize > dy.dtype.itemsize
        mixed = wider and wanted == torch.float32 and multiplies_into_fp32(dy)
        if wider and not mixed:
            dy, x = dy.to(wanted), x.to(wanted)
    exact = needs_blocks(dy)
    outputs, inputs = dy.shape[1], x.shape[1]
    left, row_crop = _narrow(dy, rows, inputs, exact)
    right, col_crop = _narrow(x, cols, outputs, exact)
    left = left.t()
    cropped = row_crop is not None or col_crop is not None
    if out is not None and not cropped and writes_into(out, dy, x, accumulate, mixed):
        return product_into(out, left, right, accumulate, mixed)
    full = torch.mm(left, right, out_dtype=wanted) if mixed else left.mm(right)
    if cropped:
        # A copy even of contiguous rows: a view would keep the whole block alive as a gradient.
        for dim, crop in enumerate((row_crop, col_crop)):
            full = full if crop is None else full.narrow(dim, crop.start, crop.stop - crop.start)
        full = full.clone(memory_format=torch.contiguous_format)
    if out is None:
        return full if full.dtype == wanted else full.to(wanted)
    return out.add_(full) if accumulate else out.copy_(full)


def multiplies_into_fp32(operand: Tensor) -> bool:
    """Whether torch multiplies such operands into an fp32 result (``out_dtype``), which it does on CUDA in 16 bits."""
    return operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16)


def squared_norm_of(result: Tensor) -> Tensor:
    """Sum of the squares of a result, fp32, in one pass over it."""
    norm: Tensor = torch.linalg.vector_norm(result, dtype=torch.float32)
    return norm.square()


def saved_columns(start: int, stop: int, size: int, outputs: int, reference: Tensor) -> tuple[int, int]:
    """Column window of an input that has to be kept for the gradient of columns ``[start, stop)`` of ``size``.

    Equal to ``(start, stop)`` except in fp32 on a CPU, where it is rounded out to whole blocks so that the
    gradient of the ``outputs`` x ``size`` weight keeps the bits of the dense one.
    """
    return _window(start, stop, size, outputs) if needs_blocks(reference) else (start, stop)


def needs_blocks(matrix: Tensor) -> bool:
    """Whether slices get the bits of the dense product: in fp32 on a CPU."""
    return matrix.dtype == torch.float32 and matrix.device.type == "cpu"


def writes_into(out: Tensor, dy: Tensor, x: Tensor, accumulate: bool, mixed: bool) -> bool:
    """Whether the product itself may write ``out``: right dtype and device, no autograd, and on a CPU the same bits.

    In 32 and 64 bits on a CPU a sum in place could be rounded otherwise than product and sum, and so could a product
    whose result is transposed.
    """
    if (not mixed and out.dtype != dy.dtype) or out.device != dy.device:
        return False
    if torch.is_grad_enabled() and (dy.requires_grad or x.requires_grad or out.requires_grad):
        return False
    if dy.dtype.itemsize > 2 and not dy.is_cuda:
        return not accumulate and out.is_contiguous()
    (rows, cols), (row_stride, col_stride) = out.shape, out.stride()
    return (col_stride == 1 and row_stride >= cols) or (row_stride == 1 and col_stride >= rows)


def product_into(out: Tensor, left: Tensor, right: Tensor, accumulate: bool, mixed: bool) -> Tensor:
    """``out`` (or ``out +``) ``left right``, where ``writes_into`` allows it; ``mixed``: fp32 of 16-bit operands."""
    if mixed and accumulate:
        return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    if mixed:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return out.addmm_(left, right) if accumulate else torch.mm(left, right, out=out)


def _narrow(matrix: Tensor, selection: Selection, other: int, exact: bool) -> tuple[Tensor, slice | None]:
    """Columns of ``matrix`` to multiply, and the part of the product that was asked for (None: all of it)."""
    if selection is None:
        return matrix, None
    if not isinstance(selection, slice):
        return gathered(matrix, selection), None
    start, stop = selection.start, selection.stop
    if not exact:
        # indexing has no rule for batches of gradients
        return matrix.narrow(1, start, stop - start), None
    low, high = _window(start, stop, matrix.shape[1], other)
    crop = None if (low, high) == (start, stop) else slice(start - low, stop - low)
    return matrix.narrow(1, low, high - low), crop


def _window(start: int, stop: int, size: int, other: int) -> tuple[int, int]:
    if other < BLAS_SMALL:
        return 0, size
    low = start // BLAS_BLOCK * BLAS_BLOCK
    high = min(size, -(-stop // BLAS_BLOCK) * BLAS_BLOCK)
    if high - low < BLAS_BLOCK:
        low = max(0, low - BLAS_BLOCK)
    return low, high
