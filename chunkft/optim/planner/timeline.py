"""The most memory at a time in a training step of a deep model, from the profiles of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from chunkft.optim.planner.profiles import NOTHING, Profiles, Run, Segment
from chunkft.optim.planner.windows import Window, deep_name

__all__ = ["Held", "Kept", "Moment", "peak_of"]


@dataclass(frozen=True)
class Moment:
    """Bytes of one moment: what the backward pass waits for, what is only passing, gradients, and their update."""

    activations: int = 0
    working: int = 0
    gradients: int = 0
    update: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.activations + self.working + self.gradients + self.update


class Held:
    """Gradients that exist, as they come and go in a step."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.nbytes = 0

    def arrive(self, name: str) -> None:
        """The gradient of a parameter begins to exist."""
        self.nbytes += self.window.gradients.get(name, 0)
        if self.window.most is not None:
            self.nbytes = min(self.nbytes, self.window.most)

    def complete(self, name: str) -> tuple[int, int]:
        """It may be used: bytes that the update takes beside it, and bytes of gradients that are gone then."""
        return 0, 0


class Kept(Held):
    """Gradients stay until the step."""


def peak_of(profiles: Profiles, window: Window, held: Held, exact: bool, parked: int = 0) -> Moment:
    """The moment of a step's forward and backward pass that holds the most.

    Args:
        profiles: of the shallow model.
        window: what is active.
        held: what becomes of gradients.
        exact: False takes a block of which a part is active for one that is active as a whole, which needs fewer
            runs and is never less.
        parked: of the inputs of blocks, which wait in host memory, how many are on the device in the backward pass;
            0: they do not wait there.
    """
    walk = _Walk(held)
    parts = _Parts(profiles, window, exact, parked)
    ends = parts.ends()
    walk.visit(ends.forward.get("pre", NOTHING), None)
    for segment, count, block in parts.blocks("forward"):
        walk.repeat(segment, count, block)
    walk.visit(ends.forward.get("tail", NOTHING), None)
    walk.visit(Segment(delta=-parts.released()), None)
    walk.visit(ends.backward.get("tail", NOTHING), None)
    for segment, count, block in parts.blocks("backward"):
        walk.repeat(segment, count, block)
    walk.visit(ends.backward.get("pre", NOTHING), None)
    return walk.peak


class _Walk:
    def __init__(self, held: Held) -> None:
        self.peak = Moment()
        self._held = held
        self._live = 0

    def repeat(self, segment: Segment, count: int, name: Callable[[str], str] | None) -> None:
        """The same part several times over; what it holds is largest at the first or at the last."""
        self.visit(segment, name)
        if count > 1:
            self._live += segment.delta * (count - 2)
            self.visit(segment, name)

    def visit(self, segment: Segment, name: Callable[[str], str] | None) -> None:
        """One part."""
        before = self._live
        self._see(before, segment.peaks[0], 0)
        for event, level, peak in zip(segment.events, segment.levels, segment.peaks[1:], strict=True):
            which = event[1:] if name is None else name(event[1:])
            if event[0] == "+":
                self._held.arrive(which)
            else:
                update, gone = self._held.complete(which)
                self._see(before, level, update)
                self._held.nbytes -= gone
            self._see(before, peak, 0)
        self._live += segment.delta

    def _see(self, live: int, more: int, update: int) -> None:
        if live + more + self._held.nbytes + update > self.peak.total:
            self.peak = Moment(min(live, live + more), max(more, 0), self._held.nbytes, update)


class _Parts:
    """Which run tells of which part of a step."""

    def __init__(self, profiles: Profiles, window: Window, exact: bool, parked: int) -> None:
        self._parked = parked
        self._profiles = profiles
        self._window = window
        self._exact = exact
        self._shallow = profiles.shallow
        if window.outside:
            # with something active below the blocks, all of them pass gradients on
            self._pre = "pre" in profiles.run(window.outside).backward if self._shallow.blocks else True
        else:
            self._pre = False

    def ends(self) -> Run:
        """The run that tells of what is before and after the blocks."""
        window, lowest = self._window, self._window.lowest
        if self._pre or lowest is None:
            return self._profiles.run(window.outside)
        if not self._exact:
            return self._profiles.run(window.outside, feed=True)
        return self._profiles.run((*window.outside, *window.inside[lowest]))

    def released(self) -> int:
        """Bytes that blocks below all that is active leave until the end of the forward pass (caches, for example),
        beyond those of the blocks below in the run that tells of the end.
        """
        lowest, kinds = self._window.lowest, self._shallow.kinds
        # the model itself keeps the first input until then
        first = self.ends().input_nbytes if self._parked and self._pre else 0
        if self._pre or not kinds or not (self._exact or lowest is None):
            return first
        left = self._profiles.idle().forward
        deep = kinds if lowest is None else kinds[:lowest]
        told = range(len(self._shallow.blocks) if lowest is None else kinds[lowest])
        return first + sum(left[kind].delta for kind in deep) - sum(left[kind].delta for kind in told)

    def blocks(self, side: str) -> Iterator[tuple[Segment, int, Callable[[str], str] | None]]:
        """Segments of the blocks in the order in which they run, how often each, and how to name its parameters."""
        lowest = self._window.lowest
        if self._pre:
            lowest = -1
        kinds = self._shallow.kinds
        order = range(len(kinds))
        if side == "backward":
            order = range(len(kinds) - 1, -1, -1)
        waiting: tuple[int, bool] | None = None
        count = 0
        for block in order:
            above = lowest is not None and block > lowest
            if side == "backward" and not above and block != lowest:
                continue
            key = None if block in self._window.inside else (kinds[block], above)
            if key is not None and key == waiting:
                count += 1
                continue
            if waiting is not None:
                yield self._inactive(waiting, side), count, None
            waiting, count = key, 1
            if key is None:
                yield self._active(block, above, side), 1, self._names(block)
        if waiting is not None:
            yield self._inactive(waiting, side), count, None

    def _names(self, block: int) -> Callable[[str], str]:
        return lambda name: deep_name(name, block, self._shallow)

    def _inactive(self, key: tuple[int, bool], side: str) -> Segment:
        kind, above = key
        if not above:
            run = self._profiles.idle()
        else:
            run = self._profiles.run(self._window.outside) if self._pre else self._profiles.run(feed=True)
        return self._with_input(run, kind, side, above)

    def _active(self, block: int, above: bool, side: str) -> Segment:
        slices, flows = self._window.inside[block], above
        if not self._exact:
            # a block whose input gets no gradient is not recomputed where others park theirs
            slices, above = self._profiles.whole(self._shallow.kinds[block]), above or not self._parked
        elif block == 0 and above:  # its input is what comes from below, not one that was made for it
            slices, above = (*self._window.outside, *slices), False
        run = self._profiles.run(slices, feed=above)
        return self._with_input(run, self._shallow.kinds[block], side, flows)

    def _with_input(self, run: Run, kind: int, side: str, kept: bool) -> Segment:
        """A block, whose input is in host memory between the passes if it is parked there."""
        found = (run.forward if side == "forward" else run.backward).get(kind, NOTHING)
        if not self._parked or not kept:
            return found
        size = run.input_nbytes
        if side == "forward":
            return found if kind == 0 else replace(found, delta=found.delta - size)
        more = size * self._parked
        return replace(
            found,
            peaks=tuple(peak + more for peak in found.peaks),
            levels=tuple(level + more for level in found.levels),
            delta=found.delta + size,
        )
