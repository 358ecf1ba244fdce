"""Weight gradient of a slice of a linear layer: ``dW[rows, cols] = dY[:, rows]^T X[:, cols]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from chunkft.kernels import choice
from chunkft.kernels.launches import Memo
from chunkft.kernels.selection import Selection, are_numbers, checked, selected_size
from chunkft.kernels.torch_wgrad import (
    multiplies_into_fp32,
    needs_blocks,
    product_into,
    squared_norm_of,
    torch_wgrad,
    writes_into,
)

if TYPE_CHECKING:
    from chunkft.kernels.heuristics import Config

BACKENDS = ("auto", "triton", "torch")
# Calls that were checked and are one product of rows and of a whole X, by all that was checked: start and number of
# rows, and whether the result is fp32 of 16-bit operands.
_plain: Memo[tuple[int, int, bool]] = Memo()


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
            accumulates in fp32); or ``"auto"``, which is PyTorch (cuBLAS on a GPU) except where Triton was measured
            to be faster, or saves work that PyTorch has beside its product (``chunkft.kernels.choice``).
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
    key = None
    if cols is None and squared_norm is None and type(rows) is slice and not is_compiling():
        given = None if out is None else (out.shape, out.stride(), out.dtype, out.device)
        key = (
            dy.shape, x.shape, dy.stride(), x.stride(), dy.dtype, x.dtype, dy.device, rows.start, rows.stop, rows.step,
            given, out_dtype, accumulate, backend, tf32, config,
        )  # fmt: skip
        try:
            known = _plain.get(key)
        except TypeError:  # sizes that are symbols have no hash: somebody traces
            key = known = None
        if known is not None:
            start, size, mixed = known
            left = dy.narrow(1, start, size).t()
            if out is None:
                product = left.mm(x)
                # of another dtype where autocast is on
                return product if product.dtype == dy.dtype else product.to(dy.dtype)
            if not is_grad_enabled():
                return product_into(out, left, x, accumulate, mixed)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; allowed are {', '.join(map(repr, BACKENDS))}")
    if config is not None and backend != "triton":
        raise ValueError(f"config is for backend='triton', got backend={backend!r}")
    dy_shape, x_shape, dtype = dy.shape, x.shape, dy.dtype
    if len(dy_shape) != 2 or len(x_shape) != 2 or dy_shape[0] != x_shape[0]:
        raise ValueError(
            f"dy and x must be (T, M) and (T, N) with the same T, got {tuple(dy_shape)} and {tuple(x_shape)}"
        )
    if dtype != x.dtype or not dtype.is_floating_point:
        raise ValueError(f"dy and x must share one floating dtype, got {dtype} and {x.dtype}")
    if key is not None and not are_numbers(rows):
        key = None
    rows, cols = checked(rows, dy_shape[1], "rows"), checked(cols, x_shape[1], "cols")
    shape = (selected_size(rows, dy_shape[1]), selected_size(cols, x_shape[1]))
    if out is None:
        if accumulate:
            raise ValueError("accumulate=True needs out=, the tensor to add to")
        wanted = out_dtype or dtype
    else:
        wanted = out.dtype
        if out_dtype is not None and wanted != out_dtype:
            raise ValueError(f"out_dtype={out_dtype} disagrees with out.dtype={wanted}; give one of them")
        if out.shape != shape:
            raise ValueError(f"out must have shape {shape}, got {tuple(out.shape)}")
    if squared_norm is not None and (squared_norm.numel() != 1 or squared_norm.dtype != torch.float32):
        raise ValueError(
            f"squared_norm must be one float32, got {squared_norm.dtype} of shape {tuple(squared_norm.shape)}"
        )

    settled = True
    if backend == "triton" or (backend == "auto" and choice.asks(dy)):
        # Imported here: Triton is optional.
        from chunkft.kernels import triton_wgrad

        if backend == "auto":
            config, settled = triton_wgrad.chosen(
                dy, x, rows, cols,
                out_dtype=wanted, accumulate=accumulate, tf32=tf32, norm=squared_norm is not None,
            )  # fmt: skip
        if backend == "triton" or config is not None:
            target = dy.new_empty(shape, dtype=wanted) if out is None else out
            triton_wgrad.launch(
                dy, x, rows, cols, target,
                accumulate=accumulate, tf32=tf32, squared_norm=squared_norm, config=config,
            )  # fmt: skip
            return target

    if key is not None and settled and isinstance(rows, slice) and not needs_blocks(dy):
        mixed = wanted == torch.float32 and multiplies_into_fp32(dy)
        if (out is None and wanted == dtype) or (
            out is not None and writes_into(out, dy, x, accumulate, mixed)
        ):
            _plain.keep(key, (rows.start, shape[0], mixed))
    result = torch_wgrad(dy, x, rows, cols, out, accumulate, wanted)
    if squared_norm is not None:
        squared_norm.copy_(squared_norm_of(result).view(squared_norm.shape))
    return result
