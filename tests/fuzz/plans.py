"""The plan of a program."""

from __future__ import annotations

import itertools
import random
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

import chunkft
from chunkft.plan import parameter_specs


def make_plan(model: nn.Module, spec: dict[str, Any], seed: int) -> chunkft.ChunkPlan:
    """The plan that ``spec`` describes, with fewer chunks or patterns where the model is too small for all."""
    specs = parameter_specs(model)
    if spec["by"] == "user":
        return chunkft.partition(model, None, _dealt(specs, spec["chunks"], seed))
    options: dict[str, Any] = {"slice_dim": spec["slice_dim"], "row_multiple": spec["row_multiple"]}
    for argument, pattern in (("always_active", spec["always"]), ("atomic", spec["atomic"])):
        matched = [one.name for one in specs if pattern is not None and fnmatchcase(one.name, pattern)]
        if matched and (argument == "atomic" or len(matched) < len(specs)):
            options[argument] = pattern
    for chunks in range(spec["chunks"], 0, -1):
        try:
            return chunkft.partition(model, chunks, spec["by"], **options)
        except ValueError as error:
            if "needs 1 <= chunks" not in str(error):
                raise
    raise AssertionError("no plan has one chunk")


def _dealt(specs: list[Any], chunks: int, seed: int) -> list[list[chunkft.Slice]]:
    """Each weight cut at places of its own, the pieces dealt out to chunks."""
    draw, dims = random.Random(seed + chunks), random.Random(seed)
    groups: list[list[chunkft.Slice]] = [[] for _ in range(chunks)]
    for spec in specs:
        pieces = [spec.whole()]
        # always along the same dimension: moments cannot be cut anew along another one
        dim = dims.choice([*spec.dims, None])
        if dim is not None:
            size = spec.shape[dim]
            inner = draw.sample(range(1, size), min(draw.randint(0, 3), size - 1))
            pieces = [spec.slice(dim, a, b) for a, b in itertools.pairwise([0, *sorted(inner), size])]
        for piece in pieces:
            draw.choice(groups).append(piece)
    return [group for group in groups if group]
