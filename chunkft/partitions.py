"""Ways of cutting the byte stream of a model into chunks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from chunkft.autograd import Slice
from chunkft.names import matched
from chunkft.plan import Chunk, ChunkPlan, ParameterSpec, check_plan, parameter_specs, uncompiled

Groups = Sequence[Sequence[str | Slice]]
Partition = str | ChunkPlan | Groups | Callable[[list[ParameterSpec]], Groups]
PARTITIONS = ("bytes", "layers", "interleaved")


def _renamed(plan: ChunkPlan, specs: Sequence[ParameterSpec]) -> ChunkPlan:
    """The plan with the names of this model, if it was made for one that was wrapped in another way."""
    names = matched([piece.name for piece in plan.slices()], [spec.name for spec in specs], "plan")
    if names is None or all(name == other for name, other in names.items()):
        return plan

    def part(pieces: Sequence[Slice]) -> tuple[Slice, ...]:
        return tuple(replace(piece, name=names[piece.name]) for piece in pieces)

    chunks = tuple(Chunk(chunk.index, part(chunk.slices)) for chunk in plan.chunks)
    return ChunkPlan(chunks, part(plan.always), plan.by)


def partition(
    model: nn.Module,
    chunks: int | None = 32,
    by: Partition = "bytes",
    *,
    slice_dim: int = 0,
    always_active: str | Sequence[str] | None = None,
    atomic: str | Sequence[str] | None = None,
    row_multiple: int = 64,
    state_bytes: int | None = None,
) -> ChunkPlan:
    """Cut the trainable parameters of a model into chunks; changes nothing in the model.

    Args:
        model: any module that is not attached to an optimizer of chunkft.
        chunks: K, the number of chunks. None lets ``by="layers"`` make one chunk of every block, and takes the
            number from a partition of the user's own.
        by: ``"bytes"``: equal-byte windows of the stream (ChunkFT, arXiv 2605.21177); ``"layers"``: whole blocks
            (BAdam, HiFT); ``"interleaved"``: 1/K of every parameter in each chunk; a ``ChunkPlan``; a list of
            K lists of names, shell-style name patterns or ``Slice``s; or a callable that makes such a list from
            the list of ``ParameterSpec``s.
        slice_dim: 0 cuts rows, 1 cuts columns where the parameter has them; weights of experts are cut along the
            experts.
        always_active: name patterns of parameters that train at every step, outside of the chunks; or
            ``"head"``: what follows the last block, and everything outside of the base model.
        atomic: name patterns of parameters that are never cut.
        row_multiple: cuts fall on multiples of this many rows in parameters that have as many; halved as often
            as needed to make K chunks.
        state_bytes: optimizer state per element; see ``parameter_specs``.

    Returns:
        The plan. Windows of ``"bytes"`` differ from total/K by less than one row group of the largest
        parameter (one row with ``row_multiple=1``), or by its largest atomic parameter if that is larger.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if an argument is not allowed, the model has fewer rows than chunks, or a partition of the
            user's own does not cover every trainable element exactly once.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = uncompiled(model)
    if getattr(model, "_chunkft", None) is not None:
        raise ValueError(
            "model is attached to an optimizer of chunkft; use optimizer.plan, or detach() it first"
        )
    specs = parameter_specs(model, state_bytes)
    whole = set() if atomic is None else _matching(specs, atomic, "atomic")
    specs = [replace(spec, dims=()) if spec.name in whole else spec for spec in specs]
    return make_plan(model, specs, chunks, by, slice_dim, always_active, row_multiple)


def make_plan(
    model: nn.Module,
    specs: list[ParameterSpec],
    chunks: int | None,
    by: Partition,
    slice_dim: int,
    always_active: str | Sequence[str] | None,
    row_multiple: int = 64,
) -> ChunkPlan:
    """``partition`` for specs that are at hand already; same arguments and errors."""
    if slice_dim not in (0, 1):
        raise ValueError(f"slice_dim={slice_dim!r} is not allowed; needs 0 (rows) or 1 (columns)")
    if isinstance(row_multiple, bool) or not isinstance(row_multiple, int) or row_multiple < 1:
        raise ValueError(f"row_multiple={row_multiple!r} is not allowed; needs an integer >= 1")
    if chunks is not None and (isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1):
        raise ValueError(f"chunks={chunks!r} is not allowed; needs an integer >= 1")
    if isinstance(by, ChunkPlan):
        if chunks is not None and chunks != len(by):
            raise ValueError(
                f"chunks={chunks} disagrees with the plan, which has {len(by)}; give chunks=None"
            )
        if always_active is not None:
            raise ValueError(
                f"always_active={always_active!r} cannot be combined with a ChunkPlan, which has its own: "
                f"{[str(piece) for piece in by.always]}"
            )
        by = _renamed(by, specs)
        check_plan(by, specs)
        return by
    always_names = _always_active(model, specs, always_active)
    always = tuple(spec.whole() for spec in specs if spec.name in always_names)
    rest = [spec for spec in specs if spec.name not in always_names]
    if not rest:
        raise ValueError(
            f"always_active={always_active!r} takes every trainable parameter; leave some for the chunks"
        )
    label = by if isinstance(by, str) else "user"
    if by == "bytes":
        groups = _by_bytes(rest, _required(chunks, by), slice_dim, row_multiple)
    elif by == "interleaved":
        groups = _interleaved(rest, _required(chunks, by), slice_dim, row_multiple)
    elif by == "layers":
        groups = _by_layers(model, rest, chunks)
    elif isinstance(by, str):
        raise ValueError(f"partition={by!r} is not known; allowed are {', '.join(map(repr, PARTITIONS))}")
    else:
        groups = _by_user(rest, by)
        if chunks is not None and chunks != len(groups):
            raise ValueError(f"chunks={chunks} disagrees with the partition, which has {len(groups)} groups")
    plan = ChunkPlan(tuple(Chunk(i, tuple(group)) for i, group in enumerate(groups)), always, label)
    check_plan(plan, specs)
    return plan


def _required(chunks: int | None, by: str) -> int:
    if chunks is None:
        raise ValueError(f"chunks=None is not allowed with partition={by!r}; needs an integer >= 1")
    return chunks


def _cut_dim(spec: ParameterSpec, slice_dim: int) -> int | None:
    if not spec.dims:
        return None
    return slice_dim if slice_dim in spec.dims else spec.dims[0]


def _legal_cuts(spec: ParameterSpec, dim: int | None, multiple: int) -> list[int]:
    """Positions in ``(0, size]`` where the parameter may be cut; the last is its end."""
    if dim is None:
        return [spec.shape[0] if spec.shape else 1]
    size = spec.shape[dim]
    step = _row_group(spec, size, multiple, 1)
    return [*range(step, size, step), size]


def _row_group(spec: ParameterSpec, size: int, multiple: int, pieces: int) -> int:
    """Rows between two cuts: ``multiple`` if there are enough for ``pieces``. One expert is a group of its own."""
    return multiple if len(spec.shape) == 2 and size >= multiple * pieces else 1


def _by_bytes(specs: list[ParameterSpec], chunks: int, slice_dim: int, multiple: int) -> list[list[Slice]]:
    dims = [_cut_dim(spec, slice_dim) for spec in specs]
    while True:
        ends: list[int] = []  # byte offset in the stream of every legal cut
        where: list[tuple[int, int]] = []  # the parameter and row of that cut
        offset = 0
        for i, (spec, dim) in enumerate(zip(specs, dims, strict=True)):
            cuts = _legal_cuts(spec, dim, multiple)
            row_bytes = spec.nbytes // cuts[-1]
            ends += [offset + row * row_bytes for row in cuts]
            where += [(i, row) for row in cuts]
            offset += spec.nbytes
        if len(ends) >= chunks:
            break
        if multiple == 1:
            raise ValueError(
                f"chunks={chunks} is not allowed: the trainable parameters have only {len(ends)} rows and atomic "
                f"parameters; needs 1 <= chunks <= {len(ends)}"
            )
        multiple = max(1, multiple // 2)
    chosen = [where[i] for i in _balanced_cuts(ends, chunks)]
    groups: list[list[Slice]] = []
    at, row = 0, 0
    for stop_at, stop_row in chosen:
        group: list[Slice] = []
        while at < stop_at:
            _append(group, specs[at], dims[at], row)
            at, row = at + 1, 0
        _append(group, specs[at], dims[at], row, stop_row)
        row = stop_row
        if row == _legal_cuts(specs[at], dims[at], 1 << 62)[-1]:
            at, row = at + 1, 0
        groups.append(group)
    return groups


def _append(
    group: list[Slice], spec: ParameterSpec, dim: int | None, start: int, stop: int | None = None
) -> None:
    size = spec.shape[dim] if dim is not None else (spec.shape[0] if spec.shape else 1)
    stop = size if stop is None else stop
    if start < stop:
        group.append(spec.whole() if dim is None else spec.slice(dim, start, stop))


def _balanced_cuts(ends: list[int], chunks: int) -> list[int]:
    """Indices of the K cuts nearest to equal windows, strictly increasing, the last one at the end."""
    total = ends[-1]
    chosen: list[int] = []
    previous = -1
    for k in range(1, chunks):
        target = total * k / chunks
        index = bisect_left(ends, target)
        if index > 0 and target - ends[index - 1] <= ends[index] - target:
            index -= 1
        previous = min(max(index, previous + 1), len(ends) - 1 - (chunks - k))
        chosen.append(previous)
    return [*chosen, len(ends) - 1]


def _interleaved(specs: list[ParameterSpec], chunks: int, slice_dim: int, multiple: int) -> list[list[Slice]]:
    groups: list[list[Slice]] = [[] for _ in range(chunks)]
    load = [0] * chunks
    for spec in specs:
        dim = _cut_dim(spec, slice_dim)
        size = 0 if dim is None else spec.shape[dim]
        if dim is None or size < chunks:
            target = load.index(min(load))
            pieces = {target: spec.whole() if dim is None else spec.slice(dim, 0, size)}
        else:
            step = _row_group(spec, size, multiple, chunks)
            bounds = [round(size * k / chunks / step) * step for k in range(chunks)] + [size]
            pieces = {k: spec.slice(dim, bounds[k], bounds[k + 1]) for k in range(chunks)}
        for k, piece in pieces.items():
            groups[k].append(piece)
            load[k] += piece.nbytes
    empty = load.count(0)
    if empty:
        raise ValueError(
            f"chunks={chunks} is not allowed with partition='interleaved': {empty} chunks would be empty; "
            f"needs 1 <= chunks <= {chunks - empty}"
        )
    return groups


def _by_layers(model: nn.Module, specs: list[ParameterSpec], chunks: int | None) -> list[list[Slice]]:
    blocks = block_prefixes(model)
    units: list[list[Slice]] = []
    last: object = None
    for spec in specs:
        block = next((prefix for prefix in blocks if spec.name.startswith(prefix)), None)
        if not units or block != last:
            units.append([])
        dim = _cut_dim(spec, 0)
        units[-1].append(spec.whole() if dim is None else spec.slice(dim, 0, spec.shape[dim]))
        last = block
    if chunks is None or chunks == len(units):
        return units
    if chunks > len(units):
        raise ValueError(
            f"chunks={chunks} is not allowed with partition='layers': the model has {len(units)} blocks (with what "
            f"stands before and after them); needs 1 <= chunks <= {len(units)}, or None for one chunk a block"
        )
    ends: list[int] = []
    for unit in units:
        ends.append((ends[-1] if ends else 0) + sum(piece.nbytes for piece in unit))
    cuts = _balanced_cuts(ends, chunks)
    starts = [0, *(cut + 1 for cut in cuts[:-1])]
    return [[piece for unit in units[a : b + 1] for piece in unit] for a, b in zip(starts, cuts, strict=True)]


def block_prefixes(
    model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.ModuleList, nn.Sequential)
) -> list[str]:
    """Name prefixes of the members of the outermost lists of at least two blocks."""
    lists: list[str] = []
    prefixes: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in lists) or not isinstance(module, kinds):
            continue
        members = [child for child, block in module.named_children() if any(True for _ in block.parameters())]
        if len(members) < 2:
            continue
        lists.append(f"{name}." if name else "")
        prefixes += [f"{name}.{child}." if name else f"{child}." for child in members]
    return prefixes


def _by_user(specs: list[ParameterSpec], by: Any) -> list[list[Slice]]:
    given = by(specs) if callable(by) else by
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or not given:
        raise ValueError(
            f"partition must be one of {', '.join(map(repr, PARTITIONS))}, a ChunkPlan, a list of lists of names, "
            f"patterns or Slices, or a callable that makes such a list; got {given!r}"
        )
    groups: list[list[Slice]] = []
    for number, entries in enumerate(given):
        if isinstance(entries, str | bytes) or not isinstance(entries, Sequence):
            raise ValueError(f"partition group {number} must be a list of names or Slices, got {entries!r}")
        group: list[Slice] = []
        for entry in entries:
            if isinstance(entry, Slice):
                spec = next((spec for spec in specs if spec.name == entry.name), None)
                group.append(entry if spec is None else spec.slice(entry.dim, entry.start, entry.stop))
                continue
            matches = [spec for spec in specs if fnmatchcase(spec.name, entry)]
            if not matches:
                raise ValueError(f"partition group {number}: {entry!r} matches no trainable parameter")
            for spec in matches:
                dim = _cut_dim(spec, 0)
                group.append(spec.whole() if dim is None else spec.slice(dim, 0, spec.shape[dim]))
        groups.append(group)
    return groups


def _always_active(
    model: nn.Module, specs: list[ParameterSpec], patterns: str | Sequence[str] | None
) -> set[str]:
    if patterns is None:
        return set()
    if patterns == "head":
        return _head_names(model, specs)
    return _matching(specs, patterns, "always_active")


def _matching(specs: list[ParameterSpec], patterns: str | Sequence[str], argument: str) -> set[str]:
    names: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = {spec.name for spec in specs if fnmatchcase(spec.name, pattern)}
        if not matched:
            raise ValueError(
                f"{argument}={pattern!r} matches no trainable parameter; names look like {specs[0].name!r}"
            )
        names |= matched
    return names


def _head_names(model: nn.Module, specs: list[ParameterSpec]) -> set[str]:
    """Parameters after the last block: final norm and task head; tied tables sit below and stay in the chunks."""
    # A head may be an nn.Sequential of its own; where there are lists of blocks, those are the trunk.
    blocks = tuple(block_prefixes(model, (nn.ModuleList,)) or block_prefixes(model))
    last = (
        max((i for i, spec in enumerate(specs) if spec.name.startswith(blocks)), default=-1) if blocks else -1
    )
    names = {spec.name for spec in specs[last + 1 :]}
    if last < 0 or not names:
        raise ValueError(
            "always_active='head' found no parameters after the last block of the model; "
            f"give name patterns instead, e.g. {specs[-1].name!r}"
        )
    return names
