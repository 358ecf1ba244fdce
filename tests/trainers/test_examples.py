"""Every example runs against the real library, from a directory of its own, and is short."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ["transformers_trainer.py", "accelerate_loop.py", "trl_sft.py", "trl_dpo.py"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, tmp_path):
    script = ROOT / "examples" / name
    assert len(script.read_text().splitlines()) <= 30
    ran = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert list((tmp_path / "out").rglob("optimizer*")), "no optimizer state was saved"
