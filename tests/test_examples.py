"""Every example is short, runs against the real library, and trains."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LINES = 32  # with the sentence that says what it is
NEEDS = {"lightning_module": "lightning", "trl_sft": "trl", "trl_dpo": "trl"}


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_an_example_is_short_and_trains(path, tmp_path):
    library = NEEDS.get(path.stem)
    if library is not None and importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    assert len(path.read_text().splitlines()) <= LINES
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    word, value = done.stdout.strip().splitlines()[-1].split()
    assert word == "loss"
    assert float(value) < 1.0  # the untrained models begin above it
