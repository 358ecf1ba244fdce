"""Experts whose weights are cut into several slices: updates inside of the backward pass, second derivatives."""

import copy

import pytest
import torch
from helpers import window

import chunkft

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def mixtral(implementation, layers=1):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=8, num_local_experts=6, num_experts_per_tok=2, attn_implementation="eager",
    )  # fmt: skip
    config._experts_implementation = implementation
    return transformers.MixtralForCausalLM(config).train()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize(("chunks", "tokens"), [(1, 2), (3, 20), (5, 2)])
def test_updates_in_the_backward_pass_are_those_of_the_step(implementation, chunks, tokens):
    results = []
    for update in ("step", "backward"):
        model = mixtral(implementation, layers=2)
        settings = {"residency": "stream", "update": update, "page_bytes": 2000}
        optimizer = chunkft.ChunkAdamW(model, lr=1e-2, chunks=chunks, interval=1, **settings)
        torch.manual_seed(1)
        for _ in range(chunks + 1):
            ids = torch.randint(3, 61, (1, tokens))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        results.append(dict(model.named_parameters()))
    for name, parameter in results[0].items():
        assert torch.equal(parameter, results[1][name]), name


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_gradient_penalties_are_those_of_dense_autograd(implementation, chunks):
    model = mixtral(implementation)
    dense = copy.deepcopy(model)
    ids = torch.randint(3, 61, (1, 7), generator=torch.Generator().manual_seed(2))

    def penalty(net):
        rows = net.get_input_embeddings()(ids).detach().requires_grad_(True)
        loss = net(inputs_embeds=rows, labels=ids).loss
        (slope,) = torch.autograd.grad(loss, rows, create_graph=True)
        return loss + 100 * slope.square().sum()

    penalty(dense).backward()
    expected = dict(dense.named_parameters())
    optimizer = chunkft.ChunkAdamW(model, lr=0.0, chunks=chunks, interval=1)
    seen = 0
    for _ in range(chunks):
        penalty(model).backward()
        for piece, leaf in optimizer.active_parameters():
            if leaf.grad is not None and "experts" in piece.name:
                torch.testing.assert_close(leaf.grad, window(piece, expected[piece.name].grad))
                seen += 1
        optimizer.step()
    assert seen >= 2


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_weights_that_changed_before_the_backward_pass_are_noticed(implementation):
    model = mixtral(implementation)
    chunkft.ChunkAdamW(model, chunks=1)
    ids = torch.arange(3, 8)[None]
    loss = model(input_ids=ids, labels=ids).loss
    experts = next(p for name, p in model.named_parameters() if name.endswith("down_proj"))
    with torch.no_grad():
        experts.mul_(2)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()
