"""Real launches of Triton kernels without a GPU: everything happens but the last call into the driver.

    with empty_launches() as record:
        wgrad(dy, x, backend="triton")      # CPU tensors; results are not written
    record.launches                         # kernel, grid, variant
    record.variants                         # what was compiled

Triton's own binder, specialisation, compiler and cache run, for compute capability 9.0; a launch is recorded and does
nothing. CPU tensors pass for tensors of a device for the time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from chunkft.kernels import choice, gpu, triton_wgrad
from chunkft.kernels.launches import forget
from chunkft.kernels.targets import TARGETS, shared_memory_limit


@dataclass(frozen=True)
class Launched:
    """One launch: name of the kernel, programs, and the hash of what was compiled for it."""

    kernel: str
    grid: tuple[int, int, int]
    variant: str


@dataclass
class Record:
    """What was launched, and of each compiled variant its kernel, signature with constants, warps and stages."""

    launches: list[Launched] = field(default_factory=list)
    variants: dict[str, str] = field(default_factory=dict)


class _Launcher:
    """Stands for the compiled C function that calls cuLaunchKernelEx; made once a variant, as the real one is."""

    record: Record | None = None

    def __init__(self, source: Any, metadata: Any) -> None:
        self.kernel = metadata.name
        self.signature = dict(source.signature)
        self.count = len(source.signature)
        constants = {
            source.fn.arg_names[path[0]]: value for path, value in source.constants.items() if len(path) == 1
        }
        self.text = (
            f"{self.kernel}: {_text(self.signature, constants, source.attrs)}, {metadata.num_warps} warps"
        )
        self.text += f", {metadata.num_stages} stages"

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: int, packed: Any, metadata: Any, enter: Any, leave: Any,
        *arguments: Any,
    ) -> None:  # fmt: skip
        if len(arguments) != self.count:
            raise TypeError(f"{self.kernel} takes {self.count} arguments, got {len(arguments)}")
        if not 0 < x < 2**31 or not 0 < y < 2**16 or not 0 < z < 2**16:
            raise ValueError(f"{self.kernel}: a grid of {x} x {y} x {z} cannot be launched")
        if self.record is not None:
            self.record.launches.append(Launched(self.kernel, (x, y, z), str(function)))
            self.record.variants.setdefault(str(function), self.text)


class _Utils:
    """The driver's functions that loading a kernel calls."""

    # what is loaded stays so, beyond one driver
    _handles = itertools.count(1)

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, threads a block."""
        if not binary.startswith(b"\x7fELF") or name.encode() not in binary:
            raise RuntimeError(f"what was compiled for {name} is no binary that holds it")
        handle = next(self._handles)
        return handle, handle, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Nothing was loaded."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What Triton asks for."""
        return {"max_shared_mem": shared_memory_limit(90), "multiprocessor_count": 132, "warpSize": 32}


class _Driver:
    """As much of triton's driver as its JIT needs."""

    def __init__(self) -> None:
        self.utils = _Utils()
        self.launcher_cls = _Launcher

    def get_current_target(self) -> Any:
        """Compute capability 9.0."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """A number that no real device has, so that nobody takes its kernels for real ones."""
        return 99

    def get_current_stream(self, device: int) -> int:
        """The null stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where its tensors are."""
        return torch.device("cpu")


@contextlib.contextmanager
def empty_launches(target: str = "h200", recorded: bool = True) -> Iterator[Record]:
    """CPU tensors pass for tensors of a GPU of this name, and launches are recorded (or not even that), not done."""
    import triton

    if gpu.interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted, not launched")
    record, before = Record(), triton.runtime.driver._active
    forget()
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in (
            (gpu, "runs_on", lambda tensor: True),
            (choice, "asks", lambda tensor: True),
            (triton_wgrad, "target_for", lambda device: TARGETS[target]),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(mock.patch.dict(os.environ, {"TRITON_LAUNCH_BLOCKING": ""}))
        stack.enter_context(mock.patch.object(_Launcher, "record", record if recorded else None))
        triton.runtime.driver.set_active(_Driver())
        try:
            yield record
        finally:
            triton.runtime.driver._active = before
            forget()


def _text(signature: dict[str, Any], constants: dict[str, Any], attributes: dict[Any, Any]) -> str:
    """Arguments with their types, constants with their values; /16 for what is known to be divisible by 16."""
    parts = []
    for place, (name, kind) in enumerate(signature.items()):
        if kind == "constexpr":
            parts.append(f"{name}={constants.get(name)}")
        else:
            divisible = any(path[0] == place and hints for path, hints in attributes.items())
            parts.append(f"{name}:{kind}{'/16' if divisible else ''}")
    return ", ".join(parts)
