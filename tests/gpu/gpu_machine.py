"""The machine that tests of a GPU run on: a CUDA device, or, in a rehearsal, a CPU that stands in for it.

A test says through `Machine` what it wants of streams, events, graphs and sizes. Without a GPU and with
CHUNKFT_REHEARSE=1 streams are in order by themselves, a graph is the function again and sizes are small, so that every
line of a test has run before it meets a device; what only hardware can answer is asked behind `need`, where a
rehearsal ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from chunkft.kernels import gpu

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
REHEARSAL = "CHUNKFT_REHEARSE"
ABSENT = f"needs a CUDA device ({REHEARSAL}=1 runs what can be run without one)"


def rehearsing() -> bool:
    """Whether a CPU stands in for the GPU."""
    return os.environ.get(REHEARSAL) == "1" and not torch.cuda.is_available()


class Done:
    """An event of a CPU, whose work is done when it was asked for."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return


class Machine:
    """One device. All methods work in a rehearsal, except behind `need`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.real = device.type == "cuda"

    def pick(self, there: T, here: T) -> T:
        """What a test takes on a GPU, and in a rehearsal."""
        return there if self.real else here

    def need(self, what: str) -> None:
        """Ends a rehearsal: `what` is for hardware to answer."""
        if not self.real:
            pytest.skip(f"rehearsed up to here: {what} can be had on a GPU only")

    @property
    def triton(self) -> bool:
        """Whether Triton's kernels run, natively or in the interpreter."""
        return self.real or gpu.interpreted()

    def kernel(self, config: Any = None) -> dict[str, Any]:
        """Arguments of an operation that take its Triton kernel; PyTorch's in a rehearsal without the interpreter."""
        if self.triton:
            return {"backend": "triton"} if config is None else {"backend": "triton", "config": config}
        return {"backend": "torch"}

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normal values, the same on every device."""
        return torch.randn(*shape).to(self.device, dtype)

    def stream(self) -> Any:
        """A stream that waits for no other; made by torch, so it does not wait for the default stream."""
        return torch.cuda.Stream(self.device) if self.real else None

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """What is done inside goes to `stream`."""
        if stream is None:
            yield
            return
        with torch.cuda.stream(stream):
            yield

    def after(self, stream: Any, other: Any) -> None:
        """`stream` waits for what `other` was given so far."""
        if stream is not None:
            stream.wait_stream(other)

    def mark(self) -> Any:
        """An event behind what the current stream was given so far."""
        if not self.real:
            return Done()
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def hold(self, milliseconds: float = 60) -> None:
        """Keeps the current stream busy for about so long, and the host not."""
        if self.real:
            with torch.cuda.device(
                self.device
            ):  # the default stream of this device, or the one that is current
                # no clock of a GPU that counts here is faster than 2 GHz
                torch.cuda._sleep(int(2e6 * milliseconds))

    def synchronize(self) -> None:
        """Waits until the device is idle."""
        if self.real:
            torch.cuda.synchronize(self.device)

    def captured(self, work: Callable[[], object]) -> Callable[[], object]:
        """Records `work` as a CUDA graph, warmed up before, and returns what replays it."""
        if not self.real:
            return work
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                work()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay


def assert_ends_fine(
    machine: Machine, what: str, code: str, *arguments: object, seconds: float = 60, **environment: str
) -> None:
    """A program that wants `what` of the hardware ends without an error and says "fine"; a rehearsal compiles it."""
    compile(textwrap.dedent(code), "program", "exec")
    machine.need(what)
    done = python(code, *arguments, seconds=seconds, **environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert done.stdout.splitlines()[-1:] == ["fine"], done.stdout[-4000:] + done.stderr[-8000:]


def python(
    code: str, *arguments: object, seconds: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process of its own, for what must not happen to the one that tests."""
    # without the settings of an outer pytest and its workers
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether a condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True
