"""Every example runs against the real library, from a directory of its own, trains or saves, and is short."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# those that print the loss which they end with; an untrained model's is above 1. The others save their state.
PRINT_THE_LOSS = {"fsdp2", "lightning_module", "plain_amp", "torchtitan_container"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_there_is_one_for_each_trainer():
    saving = {"accelerate_loop", "transformers_trainer", "trl_dpo", "trl_sft"}
    assert {path.stem for path in EXAMPLES} == PRINT_THE_LOSS | saving


def run(script, place):
    launcher = TORCHRUN if "torchrun" in script.read_text() else []
    ran = subprocess.run(
        [sys.executable, *launcher, str(script)],
        cwd=place,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def loss_of(output):
    word, value = output.strip().splitlines()[-1].split()
    assert word == "loss"
    return float(value)


@pytest.mark.parametrize("script", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example_runs(script, tmp_path):
    text = script.read_text()
    assert len(text.splitlines()) <= 40
    packages = re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{script.name} needs {', '.join(missing)}, which is not installed")
    output = run(script, tmp_path)
    if script.stem in PRINT_THE_LOSS:
        loss = loss_of(output)
        assert loss < 1.0
        if "torchrun" in text:  # saves and, called again, goes on
            assert loss_of(run(script, tmp_path)) < 0.7 * loss
    else:
        assert list((tmp_path / "out").rglob("optimizer*")), "no optimizer state was saved"
