"""Whether the values of saved optimizer state are such as training leaves behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chunkft.kernels.companding import blocks_of
from chunkft.optim.eight_bit import CODES, SCALE_KEYS, SCALES, is_coded
from chunkft.optim.master import MASTER_DTYPES, STATE_KEYS
from chunkft.optim.state import State
from chunkft.plan import ChunkPlan

if TYPE_CHECKING:
    from chunkft.optim.chunk_optimizer import ChunkOptimizer

BLOCK = 1 << 22  # elements that are looked at together
# Means of squares or of magnitudes: never negative, and infinite where finite gradients are squared.
POSITIVE = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "exp_inf", "sum", "acc_delta", "row_var", "col_var"}
POSITIVE |= {"variance", "step_size"}
# Kept only with some hyper-parameters, which may have changed since; no harm if they are left over.
OPTIONAL = {"max_exp_avg_sq", "momentum_buffer", "grad_avg"}


def check_structure(state: dict[str, Any]) -> None:
    """Raise ValueError unless the ranges of every parameter are ranges of it that do not overlap."""
    for name, entry in state.items():
        shape = entry["shape"]
        if not isinstance(shape, list | tuple) or not all(_is_count(size) for size in shape):
            raise _damaged(name, "shape", shape, "a list of integers >= 0")
        if not isinstance(entry["tensors"], dict) or not isinstance(entry["ranges"], list):
            raise _damaged(name, "tensors or ranges", type(entry["ranges"]).__name__, "a dict and a list")
        before: tuple[int | None, int] | None = None
        for found in entry["ranges"]:
            if not all(_is_count(found[key]) for key in ("start", "stop")):
                raise _damaged(name, "start and stop", (found["start"], found["stop"]), "integers >= 0")
        for found in sorted(entry["ranges"], key=lambda found: int(found["start"])):
            dim, start, stop = found["dim"], found["start"], found["stop"]
            if dim is not None and not (_is_count(dim) and dim < len(shape)):
                raise _damaged(name, "dim", dim, f"None or an integer below {len(shape)}")
            size = (shape[0] if shape else 1) if dim is None else shape[dim]
            if not start < stop <= size:
                raise _damaged(name, "range", f"[{start}:{stop})", f"0 <= start < stop <= {size}")
            if before is not None and (before[0] != dim or start < before[1]):
                raise _damaged(
                    name, "range", f"[{start}:{stop}) of dim {dim}", "ranges of one dim without overlap"
                )
            before = dim, stop
            keys = found["elementwise"]
            if not isinstance(keys, list) or len({str(key) for key in keys}) != len(keys):
                raise _damaged(name, "elementwise", keys, "a list of different keys")
            if not isinstance(found["values"], dict):
                raise _damaged(name, "values", found["values"], "a dict")


def check_groups(optimizer: ChunkOptimizer, groups: list[dict[str, Any]]) -> None:
    """Raise ValueError for a hyper-parameter that is of another kind than this optimizer's, or is NaN."""
    for number, (ours, theirs) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        for key, value in theirs.items():
            known = key in optimizer.defaults
            numbers = list(value) if isinstance(value, list | tuple) else [value]
            nan = any(isinstance(entry, float) and math.isnan(entry) for entry in numbers)
            if nan or (known and not _same_kind(ours[key], value)):
                raise ValueError(
                    f"state_dict has {key}={value!r} in parameter group {number}; needs a value like "
                    f"{ours.get(key)!r}, which this optimizer has"
                )
        rule = optimizer._residency.rule
        changing = [key for key in ("amsgrad", "maximize") if theirs.get(key)]
        if changing and (rule.state_bits == 8 or rule.first_moment is not None):
            raise ValueError(
                f"state_dict has {changing[0]}=True in parameter group {number}, which an optimizer with state_bits=8 "
                "or first_moment='bf16' cannot do; load it into one without them"
            )
        placed = {parameter.device.type for parameter in ours["params"]}
        if theirs.get("capturable") and "cpu" in placed:
            raise ValueError(
                f"state_dict has capturable=True in parameter group {number}; needs False for parameters on a CPU"
            )


def check_values(
    optimizer: ChunkOptimizer,
    state: dict[str, Any],
    groups: list[dict[str, Any]],
    plan: ChunkPlan | None = None,
) -> None:
    """Raise ValueError that names parameter, key and value for state that no training leaves behind.

    Step counts must be whole and >= 0, moments finite numbers of the right dtype, means of squares >= 0 (they may be
    infinite). What a base optimizer of torch keeps must be there, and nothing else; others may keep what they like.

    Args:
        optimizer: that is to go on from it.
        state: the entry ``state`` of a state_dict.
        groups: its hyper-parameters.
        plan: only tensors of the rows of its slices are looked at; None: all.
    """
    rows = None if plan is None else _rows_of(plan)
    probes: dict[tuple[int, int], State] = {}
    for name, entry in state.items():
        mode = optimizer._modes[name]
        own = {STATE_KEYS[mode]} if mode in STATE_KEYS else set()
        number, dims = optimizer._group_of[name], len(entry["shape"])
        if (number, dims) not in probes:
            probes[number, dims] = _probe(
                optimizer, {**optimizer.param_groups[number], **groups[number]}, dims
            )
        probe = probes[number, dims]
        coded = issubclass(optimizer._base_class, torch.optim.AdamW) and any(map(is_coded, entry["ranges"]))
        for found in entry["ranges"]:
            present = {*found["elementwise"], *found["values"]}
            if coded:
                present -= SCALE_KEYS
            where = f"{name}[{found['start']}:{found['stop']}]"
            if present - own:
                # SGD begins a momentum whenever it is asked for one.
                begun = OPTIONAL if issubclass(optimizer._base_class, torch.optim.SGD) else set()
                missing, other = probe.keys() - present - begun, present - probe.keys() - own - OPTIONAL
                if missing:
                    raise _damaged(where, "keys", sorted(present), f"{sorted(missing)[0]!r} beside them")
                if probe and other:
                    raise _damaged(where, "key", sorted(other)[0], f"one of {sorted([*probe, *own])}")
            for key in found["elementwise"]:
                if key in probe and not (isinstance(probe[key], Tensor) and probe[key].dim() == dims):
                    raise _damaged(where, key, "a value for each element", "one for the whole slice")
            for key, value in found["values"].items():
                if coded and key in SCALE_KEYS:
                    continue
                _check_value(where, key, value, probe.get(key))
            if coded and present - own:
                _check_scales(where, found, tuple(entry["shape"]))
        working = working_dtype(optimizer, name)
        for key, tensor in entry["tensors"].items():
            dtype = MASTER_DTYPES.get(mode) if key in own else CODES.get(key) if coded else None
            _check_tensor(name, key, tensor, working, dtype, None if rows is None else rows[name])


def working_dtype(optimizer: ChunkOptimizer, name: str) -> torch.dtype:
    """In which a parameter is updated: fp32 where it has a master, else its own."""
    weight = optimizer._attachment.parameter(name).dtype
    return weight if optimizer._modes[name] == "none" else torch.float32


def _check_scales(where: str, found: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Raise ValueError unless both moments of a range have a scale for each of its blocks."""
    numel = math.prod(shape)
    if found["dim"] is not None and numel:
        numel = numel // shape[found["dim"]] * (found["stop"] - found["start"])
    for key in SCALES.values():
        scale = found["values"].get(key)
        fits = (
            isinstance(scale, Tensor) and scale.dtype == torch.float32 and scale.shape == (blocks_of(numel),)
        )
        if not fits:
            raise _damaged(where, key, _shown(scale), f"float32 of shape {(blocks_of(numel),)}")
        low, high = (bound.item() for bound in scale.aminmax())
        if not 0 <= low <= high < math.inf:
            raise _damaged(where, key, f"{low} to {high}", "finite numbers >= 0")


def _check_value(where: str, key: str, value: Any, expected: Any) -> None:
    if isinstance(expected, Tensor) and not (isinstance(value, Tensor) and value.dim() == expected.dim()):
        raise _damaged(where, key, _shown(value), f"a tensor of {expected.dim()} dimensions")
    if isinstance(expected, int | float) and not (
        isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)
    ):
        raise _damaged(where, key, _shown(value), "a number")
    if key == "step":
        count = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        whole = isinstance(count, int | float) and math.isfinite(count) and count == int(count)
        if not whole or isinstance(count, bool) or count < 0:
            raise _damaged(where, key, _shown(value), "a whole number >= 0")
    elif isinstance(value, Tensor) and value.is_floating_point() and value.numel():
        _check_range(where, key, value)
    elif isinstance(value, float) and math.isnan(value):
        raise _damaged(where, key, value, "a number")


def _rows_of(plan: ChunkPlan) -> dict[str, list[tuple[int, int]] | None]:
    """Rows of each parameter of a plan; None for all."""
    rows: dict[str, list[tuple[int, int]] | None] = {}
    for piece in plan.slices():
        known = rows.setdefault(piece.name, [])
        if piece.dim != 0:
            rows[piece.name] = None
        elif known is not None:
            known.append((piece.start, piece.stop))
    return rows


def _check_tensor(
    name: str,
    key: str,
    tensor: Any,
    working: torch.dtype,
    own: torch.dtype | None,
    rows: list[tuple[int, int]] | None,
) -> None:
    dtype = tensor.dtype if isinstance(tensor, Tensor) else tensor[:0].dtype if tensor.get_shape() else None
    if own is not None and dtype is not None and dtype != own:
        raise _damaged(name, key, dtype, str(own))
    known = key in POSITIVE or key in ("exp_avg", "momentum_buffer")
    if known and own is None and dtype not in (None, working, torch.float32, torch.bfloat16):
        raise _damaged(name, key, dtype, str(working))
    if dtype is not None and not dtype.is_floating_point:
        return
    for block in _blocks(tensor, rows):
        _check_range(name, key, block)


def _check_range(where: str, key: str, tensor: Tensor) -> None:
    low, high = (bound.item() for bound in tensor.detach().aminmax())
    positive = key in POSITIVE
    if math.isnan(low) or math.isnan(high):
        raise _damaged(where, key, "NaN", "finite numbers")
    if low < 0 if positive else math.isinf(low) or math.isinf(high):
        bad = low if positive or math.isinf(low) else high
        raise _damaged(where, key, bad, "numbers >= 0" if positive else "finite numbers")


def _blocks(tensor: Any, windows: list[tuple[int, int]] | None) -> Iterator[Tensor]:
    """Parts of a tensor, or of a lazy slice of a file, that are little memory."""
    shape = tuple(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())
    if not math.prod(shape):
        return
    if not shape:
        yield tensor if isinstance(tensor, Tensor) else tensor[:]
        return
    rows = max(1, BLOCK // math.prod(shape[1:]))
    for first, last in [(0, shape[0])] if windows is None else windows:
        for start in range(first, last, rows):
            yield tensor[start : min(last, start + rows)]


def _probe(optimizer: ChunkOptimizer, group: dict[str, Any], dims: int) -> State:
    """What a base optimizer of torch keeps for a parameter of so many dimensions; empty if that cannot be told."""
    base = optimizer._base_class
    if not base.__module__.startswith("torch.optim"):
        return {}
    parameter = nn.Parameter(torch.zeros((2,) * dims))
    parameter.grad = torch.zeros_like(parameter)
    plain: dict[str, Any] = {
        key: False for key in ("fused", "foreach", "capturable", "differentiable") if key in group
    }
    try:
        made = optimizer._rule().make_base([{**group, **plain, "params": [parameter]}])
        made.param_groups[0].update(plain)
        made.step()
    except Exception as error:
        raise ValueError(
            f"state_dict has hyper-parameters that base={base.__name__} cannot make a step with: {error}"
        ) from error
    return dict(made.state[parameter])


def _same_kind(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list | tuple):
        return (
            isinstance(theirs, list | tuple)
            and len(ours) == len(theirs)
            and all(_same_kind(a, b) for a, b in zip(ours, theirs, strict=True))
        )
    if ours is None or theirs is None:
        return theirs is None or isinstance(theirs, bool | int | float | str)
    if isinstance(ours, bool):
        return isinstance(theirs, bool)
    if isinstance(ours, int | float | Tensor):
        scalar = isinstance(theirs, Tensor) and theirs.numel() == 1
        return scalar or (isinstance(theirs, int | float) and not isinstance(theirs, bool))
    return type(ours) is type(theirs)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shown(value: Any) -> str:
    return (
        f"{value.dtype} of shape {tuple(value.shape)}"
        if isinstance(value, Tensor) and value.numel() != 1
        else repr(value)
    )


def _damaged(name: str, key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"state_dict is damaged: {name!r} has {key} = {value}; needs {allowed}")
