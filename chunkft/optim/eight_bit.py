"""State of AdamW in 8 bits (``state_bits=8``): codes of both moments, and scales of their blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from chunkft.autograd import Slice
from chunkft.kernels.companding import (
    FIRST_CODES,
    SECOND_CODES,
    blocks_of,
    decode_first,
    decode_second,
    encode_first,
    encode_second,
)
from chunkft.optim.state import State

CODES = {"exp_avg": FIRST_CODES, "exp_avg_sq": SECOND_CODES}
SCALES = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale"}
SCALE_KEYS = frozenset(SCALES.values())
_ENCODE = {"exp_avg": encode_first, "exp_avg_sq": encode_second}
_DECODE = {"exp_avg": decode_first, "exp_avg_sq": decode_second}
_TOGETHER = 1 << 22  # elements that are decoded at a time


def moment_layout(shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors that hold both moments of a slice, by state key."""
    numel = math.prod(shape)
    codes = {key: (shape, dtype) for key, dtype in CODES.items()}
    return codes | {key: ((blocks_of(numel),), torch.float32) for key in SCALES.values()}


def is_coded(saved_range: dict[str, Any]) -> bool:
    """Whether moments of a range of a state_dict are codes."""
    return not SCALE_KEYS.isdisjoint(saved_range["values"])


def encoded(state: State) -> State:
    """A slice's state with its moments, if it has some, as codes and scales."""
    result = dict(state)
    for key, encode in _ENCODE.items():
        if key in state:
            result[key], result[SCALES[key]] = encode(state[key].float())
    return result


def decoded(key: str, piece: Slice, saved: dict[str, Any]) -> Tensor:
    """One moment of a slice as fp32 numbers, from the codes of all saved ranges that it overlaps.

    Args:
        key: of the moment.
        piece: the slice; ranges that it overlaps are cut along the same dimension, or are the whole parameter.
        saved: what a state_dict has of the parameter; its tensors may be lazy slices of a file.
    """
    shape = piece.parameter_shape
    if not shape:
        (entry,) = saved["ranges"]
        return _DECODE[key](entry["values"][key], entry["values"][SCALES[key]])
    result = torch.zeros(piece.shape)
    dim = piece.dim or 0
    low, high = (0, shape[dim]) if piece.dim is None else (piece.start, piece.stop)
    for entry in saved["ranges"]:
        whole = entry["dim"] is None or entry["dim"] != dim
        start, stop = (0, shape[dim]) if whole else (entry["start"], entry["stop"])
        first, last = max(start, low), min(stop, high)
        if first >= last or not is_coded(entry):
            continue
        scales, tensor = entry["values"][SCALES[key]], saved["tensors"][key]
        if dim == 0:
            before = (first - start) * math.prod(shape[1:])
            result[first - low : last - low] = _DECODE[key](tensor[first:last], scales, before)
            continue
        row = (stop - start) * math.prod(shape[2:])
        step = max(1, _TOGETHER // row)
        for top in range(0, shape[0], step):
            rows = _DECODE[key](tensor[top : top + step, start:stop], scales, top * row)
            result[top : top + step, first - low : last - low] = rows[:, first - start : last - start]
    return result
