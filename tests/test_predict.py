"""Memory predicted from shapes is the memory that was counted."""

import json
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import chunkft  # noqa: E402
from bench import common, llama, predict  # noqa: E402

COUNTED = json.loads((common.RESULTS / "memory-cpu.json").read_text())
CHUNKED = [c for c in COUNTED["cases"] if c["variant"]["method"] == "chunk" and len(c["variant"]) == 2]


@pytest.fixture(scope="module")
def shapes():
    """The model that bench.memory trained, without memory."""
    with torch.device("meta"):
        return llama.build_model(llama.Size(**COUNTED["size"]))


@pytest.mark.parametrize("case", CHUNKED, ids=lambda c: f"K={c['variant']['chunks']}")
def test_predicted_gradients_and_state_are_those_that_were_counted_in_training(case, shapes):
    most = max(chunk.numel for chunk in chunkft.partition(shapes, case["variant"]["chunks"]))
    assert 4 * most == case["gradients"]
    # Counting came between two steps, where the largest chunk has no state of its own yet.
    assert predict.MOMENTS * most == pytest.approx(case["state"], rel=0.05)


@pytest.mark.parametrize("chunks", [1, 3, 7])
def test_predicted_activations_are_what_autograd_keeps_of_a_run(chunks):
    shape = predict.plain_llama.Shape(48, 3, 80, 4, 2, 97)
    model = predict.plain_llama.PlainLlama(shape, checkpointing=True)
    ids = torch.randint(0, shape.vocab, (3, 18))
    plan = chunkft.partition(model, chunks)
    counted = []
    attachment = chunkft.attach(model)
    attachment.freeze()
    for chunk in plan:
        attachment.activate(chunk.slices)
        with chunkft.saved_activations(model) as saved:
            loss = model(ids)
        counted.append(saved.live_bytes)
        del loss
    attachment.detach()
    model.to("meta")
    predicted = [predict.saved_bytes(model, c.slices, lambda: model(ids.to("meta"))) for c in plan]
    assert predicted == counted


def test_a_chunk_that_the_forward_pass_does_not_use_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).to("meta")
    unused = chunkft.partition(model, None, by=[["0.*"], ["1.*"]]).chunks[1].slices
    with pytest.raises(ValueError, match="none of the active slices"):
        predict.saved_bytes(model, unused, lambda: model[0](torch.empty(2, 8, device="meta")))
    assert all(p.requires_grad for p in model.parameters())


def test_a_recomputed_block_grows_with_the_tokens_and_not_with_their_square():
    model = predict.plain_llama.PlainLlama(predict.plain_llama.SHAPES["tiny"]).to("meta")
    assert predict.recomputed_block(model, 1, 130) == 2 * predict.recomputed_block(model, 1, 65)


def test_parts_add_up_to_the_peak_and_chunks_take_from_it():
    model = predict.plain_llama.PlainLlama(predict.plain_llama.SHAPES["tiny"]).bfloat16().to("meta")
    rows = predict.held(model, 1, 33)
    for row in rows:
        parts = ("weights", "gradients", "state", "activations", "backward")
        assert row["peak"] == sum(row[p] for p in parts)
    paged = [r for r in rows if r["variant"] == "chunkft, paged"]
    assert all(r["gradients"] < rows[0]["gradients"] for r in paged)
    assert paged[-1]["state"] < paged[0]["state"] < rows[0]["state"]
