"""--gradient-checkpointing keeps the backward pass from running below the active chunk."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft
from chunkft.cli.models import enable_gradient_checkpointing


def test_embeddings_need_no_gradient_while_a_chunk_above_them_is_active():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, vocab_size=128
    )
    model = LlamaForCausalLM(config).train()
    enable_gradient_checkpointing(model)
    optimizer = chunkft.ChunkAdamW(model, lr=1e-3, chunks=8, interval=1, schedule="reverse")
    needed: list[bool] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: needed.append(output.requires_grad)
    )
    ids = torch.randint(0, 128, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    assert needed == [False]
    assert all(leaf.grad is not None for _, leaf in optimizer.active_parameters())
