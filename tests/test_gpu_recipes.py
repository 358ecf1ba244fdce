"""`make nsys`, `make ncu` and `make sanitize-gpu`: options that exist, programs that start, errors in words.

The programs of NVIDIA are not needed: scripts stand for them, which do what the recipe relies on.
"""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nsight import check_nsight, included

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from bench import ncu_table, ncu_targets, residency  # noqa: E402

SAMPLE = Path(__file__).parent / "data" / "ncu-raw.csv"
PROGRAMS = ("nsys", "ncu", "compute-sanitizer")
TARGETS = {"nsys": "nsys", "ncu": "ncu", "sanitize-gpu": "compute-sanitizer"}
MAKE = shutil.which("make")

pytestmark = pytest.mark.skipif(MAKE is None, reason="needs make")


def run_make(*words, path=None):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    environment |= {} if path is None else {"PATH": str(path)}
    return subprocess.run(
        [MAKE, *words], cwd=REPO, env=environment, capture_output=True, text=True, check=False
    )


def recipe(target, *words):
    """The lines of a target that start NVIDIA's programs or Python, as words without variables and redirection."""
    done = run_make("-n", target, f"PROFILE_PYTHON={sys.executable}", *words)
    assert done.returncode == 0, done.stderr
    found = [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]
    lines = []
    for line in found:
        while line and re.fullmatch(r"[A-Z_]+=.*", line[0]):
            line = line[1:]
        line = [word for word in line if not word.startswith(">")]
        if line[0] in PROGRAMS or line[:2] == [sys.executable, "-m"]:
            lines.append(line)
    return lines


def script(folder, name, text):
    file = folder / name
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


@pytest.fixture
def tools(tmp_path):
    """A PATH with what the recipes use of every system and none of NVIDIA's programs."""
    folder = tmp_path / "path"
    folder.mkdir()
    names = ("bash", "sh", "cat", "cksum", "cut", "mkdir", "rm", "touch", "env", "git")
    for name, file in zip(names, map(shutil.which, names), strict=True):
        if file is not None:
            (folder / name).symlink_to(file)
    return folder


@pytest.fixture
def with_gpu(tmp_path):
    """An interpreter that finds a GPU when it is asked, and is the real one else."""
    return script(tmp_path, "python", f'[ "$1" = -c ] && exit 0\nexec {sys.executable} "$@"')


@pytest.mark.parametrize(("target", "program"), TARGETS.items())
def test_options_are_those_that_the_programs_have(target, program):
    lines = [line for line in recipe(target) if line[0] == program]
    assert len(lines) == {"nsys": 2, "ncu": 2, "sanitize-gpu": 3}[target]
    started = [check_nsight(line) for line in lines]
    for words in filter(None, started):
        assert words[:2] == [sys.executable, "-m"]


def test_what_ncu_starts_is_taken_and_in_ranges_that_its_filter_takes_in(capsys):
    (line,) = [line for line in recipe("ncu", "ARGS=--chunks 8") if "--export" in line]
    started = check_nsight(line)
    assert started[:3] == [sys.executable, "-m", "bench.ncu_targets"]
    ncu_targets.main([*started[3:], "--list"])
    names = [text.split("  ")[0] for text in capsys.readouterr().out.splitlines()]
    assert any("q K=8" in name for name in names)
    configuration = line[line.index("--nvtx-include") + 1]
    assert all(included(configuration, name) for name in names)
    assert line[line.index("--clock-control") + 1] == "none"
    assert line[line.index("--metrics") + 1].split(",") == list(ncu_table.METRICS)


def test_what_compute_sanitizer_starts_is_small_and_ours(capsys):
    lines = recipe("sanitize-gpu")
    assert [line[line.index("--tool") + 1] for line in lines] == ["memcheck", "racecheck", "synccheck"]
    for line in lines:
        assert line[line.index("--error-exitcode") + 1] != "0"
        started = check_nsight(line)
        assert started[2] == "bench.ncu_targets"
        assert "--small" in started
        ncu_targets.main([*started[3:], "--list"])
        kinds = {text.split()[1] for text in capsys.readouterr().out.splitlines()}
        assert kinds == {
            *("wgrad-plain", "wgrad-tma", "wgrad-split", "wgrad-group", "adamw-triton", "embedding-triton")
        }


def test_what_nsys_starts_trains_with_paged_state(tmp_path, monkeypatch, capsys):
    (line,) = [line for line in recipe("nsys") if line[:2] == ["nsys", "profile"]]
    started = check_nsight(line)
    assert started[:3] == [sys.executable, "-m", "bench.residency"]
    measured = []

    def measure(options, args, device):
        measured.append(options)
        assert args.warmup >= 16
        held = {"gradients": 0, "state": 0}
        return {"mean_ms": 1.0, "held_bytes": held, "peak_bytes": None}

    monkeypatch.setattr(residency, "measure", measure)
    residency.main([*started[3:], "--out", str(tmp_path / "steps.json")])
    assert [options["state_device"] for options in measured] == ["paged"]
    (options,) = measured
    assert 2 * options["chunks"] * options["interval"] == 32  # a sweep to warm up, and one


@pytest.mark.parametrize(("target", "program"), TARGETS.items())
def test_a_missing_program_is_named_in_one_sentence(target, program, tools):
    done = run_make(target, f"PROFILE_PYTHON={sys.executable}", path=tools)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert said[0].startswith(f"error: {program} is not on PATH: it comes with ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("target", "program"), TARGETS.items())
def test_a_missing_gpu_is_named_in_one_sentence(target, program, tools):
    script(tools, program, "echo started >&2")
    done = run_make(target, f"PROFILE_PYTHON={sys.executable}", path=tools)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert said == [
        f"error: {sys.executable} has no torch that sees a GPU: {program} watches what runs on one"
    ]


def test_ncu_ends_with_the_table_of_the_report_that_was_made(tools, with_gpu, tmp_path):
    profiles = tmp_path / "profiles"
    fake = f"""
case "$*" in
  *--import*) test -f {profiles}/kernels.ncu-rep && cat {SAMPLE} ;;
  *--export*) touch {profiles}/kernels.ncu-rep; echo "==PROF== Connected" ;;
esac"""
    script(tools, "ncu", fake)
    profiles.mkdir()
    (profiles / "kernels.json").write_text("of a run before")
    done = run_make("ncu", f"PROFILE_PYTHON={with_gpu}", f"PROFILES={profiles}", path=tools)
    assert done.returncode == 0, done.stderr
    assert "all 2 launches" in done.stdout
    assert (profiles / "kernels.csv").read_text() == SAMPLE.read_text()
    assert '"kind": "profiled"' in (profiles / "kernels.json").read_text()


def test_a_report_of_a_run_before_is_not_taken_for_one_that_failed(tools, with_gpu, tmp_path):
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    (profiles / "kernels.ncu-rep").write_text("of a run before")
    script(
        tools, "ncu", f'[[ "$*" = *--import* ]] && {{ test -f {profiles}/kernels.ncu-rep; exit $?; }}; exit 0'
    )
    done = run_make("ncu", f"PROFILE_PYTHON={with_gpu}", f"PROFILES={profiles}", path=tools)
    assert done.returncode != 0
    assert not (profiles / "kernels.ncu-rep").exists()


def test_compute_sanitizer_stops_at_what_it_finds(tools, with_gpu, tmp_path):
    log = tmp_path / "log"
    script(
        tools,
        "compute-sanitizer",
        f'echo "$2 $PYTORCH_NO_CUDA_MEMORY_CACHING" >> {log}\n[ "$2" != racecheck ]',
    )
    done = run_make("sanitize-gpu", f"PROFILE_PYTHON={with_gpu}", f"PROFILES={tmp_path}/p", path=tools)
    assert done.returncode != 0
    assert log.read_text().splitlines() == ["memcheck 1", "racecheck 1"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ncu --clock-control lock python x.py", "--clock-control does not take 'lock'"),
        ("ncu --metrics dram__bytes_red.sum python x.py", "--metrics does not take 'dram__bytes_red.sum'"),
        ("ncu --section WarpState python x.py", "--section does not take 'WarpState'"),
        ("ncu --csv=yes --import a.ncu-rep", "--csv takes no value"),
        ("ncu --page raws --import a.ncu-rep", "--page does not take 'raws'"),
        ("ncu --import a.csv", "--import does not take 'a.csv'"),
        ("ncu --import a.ncu-rep python", "reads a report or starts a program"),
        ("ncu --nvtx", "reads a report or starts a program, got neither"),
        ("compute-sanitizer --tool leakcheck python", "--tool does not take 'leakcheck'"),
        ("compute-sanitizer --error-exit 1 python", "--error-exit is not known"),
        ("compute-sanitizer --tool memcheck", "starts a program, got neither"),
        ("nsys stats --force-export=1 a.nsys-rep", "--force-export does not take '1'"),
    ],
)
def test_the_check_names_what_is_wrong(line, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check_nsight(shlex.split(line))
