"""Runs training steps under torch's profiler, and again with an account of memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from chunkft import tracing
from chunkft.optim import ChunkOptimizer
from chunkft.optim.paged import PagedStore
from chunkft.optim.resident import ChunkResidency
from chunkft.profiling.ledger import GRADIENTS, STATE, Ledger
from chunkft.profiling.timeline import Phase, Timeline
from chunkft.profiling.trace import Clock
from chunkft.weights import stream_of

__all__ = ["Batches", "Loss", "Recorder"]

Loss = Callable[[nn.Module, Any], Tensor]
Batches = Iterator[Sequence[Any]]  # the batches of one optimizer step at a time


class Recorder:
    """Trains, and keeps what was seen.

    Attributes:
        phases: of the profiled steps; ``memory_phases`` of those whose memory was counted.
        ledger: the account of the latter.
        process: times and bytes of the process's memory in those steps; empty on a GPU, where torch's own is exact.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, batches: Batches
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.chunked = optimizer if isinstance(optimizer, ChunkOptimizer) else None
        stream = stream_of(model)
        self.device = next(model.parameters()).device if stream is None else stream.device
        self.phases: list[Phase] = []
        self.memory_phases: list[Phase] = []
        self.process: list[tuple[int, int]] = []
        self.ledger = Ledger(model, self.device, self._outside, self._sample)
        self._waits = self.device.type == "cuda"  # for the device at the end of a phase
        self._loss = loss
        self._batches = batches
        self._rss = _resident_set() if self.device.type == "cpu" else None

    def warm_up(self) -> None:
        """One step that nothing is kept of."""
        self._train([], self._nothing)

    @contextmanager
    def profiling(self, clock: Clock, with_torch: bool) -> Iterator[profile | None]:
        """Profile the steps inside; without torch that is left to a program outside, for which the range is marked."""
        with ExitStack() as stack:
            stack.enter_context(tracing.enabled())
            if self.device.type == "cuda" and not with_torch:
                self._waits = False  # a timeline of somebody else's shows what runs when
                torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
                stack.callback(torch.cuda.profiler.stop)
            profiler = None
            if with_torch:
                activities = [ProfilerActivity.CPU]
                if self.device.type == "cuda":
                    activities.append(ProfilerActivity.CUDA)
                profiler = stack.enter_context(profile(activities=activities))
                clock()
                stack.callback(clock)
            yield profiler

    def timed_step(self) -> None:
        """One step, whose phases are kept."""
        self._train(self.phases, self._nothing)

    @contextmanager
    def accounting(self) -> Iterator[None]:
        """Count memory in the steps inside."""
        ledger = self.ledger
        self._label(ledger.fixed, lambda tensor: ledger.present(tensor, STATE))
        if self.chunked is not None:
            self.chunked._memory.on_state = self._label_state
        try:
            with ledger:
                yield
        finally:
            if self.chunked is not None:
                self.chunked._memory.on_state = None

    def accounted_step(self) -> None:
        """One step, whose memory is counted."""
        handles = [handle for leaf in self._leaves() for handle in self._watch(leaf)]
        try:
            self._train(self.memory_phases, self._sample)
        finally:
            for handle in handles:
                handle.remove()
        self._label_state()

    def _label_state(self) -> None:
        self._label(lambda tensor: None, lambda tensor: self.ledger.label(tensor, STATE))

    def timeline(self) -> Timeline:
        """Memory over time."""
        stream = stream_of(self.model)
        if stream is None:
            weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        else:
            places = stream.memory()
            kinds = ["resident", "ring", "tiles"]
            # on a CPU that is the memory of the host pages as well
            weights = sum(places[kind] for kind in (*kinds, *(["host"] if self.device.type == "cpu" else [])))
        return Timeline(self.ledger.blocks, self.ledger.polls, weights, self.memory_phases)

    def _train(self, phases: list[Phase], sample: Callable[[], None]) -> None:
        step = phases[-1].step + 1 if phases else 0
        chunk = None if self.chunked is None else self.chunked.active
        self.model.train()
        for batch in next(self._batches):
            begun = time.perf_counter_ns()
            with self._phase("forward", step, chunk, phases, sample):
                loss = self._loss(self.model, batch)
            self.ledger.forward_done(begun)
            with self._phase("backward", step, chunk, phases, sample):
                loss.backward()  # type: ignore[no-untyped-call]
            del loss, batch
        with self._phase("step", step, chunk, phases, sample):
            self.optimizer.step()
            self.optimizer.zero_grad()

    @contextmanager
    def _phase(
        self, name: str, step: int, chunk: int | None, phases: list[Phase], sample: Callable[[], None]
    ) -> Iterator[None]:
        self.ledger.phase = name
        sample()
        start = time.perf_counter_ns()
        with tracing.span(name) if name != "step" else tracing.span("optimizer"):
            yield
        if self._waits:
            torch.cuda.synchronize(self.device)
        phases.append(Phase(name, step, chunk, start, time.perf_counter_ns()))
        sample()
        self.ledger.phase = ""

    def _nothing(self) -> None:
        pass

    def _sample(self) -> None:
        if self._rss is not None:
            self.process.append((time.perf_counter_ns(), self._rss()))

    def _leaves(self) -> list[Tensor]:
        if self.chunked is not None:
            return [leaf for _, leaf in self.chunked.active_parameters()]
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _watch(self, leaf: Tensor) -> list[Any]:
        def before(gradient: Tensor) -> None:
            self.ledger.label(gradient, GRADIENTS)
            self._sample()

        def after(leaf: Tensor) -> None:
            if leaf.grad is not None:
                self.ledger.label(leaf.grad, GRADIENTS)

        return [leaf.register_hook(before), leaf.register_post_accumulate_grad_hook(after)]  # type: ignore[no-untyped-call]

    def _outside(self) -> int:
        """Bytes of state in memory that torch does not allocate, or did before."""
        if self.chunked is None:
            return 0
        store = self.chunked._store
        on_host = self.device.type == "cpu"
        if not isinstance(store, PagedStore):
            return store.nbytes if on_host else 0
        stats = [pager.stats() for pager in store.pagers.values()]
        host = store.arena_nbytes + sum(entry.host_bytes for entry in stats)
        return sum(entry.device_bytes for entry in stats) + (host if on_host else 0)

    def _label(self, own: Callable[[Tensor], None], other: Callable[[Tensor], None]) -> None:
        """Tell of each tensor of state whether it is in memory of the store."""
        chunked = self.chunked
        if chunked is None:
            for state in self.optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor) and value.dim() > 0:
                        other(value)
            return
        residency = chunked._residency
        states = residency.active_states() if isinstance(residency, ChunkResidency) else {}
        if not chunked._store.in_arena:
            states = residency.states()
        for piece, entry in states.items():
            for key, value in entry.items():
                if isinstance(value, Tensor) and value.dim() > 0:
                    (own if chunked._store.holds(piece, key, value) else other)(value)


def _resident_set() -> Callable[[], int]:
    """Asks for the resident set of the process, in bytes."""
    import psutil

    process = psutil.Process()
    return lambda: int(process.memory_info().rss)
