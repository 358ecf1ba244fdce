"""A weight that was moved or replaced is followed or refused; a dead one is never trained."""

import pytest
import tiny_transformers
import torch
from helpers import holds_memory, small, small_loss, walk, window
from torch import nn

import chunkft


def assert_trains_the_living(model: nn.Module, optimizer: chunkft.ChunkOptimizer) -> None:
    """One step changes exactly the active windows of the weights that the model has now."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    small_loss(model).backward()
    pieces = [piece for piece, leaf in optimizer.active_parameters() if leaf.grad is not None]
    assert pieces
    optimizer.step()
    for name, parameter in model.named_parameters():
        changed = parameter.detach() != before[name]
        for piece in pieces:
            if piece.name == name:
                assert window(piece, changed).any(), f"{piece} did not move"
                window(piece, changed).zero_()
        assert not changed.any(), name


MOVES = {
    "data": lambda model: [setattr(p, "data", p.data.clone()) for p in model.parameters()],
    "assign": lambda model: model.load_state_dict(
        {k: v.clone() + 0.01 for k, v in model.state_dict().items()}, assign=True
    ),
    "replaced": lambda model: [
        setattr(m, k, nn.Parameter(p.detach().clone()))
        for m in model.modules()
        for k, p in list(m._parameters.items())
        if p is not None
    ],
    "there and back": lambda model: model.double().float(),
    "meta free load": lambda model: model.load_state_dict(model.state_dict()),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("slice_dim", [0, 1])
def test_weights_that_moved_are_followed(move, slice_dim):
    model = small()
    optimizer = chunkft.ChunkAdamW(model, lr=0.1, chunks=4, interval=2, slice_dim=slice_dim)
    for step in range(8):
        assert_trains_the_living(model, optimizer)
        if step in (1, 2, 5):
            MOVES[move](model)


@pytest.mark.parametrize("move", ["data", "assign", "replaced"])
def test_gradients_survive_a_move_between_backward_and_step(move):
    model, still = small(), small()
    ours = [chunkft.ChunkAdamW(m, lr=0.1, chunks=2, interval=9) for m in (model, still)]
    for m in (model, still):
        torch.manual_seed(4)
        small_loss(m).backward()
    if move == "assign":
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    else:
        MOVES[move](model)
    for optimizer in ours:
        optimizer.step()
    sliced = {piece.name for piece, _ in ours[0].active_parameters() if piece.dim is not None}
    assert sliced
    for name, p in still.named_parameters():
        if name in sliced:
            assert torch.equal(model.get_parameter(name), p), name


def test_inactive_parameters_that_became_trainable_are_frozen_again():
    model = small()
    optimizer = chunkft.ChunkAdamW(model, lr=0.1, chunks=5, interval=1)
    model.requires_grad_(True)
    small_loss(model).backward()
    optimizer.step()
    small_loss(model).backward()
    leaves = {id(leaf) for _, leaf in optimizer.active_parameters()}
    assert not any(holds_memory(p.grad) for p in model.parameters() if id(p) not in leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_another_dtype_is_refused(dtype):
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=4, interval=1)
    walk(optimizer, model, 1)
    model.to(dtype)
    with pytest.raises(RuntimeError, match=r"was torch\.float32 when the optimizer was built and is torch"):
        walk(optimizer, model, 1)
    model.float()
    walk(optimizer, model, 2)


@pytest.mark.parametrize("chunk_of_table_active", [True, False])
def test_resized_embeddings_are_refused_by_the_next_step(chunk_of_table_active):
    model = tiny_transformers.build("llama")
    loss = tiny_transformers.loss_of("llama")
    order = [["model.embed_tokens.weight"], ["model.layers.*", "model.norm.*", "lm_head.*"]]
    optimizer = chunkft.ChunkAdamW(
        model, chunks=None, partition=order if chunk_of_table_active else order[::-1], interval=50
    )
    model.resize_token_embeddings(70)
    with pytest.raises(
        RuntimeError, match=r"'model.embed_tokens.weight' had shape \(61, 36\) .* \(70, 36\) now; detach\(\)"
    ):
        walk(optimizer, model, 1, loss)
    optimizer.detach()
    assert all(p.requires_grad for p in model.parameters())
    optimizer = chunkft.ChunkAdamW(model, chunks=3, interval=1)
    walk(optimizer, model, 3, loss)


def test_a_parameter_that_is_gone_is_refused():
    model = small()
    optimizer = chunkft.ChunkAdamW(model, chunks=2)
    model[4] = nn.Identity()
    with pytest.raises(RuntimeError, match=r"'4\.weight' is no longer in the model"):
        walk(optimizer, model, 1)


def test_weights_tied_after_the_fact_are_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    optimizer = chunkft.ChunkAdamW(model, chunks=None, partition=[["1.*"], ["0.*"]])
    model[1].weight = model[0].weight
    with pytest.raises(RuntimeError, match=r"'1\.weight' is tied to another parameter now"):
        walk(optimizer, model, 1, lambda m: m(torch.randn(2, 6)).sum())


@pytest.mark.parametrize("move", ["assign", "replaced"])
@pytest.mark.parametrize("slice_dim", [0, 1])
def test_gradients_of_a_window_are_complete_where_weights_are_replaced_in_it(move, slice_dim):
    """Sliced and whole parameters alike: what comes in the place of a weight takes its gradient along."""
    model, still = small(), small()
    ours = [chunkft.ChunkAdamW(m, lr=0.1, chunks=1, slice_dim=slice_dim) for m in (model, still)]
    for batch in range(2):
        for m in (model, still):
            torch.manual_seed(batch)
            small_loss(m).backward()
        if move == "assign" and not batch:
            model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        elif not batch:
            MOVES[move](model)
    for optimizer in ours:
        optimizer.step()
    for (name, p), q in zip(model.named_parameters(), still.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name
