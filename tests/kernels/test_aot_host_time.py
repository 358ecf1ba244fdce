"""What a call costs on the host, in lines and calls of Python: they are the same on every machine."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from aot import CACHE

from bench import host_time
from bench.empty_launches import empty_launches

# lines and calls; a comparison with torch.mm in time is in bench/results/host-time-cpu.json
BOUNDS = {
    "wgrad auto": (25, 16),
    "wgrad auto, out=": (30, 20),
    "wgrad auto, accumulate": (30, 20),
    "wgrad triton": (320, 130),
}


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    with torch.no_grad(), empty_launches(recorded=False):
        yield host_time.cases()


@pytest.mark.parametrize("name", BOUNDS)
def test_a_steady_call_executes_few_lines(calls, name):
    found = host_time.counted(calls[name])
    lines, count = BOUNDS[name]
    assert found.lines <= lines, found
    assert found.calls <= count, found


def test_counting_counts():
    def three():
        a = 1
        b = abs(a)
        return b

    assert host_time.counted(three) == host_time.Counted(3, 2)
    assert host_time.counted(lambda: [three(), three()]) == host_time.Counted(7, 5)


def test_the_committed_figures_hold_the_bound():
    path = Path(host_time.__file__).parent / "results" / "host-time-cpu.json"
    found = {case["case"]: case for case in json.loads(path.read_text())["cases"]}
    for name in ("wgrad auto", "wgrad auto, out=", "wgrad auto, accumulate"):
        assert found[name]["over_mm_us"] <= 10
    own = found["wgrad triton"]["us"]
    assert own < found["wgrad triton, through JITFunction.run"]["us"]


def test_every_case_is_timed_beside_torch_mm(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(CACHE))
    monkeypatch.setattr(host_time, "TURN_US", 1)
    host_time.main(["--rounds", "2", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert found[0]["case"] == "torch.mm"
    assert found[0]["over_mm_us"] == 0
    assert all(case["us"] > 0 for case in found)
    assert len(capsys.readouterr().out.splitlines()) == len(found) + 1
