"""``weight.grad`` is read and changed as the dense gradient that is zero outside of the active slices."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import chunkft
from chunkft.autograd import GradientView

X = torch.randn(6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = (torch.arange(5)[:, None] % 2).double()
NOISE = torch.randn(5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def build(slice_dim: int = 0) -> tuple[chunkft.ChunkOptimizer, Tensor, Tensor]:
    """An optimizer with two active slices of a weight, that weight's .grad, and the dense gradient cut to them."""
    torch.manual_seed(0)
    model = nn.Linear(7, 5, bias=False).double()
    specs = chunkft.plan.parameter_specs(model)
    spans = ((0, 2), (3, 4)) if slice_dim == 0 else ((1, 3), (5, 6))
    rest = ((2, 3), (4, 5)) if slice_dim == 0 else ((0, 1), (3, 5), (6, 7))
    chunks = tuple(
        chunkft.plan.Chunk(n, tuple(specs[0].slice(slice_dim, *span) for span in part))
        for n, part in enumerate((spans, rest))
    )
    optimizer = chunkft.ChunkOptimizer(
        model, torch.optim.SGD, lr=0.1, chunks=None, partition=chunkft.ChunkPlan(chunks, (), "user")
    )
    model(X).square().mean().backward()
    dense = copy.deepcopy(nn.Linear(7, 5, bias=False).double())
    dense.weight.data = model.weight.detach().clone()
    dense(X).square().mean().backward()
    expected = torch.zeros_like(dense.weight)
    for piece, _ in optimizer.active_parameters():
        piece.of(expected).copy_(piece.of(dense.weight.grad))
    grad = model.weight.grad
    assert isinstance(grad, GradientView)
    optimizer.model = model  # keeps it alive
    return optimizer, grad, expected.detach()


def of_slices(optimizer: chunkft.ChunkOptimizer, like: Tensor) -> Tensor:
    result = torch.zeros_like(like)
    for piece, leaf in optimizer.active_parameters():
        piece.of(result).copy_(leaf.grad)
    return result


def restricted(optimizer: chunkft.ChunkOptimizer, tensor: Tensor) -> Tensor:
    result = torch.zeros_like(tensor)
    for piece, _ in optimizer.active_parameters():
        piece.of(result).copy_(piece.of(tensor))
    return result


READS = {
    "isnan": lambda g: torch.isnan(g).any(),
    "isfinite": lambda g: torch.isfinite(g).all(),
    "abs max": lambda g: g.abs().max(),
    "square sum": lambda g: (g**2).sum(),
    "clone": lambda g: g.clone(),
    "to cpu": lambda g: torch.from_numpy(g.detach().cpu().numpy().copy()),
    "histogram": lambda g: torch.histc(g, bins=7),
    "row norms": lambda g: g.norm(dim=1),
    "max norm": lambda g: g.norm(float("inf")),
    "mean": lambda g: g.mean(dim=0, keepdim=True),
    "float": lambda g: g.float(),
    "to half": lambda g: g.to(torch.bfloat16),
    "row": lambda g: g[3] + 0,
    "element": lambda g: torch.tensor(g[0, 1].item()),
    "matrix product": lambda g: g @ NOISE.t(),
    "second argument": lambda g: NOISE - g,
    "stack": lambda g: torch.stack([g, NOISE, g]),
    "where": lambda g: torch.where(g > 0, g, NOISE),
    "transposed": lambda g: g.t().contiguous(),
    "flat": lambda g: g.view(-1).sort().values,
    "split": lambda g: torch.cat([part * 2 for part in g.split(2)]),
    "cosine": lambda g: nn.functional.cosine_similarity(g.flatten(), NOISE.flatten(), dim=0),
    "list": lambda g: torch.tensor(g.tolist()),
    "deepcopy": lambda g: copy.deepcopy(g),
    "pickle": lambda g: pickle.loads(pickle.dumps(g)),
    "saved": lambda g: _saved(g),
    "unique": lambda g: g.unique(),
    "svd": lambda g: torch.linalg.svdvals(g),
    "copied from": lambda g: torch.zeros(5, 7, dtype=torch.float64).copy_(g),
    "added to": lambda g: NOISE.clone().add_(g, alpha=3),
}


def _saved(tensor: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("slice_dim", [0, 1])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_gives_what_the_dense_gradient_gives(read: Callable[[Tensor], Tensor], slice_dim: int) -> None:
    optimizer, grad, expected = build(slice_dim)
    result = read(grad)
    assert not isinstance(result, GradientView)
    torch.testing.assert_close(result, read(expected), rtol=1e-9, atol=1e-12)
    before = of_slices(optimizer, expected)
    if result.dim() and result.is_floating_point():
        result.zero_()  # a copy: the gradients do not follow
    assert torch.equal(of_slices(optimizer, expected), before)


def assigned(g: Tensor) -> None:
    g[:2] = 0.5


def halves(g: Tensor) -> None:
    first, second = g.split([3, 2])
    first.mul_(2)
    second[:, 1:3].zero_()


CHANGES = {
    "mul number": lambda g: g.mul_(0.5),
    "mul mask": lambda g: g.mul_(MASK),
    "mul tensor": lambda g: g.mul_(torch.tensor(3.0)),
    "times": lambda g: g.__imul__(0.25),
    "div rounding": lambda g: g.div_(0.3, rounding_mode="floor"),
    "add alpha": lambda g: g.add_(NOISE, alpha=-2),
    "add": lambda g: g.add_(NOISE),
    "add number": lambda g: g.add_(1.5),
    "add row": lambda g: g.add_(NOISE[0]),
    "sub alpha": lambda g: g.sub_(NOISE, alpha=0.5),
    "addcmul": lambda g: g.addcmul_(NOISE, NOISE, value=0.1),
    "lerp": lambda g: g.lerp_(NOISE, 0.3),
    "copy": lambda g: g.copy_(NOISE),
    "masked fill": lambda g: g.masked_fill_(MASK.bool(), 7.0),
    "clamp": lambda g: g.clamp_(-0.01, 0.01),
    "clamp keywords": lambda g: g.clamp_(max=0.01),
    "clamp tensor": lambda g: g.clamp_(min=NOISE * 0.01),
    "nan to num": lambda g: g.nan_to_num_(),
    "sign": lambda g: g.sign_(),
    "pow": lambda g: g.pow_(2),
    "neg": lambda g: g.neg_(),
    "fill": lambda g: g.fill_(3.0),
    "zero": lambda g: g.zero_(),
    "item": assigned,
    "of data": lambda g: g.data.mul_(0.5),
    "of detached": lambda g: g.detach().mul_(MASK),
    "rows": lambda g: g[1:4].zero_(),
    "row": lambda g: g[0].fill_(2),
    "transposed": lambda g: g.t().mul_(torch.arange(5.0)),
    "flat": lambda g: g.view(-1).add_(NOISE.flatten()),
    "part of a part": lambda g: g[:3][:, 2:].neg_(),
    "splits": halves,
    "norm out": lambda g: torch.mul(g, 2, out=g),
    "foreach mul": lambda g: torch._foreach_mul_([g], [0.5]),
    "foreach add": lambda g: torch._foreach_add_([g], [NOISE], alpha=2),
    "clip value": lambda g: torch._foreach_clamp_max_([g], 0.01),
    "index": lambda g: g.index_fill_(0, torch.tensor([0, 4]), 1.0),
    "renorm": lambda g: g.renorm_(2, 0, 0.001),
}


@pytest.mark.parametrize("slice_dim", [0, 1])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_in_place_is_that_of_the_slices(change: Callable[[Tensor], object], slice_dim: int) -> None:
    optimizer, grad, expected = build(slice_dim)
    change(grad)
    change(expected)
    torch.testing.assert_close(
        of_slices(optimizer, expected), restricted(optimizer, expected), rtol=1e-9, atol=1e-12
    )


def test_an_array_of_a_view_cannot_be_written_to() -> None:
    _, grad, _ = build()
    with pytest.raises(ValueError, match="read-only"):
        grad.numpy()[0, 0] = 1.0


def test_nothing_is_left_to_read_after_updates_in_the_backward_pass() -> None:
    model = nn.Linear(7, 5, bias=False).double()
    chunkft.ChunkAdamW(model, chunks=2, residency="stream", update="backward")
    model(X).square().mean().backward()
    (grad,) = [p.grad for p in model.parameters() if p.grad is not None]
    assert float(grad.norm()) > 0
    for use in (lambda: grad.abs(), lambda: grad.mul_(MASK), lambda: grad[0]):
        with pytest.raises(RuntimeError, match=r"update='backward'.*update='step'"):
            use()
