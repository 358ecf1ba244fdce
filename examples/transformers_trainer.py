"""transformers' Trainer, unmodified."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from chunkft.integrations.transformers import ChunkAdamWFactory, ChunkCallback

model = LlamaForCausalLM(
    LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
)
ids = torch.randint(0, 64, (32, 12))
trainer = Trainer(
    model=model,
    args=TrainingArguments("out", max_steps=8, logging_steps=1, use_cpu=True, report_to="none"),
    train_dataset=[{"input_ids": row, "labels": row} for row in ids],
    optimizer_cls_and_kwargs=(ChunkAdamWFactory, {"lr": 1e-3, "chunks": 4, "interval": 2}),
    callbacks=[ChunkCallback()],
)
trainer.train()
