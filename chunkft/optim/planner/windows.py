"""The chunks of a plan as seen from the blocks of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import nn

from chunkft.autograd import Slice
from chunkft.optim.pages import ROW_MULTIPLE
from chunkft.optim.planner.twin import Shallow
from chunkft.plan import ChunkPlan, parameter_owners

__all__ = ["Window", "covering", "deep_name", "windows_of"]

SIXTEENTHS = 16


@dataclass(frozen=True)
class Window:
    """What is active together.

    Attributes:
        pieces: the slices.
        outside: those of no block, as far as it matters which rows they are.
        inside: those of each block that has some, likewise, under the names of the shallow model.
        gradients: bytes of the gradient of each parameter, by its name.
        uneven: whether what is kept for a slice of a block depends on its rows.
        most: bytes of gradients that there are at most, where the window stands for several.
    """

    pieces: tuple[Slice, ...]
    outside: tuple[Slice, ...]
    inside: dict[int, tuple[Slice, ...]]
    gradients: dict[str, int] = field(default_factory=dict)
    uneven: bool = False
    most: int | None = None

    @property
    def lowest(self) -> int | None:
        """The first block that has an active slice."""
        return min(self.inside, default=None)

    @property
    def gradient_nbytes(self) -> int:
        """Bytes of all gradients."""
        return sum(self.gradients.values()) if self.most is None else self.most


def windows_of(plan: ChunkPlan, shallow: Shallow, exact: bool) -> list[Window]:
    """A window for each chunk of a plan of the deep model, with what is always active.

    With ``exact=False`` parts of a parameter outside of the blocks of which it matters how many rows they have get some
    more, up to the next sixteenth of it: fewer of them differ then.
    """
    number = {name: index for index, name in enumerate(shallow.deep)}
    depth = shallow.deep[0].count(".") + 1 if shallow.deep else 0
    element = {name: p.element_size() for name, p in shallow.model.named_parameters()}
    even = _even(shallow.model)

    def split(pieces: Iterable[Slice]) -> Window:
        pieces = tuple(pieces)
        outside: list[Slice] = []
        inside: dict[int, list[Slice]] = {}
        gradients: dict[str, int] = {}
        uneven = False
        for piece in pieces:
            parts = piece.name.split(".")
            block = number.get(".".join(parts[:depth])) if depth else None
            name = piece.name
            if block is not None:
                name = ".".join([shallow.blocks[shallow.kinds[block]], *parts[depth:]])
            seen = piece if name == piece.name else replace(piece, name=name)
            if piece.dim == 0 and name in even and _whole_groups(piece):
                # a part of a table selects tokens, which takes memory; otherwise any rows are as good as these
                rows = piece.parameter_shape[0]
                partly = even[name] and piece.stop - piece.start < rows
                seen = replace(seen, start=0, stop=rows - 1 if partly else rows)
            elif block is not None and piece.dim is not None:
                uneven = True
            elif block is None and piece.dim == 0 and not exact:
                rows, step = piece.parameter_shape[0], max(1, piece.parameter_shape[0] // SIXTEENTHS)
                taken = sum(p.stop - p.start for p in pieces if p.name == piece.name)
                seen = replace(seen, start=0, stop=min(rows, -(-taken // step) * step))
            members = outside if block is None else inside.setdefault(block, [])
            if seen not in members:
                members.append(seen)
            gradients[piece.name] = gradients.get(piece.name, 0) + piece.numel * element[name]
        return Window(pieces, tuple(outside), {b: tuple(p) for b, p in inside.items()}, gradients, uneven)

    return [split([*plan.always, *chunk.slices]) for chunk in plan.chunks]


def covering(windows: list[Window], shallow: Shallow) -> list[Window]:
    """Fewer windows, of which one holds at least what each of the given ones does.

    Where all blocks but the first are alike, those of the same number of blocks differ in how many blocks gradients
    flow through, and in their rows: the lowest one with the most gradients of all stands for them. Of those that touch
    no block the one with the most rows does.
    """
    alike = len(set(shallow.kinds[1:])) <= 1
    found: dict[object, Window] = {}
    for window in windows:
        key: object = id(window)
        if window.outside and not window.inside:
            key = tuple(piece.name for piece in window.outside)
            other = found.get(key)
            if other is None or other.gradient_nbytes < window.gradient_nbytes:
                found[key] = window
            continue
        if alike and not window.outside and window.lowest != 0:
            key = len(window.inside)
        other = found.get(key)
        found[key] = window if other is None else _over(*_ordered(other, window), shallow)
    return list(found.values())


def _ordered(one: Window, other: Window) -> tuple[Window, Window]:
    return (one, other) if (one.lowest or 0) <= (other.lowest or 0) else (other, one)


def _over(low: Window, high: Window, shallow: Shallow) -> Window:
    """The lower of two windows, with at least the gradients of both."""
    gradients = dict(low.gradients)
    shift = (high.lowest or 0) - (low.lowest or 0)
    number = {name: index for index, name in enumerate(shallow.deep)}
    depth = shallow.deep[0].count(".") + 1
    for name, size in high.gradients.items():
        parts = name.split(".")
        block = number.get(".".join(parts[:depth]))
        moved = name if block is None else ".".join([shallow.deep[block - shift], *parts[depth:]])
        gradients[moved] = max(gradients.get(moved, 0), size)
    most = max(low.gradient_nbytes, high.gradient_nbytes)
    return replace(low, gradients=gradients, most=most, uneven=low.uneven or high.uneven)


def deep_name(name: str, block: int, shallow: Shallow) -> str:
    """Name in the deep model of a parameter of the shallow one's block that stands for this one."""
    prefix = shallow.blocks[shallow.kinds[block]]
    return shallow.deep[block] + name[len(prefix) :]


def _whole_groups(piece: Slice) -> bool:
    """Whether a slice of rows is cut where products on a CPU give its gradient without a copy."""
    ends = piece.stop == piece.parameter_shape[0] or piece.stop % ROW_MULTIPLE == 0
    return ends and piece.start % ROW_MULTIPLE == 0


def _even(model: nn.Module) -> dict[str, bool]:
    """Parameters of which a training step takes the same memory whichever rows are active, gradients left out; whether
    they are tables.
    """
    found = {}
    for name, users in parameter_owners(model).items():
        if len(users) == 1 and type(users[0][0]) in (nn.Linear, nn.Embedding):
            found[name] = type(users[0][0]) is nn.Embedding
    return found
