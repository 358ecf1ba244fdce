"""The harness tells a slower function from noise, and gives no number for a wrong one; all clocks here are made up."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common, compare, harness, revision

NO_CHECKS: dict = {}


class Machine:
    """A clock that only the functions made by it advance, each call by its cost and some noise."""

    def __init__(self, noise: float, seed: int = 0) -> None:
        self.now, self.noise, self.random = 0.0, noise, random.Random(seed)

    def clock(self) -> float:
        return self.now

    def function(self, cost: float):
        def run() -> None:
            self.now += cost * (1 + self.noise * self.random.random())

        return run


def step_file(path: Path, seed: int, **costs: float) -> Path:
    """A result of the form of bench.step, with 3 % noise."""
    noise = random.Random(seed)
    rows = {
        name: {"steps_ms": [cost * (1 + 0.03 * noise.random()) for _ in range(33)]}
        for name, cost in costs.items()
    }
    path.write_text(json.dumps({"device": "d", "threads": 1, "variants": rows}))
    return path


def test_slowed_function_is_flagged_and_the_same_function_is_not():
    machine = Machine(noise=0.04)
    variants = {
        "base": machine.function(1.0),
        "same": machine.function(1.0),
        "slowed": machine.function(1.15),
        "faster": machine.function(0.8),
    }
    result = harness.measure(variants, NO_CHECKS, rounds=15, clock=machine.clock)
    assert 0 < result["noise"] < 0.05
    verdicts = {name: row["verdict"] for name, row in result["variants"].items()}
    assert verdicts == {"base": "base", "same": "same", "slowed": "slower", "faster": "faster"}
    assert [len(row["samples_ms"]) for row in result["variants"].values()] == [15] * 4


@pytest.mark.parametrize("seed", range(10))
def test_two_runs_of_the_same_thing_agree_within_the_noise(seed):
    machine = Machine(noise=0.05, seed=seed)
    run = machine.function(1.0)
    found = harness.measure({"a": run, "b": run}, NO_CHECKS, clock=machine.clock)
    assert found["variants"]["b"]["verdict"] == "same"


def test_noise_that_hides_a_difference_is_said_instead_of_a_conclusion():
    machine = Machine(noise=3.0)
    variants = {"base": machine.function(1.0), "slowed": machine.function(4.0)}
    result = harness.measure(variants, NO_CHECKS, rounds=5, clock=machine.clock)
    assert result["too_noisy"]
    assert result["variants"]["slowed"]["verdict"] == "too noisy"
    assert "too noisy to conclude" in harness.lines(result)[0]


def test_failed_check_yields_no_number_and_calls_nothing():
    called = []
    variants = {"right": lambda: called.append(1), "wrong": lambda: called.append(2)}
    checks = {"right": lambda: None, "wrong": lambda: "differs by 0.3"}
    with pytest.raises(harness.CheckFailed, match=r"wrong: differs by 0\.3"):
        harness.measure(variants, checks)
    assert called == []


def test_interval_of_pairs_leaves_out_what_disturbs_both():
    load = [1.0, 5.0, 2.0, 9.0, 3.0, 7.0, 4.0]
    found = harness.ratio([1.5 * v for v in load], load)
    assert (found.ratio, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    apart = harness.ratio([1.5 * v for v in load], load, paired=False)
    assert apart.low < 1 < apart.high


@pytest.mark.parametrize(
    ("over", "under", "words"),
    [
        ([1.0], [1.0], "over has 1 samples"),
        ([1.0, 2.0], [1.0, 0.0], "under has 2 samples"),
        ([1.0, 2.0], [1.0], "pairs"),
    ],
)
def test_ratio_refuses_samples_that_say_nothing(over, under, words):
    with pytest.raises(ValueError, match=words):
        harness.ratio(over, under)


def test_every_variant_is_called_once_a_round_and_the_order_turns():
    order: list[str] = []
    variants = {name: lambda name=name: order.append(name) for name in "abc"}
    harness.interleave(variants, rounds=2, clock=iter(range(99)).__next__, warmup=1)
    assert "".join(order) == "cbaabccba"


def test_compare_flags_the_slowed_variant_and_nothing_else(tmp_path, capsys):
    old = step_file(tmp_path / "old.json", 1, adamw=10, chunk=6, other=7)
    # The machine is half as fast as before, and one variant has become slower beyond that.
    new = step_file(tmp_path / "new.json", 2, adamw=20, chunk=16, other=14)
    assert compare.main([str(old), str(new)]) == 1
    flagged = [line for line in capsys.readouterr().out.splitlines() if line.startswith("REGRESSION")]
    assert len(flagged) == 1
    assert "variants.chunk " in flagged[0]


def test_compare_of_two_runs_of_the_same_thing_is_quiet(tmp_path, capsys):
    old = step_file(tmp_path / "old.json", 1, adamw=10, chunk=6)
    new = step_file(tmp_path / "new.json", 2, adamw=13, chunk=7.8)
    assert compare.main([str(old), str(new)]) == 0
    assert "2 compared, 0 regressions" in capsys.readouterr().out


def test_compare_flags_a_slowed_pager_a_slowed_kernel_and_more_bytes(tmp_path):
    old = {
        "pager_gbs": {"load": 9.0, "store": 8.0},
        "cases": [{"name": "slice", "speedup": 5.0}],
        "held": {"variant": {"gradients": 1000}},
    }
    new = {
        "pager_gbs": {"load": 5.0, "store": 7.9},
        "cases": [{"name": "slice", "speedup": 2.0}],
        "held": {"variant": {"gradients": 1020}},
    }
    worse = {change.name for change in compare.compare(old, new) if change.regression}
    assert worse == {"pager_gbs.load", "cases.slice.speedup", "held.variant.gradients"}
    assert not any(change.regression for change in compare.compare(old, old))


@pytest.mark.parametrize("words", [[], ["one.json"], ["a.json", "b.json", "--rev", "HEAD"]])
def test_compare_takes_two_files_or_a_revision(words):
    with pytest.raises(SystemExit) as stopped:
        compare.main(words)
    assert stopped.value.code == 2


def test_compare_says_what_it_cannot_read_or_find(tmp_path, capsys):
    old = step_file(tmp_path / "old.json", 1, adamw=10)
    assert compare.main([str(old), str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="in common"):
        compare.compare(json.loads(old.read_text()), {"device": "d"})


def test_revision_is_judged_by_its_noise():
    def sample(noise: random.Random, factor: float) -> dict[str, float]:
        speed = 1 + noise.random()  # of the machine while this process ran
        return {
            "adamw": speed,
            "slowed": 0.6 * speed * factor,
            "kept": 0.6 * speed * (1 + 0.01 * noise.random()),
        }

    noise = random.Random(0)
    taken = {
        "old": [sample(noise, 1.0) for _ in range(6)],
        "new": [sample(noise, 1.2) for _ in range(6)],
        harness.AGAIN: [sample(noise, 1.2) for _ in range(6)],
    }
    verdicts = {name: row["verdict"] for name, row in revision.judged(taken)["variants"].items()}
    assert verdicts == {"slowed": "slower", "kept": "same"}


def test_tree_of_a_revision_holds_its_package_and_these_benchmarks_and_goes_away(monkeypatch):
    if not (common.REPO / ".git").exists():
        pytest.skip("needs the git history")
    # Compiled for minutes where csrc/ is being worked on; what is tested here is the tree.
    cores = []
    monkeypatch.setattr(revision, "_native_core", lambda tree, rev: cores.append((tree, rev)))
    with revision.tree_of("HEAD") as tree:
        assert (tree / "chunkft" / "__init__.py").is_file()
        assert cores == [(tree, revision.git("rev-parse", "HEAD"))]
        assert (tree / "bench" / "harness.py").read_text() == (
            common.REPO / "bench" / "harness.py"
        ).read_text()
    assert not tree.exists()
    listed = subprocess.run(["git", "worktree", "list"], cwd=common.REPO, capture_output=True, text=True)
    assert str(tree) not in listed.stdout
    with pytest.raises(RuntimeError, match="no-such-revision"), revision.tree_of("no-such-revision"):
        pass


RESULTS = sorted(common.RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_every_committed_result_compares_with_itself_or_says_why_not(path, capsys):
    status = compare.main([str(path), str(path)])
    printed = capsys.readouterr()
    if status == 2:
        assert "no samples, bytes or rates in common" in printed.err
    else:
        assert status == 0
        assert ", 0 regressions" in printed.out


def test_compare_sees_samples_of_variants_that_took_turns():
    old = json.loads((common.RESULTS / "scaling-cpu.json").read_text())
    new = json.loads(json.dumps(old))
    old["noise"] = new["noise"] = 0.01
    slowed = new["points"][1]["samples_ms"]
    slowed["chunk"] = [3 * taken for taken in slowed["chunk"]]
    worse = [change.name for change in compare.compare(old, new) if change.regression]
    assert worse == ["points.1.chunk"]


def test_a_machine_without_git_records_the_commit_that_it_is_told_or_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "CHECKOUT", True)
    monkeypatch.setenv("PATH", str(tmp_path))
    for told, recorded in ((None, "unknown"), ("", "unknown"), ("abc123-dirty", "abc123-dirty")):
        if told is None:
            monkeypatch.delenv("CHUNKFT_COMMIT", raising=False)
        else:
            monkeypatch.setenv("CHUNKFT_COMMIT", told)
        assert common.commit() == recorded
        assert common.header(seed=0)["commit"] == recorded


def test_the_commit_that_is_told_goes_before_the_one_that_git_knows(monkeypatch):
    monkeypatch.setenv("CHUNKFT_COMMIT", "abc123")
    assert common.commit() == "abc123"
