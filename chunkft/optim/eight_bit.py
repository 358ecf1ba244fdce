"""State of AdamW in 8 bits (``state_bits=8``): codes of both moments, and scales of their blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from chunkft.kernels.companding import FIRST_CODES, SECOND_CODES, blocks_of

CODES = {"exp_avg": FIRST_CODES, "exp_avg_sq": SECOND_CODES}
SCALES = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale"}
SCALE_KEYS = frozenset(SCALES.values())


def moment_layout(shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors that hold both moments of a slice, by state key."""
    numel = torch.Size(shape).numel()
    codes = {key: (shape, dtype) for key, dtype in CODES.items()}
    return codes | {key: ((blocks_of(numel),), torch.float32) for key in SCALES.values()}
