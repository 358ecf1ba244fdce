"""How saved optimizer state is cut for another plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from chunkft.autograd import Slice
from chunkft.names import matched
from chunkft.optim.eight_bit import CODES, SCALE_KEYS, decoded, encoded, is_coded
from chunkft.optim.state import State, detached
from chunkft.plan import Chunk, ChunkPlan

Origins = dict[Slice, dict[str, Any]]
Window = tuple[str, int | None, int, int]  # name, dim, start, stop


def merged(plan: ChunkPlan) -> list[list[Window]]:
    """What is active in each chunk, without regard to how it is split into slices; first what always is.

    A parameter that is in one chunk as a whole counts as atomic, however it is cut there.
    """
    result = []
    for pieces in (plan.always, *(chunk.slices for chunk in plan.chunks)):
        windows: list[Window] = []
        shapes = {piece.name: piece.parameter_shape for piece in pieces}
        for piece in sorted(pieces, key=lambda piece: (piece.name, piece.start)):
            if windows and windows[-1][:2] == (piece.name, piece.dim) and windows[-1][3] == piece.start:
                windows[-1] = (*windows[-1][:3], piece.stop)
            else:
                windows.append((piece.name, piece.dim, piece.start, piece.stop))
        result.append([_atomic_if_whole(window, shapes[window[0]]) for window in windows])
    return result


def _atomic_if_whole(window: Window, shape: tuple[int, ...]) -> Window:
    name, dim, start, stop = window
    if dim is not None and (start, stop) == (0, shape[dim]):
        return name, None, 0, shape[0]
    return window


def near(state: dict[str, Any], plan: ChunkPlan) -> dict[str, Any]:
    """Of the entry ``state`` of a state_dict the ranges that slices of a plan overlap."""
    windows: dict[str, list[Slice]] = {}
    for piece in plan.slices():
        windows.setdefault(piece.name, []).append(piece)
    found = {}
    for name, entry in state.items():
        ranges = [
            one for one in entry["ranges"] if any(_overlaps(one, piece) for piece in windows.get(name, ()))
        ]
        if ranges:
            found[name] = {**entry, "ranges": ranges}
    return found


def _overlaps(saved_range: dict[str, Any], piece: Slice) -> bool:
    dim, start, stop = _window_of(saved_range)
    return dim is None or piece.dim != dim or (start < piece.stop and piece.start < stop)


def renamed(saved: dict[str, Any], ours: list[str]) -> dict[str, Any]:
    """A state_dict with the names of this model, if it was saved from one that was wrapped in another way.

    Raises:
        ValueError: if it cannot be told which name is meant.
    """
    members = [name for group in saved["param_groups"] for name in group["params"]]
    names = matched(members, ours, "state_dict")
    if names is None or all(name == other for name, other in names.items()):
        return saved  # as it is, or of another model: that is told by who compares them
    plan = saved["plan"]
    result = {
        **saved,
        "state": {names[name]: entry for name, entry in saved["state"].items()},
        "master": {names[name]: mode for name, mode in saved["master"].items()},
        "param_groups": [
            {**group, "params": [names[name] for name in group["params"]]} for group in saved["param_groups"]
        ],
        "plan": {
            **plan,
            "always": [[names[name], *rest] for name, *rest in plan["always"]],
            "chunks": [[[names[name], *rest] for name, *rest in pieces] for pieces in plan["chunks"]],
        },
    }
    if "gradients" in saved:
        result["gradients"] = [{**entry, "name": names[entry["name"]]} for entry in saved["gradients"]]
    return result


def new_state(
    piece: Slice, saved: dict[str, Any], entry: dict[str, Any], bits: int, working: torch.dtype
) -> State:
    """State of a slice, as CPU tensors of its own.

    Args:
        piece: the slice.
        saved: what was saved of its parameter.
        entry: the saved range that the slice lies in, or begins in; its ``values`` are taken as they are.
        bits: of the moments of AdamW that are wanted, 8 or 32.
        working: dtype of moments of 32 bits that were saved in 8.
    """
    coded = is_coded(entry)
    keep = coded and bits == 8 and _fits(entry, piece)
    state: State = dict(detached(entry["values"]))
    for key in entry["elementwise"]:
        if keep or not coded or key not in CODES:
            state[key] = _cut(saved["tensors"][key], piece)
    if coded and not keep:  # their blocks begin elsewhere, or there are to be none
        state = {key: value for key, value in state.items() if key not in SCALE_KEYS}
        state |= {key: decoded(key, piece, saved).to(working) for key in CODES}
    return encoded(state) if bits == 8 and not keep else state


def recut(plan: ChunkPlan, saved: dict[str, Any], origins: Origins) -> ChunkPlan:
    """The plan with slices split where saved ranges of one slice differ (in their step counts).

    Args:
        plan: the plan to go on with.
        saved: the entry ``state`` of a state_dict.
        origins: receives the saved range of each slice that has state.

    Raises:
        ValueError: if state cannot be cut or joined in that way.
    """
    always = tuple(part for piece in plan.always for part in _parts(piece, saved, origins))
    chunks = tuple(
        Chunk(chunk.index, tuple(part for piece in chunk.slices for part in _parts(piece, saved, origins)))
        for chunk in plan.chunks
    )
    return ChunkPlan(chunks, always, plan.by)


def _parts(piece: Slice, saved: dict[str, Any], origins: Origins) -> list[Slice]:
    entry = saved.get(piece.name)
    if entry is None:
        return [piece]
    for saved_range in entry["ranges"]:
        if _fits(saved_range, piece):
            origins[piece] = saved_range
            return [piece]
    whole = piece.dim is None or piece.stop - piece.start == piece.parameter_shape[piece.dim]
    dim = 0 if piece.dim is None else piece.dim
    runs: list[tuple[int, int, dict[str, Any] | None]] = []
    for start, stop, found in _runs_along(dim, piece, entry["ranges"]):
        if runs and _same_range(runs[-1][2], found):
            runs[-1] = (runs[-1][0], stop, found)
        else:
            runs.append((start, stop, found))
    for _, _, found in runs:
        for key, value in (found["values"] if found else {}).items():
            if isinstance(value, Tensor) and value.dim() > 0 and key not in SCALE_KEYS:
                raise ValueError(
                    f"state {key!r} of {piece.name!r} has shape {tuple(value.shape)} and cannot be cut for another "
                    "plan; load it with the plan it was saved with"
                )
    if len(runs) > 1 and piece.dim is None:
        raise ValueError(
            f"{piece.name!r} was sliced when it was saved and is atomic now; load it with the same plan"
        )
    parts = []
    for start, stop, found in runs:
        part = (
            piece
            if whole and len(runs) == 1
            else Slice(piece.name, piece.dim, start, stop, piece.parameter_shape, piece.element_bytes)
        )
        parts.append(part)
        if found is not None:
            origins[part] = found
    return parts


def _runs_along(
    dim: int, piece: Slice, ranges: list[dict[str, Any]]
) -> Iterator[tuple[int, int, dict[str, Any] | None]]:
    """Consecutive windows of a slice with the saved range of each; None where nothing was saved."""
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
        yield start, stop, saved_range
        position = stop
    if position < high:
        yield position, high, None


def _same_range(a: dict[str, Any] | None, b: dict[str, Any] | None) -> bool:
    if a is None or b is None:
        return a is b
    if sorted(a["elementwise"]) != sorted(b["elementwise"]) or a["values"].keys() != b["values"].keys():
        return False
    return all(_same(value, b["values"][key]) for key, value in a["values"].items() if key not in SCALE_KEYS)


def _window_of(saved_range: dict[str, Any]) -> tuple[int | None, int, int]:
    return saved_range["dim"], saved_range["start"], saved_range["stop"]


def _fits(saved_range: dict[str, Any], piece: Slice) -> bool:
    """Whether a saved range is a slice, or both are the whole parameter."""
    shape = piece.parameter_shape
    windows = [_window_of(saved_range), (piece.dim, piece.start, piece.stop)]
    first, other = (_atomic_if_whole((piece.name, *window), shape) for window in windows)
    return first == other


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
