"""``update="backward"`` waits for everybody who reads a weight, with or without its module, before it updates it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import chunkft

pytestmark = pytest.mark.filterwarnings("ignore:the weight")


class Shares(nn.Module):
    """Reads the weight of a layer before, between or after calls of the layer."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        self.table = nn.Embedding(19, 16)
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)

    def forward(self, ids):
        x = self.table(ids)
        if self.mode == "below":
            x = F.linear(x, self.last.weight).tanh()
        x = self.first(x).tanh()
        x = self.last(x)
        if self.mode == "above":
            x = F.linear(x.tanh(), self.last.weight)
        if self.mode == "twice":
            x = self.first(self.last(x).tanh()) @ self.first.weight
        if self.mode == "tied by reading":
            return F.cross_entropy(F.linear(x, self.table.weight).flatten(0, 1), ids.flatten())
        if self.mode == "regularised":
            return x.square().mean() + self.last.weight.square().sum() + self.table.weight.abs().sum()
        return x.square().mean()


MODES = ["below", "above", "twice", "tied by reading", "regularised"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("slice_dim", [0, 1])
@pytest.mark.parametrize("page_bytes", [1, 4000])
def test_weights_that_are_read_elsewhere_train_as_dense_ones(mode, slice_dim, page_bytes):
    torch.manual_seed(0)
    model = Shares(mode).double()
    dense = copy.deepcopy(model)
    plain = torch.optim.AdamW(dense.parameters(), lr=1e-2)
    settings = {"residency": "stream", "update": "backward", "page_bytes": page_bytes}
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=1, slice_dim=slice_dim, **settings)
    for step in range(3):
        ids = torch.arange(step, step + 12).view(3, 4)
        for net, one in ((model, optimizer), (dense, plain)):
            net(ids).backward()
            one.step()
            one.zero_grad()
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_slices_of_weights_without_other_readers_are_updated_in_the_backward_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    settings = {"residency": "stream", "update": "backward", "page_bytes": 1}
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=1, **settings)
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.randn(5, 16)).square().sum().backward()
        assert all(leaf.grad is None for _, leaf in optimizer.active_parameters())
        assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        optimizer.step()
