"""The command of the suite, and its list of cases."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from suite_rigs import case

from bench import common, gpu_suite, kernel_calls, suite_cases


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


def test_the_suite_starts_where_the_package_is_not_built_yet(tmp_path):
    """Its first case builds it: nothing before that may import it."""
    (tmp_path / "chunkft").mkdir()
    (tmp_path / "chunkft" / "__init__.py").write_text("raise ImportError('not built')")
    (tmp_path / "bench").symlink_to(common.REPO / "bench")
    code = "import sys; from bench import gpu_suite; gpu_suite.main(['--list']); sys.exit('chunkft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "contact/build" in done.stdout
