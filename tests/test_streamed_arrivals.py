"""Gradients of leaves in host memory come down while the backward pass goes on below them."""

import pytest
import torch

import chunkft
from bench import plain_llama
from chunkft.weights import stream_of

SHAPE = plain_llama.Shape(32, 4, 48, 2, 2, 64)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_come_down_before_the_blocks_below_are_computed(checkpointing, monkeypatch):
    """What comes at the end alone is hidden behind nothing, and keeps all gradients of a chunk on the device."""
    torch.manual_seed(0)
    model = plain_llama.PlainLlama(SHAPE, checkpointing).train()
    optimizer = chunkft.ChunkAdamW(model, chunks=1, weights="stream", update_on="host", device="cpu")
    ring, inbox = stream_of(model).ring, optimizer._attachment.wiring.residence._inbox
    seen = []
    receive, leave = inbox._receive, ring.leave
    monkeypatch.setattr(inbox, "_receive", lambda *args: (seen.append("gradient"), receive(*args)))
    loss = model(torch.randint(0, SHAPE.vocab, (1, 9)))
    monkeypatch.setattr(ring, "leave", lambda number: (seen.append(number), leave(number)))
    loss.backward()
    text = "".join("g" if one == "gradient" else str(one) for one in seen)
    # those of the seven matrices of a block before it leaves the device, and the table's at the end
    assert text == "ggggggg3ggggggg2ggggggg1ggggggg0g"
    assert all(leaf.grad is not None for _, leaf in optimizer.active_parameters())
    optimizer.detach()
