"""Programs that cases of the suite start: the build, folders of tests, smoke and tuning."""

import json
import subprocess
import sys

import pytest

from bench import common, gpu_smoke, kernels, suite_build


def test_nothing_to_tune_is_no_result(tmp_path):
    """A suite whose kernels failed would call it done, and not tune on another day."""
    (tmp_path / "suite.json").write_text(json.dumps({"cases": {}}))
    words = ["--worst", "8", "--suite", str(tmp_path / "suite.json"), "--predict", "h100"]
    with pytest.raises(SystemExit, match="has no results"):
        kernels.main(words)


def test_a_tool_that_hangs_costs_its_lines_alone(monkeypatch):
    monkeypatch.setattr(gpu_smoke.shutil, "which", lambda name: name)

    run = subprocess.run  # of the whole module: others ask for a processor's name, say

    def hang(command, **options):
        if command[0] != "nvidia-smi":
            return run(command, **options)
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(gpu_smoke.subprocess, "run", hang)
    monkeypatch.setattr("chunkft.cli.machine.facts", dict)
    assert "TimeoutExpired" in gpu_smoke.machine(rehearse=True)["nvidia-smi"][0]


def test_folders_of_tests_run_without_xdist_too(tmp_path, monkeypatch):
    (tmp_path / "test_one.py").write_text("def test_good(): pass\n")
    code = (
        "import importlib.util, sys; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'xdist' else find(name)\n"
        "from bench import suite_tests; sys.exit(suite_tests.main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=common.REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pytest-xdist is not installed" in done.stdout
    assert "bringing up nodes" not in done.stdout
    assert done.stdout.strip().endswith("1 passed")


def outcomes(folder):
    """The process that ran a folder of tests, of which some fail, and the JSON that it left."""
    out = folder / "tests.json"
    command = [sys.executable, "-m", "bench.suite_tests", str(folder), "--workers", "2", "--out", str(out)]
    done = subprocess.run(command, cwd=common.REPO, capture_output=True, text=True)
    assert done.returncode == 1
    return done, json.loads(out.read_text())


def test_a_folder_of_tests_leaves_the_outcome_of_each(tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no second device')\n"
        "def test_skipped(): pass\n"
    )
    done, result = outcomes(tmp_path)
    assert done.stdout.strip().endswith("1 passed, 1 failed, 1 skipped")
    assert result["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "error": 0}
    assert "assert 1 == 2" in next(iter(result["failures"].values()))
    assert "no second device" in next(iter(result["skipped"].values()))


def test_a_worker_whose_device_is_spoilt_ends_and_the_other_tests_run(tmp_path):
    """As after an illegal access: from then on every call of the process fails."""
    (tmp_path / "test_device.py").write_text(
        "import pytest, torch\n"
        "@pytest.fixture(autouse=True)\n"
        "def device(monkeypatch):\n"
        "    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)\n"
        "    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: None)\n"
        "    yield\n"
        "def test_spoils(monkeypatch):\n"
        "    def refuse(): raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "    monkeypatch.setattr(torch.cuda, 'synchronize', refuse)\n"
        "    refuse()\n"
        "@pytest.mark.parametrize('i', range(8))\n"
        "def test_works(i): pass\n"
    )
    done, result = outcomes(tmp_path)
    assert result["counts"]["passed"] == 8
    assert [name.split("::")[1] for name in result["failures"]] == ["test_spoils"]
    assert "the device no longer answers" in done.stderr + done.stdout


REFUSED = ("-c", "raise SystemExit('error: externally-managed-environment')")


def test_where_pip_is_refused_the_core_is_built_in_place(capfd):
    """As the Python of a distribution does, or an environment that is read-only."""
    assert suite_build.build(("-c", "print('pip')"), REFUSED) == "installed"
    assert suite_build.build(REFUSED, ("-c", "print('setup')")) == "in place"
    out, err = capfd.readouterr()
    assert "externally-managed" in err
    assert str(common.REPO / "chunkft" / "__init__.py") in out
    with pytest.raises(RuntimeError, match="neither pip nor"):
        suite_build.build(REFUSED, REFUSED)


def test_a_build_that_cannot_be_imported_is_no_build(monkeypatch):
    monkeypatch.setattr(suite_build, "PROBE", "import chunkft_of_elsewhere")
    with pytest.raises(RuntimeError, match="cannot be imported"):
        suite_build.build(("-c", "pass"), REFUSED)


def test_without_pip_the_core_is_built_in_place(monkeypatch):
    monkeypatch.setattr(suite_build.importlib.util, "find_spec", lambda name: None)
    assert suite_build.build(("-c", "raise SystemExit('called')"), ("-c", "pass")) == "in place"
