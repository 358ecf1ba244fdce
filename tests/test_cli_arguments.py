"""Options are parsed, and wrong ones are told in one line with exit status 2."""

import sys

import pytest

import chunkft
from chunkft.cli import main
from chunkft.cli.arguments import parse
from chunkft.cli.settings import FinetuneSettings


def test_defaults_without_arguments():
    command = parse(["finetune"])
    assert command.finetune == FinetuneSettings()
    assert command.given == frozenset()
    assert not command.resume


def test_given_options_are_known_apart_from_defaults():
    line = "finetune --model m --data d.jsonl --chunks 16 --lr 3e-4 --steps 5 --gradient-checkpointing"
    command = parse(line.split())
    assert command.finetune == FinetuneSettings(
        model="m", data="d.jsonl", chunks=16, lr=3e-4, steps=5, gradient_checkpointing=True
    )
    assert command.given == {"model", "data", "chunks", "lr", "steps", "gradient_checkpointing"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", ["COMMAND"]),
        ("tune", ["'tune'", "finetune", "plan"]),
        ("finetune --modle m", ["--modle"]),
        ("finetune --mod m --data d", ["--mod m"]),
        ("finetune --epochs 1 --steps 5", ["--epochs 1", "--steps 5"]),
        ("finetune --steps 0", ["--steps", "'0'", "at least 1"]),
        ("finetune --steps many", ["--steps", "'many'"]),
        ("finetune --epochs 0", ["--epochs", "'0'", "above 0"]),
        ("finetune --lr nan", ["--lr", "'nan'", "finite"]),
        ("finetune --lr inf", ["--lr", "'inf'", "finite"]),
        ("finetune --lr -1", ["--lr"]),
        ("finetune --lr 0", ["--lr", "'0'", "above 0"]),
        ("finetune --max-grad-norm nan", ["--max-grad-norm", "'nan'"]),
        ("finetune --weight-decay=-0.1", ["--weight-decay", "'-0.1'", "at least 0"]),
        ("finetune --chunks 0", ["--chunks", "'0'", "at least 1"]),
        ("finetune --chunks 2.5", ["--chunks", "'2.5'"]),
        ("finetune --interval 0", ["--interval", "'0'"]),
        ("finetune --batch-size 0", ["--batch-size", "'0'"]),
        ("finetune --grad-accum 0", ["--grad-accum", "'0'"]),
        ("finetune --seq-len 4", ["--seq-len", "'4'", "at least 8"]),
        ("finetune --seed -1", ["--seed"]),
        ("finetune --seed 4294967296", ["--seed", "'4294967296'", "from 0 to 4294967295"]),
        ("finetune --partition rows", ["--partition", "'rows'", "interleaved"]),
        ("finetune --schedule sorted", ["--schedule", "'sorted'", "cyclic"]),
        ("finetune --task translate", ["--task", "'translate'", "causal-lm"]),
        ("finetune --dtype int8", ["--dtype", "'int8'", "bf16"]),
        ("finetune --device tpu", ["--device", "'tpu'", "cuda:N"]),
        ("finetune --optimizer sgd", ["--optimizer", "'sgd'", "adamw"]),
        ("finetune --data d.jsonl", ["--data d.jsonl", "--model"]),
        ("finetune --model m", ["--model m", "--data"]),
        ("finetune --model m --data d.jsonl --eval-every 5", ["--eval-every 5", "--eval-data"]),
        ("finetune --resume", ["--resume", "--out"]),
        ("finetune --always-active=", ["--always-active", "empty"]),
        ("plan", ["--model"]),
        ("plan --model m --interval 5", ["--interval"]),
    ],
)
def test_wrong_option_is_one_line_and_status_2(capsys, line, words):
    assert main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("chunkft: ")
    assert captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err


def test_traceback_only_with_debug(capsys):
    main(["finetune", "--steps", "0"])
    assert "Traceback" not in capsys.readouterr().err
    main(["finetune", "--steps", "0", "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"chunkft {chunkft.__version__}\n"


@pytest.mark.parametrize("command", ["finetune", "plan"])
def test_help_names_every_option(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("--model", "--chunks", "--partition", "--slice-dim", "--always-active", "--task"):
        assert option in text


def test_a_package_that_is_not_installed_is_named_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(["finetune", "--steps", "1", "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == "chunkft: this needs the package datasets, which is not installed"
