"""What of a model streams: the weights of its blocks, a page each, and the tables outside of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from chunkft.autograd import operator_for
from chunkft.plan import parameter_owners, uncompiled

ALIGNMENT = 256
SLOTS = 3
TILE_SLOTS = 2
Blocks = str | Sequence[str] | None


@dataclass(frozen=True)
class PlacedWeight:
    """One weight and where it lies on the page of its block.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        dtype: of the parameter.
        offset: of its first byte on the page.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of the weight."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """Weights that are on the device together.

    Attributes:
        name: of the module.
        weights: those of its layers that can be sliced.
        nbytes: size of their page.
    """

    name: str
    weights: tuple[PlacedWeight, ...]
    nbytes: int


@dataclass(frozen=True)
class Table:
    """A matrix of one row a token, outside of the blocks.

    Attributes:
        name: of the parameter.
        shape: (rows, width).
        dtype: of the parameter.
        gathers: names of the embeddings that read rows of it; these are gathered on the host.
        multiplies: names of the linear layers that multiply with all of it; they do so tile by tile.
        tile_rows: rows of a tile.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    gathers: tuple[str, ...]
    multiplies: tuple[str, ...]
    tile_rows: int

    @property
    def nbytes(self) -> int:
        """Size of the matrix."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def tiles(self) -> tuple[int, ...]:
        """Bytes of each tile; none if no layer multiplies with it."""
        if not self.multiplies:
            return ()
        row = self.shape[1] * self.dtype.itemsize
        starts = range(0, self.shape[0], self.tile_rows)
        return tuple(row * (min(start + self.tile_rows, self.shape[0]) - start) for start in starts)


@dataclass(frozen=True)
class Units:
    """The weights of a model by the way in which they reach the device.

    Attributes:
        blocks: in the order of the model.
        tables: likewise.
        rest: names of the parameters that stay on the device: norms, biases, and all that no sliced operator reads.
    """

    blocks: tuple[Block, ...]
    tables: tuple[Table, ...]
    rest: tuple[str, ...]

    def resident(self, count: int) -> frozenset[int]:
        """Which blocks stay on the device if ``count`` of them do: evenly spread, so that each gives the copies of
        those around it the time of its own computation.
        """
        total = len(self.blocks)
        return frozenset(i for i in range(total) if (i + 1) * count // total != i * count // total)

    def slot_nbytes(self, resident: int = 0) -> int:
        """Bytes of a slot: of the largest page that streams."""
        stay = self.resident(resident)
        return max((block.nbytes for i, block in enumerate(self.blocks) if i not in stay), default=0)

    def ring_nbytes(self, resident: int = 0, slots: int = SLOTS) -> int:
        """Bytes of all slots for blocks, of which there are never more than pages."""
        return min(slots, len(self.blocks) - resident) * self.slot_nbytes(resident)

    def tile_nbytes(self) -> int:
        """Bytes of all slots for tiles."""
        tiles = [tile for table in self.tables for tile in table.tiles]
        return min(TILE_SLOTS, len(tiles)) * max(tiles, default=0)

    def resident_nbytes(self, resident: int = 0) -> int:
        """Bytes of the blocks that stay on the device."""
        stay = self.resident(resident)
        return sum(w.nbytes for i, block in enumerate(self.blocks) if i in stay for w in block.weights)

    def host_nbytes(self, resident: int = 0) -> int:
        """Bytes of the pages and tables in host memory."""
        stay = self.resident(resident)
        pages = sum(_aligned(block.nbytes) for i, block in enumerate(self.blocks) if i not in stay)
        return pages + sum(_aligned(table.nbytes) for table in self.tables)


def find_units(model: nn.Module, blocks: Blocks = None, tile_bytes: int | None = None) -> Units:
    """Find the blocks and tables of a model, which may be on the meta device.

    A weight streams with its block if every layer that reads it is in that block and has a sliced operator. Outside of
    the blocks embeddings are tables, and so are linear layers of more than half a block page, and those that share the
    matrix of an embedding.

    Args:
        model: any module.
        blocks: name of a ``ModuleList``, or of the class of a block, or the names of the blocks. None: the classes that
            transformers names (``_no_split_modules``) if the model has several modules of one, else the entries of the
            ``ModuleList`` with the most parameters.
        tile_bytes: most bytes of a tile; by default half of the largest page.

    Raises:
        TypeError: if ``model`` is no module, or ``blocks`` no name nor names.
        ValueError: if there are no such blocks, or nothing in them can stream, or ``tile_bytes`` is not allowed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_options(blocks, tile_bytes)
    model = uncompiled(model)
    modules = dict(model.named_modules())
    names = _block_names(model, modules, blocks)
    inside = {id(part): name for name in names for part in modules[name].modules()}
    homes: dict[str, list[str]] = {name: [] for name in names}
    outside: list[str] = []
    rest: list[str] = []
    owners = parameter_owners(model)
    for name, users in owners.items():
        sliceable = all(_reads(module, attribute) for module, attribute in users)
        within = {inside.get(id(module)) for module, _ in users}
        home = within.pop() if len(within) == 1 else ""
        if sliceable and home:
            homes[home].append(name)
        elif sliceable and home is None:
            outside.append(name)
        else:
            rest.append(name)
    found = tuple(_block(model, name, homes[name]) for name in names if homes[name])
    if not found:
        raise ValueError(
            f"blocks={blocks!r}: no block of {type(model).__name__} has a weight that can stream (of nn.Linear, "
            "Conv1D, nn.Embedding or experts, read in one block only)"
        )
    most = max(block.nbytes for block in found)
    paths = {id(module): path for path, module in modules.items()}
    tables = []
    for name in outside:
        table = _table(
            model, name, [(paths[id(module)], module) for module, _ in owners[name]], most, tile_bytes
        )
        if table is None:
            rest.append(name)
        else:
            tables.append(table)
    return Units(found, tuple(tables), tuple(rest))


def block_names(model: nn.Module, blocks: Blocks = None) -> list[str]:
    """Names of the modules that are the blocks of a model, in its order; ``blocks`` as for ``find_units``.

    Raises:
        ValueError: if there are none.
    """
    model = uncompiled(model)
    return _block_names(model, dict(model.named_modules()), blocks)


def _check_options(blocks: object, tile_bytes: object) -> None:
    listed = isinstance(blocks, Sequence) and all(isinstance(name, str) for name in blocks)
    if blocks is not None and not listed:
        raise TypeError(
            f"blocks={blocks!r} is not allowed; needs the name of a ModuleList or of a class, a list of module names, "
            "or None"
        )
    if tile_bytes is not None and (type(tile_bytes) is not int or tile_bytes < 1):
        raise ValueError(f"tile_bytes={tile_bytes!r} is not allowed; needs an integer >= 1, or None")


def _reads(module: nn.Module, attribute: str) -> bool:
    operator = operator_for(module)
    return operator is not None and attribute in operator.names


def _block(model: nn.Module, name: str, members: Iterable[str]) -> Block:
    placed: list[PlacedWeight] = []
    offset = 0
    for member in members:
        parameter = model.get_parameter(member)
        placed.append(PlacedWeight(member, tuple(parameter.shape), parameter.dtype, offset))
        offset += _aligned(placed[-1].nbytes)
    return Block(name, tuple(placed), offset)


def _table(
    model: nn.Module, name: str, users: Sequence[tuple[str, nn.Module]], page: int, tile_bytes: int | None
) -> Table | None:
    """The table that a parameter is; None if it is to stay on the device."""
    parameter = model.get_parameter(name)
    gathers = tuple(dict.fromkeys(path for path, module in users if isinstance(module, nn.Embedding)))
    multiplies = tuple(dict.fromkeys(path for path, module in users if isinstance(module, nn.Linear)))
    if parameter.dim() != 2 or len(gathers) + len(multiplies) != len({path for path, _ in users}):
        return None
    most = max(1, page // 2) if tile_bytes is None else tile_bytes
    size = parameter.numel() * parameter.element_size()
    if not gathers and size <= most:
        return None
    rows, width = parameter.shape
    row = width * parameter.element_size()
    tile = rows
    if size > most:
        # tiles follow each other without a gap, so that all of them are one matrix
        step = ALIGNMENT // math.gcd(ALIGNMENT, row)
        tile = min(rows, max(step, most // row // step * step))
    return Table(name, (rows, width), parameter.dtype, gathers, multiplies, tile)


def _block_names(model: nn.Module, modules: dict[str, nn.Module], blocks: Blocks) -> list[str]:
    if blocks is None:
        return _found_blocks(model, modules)
    if isinstance(blocks, str):
        listed = modules.get(blocks)
        if isinstance(listed, nn.ModuleList | nn.Sequential):
            return [f"{blocks}.{child}" for child, _ in listed.named_children()]
        of_class = _outermost([name for name, module in modules.items() if type(module).__name__ == blocks])
        if of_class:
            return of_class
    names = [blocks] if isinstance(blocks, str) else list(blocks)
    for name in names:
        if name not in modules or not name:
            lists = [path for path, module in modules.items() if isinstance(module, nn.ModuleList)]
            raise ValueError(
                f"blocks={blocks!r}: {type(model).__name__} has no module, ModuleList or class {name!r}; its lists are "
                f"{', '.join(map(repr, lists)) or 'none'}"
            )
    if len(_outermost(names)) != len(names):
        raise ValueError(f"blocks={blocks!r}: one of them is a part of another, or named twice")
    return names


def _found_blocks(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    classes = getattr(model, "_no_split_modules", None) or ()
    known: list[str] = []
    for kind in sorted(classes):
        of_class = [name for name, module in modules.items() if type(module).__name__ == kind]
        known += of_class if len(of_class) > 1 else []
    if known:
        order = list(modules)
        return _outermost(sorted(known, key=order.index))
    lists = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    }
    if not lists:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks whose weights could stream; name them: "
            "blocks='path.of.the.list', or a list of module names"
        )
    largest = max(lists, key=lambda name: lists[name])
    return [f"{largest}.{child}" for child, _ in modules[largest].named_children()]


def _outermost(names: Iterable[str]) -> list[str]:
    """Those that are not parts of others among them, each once."""
    unique = list(dict.fromkeys(names))
    return [name for name in unique if not any(name.startswith(other + ".") for other in unique)]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
