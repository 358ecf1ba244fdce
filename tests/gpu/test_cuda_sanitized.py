"""Every kernel and a round of the pager under compute-sanitizer: nothing outside of an allocation, no race in shared
memory; and the same program plainly, so that a fault of the program is not taken for one of the tool.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_operations import OPERATIONS

from chunkft.kernels.adamw import MASTERS

PROGRAM = Path(__file__).parent / "sanitized.py"
TOOL = "compute-sanitizer"


def run(*command, seconds=240):
    done = subprocess.run(
        list(map(str, command)),
        cwd=PROGRAM.parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    told = done.stdout[-6000:] + done.stderr[-6000:]
    assert done.returncode == 0, told
    return done.stdout


@pytest.mark.timeout(120)
def test_the_program_that_is_watched_is_right_by_itself(machine):
    out = run(sys.executable, PROGRAM, seconds=110)
    assert out.splitlines()[-1] == "fine"
    left_out = out.count(": left out")  # operations that need a newer device
    assert out.count(": right") + left_out == len(OPERATIONS) + 1 + len(MASTERS) + 1
    assert left_out <= 1


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("tool", "parts"),
    [("memcheck", ("kernels", "pager")), ("racecheck", ("kernels",))],
    ids=["memcheck", "racecheck"],
)
def test_a_sanitizer_finds_nothing(machine, tool, parts):
    found = shutil.which(TOOL)
    # calls that fail and are taken care of are no faults: torch asks drivers for functions that they may lack
    options = ["--tool", tool, "--error-exitcode", "9"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    machine.need(TOOL)
    if found is None:
        pytest.skip(f"needs {TOOL} on PATH; it comes with the CUDA toolkit")
    out = run(found, *options, sys.executable, PROGRAM, *parts, seconds=280)
    assert "fine" in out.splitlines()
    assert "ERROR SUMMARY: 0 errors" in out or "RACECHECK SUMMARY: 0 hazards" in out, out[-4000:]
