"""Peers, scaling and the quick round: a method that fails is a row without numbers, and theory has its end points."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import harness, peer_bench, peer_methods, pictures, plain_llama, quick, scaling

TINY = ["--model", "tiny", "--batch", "1", "--tokens", "9", "--steps", "6", "--rates", "1e-2"]


@pytest.mark.slow
def test_peers_have_numbers_or_an_error_and_none_is_dropped(tmp_path):
    out = tmp_path / "peers.json"
    peer_bench.main([*TINY, "--rounds", "2", "--only", "chunkft K=4", "RoundPipe", "--out", str(out)])
    methods = json.loads(out.read_text())["methods"]
    assert list(methods) == ["chunkft K=4", "RoundPipe"]
    row = methods["chunkft K=4"]
    assert row["median_ms"] > 0
    assert row["final_loss"] < row["first_loss"]
    assert methods["RoundPipe"]["error"]
    assert not {"median_ms", "final_loss", "training_bytes"} & set(methods["RoundPipe"])


def test_method_that_is_not_installed_is_named(monkeypatch):
    method = peer_methods.Method(lambda model, lr: None, "", package="no-such-package")
    monkeypatch.setitem(peer_methods.METHODS, "absent", method)
    assert peer_bench.missing("absent") == "not installed: pip install no-such-package"
    assert peer_bench.missing("AdamW") is None


@pytest.mark.parametrize("losses", [[1.0, float("nan")], [1.0, 1.0, 1.0]])
def test_training_that_does_not_train_fails_its_check(losses):
    assert "check failed" in peer_bench.wrong("method", losses)
    assert peer_bench.wrong("method", [1.0, 0.9]) is None


def test_wrong_gradient_of_a_chunk_is_found(monkeypatch):
    ids = peer_bench.Text(128).batch(2, 9)
    assert peer_bench.differs_from_adamw("chunkft K=4", "tiny", ids) is None

    def backwards(model, lr):
        """Steps that go up instead of down."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, maximize=True)
        return peer_methods.stepping(model, optimizer)

    monkeypatch.setitem(peer_methods.METHODS, "chunkft wrong", peer_methods.Method(backwards, ""))
    assert "check failed" in peer_bench.differs_from_adamw("chunkft wrong", "tiny", ids)


def test_text_can_be_learned_each_token_has_four_successors():
    text = peer_bench.Text(31, seed=3)
    ids = text.batch(5, 200)
    assert ids.shape == (5, 201)
    followers = {(int(a), int(b)) for row in ids for a, b in itertools.pairwise(row)}
    assert all(b in text.next[a].tolist() for a, b in followers)


def test_theory_is_a_whole_step_for_one_chunk_and_half_of_it_for_many():
    assert scaling.step_theory(1) == 1
    assert scaling.step_theory(10**9) == pytest.approx(0.5)


def test_scaling_point_has_its_theory_and_its_gap_and_a_wrong_gradient_gives_none(monkeypatch):
    point = scaling.Point(model="tiny", chunks=3, batch=1, tokens=7)
    ticks = iter(range(10**6))
    row = scaling.measure(point, rounds=2, clock=lambda: float(next(ticks)))
    assert row["step_gap"] == pytest.approx(row["step"]["ratio"] / row["step_theory"] - 1)
    assert 1 / 3 <= row["bytes_share"]["state"] < 0.5
    assert "tiny" in scaling.line_of(row)
    whole = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a: tuple(2 * g for g in whole(*a)))
    with pytest.raises(harness.CheckFailed, match="differs from autograd"):
        scaling.measure(point, rounds=2)


def test_pictures_of_peers_and_scaling_are_drawn(tmp_path):
    good = {"median_ms": 3.0, "training_bytes": 2**20, "final_loss": 4.0, "first_loss": 5.0}
    methods = {"chunkft K=4": good, "LoRA": good, "gone": {"error": "needs a GPU"}}
    pictures.peers({"methods": methods, "settings": {"steps": 6}}, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 1000


def test_quick_round_goes_on_after_a_failure_and_tells_it(tmp_path, monkeypatch, capsys):
    ran = []

    def fails(arguments):
        raise RuntimeError("no disk")

    monkeypatch.setattr(
        quick, "run", lambda out, run=quick.run: run(out, (("a", fails, ()), ("b", ran.append, ("--x",))))
    )
    assert quick.main(["--out", str(tmp_path)]) == 1
    assert ran == [["--x", "--out", str(tmp_path / "b.json")]]
    assert "a failed: RuntimeError: no disk" in capsys.readouterr().out
    parts = json.loads((tmp_path / "quick.json").read_text())["parts"]
    assert parts["a"]["error"]
    assert parts["b"]["error"] is None


@pytest.mark.parametrize("name", [n for n, m in peer_methods.METHODS.items() if m.package is None])
def test_methods_of_torch_and_chunkft_train(name):
    _, advance = peer_bench.build(name, "tiny", 1e-2)
    ids = plain_llama.batch_of("tiny", torch.device("cpu"), 1, 9)
    losses = [float(advance(ids)) for _ in range(5)]
    assert losses[-1] < losses[0]
