"""The report of a suite: measured beside predicted, targets, and the table that the kernels read."""

import json
from dataclasses import asdict

import pytest

from bench import common, predictions, suite_report
from bench.kernel_cases import cases
from bench.suite_cases import DENSE, MEASURED
from chunkft.kernels.targets import TARGETS

CONFIG = {"block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 8, "num_stages": 3}


def record(case, triton, torch_us, auto):
    values = json.loads(json.dumps(asdict(case))) | {"config": CONFIG, "gpu": "h200"}
    values |= {"triton_us": triton, "torch_us": torch_us, "auto_us": auto}
    gains = {"speedup": torch_us / triton, "gain_of_auto": torch_us / triton, "auto_speedup": torch_us / auto}
    return values | gains


@pytest.fixture
def suite():
    """Results as of a device that is twice as slow as predicted at one shape."""
    some = list(cases(("llama-2-7b",), (32,), (1024,), ("slice", "group")))
    plain = next(case for case in some if case.form == "slice")
    group = next(case for case in some if case.form == "group")
    gpus = [{"compute_capability": "9.0"}]
    ok = {"verdict": "ok", "seconds": 1.0, "output": []}
    place = {"peak_bytes": 13.0 * 2**30, "driver_bytes": 14.0 * 2**30, "mean_ms": 50.0, "exposed_share": 0.03}
    return common.header(0) | {
        "kind": "measured",
        "gpu": "NVIDIA H200",
        "cases": {
            "contact/machine": ok | {"result": {"found": {"facts": {"gpus": gpus}}}},
            "contact/ceilings": ok | {"result": {"found": {"copy_gb_s": 4300.0, "link_gb_s": {"load": 51.0}}}},
            "contact/wgrad-tma": {"verdict": "killed (SIGABRT)", "seconds": 2.0, "output": ["illegal access"]},
            "kernels/llama-2-7b": ok
            | {
                "result": {
                    "records": {
                        plain.key: record(plain, 40.0, 30.0, 31.0),
                        group.key: record(group, 20.0, 30.0, 22.0),
                        "slice/llama-2-7b/broken/K1/T1": {"error": "off by nan"},
                    }
                }
            },
            "paper/paged": ok | {"result": {"variants": {"paged K=32": place}}},
            "paper/adamw": ok | {"result": {"variants": {"adamw": {"mean_ms": 110.0}}}},
        },
    }  # fmt: skip


def test_measured_stands_beside_predicted(suite):
    predicted = {"gpu": "h200", "time": "before", "figures": {"ceiling/copy_gb_s": {"value": 2150.0}}}
    found = {figure.key: figure for figure in suite_report.figures(suite, predicted)}
    assert found["ceiling/copy_gb_s"].ratio == 2.0
    assert found["ceiling/link/load"].ratio is None
    assert found["llama-2-7b/paged K=32/peak"].measured == 13.0
    assert not any("broken" in key for key in found)
    shown = "\n".join(suite_report.lines(suite, predicted))
    assert "5 of 6 cases ended well" in shown
    assert "contact/wgrad-tma: killed (SIGABRT) illegal access" in shown
    assert "ceiling/copy_gb_s: 4300" in shown
    assert "| ceiling/copy_gb_s | 4300  | 2150 | 2.00 |" in suite_report.markdown(suite, predicted).replace(
        "GB/s", ""
    )


def test_targets_are_reached_or_missed_by_the_worst_figure(suite):
    found = {target.name.split(",")[0]: target for target in suite_report.targets(suite)}
    assert not found["auto against cuBLAS"].reached
    assert found["auto against cuBLAS"].value == pytest.approx(30 / 31)
    assert found["slices that share X"].reached
    assert found["Llama-2-7B"].reached
    assert not found["exposed paging"].reached
    assert found["step over full AdamW's"].value == pytest.approx(50 / 110)
    last = suite_report.lines(suite, {})[-1]
    assert last.startswith("worst: exposed paging, share of a step 0.030; auto against cuBLAS")


def test_streamed_weights_have_figures_and_targets():
    """Under the keys of the committed predictions; a target is the one that the benchmark held its figures against."""
    variants = {
        "host": {"peak_bytes": 3 << 30, "step_ms": 500.0},
        "no compute": {"step_ms": 400.0, "peak_bytes": None},
    }
    case = {
        "variants": variants,
        "exposed": {"host": {"share_of_step": 0.25}},
        "targets": [
            {"name": "peak, GiB", "value": 3.0, "bound": 4.5, "reached": True},
            {"name": "speed of resident", "value": 0.5, "bound": 0.9, "reached": False},
        ],
    }
    key = "llama-2-7b/T4096/resident0"
    suite = {"cases": {"streamed/4096": {"verdict": "ok", "result": {"cases": {key: case}}}}}
    told = json.loads((predictions.FOLDER / "h200.json").read_text())
    found = {figure.key: figure for figure in suite_report.figures(suite, told)}
    assert set(found) == {
        f"streamed/{key}/{part}" for part in ("host/peak", "host/step", "no compute/step", "host/exposed")
    }
    assert all(figure.ratio for figure in found.values())
    assert found[f"streamed/{key}/host/peak"].measured == 3.0
    peak, speed = suite_report.targets(suite)
    assert peak.reached
    assert not speed.reached
    assert speed.shortfall == pytest.approx(0.8)


def test_figures_of_a_rehearsal_are_held_against_nothing(suite):
    shown = suite_report.lines(suite | {"kind": "rehearsed"}, {})
    assert "5 of 6 cases ended well" in shown
    assert "mean nothing" in shown[-1]
    assert not any("target" in line or "worst" in line for line in shown)


def test_the_table_of_a_suite_is_what_the_kernels_read(suite, tmp_path, capsys):
    from chunkft.kernels import measured

    path, table = tmp_path / "suite.json", tmp_path / "sm90.json"
    path.write_text(json.dumps(suite))
    suite_report.main([str(path), "--table", str(table)])
    assert "written" in capsys.readouterr().out
    assert measured.load(table).family == 90
    assert len(json.loads(table.read_text())["entries"]) == 2
    path.write_text(json.dumps(suite | {"kind": "rehearsed"}))
    with pytest.raises(SystemExit):
        suite_report.main([str(path), "--table", str(table)])
    assert "--table needs measurements" in capsys.readouterr().err


def test_a_file_that_is_no_suite_is_refused(tmp_path, capsys):
    for content in ("{}", "no JSON", "[]"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(SystemExit):
            suite_report.main([str(tmp_path / "x.json")])
        assert "holds no results of bench.gpu_suite" in capsys.readouterr().err


def test_every_kernel_case_of_the_suite_was_predicted():
    """The committed files hold a figure for whatever the suite will measure; a changed model has to commit new ones."""
    for gpu in predictions.GPUS:
        told = json.loads((predictions.FOLDER / f"{gpu}.json").read_text())["figures"]
        for case in cases(MEASURED, (1, 32), (1024, 4096), DENSE):
            assert {f"{case.key}/{side}" for side in ("triton", "torch", "auto")} <= set(told)
        now = predictions.predicted(TARGETS[gpu])
        assert now == told, f"run python -m bench.predictions: {gpu} is predicted otherwise now"


def test_a_step_is_predicted_from_flop():
    """7B parameters, 1,024 tokens: forward, recomputation and dX are 2 P T each, 14 TFLOP."""
    h200 = TARGETS["h200"]
    full = predictions.step_ms(h200, 6_600_000_000, 6_700_000_000, full=True)
    chunk = predictions.step_ms(h200, 6_600_000_000, 6_700_000_000, full=False)
    assert 0.35 < chunk / full < 0.55
    assert full > 1e3 * 4 * 2 * 1024 * 6.6e9 / (h200.tflops_16bit * 1e12)
