"""`chunkft finetune` without a model: the embedded byte-level Llama learns arithmetic word problems."""

from dataclasses import fields, replace
from typing import Any

import torch

from chunkft.cli.data import Collator, pairs_dataset
from chunkft.cli.errors import UserError
from chunkft.cli.job import Job, place_of
from chunkft.cli.models import enable_gradient_checkpointing, load_causal, load_tokenizer, resolve_dtype
from chunkft.cli.outputs import RunDirectory
from chunkft.cli.problems import Problem, answer_of, embedded_model_dir, exact_match, generate
from chunkft.cli.ranks import Ranks
from chunkft.cli.report import write_json
from chunkft.cli.run import Finetuning
from chunkft.cli.settings import FinetuneSettings

__all__ = ["demo_job", "demo_settings", "run_demo"]

RECIPE = FinetuneSettings(
    chunks=8,
    interval=1,
    schedule="random",
    lr=3e-3,
    lr_schedule="linear",
    warmup=20,
    steps=400,
    batch_size=16,
    seq_len=160,
    save_every=200,
)
TRAIN_PROBLEMS = 20_000
HELD_OUT_PROBLEMS = 300
SHOWN = 3
ANSWER_TOKENS = 48
NOT_FOR_DEMO = ("task", "eval_data", "eval_every", "text_column", "label_column")


def demo_settings(settings: FinetuneSettings, given: frozenset[str]) -> FinetuneSettings:
    """The recipe, changed by what was given; raises UserError for options that need a model and data of one's
    own.
    """
    for name in NOT_FOR_DEMO:
        if name in given:
            option = name.replace("_", "-")
            raise UserError(f"--{option} {getattr(settings, name)} needs --model DIR|ID and --data FILE")
    changes = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name in given}
    if "epochs" in given:
        changes["steps"] = None
    return replace(RECIPE, **changes)


def _pairs(problems: list[Problem]) -> list[tuple[str, str]]:
    return [(problem["prompt"], problem["completion"]) for problem in problems]


def demo_job(
    settings: FinetuneSettings, device: torch.device, held_out: list[Problem], count: int = TRAIN_PROBLEMS
) -> Job:
    """The embedded model with `count` problems to train on."""
    source = str(embedded_model_dir())
    tokenizer = load_tokenizer(source)
    model: Any = load_causal(
        source, resolve_dtype(settings.dtype, None, device), device, place_of(settings, device)
    )
    if settings.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    problems = generate(count, settings.seed, "train")
    train, report = pairs_dataset(_pairs(problems), tokenizer, settings.seq_len, "generated word problems")
    evaluation, _ = pairs_dataset(_pairs(held_out), tokenizer, settings.seq_len, "held-out word problems")
    return Job(
        name="embedded byte-level Llama",
        model=model,
        tokenizer=tokenizer,
        train=train,
        collator=Collator(tokenizer.pad_token_id, settings.seq_len),
        evaluation=evaluation,
        reports=[report],
        notes=[f"{len(held_out)} held-out problems, whose sums are in no training problem"],
    )


def run_demo(
    directory: RunDirectory, settings: FinetuneSettings, device: torch.device, resume: bool, ranks: Ranks
) -> int:
    """Trains the embedded model, prints exact match on held-out problems before and after; returns the exit
    status.
    """
    held_out = generate(HELD_OUT_PROBLEMS, settings.seed, "heldout")
    with ranks.agreed():
        job = demo_job(settings, device, held_out)
    before = exact_match(job.model, job.tokenizer, held_out) if ranks.first else 0.0
    run = Finetuning(directory, settings, device, job, resume, ranks)
    try:
        return _carried_out(run, held_out, before)
    finally:
        run.let_go()


def _carried_out(run: Finetuning, held_out: list[Problem], before: float) -> int:
    run.introduce()
    if run.ranks.first:
        print(f"exact match before: {before:.1%}", flush=True)
    if not run.train():
        return run.stopped()
    run.save()
    with run.ranks.agreed():
        if run.ranks.first:
            _judge(run, held_out, before)
    return 0


def _judge(run: Finetuning, held_out: list[Problem], before: float) -> None:
    job = run.job
    after = exact_match(job.model, job.tokenizer, held_out)
    scores = {"problems": len(held_out), "before": before, "after": after}
    write_json(run.directory.path / "exact_match.json", scores)
    examples = [line for problem in held_out[:SHOWN] for line in _example(job, problem)]
    run.summarise(
        f"exact match on {len(held_out)} held-out problems: {before:.1%} before, {after:.1%} after",
        "",
        *examples,
    )


@torch.no_grad()
def _example(job: Job, problem: Problem) -> list[str]:
    inputs = job.tokenizer(problem["prompt"], return_tensors="pt").to(job.model.device)
    job.model.eval()
    made = job.model.generate(
        **inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=job.tokenizer.pad_token_id
    )
    answer = job.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    mark = "right" if answer_of(answer) == answer_of(problem["completion"]) else "wrong"
    return [f"  {problem['prompt']}", f"  ->{answer}  ({mark})", ""]
