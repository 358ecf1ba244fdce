"""The tests of tests/gpu run here as far as a CPU can carry them, so that no typo waits for a GPU."""

import ast
import os
import re
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "gpu"
FILES = sorted(FOLDER.glob("*.py"))
PASSED = 203
# why a test may end before its last line in a rehearsal
ALLOWED = ("rehearsed up to here: ", "could not import 'bitsandbytes'", "could not import 'torchao'")


def collected(*options: str, **environment: str) -> str:
    """What pytest says of the folder in a process that has no GPU, whatever this machine has."""
    outer = ("PYTEST_", "CHUNKFT_REHEARSE", "TRITON_INTERPRET")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    plain = ["-q", "-rs", "-p", "no:cacheprovider", "-p", "no:logging"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plain, *options, str(FOLDER)],
        cwd=ROOT,
        env=kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    return done.stdout


def count(word: str, summary: str) -> int:
    found = re.search(rf"(\d+) {word}", summary)
    return int(found[1]) if found else 0


def test_every_test_of_a_gpu_runs_on_a_cpu_as_far_as_it_can():
    lines = collected("-n", "2", CHUNKFT_REHEARSE="1").strip().splitlines()
    reasons = [line.split(": ", 1)[1] for line in lines if line.startswith("SKIPPED")]
    assert reasons
    assert all(reason.startswith(ALLOWED) for reason in reasons), reasons
    # a smaller number is a test that was lost; a larger one is to be written down
    assert count("passed", lines[-1]) == PASSED
    assert not re.search("failed|error|warning", lines[-1]), lines[-1]


def test_without_a_gpu_the_folder_is_skipped_for_one_reason():
    lines = collected("-p", "no:xdist").strip().splitlines()
    (reason,) = [line for line in lines if line.startswith("SKIPPED")]
    assert "needs a CUDA device (CHUNKFT_REHEARSE=1 runs" in reason
    assert count("passed", lines[-1]) == 0
    assert count("skipped", lines[-1]) >= PASSED


def names_of_torch(path: Path) -> set[str]:
    """Attributes of torch.cuda and torch.amp that a file names, also in the programs that it holds as text."""
    tree = ast.parse(path.read_text())
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    sources = [path.read_text(), *(text for text in texts if isinstance(text, str))]
    return {name for source in sources for name in re.findall(r"torch\.(?:cuda|amp)(?:\.\w+)+", source)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_torch_has_what_the_tests_call(path):
    """A rehearsal does not come to these calls: they are looked up."""
    for name in names_of_torch(path):
        *parts, last = name.split(".")[1:]
        owner = reduce(getattr, parts, torch)
        assert hasattr(owner, last), f"{path.name} uses {name}, which this torch does not have"


def test_the_look_at_names_finds_some():
    found = set().union(*map(names_of_torch, FILES))
    assert {"torch.cuda.CUDAGraph", "torch.cuda._sleep", "torch.cuda.set_sync_debug_mode"} <= found
