"""`chunkft profile`: what it writes and prints, what it refuses, and that a signal ends it cleanly."""

import json
import os
import signal

import pytest
from clitools import needs_datasets, save_tiny_llama, sums

from chunkft.cli import main
from chunkft.profiling.recording import Recorder

PNG = b"\x89PNG\r\n\x1a\n"
FILES = {"trace.json", "memory.json", "memory.png", "memory_account.json"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    save_tiny_llama(root / "llama")
    sums(root / "train.jsonl", 24)
    return root


def run(place, out, *options):
    basis = {"--model": place / "llama", "--data": place / "train.jsonl", "--out": out, "--device": "cpu"}
    basis |= {"--seq-len": 32, "--batch-size": 4, "--chunks": 3, "--steps": 3}
    words = [str(word) for pair in basis.items() for word in pair]
    return main(["profile", *words, *map(str, options)])


@needs_datasets
def test_three_steps_of_a_model_leave_trace_memory_and_picture(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(place, out) == 0
    text = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == FILES
    assert (out / "memory.png").read_bytes().startswith(PNG)
    memory = json.loads((out / "memory.json").read_text())
    assert memory["steps"] == 3
    assert memory["peak"]["phase"] in ("forward", "backward", "step")
    assert memory["peak"]["allocation"]["op"].startswith("aten.")
    assert sum(memory["peak"]["by_category"].values()) == memory["peak"]["nbytes"]
    assert len(memory["savings"]) == 3
    assert memory["savings"] == sorted(memory["savings"], key=lambda saving: -saving["saved_bytes"])
    report = memory["report"]
    assert report["gradients"]["peak"] == report["gradients"]["predicted"] > 0
    names = {event["name"] for event in json.loads((out / "trace.json").read_text())["traceEvents"]}
    assert {"chunkft/step", "chunkft/forward", "chunk 1", "bytes", "aten::mm"} <= names
    assert any(name.startswith("chunkft/backward model.layers.0.") for name in names)
    account = json.loads((out / "memory_account.json").read_text())
    assert any(block["saved_by"] == "model.layers.0.self_attn" for block in account["blocks"])
    for words in (
        "3 chunks",
        "profile: 3 steps",
        "peak: ",
        "made by: aten.",
        "what would lower the peak",
        "memory.png",
    ):
        assert words in text


@needs_datasets
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--residency", "stream", "--update", "backward"], "chunk 2"),
        (["--optimizer", "adamw"], "all parameters"),
        (["--gradient-checkpointing", "--grad-accum", "2", "--warmup", "0"], "chunk 1"),
    ],
    ids=["backward", "adamw", "checkpointing"],
)
def test_it_takes_the_options_of_finetune(place, tmp_path, capsys, options, expected):
    out = tmp_path / "out"
    assert run(place, out, "--steps", "2", *options, "--quiet") == 0
    assert {path.name for path in out.iterdir()} == FILES
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert expected in {event["name"] for event in events}
    forward = sum(event["ph"] == "X" and event["name"] == "chunkft/forward" for event in events)
    assert forward == (4 if "--grad-accum" in options else 2)
    memory = json.loads((out / "memory.json").read_text())
    assert (memory["report"] is None) == ("adamw" in options)
    if "--gradient-checkpointing" in options:
        assert "activation checkpointing" not in {saving["name"] for saving in memory["savings"]}
    assert "warm-up" not in capsys.readouterr().out  # --quiet


@needs_datasets
def test_without_arguments_the_embedded_model_is_profiled(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "--steps", "1", "--warmup", "0", "--batch-size", "2", "--device", "cpu"]) == 0
    assert {path.name for path in (tmp_path / "profiles" / "arithmetic-1").iterdir()} == FILES
    assert "embedded byte-level Llama" in capsys.readouterr().out


@needs_datasets
def test_an_interrupt_finishes_the_step_and_writes_what_was_seen(place, tmp_path, capsys, monkeypatch):
    step = Recorder.timed_step

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        step(self)

    monkeypatch.setattr(Recorder, "timed_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    out = tmp_path / "out"
    assert run(place, out) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert {path.name for path in out.iterdir()} == {"trace.json", "memory.json"}
    assert json.loads((out / "memory.json").read_text())["interrupted"]
    assert "stopped after 1 timed steps" in capsys.readouterr().out


@needs_datasets
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "'0' is not a whole number of at least 1"),
        (["--nsight"], "--nsight needs a GPU"),
        (["--epochs", "1"], "unrecognized arguments: --epochs 1"),
        (["--chunks", "100000"], "100000"),
        (["--update", "backward"], "--update backward needs --residency stream"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(place, tmp_path, capsys, options, words):
    out = tmp_path / "out"
    assert run(place, out, *options) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists() or not any(out.iterdir())


@needs_datasets
def test_a_directory_with_something_in_it_is_left_alone(place, tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("mine")
    assert run(place, tmp_path) == 2
    assert "the directory is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_the_bar_is_one_line_on_a_terminal(place, tmp_path):
    from chunkft.cli.profile import _Bar

    class Terminal:
        encoding = "utf-8"

        def __init__(self):
            self.text = ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    terminal = Terminal()
    bar = _Bar(terminal)
    for done in range(3):
        bar("memory", done, 2)
    assert "\n" not in terminal.text
    assert "memory 1/2" in terminal.text
    assert terminal.text.endswith("\r\x1b[2K")
