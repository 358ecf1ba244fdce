"""The loss of a head without its logits: values, gradients of slices, and memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.cross_entropy import peak_bytes
from chunkft import Slice
from chunkft.autograd.linear_cross_entropy import sliced_linear_cross_entropy
from chunkft.kernels.linear_cross_entropy import Loss, chunk_size, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ROWS, ALL, COLUMNS = (0, 13, 41), (0, 0, 61), (1, 3, 9)


def problem(tokens=37, width=12, vocabulary=61, dtype=torch.float32):
    hidden, weight = torch.randn(tokens, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[::5] = -100
    return hidden, weight, targets


def reference(hidden, weight, targets, softcap=None, label_smoothing=0.0, reduction="none", upstream=None):
    """Losses and dense gradients in fp64."""
    hidden, weight = (t.detach().double().requires_grad_(True) for t in (hidden, weight))
    logits = hidden @ weight.t()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction=reduction, label_smoothing=label_smoothing)
    losses.backward(torch.ones_like(losses) if upstream is None else upstream.double())
    return losses.detach(), hidden.grad, weight.grad


def cut(weight_gradient, window):
    dim, start, stop = window
    return weight_gradient.narrow(dim, start, stop - start)


@pytest.mark.parametrize("by", ["tokens", "vocabulary"])
@pytest.mark.parametrize("chunk", [1, 7, 64, None])
@pytest.mark.parametrize(
    "loss", [Loss(), Loss(label_smoothing=0.1), Loss(softcap=3.0), Loss(-100, 0.3, 1.5)], ids=str
)
def test_losses_and_gradients_are_those_of_whole_logits(by, chunk, loss):
    hidden, weight, targets = problem()
    upstream = torch.randn(37)
    exact = reference(hidden, weight, targets, loss.softcap, loss.label_smoothing, upstream=upstream)
    windows = (ROWS, COLUMNS, ALL, (0, 20, 20))
    losses, dx, dw = linear_cross_entropy(
        hidden, weight, targets, windows, loss=loss, upstream=upstream, by=by, chunk=chunk
    )
    torch.testing.assert_close(losses.double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx.double(), exact[1], rtol=1e-4, atol=1e-5)
    for window, gradient in zip(windows, dw, strict=True):
        torch.testing.assert_close(gradient.double(), cut(exact[2], window), rtol=1e-4, atol=1e-5)
    assert (losses[targets == -100] == 0).all()
    assert (dx[targets == -100] == 0).all()


@pytest.mark.parametrize("by", ["tokens", "vocabulary"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_as_accurate_as_whole_logits(by, dtype):
    hidden, weight, targets = problem(dtype=dtype)
    losses, dx, (dw,) = linear_cross_entropy(hidden, weight, targets, (ROWS,), by=by, chunk=9)
    exact = reference(hidden, weight, targets)
    leaves = hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True)
    theirs = F.cross_entropy((leaves[0] @ leaves[1].t()).to(losses.dtype), targets, reduction="none")
    theirs.sum().backward()
    for ours, other, true in (
        (losses, theirs.detach(), exact[0]),
        (dx, leaves[0].grad, exact[1]),
        (dw, cut(leaves[1].grad, ROWS), cut(exact[2], ROWS)),
    ):
        error, allowed = (ours.double() - true).abs().max(), (other.double() - true).abs().max()
        assert error <= 2 * allowed + 1e-12
    assert (losses.dtype, dx.dtype) == (torch.float64 if dtype == torch.float64 else torch.float32, dtype)


@pytest.mark.parametrize("by", ["tokens", "vocabulary"])
def test_large_logits_do_not_overflow_and_ignored_tokens_may_be_anything(by):
    hidden, weight, targets = problem()
    hidden = hidden * 1e4
    hidden[::5] = float("nan")
    losses, dx, (dw,) = linear_cross_entropy(hidden, weight, targets, (ROWS,), by=by, chunk=8)
    assert losses.isfinite().all()
    assert dx.isfinite().all()
    del dw  # 0 x NaN: the weight's gradient is NaN, as that of whole logits is


@pytest.mark.parametrize("by", ["tokens", "vocabulary"])
def test_only_what_is_asked_for_is_computed(by, monkeypatch):
    hidden, weight, targets = problem()
    _, dx, dw = linear_cross_entropy(hidden, weight, targets, hidden_grad=False, by=by)
    assert (dx, dw) == (None, [])
    products = []
    mm = torch.Tensor.mm
    monkeypatch.setattr(torch.Tensor, "mm", lambda a, b: products.append(a.shape) or mm(a, b))
    linear_cross_entropy(hidden, weight, targets, hidden_grad=False, by=by, chunk=61)
    assert len(products) == 1
    if by == "vocabulary":
        products.clear()
        _, dx, (dw,) = linear_cross_entropy(
            hidden, weight, targets, (ROWS,), hidden_grad=False, by=by, chunk=10
        )
        assert dx is None
        # seven blocks for the losses; the window touches the second to the fifth: logits again, and the gradient
        assert len(products) == 7 + 2 * 4
    nothing = linear_cross_entropy(hidden[:0], weight, targets[:0], (ROWS,), by=by)
    assert (nothing[0].shape, nothing[1].shape) == ((0,), (0, 12))
    assert (nothing[2][0] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(37,), (4, 9), ()])
def test_autograd_gives_slices_the_gradient_of_their_rows(reduction, shape):
    weight = torch.randn(61, 12)
    hidden, targets = torch.randn(*shape, 12, requires_grad=True), torch.randint(0, 61, shape)
    if shape:
        targets[0] = -100
    pieces = [Slice("head", *window, (61, 12)) for window in (ROWS, COLUMNS)]
    leaves = [nn.Parameter(piece.of(weight)) for piece in pieces]
    leaves.append(nn.Parameter(weight[50:60]))
    leaves[2].requires_grad_(False)
    pieces.append(Slice("head", 0, 50, 60, (61, 12)))
    loss = sliced_linear_cross_entropy(
        hidden,
        weight,
        targets,
        list(zip(pieces, leaves, strict=True)),
        reduction=reduction,
        label_smoothing=0.1,
    )
    upstream = torch.randn(loss.shape)
    loss.backward(upstream)
    flat = hidden.detach().reshape(-1, 12), weight, targets.reshape(-1)
    exact = reference(
        *flat,
        label_smoothing=0.1,
        reduction=reduction,
        upstream=upstream.reshape(-1) if reduction == "none" else upstream,
    )
    torch.testing.assert_close(loss.double(), exact[0].view(loss.shape), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact[1].view(hidden.shape), rtol=1e-4, atol=1e-5)
    for piece, leaf in zip(pieces[:2], leaves, strict=False):
        torch.testing.assert_close(leaf.grad.double(), piece.of(exact[2]), rtol=1e-4, atol=1e-5)
    assert leaves[2].grad is None
    with torch.no_grad():
        again = sliced_linear_cross_entropy(hidden, weight, targets, reduction=reduction, label_smoothing=0.1)
    assert torch.equal(loss, again)
    assert again.grad_fn is None


def test_the_graph_can_be_used_twice():
    hidden, weight, targets = problem()
    hidden.requires_grad_(True)
    loss = sliced_linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss.backward()
    assert torch.equal(hidden.grad, 2 * once)


def test_a_batch_without_targets_has_no_gradient():
    hidden, weight, targets = problem()
    hidden.requires_grad_(True)
    loss = sliced_linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    assert loss.isnan()  # as PyTorch has it: 0 / 0
    loss.backward(torch.ones(()))
    assert (hidden.grad == 0).all()


def test_small_fp16_gradients_survive_a_loss_scale():
    hidden, weight, targets = problem(4096, 4, 30, torch.float16)
    hidden = (hidden * 0.01).requires_grad_(True)
    sliced_linear_cross_entropy(hidden, weight * 0.01, targets).backward(torch.tensor(65536.0))
    exact = reference(hidden, weight * 0.01, targets, reduction="mean", upstream=torch.tensor(65536.0))[1]
    torch.testing.assert_close(hidden.grad.double(), exact, rtol=0.02, atol=2e-4)
    assert (hidden.grad != 0).float().mean() > 0.75


def test_pytorchs_own_chunked_loss_agrees():
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("PyTorch before 2.13")
    hidden, weight, targets = problem()
    leaves = hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True)
    theirs = F.linear_cross_entropy(*leaves, targets, options=nn.LinearCrossEntropyOptions())
    theirs.backward()
    hidden.requires_grad_(True)
    leaf = nn.Parameter(weight[13:41])
    ours = sliced_linear_cross_entropy(hidden, weight, targets, [(Slice("head", *ROWS, (61, 12)), leaf)])
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hidden.grad, leaves[0].grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(leaf.grad, leaves[1].grad[13:41], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_peak_is_a_tenth_of_the_logits(dtype):
    tokens, width, vocabulary = 2048, 32, 8192
    hidden, weight, targets = problem(tokens, width, vocabulary, dtype)
    hidden.requires_grad_(True)
    leaf = nn.Parameter(weight[1000:1256])

    def ours():
        active = [(Slice("head", 0, 1000, 1256, tuple(weight.shape)), leaf)]
        sliced_linear_cross_entropy(hidden, weight, targets, active).backward()

    def whole():
        F.cross_entropy(hidden @ weight.t(), targets).backward()

    logits = tokens * vocabulary * dtype.itemsize
    assert peak_bytes(whole) > 2 * logits  # the measurement sees logits and their gradient
    assert peak_bytes(ours) <= logits / 10  # everything: dX and the slice's gradient as well
    for by in ("tokens", "vocabulary"):
        sizes = peak_bytes(
            lambda by=by: linear_cross_entropy(hidden.detach(), weight, targets, [(0, 1000, 1256)], by=by)
        )
        assert sizes <= logits / 10


def test_working_memory_is_a_sixteenth_of_the_logits():
    assert chunk_size(4096, torch.float32, False) == 256
    assert chunk_size(4096, torch.bfloat16, False) == 4096 // 48
    assert chunk_size(4096, torch.bfloat16, True) == 4096 // 80
    assert chunk_size(3, torch.float32, False) == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, ValueError, r"hidden and weight must be \(T, H\) and \(V, H\)"),
        ({"weight": torch.zeros(0, 4)}, ValueError, r"V > 0, got \(2, 4\) and \(0, 4\)"),
        ({"weight": torch.zeros(5, 4).half()}, ValueError, r"must share one floating dtype"),
        ({"targets": torch.tensor([1.0, 2.0])}, ValueError, r"targets must be int64 of shape \(2,\)"),
        ({"targets": torch.tensor([1, 5])}, IndexError, r"target 5 is not allowed; needs 0 <= target < 5"),
        ({"targets": torch.tensor([-1, 3])}, IndexError, r"target -1 is not allowed"),
        ({"windows": [(0, 3, 6)]}, ValueError, r"window \(0, 3, 6\) is not allowed"),
        ({"windows": [(2, 0, 1)]}, ValueError, r"window \(2, 0, 1\) is not allowed"),
        ({"upstream": torch.ones(3)}, ValueError, r"upstream must be of shape \(2,\), got \(3,\)"),
        ({"by": "rows"}, ValueError, r"by='rows' is not known"),
        ({"chunk": 0}, ValueError, r"chunk=0 is not allowed"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(changes, error, message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "targets": torch.tensor([0, 4])}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**arguments, **changes})


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"label_smoothing=1\.5 is not allowed"):
        Loss(label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"softcap=0\.0 is not allowed"):
        Loss(softcap=0.0)
    hidden, weight, targets = problem()
    with pytest.raises(ValueError, match="reduction='batch' is not known"):
        sliced_linear_cross_entropy(hidden, weight, targets, reduction="batch")
    with pytest.raises(ValueError, match=r"targets must be of shape \(37,\)"):
        sliced_linear_cross_entropy(hidden, weight, targets[:4])
