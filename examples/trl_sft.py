"""TRL's SFTTrainer, with the model that comes with chunkft."""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import chunkft
from chunkft.cli.problems import embedded_model_dir

model = AutoModelForCausalLM.from_pretrained(embedded_model_dir())
data = [{"prompt": f"{n} plus {n}", "completion": f" is {2 * n}."} for n in range(16)]
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        "out", max_steps=4, per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to="none"
    ),
    train_dataset=Dataset.from_list(data),
    processing_class=AutoTokenizer.from_pretrained(embedded_model_dir()),
    optimizers=(chunkft.ChunkAdamW(model, lr=1e-3, chunks=4, interval=1), None),
)
trainer.train()
