"""What a layer with active slices returns may be changed in place, as PyTorch's own layers allow."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import window
from torch import nn

import chunkft
from chunkft.autograd import Slice, sliced_linear_cross_entropy

INPUTS = {
    "vector": lambda: torch.randn(8),
    "no tokens": lambda: torch.randn(0, 8),
    "matrix": lambda: torch.randn(5, 8),
    "batch": lambda: torch.randn(2, 5, 8),
    "empty batch": lambda: torch.randn(2, 0, 8),
    "transposed batch": lambda: torch.randn(5, 2, 8).transpose(0, 1),
    "image": lambda: torch.randn(2, 3, 5, 8),
    "channels last": lambda: torch.randn(2, 8, 3, 5).permute(0, 2, 3, 1),
}


def gradients_after(work, layer, x):
    """Gradients of all slices and of the input, and those of plain torch."""
    dense = copy.deepcopy(layer)
    expected_x = x.clone().requires_grad_(x.is_floating_point())
    work(dense(expected_x)).backward()
    model = nn.Sequential(layer)
    optimizer = chunkft.ChunkAdamW(model, chunks=1)
    own_x = x.clone().requires_grad_(x.is_floating_point())
    work(model(own_x)).backward()
    expected = dict(dense.named_parameters())
    for piece, leaf in optimizer.active_parameters():
        want = window(piece, expected[piece.name.removeprefix("0.")].grad)
        torch.testing.assert_close(leaf.grad, want)
    if x.is_floating_point():
        torch.testing.assert_close(own_x.grad, expected_x.grad)


def add_and_rectify(y):
    y += 1
    y.mul_(2)
    return torch.relu_(y).square().sum()


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_outputs_of_every_rank(kind, bias):
    torch.manual_seed(0)
    gradients_after(add_and_rectify, nn.Linear(8, 6, bias=bias), INPUTS[kind]())


@pytest.mark.parametrize(
    "kind", [kind for kind in INPUTS if kind not in ("transposed batch", "channels last")]
)
def test_conv1d_outputs_of_every_rank(kind):
    library = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    gradients_after(add_and_rectify, library.Conv1D(6, 8), INPUTS[kind]())


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 0), (2, 3, 2)])
def test_embedding_outputs_of_every_rank(shape):
    torch.manual_seed(0)
    gradients_after(add_and_rectify, nn.Embedding(9, 6), torch.randint(0, 9, shape))


def test_part_of_an_output_may_be_overwritten():
    def work(y):
        y[..., :2] = 0
        y[0].sub_(1)
        return y.square().sum()

    gradients_after(work, nn.Linear(8, 6), torch.randn(2, 5, 8))


def test_a_change_of_what_the_next_operation_kept_is_still_noticed():
    model = nn.Sequential(nn.Linear(8, 6))
    chunkft.ChunkAdamW(model, chunks=1)
    y = model(torch.randn(2, 5, 8))
    z = y.square()
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_of_the_head(reduction):
    torch.manual_seed(0)
    weight, hidden = torch.randn(11, 8), torch.randn(2, 5, 8)
    targets = torch.randint(0, 11, (2, 5))
    leaf, dense = weight[3:7].requires_grad_(True), weight.clone().requires_grad_(True)
    piece = Slice("w", 0, 3, 7, (11, 8))
    for loss in (
        sliced_linear_cross_entropy(hidden, weight, targets, [(piece, leaf)], reduction=reduction),
        F.cross_entropy(F.linear(hidden, dense).flatten(0, 1), targets.flatten(), reduction=reduction),
    ):
        loss *= 3
        loss.sum().backward()
    torch.testing.assert_close(leaf.grad, dense.grad[3:7])
