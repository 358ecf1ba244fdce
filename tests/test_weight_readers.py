"""Weights that some module reads without calling the one that holds them still get exact gradients."""

import gc
import warnings
import weakref

import pytest
import tiny_transformers
import torch
import torch.nn.functional as F
from helpers import assert_slices_equal_dense, chunk_gradients, holds_memory
from torch import nn

import chunkft

MESSAGE = r"the weight '(.*)' is used without a call of the module that holds it"


class Reader(nn.Module):
    """Uses one weight by calling its module, by reading it, or by both."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.table = nn.Embedding(23, 12)
        self.project = nn.Linear(12, 17)
        self.back = nn.Linear(17, 12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        h = F.linear(x, self.project.weight, self.project.bias) if self.mode != "called" else self.project(x)
        if self.mode == "both":
            h = h + self.project(x.sin())
        if self.mode == "sparse":
            x = x + F.embedding(ids, self.table.weight, sparse=True)
        return F.linear(x + self.back(h.tanh()), self.table.weight)  # an output layer that is tied by reading


def reader_loss(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(20).view(4, 5)
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


@pytest.mark.filterwarnings("ignore:the weight")
@pytest.mark.parametrize("mode", ["called", "read", "both", "sparse"])
@pytest.mark.parametrize("slice_dim", [0, 1])
@pytest.mark.parametrize("chunks", [1, 7])
def test_slices_of_weights_that_are_read_equal_dense_ones(mode, slice_dim, chunks):
    model = Reader(mode)
    plan = chunkft.partition(model, chunks, slice_dim=slice_dim, row_multiple=1)
    assert_slices_equal_dense(model, plan, reader_loss)


@pytest.mark.filterwarnings("ignore:the weight")
def test_gradients_accumulate_over_micro_batches():
    single, double = ({}, {})
    for times, found in ((1, single), (2, double)):
        torch.manual_seed(0)
        model = Reader("both")
        plan = chunkft.partition(model, 5, row_multiple=1)
        found.update(
            chunk_gradients(model, plan, lambda m, times=times: sum(reader_loss(m) for _ in range(times)))
        )
        if times == 2:
            attachment = chunkft.attach(model)
            attachment.freeze()
            for chunk in plan:
                pairs = attachment.activate(chunk.slices)
                for _ in range(2):
                    reader_loss(model).backward()
                for piece, leaf in pairs:
                    torch.testing.assert_close(leaf.grad, found[piece])
    for piece, gradient in single.items():
        torch.testing.assert_close(double[piece], 2 * gradient)


def test_the_user_is_told_once_with_a_name_and_a_way_out():
    model = nn.Sequential(*(Reader("read") for _ in range(2)))
    ids = torch.arange(4)

    def loss(m):
        return sum(part(ids).square().sum() for part in m)

    optimizer = chunkft.ChunkAdamW(model, chunks=6, interval=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(12):
            loss(model).backward()
            optimizer.step()
    told = [str(w.message) for w in caught if "without a call" in str(w.message)]
    assert len(told) == 2
    assert all("exact, but without the savings" in message for message in told)
    assert {message.split("atomic='")[1].split("'")[0] for message in told} == {
        "*.table.weight",
        "*.project.weight",
    }
    optimizer.detach()
    plan = chunkft.partition(model, 6, atomic=["*.table.weight", "*.project.weight"])
    optimizer = chunkft.ChunkAdamW(model, chunks=6, partition=plan, interval=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            loss(model).backward()
            optimizer.step()


def test_calling_the_module_warns_of_nothing():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    optimizer = chunkft.ChunkAdamW(model, chunks=4, interval=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            x = model[1](model[0](torch.arange(6)))
            model[2](x, x, x)[0].square().sum().backward()
            optimizer.step()


@pytest.mark.filterwarnings("ignore:the weight")
@pytest.mark.parametrize("training", [True, False])
def test_torch_transformer_layers_train_in_both_modes(training):
    # In evaluation mode they have a fast path that reads all weights, unless one of them requires grad.
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(9, 12), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    model.train(training)
    ids = torch.arange(8).view(2, 4)
    plan = chunkft.partition(model, 9, row_multiple=1)
    dense = {}
    model(ids).square().sum().backward()
    dense = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    for piece, gradient in chunk_gradients(model, plan, lambda m: m(ids).square().sum()):
        torch.testing.assert_close(gradient, piece.of(dense[piece.name]), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the weight")
def test_the_dense_gradient_does_not_outlive_the_backward_pass():
    model = Reader("read")
    optimizer = chunkft.ChunkAdamW(model, chunks=6, interval=1)
    for _ in range(6):
        reader_loss(model).backward()
        assert all(
            leaf.grad.untyped_storage().nbytes() == leaf.grad.numel() * 4
            for piece, leaf in optimizer.active_parameters()
            if piece.dim is not None
        )
        leaves = {id(leaf) for _, leaf in optimizer.active_parameters()}
        assert not any(holds_memory(p.grad) for p in model.parameters() if id(p) not in leaves)
        optimizer.step()


@pytest.mark.filterwarnings("ignore:the weight")
def test_hooks_keep_nothing_alive():
    model = Reader("read")
    optimizer = chunkft.ChunkAdamW(model, chunks=2, interval=1)
    reader_loss(model).backward()
    optimizer.step()
    references = [weakref.ref(thing) for thing in (model, optimizer, *model.parameters())]
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("mamba", {"backbone.layers.0.mixer.dt_proj.weight"}),
        ("deberta-v2", {"deberta.encoder.rel_embeddings.weight"}),
        ("mobilebert", {"mobilebert.embeddings.word_embeddings.weight", "cls.predictions.dense.weight"}),
    ],
)
def test_families_that_read_weights_are_noticed_and_right(family, names):
    # That their gradients equal dense ones is in test_architectures.py.
    model = tiny_transformers.build(family, num_hidden_layers=1)
    optimizer = chunkft.ChunkAdamW(model, chunks=1)
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        tiny_transformers.loss_of(family)(model).backward()
    assert {str(w.message).split("'")[1] for w in caught if "without a call" in str(w.message)} == names
    assert all(leaf.grad is not None for _, leaf in optimizer.active_parameters())
