"""PyTorch's forms of ``grouped_wgrad``: a product a slice, or one product of all dY side by side for a shared X."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from chunkft.kernels.torch_wgrad import needs_blocks, torch_wgrad


def one_by_one(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    spans: Sequence[slice],
    cols: Sequence[slice],
    outs: Sequence[Tensor] | None,
    accumulate: bool,
    wanted: torch.dtype,
) -> list[Tensor]:
    """A product for each slice, of checked arguments."""
    return [
        torch_wgrad(dy, x, rows, window, None if outs is None else outs[i], accumulate, wanted)
        for i, (dy, x, rows, window) in enumerate(zip(dys, xs, spans, cols, strict=True))
    ]


def by_one_product(
    dys: Sequence[Tensor],
    x: Tensor,
    spans: Sequence[slice],
    cols: slice,
    outs: Sequence[Tensor] | None,
    accumulate: bool,
    wanted: torch.dtype,
) -> list[Tensor]:
    """One product of checked arguments: the slices of dY are copied side by side, X is read once.

    Results that nobody gave are views of one tensor. Those that are given are written by the product if they lie one
    after another in one storage, as rows of one tensor; else they are copied.
    """
    sizes = [span.stop - span.start for span in spans]
    joined = torch.cat(
        [dy.narrow(1, span.start, size) for dy, span, size in zip(dys, spans, sizes, strict=True)], 1
    )
    if outs is None:
        return _cut(torch_wgrad(joined, x, None, cols, None, False, wanted), sizes)
    whole = adjacent(outs)
    if whole is not None:
        torch_wgrad(joined, x, None, cols, whole, accumulate, wanted)
        return list(outs)
    # added in the precision of the sum, as a product into each would
    exact = torch.float32 if accumulate and wanted.itemsize < 4 else wanted
    parts = _cut(torch_wgrad(joined, x, None, cols, None, False, exact), sizes)
    for out, part in zip(outs, parts, strict=True):
        if accumulate:
            torch.add(out, part, out=out)
        else:
            out.copy_(part)
    return list(outs)


def adjacent(outs: Sequence[Tensor]) -> Tensor | None:
    """One tensor of the rows of all of these, if each begins in memory where the one before it ends."""
    first = outs[0]
    if torch.is_grad_enabled() and any(out.requires_grad for out in outs):
        return None
    rows, end = 0, first.storage_offset()
    for out in outs:
        if out.storage_offset() != end or not out.is_contiguous():
            return None
        if out.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        rows += out.shape[0]
        end += out.numel()
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1), first.storage_offset())


def can_join(dys: Sequence[Tensor], xs: Sequence[Tensor]) -> bool:
    """Whether one product can have the result of all: one X, and no bits of single products to keep (fp32 on a CPU)."""
    return len(dys) > 1 and shares_input(xs) and not needs_blocks(xs[0])


def shares_input(xs: Sequence[Tensor]) -> bool:
    """Whether all of these are the same matrix in memory."""
    first = xs[0]
    return all(
        x is first
        or (x.data_ptr() == first.data_ptr() and x.shape == first.shape and x.stride() == first.stride())
        for x in xs[1:]
    )


def _cut(tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    ends = itertools.accumulate(sizes)
    return [tensor.narrow(0, end - size, size) for end, size in zip(ends, sizes, strict=True)]
