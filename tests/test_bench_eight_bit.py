"""The benchmark of 8-bit state runs at toy size, and its summary follows from its runs."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import eight_bit  # noqa: E402


def test_a_short_run_trains_and_counts_its_state(monkeypatch):
    monkeypatch.setattr(eight_bit, "PROBLEMS", 20)
    found = {bits: eight_bit.train(1, 0, bits, steps=4, held_out=3) for bits in (8, 32)}
    assert found[32]["state_bytes_per_parameter"] == 8
    assert 2.06 < found[8]["state_bytes_per_parameter"] <= 2.1
    assert found[8]["loss"] == pytest.approx(found[32]["loss"], rel=5e-3)
    assert found[8]["loss"] != found[32]["loss"]
    assert 0 < found[8]["held_out_loss"] < 20


def test_the_committed_result_meets_what_the_pages_say():
    result = json.loads((ROOT / "bench" / "results" / "eight-bit.json").read_text())
    assert len(result["runs"]) == len(eight_bit.RATES) * len(eight_bit.SEEDS) * 2
    assert result["summary"] == eight_bit.summarise(result["runs"])
    for row in result["summary"].values():
        assert abs(row["loss_percent"]["mean"]) < 0.5
        assert row["state_bytes_per_parameter"] <= 2.1


def test_the_summary_compares_runs_of_the_same_seed():
    runs = {
        eight_bit.key_of(8, seed, bits): {
            "loss": loss,
            "held_out_loss": 1.0,
            "state_bytes_per_parameter": 2.0,
        }
        for seed, bits, loss in ((0, 8, 1.1), (0, 32, 1.0), (1, 8, 2.0), (1, 32, 3.0), (2, 8, 9.0))
    }
    summary = eight_bit.summarise(runs)
    assert list(summary) == ["K=8"]
    assert summary["K=8"]["loss_percent"]["mean"] == pytest.approx(100 * (3.1 / 4 - 1))
    assert summary["K=8"]["loss_percent"]["seeds"] == pytest.approx([10, -100 / 3])
