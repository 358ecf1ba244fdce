"""`chunkft finetune` without a model fine-tunes the embedded one on generated problems."""

import json

import pytest
import torch
from clitools import needs_datasets, weights_of

from chunkft.cli import demo, main
from chunkft.cli.problems import embedded_model_dir, generate
from chunkft.cli.settings import FinetuneSettings


@pytest.fixture
def few_problems(monkeypatch):
    monkeypatch.setattr(demo, "HELD_OUT_PROBLEMS", 12)
    monkeypatch.setattr(demo, "TRAIN_PROBLEMS", 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@needs_datasets
def test_embedded_model_is_trained_and_judged_before_and_after(few_problems, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", "--steps", "8", "--warmup", "0", "--batch-size", "4"]) == 0
    out = tmp_path / "runs" / "arithmetic-1"
    printed = capsys.readouterr().out
    scores = json.loads((out / "exact_match.json").read_text())
    assert scores["problems"] == 12
    assert 0.0 <= scores["before"] <= 1.0
    assert 0.0 <= scores["after"] <= 1.0
    assert f"{scores['before']:.1%} before, {scores['after']:.1%} after" in printed
    assert printed.count("  ->") == demo.SHOWN
    assert "full AdamW" in printed
    before, after = weights_of(embedded_model_dir()), weights_of(out)
    assert not [name for name in before if torch.equal(before[name], after[name])]
    assert main(["finetune", "--resume", "--out", str(out), "--steps", "10"]) == 0
    assert len([line for line in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]) == 10


def test_recipe_fits_the_problems():
    settings = demo.demo_settings(FinetuneSettings(), frozenset())
    assert settings == demo.RECIPE
    changed = demo.demo_settings(FinetuneSettings(epochs=1.0, lr=0.5), frozenset({"epochs", "lr"}))
    assert (changed.epochs, changed.steps, changed.lr) == (1.0, None, 0.5)
    longest = max(len(p["prompt"] + p["completion"]) for p in generate(demo.TRAIN_PROBLEMS, 0))
    assert longest + 2 <= settings.seq_len


@pytest.mark.parametrize("line", ["--task sequence-classification", "--text-column 2", "--eval-data x.jsonl"])
def test_options_for_own_data_need_a_model(capsys, line):
    assert main(["finetune", *line.split()]) == 2
    message = capsys.readouterr().err
    assert line in message
    assert "--model" in message
