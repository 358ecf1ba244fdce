"""docs/quality.md says what the committed JSON says."""

import json
import re
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from bench import common, quality, report  # noqa: E402

SUMMARY = common.RESULTS / "quality-cpu" / "summary.json"
RUNS = common.RESULTS / "quality-cpu" / "runs.jsonl"
DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")


def documented() -> tuple[str, dict]:
    return report.DOC.read_text(), json.loads(SUMMARY.read_text())


def test_summary_follows_from_the_runs_it_counts():
    summary = json.loads(SUMMARY.read_text())
    assert summary["runs"] > 0
    assert json.loads(json.dumps(report.summarise(RUNS, summary["runs"]))) == summary


def test_every_table_of_the_document_equals_its_json():
    text, summary = documented()
    assert report.fill(text, report.tables(summary, common.RESULTS)) == text
    assert len(report.BLOCK.findall(text)) >= 4


def test_every_decimal_in_the_prose_stands_in_a_table():
    text, _ = documented()
    in_tables = {n for block in report.BLOCK.finditer(text) for n in DECIMAL.findall(block.group(0))}
    prose = report.BLOCK.sub("", text)
    assert [n for n in DECIMAL.findall(prose) if n not in in_tables] == []


def test_every_run_names_its_commit_versions_and_settings():
    for run in common.read_jsonl(RUNS):
        assert {"commit", "versions", "curve", "accuracy", "train_cpu_seconds", "device"} <= run.keys()
        assert quality.Job(**{k: run[k] for k in ("method", "lr", "seed", "steps", "options")})


def test_filling_replaces_blocks_and_refuses_an_unknown_marker():
    text = "a\n<!-- table: t -->\nold\n<!-- end -->\nb\n"
    assert report.fill(text, {"t": "new\n"}) == "a\n<!-- table: t -->\nnew\n<!-- end -->\nb\n"
    with pytest.raises(KeyError, match="t"):
        report.fill(text, {})


def test_options_are_described_without_defaults():
    options = {"chunks": 16, "interval": 1, "always_active": "head", "schedule": "cyclic", "switch_warmup": 2}
    assert report.describe(options, "chunk") == "K=16, T=1, head always active, switch_warmup 2"
