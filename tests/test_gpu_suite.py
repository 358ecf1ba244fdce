"""The suite of a first contact: one case that hangs, crashes or fails ends alone, and what is known is kept."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from bench import (
    common,
    gpu_smoke,
    gpu_suite,
    kernel_calls,
    kernels,
    records,
    suite_build,
    suite_cases,
    suite_run,
)
from bench.suite_run import NOT_STARTED, OUT_OF_TIME, Case, Suite

WRITES = (
    "import json, pathlib, sys\n"
    "path = pathlib.Path(sys.argv[1])\n"
    "before = json.loads(path.read_text())['records'] if path.exists() else {}\n"
)


def case(name, code, slot="a", **options):
    command = ("-c", code, "{out}")
    values = {"what": "", "command": command, "rehearsal": command, "expect": 0.1, "limit": 30.0} | options
    return Case(name=name, slot=slot, **values)


def run(cases, tmp_path, seconds=60.0, resume=False, **options):
    said = []
    suite = Suite(tmp_path / "suite.json", {"commit": "x"}, resume)
    suite_run.run_all(cases, suite, seconds, said.append, **options)
    return json.loads((tmp_path / "suite.json").read_text())["cases"], said


def test_a_case_that_hangs_crashes_or_fails_ends_alone(tmp_path):
    cases = [
        case("hangs", "import time; time.sleep(60)", limit=0.5),
        case("crashes", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        case("fails", "raise SystemExit('no figure')"),
        case("works", "print('well')"),
    ]
    rows, said = run(cases, tmp_path)
    assert [rows[c.name]["verdict"] for c in cases] == [OUT_OF_TIME, "killed (SIGSEGV)", "failed (1)", "ok"]
    assert "no figure" in rows["fails"]["output"][-1]
    assert "well" in said[-1]
    assert "[works] well" in (tmp_path / "suite.log").read_text()


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for the process below /proc")
@pytest.mark.parametrize("ends", ["out of time", "by itself"])
def test_children_of_a_case_end_with_it(tmp_path, ends):
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    wait = "time.sleep(60)" if ends == "out of time" else f"\nwhile not os.path.getsize({str(pid)!r}): pass"
    code = (
        f"import os, subprocess, sys, time; open({str(pid)!r}, 'w').close();"
        f" subprocess.Popen([sys.executable, '-c', {child!r}]); {wait}"
    )
    started = time.monotonic()
    rows, _ = run([case("parent", code, limit=5.0 if ends == "out of time" else 30.0)], tmp_path)
    assert rows["parent"]["verdict"] == (OUT_OF_TIME if ends == "out of time" else "ok")
    deadline = started + 40
    while time.monotonic() < deadline and _runs(int(pid.read_text())):
        time.sleep(0.05)
    assert not _runs(int(pid.read_text()))


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_of_a_case_that_is_stopped_are_kept(tmp_path):
    code = (
        WRITES + "path.write_text(json.dumps({'records': {'one': {'us': 1.5}}})); import time; time.sleep(60)"
    )
    rows, _ = run([case("long", code, limit=4.0)], tmp_path)
    assert rows["long"]["verdict"] == OUT_OF_TIME
    assert rows["long"]["result"]["records"] == {"one": {"us": 1.5}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["suite.json", "suite.log"]


def test_results_are_on_disk_while_a_case_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(suite_run, "EVERY", 0.1)
    seen = []
    put = Suite.put
    monkeypatch.setattr(Suite, "put", lambda self, name, row: (seen.append(dict(row)), put(self, name, row)))
    code = WRITES + "path.write_text(json.dumps({'records': {'one': {}}})); import time; time.sleep(2)"
    run([case("long", code)], tmp_path)
    assert any(row["verdict"] == "running" and "result" in row for row in seen)


def test_a_crash_costs_the_shape_and_not_those_behind_it(tmp_path):
    """A program that keeps records starts again behind the one in which it died, as often as is allowed."""
    script = tmp_path / "shapes.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "from bench.records import Records\n"
        "kept = Records(pathlib.Path(sys.argv[1]), {}, resume='--resume' in sys.argv)\n"
        "for key in 'abcde':\n"
        "    if key in kept: continue\n"
        "    with kept.case(key) as record:\n"
        "        if key in 'bd': os.abort()\n"
        "        record['us'] = 1.0\n"
    )
    command = (str(script), "{out}")
    environment = {"PYTHONPATH": str(common.REPO)}
    one = Case("shapes", "c", "", command, command, 0.1, 60.0, restarts=2, environment=environment)
    rows, _ = run([one], tmp_path, rehearse=True)
    found = rows["shapes"]["result"]["records"]
    assert {key: record.get("us", record.get("error")) for key, record in found.items()} == {
        "a": 1.0, "b": records.ENDED, "c": 1.0, "d": records.ENDED, "e": 1.0,
    }  # fmt: skip
    assert rows["shapes"]["verdict"] == "ok"
    fewer = dataclasses.replace(one, restarts=1)
    rows, _ = run([fewer], tmp_path, rehearse=True)
    assert rows["shapes"]["verdict"] == "killed (SIGABRT)"
    assert "e" not in rows["shapes"]["result"]["records"]


def test_what_does_not_fit_into_the_time_is_not_started(tmp_path):
    cases = [
        case("long", "raise SystemExit(3)", expect=500.0),
        case("short", "pass", expect=0.1),
    ]
    rows, _ = run(cases, tmp_path, seconds=60.0)
    assert rows["long"]["verdict"] == NOT_STARTED
    assert rows["short"]["verdict"] == "ok"


def test_resume_goes_on_with_what_did_not_end_well(tmp_path):
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'a').write('x')"
    failing = case("two", code + "; raise SystemExit(1)")
    run([case("one", code), failing], tmp_path)
    rows, _ = run([case("one", code), case("two", code)], tmp_path, resume=True)
    assert mark.read_text() == "xxx"
    assert [row["verdict"] for row in rows.values()] == ["ok", "ok"]
    run([case("one", code), case("two", code)], tmp_path)
    assert mark.read_text() == "xxxxx"


def test_resume_goes_on_behind_the_records_of_another_day(tmp_path):
    """What was measured is not measured again, nor lost where there is less time; what failed is tried again."""
    script = tmp_path / "shapes.py"
    script.write_text(
        "import pathlib, sys, time\n"
        "from bench.records import Records\n"
        "kept = Records(pathlib.Path(sys.argv[1]), {}, resume='--resume' in sys.argv)\n"
        "for key in 'abc':\n"
        "    if key in kept: continue\n"
        "    with kept.case(key) as record:\n"
        "        record['day'] = DAY\n"
        "        if DAY == 1 and key == 'b': record['error'] = 'off'\n"
        "        if DAY == 1 and key == 'c': time.sleep(60)\n"
    )
    text = script.read_text()
    one = Case("shapes", "c", "", (str(script), "{out}"), (), 0.1, 8.0, restarts=1)
    script.write_text(f"DAY = 1\n{text}")
    rows, _ = run([one], tmp_path)
    assert rows["shapes"]["verdict"] == OUT_OF_TIME
    rows, _ = run([dataclasses.replace(one, expect=1e9)], tmp_path, resume=True)
    assert rows["shapes"]["verdict"] == NOT_STARTED
    assert rows["shapes"]["result"]["records"]["a"] == {"day": 1}
    script.write_text(f"DAY = 2\n{text}")
    rows, _ = run([one], tmp_path, resume=True)
    assert rows["shapes"]["verdict"] == "ok"
    assert {k: r["day"] for k, r in rows["shapes"]["result"]["records"].items()} == {"a": 1, "b": 2, "c": 2}


def test_what_went_through_all_cases_is_not_started_again(tmp_path):
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'a').write('x'); raise SystemExit({common.INCOMPLETE})"
    rows, _ = run([case("one", code, restarts=3)], tmp_path)
    assert mark.read_text() == "x"
    assert rows["one"]["verdict"] == "some figures missing"


def test_results_are_kept_beside_a_new_run_and_a_broken_file_too(tmp_path):
    run([case("one", "print(1)")], tmp_path)
    run([case("two", "print(2)")], tmp_path)
    kept = list(tmp_path.glob("suite-*.json"))
    assert [list(json.loads(path.read_text())["cases"]) for path in kept] == [["one"]]
    (tmp_path / "suite.json").write_text('{"cases": {"two"')
    rows, _ = run([case("three", "print(3)")], tmp_path, resume=True)
    assert list(rows) == ["three"]
    assert '{"cases": {"two"' in [path.read_text() for path in tmp_path.glob("suite-*.json")]


def test_what_goes_wrong_around_a_case_ends_that_case_alone(tmp_path, monkeypatch):
    start = subprocess.Popen

    def refuse(command, **options):
        if "first" in command[-2]:
            raise OSError("no memory for another process")
        return start(command, **options)

    monkeypatch.setattr(subprocess, "Popen", refuse)
    rows, _ = run([case("one", "'first'"), case("two", "'second'")], tmp_path)
    assert rows["one"]["verdict"] == "not run: OSError: no memory for another process"
    assert rows["two"]["verdict"] == "ok"


def test_a_full_disk_costs_what_it_holds_and_not_the_suite(tmp_path, monkeypatch):
    """Output is read on, for the process waits otherwise, and later rows find room for all."""
    (tmp_path / "suite.log").mkdir()  # cannot be opened as a file
    write, refused = common.write_json, []

    def full(path, result):
        if len(refused) < 1:
            refused.append(path)
            raise OSError(28, "No space left on device")
        write(path, result)

    monkeypatch.setattr(common, "write_json", full)
    much = "print('x' * (1 << 20)); print('end')"
    rows, _ = run([case("one", much, limit=20.0), case("two", "pass")], tmp_path)
    assert refused
    assert [row["verdict"] for row in rows.values()] == ["ok", "ok"]
    assert rows["one"]["output"][-1] == "end"
    assert max(map(len, rows["one"]["output"])) <= suite_run.SHOWN


def test_results_that_are_no_json_do_not_end_the_suite(tmp_path):
    rows, _ = run([case("one", "import sys; open(sys.argv[1], 'w').write('{')"), case("two", "")], tmp_path)
    assert [row["verdict"] for row in rows.values()] == ["ok", "ok"]
    assert "result" not in rows["one"]


def test_cases_find_the_package_and_a_cache_for_triton(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    found = suite_run.surroundings(tmp_path)
    assert found["PYTHONPATH"].split(os.pathsep) == [str(common.REPO), "/elsewhere"]
    assert "TRITON_CACHE_DIR" not in found
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert suite_run.surroundings(tmp_path)["TRITON_CACHE_DIR"] == str(tmp_path / ".triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/own")
    assert "TRITON_CACHE_DIR" not in suite_run.surroundings(tmp_path)


def test_naming_cases_leaves_what_is_known_of_the_machine(tmp_path, monkeypatch):
    """Without it a report of all results could not be made."""
    monkeypatch.setattr(gpu_suite, "gpu_name", lambda: "Some GPU")
    cases = [case(name, "print(1)") for name in (*gpu_suite.FIRST, "other")]
    words = ["--results", str(tmp_path)]
    assert gpu_suite.main(words, cases) == 0
    assert gpu_suite.main([*words, "other"], cases) == 0
    rows = json.loads((tmp_path / "some-gpu" / "suite.json").read_text())["cases"]
    assert {name: row["verdict"] for name, row in rows.items()} == dict.fromkeys(rows, "ok")
    assert set(rows) == {*gpu_suite.FIRST, "other"}


def test_a_case_waits_for_what_it_needs(tmp_path):
    cases = [case("build", "raise SystemExit(1)"), case("kernel", "pass", needs="build")]
    rows, _ = run(cases, tmp_path)
    assert rows["kernel"]["verdict"] == "needs build"


def test_neighbours_run_together_and_measurements_alone(tmp_path):
    cases = [
        case("a1", "", together=True), case("a2", "", together=True), case("a3", ""),
        case("a4", "", together=True), case("b1", "", slot="b", together=True),
    ]  # fmt: skip
    assert [[c.name for c in batch] for batch in suite_run.batches(cases)] == [
        ["a1", "a2"],
        ["a3"],
        ["a4"],
        ["b1"],
    ]
    waits = "import time; time.sleep(1.5)"
    start = time.monotonic()
    rows, _ = run([case(f"t{i}", waits, together=True) for i in range(4)], tmp_path, workers=4)
    alone = sum(row["seconds"] for row in rows.values())
    assert time.monotonic() - start < alone


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_ends_the_case_and_keeps_the_file(tmp_path, sign):
    """And so do `timeout` and a closed terminal: nothing may stay on the GPU."""
    code = (
        "import signal, sys\n"
        # whoever started the tests in the background may have had these ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from bench import gpu_suite\n"
        "from bench.suite_run import Case\n"
        "wait = ('-c', 'import time; print(1); time.sleep(60)')\n"
        "cases = [Case('quick', 'a', '', ('-c', 'pass'), ('-c', 'pass'), 0, 9),\n"
        "         Case('slow', 'a', '', wait, wait, 0, 99, restarts=3), Case('never', 'a', '', wait, wait, 0, 99)]\n"
        f"sys.exit(gpu_suite.main(['--dry-run', '--results', {str(tmp_path)!r}], cases))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=common.REPO
    )
    path = tmp_path / gpu_suite.REHEARSED / "suite.log"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and "[slow] 1" not in (path.read_text() if path.exists() else ""):
        time.sleep(0.1)
    process.send_signal(sign)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume goes on" in out
    rows = json.loads(path.with_name("suite.json").read_text())["cases"]
    assert rows["quick"]["verdict"] == "ok"
    assert rows["slow"]["verdict"] == "killed (SIGKILL)"
    assert "never" not in rows


def test_the_command_refuses_what_it_does_not_know(tmp_path, capsys, monkeypatch):
    cases = [case("contact/build", "pass"), case("other", "pass", slot="b", needs="contact/build")]
    for words, message in (
        (["nothing"], "'nothing' is no slot and no case; allowed are a, b"),
        (["--minutes", "0"], "--minutes 0.0 is not allowed"),
    ):
        with pytest.raises(SystemExit):
            gpu_suite.main(words, cases)
        assert message in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit):
        gpu_suite.main(["--results", str(tmp_path)], cases)
    assert "torch sees no CUDA device; --dry-run rehearses on the CPU" in capsys.readouterr().err
    assert gpu_suite.main(["other", "--dry-run", "--results", str(tmp_path)], cases) == 0
    assert "2 of 2 cases ended well" in capsys.readouterr().out
    lock = os.open(tmp_path / gpu_suite.REHEARSED, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as a suite that runs at the same time
    with pytest.raises(SystemExit):
        gpu_suite.main(["other", "--dry-run", "--results", str(tmp_path)], cases)
    os.close(lock)
    assert "another suite writes into" in capsys.readouterr().err
    assert gpu_suite.main(["other", "--dry-run", "--results", str(tmp_path)], cases) == 0


def test_nothing_to_tune_is_no_result(tmp_path):
    """A suite whose kernels failed would call it done, and not tune on another day."""
    (tmp_path / "suite.json").write_text(json.dumps({"cases": {}}))
    words = ["--worst", "8", "--suite", str(tmp_path / "suite.json"), "--predict", "h100"]
    with pytest.raises(SystemExit, match="has no results"):
        kernels.main(words)


def test_a_tool_that_hangs_costs_its_lines_alone(monkeypatch):
    monkeypatch.setattr(gpu_smoke.shutil, "which", lambda name: name)

    def hang(command, **options):
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


def test_steps_of_the_papers_case_fit_their_time():
    """With K=1 each step moves the state of 7B parameters, 10 bytes each, over a link of 50 GB/s."""
    by_name = {c.name: c for c in suite_cases.all_cases() if c.slot == "d"}
    for name, one in by_name.items():
        words = one.command
        steps = sum(int(words[words.index(option) + 1]) for option in ("--steps", "--warmup"))
        each = 6.74e9 * 10 / 50e9 if name == "paper/backward-K=1" else 0.12
        pinned = 0.0 if name in ("paper/adamw", "paper/device") else 67 / 1.5
        assert steps * each + pinned < one.expect, name


def test_every_case_has_a_name_a_slot_and_a_rehearsal():
    cases = suite_cases.all_cases()
    names = [c.name for c in cases]
    assert len(set(names)) == len(names)
    assert list(dict.fromkeys(c.slot for c in cases)) == list(suite_cases.SLOTS)
    assert all(0 < c.expect <= c.limit for c in cases)
    assert all(c.needs in (None, *names[:i]) for i, c in enumerate(cases))
    programs = {c.command[1] for c in cases}
    rehearsed = {c.rehearsal[1] for c in cases if c.rehearsal}
    assert programs - rehearsed == {"bench.suite_build"}
    calls = [c.name.split("/")[1] for c in cases if "kernel" in c.command]
    assert calls == list(kernel_calls.CALLS)
    # twelve minutes reach the peak and the step of the paper's case, beside full AdamW
    first = cases[: names.index("paper/adamw") + 1]
    assert sum(c.expect / (suite_cases.WORKERS if c.together else 1) for c in first) < 12 * 60
    assert "contact/wgrad-tma" in gpu_suite.shown(cases)


def test_restarted_cases_know_how_to_resume():
    programs = {one.command[:2] for one in suite_cases.all_cases() if one.restarts}
    assert programs
    for program in programs:
        done = subprocess.run(
            [sys.executable, *program, "--help"], capture_output=True, text=True, cwd=common.REPO
        )
        assert "--resume" in done.stdout, program


def test_a_folder_of_tests_leaves_the_outcome_of_each(tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no second device')\n"
        "def test_skipped(): pass\n"
    )
    out = tmp_path / "tests.json"
    command = [sys.executable, "-m", "bench.suite_tests", str(tmp_path), "--workers", "2", "--out", str(out)]
    done = subprocess.run(command, cwd=common.REPO, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.strip().endswith("1 passed, 1 failed, 1 skipped")
    result = json.loads(out.read_text())
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
    out = tmp_path / "tests.json"
    command = [sys.executable, "-m", "bench.suite_tests", str(tmp_path), "--workers", "2", "--out", str(out)]
    done = subprocess.run(command, cwd=common.REPO, capture_output=True, text=True)
    assert done.returncode == 1
    result = json.loads(out.read_text())
    assert result["counts"]["passed"] == 8
    assert [name.split("::")[1] for name in result["failures"]] == ["test_spoils"]
    assert "the device no longer answers" in done.stderr + done.stdout


def test_records_are_written_before_and_after_each_case(tmp_path):
    path = tmp_path / "r.json"
    kept = records.Records(path, {"head": 1})
    with kept.case("one") as record:
        assert json.loads(path.read_text())["running"] == "one"
        record["us"] = 2.0
    with pytest.raises(ZeroDivisionError), kept.case("two"):
        1 / 0  # noqa: B018
    content = json.loads(path.read_text())
    assert content["records"] == {"one": {"us": 2.0}, "two": {"error": "ZeroDivisionError: division by zero"}}
    assert content["running"] is None
    assert content["head"] == 1
    again = records.Records(path, {"head": 2}, resume=True)
    assert list(again) == ["one", "two"]
    assert "one" not in records.Records(path, {"head": 3})


def test_the_suite_starts_where_the_package_is_not_built_yet(tmp_path):
    """Its first case builds it: nothing before that may import it."""
    (tmp_path / "chunkft").mkdir()
    (tmp_path / "chunkft" / "__init__.py").write_text("raise ImportError('not built')")
    (tmp_path / "bench").symlink_to(common.REPO / "bench")
    code = "import sys; from bench import gpu_suite; gpu_suite.main(['--list']); sys.exit('chunkft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "contact/build" in done.stdout


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
