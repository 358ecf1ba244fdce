"""Runs the files of numeric/ in Triton's interpreter, in processes of their own, and asks who may run it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")

FILES = sorted((Path(__file__).parent / "numeric").glob("test_*.py"))
PARTS = 2  # processes: each takes its time to start
ROOT = Path(__file__).parents[2]
RELEASES = f"triton {triton.__version__} and numpy {numpy.__version__}"
MODERN_NUMPY = tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4)

# What a user's process does; `break` puts back the line of Triton 3.6 that numpy 2.4 does not allow.
USER = """
import sys
import torch
from triton.runtime import interpreter
from chunkft.kernels import wgrad
if "break" in sys.argv:
    patch = interpreter._patch_lang_tensor
    def patch_and_break(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data))
    interpreter._patch_lang_tensor = patch_and_break
dy, x = torch.arange(15.0).reshape(5, 3), torch.arange(35.0).reshape(5, 7)
try:
    assert torch.equal(wgrad(dy, x, backend="triton"), dy.T @ x)
    print("equal")
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this process is the interpreter already")
@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_in_the_interpreter(part):
    files = map(str, FILES[part::PARTS])
    # without the workers' settings of an outer pytest-xdist
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    assert " passed" in summary, summary
    assert "skipped" not in summary, summary


def as_user(*arguments):
    """What a process with TRITON_INTERPRET=1 prints that runs USER."""
    done = subprocess.run(
        [sys.executable, "-c", USER, *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def refuses(text):
    return (
        text.startswith("backend='triton'")
        and f"Triton {triton.__version__}" in text
        and f"numpy {numpy.__version__}" in text
        and "install triton>=3.7 or numpy<2.4" in text
    )


def test_users_of_the_interpreter_get_the_product_or_are_told_which_releases_clash():
    text = as_user()
    if triton.__version__.startswith("3.6.") and MODERN_NUMPY:
        assert refuses(text)
    else:
        assert text == "equal"


@pytest.mark.skipif(
    not MODERN_NUMPY, reason=f"{RELEASES}: this numpy turns an array of one element into an int"
)
def test_an_interpreter_that_numpy_does_not_allow_is_refused_by_name():
    assert refuses(as_user("break"))


def test_there_are_kernels_to_run():
    assert len(FILES) >= PARTS
