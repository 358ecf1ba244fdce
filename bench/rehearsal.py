"""Rehearsals of kernels on a CPU: by Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import numpy

from chunkft.kernels import gpu

from . import common


def in_interpreter(module: str, arguments: Sequence[str] | None) -> None:
    """Goes on in a process whose kernels are interpreted: there it returns, here it ends with that one's status.

    Args:
        module: which of this folder to run.
        arguments: of its command line; those of this process by default.
    """
    if gpu.interpreted():
        mend()
        return
    words = sys.argv[1:] if arguments is None else list(arguments)
    command = [sys.executable, "-m", f"{common.PACKAGE}.{module}", *words]
    raise SystemExit(subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode)


def mend() -> None:
    """Lets Triton 3.6's interpreter run with numpy >= 2.4, which forbids int() of an array of one element.

    Triton 3.7 squeezes such arrays (its issue 9171); the same is done here, under that pair of releases alone. Only
    rehearsals and tests do this: users are told which releases clash (chunkft.kernels.gpu.interpreter).
    """
    import triton
    from triton.runtime import interpreter

    if _release(triton.__version__) != (3, 6) or _release(numpy.__version__) < (2, 4):
        return
    patch = interpreter._patch_lang_tensor
    if getattr(patch, "squeezes", False):
        return

    def patch_and_squeeze(tensor: object, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))  # type: ignore[attr-defined]

    patch_and_squeeze.squeezes = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch_and_squeeze


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
