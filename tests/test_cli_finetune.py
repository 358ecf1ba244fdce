"""`chunkft finetune` and `chunkft plan` end to end on tiny models, and the mistakes a user would make."""

import json
import shutil

import pytest
import torch
from clitools import (
    CHAT_TEMPLATE,
    assert_same_weights,
    byte_tokenizer,
    needs_datasets,
    save,
    save_tiny_bert,
    save_tiny_llama,
    sums,
    weights_of,
    write_jsonl,
)

import chunkft
from chunkft.cli import main
from chunkft.cli.job import build_optimizer
from chunkft.cli.settings import FinetuneSettings


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    save_tiny_llama(root / "llama")
    save_tiny_bert(root / "bert")
    sums(root / "train.jsonl", 40)
    sums(root / "held-out.jsonl", 10)
    rows = [(index % 2, "good and fine" if index % 2 else "bad and sad") for index in range(24)]
    (root / "train.tsv").write_text("label\tsentence\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    return root


def finetune(place, out, *options, model="llama", data="train.jsonl"):
    basis = ["finetune", "--model", place / model, "--data", place / data, "--out", out, "--device", "cpu"]
    given = [str(option) for option in options]
    defaults = [
        ("--steps", "4"),
        ("--seq-len", "32"),
        ("--batch-size", "4"),
        ("--chunks", "4"),
        ("--lr", "1e-2"),
    ]
    for name, value in defaults:
        if name not in given and not (name == "--steps" and "--epochs" in given):
            given += [name, value]
    return main([*map(str, basis), *given])


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@needs_datasets
def test_run_leaves_model_metrics_picture_and_memory(place, tmp_path, capsys):
    out = tmp_path / "out"
    status = finetune(
        place, out, "--steps", "24", "--eval-data", place / "held-out.jsonl", "--eval-every", "12"
    )
    assert status == 0
    printed = capsys.readouterr().out
    steps = [record for record in records(out) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 25))
    keys = ["step", "loss", "lr", "chunk", "sweep", "step_seconds", "grad_norm", "tokens", "rss"]
    assert all(list(record) == keys for record in steps)
    assert all(record["grad_norm"] > 0 and record["step_seconds"] > 0 for record in steps)
    assert [record["chunk"] for record in steps[:5]] == [0, 1, 2, 3, 0]
    assert [record["sweep"] for record in steps[3:5]] == [0, 1]
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    held_out = [(record["step"], record["eval_loss"]) for record in records(out) if "eval_loss" in record]
    assert [step for step, _ in held_out] == [0, 12, 24]
    assert held_out[-1][1] < held_out[0][1]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    memory = json.loads((out / "memory.json").read_text())
    trained = sum(weight.numel() for weight in weights_of(out).values())
    assert memory["full_adamw"]["gradients"] == 4 * trained
    assert memory["full_adamw"]["optimizer state"] == 8 * trained
    assert memory["this_run"]["gradients"] < 0.35 * memory["full_adamw"]["gradients"]
    assert memory["this_run"]["optimizer state"] < 0.35 * memory["full_adamw"]["optimizer state"]
    assert 0 < memory["this_run"]["saved activations"] <= memory["full_adamw"]["saved activations"]
    for word in (
        "4 chunks",
        "held-out",
        "gradients",
        "optimizer state",
        "saved activations",
        "this run",
        str(out),
    ):
        assert word in printed


@needs_datasets
def test_every_weight_is_trained_and_the_model_loads_as_any_other(place, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert finetune(place, out, "--quiet") == 0
    before, after = weights_of(place / "llama"), weights_of(out)
    assert before.keys() == after.keys()
    assert not [name for name in before if torch.equal(before[name], after[name])]
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    made = model.generate(**tokenizer("2+2 is", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert made.shape[1] <= 9
    assert model.config.use_cache


@needs_datasets
@pytest.mark.parametrize(
    "options", [(), ("--weight-decay", "0.1"), ("--grad-accum", "2")], ids=["plain", "decay", "accum"]
)
@pytest.mark.parametrize("clip", ["0", "0.5"])
def test_one_chunk_through_the_trainer_is_adamw_bit_for_bit(place, tmp_path, options, clip):
    options = (*options, "--steps", "8", "--quiet", "--max-grad-norm", clip, "--warmup", "3")
    assert finetune(place, tmp_path / "chunk", "--chunks", "1", *options) == 0
    assert finetune(place, tmp_path / "full", "--optimizer", "adamw", *options) == 0
    assert_same_weights(tmp_path / "chunk", tmp_path / "full")


@needs_datasets
def test_full_finetuning_reports_itself_as_such(place, tmp_path):
    assert finetune(place, tmp_path / "out", "--optimizer", "adamw", "--quiet") == 0
    memory = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert memory["this_run"] == memory["full_adamw"]
    assert {record["chunk"] for record in records(tmp_path / "out")} == {None}


@needs_datasets
def test_gradient_checkpointing_changes_memory_and_not_the_weights(place, tmp_path):
    assert finetune(place, tmp_path / "plain", "--quiet") == 0
    assert finetune(place, tmp_path / "saving", "--quiet", "--gradient-checkpointing") == 0
    assert_same_weights(tmp_path / "plain", tmp_path / "saving")
    saved = [
        json.loads((tmp_path / name / "memory.json").read_text())["this_run"]["saved activations"]
        for name in ("plain", "saving")
    ]
    assert saved[1] < saved[0]
    assert json.loads((tmp_path / "saving" / "config.json").read_text()).get("use_cache", True)


@needs_datasets
def test_bf16_weights_stay_bf16_and_are_trained(place, tmp_path):
    assert finetune(place, tmp_path / "out", "--dtype", "bf16", "--steps", "8", "--quiet") == 0
    weights = weights_of(tmp_path / "out")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    before = weights_of(place / "llama")
    assert not [name for name in weights if torch.equal(weights[name], before[name].bfloat16())]
    memory = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert memory["full_adamw"]["master weights"] == 2 * memory["full_adamw"]["gradients"]
    assert 0 < memory["this_run"]["master weights"] < 0.35 * memory["full_adamw"]["master weights"]


@needs_datasets
def test_epochs_count_passes_over_the_data(place, tmp_path):
    assert finetune(place, tmp_path / "out", "--epochs", "1.5", "--grad-accum", "3", "--quiet") == 0
    assert len(records(tmp_path / "out")) == 6


@needs_datasets
def test_classification_learns_labels_and_keeps_their_names(place, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification

    out = tmp_path / "out"
    options = ("--task", "sequence-classification", "--steps", "30", "--eval-data", place / "train.tsv")
    assert finetune(place, out, *options, model="bert", data="train.tsv") == 0
    assert "the classification head is new" in capsys.readouterr().out
    judged = [record for record in records(out) if "eval_accuracy" in record]
    assert [record["step"] for record in judged] == [0, 30]
    assert judged[-1]["eval_accuracy"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == {0: "0", 1: "1"}
    assert model.num_labels == 2


@needs_datasets
def test_trained_classifier_keeps_its_head_and_label_order(place, tmp_path, capsys):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(
        place / "bert", num_labels=2, id2label={0: "1", 1: "0"}, label2id={"1": 0, "0": 1}
    )
    torch.manual_seed(3)
    save(AutoModelForSequenceClassification.from_config(config), byte_tokenizer(), tmp_path / "model")
    options = ("--task", "sequence-classification", "--steps", "1", "--lr", "1e-12")
    assert finetune(place, tmp_path / "out", *options, model=tmp_path / "model", data="train.tsv") == 0
    assert "head is new" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label2id"] == {"1": 0, "0": 1}
    head = "classifier.weight"
    assert torch.allclose(weights_of(tmp_path / "out")[head], weights_of(tmp_path / "model")[head], atol=1e-6)


@needs_datasets
def test_chat_data_is_learned(place, tmp_path):
    save_tiny_llama(tmp_path / "chatty", chat_template=CHAT_TEMPLATE)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}] * 8)
    options = ("--steps", "12", "--quiet", "--lr", "3e-2")
    assert (
        finetune(place, tmp_path / "out", *options, model=tmp_path / "chatty", data=tmp_path / "chat.jsonl")
        == 0
    )
    losses = [record["loss"] for record in records(tmp_path / "out")]
    assert losses[-1] < 0.8 * losses[0]


@needs_datasets
def test_quiet_shows_no_steps(place, tmp_path, capsys):
    assert finetune(place, tmp_path / "out", "--quiet") == 0
    printed = capsys.readouterr().out
    assert "step 1/4" not in printed
    assert "gradients" in printed


@needs_datasets
def test_a_run_too_short_for_a_sweep_says_so(place, tmp_path, capsys):
    assert finetune(place, tmp_path / "out", "--interval", "2", "--quiet") == 0
    assert "only 2 of 4 chunks will be trained" in capsys.readouterr().out


@needs_datasets
def test_gradients_that_stay_infinite_stop_the_run(place, tmp_path, capsys):
    assert finetune(place, tmp_path / "out", "--lr", "1e30", "--steps", "40", "--quiet") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "not finite" in message
    assert "learning rate" in message
    assert len(records(tmp_path / "out")) < 40


def broken_model(root, kind):
    from transformers import T5Config, T5ForConditionalGeneration

    path = root / kind
    if kind == "missing":
        return path
    if kind == "file":
        path.write_text("x")
        return path
    if kind == "t5":
        config = T5Config(
            vocab_size=259, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        return save(T5ForConditionalGeneration(config), byte_tokenizer(), path)
    save_tiny_llama(path)
    if kind == "no-config":
        (path / "config.json").unlink()
    elif kind == "no-weights":
        (path / "model.safetensors").unlink()
    elif kind == "no-tokenizer":
        (path / "tokenizer.json").unlink()
        (path / "tokenizer_config.json").unlink()
    elif kind == "cut":
        content = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif kind == "unknown-type":
        (path / "config.json").write_text('{"model_type": "nonesuch"}')
    return path


@needs_datasets
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ["no such directory"]),
        ("file", ["a file", "directory or a hub id"]),
        ("no-config", ["no config.json"]),
        ("no-weights", ["no weights", "model.safetensors"]),
        ("no-tokenizer", ["tokenizer cannot be loaded"]),
        ("cut", ["weights cannot be loaded"]),
        ("unknown-type", ["configuration cannot be loaded", "nonesuch"]),
        ("t5", ["encoder-decoder", "not a causal model"]),
    ],
)
def test_unusable_model_is_one_line_and_leaves_nothing(place, tmp_path, capsys, kind, words):
    path = broken_model(tmp_path, kind)
    assert finetune(place, tmp_path / "out", model=path) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    assert all(word in message for word in [f"--model {path}", *words]), message
    assert not (tmp_path / "out").exists()


@needs_datasets
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--chunks", "100000"), ["chunks", "100000"]),
        (("--seq-len", "4096"), ["--seq-len 4096", "128"]),
        (("--always-active", "no.such.weight"), ["always_active", "no.such.weight"]),
        (("--device", "cuda"), ["--device cuda", "cpu"]),
        (("--data", "nowhere.jsonl"), ["nowhere.jsonl", "no such file"]),
        (("--eval-data", "nowhere.jsonl"), ["nowhere.jsonl", "no such file"]),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, tuple) else "",
)
def test_unusable_value_is_one_line_and_leaves_nothing(place, tmp_path, capsys, options, words):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert finetune(place, tmp_path / "out", *options) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


@needs_datasets
def test_encoder_is_refused_as_causal_model(place, tmp_path, capsys):
    assert finetune(place, tmp_path / "out", model="bert") == 2
    message = capsys.readouterr().err
    assert "is not causal" in message
    assert "--task causal-lm" in message


@needs_datasets
def test_directory_with_something_in_it_is_left_alone(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert finetune(place, out, "--quiet") == 0
    before = (out / "metrics.jsonl").read_bytes()
    assert finetune(place, out) == 2
    assert "--resume" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before
    assert finetune(place, place) == 2
    assert "not empty" in capsys.readouterr().err
    for wrong in (place / "train.tsv", place / "train.tsv" / "below"):
        assert finetune(place, wrong) == 2
        assert "expected a directory" in capsys.readouterr().err


@needs_datasets
def test_resume_refuses_what_would_make_it_another_run(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["finetune", "--resume", "--out", str(out)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert finetune(place, out, "--quiet") == 0
    capsys.readouterr()
    for option, value, was in (("--lr", "0.5", "0.01"), ("--batch-size", "9", "4"), ("--seed", "3", "0")):
        assert main(["finetune", "--resume", "--out", str(out), option, value]) == 2
        message = capsys.readouterr().err
        assert f"{option} {value}" in message
        assert f"differs from {was}" in message
    assert main(["finetune", "--resume", "--out", str(out), "--steps", "2"]) == 2
    assert "already at step 4" in capsys.readouterr().err
    (out / "run.json").write_text("{}")
    assert main(["finetune", "--resume", "--out", str(out)]) == 2
    assert "run.json" in capsys.readouterr().err


@pytest.mark.parametrize("partition", ["bytes", "layers", "interleaved"])
def test_plan_is_shown_and_saved_without_weights(place, tmp_path, capsys, partition):
    model = tmp_path / "config-only"
    model.mkdir()
    (model / "config.json").write_bytes((place / "llama" / "config.json").read_bytes())
    file = tmp_path / "plan.json"
    options = ["--chunks", "3", "--partition", partition, "--save", str(file)]
    assert main(["plan", "--model", str(model), *options]) == 0
    printed = capsys.readouterr().out
    plan = chunkft.ChunkPlan.load(file)
    assert len(plan) == 3
    assert plan.table() in printed
    total = sum(weight.numel() for weight in weights_of(place / "llama").values())
    assert sum(chunk.numel for chunk in plan.chunks) == total


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "nowhere/at/all"], ["nowhere/at/all", "no such directory"]),
        (["--model", "LLAMA", "--chunks", "100000"], ["chunks", "100000"]),
        (["--model", "LLAMA", "--save", "/nonexistent/plan.json"], ["--save /nonexistent/plan.json"]),
        (["--model", "LLAMA", "--always-active", "nonesuch"], ["always_active", "nonesuch"]),
    ],
)
def test_plan_names_what_is_wrong(place, capsys, options, words):
    options = [str(place / "llama") if option == "LLAMA" else option for option in options]
    assert main(["plan", *options]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    assert all(word in message for word in words), message


@needs_datasets
def test_resume_without_a_checkpoint_starts_over(place, tmp_path):
    out = tmp_path / "out"
    assert finetune(place, out, "--quiet", "--eval-data", place / "held-out.jsonl") == 0
    first = [(record["step"], record.get("loss"), record.get("eval_loss")) for record in records(out)]
    weights = weights_of(out)
    shutil.rmtree(out / "checkpoints")
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert [(record["step"], record.get("loss"), record.get("eval_loss")) for record in records(out)] == first
    again = weights_of(out)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("kind", ["adamw", "chunkadamw"])
def test_decay_touches_matrices_only(place, kind):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    settings = FinetuneSettings(weight_decay=0.25, chunks=1, optimizer=kind)
    groups = build_optimizer(model, settings, 1).param_groups
    decays = {(weight.dim() >= 2, group["weight_decay"]) for group in groups for weight in group["params"]}
    assert decays == {(True, 0.25), (False, 0.0)}
    assert sum(weight.numel() for group in groups for weight in group["params"]) == 35168
