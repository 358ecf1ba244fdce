"""The parts of `chunkft finetune` that people read: progress, metrics, tables; and what its defaults mean."""

from pathlib import Path

import pytest
import torch

from chunkft.cli.job import chosen_interval, patterns_of
from chunkft.cli.progress import Metrics, Progress
from chunkft.cli.report import MemoryReport, human_bytes, running_mean, table, trim_metrics
from chunkft.cli.settings import FinetuneSettings


def test_interval_lets_eight_sweeps_into_a_run():
    settings = FinetuneSettings(chunks=4)
    assert [chosen_interval(settings, steps) for steps in (10, 320, 100_000)] == [1, 10, 50]
    assert chosen_interval(FinetuneSettings(interval=7), 10) == 7


def test_always_active_patterns():
    assert patterns_of("auto", "causal-lm") is None
    assert patterns_of("auto", "sequence-classification") == "head"
    assert patterns_of("none", "sequence-classification") is None
    assert patterns_of("*.norm.*, lm_head", "causal-lm") == ["*.norm.*", "lm_head"]


class Terminal:
    def __init__(self, encoding="utf-8"):
        self.text = ""
        self.encoding = encoding

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize(("encoding", "bar"), [("utf-8", "██░"), ("ascii", "##.")])
def test_progress_line_is_rewritten_on_a_terminal(tmp_path, monkeypatch, encoding, bar):
    from transformers import TrainerState

    metrics = Metrics(tmp_path / "metrics.jsonl", torch.device("cpu"))
    metrics.last = {"chunk": 2, "sweep": 0, "step_seconds": 0.25, "rss": 3 << 20}
    progress = Progress(metrics, 8, terminal := Terminal(encoding))
    state = TrainerState()
    state.max_steps = 10
    monkeypatch.setenv("COLUMNS", "120")
    progress.on_train_begin(None, state, None)
    for state.global_step in (1, 10):
        progress.on_log(None, state, None, {"loss": 2.5})
    lines = terminal.text.split("\r")
    assert len(lines) == 3
    for part in ("step 1/10", "loss 2.5000", "chunk 3/8 sweep 1", "250 ms", "3 MiB", "left"):
        assert part in lines[1]
    assert "\n" not in lines[1]
    assert bar in lines[1]
    assert lines[1].isascii() == (encoding == "ascii")
    monkeypatch.setenv("COLUMNS", "30")
    progress.on_log(None, state, None, {"loss": 2.5})
    assert len(terminal.text.rsplit("\x1b[2K", 1)[1].rstrip("\n")) == 29
    assert terminal.text.endswith("\n")


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    trim_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_metrics_that_cannot_be_written_are_named():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")

    class State:
        global_step = 3

    metrics = Metrics(full, torch.device("cpu"))
    with metrics.open(), pytest.raises(OSError, match="/dev/full cannot be written: No space left on device"):
        metrics.on_log(None, State(), None, {"eval_loss": 1.0})


def test_memory_table_counts_half_precision_masters():
    full = MemoryReport(weights=200, trained=100, trained_bytes=200).full
    assert full == {
        "gradients": 200,
        "optimizer state": 800,
        "master weights": 400,
        "saved activations": None,
    }
    assert MemoryReport(weights=400, trained=100, trained_bytes=400).full["master weights"] == 0


def test_numbers_for_people():
    assert [human_bytes(count) for count in (0, 1023, 1536, 5 << 30)] == [
        "0 B",
        "1,023 B",
        "1.5 KiB",
        "5 GiB",
    ]
    assert [human_bytes(count) for count in (1010 << 20, 3 << 40, 5000 << 40)] == [
        "1,010 MiB",
        "3 TiB",
        "5,000 TiB",
    ]
    assert human_bytes(100 << 10) == "100 KiB"
    assert table([("a", "b"), ("ccc", "10")]).splitlines() == ["a     b", "---  --", "ccc  10"]
    assert running_mean([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
