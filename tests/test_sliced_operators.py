"""Sliced operators: gradients of slices are the rows and columns of dense autograd, and nothing dense is made."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_exact, assert_slices_equal_dense, dense_gradients, window
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import chunkft
from chunkft import Slice
from chunkft.autograd import sliced_conv1d, sliced_embedding, sliced_linear

LAYOUTS = ("plain", "transposed", "permuted", "strided", "expanded")


def arranged(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (but for ``expanded``) with other strides."""
    if x.dim() < 2 or layout == "plain":
        return x
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "permuted":
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    if layout == "strided":
        return torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2]
    return x[:1].expand(x.shape)


@st.composite
def cuts(draw, size):
    """Disjoint slices of a dimension, in any order, not necessarily all of it."""
    points = sorted(draw(st.sets(st.integers(0, size), min_size=2, max_size=5)))
    pieces = list(itertools.pairwise(points))
    return draw(st.permutations(pieces))[: draw(st.integers(1, len(pieces)))]


def run_matmul(call, x, weight, bias, dy, active=None):
    x = x.detach().requires_grad_(True)
    weight = weight.clone().requires_grad_(active is None)
    bias = None if bias is None else bias.clone().requires_grad_(True)
    leaves = [(piece, piece.of(weight.detach()).requires_grad_(True)) for piece in active or ()]
    y = call(x, weight, bias) if active is None else call(x, weight, bias, leaves)
    y.backward(dy)
    grads = weight.grad if active is None else [leaf.grad for _, leaf in leaves]
    return y, x.grad, grads, None if bias is None else bias.grad


def conv1d(x, weight, bias):
    module = Conv1D(weight.shape[1], weight.shape[0])
    del module.weight, module.bias
    module.weight, module.bias = weight, torch.zeros(weight.shape[1]) if bias is None else bias
    try:
        return module(x)
    except (
        RuntimeError
    ):  # it takes views only; what the sliced one makes of other strides is a matter of values
        return module(x.contiguous())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.data(),
    st.sampled_from(["linear", "conv1d"]),
    st.lists(st.integers(1, 8), max_size=3),
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from(LAYOUTS),
    st.sampled_from([0, 1]),
    st.booleans(),
)
def test_slices_have_the_bits_of_dense_autograd(data, kind, lead, inputs, outputs, layout, dim, biased):
    x = arranged(torch.randn(*lead, inputs), layout)
    shape = (outputs, inputs) if kind == "linear" else (inputs, outputs)
    weight, bias = torch.randn(shape), torch.randn(outputs) if biased else None
    if kind == "conv1d" and not biased:
        bias = torch.zeros(outputs)
    dy = torch.randn(*lead, outputs)
    pieces = [Slice("w", dim, a, b, shape) for a, b in data.draw(cuts(shape[dim]))]
    dense, sliced = (F.linear, sliced_linear) if kind == "linear" else (conv1d, sliced_conv1d)
    y, dx, dw, db = run_matmul(dense, x, weight, bias, dy)
    our_y, our_dx, our_dw, our_db = run_matmul(sliced, x, weight, bias, dy, pieces)
    assert torch.equal(our_y, y)
    assert torch.equal(our_dx, dx)
    for piece, gradient in zip(pieces, our_dw, strict=True):
        assert torch.equal(gradient, window(piece, dw))
    assert bias is None or torch.equal(our_db, db)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("lead", [(0,), (0, 3), (2, 0, 1), (1, 1)])
def test_batches_without_tokens(kind, lead):
    shape = (40, 35) if kind == "linear" else (35, 40)
    sliced = sliced_linear if kind == "linear" else sliced_conv1d
    for dim in (0, 1):
        piece = Slice("w", dim, 3, 34, shape)
        y, dx, (dw,), _ = run_matmul(
            sliced,
            torch.randn(*lead, 35),
            torch.randn(shape),
            torch.randn(40),
            torch.ones(*lead, 40),
            [piece],
        )
        assert y.shape == (*lead, 40)
        assert dx.shape == (*lead, 35)
        assert dw.shape == piece.shape
        assert bool(dw.any()) == (0 not in lead)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_sixteen_bit_slices_are_as_accurate_as_dense_autograd(dtype, dim):
    x, weight, dy = torch.randn(3, 50, 37), torch.randn(45, 37), torch.randn(3, 50, 45)
    x, weight, dy = x.to(dtype), weight.to(dtype), dy.to(dtype)
    piece = Slice("w", dim, 5, 31, (45, 37))
    _, dx, dw, _ = run_matmul(F.linear, x, weight, None, dy)
    _, exact_dx, exact_dw, _ = run_matmul(F.linear, x.double(), weight.double(), None, dy.double())
    y, our_dx, (our_dw,), _ = run_matmul(sliced_linear, x, weight, None, dy, [piece])
    assert torch.equal(y, F.linear(x, weight))
    assert our_dw.dtype == dtype
    assert_close_to_exact(our_dw, window(piece, dw), window(piece, exact_dw))
    assert_close_to_exact(our_dx, dx, exact_dx)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.data(),
    st.lists(st.integers(0, 7), max_size=3),
    st.integers(1, 50),
    st.integers(1, 30),
    st.sampled_from([0, 1]),
    st.booleans(),
    st.booleans(),
)
def test_embedding_slices_have_the_bits_of_dense_autograd(
    data, lead, vocabulary, width, dim, by_frequency, sparse
):
    padding_idx = data.draw(st.one_of(st.none(), st.integers(-vocabulary, vocabulary - 1)))
    if sparse:  # PyTorch has sparse gradients neither by frequency nor of a single id
        by_frequency, lead = False, lead or [1]
    table = nn.Embedding(
        vocabulary, width, padding_idx=padding_idx, scale_grad_by_freq=by_frequency, sparse=sparse
    )
    # few different ids, so that some repeat and most slices are missed by some
    ids = torch.randint(0, vocabulary, lead) // 3 * 3
    dy = torch.randn(*lead, width)
    plan = chunkft.partition(
        table,
        None,
        [
            [Slice("weight", dim, a, b, (vocabulary, width))]
            for a, b in complete(data, (vocabulary, width)[dim])
        ],
    )
    assert_slices_equal_dense(table, plan, lambda model: (model(ids) * dy).sum())


def complete(data, size):
    points = [0, *sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=4)) if size > 1 else ()), size]
    return list(itertools.pairwise(points))


@pytest.mark.parametrize("padding_idx", [4, -3])
def test_functional_embedding_counts_a_negative_padding_index_from_the_end(padding_idx):
    weight, ids = torch.randn(7, 3), torch.tensor([4, 1, 4, 6])
    leaf = weight[3:6].detach().requires_grad_(True)
    sliced_embedding(ids, weight, [(Slice("w", 0, 3, 6, (7, 3)), leaf)], padding_idx).sum().backward()
    assert not leaf.grad.any()


class Zoo(nn.Module):
    """Uses of modules that are easy to get wrong: twice, shared, tied, nested, frozen, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(37, 20, padding_idx=0)
        self.twice = nn.Linear(20, 20)
        self.shared = nn.ModuleList([nn.Linear(20, 21)] * 2)
        self.back = Conv1D(20, 21)
        self.frozen = nn.Linear(20, 20)
        self.frozen.requires_grad_(False)
        self.half_frozen = nn.Linear(20, 20)
        self.half_frozen.weight.requires_grad_(False)
        self.norm = nn.LayerNorm(20)
        self.conv = nn.Conv1d(20, 20, 3, padding=1)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(20, 37, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.twice(torch.relu(self.twice(self.table(ids))))
        for layer in self.shared:
            x = x + self.back(torch.tanh(layer(self.dropout(x))))
        x = self.half_frozen(self.frozen(self.norm(x)))
        return self.head(x + self.conv(x.transpose(1, 2)).transpose(1, 2))


def zoo_loss(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 37, (3, 8), generator=generator)
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize("slice_dim", [0, 1])
@pytest.mark.parametrize(
    ("by", "chunks"), [("bytes", 1), ("bytes", 3), ("bytes", 11), ("interleaved", 6), ("layers", 1)]
)
def test_twice_called_shared_tied_and_frozen_modules(by, chunks, slice_dim):
    model = Zoo()
    plan = chunkft.partition(model, chunks, by, slice_dim=slice_dim, row_multiple=1)
    assert_slices_equal_dense(model, plan, zoo_loss, seed=3)


def test_several_slices_of_one_weight_at_once(threads):
    model = nn.Sequential(nn.Linear(70, 65), nn.Tanh(), nn.Linear(65, 3))
    shape = (65, 70)
    columns = [Slice("0.weight", 1, a, b, shape) for a, b in [(0, 1), (1, 40), (40, 69), (69, 70)]]
    plan = chunkft.partition(
        model, None, [[columns[2], columns[0], "0.bias"], [columns[1], columns[3], "2.*"]]
    )
    x = torch.randn(9, 70)
    assert_slices_equal_dense(model, plan, lambda m: m(x).square().sum())


@pytest.mark.parametrize("bias_active", [False, True])
def test_a_bias_is_its_own_parameter(bias_active):
    model = nn.Linear(20, 30)
    groups = [["weight", "bias"]] if bias_active else [["weight"], ["bias"]]
    x = torch.randn(4, 20)
    assert_slices_equal_dense(model, chunkft.partition(model, None, groups), lambda m: m(x).square().sum())


@pytest.mark.parametrize("slice_dim", [0, 1])
def test_autocast_gradients_are_as_accurate_as_dense_ones(slice_dim):
    def loss(model):
        with torch.autocast("cpu", torch.bfloat16):
            return zoo_loss(model)

    model = Zoo().eval()  # dropout would draw other values for the fp64 reference
    plan = chunkft.partition(model, 7, slice_dim=slice_dim, row_multiple=1)
    dense = dense_gradients(copy.deepcopy(model), loss)
    exact = dense_gradients(copy.deepcopy(model).double(), zoo_loss)
    attachment = chunkft.attach(model)
    attachment.freeze()
    for chunk in plan:
        pairs = attachment.activate(chunk.slices)
        loss(model).backward()
        for piece, leaf in pairs:
            assert leaf.grad.dtype == torch.float32
            assert_close_to_exact(
                leaf.grad, window(piece, dense[piece.name]), window(piece, exact[piece.name])
            )


def test_autocast_forward_is_that_of_the_model():
    model = Zoo().eval()
    ids = torch.randint(0, 37, (3, 8))
    with torch.autocast("cpu", torch.bfloat16):
        before = model(ids)
        chunkft.ChunkAdamW(model, chunks=1)
        after = model(ids)
    assert before.dtype == after.dtype == torch.bfloat16
    assert torch.equal(before, after)


def test_a_weight_with_requires_grad_gets_no_gradient_through_a_sliced_operator():
    weight = torch.randn(5, 4, requires_grad=True)
    piece = Slice("w", 0, 1, 3, (5, 4))
    leaf = piece.of(weight.detach()).requires_grad_(True)
    sliced_linear(torch.randn(2, 4), weight, None, [(piece, leaf)]).sum().backward()
    assert weight.grad is None
    assert leaf.grad.shape == (2, 4)


def test_without_active_slices_or_grad_mode_the_operators_are_the_plain_ones():
    weight, x, ids = torch.randn(5, 4, requires_grad=True), torch.randn(2, 4), torch.tensor([1, 3])
    piece = Slice("w", 0, 1, 3, (5, 4))
    active = [(piece, piece.of(weight.detach()).requires_grad_(True))]
    assert sliced_linear(x, weight, None, []).grad_fn is not None
    with torch.no_grad():
        assert torch.equal(sliced_linear(x, weight, None, active), F.linear(x, weight))
        assert torch.equal(sliced_embedding(ids, weight, active), weight[ids])
        assert torch.equal(sliced_conv1d(x, weight.t(), None, active), x @ weight.t())


@pytest.mark.parametrize(
    "call",
    [
        lambda active: sliced_linear(torch.zeros(2, 4), torch.zeros(5, 4), None, active),
        lambda active: sliced_conv1d(torch.zeros(2, 5), torch.zeros(5, 4), None, active),
        lambda active: sliced_embedding(torch.tensor([0]), torch.zeros(5, 4), active),
    ],
)
def test_atomic_slices_are_refused(call):
    with pytest.raises(ValueError, match="dim=None"):
        call([(Slice("w", None, 0, 5, (5, 4)), torch.zeros(5, 4, requires_grad=True))])
