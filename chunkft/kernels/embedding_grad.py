"""Weight gradient of a slice of an embedding table."""

from __future__ import annotations

import torch
from torch import Tensor

from chunkft.kernels import gpu


def embedding_grad(
    dy: Tensor,
    ids: Tensor,
    num_embeddings: int,
    rows: tuple[int, int] | None = None,
    cols: tuple[int, int] | None = None,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Gradient of vocabulary rows ``[a, b)``, or of columns ``[c, d)``, of an embedding table.

    ``dW[v] = sum over the positions t with ids[t] = v of dY[t]``, with the rows added in the order of t, as
    PyTorch's dense kernel does on a CPU, so that the result has the bits of the dense gradient there. On a GPU with
    Triton the tokens are sorted and each row is summed in fp32, sixteen tokens at a time: deterministic, and
    without a wait for the device.

    Args:
        dy: (..., H) gradient of the looked-up vectors.
        ids: (...) int32 or int64 token ids, of the shape of ``dy`` without its last dimension.
        num_embeddings: V, the number of rows of the whole table.
        rows: the vocabulary rows wanted; all by default.
        cols: the columns wanted; all by default.
        padding_idx: the row that receives no gradient (0 <= padding_idx < V), or None.
        scale_grad_by_freq: divide by the number of times that an id occurs in ``ids``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``. Auto is Triton on a GPU, except for fp64. The torch backend
            waits for the device where ``rows`` are not all.

    Returns:
        (b - a, d - c) tensor of ``dy``'s dtype.

    Raises:
        ValueError: if the shapes, the bounds or the backend do not fit.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend={backend!r} is not known; allowed are 'auto', 'triton' and 'torch'")
    if dy.shape[:-1] != ids.shape:
        raise ValueError(
            f"dy must be of shape ids.shape + (H,), got {tuple(dy.shape)} for ids {tuple(ids.shape)}"
        )
    start, stop = (0, num_embeddings) if rows is None else rows
    if not 0 <= start <= stop <= num_embeddings:
        raise ValueError(
            f"rows=({start}, {stop}) is not allowed; needs 0 <= start <= stop <= {num_embeddings}"
        )
    flat_dy = dy.reshape(ids.numel(), dy.shape[-1])
    flat_ids = ids.reshape(-1)
    if cols is not None:
        if not 0 <= cols[0] <= cols[1] <= dy.shape[-1]:
            raise ValueError(f"cols={cols} is not allowed; needs 0 <= start <= stop <= {dy.shape[-1]}")
        flat_dy = flat_dy[:, cols[0] : cols[1]]
    if _uses_triton(backend, dy):
        # Imported here: Triton is optional.
        from chunkft.kernels.gpu.embedding_grad import embedding_rows

        flat_dy = flat_dy if flat_dy.stride(1) == 1 else flat_dy.contiguous()
        return embedding_rows(flat_dy, flat_ids, start, stop, padding_idx, scale_grad_by_freq)
    if cols is not None:
        flat_dy = flat_dy.contiguous()
    if (start, stop) != (0, num_embeddings):
        inside = (flat_ids >= start) & (flat_ids < stop)
        flat_dy = flat_dy[inside]
        flat_ids = flat_ids[inside] - start
    padding = -1
    if padding_idx is not None and start <= padding_idx < stop:
        padding = padding_idx - start
    gradient: Tensor = torch.ops.aten.embedding_dense_backward(
        flat_dy, flat_ids, stop - start, padding, scale_grad_by_freq
    )
    return gradient


def _uses_triton(backend: str, dy: Tensor) -> bool:
    fits = dy.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if backend == "triton":
        gpu.require(dy)
        if not fits:
            raise ValueError(f"backend='triton' takes dy of 16 or 32 bits, got {dy.dtype}")
        return True
    return backend == "auto" and dy.is_cuda and fits and gpu.runs_on(dy)
