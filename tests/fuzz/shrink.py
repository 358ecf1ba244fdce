"""Makes a failing program smaller, as long as it fails in the same way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from .programs import Program

PLAIN: dict[str, Any] = {
    "groups": "one",
    "schedule": "cyclic",
    "interval": 1,
    "keep_state": True,
    "max_grad_norm": None,
    "net.frozen": [],
    "net.twice": False,
    "net.by_frequency": False,
    "net.padding": None,
    "net.head": "own",
    "net.tokens": False,
    "net.dims": 2,
    "net.width": 3,
    "plan.chunks": 1,
    "plan.by": "bytes",
    "plan.slice_dim": 0,
    "plan.always": None,
    "plan.atomic": None,
    "plan.row_multiple": 1,
    "base.name": "SGD",
    "base.options": {},
    "base.weight_decay": 0.0,
    "memory.update": "step",
    "memory.files": False,
    "memory.page_bytes": 1 << 20,
    "memory": {
        "residency": "chunk",
        "update": "step",
        "state_device": "host",
        "page_bytes": 1 << 20,
        "files": False,
    },
}


def smaller(program: Program, failure: Callable[[Program], Exception | None], tries: int = 300) -> Program:
    """The smallest program found that ends in an error of the same type and the same first words."""
    wanted = _kind(failure(program))
    found = True
    while found and tries > 0:
        found = False
        for candidate in _candidates(program):
            tries -= 1
            if _kind(failure(candidate)) == wanted:
                program, found = candidate, True
                break
            if tries <= 0:
                break
    return program


def _kind(error: Exception | None) -> tuple[str, str]:
    words = [word for word in str(error).split() if not any(sign in word for sign in "0123456789.")]
    return type(error).__name__, " ".join(words[:4])


def _candidates(program: Program) -> Iterator[Program]:
    """Programs with one thing less, large steps first."""
    count = len(program["ops"])
    for size in (count // 2, count // 4, 1):
        for start in range(0, count, size) if size else ():
            yield {**program, "ops": program["ops"][:start] + program["ops"][start + size :]}
    for index in range(len(program["net"]["layers"])):
        candidate = copy.deepcopy(program)
        del candidate["net"]["layers"][index]
        yield candidate
    for path, value in PLAIN.items():
        candidate = copy.deepcopy(program)
        *outer, key = path.split(".")
        holder = candidate[outer[0]] if outer else candidate
        if holder[key] != value:
            holder[key] = copy.deepcopy(value)
            if path == "base.name":
                holder["options"] = {}
            yield candidate
