"""The form in which optimizer state is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chunkft.autograd import Slice
from chunkft.optim.eight_bit import SCALE_KEYS
from chunkft.optim.gathering import Part
from chunkft.optim.state import State, detached
from chunkft.optim.switch import settle
from chunkft.parallel import Ranks

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer

FORMAT = "chunkft-state-1"
PART_FORMAT = "chunkft-state-part-1"


def states_to_save(optimizer: ChunkOptimizer, method: str) -> dict[Slice, State]:
    """The state of this process, between two steps.

    Raises:
        RuntimeError: after ``detach``, inside of a step, or, in a team, if there are gradients.
    """
    optimizer._check_attached(method)
    settle(optimizer)
    optimizer._check_between_steps(method)
    if optimizer._team is not None and optimizer._team.rounds.has_gradients:
        raise RuntimeError(
            f"{method}() between backward() and step() is not possible with a process group: gradients of the ranks "
            "are not summed yet; save right after step(), or call zero_grad() first"
        )
    return optimizer._slice_states()


def is_elementwise(piece: Slice, key: str, value: Any) -> bool:
    """Whether a state value belongs to single elements, so that it can be cut and joined along the parameter."""
    tensor = isinstance(value, Tensor | Part) and value.dim() > 0 and tuple(value.shape) == piece.shape
    return tensor and key not in SCALE_KEYS


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
            {**detached({key: value for key, value in group.items() if key != "params"}), "params": members}
            for group, members in zip(optimizer.param_groups, names, strict=True)
        ],
        "cursor": {
            "interval_index": optimizer._interval_index,
            "interval_position": optimizer.interval_position,
            "updates": optimizer.updates,
            "skipped": optimizer.skipped,
            **({} if optimizer._team is None else {"passes": optimizer._team.rounds.passes}),
        },
        "plan": optimizer.plan.to_dict(),
    }


def states_by_parameter(
    states: Mapping[Slice, State],
) -> Iterator[tuple[str, tuple[int, ...], dict[Slice, State]]]:
    """Name, shape and the slices with their state, parameter by parameter, slices in order of their start."""
    by_name: dict[str, list[Slice]] = {}
    for piece in sorted(states, key=lambda piece: (piece.name, piece.start)):
        by_name.setdefault(piece.name, []).append(piece)
    for name, pieces in by_name.items():
        yield name, pieces[0].parameter_shape, {piece: states[piece] for piece in pieces}


def range_entry(piece: Slice, state: State) -> dict[str, Any]:
    """What is saved of one slice beside its elementwise tensors."""
    elementwise = [key for key, value in state.items() if is_elementwise(piece, key, value)]
    values = {key: value for key, value in state.items() if key not in elementwise}
    return {
        "dim": piece.dim,
        "start": piece.start,
        "stop": piece.stop,
        "elementwise": elementwise,
        "values": values,
    }


def optimizer_state(optimizer: ChunkOptimizer) -> dict[str, Any]:
    """``ChunkOptimizer.state_dict``; of a rank of a team its part."""
    if optimizer._team is not None:
        return part_state(optimizer, states_to_save(optimizer, "state_dict"), optimizer._team.ranks)
    states = states_by_parameter(optimizer._slice_states())
    state = {name: whole_entry(shape, pieces) for name, shape, pieces in states}
    result = {**optimizer_header(optimizer), "state": state}
    gradients = saved_gradients(optimizer)
    if gradients:
        result["gradients"] = gradients
    return result


def whole_entry(
    shape: tuple[int, ...], pieces: Mapping[Slice, State], read: Callable[[Part], Tensor] | None = None
) -> dict[str, Any]:
    """What a state_dict has of one parameter; ``read`` gives the tensors of parts, in order."""
    tensors: dict[str, Tensor] = {}
    ranges = []
    for piece, state in pieces.items():
        entry = range_entry(piece, state)
        for key, value in state.items():
            if isinstance(value, Part):
                assert read is not None
                value = read(value)
            if key in entry["values"]:
                entry["values"][key] = value
                continue
            if key not in tensors:
                tensors[key] = torch.zeros(shape, dtype=value.dtype)
            piece.of(tensors[key]).copy_(value.detach())
        ranges.append(detached(entry))
    return {"shape": list(shape), "tensors": tensors, "ranges": ranges}


def part_state(optimizer: ChunkOptimizer, states: Mapping[Slice, State], ranks: Ranks) -> dict[str, Any]:
    """What one rank has of a state_dict: for each range the tensors of its slice."""
    state: dict[str, Any] = {}
    for name, shape, pieces in states_by_parameter(states):
        ranges = []
        for piece, values in pieces.items():
            entry = range_entry(piece, values)
            tensors = {key: values[key] for key in entry["elementwise"]}
            ranges.append(detached({**entry, "tensors": tensors}))
        state[name] = {"shape": list(shape), "ranges": ranges}
    part = {"rank": ranks.rank, "ranks": ranks.size}
    return {**optimizer_header(optimizer), "format": PART_FORMAT, "part": part, "state": state}


def saved_gradients(optimizer: ChunkOptimizer) -> list[dict[str, Any]]:
    """Gradients that an open accumulation window has summed up so far."""
    optimizer._follow_weights()  # a weight that was replaced since the last step has its gradient already
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
