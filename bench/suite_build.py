"""Builds the package where a suite runs: installed, or, where this Python may not be changed, in its source tree.

python -m bench.suite_build

A Python of a distribution refuses pip (PEP 668), an environment may be read-only or hold no pip. Everything of a suite
runs from the repository, so that the native core beside the sources is as good. Nothing here imports the package.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence

from . import common

INSTALL = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-e", ".")
IN_PLACE = ("setup.py", "build_ext", "--inplace")
# the package of this tree, with its core, as any case of the suite finds it
PROBE = "import chunkft, chunkft.streaming as s; print(chunkft.__file__, s.memory_budget())"


def succeeds(words: Sequence[str]) -> bool:
    """Runs this Python with `words` in the repository, its output among ours; whether it ended well."""
    print("$ python", *words, flush=True)
    return subprocess.run([sys.executable, *words], cwd=common.REPO).returncode == 0


def build(install: Sequence[str] = INSTALL, in_place: Sequence[str] = IN_PLACE) -> str:
    """Builds, and says how: `installed` or `in place`.

    Raises:
        RuntimeError: if neither way leads to a package that can be imported.
    """
    has_pip = importlib.util.find_spec("pip") is not None
    if has_pip and succeeds(install):
        how = "installed"
    else:
        print("not installed: its core is built beside the sources", flush=True)
        if not succeeds(in_place):
            raise RuntimeError("neither pip nor setup.py could build the package: the lines above say why")
        how = "in place"
    if not succeeds(("-c", PROBE)):
        raise RuntimeError(f"built ({how}), and yet it cannot be imported: the lines above say why")
    return how


if __name__ == "__main__":
    print(f"built: {build()}")
