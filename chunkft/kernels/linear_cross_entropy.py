"""Cross entropy of a linear head: losses and gradients without the logits ever existing as a whole.

Two orders of work. By tokens: all logits of some tokens, from which loss and gradients come at once: three products,
but the weight is read once for each group of tokens. By vocabulary: logits of all tokens for some rows of the weight,
first for the normaliser and again for the gradients: four products, but the weight is read three times in all. The
first is better where a group is large enough to be bound by arithmetic. The products are the BLAS's: these matrices
are large and aligned, where a kernel of ours would not be faster; what is saved is memory.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from chunkft.kernels.wgrad import wgrad

Window = tuple[int, int, int]  # dim, start, stop
# working memory is kept to this part of the logits
PART = 16
# fewer tokens than this in a group make its products wait for the weight on a GPU
TOKENS_MIN = 256


@dataclass(frozen=True)
class Loss:
    """What turns logits into a loss.

    Attributes:
        ignore_index: tokens with this target have no loss and no gradient.
        label_smoothing: part of the target that is spread over the vocabulary, 0 <= s <= 1 (Szegedy et al., arXiv
            1512.00567, section 7).
        softcap: logits are ``softcap * tanh(logits / softcap)``; None for plain logits.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} is not allowed; needs 0 <= s <= 1")
        if self.softcap is not None and not 0 < self.softcap < float("inf"):
            raise ValueError(f"softcap={self.softcap} is not allowed; needs a finite softcap > 0, or None")


class RowTiles(Protocol):
    """A weight whose rows are beside the computation a tile at a time only."""

    def walk(self) -> Generator[tuple[int, int, Tensor]]:
        """First row, end, and values of each tile, in order; a tile is there until the next one is asked for."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    windows: Sequence[Window] = (),
    *,
    loss: Loss | None = None,
    hidden_grad: bool = True,
    upstream: Tensor | None = None,
    by: str = "auto",
    chunk: int | None = None,
    tiles: RowTiles | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Losses of tokens under ``logits = X W^T``, the gradient of X and those of slices of W.

    With ``P = softmax(logits)`` and the smoothed target ``Q``: ``loss_t = -sum_v Q_tv log P_tv`` and
    ``G = upstream (P - Q)`` give ``dX = G W`` and ``dW[a:b] = G[:, a:b]^T X``. Neither the (T, V) logits nor a (V, H)
    gradient exist; softmax and sums are in fp32 (fp64 for fp64).

    Args:
        hidden: X, (T, H).
        weight: W, (V, H); same dtype and device.
        targets: (T,) int64 rows of W, or ``loss.ignore_index``.
        windows: ``(dim, start, stop)`` of the slices of W whose gradient is wanted; dim 0 are vocabulary rows, dim 1
            columns.
        loss: what kind of loss; by default plain cross entropy that ignores -100.
        hidden_grad: whether dX is wanted.
        upstream: (T,) gradient of each loss, in the dtype of the losses; ones by default.
        by: ``"tokens"``, ``"vocabulary"`` or ``"auto"``: by tokens on a CPU, and where groups of at least 256 tokens
            fit into the working memory.
        chunk: tokens, or vocabulary rows, that are worked on at a time; by default so many that working memory is
            a sixteenth of the logits.
        tiles: where the values of W come from; ``weight`` tells its shape only then. By vocabulary.

    Returns:
        Losses (T,), fp32 (fp64 for fp64), 0 for ignored tokens; dX (T, H) of ``hidden``'s dtype, or None; the
        gradients of the slices, fp32 (fp64 for fp64).

    Raises:
        ValueError: if shapes, dtypes or options do not fit.
        IndexError: if a target is neither a row of W nor ``ignore_index`` (on a CPU; a GPU asserts).
    """
    loss = Loss() if loss is None else loss
    if tiles is not None:
        if by == "tokens":
            raise ValueError(
                "by='tokens' needs all of the weight for each group of tokens, and tiles give parts of it"
            )
        by, weight = "vocabulary", hidden.new_empty(()).expand(weight.shape)
    _check(hidden, weight, targets, windows, upstream, loss.ignore_index, by, chunk)
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    if by == "auto":
        by = "vocabulary" if hidden.is_cuda and tokens // PART < TOKENS_MIN <= tokens else "tokens"
    if chunk is None:
        chunk = chunk_size(tokens if by == "tokens" else vocabulary, hidden.dtype, loss.softcap is not None)
    exact = _exact(hidden.dtype)
    task = _Task(
        hidden,
        weight,
        targets.clamp(0, vocabulary - 1),
        targets != loss.ignore_index,
        loss,
        None if upstream is None else upstream.to(exact),
        tuple(windows),
        tiles,
    )
    losses = torch.zeros(tokens, dtype=exact, device=hidden.device)
    dx = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if hidden_grad else None
    dw = [_zeros(window, weight, exact) for window in windows]
    if by == "tokens":
        for start in range(0, tokens, chunk):
            _some_tokens(task, slice(start, min(tokens, start + chunk)), losses, dx, dw)
        return losses, dx, dw
    return losses, _by_vocabulary(task, chunk, losses, dx, dw), dw


def chunk_size(size: int, dtype: torch.dtype, capped: bool) -> int:
    """Of ``size`` tokens or vocabulary rows, how many at a time: working memory is 1/16 of the logits, or of one."""
    exact = _exact(dtype)
    # the logits, exact ones where that is another dtype, and the derivative of the cap
    working = dtype.itemsize + (exact.itemsize if exact != dtype else 0) + (exact.itemsize if capped else 0)
    return max(1, size * dtype.itemsize // (PART * working))


@dataclass(frozen=True)
class _Task:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    valid: Tensor
    loss: Loss
    upstream: Tensor | None
    windows: tuple[Window, ...]
    tiles: RowTiles | None

    def parts(self, rows: int) -> Generator[tuple[slice, Tensor]]:
        """So many rows of the weight at a time."""
        if self.tiles is None:
            yield from self._parts_of(0, self.weight, rows)
            return
        for start, _, tile in self.tiles.walk():
            yield from self._parts_of(start, tile.to(self.hidden.dtype), rows)

    @staticmethod
    def _parts_of(first: int, weight: Tensor, rows: int) -> Generator[tuple[slice, Tensor]]:
        for start in range(0, weight.shape[0], rows):
            stop = min(weight.shape[0], start + rows)
            yield slice(first + start, first + stop), weight[start:stop]


def _some_tokens(task: _Task, part: slice, losses: Tensor, dx: Tensor | None, dw: list[Tensor]) -> None:
    hidden, targets, valid = task.hidden[part], task.targets[part, None], task.valid[part]
    plain, z, slope = _logits(hidden, task.weight, task.loss)
    top = z.amax(1, keepdim=True)
    chosen, mean = z.gather(1, targets), _mean(z, task.loss)
    total = z.sub_(top).exp_().sum(1, keepdim=True)
    losses[part] = _losses(total.log() + top, chosen, mean, task.loss).squeeze(1).masked_fill_(~valid, 0)
    if dx is None and not dw:
        return
    gradient = _logit_gradient(z.div_(total), targets, 0, slope, task, part)
    exact, gradient = gradient, plain if plain is gradient else plain.copy_(gradient)
    if dx is not None:
        torch.mm(gradient, task.weight, out=dx[part])
    for (dim, start, stop), out in zip(task.windows, dw, strict=True):
        bounds = slice(start, stop)
        _add_wgrad(exact, gradient, hidden, bounds if dim == 0 else None, bounds if dim == 1 else None, out)


def _by_vocabulary(
    task: _Task, chunk: int, losses: Tensor, dx: Tensor | None, dw: list[Tensor]
) -> Tensor | None:
    top = losses.new_full((len(losses), 1), float("-inf"))
    total, chosen, mean = (torch.zeros_like(top) for _ in range(3))
    with closing(task.parts(chunk)) as parts:
        for part, rows in parts:
            _add_normaliser(task, part, rows, top, total, chosen, mean)
    normaliser = total.log() + top
    losses.copy_(_losses(normaliser, chosen, mean, task.loss).squeeze(1).masked_fill_(~task.valid, 0))
    if dx is None and not dw:
        return None
    sums = None if dx is None else torch.zeros_like(dx, dtype=losses.dtype)
    with closing(task.parts(chunk)) as parts:
        for part, rows in parts:
            touched = [_overlap(window, part) for window in task.windows]
            if sums is not None or any(touched):
                _some_vocabulary(task, part, rows, touched, normaliser, sums, dw)
    return sums if dx is None or sums is None else dx.copy_(sums)


def _add_normaliser(
    task: _Task, part: slice, rows: Tensor, top: Tensor, total: Tensor, chosen: Tensor, mean: Tensor
) -> None:
    """One step of the softmax's normaliser (Milakov and Gimelshein, arXiv 1805.02867), in place."""
    _, z, _ = _logits(task.hidden, rows, task.loss)
    local, inside = _local_targets(task.targets, part)
    chosen += z.gather(1, local) * inside
    mean += _mean(z, task.loss) * ((part.stop - part.start) / task.weight.shape[0])
    higher = torch.maximum(top, z.amax(1, keepdim=True))
    total.mul_((top - higher).exp_()).add_(z.sub_(higher).exp_().sum(1, keepdim=True))
    top.copy_(higher)


def _some_vocabulary(
    task: _Task,
    part: slice,
    rows: Tensor,
    touched: Sequence[slice | None],
    normaliser: Tensor,
    sums: Tensor | None,
    dw: list[Tensor],
) -> None:
    """What the logits of some vocabulary rows add to the gradients; ``touched``: rows of each window among them."""
    plain, z, slope = _logits(task.hidden, rows, task.loss)
    local, inside = _local_targets(task.targets, part)
    gradient = _logit_gradient(z.sub_(normaliser).exp_(), local, inside, slope, task, slice(None))
    exact, gradient = gradient, plain if plain is gradient else plain.copy_(gradient)
    if sums is not None:
        sums += gradient.mm(rows)
    for (dim, start, stop), common, out in zip(task.windows, touched, dw, strict=True):
        if common is None:
            continue
        if dim == 1:
            _add_wgrad(exact, gradient, task.hidden, None, slice(start, stop), out[part])
        else:
            inner = slice(common.start - part.start, common.stop - part.start)
            _add_wgrad(
                exact, gradient, task.hidden, inner, None, out[common.start - start : common.stop - start]
            )


def _logits(hidden: Tensor, weight: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits as the product gives them, in fp32 (the same tensor where that is fp32), and the slope of the cap."""
    plain = hidden.mm(weight.t())
    z = plain.to(_exact(plain.dtype))
    if loss.softcap is None:
        return plain, z, None
    z.div_(loss.softcap).tanh_()
    slope = (z * z).neg_().add_(1)
    return plain, z.mul_(loss.softcap), slope


def _mean(z: Tensor, loss: Loss) -> Tensor | float:
    return z.mean(1, keepdim=True) if loss.label_smoothing else 0.0


def _losses(normaliser: Tensor, chosen: Tensor, mean: Tensor | float, loss: Loss) -> Tensor:
    smoothing = loss.label_smoothing
    return normaliser - (1 - smoothing) * chosen - smoothing * mean


def _logit_gradient(
    p: Tensor, targets: Tensor, inside: Tensor | int, slope: Tensor | None, task: _Task, part: slice
) -> Tensor:
    """``upstream (P - Q)``, in place of P; ``inside`` says which targets are among these columns (0: all)."""
    smoothing = task.loss.label_smoothing
    hit = torch.full_like(targets, -1, dtype=p.dtype).mul_(1 - smoothing)
    if isinstance(inside, Tensor):
        hit *= inside
    p.scatter_add_(1, targets, hit)
    if smoothing:
        p.sub_(smoothing / task.weight.shape[0])
    if slope is not None:
        p.mul_(slope)
    if task.upstream is not None:
        p.mul_(task.upstream[part, None])
    # a product with zero would keep NaN of tokens that are ignored
    return p.masked_fill_(~task.valid[part, None], 0)


def _local_targets(targets: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Targets as columns of a part of the vocabulary, and which of them are there."""
    inside = (targets >= part.start) & (targets < part.stop)
    return (targets - part.start).clamp(0, part.stop - part.start - 1)[:, None], inside[:, None]


def _overlap(window: Window, part: slice) -> slice | None:
    """Vocabulary rows of ``part`` that a window touches."""
    dim, start, stop = window
    low, high = (part.start, part.stop) if dim == 1 else (max(start, part.start), min(stop, part.stop))
    return slice(low, high) if low < high else None


def _add_wgrad(
    exact: Tensor, gradient: Tensor, hidden: Tensor, rows: slice | None, cols: slice | None, out: Tensor
) -> None:
    if not out.numel():
        return
    if hidden.device.type == "cpu":
        # the product would widen its operands to the accumulator's dtype: this one is there already
        gradient = exact
    gradient = gradient if rows is None else gradient[:, rows]
    hidden = hidden if cols is None else hidden[:, cols]
    wgrad(gradient, hidden.to(gradient.dtype), out=out, accumulate=True)


def _zeros(window: Window, weight: Tensor, dtype: torch.dtype) -> Tensor:
    shape = list(weight.shape)
    shape[window[0]] = window[2] - window[1]
    return torch.zeros(shape, dtype=dtype, device=weight.device)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    windows: Sequence[Window],
    upstream: Tensor | None,
    ignore_index: int,
    by: str,
    chunk: int | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not weight.shape[0]:
        raise ValueError(
            "hidden and weight must be (T, H) and (V, H) with the same H and V > 0, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"hidden and weight must share one floating dtype, got {hidden.dtype} and {weight.dtype}"
        )
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    if targets.shape != (tokens,) or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 of shape ({tokens},), got {targets.dtype} of {tuple(targets.shape)}"
        )
    if upstream is not None and upstream.shape != (tokens,):
        raise ValueError(f"upstream must be of shape ({tokens},), got {tuple(upstream.shape)}")
    for window in windows:
        dim, start, stop = window
        if dim not in (0, 1) or not 0 <= start <= stop <= weight.shape[dim]:
            raise ValueError(
                f"window {window} is not allowed; needs (dim, start, stop) with dim 0 or 1 and 0 <= start <= stop <= "
                f"{tuple(weight.shape)}[dim]"
            )
    if by not in ("auto", "tokens", "vocabulary"):
        raise ValueError(f"by={by!r} is not known; allowed are 'auto', 'tokens' and 'vocabulary'")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} is not allowed; needs chunk >= 1")
    # On a GPU the check would wait for the device.
    if targets.device.type == "cpu":
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))]
        if wrong.numel():
            raise IndexError(f"target {int(wrong[0])} is not allowed; needs 0 <= target < {vocabulary}")
