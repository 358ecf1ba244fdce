"""The benchmark of streamed weights: what its ablations leave out, what moves, and what its pictures are drawn from."""

import json

import pytest
import torch

from bench import common, plain_llama, streamed, streamed_picture, streamed_setup
from bench.streamed_setup import Setting, Trial

LAYERS = 6


@pytest.fixture(autouse=True)
def deep(monkeypatch):
    """A shape with more blocks than slots, whose head is tiles."""
    monkeypatch.setitem(plain_llama.SHAPES, "deep", plain_llama.Shape(32, LAYERS, 48, 2, 2, 96))


def setting(resident=0, positions=2, rounds=1):
    return Setting("deep", 8, resident, positions, rounds, 4096, 1 << 16, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("resident", [0, 2, 3])
@pytest.mark.parametrize("place", ["host", "device"])
def test_a_step_moves_the_bytes_of_the_formula_and_the_ablations_what_they_say(place, resident):
    trial = Trial(place, setting(resident, positions=3), interval=3)
    size = trial.stream.streamed[0].nbytes
    tiles = 2 * sum(trial.stream.units.tables[-1].tiles)
    assert tiles == 2 * 96 * 32 * 4
    pages = []
    for _ in range(3):
        moved, expected = [], trial.expected()
        for run in (
            trial.step,
            trial.stale_step,
            trial.traffic,
            trial.step,
        ):  # then the next block has its turn
            before = trial.loaded()
            run()
            moved.append(trial.loaded() - before)
        assert moved == [expected, 0, expected, expected]
        pages.append((expected - tiles) / size)
    streamed_blocks = LAYERS - resident
    # blocks 1, 3 and 5 are trained in turn; three slots hold the last ones at the end of the forward pass
    stay = trial.stream.units.resident(resident)
    below = [sum(i not in stay for i in range(block)) for block in (1, 3, 5)]
    assert pages == [streamed_blocks + max(0, streamed_blocks - low - 3) for low in below]
    trial.close()


def test_streamed_and_resident_train_alike_and_stale_weights_do_not():
    trials = streamed_setup.made(setting(), ["resident", "host", "device"])
    losses = {}
    for place, trial in trials.items():
        trial.step()
        losses[place] = trial.loss
    assert losses["host"] == losses["device"] == pytest.approx(losses["resident"], rel=1e-6)
    trials["host"].stale_step()
    assert trials["host"].loss != losses["host"]
    trials["host"].step()  # and the copies are back
    assert trials["host"].loss == pytest.approx(losses["host"], rel=1e-4)
    for trial in trials.values():
        trial.close()


def test_figures_are_differences_and_ratios_of_the_same_rounds():
    samples = {
        "resident": [[(4.0, 1.0), (4.0, 1.0)], [(8.0, 1.0), (8.0, 1.0)]],
        "host": [[(6.0, 4.0), (6.0, 4.0)], [(12.0, 4.0), (12.0, 4.0)]],
        "host, no copy": [[(5.0, 9.0), (5.0, 9.0)], [(10.0, 9.0), (10.0, 9.0)]],
        "no compute": [[(2.0, 0.0), (2.0, 0.0)], [(4.0, 0.0), (4.0, 0.0)]],
    }
    traffic = {name: [] for name in samples} | {
        "host": [{"moved": 6, "expected": 6}, {"moved": 4, "expected": 4}]
    }
    found = streamed.figures_of(setting(rounds=2), samples, traffic)
    assert found["variants"]["host"]["step_ms"] == 13_000
    assert found["variants"]["host"]["moved_bytes"] == found["variants"]["host"]["expected_bytes"] == 5
    assert found["exposed"]["host"] == {
        "ms": 1500,
        "quartiles_ms": [1000, 2000],
        "share_of_step": 1.5 / 13,
        "share_of_traffic": 0.5,
    }
    assert found["speed"]["host"]["of_resident"] == pytest.approx(7 / 13)


def test_the_command_writes_every_case_and_refuses_bytes_that_are_not_the_formulas(
    tmp_path, monkeypatch, capsys
):
    out = tmp_path / "streamed.json"
    words = ["--model", "deep", "--tokens", "8", "--positions", "2", "--rounds", "2", "--out", str(out)]
    streamed.main([*words, "--resident", "0", "2", "--places", "resident", "host"])
    found = json.loads(out.read_text())["cases"]
    assert list(found) == ["deep/T8/resident0", "deep/T8/resident2"]
    whole, part = found.values()
    assert list(whole["variants"]) == ["resident", "host", "host, no copy", "no compute"]
    device = whole["bytes"]["host"]["device"]
    page = plain_llama.Shape(32, LAYERS, 48, 2, 2, 96)
    block = 4 * (4 * page.hidden**2 + 3 * page.hidden * page.intermediate)
    assert device["weights, ring"] == 3 * block
    assert part["bytes"]["host"]["device"]["weights, resident"] == device["weights, resident"] + 2 * block
    assert (
        whole["bytes"]["host"]["host"]["weights"] == LAYERS * block + 4 * 96 * 32
    )  # so small a head stays on the device
    assert "of the resident speed" in capsys.readouterr().out
    monkeypatch.setattr(streamed_setup, "step_bytes", lambda stream, lowest: 1)
    with pytest.raises(SystemExit, match="not those of the formula: deep/T8/resident0 host"):
        streamed.main([*words, "--places", "host"])


def test_a_target_is_reached_by_the_better_place():
    on_gpu = Setting("llama-2-7b", 4096, 0, 4, 4, None, 1 << 26, torch.device("cuda"), torch.bfloat16)
    result = {
        "variants": {"host": {"peak_bytes": 3 << 30}, "device": {"peak_bytes": 5 << 30}},
        "speed": {"host": {"of_resident": 0.85}, "device": {"of_resident": 0.91}},
    }
    found = streamed.targets(on_gpu, result)
    assert [(t["value"], t["reached"]) for t in found] == [(3.0, True), (0.91, True)]
    assert streamed.targets(setting(), result) == []


def test_a_recorded_step_has_every_block_both_ways_and_its_copies():
    found = streamed_picture.record_step("deep", 8, 2)
    lanes = {
        lane: [row for row in found["spans"] if row[0] == lane] for lane in {row[0] for row in found["spans"]}
    }
    assert [row[1] for row in lanes["forward"]] == [str(i) for i in range(LAYERS)]
    assert found["trained"] == 1
    assert [row[1] for row in lanes["backward"]] == ["5", "4", "3", "2", "1"]
    assert [row[1] for row in lanes["up, blocks"]] == [*"012345", "2", "1"]  # the ring had 3, 4 and 5
    assert len(lanes["down"]) == 7
    length = lanes["step"][0][3]
    assert all(start >= 0 and start + size <= length + 1 for _, _, start, size in found["spans"])


def test_bytes_on_the_device_do_not_grow_with_depth():
    """Counted from storages while it trains: three blocks, two tiles of half a block, and norms."""
    committed = json.loads((common.RESULTS / streamed_picture.DEPTH).read_text())["cases"]
    assert [case["layers"] for case in committed] == [4, 8, 16, 32]
    for case in [*committed, streamed_picture.record_depth(3), streamed_picture.record_depth(5)]:
        norms = 4 * 192 * (2 * case["layers"] + 1)
        assert case["streamed"]["blocks"] == 3 * case["block"]
        assert case["streamed"]["tiles"] <= 2 * case["tile"] <= case["block"]
        assert case["streamed"]["rest"] == norms
        assert case["resident"] == case["host"] + norms
