"""The plan: which slices of which parameters make up which chunk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from chunkft.autograd import Slice, operator_for

PLAN_FORMAT = "chunkft-plan-1"


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """What a partition knows of one trainable parameter.

    Attributes:
        name: first qualified name of the parameter (tied parameters have several).
        shape: shape of the parameter.
        dims: dimensions along which it may be cut; empty for an atomic parameter.
        element_bytes: bytes of one element's weight and optimizer state.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    element_bytes: int

    def slice(self, dim: int | None, start: int, stop: int) -> Slice:
        """Rows or columns ``[start, stop)`` of the parameter."""
        return Slice(self.name, dim, start, stop, self.shape, self.element_bytes)

    def whole(self) -> Slice:
        """The parameter as one atomic slice."""
        return self.slice(None, 0, self.shape[0] if self.shape else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter in the stream."""
        return self.whole().nbytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """The slices that are active together."""

    index: int
    slices: tuple[Slice, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return sum(piece.numel for piece in self.slices)

    @property
    def nbytes(self) -> int:
        """Bytes in the stream: weights and optimizer state."""
        return sum(piece.nbytes for piece in self.slices)


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """A partition of all trainable elements of a model into chunks.

    Attributes:
        chunks: the K chunks; every trainable element is in exactly one, or in ``always``.
        always: slices that train at every step, outside of the chunks.
        by: how the plan was made, for display.
    """

    chunks: tuple[Chunk, ...]
    always: tuple[Slice, ...] = ()
    by: str = "user"

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self.chunks)

    def slices(self) -> Iterator[Slice]:
        """All slices, those that are always active first."""
        yield from self.always
        for chunk in self.chunks:
            yield from chunk.slices

    def table(self) -> str:
        """The plan as text: one line a chunk with its slices, rows, elements and bytes."""
        header = ("chunk", "slices", "rows", "elements", "bytes", "from", "to")
        body = [_row(str(chunk.index), chunk.slices) for chunk in self.chunks]
        if self.always:
            body.insert(0, _row("always", self.always))
        widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if i in (0, 5, 6) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in [header, *body]
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain lists, strings and numbers."""
        return {
            "format": PLAN_FORMAT,
            "by": self.by,
            "always": [_to_list(piece) for piece in self.always],
            "chunks": [[_to_list(piece) for piece in chunk.slices] for chunk in self.chunks],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ChunkPlan:
        """The inverse of ``to_dict``; raises ValueError for anything else."""
        if not isinstance(data, dict) or data.get("format") != PLAN_FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"plan has format {found!r}; allowed is {PLAN_FORMAT!r}")
        missing = {"by", "always", "chunks"} - data.keys()
        if missing:
            raise ValueError(f"plan lacks {', '.join(map(repr, sorted(missing)))}; it may have been cut off")
        chunks = tuple(
            Chunk(index, _from_lists(pieces)) for index, pieces in enumerate(_listed(data["chunks"]))
        )
        return cls(chunks, _from_lists(data["always"]), str(data["by"]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ChunkPlan:
        """Read a plan that ``save`` wrote; raises ValueError if the file is not one."""
        try:
            data = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"path={os.fspath(path)!r} is not a plan: {error}") from error
        return cls.from_dict(data)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` put its wrapper around: its names and hooks are those of the model."""
    while "_orig_mod" in model._modules:  # of scripted modules this is no dict
        inner = model._modules["_orig_mod"]
        assert inner is not None
        model = inner
    return model


def parameter_specs(model: nn.Module, state_bytes: int | None = None) -> list[ParameterSpec]:
    """The trainable parameters of a model in stream order, tied ones once.

    Args:
        model: any module.
        state_bytes: optimizer state per element in bytes; by default two fp32 moments, and for 16-bit weights
            the 2 bytes of the fp32 master that the weight lacks.

    Returns:
        One spec for each parameter that requires a gradient, in ``named_parameters()`` order.

    Raises:
        ValueError: if the model has no trainable parameter, or one that is not initialised yet (lazy modules), or
            ``state_bytes`` is not allowed.
    """
    if state_bytes is not None and (
        isinstance(state_bytes, bool) or not isinstance(state_bytes, int) or state_bytes < 0
    ):
        raise ValueError(f"state_bytes={state_bytes!r} is not allowed; needs an integer >= 0, or None")
    owners = parameter_owners(model)
    specs = []
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"parameter {name!r} is not initialised: its lazy module takes its shape from the first input. Run one "
                "forward pass, then build the optimizer"
            )
        if not parameter.requires_grad or parameter.numel() == 0:
            continue
        state = state_bytes if state_bytes is not None else 8 + (2 if parameter.element_size() == 2 else 0)
        dims = sliceable_dims(owners[name])
        specs.append(ParameterSpec(name, tuple(parameter.shape), dims, parameter.element_size() + state))
    if not specs:
        raise ValueError("model has no trainable parameter: none has requires_grad=True")
    return specs


def parameter_owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """For each parameter's first name, every (module, attribute) that holds it."""
    first_name: dict[int, str] = {}
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    enclosed = _functional_children(model)
    for module_name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = first_name.setdefault(
                id(parameter), f"{module_name}.{attribute}" if module_name else attribute
            )
            holder = owners.setdefault(name, [])
            holder.append((module, attribute))
            if id(module) in enclosed:
                holder.append((enclosed[id(module)], attribute))
    return owners


def sliceable_dims(owners: list[tuple[nn.Module, str]]) -> tuple[int, ...]:
    """Dimensions along which every user of a parameter can slice it; empty if one cannot."""
    dims: set[int] | None = None
    for module, attribute in owners:
        operator = operator_for(module)
        if operator is None or attribute not in operator.names:
            return ()
        dims = set(operator.dims) if dims is None else dims & set(operator.dims)
    return tuple(sorted(dims or ()))


def check_plan(plan: ChunkPlan, specs: Iterable[ParameterSpec]) -> None:
    """Raise ValueError unless the plan covers every trainable element of the model exactly once."""
    by_name = {spec.name: spec for spec in specs}
    pieces: dict[str, list[Slice]] = {name: [] for name in by_name}
    if not plan.chunks:
        raise ValueError("plan has no chunk; needs at least one")
    for chunk in plan.chunks:
        if not chunk.slices:
            raise ValueError(f"chunk {chunk.index} of the plan is empty; each needs at least one slice")
    for piece in plan.slices():
        spec = by_name.get(piece.name)
        if spec is None:
            raise ValueError(
                f"plan has a slice of {piece.name!r}, which is not a trainable parameter of the model"
            )
        if tuple(piece.parameter_shape) != spec.shape:
            raise ValueError(
                f"plan has {piece.name!r} of shape {piece.parameter_shape}, the model has {spec.shape}"
            )
        if piece.dim is not None and piece.dim not in spec.dims:
            allowed = f"dim in {spec.dims}" if spec.dims else "no slicing, dim=None: it is atomic"
            raise ValueError(f"plan cuts {piece.name!r} along dim={piece.dim}; allowed is {allowed}")
        size = 0 if piece.dim is None else spec.shape[piece.dim]
        if piece.dim is not None and not 0 <= piece.start < piece.stop <= size:
            raise ValueError(f"plan has slice {piece}; needs 0 <= start < stop <= {size}")
        pieces[piece.name].append(piece)
    for name, spec in by_name.items():
        _check_cover(spec, pieces[name])


def _check_cover(spec: ParameterSpec, pieces: list[Slice]) -> None:
    if not pieces:
        raise ValueError(
            f"plan leaves out {spec.name!r}, which is trainable; freeze it or put it into a chunk"
        )
    dims = {piece.dim for piece in pieces}
    if len(dims) > 1:
        raise ValueError(f"plan cuts {spec.name!r} along several dimensions ({dims}); use one")
    position = 0
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if piece.start != position:
            word = "twice" if piece.start < position else "not at all"
            low, high = sorted((piece.start, position))
            raise ValueError(
                f"plan covers {spec.name!r} [{low}:{high}) {word}; each element must be in one chunk"
            )
        position = piece.stop
    (dim,) = dims
    size = (spec.shape[0] if spec.shape else 1) if dim is None else spec.shape[dim]
    if position != size:
        raise ValueError(f"plan covers {spec.name!r} only up to {position} of {size}")


def _functional_children(model: nn.Module) -> dict[int, nn.Module]:
    """Modules whose weights another module reads without calling them, by id, with that other module."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            found.update({id(child): module for child in module.children()})
    return found


def _row(label: str, pieces: tuple[Slice, ...]) -> tuple[str, ...]:
    rows = sum((piece.stop - piece.start) for piece in pieces)
    numel = sum(piece.numel for piece in pieces)
    nbytes = sum(piece.nbytes for piece in pieces)
    return (
        label,
        str(len(pieces)),
        f"{rows:,}",
        f"{numel:,}",
        _bytes(nbytes),
        str(pieces[0]),
        str(pieces[-1]),
    )


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _to_list(piece: Slice) -> list[Any]:
    return [piece.name, piece.dim, piece.start, piece.stop, list(piece.parameter_shape), piece.element_bytes]


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"plan has {value!r} where it needs a list")
    return list(value)


def _from_lists(entries: Any) -> tuple[Slice, ...]:
    return tuple(_from_list(_listed(entry)) for entry in _listed(entries))


def _from_list(entry: list[Any]) -> Slice:
    valid = len(entry) == 6 and isinstance(entry[0], str) and isinstance(entry[4], list | tuple)
    if valid:
        name, dim, start, stop, shape, element_bytes = entry
        numbers = [start, stop, element_bytes, *shape, *([] if dim is None else [dim])]
        valid = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    if not valid:
        raise ValueError(
            f"plan has slice entry {entry!r}; needs [name, dim, start, stop, shape, element_bytes]"
        )
    return Slice(name, dim, start, stop, tuple(shape), element_bytes)
