"""Runs each file of numeric/ in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FILES = sorted((Path(__file__).parent / "numeric").glob("test_*.py"))
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this process is the interpreter already")
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(file):
    # without the workers' settings of an outer pytest-xdist
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    assert " passed" in summary, summary
    assert "skipped" not in summary, summary


def test_there_are_kernels_to_run():
    assert FILES
