"""Tables of measured configurations, one JSON file a device family, written by ``python -m bench.kernels --table``."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from chunkft.kernels.heuristics import Config, Problem, broken_limits
from chunkft.kernels.targets import Target, family

FORMAT = 1
VARIABLE = "CHUNKFT_KERNEL_TABLE"
_FOLDER = Path(__file__).parent / "tables"
_SHAPE = ("tokens", "rows", "cols", "itemsize", "row_block", "col_block")


@dataclass(frozen=True)
class Table:
    """Measurements of one family: the nearest powers of two of a shape, to a configuration and its speed-up."""

    family: int
    entries: dict[tuple[int, ...], tuple[Config, float]]

    def find(self, problem: Problem, target: Target) -> tuple[Config, float] | None:
        """The entry of a problem of about this shape, if it was measured on this family and is legal for it."""
        found = self.entries.get(_bucket(asdict(problem)))
        if found is None or family(target.capability) != self.family:
            return None
        return None if broken_limits(found[0], problem, target) else found


def entry(problem: Problem, config: Config, speedup: float) -> dict[str, Any]:
    """What a table's file holds of one measurement; ``speedup`` is PyTorch's time by Triton's."""
    shape = asdict(problem)
    return {**{name: shape[name] for name in _SHAPE}, "config": asdict(config), "speedup": round(speedup, 3)}


def load(path: str | Path) -> Table:
    """Read a table.

    Raises:
        ValueError: if the file is not a table of this format.
    """
    try:
        content = json.loads(Path(path).read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        rows = {_bucket(row): (Config(**row["config"]), float(row["speedup"])) for row in content["entries"]}
        return Table(family(int(content["family"])), rows)
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


def _bucket(shape: dict[str, Any]) -> tuple[int, ...]:
    sizes = [round(math.log2(max(1, shape[name]))) for name in ("tokens", "rows", "cols")]
    return (*sizes, shape["itemsize"], shape["row_block"], shape["col_block"])
