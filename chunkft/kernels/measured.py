"""Tables of measured configurations, one JSON file a device family, written by ``python -m bench.kernels --table``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from chunkft.kernels.heuristics import Config, Problem, broken_limits
from chunkft.kernels.targets import Target, family

FORMAT = 2
VARIABLE = "CHUNKFT_KERNEL_TABLE"
_FOLDER = Path(__file__).parent / "tables"
# Measured buckets that are further apart, in half octaves, say nothing of what lies between them: a factor of 4.
REACH = 4

Bucket = tuple[int, ...]
Kind = tuple[Any, ...]


@dataclass(frozen=True)
class Table:
    """Measurements of one family, by kind of problem and bucket of its sizes; of several, the least favourable.

    Sizes (tokens, rows, columns) fall into half octaves. The kind is all else that a kernel's speed depends on: bytes
    of inputs and result, products in tf32, gathered blocks, starts that are multiples of 8 or not, operands that suit
    a descriptor, accumulation, and, of several slices, the size of each and whether they share X.
    """

    family: int
    entries: dict[Kind, dict[Bucket, tuple[Config, float]]]

    def find(self, problem: Problem, target: Target) -> tuple[Config | None, float] | None:
        """Configuration and speed-up of a problem of this kind and about these sizes, measured on this family.

        A bucket that was measured speaks for itself. One that was not takes the smaller speed-up of the nearest
        measured ones below and above it along tokens, rows or columns (all else equal), if they are at most a factor of
        4 apart; of all pairs the smallest. None: nothing is known. The configuration is None if the one that was
        measured is not legal for this very problem.
        """
        if family(target.capability) != self.family:
            return None
        of_kind = self.entries.get(_kind(problem))
        if not of_kind:
            return None
        bucket = _bucket(problem)
        found = of_kind.get(bucket) or _least(_between(of_kind, bucket, problem))
        if found is None:
            return None
        config, speedup = found
        return (None if broken_limits(config, problem, target) else config), speedup


def entry(problem: Problem, config: Config, speedup: float) -> dict[str, Any]:
    """What a table's file holds of one measurement; ``speedup`` is PyTorch's time by Triton's, rounded down."""
    return {
        "problem": asdict(problem),
        "config": asdict(config),
        "speedup": math.floor(speedup * 1000) / 1000,
    }


def load(path: str | Path) -> Table:
    """Read a table.

    Raises:
        ValueError: if the file is not a table of this format.
    """
    try:
        content = json.loads(Path(path).read_text())
        if content["format"] == 1:
            raise ValueError(
                "format 1 mixed aligned with misaligned slices; measure anew with bench.kernels --table"
            )
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        return Table(family(int(content["family"])), _by_kind(_read(row) for row in content["entries"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a table of kernel configurations of format {FORMAT}: {error}"
        ) from error


@cache
def for_capability(capability: int) -> Table | None:
    """The table named by the environment variable CHUNKFT_KERNEL_TABLE, else the family's own, else None."""
    named = os.environ.get(VARIABLE)
    if named:
        return load(named)
    own = _FOLDER / f"sm{family(capability)}.json"
    return load(own) if own.exists() else None


def _read(row: dict[str, Any]) -> tuple[Problem, Config, float]:
    facts = dict(row["problem"])
    facts["parts"] = tuple(facts.get("parts", ()))
    speedup = float(row["speedup"])
    if not 0 <= speedup < math.inf:
        raise ValueError(f"speedup={speedup} is not a finite number from 0 on")
    return Problem(**facts), Config(**row["config"]), speedup


def _by_kind(
    measurements: Iterable[tuple[Problem, Config, float]],
) -> dict[Kind, dict[Bucket, tuple[Config, float]]]:
    entries: dict[Kind, dict[Bucket, tuple[Config, float]]] = {}
    for problem, config, speedup in measurements:
        of_kind, bucket = entries.setdefault(_kind(problem), {}), _bucket(problem)
        if bucket not in of_kind or speedup < of_kind[bucket][1]:
            of_kind[bucket] = config, speedup
    return entries


def _kind(problem: Problem) -> Kind:
    return (
        problem.itemsize,
        problem.out_itemsize,
        problem.itemsize == 4 and problem.tf32,
        problem.row_block,
        problem.col_block,
        problem.row_shift == 0,
        problem.col_shift == 0,
        problem.described,
        problem.accumulate,
        problem.shared,
        tuple(sorted(map(_half_octave, problem.parts))),
    )


def _bucket(problem: Problem) -> Bucket:
    return _half_octave(problem.tokens), _half_octave(problem.rows), _half_octave(problem.cols)


def _half_octave(size: int) -> int:
    return round(2 * math.log2(max(1, size)))


def _between(
    of_kind: dict[Bucket, tuple[Config, float]], bucket: Bucket, problem: Problem
) -> Iterable[tuple[Config, float]]:
    """The less favourable of each pair of neighbours."""
    # the rows of several slices are in the kind already
    for dim in (0, 2) if problem.parts else (0, 1, 2):
        line = [
            other for other in of_kind if other[:dim] + other[dim + 1 :] == bucket[:dim] + bucket[dim + 1 :]
        ]
        below = max((other for other in line if other[dim] < bucket[dim]), default=None)
        above = min((other for other in line if other[dim] > bucket[dim]), default=None)
        if below is not None and above is not None and above[dim] - below[dim] <= REACH:
            yield min(of_kind[below], of_kind[above], key=lambda found: found[1])


def _least(found: Iterable[tuple[Config, float]]) -> tuple[Config, float] | None:
    return min(found, key=lambda one: one[1], default=None)
