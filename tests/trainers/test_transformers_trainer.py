"""An unmodified transformers Trainer trains as a loop in plain PyTorch does, and resumes to the same bits."""

import copy

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_scheduler

import chunkft
from chunkft.integrations.transformers import ChunkAdamWFactory, ChunkCallback

OPTIONS = {"lr": 5e-3, "chunks": 3, "interval": 2}
IDS = torch.randint(0, 61, (48, 9), generator=torch.Generator().manual_seed(3))
# the older name is that of transformers 5.17
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
LENGTHS = [3 + 5 * n % 7 for n in range(len(IDS))]


def build(dropout: float = 0.1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=36,
        intermediate_size=45,
        num_hidden_layers=2,
        num_attention_heads=3,
        vocab_size=61,
        attention_dropout=dropout,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class Recorder(Trainer):
    """Notes the batches that were trained on; changes nothing."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("batches", []).append({k: v.clone() for k, v in inputs.items()})
        return super().training_step(model, inputs, *args, **kwargs)


def checkpointing(**options) -> dict[str, object]:
    return {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": options}


def arguments(place, **changes) -> TrainingArguments:
    basis = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "max_grad_norm": 0.4,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(str(place), **{**basis, **changes})


def trainer_of(model, place, optimizer=None, kind=Recorder, lengths=None, **changes) -> Trainer:
    rows = IDS if lengths is None else [row[:n] for row, n in zip(IDS, lengths, strict=True)]
    optimizer = optimizer or chunkft.ChunkAdamW(model, **OPTIONS)
    data = [{"input_ids": row, "labels": row} for row in rows]
    return kind(
        model=model,
        args=arguments(place, **changes),
        train_dataset=data,
        eval_dataset=data[:4],
        optimizers=(optimizer, None),
        callbacks=[ChunkCallback()],
    )


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"max_grad_norm": 0.0},
        {"label_smoothing_factor": 0.1},
        checkpointing(use_reentrant=False),
        {"bf16": True},
    ],
    ids=lambda changes: next(iter(changes), "plain"),
)
def test_trainer_equals_a_plain_loop(changes, tmp_path):
    model, plain = build(), build()
    trainer = trainer_of(model, tmp_path, **changes)
    torch.manual_seed(5)
    start = []
    trainer.add_callback(_SeedAtBegin(start))
    trainer.train()
    assert not same(model, plain)

    optimizer = chunkft.ChunkAdamW(plain, **OPTIONS)
    schedule = get_scheduler("linear", optimizer, 0, 8)
    twin = trainer_of(plain, tmp_path, optimizer, Trainer, **changes)  # its loss function only
    if CHECKPOINTING in changes:
        getattr(plain, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    plain.train()
    torch.set_rng_state(start[0])
    norms, rates = [], []
    accumulated = changes.get("gradient_accumulation_steps", 1)
    twin.current_gradient_accumulation_steps = accumulated
    batches = iter(trainer.batches)
    for _ in range(8):
        window = [next(batches) for _ in range(accumulated)]
        items = sum(int((batch["labels"][..., 1:] != -100).sum()) for batch in window)
        for batch in window:
            with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in changes):
                loss = twin.compute_loss(plain, dict(batch), num_items_in_batch=torch.tensor(items))
            loss.backward()
        norms.append(clip_grad_norm_(plain.parameters(), changes.get("max_grad_norm", 0.4) or float("inf")))
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
        plain.zero_grad()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["grad_norm"] for entry in logs] == [float(norm) for norm in norms]
    assert max(float(norm) for norm in norms) > 0.4  # some are clipped
    assert [entry["chunk"] for entry in logs] == [0, 0, 1, 1, 2, 2, 0, 0]
    assert [entry["sweep"] for entry in logs] == [0] * 6 + [1] * 2
    assert same(model, plain)


class _SeedAtBegin(ChunkCallback):
    """Notes the state of the generator when the first step begins."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.found:
            self.found.append(torch.get_rng_state())


@pytest.mark.parametrize("factory", [True, False], ids=["factory", "groups"])
def test_one_chunk_by_optimizer_cls_and_kwargs_is_trainers_adamw(factory, tmp_path):
    models = build(), build()
    if not factory:
        chunkft.attach(models[1])
    kind = ChunkAdamWFactory if factory else chunkft.ChunkAdamW
    settings = {"lr": 5e-3, "weight_decay": 0.1}
    found = []
    for model, choice in zip(
        models, ((torch.optim.AdamW, settings), (kind, {**settings, "chunks": 1})), strict=True
    ):
        data = [{"input_ids": row, "labels": row} for row in IDS]
        trainer = Trainer(
            model,
            arguments(tmp_path, weight_decay=0.1),
            train_dataset=data,
            optimizer_cls_and_kwargs=choice
            if factory or model is models[0]
            else (kind, {"lr": 5e-3, "chunks": 1}),
        )
        trainer.train()
        decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
        found.append(([e.get("learning_rate") for e in trainer.state.log_history], decays))
    assert found[0][0] == found[1][0]
    assert found[0][1][-1] == found[1][1][-1] == 0.0
    assert found[0][1][0] == found[1][1][0] == 0.1
    assert same(*models)


def test_a_factory_that_is_refused_leaves_the_model_as_it_was():
    model = build()
    with pytest.raises(ValueError, match=r"interval=0"):
        ChunkAdamWFactory()(model, interval=0)
    assert "_chunkft" not in model.__dict__
    assert all(p.requires_grad for p in model.parameters())


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path):
    whole, first, second = build(), build(), build()
    trainer_of(whole, tmp_path / "whole").train()
    trainer_of(first, tmp_path / "cut", save_strategy="steps", save_steps=3).train()
    resumed = trainer_of(second, tmp_path / "cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert len(resumed.batches) == 5
    assert same(whole, first)
    assert same(whole, second)


def test_the_best_model_is_loaded_at_the_end_and_evaluation_changes_nothing(tmp_path):
    model, plain = build(0.0), build(0.0)  # evaluation draws random numbers, which dropout would notice
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(
        model, tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", **changes
    )
    trainer.train()
    best = LlamaForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert same(model, best)
    without = trainer_of(plain, tmp_path / "plain")
    without.train()
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (trainer, without)]
    assert losses[0] == losses[1]


def test_reentrant_checkpointing_trains_to_the_same_bits(tmp_path, monkeypatch):
    calls = []
    forward = torch.utils.checkpoint.CheckpointFunction.forward
    monkeypatch.setattr(
        torch.utils.checkpoint.CheckpointFunction,
        "forward",
        staticmethod(lambda *args: (calls.append(1), forward(*args))[1]),
    )
    changes = checkpointing(use_reentrant=True)
    models = build(), build()
    models[0].enable_input_require_grads()
    trainer_of(models[0], tmp_path, **changes).train()
    assert len(calls) == 16  # two layers, eight steps
    trainer_of(models[1], tmp_path).train()
    assert same(*models)


def test_updates_in_the_backward_pass_need_clipping_off(tmp_path):
    model = build()
    optimizer = chunkft.ChunkAdamW(model, residency="stream", update="backward", page_bytes=4096, **OPTIONS)
    with pytest.raises(ValueError, match=r"max_grad_norm=0\.4\) cannot be combined with update='backward'"):
        trainer_of(model, tmp_path, optimizer).train()
    trainer = trainer_of(model, tmp_path, optimizer, max_grad_norm=0)
    trainer.train()
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_with_one_chunk_is_adamws(precision, tmp_path):
    models = build(), build()
    for model, optimizer in zip(
        models,
        (
            torch.optim.AdamW(models[0].parameters(), lr=5e-3),
            chunkft.ChunkAdamW(models[1], lr=5e-3, chunks=1),
        ),
        strict=True,
    ):
        trainer_of(model, tmp_path, optimizer, **{precision: True}).train()
    assert same(*models)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_trains_all_chunks_without_compiling_again(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, eager = build(0.0), build(0.0)
    seen = []

    class Count(ChunkCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    for m, changes in ((model, {"torch_compile_backend": "aot_eager"}), (eager, {})):
        optimizer = chunkft.ChunkAdamW(m, always_active=["*norm*"], **{**OPTIONS, "interval": 1})
        trainer = trainer_of(m, tmp_path, optimizer, **changes)
        trainer.add_callback(Count())
        trainer.train()
    assert 0 < seen[0] == seen[7]
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_batches_of_similar_length_train(tmp_path):
    model = build()
    before = copy.deepcopy(model)
    trainer = trainer_of(
        model,
        tmp_path,
        lengths=LENGTHS,
        train_sampling_strategy="group_by_length",
        per_device_train_batch_size=1,
    )
    trainer.train()
    assert trainer.optimizer.optimizer.updates == 8
    assert not same(model, before)
