"""What a setting holds and how fast it is, from a model without memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from chunkft.autograd import Slice
from chunkft.optim.master import resolve_master
from chunkft.optim.planner.amounts import GpuBytes, HostBytes
from chunkft.optim.planner.held import SentDown, SpentByPage, SpentInBulk
from chunkft.optim.planner.memo import remembered
from chunkft.optim.planner.profiles import Profiles
from chunkft.optim.planner.ranks import Divided
from chunkft.optim.planner.setting import Setting
from chunkft.optim.planner.state import LayoutOfState, PagedState, largest, paged_state, update_nbytes
from chunkft.optim.planner.timeline import Held, Kept, Moment, peak_of
from chunkft.optim.planner.twin import Step, shallow_twin
from chunkft.optim.planner.windows import Window, covering, windows_of
from chunkft.optim.rule import Groups, UpdateRule
from chunkft.partitions import make_plan
from chunkft.plan import ChunkPlan, ParameterSpec, parameter_specs
from chunkft.weights import Units, find_units

__all__ = ["Model"]

CONTEXT = 600 << 20  # of a CUDA context, its modules and the work space of the libraries
EXACT = 8  # chunks up to which each is looked at by itself
SCALARS = 512  # losses, flags, counts
ROUNDING = (
    0.02  # of what is not weights or slots: blocks of the caching allocator are larger than what is asked for
)


class Model:
    """A model whose settings are looked at; what several of them share is worked out once.

    Args:
        deep: the model; its parameters may be anywhere.
        step: computes its loss.
        batch, tokens: of a training step.
        base: class of the optimizer.
        options: its keywords.
        page_bytes: size of a page of ``residency="stream"``.
        always_active, slice_dim: as for ``ChunkOptimizer``.
        device: ``"cuda"`` or ``"cpu"``.
        world: ranks that train replicas and divide the chunk.
    """

    def __init__(
        self,
        deep: nn.Module,
        step: Step,
        batch: int,
        tokens: int,
        base: type[torch.optim.Optimizer],
        options: dict[str, Any],
        page_bytes: int,
        always_active: str | Sequence[str] | None = None,
        slice_dim: int = 0,
        device: str = "cuda",
        world: int = 1,
    ) -> None:
        self.deep = deep
        self.world = world
        self.shallow = shallow_twin(deep)
        self.step, self.batch, self.tokens = step, batch, tokens
        self.page_bytes = page_bytes
        self.device = device
        self._base, self._options = base, options
        self._always, self._slice_dim = always_active, slice_dim
        self.parameters: dict[str, Tensor] = dict(deep.named_parameters())
        self.specs: list[ParameterSpec] = parameter_specs(deep)
        self._profiles: dict[tuple[bool | None, bool, bool], Profiles] = {}
        self._moments: dict[Any, Moment] = {}
        self._windows: dict[int, list[Window]] = {}
        self._kept: list[PagedState] = []
        self._covers: dict[int, list[Window]] = {}
        self.weights = sum(p.numel() * p.element_size() for p in self.parameters.values())
        self.buffers = sum(b.numel() * b.element_size() for b in deep.buffers())

    @functools.cached_property
    def units(self) -> Units | None:
        """What of the model can stream; None if it has no blocks that could."""
        try:
            return find_units(self.deep)
        except ValueError:
            return None

    @functools.cached_property
    def has_checkpointing(self) -> bool:
        """Whether activation checkpointing can be turned on and off."""
        return bool(getattr(self.deep, "supports_gradient_checkpointing", False))

    def profiles(self, setting: Setting) -> Profiles:
        """Of the parts of a step."""
        streams, parks = setting.weights == "stream", setting.offload_inputs
        own = (
            setting.checkpointing and not parks
        )  # blocks that park their inputs are recomputed without the model
        key = own, streams, parks
        if key not in self._profiles:
            tables = self.units.tables if streams and self.units is not None else ()
            self._profiles[key] = Profiles(
                self.shallow, self.step, self.batch, self.tokens, own, self.device, tables, parks
            )
        return self._profiles[key]

    @remembered
    def plan(self, chunks: int) -> ChunkPlan:
        """Raises ValueError if the model cannot be cut into so many."""
        return make_plan(self.deep, self.specs, chunks, "bytes", self._slice_dim, self._always)

    @remembered
    def divided(self, chunks: int) -> Divided:
        """How ranks divide the plan."""
        return Divided(self.plan(chunks), self.world, self.parameters)

    def windows(self, setting: Setting) -> list[Window]:
        """What is active with each chunk, for autograd: of many ranks all of it, and not cut to pages."""
        state = self.state(setting)
        plan = state.plan if self.world == 1 else self.plan(setting.chunks)
        if id(plan) not in self._windows:
            self._windows[id(plan)] = windows_of(plan, self.shallow, len(plan) <= EXACT)
            self._kept.append(state)  # so that ids stay its own
        return self._windows[id(plan)]

    def lowest(self, window: Window) -> int | None:
        """The first block that a gradient flows through; None if it flows through none."""
        below = any(piece.name in self._below for piece in window.outside)
        return 0 if below and self.shallow.deep else window.lowest

    @functools.cached_property
    def _below(self) -> frozenset[str]:
        """Parameters outside of the blocks that are used before them."""
        blocks = self.shallow.deep
        names = list(self.parameters)
        first = next((i for i, name in enumerate(names) if blocks and name.startswith(f"{blocks[0]}.")), 0)
        return frozenset(names[:first])

    def block_of(self, name: str) -> int | None:
        """Number of the block that a parameter is in."""
        return self._block_of.get(name)

    @functools.cached_property
    def _block_of(self) -> dict[str, int]:
        depth = self.shallow.deep[0].count(".") + 1 if self.shallow.deep else 0
        number = {name: index for index, name in enumerate(self.shallow.deep)}
        found = {name: number.get(".".join(name.split(".")[:depth])) for name in self.parameters}
        return {name: block for name, block in found.items() if block is not None}

    @functools.cached_property
    def checkpoints(self) -> bool:
        """Whether the model recomputes its blocks as it is."""
        return bool(getattr(self.deep, "is_gradient_checkpointing", False)) or bool(
            getattr(self.deep, "checkpointing", False)
        )

    @remembered
    def rule(self, master: str, state_bits: int) -> UpdateRule:
        """How slices are updated."""
        sample = nn.Parameter(torch.zeros(1))
        values = self._base([sample], **self._options).defaults
        groups: Groups = [{**values, "params": []}]
        modes = {spec.name: resolve_master(master, self.parameters[spec.name].dtype) for spec in self.specs}
        make = functools.partial(_built, self._base, self._options)
        group_of = {spec.name: 0 for spec in self.specs}
        return UpdateRule(self._base, make, groups, group_of, modes, state_bits=state_bits)

    @remembered
    def probe(self, master: str, state_bits: int, counts: bool) -> LayoutOfState:
        """What state is kept for each slice."""
        return LayoutOfState(self.rule(master, state_bits), self.parameters.__getitem__, counts)

    def state(self, setting: Setting) -> PagedState:
        """Where state lies."""
        counts = setting.update == "backward" and self.device == "cuda"
        return self._state(
            setting.chunks, setting.residency, setting.in_files, setting.master, setting.state_bits, counts
        )

    @remembered
    def _state(
        self, chunks: int, residency: str, in_files: bool, master: str, bits: int, counts: bool
    ) -> PagedState:
        probe = self.probe(master, bits, counts)
        lay_out = functools.partial(
            paged_state,
            probe=probe,
            stream=residency == "stream",
            page_bytes=self.page_bytes,
            in_files=in_files,
        )
        return largest([lay_out(plan) for plan in self.divided(chunks).plans])

    def streams(self, setting: Setting) -> Callable[[str], bool]:
        """Whether the weights of a name stream."""
        if setting.weights == "resident" or self.units is None:
            return lambda name: False
        return self.streamed(setting).__contains__

    def streamed(self, setting: Setting) -> frozenset[str]:
        """Names of the weights that stream."""
        if setting.weights == "resident" or self.units is None:
            return frozenset()
        return self._streamed_names(setting.resident_blocks)

    @remembered
    def _streamed_names(self, resident_blocks: int) -> frozenset[str]:
        assert self.units is not None
        stay = self.units.resident(resident_blocks)
        names = [w.name for i, b in enumerate(self.units.blocks) if i not in stay for w in b.weights]
        return frozenset([*names, *(table.name for table in self.units.tables)])

    def gpu(self, setting: Setting, *, exact: bool = True, limit: int | None = None) -> GpuBytes:
        """What the GPU holds at most.

        Args:
            setting: the choices.
            exact: False takes fewer runs, and says no less than the truth, as it is anyhow for more chunks than
                ``EXACT``.
            limit: with it chunks are looked at exactly, the largest first, where the rough figure is more than this.
        """
        state = self.state(setting)
        windows = self.windows(setting)
        weights, ring, leaves, slots = self._standing(setting)
        travelling = self.divided(setting.chunks).travelling
        batch = 16 * self.batch * self.tokens + SCALARS  # ids and labels

        def whole(moment: Moment) -> GpuBytes:
            reserve = 0
            if self.device == "cuda":
                reserve = CONTEXT + int(ROUNDING * (moment.total + travelling))
            return GpuBytes(
                weights=weights,
                ring=ring,
                leaves=leaves,
                state=slots,
                gradients=moment.gradients + travelling,
                activations=moment.activations + batch,
                working=moment.working,
                update=moment.update,
                reserve=reserve,
            )

        rough = max(
            (whole(self._moment(setting, state, window, False)) for window in self._covering(setting)),
            key=lambda parts: parts.total,
        )
        if len(windows) > EXACT or (not exact and (limit is None or rough.total <= limit)):
            return rough
        found = [whole(self._moment(setting, state, window, False)) for window in windows]
        best: GpuBytes | None = None
        for number in sorted(range(len(windows)), key=lambda n: -found[n].total):
            if best is not None and found[number].total <= best.total:
                break
            parts = whole(self._moment(setting, state, windows[number], True))
            best = parts if best is None or parts.total > best.total else best
            if limit is not None and not exact and best.total > limit:
                break
        assert best is not None
        return best

    def floor(self, setting: Setting) -> int:
        """What the GPU holds at least: what stands, and the gradients of a chunk where they wait for the step."""
        held = sum(self._standing(setting)) + (CONTEXT if self.device == "cuda" else 0)
        if setting.update == "backward" or (setting.weights == "stream" and setting.update_on == "host"):
            return held
        return held + max(window.gradient_nbytes for window in self.windows(setting))

    def _standing(self, setting: Setting) -> tuple[int, int, int, int]:
        """Bytes that are there all the time: weights, slots of weights, leaves, slots of state."""
        state = self.state(setting)
        slots = state.slots + state.resting
        if setting.weights == "resident":
            return self.weights + self.buffers, 0, 0, slots
        assert self.units is not None
        streams = self.streams(setting)
        names = self._streamed_names(setting.resident_blocks)
        away = sum(self.parameters[n].numel() * self.parameters[n].element_size() for n in names)
        ring = self.units.ring_nbytes(setting.resident_blocks) + self.units.tile_nbytes()
        leaves = 0
        if setting.update_on == "host":  # state is used in place in host memory, on a CPU all of it
            slots = self._state_beside(setting) if self.device == "cuda" else 0
        else:
            leaves = max(_leaf_nbytes(w, self.parameters, streams) for w in self.windows(setting))
        return self.weights + self.buffers - away, ring, leaves, slots

    def host(self, setting: Setting) -> HostBytes:
        """What host memory holds."""
        state = self.state(setting)
        weights = gradients = 0
        if setting.weights == "stream":
            assert self.units is not None
            weights = self.units.host_nbytes(setting.resident_blocks)
            if setting.update_on == "host":
                streams = self.streams(setting)
                gradients = max(
                    sum(size for name, size in w.gradients.items() if streams(name))
                    for w in self.windows(setting)
                )
        inputs = 0
        if setting.offload_inputs:
            inputs = len(self.shallow.deep) * self.profiles(setting).run(feed=True).input_nbytes
        return HostBytes(weights=weights, state=state.host, gradients=gradients, activations=inputs)

    def _covering(self, setting: Setting) -> list[Window]:
        windows = self.windows(setting)
        if setting.update == "backward":
            return windows
        if id(windows) not in self._covers:
            self._covers[id(windows)] = covering(windows, self.shallow)
        return self._covers[id(windows)]

    def _moment(self, setting: Setting, state: PagedState, window: Window, exact: bool) -> Moment:
        held, policy = self._held(setting, state, window)
        # beside the input of a block the one before it is on its way already
        parked = (2 if self.device == "cuda" else 1) if setting.offload_inputs else 0
        profiles = self.profiles(setting)
        key = (policy, id(window), id(profiles), parked, exact)
        if key not in self._moments:
            moment = peak_of(profiles, window, held, exact, parked)
            if self.device == "cpu" and window.uneven and not exact:
                # what is computed there for rows that are no whole groups is cut out of more rows, and copied
                beside = 2 * max(window.gradients.values()) + profiles.run(feed=True).input_nbytes
                moment = replace(moment, working=moment.working + beside)
            self._moments[key] = moment
        return max(self._moments[key], self._in_step(setting, state, window), key=lambda moment: moment.total)

    def _in_step(self, setting: Setting, state: PagedState, window: Window) -> Moment:
        if setting.update == "backward":
            return Moment()
        streams = self.streams(setting)
        down = setting.weights == "stream" and setting.update_on == "host"
        gradients = sum(size for name, size in window.gradients.items() if not (down and streams(name)))
        update = 0
        if self.device == "cpu" and not down:
            units: list[tuple[Slice, ...]] = [window.pieces]
            if state.pages is not None and setting.residency == "stream":
                own = set(window.pieces)
                units = [tuple(p for p in page.pieces if p in own) for page in state.pages]
            update = max(self._update_nbytes(setting.master, setting.state_bits, unit) for unit in units)
        return Moment(gradients=gradients, update=update)

    def _held(self, setting: Setting, state: PagedState, window: Window) -> tuple[Held, Any]:
        if setting.weights == "stream" and setting.update_on == "host":
            assert self.units is not None
            gathered = [table.name for table in self.units.tables if table.gathers and not table.multiplies]
            down = SentDown(window, self.streams(setting), self.device == "cpu", gathered)
            return down, ("down", setting.resident_blocks)
        if setting.update != "backward":
            return Kept(window), "kept"
        if state.pages is None:
            share = int(self.page_bytes * self.weights / max(1, sum(state.chunk_nbytes)))
            return SpentInBulk(window, share), ("bulk", setting.master, setting.state_bits)

        def update(pieces: tuple[Slice, ...]) -> int:
            return (
                self._update_nbytes(setting.master, setting.state_bits, pieces) if self.device == "cpu" else 0
            )

        held = SpentByPage(window, state.pages, lambda name: self.parameters[name].element_size(), update)
        return held, ("pages", setting.master, setting.state_bits)

    @remembered
    def _update_nbytes(self, master: str, state_bits: int, pieces: tuple[Slice, ...]) -> int:
        probe = self.probe(master, state_bits, False)
        return update_nbytes(
            pieces, probe, self.rule(master, state_bits), lambda name: self.parameters[name].dtype
        )

    @remembered
    def _beside(self, chunks: int, resident_blocks: int, master: str, bits: int) -> int:
        stay = self._streamed_names(resident_blocks)
        probe = self.probe(master, bits, False)
        plan = self.plan(chunks)
        sizes = [
            sum(probe.nbytes(piece) for piece in chunk.slices if piece.name not in stay)
            for chunk in plan.chunks
        ]
        used = [size for size in sizes if size]
        always = sum(probe.nbytes(piece) for piece in plan.always if piece.name not in stay)
        return max(used, default=0) + always

    def _state_beside(self, setting: Setting) -> int:
        """The state of what stays on the device, where the rest is updated on the host."""
        return self._beside(setting.chunks, setting.resident_blocks, setting.master, setting.state_bits)


def _leaf_nbytes(window: Window, parameters: dict[str, Tensor], streams: Callable[[str], bool]) -> int:
    return sum(p.numel * parameters[p.name].element_size() for p in window.pieces if streams(p.name))


def _built(
    base: type[torch.optim.Optimizer], options: dict[str, Any], groups: Groups
) -> torch.optim.Optimizer:
    return base(groups, **options)
