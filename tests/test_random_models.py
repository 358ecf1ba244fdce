"""Random models under random plans: every slice gradient has the bits of dense autograd."""

import copy
import itertools

import pytest
import torch
from helpers import assert_covers_once, assert_same_part, chunk_gradients, dense_gradients, window
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import chunkft
from chunkft import Slice
from chunkft.plan import parameter_specs

KINDS = (
    "linear",
    "unbiased",
    "conv1d",
    "norm",
    "dropout",
    "activation",
    "attention",
    "again",
    "checkpointed",
)


class RandomNet(nn.Module):
    """An embedding, a random stack of layers, and a head that may be tied to the embedding."""

    def __init__(self, vocabulary: int, width: int, layers: list[tuple[str, int]], tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width, padding_idx=0)
        self.layers = nn.ModuleList()
        self.kinds: list[str] = []
        self.vocabulary = vocabulary
        size = width
        for kind, wanted in layers:
            if kind == "again":  # the same module in another place, where it fits
                fitting = [
                    m for m in self.layers if getattr(m, "weight", torch.empty(0)).shape == (size, size)
                ]
                layer: nn.Module = fitting[0] if fitting else nn.Identity()
            elif kind in ("linear", "unbiased"):
                layer = nn.Linear(size, wanted, bias=kind == "linear")
            elif kind == "conv1d":
                layer = Conv1D(wanted, size)
            elif kind == "checkpointed":
                layer = nn.Sequential(nn.Linear(size, wanted), nn.Dropout(0.2), nn.Linear(wanted, wanted))
            else:
                layer = {
                    "norm": lambda n: nn.LayerNorm(n),
                    "dropout": lambda n: nn.Dropout(0.3),
                    "activation": lambda n: nn.GELU(),
                    "attention": lambda n: nn.MultiheadAttention(n, 1, batch_first=True),
                }[kind](size)
            self.layers.append(layer)
            self.kinds.append(kind)
            if kind in ("linear", "unbiased", "conv1d", "checkpointed"):
                size = wanted
        self.last = nn.Linear(size, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            if kind == "attention":
                x = x + layer(x, x, x, need_weights=False)[0]
            elif kind == "checkpointed":
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return self.head(self.last(x))


widths = st.one_of(st.integers(1, 20), st.integers(16, 70))


@st.composite
def nets(draw):
    layers = draw(st.lists(st.tuples(st.sampled_from(KINDS), widths), max_size=5))
    torch.manual_seed(draw(st.integers(0, 99)))
    model = RandomNet(draw(st.integers(2, 70)), draw(widths), layers, draw(st.booleans()))
    parameters = list(model.parameters())
    for index in draw(st.sets(st.integers(1, len(parameters) - 1), max_size=3)):
        parameters[index].requires_grad_(False)
    return model


@st.composite
def plans(draw, model):
    """Each parameter cut along a dimension of its own at places of its own, the pieces dealt out to chunks."""
    chunks: list[list[Slice]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for spec in parameter_specs(model):
        dim = draw(st.sampled_from(spec.dims)) if spec.dims else None
        if dim is None or draw(st.integers(0, 5)) == 0:
            pieces = [spec.whole()]
        else:
            size = spec.shape[dim]
            inner = draw(st.sets(st.integers(1, size - 1), max_size=3)) if size > 1 else set()
            points = [0, *sorted(inner), size]
            pieces = [spec.slice(dim, a, b) for a, b in itertools.pairwise(points)]
        for piece in pieces:
            chunks[draw(st.integers(0, len(chunks) - 1))].append(piece)
    return chunkft.partition(model, None, [group for group in chunks if group])


@pytest.mark.filterwarnings("ignore:dropout2d", "ignore:the weight")
@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data(), nets(), st.integers(1, 4), st.integers(1, 9))
def test_slice_gradients_equal_dense_ones(data, model, batch, length):
    plan = data.draw(plans(model))
    assert_covers_once(model, plan)
    ids = torch.randint(0, model.vocabulary, (batch, length))

    def loss(net: nn.Module) -> torch.Tensor:
        return net(ids).logsumexp(-1).sum()

    dense = dense_gradients(copy.deepcopy(model), loss, seed=3)
    gradients = dict(chunk_gradients(copy.deepcopy(model), plan, loss, seed=3))
    for chunk in plan:
        # PyTorch multiplies in another order where a frozen weight meets an input with gaps, so the bits are
        # those of dense autograd with the same parameters frozen.
        part = copy.deepcopy(model)
        names = {piece.name for piece in chunk.slices}
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(name in names)
        same = dense_gradients(part, loss, seed=3)
        for piece in chunk.slices:
            assert_same_part(piece, gradients[piece], same[piece.name])
            if gradients[piece] is not None:
                torch.testing.assert_close(
                    gradients[piece], window(piece, dense[piece.name]), rtol=1e-3, atol=1e-5
                )
