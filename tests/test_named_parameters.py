"""``named_parameters()`` in place of parameters, as torch's optimizers take it; bases that swap weights are refused."""

import pytest
import torch
from toy_models import assert_same_weights, mlp, mlp_loss, train

import chunkft


def inputs(model, kind):
    names = dict(model.named_parameters())
    decayed = [(n, p) for n, p in names.items() if n.endswith("weight")]
    plain = [(n, p) for n, p in names.items() if not n.endswith("weight")]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": iter(plain), "weight_decay": 0.0}]
    return {"pairs": list(names.items()), "generator": model.named_parameters(), "groups": groups}[kind]


@pytest.mark.parametrize("kind", ["pairs", "generator", "groups"])
def test_named_parameters_train_as_in_torch(kind):
    model, plain = mlp(), mlp()
    chunkft.attach(model)
    optimizer = chunkft.ChunkAdamW(inputs(model, kind), lr=1e-2, chunks=1)
    reference = torch.optim.AdamW(inputs(plain, kind), lr=1e-2)
    for m, o in ((model, optimizer), (plain, reference)):
        train(m, o, mlp_loss, range(4))
    assert_same_weights(model, plain)


def test_names_for_some_parameters_only_are_refused_as_in_torch():
    model = mlp()
    chunkft.attach(model)
    first, *others = model.named_parameters()
    with pytest.raises(ValueError, match=r"parameter group 0 holds both .name, parameter. pairs and"):
        chunkft.ChunkAdamW([first, *(p for _, p in others)])
    assert all(p.requires_grad for p in model.parameters())


class Swaps(torch.optim.SGD):
    """Of the shape of schedule-free optimizers."""

    def train(self):
        """Training weights."""

    def eval(self):
        """Averaged weights."""


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_base_that_swaps_weights_is_refused_with_the_reason(chunks):
    model = mlp()
    with pytest.raises(
        ValueError, match=r"base=Swaps cannot be used: its train\(\) and eval\(\) swap all weights"
    ):
        chunkft.ChunkOptimizer(model, Swaps, chunks=chunks, lr=0.1)
    assert "_chunkft" not in model.__dict__
