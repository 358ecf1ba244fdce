"""The checkpoint format, and how saved state is cut for another plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chunkft.autograd import Slice
from chunkft.optim.state import State
from chunkft.plan import Chunk, ChunkPlan

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer

FORMAT = "chunkft-state-1"


def is_elementwise(piece: Slice, value: Any) -> bool:
    """Whether a state value belongs to single elements, so that it can be cut and joined along the parameter."""
    return isinstance(value, Tensor) and value.dim() > 0 and tuple(value.shape) == piece.shape


def optimizer_header(optimizer: ChunkOptimizer) -> dict[str, Any]:
    """Everything of a state_dict that is not per parameter."""
    names: list[list[str]] = [[] for _ in optimizer.param_groups]
    for name in dict.fromkeys(piece.name for piece in optimizer.plan.slices()):
        names[optimizer._group_of[name]].append(name)
    return {
        "format": FORMAT,
        "base": optimizer._base_class.__name__,
        "master": dict(optimizer._modes),
        "param_groups": [
            {**{key: value for key, value in group.items() if key != "params"}, "params": members}
            for group, members in zip(optimizer.param_groups, names, strict=True)
        ],
        "cursor": {
            "interval_index": optimizer._interval_index,
            "interval_position": optimizer.interval_position,
            "updates": optimizer.updates,
            "skipped": optimizer.skipped,
        },
        "plan": optimizer.plan.to_dict(),
    }


def states_by_parameter(
    optimizer: ChunkOptimizer,
) -> Iterator[tuple[str, tuple[int, ...], dict[Slice, State]]]:
    """Name, shape and the slices with their state, parameter by parameter, slices in order of their start."""
    states = optimizer._slice_states()
    by_name: dict[str, list[Slice]] = {}
    for piece in sorted(states, key=lambda piece: (piece.name, piece.start)):
        by_name.setdefault(piece.name, []).append(piece)
    for name, pieces in by_name.items():
        yield name, pieces[0].parameter_shape, {piece: states[piece] for piece in pieces}


def range_entry(piece: Slice, state: State) -> dict[str, Any]:
    """What is saved of one slice beside its elementwise tensors."""
    values = {key: value for key, value in state.items() if not is_elementwise(piece, value)}
    return {"dim": piece.dim, "start": piece.start, "stop": piece.stop, "values": values}


def optimizer_state(optimizer: ChunkOptimizer) -> dict[str, Any]:
    """``ChunkOptimizer.state_dict``."""
    state: dict[str, Any] = {}
    for name, shape, pieces in states_by_parameter(optimizer):
        tensors: dict[str, Tensor] = {}
        for piece, values in pieces.items():
            for key, value in values.items():
                if is_elementwise(piece, value):
                    if key not in tensors:
                        tensors[key] = torch.zeros(shape, dtype=value.dtype)
                    piece.of(tensors[key]).copy_(value.detach())
        ranges = [range_entry(piece, values) for piece, values in pieces.items()]
        state[name] = {"shape": list(shape), "tensors": tensors, "ranges": _detached(ranges)}
    result = {**optimizer_header(optimizer), "state": state}
    gradients = saved_gradients(optimizer)
    if gradients:
        result["gradients"] = gradients
    return result


def saved_gradients(optimizer: ChunkOptimizer) -> list[dict[str, Any]]:
    """Gradients that an open accumulation window has summed up so far."""
    return [
        {
            "name": p.name,
            "dim": p.dim,
            "start": p.start,
            "stop": p.stop,
            "tensor": leaf.grad.detach().cpu().clone(),
        }
        for p, leaf in optimizer.active_parameters()
        if leaf.grad is not None
    ]


def load_optimizer_state(optimizer: ChunkOptimizer, saved: dict[str, Any]) -> None:
    """``ChunkOptimizer.load_state_dict``; tensors may also be lazy slices of a safetensors file."""
    _check_header(optimizer, saved)
    moves: dict[Slice, _Move] = {}
    plan = _recut(optimizer.plan, saved["state"], moves)
    same_plan = plan.to_dict() == saved["plan"]
    gradients = saved.get("gradients", [])
    if gradients and not same_plan:
        raise ValueError(
            "state_dict was taken inside of an accumulation window, whose gradients belong to the chunks of that "
            "run; load it with the same plan, or save it right after optimizer.step()"
        )
    optimizer._discard_state()
    optimizer.plan = plan
    for group, entry in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in entry.items() if key != "params"})
    for pieces in (plan.always, *(chunk.slices for chunk in plan.chunks)):
        optimizer._store.put(
            {piece: moves[piece].state(piece, saved["state"]) for piece in pieces if piece in moves}
        )
    cursor = saved["cursor"]
    optimizer.updates = int(cursor["updates"])
    optimizer.skipped = int(cursor["skipped"])
    if same_plan:
        optimizer._interval_index = int(cursor["interval_index"])
        optimizer.interval_position = min(int(cursor["interval_position"]), optimizer.interval - 1)
    else:
        sweep = int(cursor["interval_index"]) // len(saved["plan"]["chunks"])
        optimizer._interval_index = sweep * len(plan)
        optimizer.interval_position = 0
    optimizer._activate()
    leaves = {(p.name, p.dim, p.start, p.stop): leaf for p, leaf in optimizer.active_parameters()}
    for entry in gradients:
        leaf = leaves[entry["name"], entry["dim"], entry["start"], entry["stop"]]
        leaf.grad = entry["tensor"].to(device=leaf.device, dtype=leaf.dtype).clone()


def _check_header(optimizer: ChunkOptimizer, saved: Any) -> None:
    found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
    if found != FORMAT:
        raise ValueError(
            f"state_dict has format {found!r}; allowed is {FORMAT!r}, made by state_dict() of chunkft"
        )
    if saved["base"] != optimizer._base_class.__name__:
        raise ValueError(
            f"state_dict is of base {saved['base']!r}, this optimizer has {optimizer._base_class.__name__!r}"
        )
    shapes = {piece.name: piece.parameter_shape for piece in optimizer.plan.slices()}
    members = [name for group in saved["param_groups"] for name in group["params"]]
    if set(members) != set(shapes):
        only = sorted(set(members) ^ set(shapes))[0]
        where = "state_dict" if only in members else "model"
        raise ValueError(f"state_dict is of another model: {only!r} is trained in the {where} only")
    if len(saved["param_groups"]) != len(optimizer.param_groups) or any(
        optimizer._group_of[name] != i
        for i, group in enumerate(saved["param_groups"])
        for name in group["params"]
    ):
        raise ValueError("state_dict has its parameters in other groups than this optimizer")
    for name, entry in saved["state"].items():
        if tuple(entry["shape"]) != shapes[name]:
            raise ValueError(
                f"state_dict has {name!r} of shape {tuple(entry['shape'])}, the model has {shapes[name]}"
            )
    for name, mode in optimizer._modes.items():
        if saved["master"][name] != mode:
            raise ValueError(
                f"state_dict has master={saved['master'][name]!r} for {name!r}, this optimizer {mode!r}"
            )


@dataclass
class _Move:
    """Where the state of a new slice comes from: elementwise tensors of its parameter, and values of a range."""

    values: dict[str, Any]

    def state(self, piece: Slice, saved: dict[str, Any]) -> State:
        state: State = dict(_detached(self.values))
        for key, tensor in saved[piece.name]["tensors"].items():
            state[key] = _cut(tensor, piece)
        return state


def _recut(plan: ChunkPlan, saved: dict[str, Any], moves: dict[Slice, _Move]) -> ChunkPlan:
    """The plan with slices split where saved ranges of one slice differ (in their step counts)."""
    always = tuple(part for piece in plan.always for part in _parts(piece, saved, moves))
    chunks = tuple(
        Chunk(chunk.index, tuple(part for piece in chunk.slices for part in _parts(piece, saved, moves)))
        for chunk in plan.chunks
    )
    return ChunkPlan(chunks, always, plan.by)


def _parts(piece: Slice, saved: dict[str, Any], moves: dict[Slice, _Move]) -> list[Slice]:
    entry = saved.get(piece.name)
    if entry is None:
        return [piece]
    for saved_range in entry["ranges"]:
        if (saved_range["dim"], saved_range["start"], saved_range["stop"]) == (
            piece.dim,
            piece.start,
            piece.stop,
        ):
            moves[piece] = _Move(saved_range["values"])
            return [piece]
    whole = piece.dim is None or piece.stop - piece.start == piece.parameter_shape[piece.dim]
    dim = 0 if piece.dim is None else piece.dim
    runs: list[tuple[int, int, dict[str, Any] | None]] = []
    for start, stop, values in _runs_along(dim, piece, entry["ranges"]):
        if runs and _same_values(runs[-1][2], values):
            runs[-1] = (runs[-1][0], stop, values)
        else:
            runs.append((start, stop, values))
    for _, _, values in runs:
        for key, value in (values or {}).items():
            if isinstance(value, Tensor) and value.dim() > 0:
                raise ValueError(
                    f"state {key!r} of {piece.name!r} has shape {tuple(value.shape)} and cannot be cut for another "
                    "plan; load it with the plan it was saved with"
                )
    if len(runs) > 1 and piece.dim is None:
        raise ValueError(
            f"{piece.name!r} was sliced when it was saved and is atomic now; load it with the same plan"
        )
    parts = []
    for start, stop, values in runs:
        part = (
            piece
            if whole and len(runs) == 1
            else Slice(piece.name, piece.dim, start, stop, piece.parameter_shape, piece.element_bytes)
        )
        parts.append(part)
        if values is not None:
            moves[part] = _Move(values)
    return parts


def _runs_along(
    dim: int, piece: Slice, ranges: list[dict[str, Any]]
) -> Iterator[tuple[int, int, dict[str, Any] | None]]:
    """Consecutive windows of a slice with the saved values of each; None where nothing was saved."""
    shape = piece.parameter_shape
    size = shape[dim] if shape else 1
    low, high = (0, size) if piece.dim is None else (piece.start, piece.stop)
    position = low
    for saved_range in sorted(ranges, key=lambda entry: int(entry["start"])):
        start, stop = int(saved_range["start"]), int(saved_range["stop"])
        saved_dim = saved_range["dim"]
        if saved_dim is None or stop - start == shape[saved_dim]:
            start, stop = 0, size
        elif saved_dim != dim:
            raise ValueError(
                f"{piece.name!r} was sliced along dim={saved_dim} when it was saved and along dim={dim} now; "
                "load it with the same slice_dim"
            )
        start, stop = max(start, low), min(stop, high)
        if start >= stop:
            continue
        if start > position:
            yield position, start, None
        yield start, stop, saved_range["values"]
        position = stop
    if position < high:
        yield position, high, None


def _same_values(a: dict[str, Any] | None, b: dict[str, Any] | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.dtype == b.dtype
            and torch.equal(a.cpu(), b.cpu())
        )
    return bool(a == b)


def _cut(tensor: Any, piece: Slice) -> Tensor:
    """Rows or columns of a full-shape tensor, or of a lazy slice of a file, as a CPU tensor of its own."""
    window = slice(piece.start, piece.stop)
    part: Tensor = tensor[:] if piece.dim is None else tensor[window] if piece.dim == 0 else tensor[:, window]
    return part.detach().to("cpu", copy=True).contiguous()


def _detached(value: Any) -> Any:
    """Tensors inside of lists and dicts replaced by copies on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _detached(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_detached(entry) for entry in value]
    return value
