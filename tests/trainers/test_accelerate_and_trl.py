"""Accelerate's loop and TRL's trainers train as a loop in plain PyTorch does."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from test_transformers_trainer import IDS, OPTIONS, build, same
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, AutoTokenizer

import chunkft
from chunkft.cli.problems import embedded_model_dir


def accelerated(model, place, steps=range(24)):
    """Trains on pairs of rows, two to a step; returns the accelerator and the norms."""
    optimizer = chunkft.ChunkAdamW(model, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=2, project_config=ProjectConfiguration(str(place))
    )
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    if steps.start:
        accelerator.load_state(str(place / "state"))
    norms = []
    for number in steps:
        ids = IDS[2 * number : 2 * number + 2]
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.4))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return accelerator, norms


def test_accelerate_equals_a_plain_loop(tmp_path):
    model, plain = build(0.0), build(0.0)
    _, norms = accelerated(model, tmp_path)
    optimizer = chunkft.ChunkAdamW(plain, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    expected = []
    for number in range(24):
        ids = IDS[2 * number : 2 * number + 2]
        (plain(input_ids=ids, labels=ids).loss / 2).backward()
        if number % 2:
            expected.append(clip_grad_norm_(plain.parameters(), 0.4))
            optimizer.step()
            scheduler.step()
            plain.zero_grad()
    assert norms == expected
    assert max(map(float, norms)) > 0.4  # some are clipped
    assert same(model, plain)


def test_accelerate_resumes_to_the_same_bits(tmp_path):
    whole, cut, resumed = build(0.0), build(0.0), build(0.0)
    accelerated(whole, tmp_path)
    accelerator, _ = accelerated(cut, tmp_path, range(10))
    accelerator.save_state(str(tmp_path / "state"))
    accelerated(resumed, tmp_path, range(10, 24))
    assert same(whole, resumed)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_with_one_chunk_is_trl_with_adamw(kind, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    rows = [
        {"prompt": f"{n} plus {n}", "chosen": f" is {2 * n}.", "rejected": " is many."} for n in range(12)
    ]
    models, histories = [], []
    for chunked in (False, True):
        model = AutoModelForCausalLM.from_pretrained(embedded_model_dir())
        optimizer = (
            chunkft.ChunkAdamW(model, lr=1e-3, chunks=1)
            if chunked
            else torch.optim.AdamW(model.parameters(), lr=1e-3)
        )
        settings = {
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "max_grad_norm": 0.2,
            "logging_steps": 1,
        }
        place = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
        common = {"model": model, "processing_class": tokenizer, "optimizers": (optimizer, None)}
        if kind == "sft":
            data = datasets.Dataset.from_list(
                [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows]
            )
            trainer = trl.SFTTrainer(args=trl.SFTConfig(**settings, **place), train_dataset=data, **common)
        else:
            reference = AutoModelForCausalLM.from_pretrained(embedded_model_dir())
            trainer = trl.DPOTrainer(
                ref_model=reference,
                args=trl.DPOConfig(**settings, **place),
                train_dataset=datasets.Dataset.from_list(rows),
                **common,
            )
        trainer.train()
        models.append(model)
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        histories.append([(entry["loss"], entry["grad_norm"], entry["learning_rate"]) for entry in logs])
    assert histories[0] == histories[1]
    assert len(histories[0]) == 3
    assert max(norm for _, norm, _ in histories[0]) > 0.2
    assert same(*models)
