"""What a call costs on the host, beside `torch.mm` of the same operands; they are tiny, so that nothing else counts.

Launches are real but for the driver's last call (`bench.empty_launches`). Lines and calls of Python are counted, too:
they are the same on every machine, so that a test can hold a bound on them.

python -m bench.host_time
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from chunkft.kernels import adamw, grouped_wgrad, wgrad
from chunkft.kernels.launches import Launch

from . import common
from .empty_launches import empty_launches

OUT = common.RESULTS / "host-time-cpu.json"
TOKENS, OUTPUTS, INPUTS = 4, 64, 32
ROWS = slice(8, 24)
# a turn of a case takes about this long
TURN_US = 1000

Call = Callable[[], Any]


@dataclass(frozen=True)
class Counted:
    """Lines of Python that one call executes, and functions that it calls, in Python and in C."""

    lines: int
    calls: int


def counted(call: Call) -> Counted:
    """Counts one call, after two that are not counted."""
    call()
    call()
    lines = calls = 0

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return line

    def entered(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    tracing, profiling = sys.gettrace(), sys.getprofile()
    try:
        sys.settrace(line)
        call()
    finally:
        sys.settrace(tracing)
    try:
        sys.setprofile(entered)
        call()
    finally:
        sys.setprofile(profiling)
    # without the call that ends the counting
    calls -= 1
    return Counted(lines, calls)


def cases() -> dict[str, Call]:
    """Calls by name; those that launch need `empty_launches`."""
    dy = torch.randn(TOKENS, OUTPUTS).bfloat16()
    x = torch.randn(TOKENS, INPUTS).bfloat16()
    out = torch.zeros(ROWS.stop - ROWS.start, INPUTS).bfloat16()
    dys, outs = [dy.clone() for _ in range(3)], [out.clone() for _ in range(3)]
    transposed = dy[:, ROWS].t()
    return {
        "torch.mm": functools.partial(torch.mm, transposed, x),
        "slice, transpose, torch.mm": lambda: dy[:, ROWS].t().mm(x),
        "wgrad auto": lambda: wgrad(dy, x, ROWS),
        "wgrad auto, out=": lambda: wgrad(dy, x, ROWS, out=out),
        "wgrad auto, accumulate": lambda: wgrad(dy, x, ROWS, out=out, accumulate=True),
        "wgrad triton": lambda: wgrad(dy, x, ROWS, backend="triton"),
        "wgrad triton, through JITFunction.run": lambda: unprepared(
            lambda: wgrad(dy, x, ROWS, backend="triton")
        ),
        "grouped_wgrad of 3, torch": lambda: grouped_wgrad(dys, x, [ROWS] * 3, outs=outs, backend="torch"),
        "grouped_wgrad of 3, triton": lambda: grouped_wgrad(dys, x, [ROWS] * 3, outs=outs, backend="triton"),
        "adamw of 10 slices": update(10),
        "adamw of 291 slices": update(291),
    }


def unprepared(call: Call) -> None:
    """The same as Triton's own way does it at every call: what is saved by preparing launches."""
    prepared = Launch.__call__
    Launch.__call__ = lambda self, aligned, *arguments: self.through_jit(*arguments)  # type: ignore[method-assign]
    try:
        call()
    finally:
        Launch.__call__ = prepared  # type: ignore[method-assign]


def update(slices: int) -> Call:
    """AdamW of so many slices as ChunkAdamW calls it for 16-bit weights."""
    params = [torch.zeros(16, 8).bfloat16() for _ in range(slices)]
    state = [[torch.zeros(16, 8) for _ in range(slices)] for _ in range(2)]
    residuals = [torch.zeros(16, 8, dtype=torch.int16) for _ in range(slices)]
    steps = torch.zeros(slices)
    return lambda: adamw(
        params, params, *state, steps, lr=1e-5, residuals=residuals, master="residual", backend="triton"
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch with one thread for the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measured(calls: dict[str, Call], rounds: int) -> dict[str, dict[str, float]]:
    """Median microseconds of each call, and of what it takes more than the first one in the same round.

    In time of the thread, so that other load on the machine does not count.
    """
    repeats = {}
    for name, call in calls.items():
        repeats[name] = max(1, min(50, round(TURN_US / min(_microseconds(call, 1) for _ in range(10)))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in calls if turn % 2 else reversed(calls):
            times[name].append(_microseconds(calls[name], repeats[name]))
    base = times[next(iter(calls))]
    return {
        name: {
            "us": round(statistics.median(own), 2),
            "over_mm_us": round(statistics.median(a - b for a, b in zip(own, base, strict=True)), 2),
        }
        for name, own in times.items()
    }


def _microseconds(call: Call, repeats: int) -> float:
    begin = time.thread_time_ns()
    for _ in range(repeats):
        call()
    return (time.thread_time_ns() - begin) / repeats / 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=201)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    with one_thread(), torch.no_grad(), empty_launches(recorded=False):
        calls = cases()
        found = measured(calls, options.rounds)
        records = [{"case": name, **found[name], **asdict(counted(call))} for name, call in calls.items()]
        result = {
            **common.header(0),
            "clock": "cpu time of the thread",
            "shape": [TOKENS, OUTPUTS, INPUTS],
            "rounds": options.rounds,
            "cases": records,
        }
    for one in records:
        print(
            f"{one['case']:40s} {one['us']:9.2f} us  {one['over_mm_us']:+9.2f} over torch.mm"
            f"  {one['lines']:6d} lines  {one['calls']:6d} calls"
        )
    common.write_json(options.out, result)
    print(options.out)


if __name__ == "__main__":
    main()
