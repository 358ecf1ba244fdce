"""`chunkft bench` finds the benchmarks, hands them their own arguments, and says what is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from chunkft.cli import bench, main
from chunkft.cli.arguments import parse
from chunkft.cli.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def test_arguments_of_a_part_reach_it_untouched():
    settings = parse(["bench", "step", "--tiny", "--chunks", "4", "--out", "x.json", "--help"]).bench
    assert settings.part == "step"
    assert settings.arguments == ("--tiny", "--chunks", "4", "--out", "x.json", "--help")
    assert parse(["bench", "compare", "a.json", "b.json"]).bench.arguments == ("a.json", "b.json")
    assert parse(["bench", "--quick", "--out", "d"]).bench == bench.BenchSettings(out="d")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench"], "needs one of --quick, kernels, pager"),
        (["bench", "--quick", "step"], "needs one of"),
        (["bench", "--out", "d", "step"], "--out d before step"),
        (["bench", "stepp"], "invalid choice: 'stepp'"),
    ],
)
def test_neither_a_part_nor_quick_is_refused(words, said):
    with pytest.raises(UserError, match=said):
        parse(words)


@pytest.mark.parametrize("part", bench.PARTS)
def test_every_part_shows_its_own_help(part, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", part, "--help"])
    assert stopped.value.code == 0
    assert f"usage: bench.{bench.PARTS[part][0]}" in capsys.readouterr().out.replace("python -m ", "")


def test_status_of_the_benchmark_is_that_of_the_command(tmp_path, capsys):
    assert main(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "FileNotFoundError" in capsys.readouterr().err


def test_benchmarks_that_are_nowhere_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.chunkft, "__file__", str(tmp_path / "chunkft" / "__init__.py"))
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="chunkft_bench"):
        bench.run_bench(bench.BenchSettings())
