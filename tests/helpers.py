"""Dense references and checks for the tests of plans, kernels and sliced operators."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import chunkft
from chunkft import Slice

Loss = Callable[[nn.Module], Tensor]


def window(piece: Slice, tensor: Tensor) -> Tensor:
    """The part of a whole-parameter tensor that a slice names, by plain indexing."""
    if piece.dim is None:
        return tensor
    bounds = slice(piece.start, piece.stop)
    return tensor[bounds] if piece.dim == 0 else tensor[:, bounds]


def dense_gradients(model: nn.Module, loss: Loss, seed: int = 0) -> dict[str, Tensor | None]:
    """Gradients of an untouched copy of the model by ordinary autograd, by first name."""
    torch.manual_seed(seed)
    loss(model).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return gradients


def chunk_gradients(
    model: nn.Module, plan: chunkft.ChunkPlan, loss: Loss, seed: int = 0
) -> Iterator[tuple[Slice, Tensor | None]]:
    """Gradient of every slice of a plan, each chunk activated in turn; the weights do not change."""
    attachment = chunkft.attach(model)
    attachment.freeze()
    for chunk in plan:
        pairs = attachment.activate([*plan.always, *chunk.slices])
        torch.manual_seed(seed)
        loss(model).backward()
        for piece, leaf in pairs:
            yield piece, leaf.grad
        leaves = {id(leaf) for _, leaf in pairs}
        stray = [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in leaves]
        assert not stray, f"whole gradients were left in {stray}"
    attachment.detach()


def assert_slices_equal_dense(model: nn.Module, plan: chunkft.ChunkPlan, loss: Loss, seed: int = 0) -> None:
    """Every slice gradient has the bits of its part of the dense gradient."""
    dense = dense_gradients(copy.deepcopy(model), loss, seed)
    seen = 0
    for piece, gradient in chunk_gradients(model, plan, loss, seed):
        assert_same_part(piece, gradient, dense[piece.name])
        seen += 1
    assert seen


def assert_same_part(piece: Slice, gradient: Tensor | None, dense: Tensor | None) -> None:
    if dense is None:
        assert gradient is None, f"{piece} has a gradient, the dense parameter has none"
        return
    expected = window(piece, dense.to_dense() if dense.is_sparse else dense)
    assert gradient is not None, f"{piece} has no gradient"
    assert gradient.shape == expected.shape, f"{piece}: {gradient.shape} != {expected.shape}"
    assert torch.equal(gradient, expected), f"{piece} is off by {float((gradient - expected).abs().max())}"


def assert_close_to_exact(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """The tolerance rule: at most twice as far from fp64 as PyTorch's own result of the same dtype is."""
    ours_off = float((ours.double() - exact).abs().max()) if exact.numel() else 0.0
    theirs_off = float((theirs.double() - exact).abs().max()) if exact.numel() else 0.0
    tiny = 1e-6 * (1.0 + (float(exact.abs().max()) if exact.numel() else 0.0))
    assert ours_off <= 2 * theirs_off + tiny, f"off by {ours_off}, PyTorch by {theirs_off}"


def assert_covers_once(model: nn.Module, plan: chunkft.ChunkPlan) -> None:
    """Every trainable element is in exactly one chunk, or always active; frozen ones are in none."""
    parameters = dict(model.named_parameters())
    counts = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in parameters.items()}
    for piece in plan.slices():
        assert piece.parameter_shape == tuple(parameters[piece.name].shape)
        assert piece.numel > 0
        part = window(piece, counts[piece.name])
        assert tuple(part.shape) == piece.shape
        part += 1
    for name, parameter in parameters.items():
        assert bool((counts[name] == int(parameter.requires_grad)).all()), name


def holds_memory(gradient: Tensor | None) -> bool:
    """Whether a gradient is one, and no view that stands for those of slices."""
    return gradient is not None and gradient.untyped_storage().nbytes() > 0


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(19, 12),
        nn.Linear(12, 33),
        nn.Dropout(0.2),
        nn.LayerNorm(33),
        nn.Linear(33, 7, bias=False),
    )


IDS = torch.arange(18).view(3, 6)


def small_loss(model: nn.Module) -> torch.Tensor:
    return model(IDS).square().sum()


def walk(optimizer: chunkft.ChunkOptimizer, model: nn.Module, steps: int, loss: Loss = small_loss) -> None:
    for _ in range(steps):
        loss(model).backward()
        optimizer.step()
