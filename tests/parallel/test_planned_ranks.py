"""What the planner promises of ranks that divide a chunk: no byte less than each of them holds."""

import pytest
import torch
from planner_rigs import counted_peak
from transformers import AutoModelForCausalLM, LlamaConfig

import chunkft
from chunkft.optim.planner.estimate import Model
from chunkft.optim.planner.setting import Setting
from chunkft.optim.planner.twin import language_model_step

BATCH, TOKENS, VOCABULARY = 2, 24, 192


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config).train()


def loss_of(model, input_ids):
    return model(input_ids=input_ids, labels=input_ids).loss


def counted(group, chunks, residency):
    ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    arguments = {"chunks": chunks, "residency": residency, "page_bytes": 1 << 15, "process_group": group}
    peak = counted_peak(llama(), arguments, loss_of, input_ids=ids)
    optimizer = chunkft.ChunkAdamW(llama(), interval=1, **arguments)
    for _ in range(chunks):
        loss_of(optimizer._attachment.model, ids).backward()
        optimizer.step()
    held = optimizer.memory()
    optimizer.detach()
    return peak, held["state_host"]


@pytest.mark.parametrize("residency", ["chunk", "stream"])
@pytest.mark.parametrize(("world", "chunks"), [(2, 1), (2, 4), (3, 3)])
def test_promised_bytes_are_not_less_than_counted_ones(pool, world, chunks, residency):
    base = torch.optim.AdamW, {"lr": 1e-4}
    planned = Model(llama(), language_model_step, BATCH, TOKENS, *base, 1 << 15, device="cpu", world=world)
    setting = Setting(chunks=chunks, residency=residency, checkpointing=None)
    promised, host = planned.gpu(setting).total, planned.host(setting).total
    for peak, in_host in pool.run(world, counted, chunks, residency):
        assert peak <= promised <= 1.3 * peak
        assert in_host <= host <= 1.01 * in_host or in_host == 0  # a single chunk never rests


def test_ranks_divide_the_state_and_hold_all_weights():
    one, four = (chunkft.plan_memory(llama(), gpu="1GiB", tokens=TOKENS, world=n, chunks=4) for n in (1, 4))
    assert four.setting.weights == "resident"
    assert four.gpu.weights == one.gpu.weights
    assert one.gpu.state / 4 <= four.gpu.state <= 1.2 * one.gpu.state / 4
    assert one.host.state / 4 <= four.host.state <= 1.2 * one.host.state / 4
    with pytest.raises(
        ValueError, match=r"weights='stream' cannot be planned with world=2; allowed there: 'resident'"
    ):
        chunkft.plan_memory(llama(), gpu="1GiB", world=2, weights="stream")
