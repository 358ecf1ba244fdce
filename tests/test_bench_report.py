"""README and docs say what the committed JSON says."""

import json
import re
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from bench import common, doc_numbers, doc_tables, quality, report  # noqa: E402

SUMMARY = common.RESULTS / "quality-cpu" / "summary.json"
RUNS = common.RESULTS / "quality-cpu" / "runs.jsonl"
DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")


def documented() -> tuple[str, dict]:
    return report.DOC.read_text(), json.loads(SUMMARY.read_text())


def test_summary_follows_from_the_runs_it_counts():
    summary = json.loads(SUMMARY.read_text())
    assert summary["runs"] > 0
    assert json.loads(json.dumps(report.summarise(RUNS, summary["runs"]))) == summary


@pytest.mark.parametrize("page", report.PAGES, ids=lambda p: p.name)
def test_every_table_and_marked_figure_of_a_page_equals_its_json(page):
    text = page.read_text()
    made = report.tables(json.loads(SUMMARY.read_text()), common.RESULTS)
    assert report.fill(text, made) == text
    assert doc_numbers.refreshed(text, common.RESULTS) == text


def test_the_pages_have_tables_and_marked_figures():
    text = "".join(page.read_text() for page in report.PAGES)
    assert len(report.BLOCK.findall(text)) >= 12
    assert len(doc_numbers.MARKED.findall(text)) >= 25


@pytest.mark.parametrize("page", report.PAGES, ids=lambda p: p.name)
def test_every_figure_that_looks_measured_names_its_source(page):
    assert doc_numbers.unmarked(page.read_text()) == [], (
        "mark each with <!-- from: FILE EXPRESSION --> or <!-- given --> (see bench/doc_numbers.py)"
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("takes 0.56 of it", ["line 1: 0.56"]),
        (
            "\nuses 24 GB, 3 ms, 5 x and 12 %",
            ["line 2: 24 GB", "line 2: 3 ms", "line 2: 5 x", "line 2: 12 %"],
        ),
        ("1,234.5 tokens", ["line 1: 1,234.5"]),
        ("batch 4 x 256 of 28M, chunks 1 to 16", []),
        ("Python >= 3.11, torch 2.13, arXiv 2605.21177, `0.56` and [a](b/0.5)", []),
        ("```text\n0.56\n```\n# 24 GB\n![0.5](x.png)", []),
        ("<!-- table: t -->\n0.56\n<!-- end -->", []),
        ("24 GB<!-- given --> and 0.5<!-- from: a.json b --> of 7 ms<!-- why -->", ["line 1: 7 ms"]),
    ],
)
def test_figures_are_told_from_other_numbers(text, found):
    assert doc_numbers.unmarked(text) == found


@pytest.fixture
def results(tmp_path):
    value = {
        "a": {"b c": 3.0},
        "n": [{"k": 1, "v": 2**21}, {"k": 2, "o": {"x": "p, q"}, "v": 5}],
        "s": "t",
        "big": 12345.6,
    }
    (tmp_path / "r.json").write_text(json.dumps(value))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("r.json n.0.v / MiB", 2.0),
        ("r.json n[k=2].v", 5),
        ('r.json n[o.x="p, q",k=2].v', 5),
        ("r.json n[k=1,o=null].v", 2**21),
        ("r.json 'a.b c' * 100 / n.1.v", 60.0),
    ],
)
def test_expressions_find_values(source, value, results):
    assert doc_numbers.evaluate(source, results) == value


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("r.json a.d", KeyError, "no 'd'"),
        ("r.json n[k=3].v", KeyError, "fits 0 entries"),
        ("r.json n[k=1].v +", ValueError, "needs FILE"),
        ("r.json n.0.v ^ 2", ValueError, "no operator"),
        ("r.json s", ValueError, "no number"),
        ("r.json n.7.v", KeyError, "no '7'"),
        ("absent.json a", FileNotFoundError, "absent"),
    ],
)
def test_expressions_that_lead_nowhere_are_refused(source, error, words, results):
    with pytest.raises(error, match=words):
        doc_numbers.evaluate(source, results)


def test_refreshing_writes_figures_as_they_were_written(results):
    text = "9.99<!-- from: r.json n.1.v -->, 1,000 ms<!-- from: r.json big -->, 7 %<!-- from: r.json n.1.v * 2 -->"
    made = doc_numbers.refreshed(text, results)
    assert re.sub("<!--.*?-->", "", made) == "5.00, 12,346 ms, 10 %"


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


def cells(table):
    return [[c.strip() for c in line.strip().strip("|").split("|")] for line in table.splitlines()[2:]]


def test_tables_of_the_comparison_hold_the_numbers_of_their_files():
    made = doc_tables.tables(common.RESULTS)
    wall = json.loads((common.RESULTS / "step-cpu.json").read_text())["variants"]
    ratio = wall["chunk"]["sweep_mean_ms"] / wall["adamw"]["sweep_mean_ms"]
    assert cells(made["compare-step"])[-1][:2] == ["chunkft", f"{ratio:.2f}"]
    counted = json.loads((common.RESULTS / "memory-cpu.json").read_text())["cases"]
    sixteen = next(row for row in cells(made["compare-memory"]) if row[0] == "chunkft, K=16")
    assert (
        sixteen[1]
        == f"{next(c for c in counted if c['variant'].get('chunks') == 16)['gradients'] / 2**20:.1f}"
    )
    accuracies = [float(row[3].split()[0]) for row in cells(made["compare-accuracy"])]
    assert accuracies == sorted(accuracies, reverse=True)
    assert len(accuracies) >= 5
    predicted = json.loads((common.RESULTS / "memory-predicted.json").read_text())["cases"]
    rows = next(c for c in predicted if (c["model"], c["tokens"]) == ("llama-3-8b", 4096))["rows"]
    assert [row[7] for row in cells(made["predicted-8b-4096"])] == [f"{r['peak'] / 2**30:.2f}" for r in rows]


def test_what_a_command_printed_is_shown_but_for_the_middle_of_its_progress(tmp_path):
    steps = [f"step {i}/40  loss" for i in range(1, 41)]
    run = {"output": ["begin", *steps, "step 40: held-out", "end"]}
    (tmp_path / "tutorial-cpu.json").write_text(json.dumps({"runs": {"first": run}}))
    shown = doc_tables.printed(tmp_path, "first").splitlines()[1:-1]
    assert shown == ["begin", *steps[:6], "...", *steps[-3:], "step 40: held-out", "end"]
