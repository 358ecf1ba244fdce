"""The suite's runner: one case that hangs, crashes or fails ends alone, and what is known is kept."""

import dataclasses
import json
import os
import subprocess
import time

import pytest
from suite_rigs import case, run

from bench import common, records, suite_run
from bench.suite_run import NOT_STARTED, OUT_OF_TIME, Case, Suite

WRITES = (
    "import json, pathlib, sys\n"
    "path = pathlib.Path(sys.argv[1])\n"
    "before = json.loads(path.read_text())['records'] if path.exists() else {}\n"
)


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
