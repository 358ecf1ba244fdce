"""Time of device work: events and graphs on a GPU; on a CPU, where benchmarks are only rehearsed, the host's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Run = Callable[[], Any]
WARM = 3


class Clock:
    """Medians of runs that take turns, the L2 cache written over before each.

    Args:
        device: `cuda` or `cpu`.
        l2: bytes of the device's L2 cache.
    """

    def __init__(self, device: torch.device, l2: int = 0) -> None:
        self.device = device
        self.gpu = device.type == "cuda"
        size = max(256 << 20, 2 * l2) if self.gpu else 1 << 20
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def microseconds(self, runs: Sequence[Run], rounds: int) -> list[float]:
        """Median microseconds of each run on the device, over `rounds` turns after three that are not counted."""
        times: list[list[float]] = [[] for _ in runs]
        for turn in range(rounds + WARM):
            for run, kept in zip(runs, times, strict=True):
                self._flush.zero_()
                taken = self._once(run)
                if turn >= WARM:
                    kept.append(taken)
        return [statistics.median(kept) for kept in times]

    def _once(self, run: Run) -> float:
        if not self.gpu:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e6
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def graph(self, run: Run) -> Run:
        """The same launches without Python between them; on a CPU the run itself."""
        if not self.gpu:
            return run
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay
