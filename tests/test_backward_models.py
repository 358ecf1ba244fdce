"""Updates inside the backward pass over every kind of model: the weights of updates after it, bit for bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_transformers import FAMILIES, build, loss_of
from torch import nn
from toy_models import assert_same_weights

import chunkft

pytestmark = pytest.mark.filterwarnings("ignore:the weight .* is used without a call:UserWarning")
BACKWARD = {"residency": "stream", "update": "backward", "page_bytes": 4096}


def trained(model, loss_at, plan=None, steps=4, **options):
    chosen = {"chunks": None, "partition": plan} if plan is not None else {}
    optimizer = chunkft.ChunkAdamW(model, lr=1e-2, interval=1, **chosen, **options)
    for step in range(steps):
        torch.manual_seed(step)
        loss_at(step)(model).backward()
        optimizer.step()
    plan = optimizer.plan
    optimizer.detach()
    return plan


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_alike(family, chunks):
    model = build(family)
    plain = copy.deepcopy(model)
    plan = trained(model, lambda step: loss_of(family, step), chunks=chunks, **BACKWARD)
    trained(plain, lambda step: loss_of(family, step), plan)
    assert_same_weights(model, plain)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bert"])
def test_checkpointed_blocks_are_recomputed_from_weights_that_are_not_updated_yet(family):
    model = build(family)
    plain = copy.deepcopy(model)
    for net in (model, plain):
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plan = trained(model, lambda step: loss_of(family, step), chunks=1, **BACKWARD)
    trained(plain, lambda step: loss_of(family, step), plan)
    assert_same_weights(model, plain)


class Shared(nn.Module):
    """One layer that is used three times, and a table that is the head as well."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(37, 24)
        self.layer = nn.Linear(24, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 37, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        for _ in range(3):
            x = x + torch.tanh(self.layer(self.norm(x)))
        return self.head(x)


def shared_loss(step):
    ids = torch.randint(0, 37, (3, 8), generator=torch.Generator().manual_seed(step))
    return lambda model: F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_weight_is_updated_after_the_last_of_its_uses(chunks):
    model, plain = Shared(), Shared()
    plan = trained(model, shared_loss, chunks=chunks, steps=7, **{**BACKWARD, "page_bytes": 512})
    trained(plain, shared_loss, plan, steps=7)
    assert_same_weights(model, plain)
