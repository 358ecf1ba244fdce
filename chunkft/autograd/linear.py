"""Linear layers whose weight gradient is computed for active slices only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from chunkft import tracing
from chunkft.autograd.slices import Slice, traced_name
from chunkft.autograd.stand_ins import is_hollow, stand_in_of
from chunkft.kernels.torch_wgrad import needs_blocks, saved_columns
from chunkft.kernels.wgrad import wgrad

Active = Sequence[tuple[Slice, Tensor]]
Window = tuple[int, int, int]  # dim, start, stop


def sliced_linear(x: Tensor, weight: Tensor, bias: Tensor | None, active: Active) -> Tensor:
    """``x W^T + b`` whose backward yields the gradient of the active slices of W, and of no other part of it.

    ChunkFT, arXiv 2605.21177, section 3. The forward result is that of ``torch.nn.functional.linear``. The
    input is kept for the backward pass only if there is an active slice; for column slices only their columns
    are kept.

    Args:
        x: (..., N) input of any rank.
        weight: (M, N); gets no gradient itself.
        bias: (M,) or None; gets its gradient if it requires one.
        active: pairs of a slice (dim 0 or 1) and a leaf tensor of its shape that shares memory with ``weight``.

    Returns:
        (..., M) tensor.
    """
    if not active or not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return _sliced_matmul(x, weight, bias, False, active)


def sliced_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, active: Active) -> Tensor:
    """``x W + b`` (GPT-2's Conv1D: the weight is stored input-major) with gradients of active slices only.

    Args:
        x: (..., M) input of any rank.
        weight: (M, N); gets no gradient itself. Its rows are input features, its columns output features.
        bias: (N,) or None.
        active: as for ``sliced_linear``.

    Returns:
        (..., N) tensor.
    """
    if active and torch.is_grad_enabled():
        return _sliced_matmul(x, weight, bias, True, active)
    return _conv1d(x, weight, bias)


def _sliced_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, input_major: bool, active: Active
) -> Tensor:
    parameter = weight
    x, weight, bias = autocast_inputs(x, Tensor.detach(weight), bias)  # not that of a class of its own
    windows, leaves = split_active(active, x.device)
    return _apply(x, weight, bias, parameter, input_major, windows, leaves, backward_name(active))


def _apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parameter: Tensor,
    input_major: bool,
    windows: tuple[Window, ...],
    leaves: Sequence[Tensor],
    name: str,
) -> Tensor:
    wanted = [window for window, leaf in zip(windows, leaves, strict=True) if leaf.requires_grad]
    # Here, and not inside of the function, so that second derivatives find their way from the columns to x.
    whole, kept = kept_inputs(x, weight, wanted, input_major)
    columns = [] if whole else kept
    options = input_major, windows, whole, name
    return _SlicedMatmul.apply(x, weight, bias, parameter, options, *leaves, *columns)  # type: ignore[no-any-return, no-untyped-call]


class _SlicedMatmul(Function):
    """Shared by both weight layouts; ``input_major`` says that weight rows are input features.

    After the leaves come the columns of the input that were kept, unless all of it is (``whole``). ``parameter`` is the
    weight as autograd knows it. It gets a gradient only where somebody asks for it by name (``wants_weight``): that of
    the slices, zero elsewhere.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parameter: Tensor,
        options: tuple[bool, tuple[Window, ...], bool, str],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.input_major, ctx.windows, ctx.whole, ctx.name = options
        ctx.leaves = leaves = tensors[: len(ctx.windows)]
        columns = tensors[len(leaves) :]
        ctx.input_shape = x.shape
        ctx.column_major = _is_column_major(x)
        ctx.unused = (None,) * len(columns)
        ctx.parameter = parameter
        ctx.parameter_edge = 2 if bias is None else 3  # among the inputs that are tensors
        kept = (x,) if ctx.whole else columns
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *kept)
        return own_tensor(linear_output(x, weight, bias, ctx.input_major))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        with tracing.span("backward %s", ctx.name):
            return _SlicedMatmul._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, *kept = ctx.saved_tensors
        twice = differentiated_again()
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            matrix = weight.t() if ctx.input_major else weight
            if twice:
                # dX = dY W is a product of the other layout, with the same slices
                dx = _apply(dy, weight, None, ctx.parameter, not ctx.input_major, ctx.windows, ctx.leaves, "")
            elif ctx.column_major:
                # PyTorch keeps the gradient of a transposed input transposed; so do we, for the sake of its bits.
                dx = matrix.t().mm(dy.t()).t()
            else:
                dx = dy.mm(matrix)
            dx = dx.reshape(ctx.input_shape)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        needed = ctx.needs_input_grad[5 : 5 + len(ctx.leaves)]
        windows = [window for window, need in zip(ctx.windows, needed, strict=True) if need]
        layout = ctx.input_shape[-1], ctx.whole, ctx.input_major
        # Those of hollow leaves leave together; others may be freed one by one, and must not share memory.
        together = all(is_hollow(leaf) for leaf in ctx.leaves)
        backend = "torch" if twice else "auto"
        computed = iter(slice_gradients(dy, kept, windows, *layout, backend, together))
        grads = [
            next(computed).to(leaf.dtype) if need else None
            for leaf, need in zip(ctx.leaves, needed, strict=True)
        ]
        asked = None
        if ctx.needs_input_grad[3] and wants_weight(ctx, ctx.parameter_edge, len(ctx.leaves)):
            asked = placed(grads, ctx.windows, ctx.parameter.shape)
        return (dx, None, dbias, asked, None, *grads, *ctx.unused)


def wants_weight(ctx: Any, parameter: int, leaves: int) -> bool:
    """Whether this backward pass was asked for the gradient of the weight, and not for those of its slices.

    That is so in ``backward(inputs=[weight])``, and may be so in ``autograd.grad``, where it is not told.

    Args:
        ctx: of the function whose backward pass runs.
        parameter: number of the weight among its inputs that are tensors; after it come the leaves.
        leaves: how many there are.
    """
    if torch.compiler.is_compiling():
        return False  # the backward pass is recorded before it is asked for anything; Dynamo of 2.11 has no edges
    edges = ctx.next_functions
    will_execute = torch._C._will_engine_execute_node
    try:
        for leaf, _ in edges[parameter + 1 : parameter + 1 + leaves]:
            if leaf is not None and will_execute(leaf):
                return False
        return bool(will_execute(edges[parameter][0]))
    except RuntimeError:  # what it says of a leaf in autograd.grad()
        return True


def placed(
    gradients: Sequence[Tensor | None], windows: Sequence[Window], shape: tuple[int, ...]
) -> Tensor | None:
    """Gradients of windows of a weight where they belong in it, zeros elsewhere; None if there are none."""
    whole: Tensor | None = None
    for gradient, (dim, start, stop) in zip(gradients, windows, strict=True):
        if gradient is not None:
            whole = gradient.new_zeros(shape) if whole is None else whole
            whole.narrow(dim, start, stop - start).copy_(gradient)
    return whole


def differentiated_again() -> bool:
    """Whether the backward pass that runs is recorded (``create_graph=True``), so that it needs derivatives too."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def own_tensor(result: Tensor) -> Tensor:
    """The same memory as a tensor that is no view, which a function has to return if it may be changed in place."""
    if torch.compiler.is_compiling():
        own: Tensor = torch.ops.aten._unsafe_view(result, result.shape)
        return own
    return result.data if result._is_view() else result  # the cheapest tensor that is no view


def kept_spans(
    x: Tensor, width: int, weight: Tensor, windows: Sequence[Window], input_major: bool
) -> list[tuple[int, int]] | None:
    """Columns of an input of ``width`` that each window needs; None: all of them. Of ``x`` dtype and device count."""
    input_dim = 0 if input_major else 1
    if any(dim != input_dim for dim, _, _ in windows):
        return None
    outputs = weight.shape[1 - input_dim]
    return [saved_columns(start, stop, width, outputs, x) for _, start, stop in windows]


def kept_inputs(
    x: Tensor, weight: Tensor, windows: Sequence[Window], input_major: bool
) -> tuple[bool, list[Tensor]]:
    """What the backward pass needs of the input: all of it (True), or its columns for each window, as copies."""
    spans = kept_spans(x, x.shape[-1], weight, windows, input_major)
    if spans is None:
        return True, [x]
    # A copy: a view would keep all columns alive.
    return False, [x if span == (0, x.shape[-1]) else x[..., slice(*span)].clone() for span in spans]


def slice_gradient(
    dy: Tensor, x: Tensor, window: Window, width: int, whole: bool, input_major: bool, backend: str = "auto"
) -> Tensor:
    """Gradient of one slice from dY as a matrix and what ``kept_inputs`` kept of an input of ``width`` columns."""
    dim, start, stop = window
    x = x.reshape(-1, x.shape[-1])
    if not whole:
        # Only a window of columns was kept: bounds move to its own coordinates.
        low, _ = saved_columns(start, stop, width, dy.shape[-1], x)
        if x.shape[-1] == width:
            low = 0
        start, stop = start - low, stop - low
    bounds = slice(start, stop)
    left, right = (x, dy) if input_major else (dy, x)
    if dim == 0:
        return wgrad(left, right, rows=bounds, backend=backend)
    return wgrad(left, right, cols=bounds, backend=backend)


def slice_gradients(
    dy: Tensor,
    kept: Sequence[Tensor],
    windows: Sequence[Window],
    width: int,
    whole: bool,
    input_major: bool,
    backend: str = "auto",
    together: bool = True,
) -> list[Tensor]:
    """The gradients of several slices of a weight: one product for windows of rows, of which each gets its rows.

    Args:
        dy: gradient of the output as a matrix.
        kept: what ``kept_inputs`` kept for these windows.
        windows: of the slices.
        width: columns of the input.
        whole: whether all of the input was kept.
        input_major: the layout of the weight.
        backend: of ``wgrad``.
        together: whether gradients of windows of rows may share memory; a product for each otherwise.

    Returns:
        A gradient for each window. Those of rows are contiguous, and may share memory with those of others. In fp32
        on a CPU they have the bits of the dense one, which takes a product for each gap between windows.
    """
    apart = not together or len(windows) < 2 or any(dim != 0 for dim, _, _ in windows)
    exact = needs_blocks(dy)
    if apart or (exact and not whole):
        inputs = [kept[0]] * len(windows) if whole else kept
        pairs = zip(inputs, windows, strict=True)
        return [slice_gradient(dy, x, window, width, whole, input_major, backend) for x, window in pairs]
    runs = _runs(windows)
    if exact or len(runs) == 1 == len(kept):
        products = [slice_gradient(dy, kept[0], run, width, whole, input_major, backend) for run in runs]
    else:
        parts = [part.reshape(-1, part.shape[-1]) for part in kept]
        if whole:
            cut = parts[0] if input_major else dy
            parts = [cut.narrow(1, start, stop - start) for _, start, stop in runs]
        rows = torch.cat(parts, 1)
        right = dy if input_major else kept[0].reshape(-1, width)
        products = [wgrad(rows, right, rows=slice(0, rows.shape[1]), backend=backend)]
    gradients, left, row = [], iter(products), 0
    product = next(left)
    for _, start, stop in windows:
        if row == product.shape[0]:
            product, row = next(left), 0
        size = stop - start
        gradients.append(product if size == product.shape[0] else product.narrow(0, row, size))
        row += size
    return gradients


def _runs(windows: Sequence[Window]) -> list[Window]:
    """Windows of rows in their order, those that adjoin the one before joined with it."""
    runs: list[Window] = []
    for dim, start, stop in windows:
        if runs and runs[-1][2] == start:
            runs[-1] = dim, runs[-1][1], stop
        else:
            runs.append((dim, start, stop))
    return runs


def linear_output(x: Tensor, weight: Tensor, bias: Tensor | None, input_major: bool) -> Tensor:
    """``x W^T + b``, or ``x W + b``, with the bits that it has where the weight requires grad."""
    return _conv1d(x, weight, bias) if input_major else _linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` with the order of summation that it has when the weight requires grad."""
    if x.dim() < 3 or x.is_contiguous():
        return F.linear(x, weight, bias)
    y = F.linear(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y.add_(bias)


def _is_column_major(x: Tensor) -> bool:
    """Whether the input, seen as a matrix, is a transposed one; looks at strides only."""
    try:
        flat = x.unsqueeze(0) if x.dim() == 1 else x.view(-1, x.shape[-1])
    except RuntimeError:
        return False  # as a matrix it is a copy, which is row-major
    return flat.stride() == (1, flat.shape[0])


def _conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    y = flat.mm(weight) if bias is None else torch.addmm(bias, flat, weight)
    return y.view(*x.shape[:-1], weight.shape[1])


def backward_name(active: Active) -> str:
    """What the backward pass of these slices is called in a timeline; empty while nobody looks."""
    if not tracing.is_enabled() or torch.compiler.is_compiling():
        return ""
    return traced_name(piece for piece, _ in active)


def split_active(active: Active, device: torch.device) -> tuple[tuple[Window, ...], list[Tensor]]:
    """Windows of the active slices, and what stands for their leaves in a graph on ``device``."""
    windows = []
    for piece, _ in active:
        if piece.dim not in (0, 1):
            raise ValueError(f"active slice {piece} has dim={piece.dim}; a linear weight takes 0 or 1")
        windows.append((piece.dim, piece.start, piece.stop))
    return tuple(windows), [stand_in_of(leaf, device) for _, leaf in active]


def autocast_inputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts that autocast would do inside of ``linear``, done where autograd can see them."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or torch.float64 in (x.dtype, weight.dtype):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
