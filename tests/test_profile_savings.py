"""What a profile says would lower the peak is what a run with it measures."""

import tempfile

import pytest
import torch
from profile_rigs import batches, block, chain, llama
from torch import nn

import chunkft
from chunkft.autograd import sliced_linear_cross_entropy
from chunkft.profiling import Timeline, profile
from chunkft.profiling.savings import Setting, savings


def peak_of(model, options=None, loss=None, optimizer=None, **shape):
    # Both sides in one place: a whole sweep and one step to warm up, so that all chunks have state.
    options = {"chunks": 3, "interval": 1, "lr": 1e-4, **(options or {})}
    made = optimizer or chunkft.ChunkAdamW(model, **options)
    with tempfile.TemporaryDirectory() as out:
        return profile(model, made, batches(**shape), steps=3, warmup=3, out=out, loss=loss), made


def estimate(result, optimizer, name):
    model = optimizer._attachment.model
    inputs = {f"model.layers.{i}": 2 * 37 * 32 * 4 for i in range(3)}
    setting = Setting(model, optimizer, inputs, 1, False, True)
    found = {saving.name: saving for saving in savings(result.timeline, setting, most=99)}
    return found[name].peak_bytes


def test_estimates_are_what_a_run_with_the_saving_measures():
    base, optimizer = peak_of(llama())
    assert len(base.savings) == 3

    checkpointed = llama()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    really, _ = peak_of(checkpointed)
    assert estimate(base, optimizer, "activation checkpointing") == pytest.approx(really.peak.nbytes, rel=0.1)
    assert "activation checkpointing" not in [saving.name for saving in really.savings]

    really, _ = peak_of(llama(), {"first_moment": "bf16"})
    assert estimate(base, optimizer, "first moment in bf16") == pytest.approx(really.peak.nbytes, rel=0.01)

    really, _ = peak_of(llama(dtype=torch.bfloat16))
    assert estimate(base, optimizer, "bf16 weights") == pytest.approx(really.peak.nbytes, rel=0.1)


def test_the_estimate_for_logits_is_what_the_loss_without_them_measures():
    shape = {"shape": (6, 173)}  # many tokens: there the logits are most of it
    base, _ = peak_of(llama(), **shape)
    assert base.savings[0].name == "loss without logits"

    def loss(model, batch):
        hidden = model.model(batch["input_ids"]).last_hidden_state[:, :-1]
        active = [
            (piece, leaf)
            for piece, leaf in model.__dict__["_chunkft"].active()
            if piece.name == "lm_head.weight"
        ]
        return sliced_linear_cross_entropy(hidden, model.lm_head.weight, batch["labels"][:, 1:], active)

    really, _ = peak_of(llama(), loss=loss, **shape)
    assert base.savings[0].peak_bytes == pytest.approx(really.peak.nbytes, rel=0.05)
    assert "loss without logits" not in [saving.name for saving in really.savings]


@pytest.mark.parametrize("name", ["more chunks", "updates in the backward pass"])
def test_estimates_for_gradients_are_right_where_gradients_make_the_peak(name):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(8)))

    def loss(model, batch):
        return model(torch.ones(2, 128)).square().sum()

    options = {"residency": "stream", "page_bytes": 1 << 17, "chunks": 2}
    base, optimizer = peak_of(net(), options, loss=loss)
    estimated = estimate(base, optimizer, name)
    changed = {"chunks": 4} if name == "more chunks" else {"update": "backward"}
    really, _ = peak_of(net(), {**options, **changed}, loss=loss)
    assert estimated == pytest.approx(really.peak.nbytes, rel=0.15)
    assert really.peak.nbytes < 0.95 * base.peak.nbytes


def test_on_a_gpu_state_on_the_device_shrinks_with_chunks_and_pages():
    model = chain()
    optimizer = chunkft.ChunkAdamW(model, chunks=2, interval=1)
    before = optimizer.memory_report()
    blocks = [block("state", before.state_device.predicted, 10, None), block("other", 50, 20, None)]
    timeline = Timeline(blocks, [], before.weights.now, [])
    setting = Setting(model, optimizer, {}, 1, False, False)
    found = {saving.name: saving for saving in savings(timeline, setting, most=99)}
    halves = chunkft.ChunkAdamW(chain(), chunks=4).memory_report()
    saved = before.state_device.predicted - halves.state_device.predicted
    assert found["more chunks"].saved_bytes == pytest.approx(saved, abs=2)
    assert "state in files" not in found
    # All of this model's state fits one page: three slots would be larger than the state of a chunk.
    assert "streamed state" not in found
    big = [block("state", 100 << 20, 10, None)]
    found = {s.name: s for s in savings(Timeline(big, [], 0, []), setting, most=99)}
    paged = chunkft.ChunkAdamW(chain(), chunks=2, residency="stream").memory_report()
    assert found["streamed state"].peak_bytes == paged.state_device.predicted


def test_what_does_not_lower_the_peak_saves_nothing():
    blocks = [block("gradients", 100, 10, 20), block("other", 100, 30, 40)]
    timeline = Timeline(blocks, [], 7, [])
    setting = Setting(nn.Linear(2, 2), None, {}, 1, False, True)
    assert timeline.peak()[1] == 107
    assert savings(timeline, setting) == []  # fewer gradients leave the other moment as high
    timeline = Timeline(blocks[:1], [], 7, [])
    assert [saving.saved_bytes for saving in savings(timeline, setting)] == [100 - 100 // 16]
