"""Code that replaces what a layer computes, for a class or for the whole process, is obeyed at every call."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import chunkft
from chunkft.autograd import SlicedOperator, operator_for, register_operator, sliced_linear

pytestmark = pytest.mark.filterwarnings("ignore:the weight")

IDS = torch.arange(6)


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def run(model, optimizer, change):
    """Three steps as it is, three changed, three as it was."""
    for _ in range(3):
        for changed in (False, True, False):
            with pytest.MonkeyPatch.context() as patch:
                if changed:
                    change(patch, model)
                model(IDS).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def class_forward(patch, model):
    own = nn.Linear.forward
    patch.setattr(nn.Linear, "forward", lambda self, x: own(self, x) * 2)


def table_forward(patch, model):
    own = nn.Embedding.forward
    patch.setattr(nn.Embedding, "forward", lambda self, x: own(self, x) * 3)


def subclass(patch, model):
    own = nn.Linear.forward
    kind = type("Doubled", (nn.Linear,), {"forward": lambda self, x: own(self, x) * 2})
    patch.setattr(model[1], "__class__", kind)


def function(patch, model):
    own = F.linear
    patch.setattr(F, "linear", lambda x, weight, bias=None: own(x, weight * 2, bias))


def table_function(patch, model):
    own = F.embedding
    patch.setattr(F, "embedding", lambda *args, **kwargs: own(*args, **kwargs) * 2)


CHANGES = [class_forward, table_forward, subclass, function, table_function]
SETTINGS = [{"chunks": 1}, {"chunks": 1, "residency": "stream", "update": "backward", "page_bytes": 2000}]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("settings", SETTINGS, ids=["step", "backward"])
def test_changes_that_come_and_go_train_as_in_plain_torch(change, settings):
    dense, model = base(), base()
    expected = run(dense, torch.optim.AdamW(dense.parameters(), lr=1e-2), change)
    found = run(model, chunkft.ChunkAdamW(model, lr=1e-2, **settings), change)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("change", CHANGES)
def test_copies_of_attached_models_obey_too(change):
    dense, model = base(), base()
    chunkft.ChunkAdamW(model, chunks=1)
    for copied in (model, copy.deepcopy(model)):
        with pytest.MonkeyPatch.context() as patch:
            change(patch, dense)
            if change is subclass:
                change(patch, copied)
            assert torch.equal(copied(IDS), dense(IDS))


def test_a_class_that_was_changed_before_the_import_is_not_cut():
    program = """
import torch
from torch import nn
own = nn.Linear.forward
nn.Linear.forward = lambda self, x: own(self, x) * 2
import chunkft
layer = nn.Linear(4, 4)
print(chunkft.autograd.operator_for(layer), chunkft.autograd.operator_for(nn.Embedding(4, 4)) is not None)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "True"]


def test_one_operator_may_serve_two_classes():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x):
            return F.linear(x, self.weight)

    class Second(First):
        def forward(self, x):
            return F.linear(x, self.weight)

    calls = []

    def forward(module, active, x):
        calls.append(type(module))
        return sliced_linear(x, module.weight, None, active)

    operator = SlicedOperator(forward)
    register_operator(First, operator)
    register_operator(Second, operator)
    model = nn.Sequential(Second())
    assert operator_for(model[0]) is operator
    chunkft.ChunkAdamW(model, chunks=2)
    model(torch.randn(3, 4)).sum().backward()
    assert calls == [Second]
