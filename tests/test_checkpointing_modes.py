"""Activation checkpointing: non-reentrant gives the same gradients; reentrant does, or says why it cannot."""

import copy

import pytest
import tiny_transformers
import torch
from helpers import assert_slices_equal_dense, chunk_gradients, dense_gradients, window
from torch import nn
from torch.utils.checkpoint import checkpoint

import chunkft


class Net(nn.Module):
    """Blocks that are checkpointed, between an embedding and a head that are not."""

    def __init__(self, reentrant: bool | None, nested: bool = False) -> None:
        super().__init__()
        self.reentrant, self.nested = reentrant, nested
        self.table = nn.Embedding(31, 18)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(18), nn.Linear(18, 25), nn.GELU(), nn.Dropout(0.2), nn.Linear(25, 18))
            for _ in range(2)
        )
        self.head = nn.Linear(18, 31, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = x + self.run(block, x)
        return self.head(x)

    def run(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None:
            return block(x)
        if self.nested:
            inner = block
            block = lambda x: checkpoint(inner, x * 1.0, use_reentrant=self.reentrant)  # noqa: E731
        return checkpoint(block, x, use_reentrant=self.reentrant)


FIRST_BLOCK = [
    ["blocks.0.1.weight", "blocks.0.0.*"],
    ["table.*", "head.*", "blocks.1.*", "blocks.0.1.bias", "blocks.0.4.*"],
]
IDS = torch.arange(30).view(3, 10)


def net_loss(model: nn.Module) -> torch.Tensor:
    return model(IDS).logsumexp(-1).sum()


def lost(chunk: chunkft.Chunk) -> bool:
    """Whether reentrant checkpointing would lose gradients: a block is active and nothing below all blocks."""
    names = [piece.name for piece in chunk.slices]
    return not any(n.startswith("table") for n in names) and any(n.startswith("blocks") for n in names)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("slice_dim", [0, 1])
@pytest.mark.parametrize("chunks", [1, 8])
def test_non_reentrant_slices_equal_dense_ones_without_checkpointing(chunks, slice_dim, nested):
    model, plain = Net(False, nested), Net(None)
    plain.load_state_dict(model.state_dict())
    dense = dense_gradients(plain, net_loss, seed=7)
    plan = chunkft.partition(model, chunks, slice_dim=slice_dim, row_multiple=1)
    for piece, gradient in chunk_gradients(model, plan, net_loss, seed=7):
        assert torch.equal(gradient, window(piece, dense[piece.name])), str(piece)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("by", "chunks"), [("bytes", 6), ("layers", 3), ("interleaved", 4)])
def test_reentrant_slices_equal_dense_ones_where_an_input_requires_grad(by, chunks, nested):
    model = Net(True, nested)
    plan = chunkft.partition(model, chunks, by, row_multiple=1, always_active="table.*")
    assert_slices_equal_dense(model, plan, net_loss, seed=7)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("slice_dim", [0, 1])
def test_reentrant_is_right_or_refused_for_every_chunk(slice_dim, training, nested):
    # In evaluation mode too: some fine-tune so, without dropout.
    model = Net(True, nested).train(training)
    dense = dense_gradients(copy.deepcopy(model), net_loss, seed=7)
    plan = chunkft.partition(model, 12, slice_dim=slice_dim, row_multiple=1)
    attachment = chunkft.attach(model)
    attachment.freeze()
    assert {lost(chunk) for chunk in plan} == {True, False}
    for chunk in plan:
        pairs = attachment.activate(chunk.slices)
        torch.manual_seed(7)
        if lost(chunk):
            with pytest.raises(RuntimeError, match="use_reentrant=True"):
                net_loss(model)
            continue
        net_loss(model).backward()
        for piece, leaf in pairs:
            assert torch.equal(leaf.grad, window(piece, dense[piece.name])), str(piece)


def test_the_error_names_the_module_and_both_ways_out():
    model = Net(True)
    rest = ["table.*", "head.*", "blocks.1.*", "blocks.0.0.*", "blocks.0.1.bias", "blocks.0.4.*"]
    chunkft.ChunkAdamW(model, chunks=None, partition=[["blocks.0.1.weight"], rest])
    with pytest.raises(
        RuntimeError,
        match=r"would lose the gradients of Linear: .* use_reentrant=False, or call model\.enable_input_require_grads",
    ):
        net_loss(model)


def test_chunks_with_atomic_parameters_only_are_refused_too():
    model = Net(True)
    groups = [["blocks.0.0.*"], ["table.*", "head.*", "blocks.1.*", "blocks.0.1.*", "blocks.0.4.*"]]
    optimizer = chunkft.ChunkAdamW(model, chunks=None, partition=groups, interval=1)
    with pytest.raises(RuntimeError, match="would lose the gradients of LayerNorm"):
        net_loss(model)
    optimizer.detach()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    net_loss(model).backward()


def test_passes_without_grad_mode_lose_nothing_and_are_not_refused():
    model = Net(True)
    chunkft.ChunkAdamW(model, chunks=None, partition=FIRST_BLOCK)
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            net_loss(model)
        with torch.inference_mode():
            net_loss(model)
    model.train()
    with pytest.raises(RuntimeError, match="would lose"):
        net_loss(model)


def test_an_error_inside_of_the_forward_pass_does_not_switch_the_check_off():
    model = Net(True)
    chunkft.ChunkAdamW(model, chunks=None, partition=FIRST_BLOCK)
    with torch.no_grad(), pytest.raises(IndexError):
        model(IDS + 1000)
    with pytest.raises(RuntimeError, match="would lose"):
        model.run(model.blocks[0], torch.randn(2, 18))
    with pytest.raises(RuntimeError, match="would lose"):
        net_loss(model)


def checkpointed(family: str, reentrant: bool, input_grads: bool) -> nn.Module:
    """A model from transformers, which by itself makes the embedded input require grad."""
    model = tiny_transformers.build(family)
    options = {"use_reentrant": reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
    if not input_grads:
        model.disable_input_require_grads()
    return model


@pytest.mark.parametrize(("reentrant", "input_grads"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_transformers_models(family, reentrant, input_grads):
    loss = tiny_transformers.loss_of(family)
    dense = dense_gradients(checkpointed(family, reentrant, input_grads), loss)
    model = checkpointed(family, reentrant, input_grads)
    plan = chunkft.partition(model, 6, row_multiple=1)
    for piece, gradient in chunk_gradients(model, plan, loss):
        assert torch.equal(gradient, window(piece, dense[piece.name])), str(piece)


def test_transformers_models_refuse_reentrant_without_a_gradient_at_the_input():
    model = checkpointed("llama", reentrant=True, input_grads=False)
    loss = tiny_transformers.loss_of("llama")
    norms = ["model.layers.0.*norm.weight"]
    others = [
        "model.embed_tokens.*",
        "model.layers.1.*",
        "model.norm.*",
        "lm_head.*",
        "model.layers.0.*proj.weight",
    ]
    optimizer = chunkft.ChunkAdamW(model, chunks=None, partition=[norms, others], interval=1)
    with pytest.raises(RuntimeError, match="would lose the gradients of LlamaRMSNorm"):
        loss(model)
    model.enable_input_require_grads()
    for _ in range(2):
        loss(model).backward()
        assert all(leaf.grad is not None for _, leaf in optimizer.active_parameters())
        optimizer.step()


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_checkpoints_goes_the_way_of_training_without(reentrant):
    results = []
    for mode in (None, reentrant):
        torch.manual_seed(0)
        model = Net(mode)
        optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=5, interval=2, always_active="table.*")
        for step in range(20):
            torch.manual_seed(step)
            net_loss(model).backward()
            optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
