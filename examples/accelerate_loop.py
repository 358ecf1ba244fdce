"""A loop of one's own with Accelerate."""

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

import chunkft

model = LlamaForCausalLM(
    LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
)
optimizer = chunkft.ChunkAdamW(model, lr=1e-3, chunks=4, interval=2)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
loader = torch.utils.data.DataLoader(torch.randint(0, 64, (32, 12)), batch_size=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for ids in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        if accelerator.sync_gradients:
            print(accelerator.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
accelerator.save_state("out")
