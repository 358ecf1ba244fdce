"""A model whose weights stream: in host memory between their visits to the device, block by block."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from chunkft.autograd import TiledForward, put_tiles
from chunkft.plan import parameter_owners, uncompiled
from chunkft.streaming import Pager
from chunkft.weights.arguments import check_count, check_options, resolved_device
from chunkft.weights.forwards import Begin, Finish, StreamedForward, ToDevice, ToHost
from chunkft.weights.guard import Loading, Saving, StreamedApply, check_free
from chunkft.weights.parking import ParkingLot
from chunkft.weights.ring import Holder, Ring
from chunkft.weights.tables import StreamedTiles, Tables, TilePages
from chunkft.weights.units import SLOTS, Block, Blocks, Units, find_units
from chunkft.weights.visits import Visits

_ATTRIBUTE = "_chunkft_weights"


class WeightStream:
    """Keeps the weights of a model in host memory, and brings them to the device when they are needed.

    The weights of a block (a layer of a transformer) are one page, of which ``slots`` are on the device at a time; the
    next one comes while one computes, in the forward and in the backward pass. A page is held until the backward pass
    of its block is done. Embedding tables stay in host memory, where rows are gathered; an output layer is multiplied
    by tiles. Norms, biases and buffers, and what no sliced operator reads, are on the device.

    Between calls of the model every parameter that streams is an ordinary tensor in host memory, with its newest
    values: ``state_dict()``, saving, loading in place and reading work as ever. Works with checkpointed blocks, and
    with others, whose activations are kept.

    Args:
        model: may be on the meta device; its weights are then zeros, to be filled.
        device: where the model computes; ``"auto"`` is the first GPU, or the CPU where there is none.
        blocks: what the blocks are; see ``find_units``.
        slots: pages on the device at a time, at least 2.
        resident_blocks: how many blocks stay on the device.
        weights_dir: a directory for a file that holds the pages of blocks in place of host memory.
        offload_inputs: recompute each block that streams in the backward pass, from its input, which is kept in host
            memory until then. It takes the place of the model's own activation checkpointing.
        tile_bytes: most bytes of a tile; by default half of the largest page.
        pin: whether host memory is page-locked; see ``Pager``.
        poison: overwrite what leaves the device with NaN, to find code that reads it later. For tests.

    Attributes:
        units: what streams, and how.
        device: where the model computes.

    Raises:
        TypeError, ValueError: if an argument is not allowed; the model is left as it was.
        OSError: if there is not enough host memory, or no room for the file; likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str = "auto",
        blocks: Blocks = None,
        slots: int = SLOTS,
        resident_blocks: int = 0,
        weights_dir: str | os.PathLike[str] | None = None,
        offload_inputs: bool = False,
        tile_bytes: int | None = None,
        pin: bool | Literal["auto"] = "auto",
        poison: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model = uncompiled(model)
        check_free(model)
        self.device = resolved_device(device)
        check_count("slots", slots, 2)
        check_count("resident_blocks", resident_blocks, 0)
        check_options(weights_dir, pin, poison, self.device)
        self.units: Units = find_units(model, blocks, tile_bytes)
        count = len(self.units.blocks)
        if resident_blocks > count:
            raise ValueError(
                f"resident_blocks={resident_blocks} is not allowed; the model has {count} blocks"
            )
        self.resident_blocks = resident_blocks
        self.lot = ParkingLot(self.device) if offload_inputs else None
        self._owners = parameter_owners(model)
        self._origins = {name: _parameter(model, name).device for name in self._owners}
        self._handles: list[RemovableHandle] = []
        self._forwards: list[tuple[nn.Module, Any, Any]] = []  # ours, and what was there before
        self._newer: list[Callable[[], Callable[[bool], None] | None]] = []
        self._listeners: list[Callable[[], Callable[[str, int], None] | None]] = []
        self.ring: Ring | None = None
        self._tables: Tables | None = None
        self._open = True
        stay = self.units.resident(resident_blocks)
        self.streamed: tuple[Block, ...] = tuple(b for i, b in enumerate(self.units.blocks) if i not in stay)
        self._number = {weight.name: n for n, block in enumerate(self.streamed) for weight in block.weights}
        self._floors = self._floors_of(stay)
        self._active: list[Callable[[], Callable[[], Collection[str]] | None]] = []
        try:
            if self.streamed:
                self.ring = Ring(
                    self.streamed,
                    self.device,
                    slots=slots,
                    directory=weights_dir,
                    pin=pin,
                    poison=poison,
                )
                self.ring.moved = self._tell
            self._tables = Tables(self.units.tables, self.device, pin, poison)
            if self._tables.pages is not None:
                self._tables.pages.before = weakref.WeakMethod(self.catch_up)
            # All memory is there: from here on the model changes.
            if self.ring is not None:
                self.ring.place(self._holders)
            self._tables.place(self._holders)
            self._to_device(self._resident_names())
            self._install()
        except BaseException:
            self.detach()
            raise
        model.__dict__[_ATTRIBUTE] = self

    def streams(self, name: str) -> bool:
        """Whether a parameter is in host memory between its visits."""
        return name in self._number or (self._tables is not None and name in self._tables.homes)

    def home(self, name: str) -> Tensor:
        """The host memory of a parameter that streams, in its shape.

        Raises:
            KeyError: if it is none.
        """
        if self._tables is not None and name in self._tables.homes:
            return self._tables.homes[name]
        if self.ring is None:
            raise KeyError(name)
        return self.ring.homes[name]

    def block_of(self, name: str) -> int | None:
        """Number in the ring of the block of a weight; None for others."""
        return self._number.get(name)

    @property
    def pagers(self) -> dict[str, Pager]:
        """The pagers of what streams: ``blocks``, and ``tiles`` of tables; only those that there are."""
        found = {} if self.ring is None else {"blocks": self.ring.pager}
        if self.tile_pages is not None:
            found["tiles"] = self.tile_pages.pager
        return found

    @property
    def tile_pages(self) -> TilePages | None:
        """The tiles of all tables, or None if nothing multiplies with one."""
        return None if self._tables is None else self._tables.pages

    @property
    def tiles(self) -> dict[str, StreamedTiles]:
        """The tiles of each table that layers multiply with, by its name."""
        return {} if self._tables is None else self._tables.tiles

    def memory(self) -> dict[str, int]:
        """Bytes by place.

        Returns:
            ``resident``: parameters that stay on the device; ``buffers``: those of the model; ``ring``: slots for
            blocks; ``tiles``: slots for tiles of tables; ``host``: host memory, or the file, that holds what streams.
        """
        assert self._tables is not None
        stay = [_parameter(self.model, name) for name in self._resident_names()]
        ring = self.ring
        return {
            "resident": sum(tensor.numel() * tensor.element_size() for tensor in stay),
            "buffers": sum(tensor.numel() * tensor.element_size() for tensor in self.model.buffers()),
            "ring": 0 if ring is None else ring.pager.slots * ring.pager.slot_bytes,
            "tiles": self._tables.device_nbytes,
            "host": (0 if ring is None else sum(ring.pager.pages)) + self._tables.host_nbytes,
        }

    def written(self, names: Sequence[str]) -> None:
        """The host memory of these parameters was changed, by an update."""
        if self.ring is not None:
            self.ring.changed(name for name in names if name in self._number)

    def listen(self, moved: Callable[[str, int], None]) -> None:
        """Tell a bound method, which is held weakly, name and address of each parameter whose memory changes."""
        self._listeners = [reference for reference in self._listeners if reference() is not None]
        self._listeners.append(weakref.WeakMethod(moved))

    def train(self, names: Callable[[], Collection[str]]) -> None:
        """A bound method, which is held weakly, tells what is trained: nothing else is fetched for a backward pass."""
        self._active = [reference for reference in self._active if reference() is not None]
        self._active.append(weakref.WeakMethod(names))

    def settle(self) -> None:
        """Put in order what an interrupt left half done."""
        if self.ring is not None:
            self._visits.settle()
        if self._tables is not None and self._tables.pages is not None:
            self._tables.pages.settle()

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter that streams."""
        assert self._tables is not None
        found = self._tables.parameters.get(name)
        if found is None:
            assert self.ring is not None
            found = self.ring.parameter(name)
        return found

    def ask(self, catch_up: Callable[[bool], None]) -> None:
        """A bound method, which is held weakly, writes newer values of weights into host memory before these are read.

        It is told whether those of tables are enough.
        """
        self._newer = [reference for reference in self._newer if reference() is not None]
        self._newer.append(weakref.WeakMethod(catch_up))

    def catch_up(self, tables_only: bool = False) -> None:
        """Let host memory have the newest values of all weights, or of the tables."""
        for reference in self._newer:
            newer = reference()
            if newer is not None:
                newer(tables_only)

    def detach(self) -> None:
        """Give the model its weights back, where they were: those that were on a GPU need room there.

        Raises:
            RuntimeError: if an optimizer trains them, which is to be detached first.
        """
        if not self._open:
            return
        if any(name in self._origins for name in self._trained()):
            raise RuntimeError(
                "an optimizer trains the weights that stream: detach() it first, then the stream"
            )
        self._open = False
        for handle in self._handles:
            handle.remove()
        for module, ours, before in self._forwards:
            ours.release()
            if module.__dict__.get("forward") is ours:
                _restore_forward(module, before)
        for module in self.model.modules():
            if isinstance(module.__dict__.get("_apply"), StreamedApply):
                del module.__dict__["_apply"]
        if self.ring is not None:
            self.ring.close()
        if self._tables is not None:
            for parameter in self._tables.parameters.values():
                put_tiles(parameter, None)
            self._tables.close()
        for name, origin in self._origins.items():
            parameter = _parameter(self.model, name)
            if origin.type != "meta" and parameter.device != origin:
                parameter.data = parameter.data.to(origin)
        self.model.__dict__.pop(_ATTRIBUTE, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model does not stream."""
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def _holders(self, name: str) -> tuple[nn.Parameter, Sequence[Holder]]:
        users = [(module._parameters, attribute) for module, attribute in self._owners[name]]
        parameter = _parameter(self.model, name)
        return parameter, [(held, at) for held, at in users if held.get(at) is parameter]

    def _resident_names(self) -> list[str]:
        return [name for name in self._owners if not self.streams(name)]

    @torch.no_grad()
    def _to_device(self, names: Sequence[str]) -> None:
        for name in names:
            parameter, holders = self._holders(name)
            if parameter.is_meta:
                fresh = nn.Parameter(
                    torch.zeros_like(parameter, device=self.device), requires_grad=parameter.requires_grad
                )
                for held, attribute in holders:
                    held[attribute] = fresh
            elif parameter.device != self.device:
                parameter.data = parameter.data.to(self.device)
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[key] = buffer.to(self.device)

    def _install(self) -> None:
        model, tables = self.model, self._tables
        assert tables is not None
        if self.ring is not None:
            visits = self._visits = Visits(self.ring, self._lowest)
            visits.on_refresh = tables.refresh
            for number, block in enumerate(self.streamed):
                module = model.get_submodule(block.name)
                before = module.__dict__.get("forward")
                inner = module.forward if before is None else before
                self._put(module, StreamedForward(module, inner, number, visits, self.lot), before)
            reference = weakref.ref(visits)
            for module in self._around():
                self._handles.append(module.register_forward_pre_hook(Begin(reference), prepend=True))
                self._handles.append(module.register_forward_hook(Finish(reference), always_call=True))
        for table in self.units.tables:
            for name in table.gathers:
                embedding = model.get_submodule(name)
                self._handles.append(
                    embedding.register_forward_pre_hook(ToHost(weakref.ref(self)), with_kwargs=True)
                )
                self._handles.append(embedding.register_forward_hook(ToDevice(self.device)))
            if table.name in tables.tiles:
                put_tiles(tables.parameters[table.name], tables.tiles[table.name])
            for name in table.multiplies:
                linear = model.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                before = linear.__dict__.get("forward")
                inner = linear.forward if before is None else before
                self._put(linear, TiledForward(linear, inner, tables.tiles[table.name]), before)
        held: dict[int, tuple[nn.Module, set[str]]] = {}
        for name, users in self._owners.items():
            if self.streams(name):
                for module, attribute in users:
                    held.setdefault(id(module), (module, set()))[1].add(attribute)
        if id(model) not in held:
            held[id(model)] = model, set()
        for module, attributes in held.values():
            module.__dict__["_apply"] = StreamedApply((module, frozenset(attributes), self.device))
        self._handles.append(model.register_state_dict_pre_hook(Saving(weakref.ref(self))))  # type: ignore[no-untyped-call]
        loading = Loading(weakref.ref(self))
        self._handles.append(model.register_load_state_dict_pre_hook(loading))  # type: ignore[no-untyped-call]

    def _around(self) -> list[nn.Module]:
        """The modules that call blocks."""
        names = {""}
        for block in self.streamed:
            path = block.name.split(".")
            names.update(".".join(path[:length]) for length in range(len(path)))
        modules = [self.model.get_submodule(name) for name in sorted(names)]
        return [module for module in modules if not isinstance(module, nn.ModuleList | nn.ModuleDict)]

    def _trained(self) -> list[str]:
        asked = (reference() for reference in self._active)
        return [name for ask in asked if ask is not None for name in ask()]

    def _put(self, module: nn.Module, forward: Any, before: Any) -> None:
        self._forwards.append((module, forward, before))
        module.__dict__["forward"] = forward

    def _tell(self, name: str, address: int) -> None:
        for reference in self._listeners:
            moved = reference()
            if moved is not None:
                moved(name, address)

    def _lowest(self) -> int:
        """Number of the lowest block that a backward pass comes to, as far as that is known."""
        return min((self._floors.get(name, 0) for name in self._trained()), default=0)

    def _floors_of(self, stay: frozenset[int]) -> dict[str, int]:
        """For each parameter the lowest block in the ring that the backward pass needs when it is trained."""
        floors: dict[str, int] = {}
        streamed = 0
        for number, block in enumerate(self.units.blocks):
            for name, _ in self.model.get_submodule(block.name).named_parameters():
                floors[f"{block.name}.{name}"] = streamed
            streamed += number not in stay
        # Before the first block or, as head and final norm are, behind the last.
        behind = False
        gathered = {table.name for table in self.units.tables if table.gathers}
        for name in self._owners:
            behind = behind or name in floors
            floors.setdefault(name, streamed if behind and name not in gathered else 0)
        return floors


def stream_of(model: nn.Module) -> WeightStream | None:
    """The stream of a model's weights, or None."""
    found = uncompiled(model).__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, WeightStream) else None


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    return model.get_parameter(name)


def _restore_forward(module: nn.Module, before: Any) -> None:
    if before is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = before
