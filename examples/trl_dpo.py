"""TRL's DPOTrainer, with the model that comes with chunkft."""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import chunkft
from chunkft.cli.problems import embedded_model_dir

model, reference = (AutoModelForCausalLM.from_pretrained(embedded_model_dir()) for _ in range(2))
data = [{"prompt": f"{n} plus {n}", "chosen": f" is {2 * n}.", "rejected": " is many."} for n in range(16)]
trainer = DPOTrainer(
    model=model,
    ref_model=reference,
    args=DPOConfig(
        "out", max_steps=4, per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to="none"
    ),
    train_dataset=Dataset.from_list(data),
    processing_class=AutoTokenizer.from_pretrained(embedded_model_dir()),
    optimizers=(chunkft.ChunkAdamW(model, lr=1e-4, chunks=4, interval=1), None),
)
trainer.train()
