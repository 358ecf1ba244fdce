"""The chunks of a plan as seen from the blocks of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import nn

from chunkft.autograd import Slice
from chunkft.optim.planner.twin import Shallow
from chunkft.plan import ChunkPlan

__all__ = ["Window", "windows_of"]


@dataclass(frozen=True)
class Window:
    """What is active together.

    Attributes:
        pieces: the slices.
        outside: those of no block.
        inside: those of each block that has some, under the names of the shallow model.
        gradients: bytes of the gradient of each parameter, by its name.
    """

    pieces: tuple[Slice, ...]
    outside: tuple[Slice, ...]
    inside: dict[int, tuple[Slice, ...]]
    gradients: dict[str, int] = field(default_factory=dict)

    @property
    def lowest(self) -> int | None:
        """The first block that has an active slice."""
        return min(self.inside, default=None)

    @property
    def gradient_nbytes(self) -> int:
        """Bytes of all gradients."""
        return sum(self.gradients.values())


def windows_of(plan: ChunkPlan, shallow: Shallow) -> list[Window]:
    """A window for each chunk of a plan of the deep model, with what is always active."""
    number = {name: index for index, name in enumerate(shallow.deep)}
    depth = shallow.deep[0].count(".") + 1 if shallow.deep else 0
    element = {name: p.element_size() for name, p in shallow.model.named_parameters()}
    linear = _of_linear_layers(shallow.model)

    def split(pieces: Iterable[Slice]) -> Window:
        pieces = tuple(pieces)
        outside: list[Slice] = []
        inside: dict[int, list[Slice]] = {}
        gradients: dict[str, int] = {}
        for piece in pieces:
            parts = piece.name.split(".")
            block = number.get(".".join(parts[:depth])) if depth else None
            if block is None:
                outside.append(piece)
                name = piece.name
            else:
                name = ".".join([shallow.blocks[shallow.kinds[block]], *parts[depth:]])
                seen = replace(piece, name=name)
                if name in linear and piece.dim == 0:  # what is kept for it does not depend on which rows
                    seen = replace(seen, start=0, stop=piece.parameter_shape[0])
                members = inside.setdefault(block, [])
                if seen not in members:
                    members.append(seen)
            gradients[piece.name] = gradients.get(piece.name, 0) + piece.numel * element[name]
        return Window(pieces, tuple(outside), {b: tuple(p) for b, p in inside.items()}, gradients)

    return [split([*plan.always, *chunk.slices]) for chunk in plan.chunks]


def deep_name(name: str, block: int, shallow: Shallow) -> str:
    """Name in the deep model of a parameter of the shallow one's block that stands for this one."""
    prefix = shallow.blocks[shallow.kinds[block]]
    return shallow.deep[block] + name[len(prefix) :]


def _of_linear_layers(model: nn.Module) -> set[str]:
    return {f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear}
