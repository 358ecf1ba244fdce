"""A short round of the benchmarks on a small model: step, memory, pager, kernels and peers, in under five minutes.

python -m bench.quick --out DIR
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import common, kernels, memory, pager, peer_bench, step

Main = Callable[[Sequence[str]], Any]
# Name, main, and its arguments; the file of its results is added.
PARTS: tuple[tuple[str, Main, tuple[str, ...]], ...] = (
    ("step", step.main, ("--tiny", "--chunks", "4", "--sweeps", "3", "--threads", "1", "--clock", "cpu")),
    ("memory", memory.main, ("--tiny", "--chunks", "1", "4", "--threads", "1")),
    ("pager", pager.main, ("--mib", "8", "--pages", "4", "--repeats", "5", "--busy-ms", "10")),
    (
        "kernels",
        kernels.main,
        ("--models", "llama-2-7b", "--forms", "slice", "--chunks", "32", "--tokens", "1024"),
    ),
    (
        "peers",
        peer_bench.main,
        (
            *("--model", "tiny", "--batch", "2", "--tokens", "16", "--steps", "10", "--rates", "3e-3"),
            "--rounds",
            "4",
        ),
    ),
)


def run(out: Path, parts: Sequence[tuple[str, Main, Sequence[str]]] = PARTS) -> dict[str, Any]:
    """Runs every part, and returns for each its seconds and, where it failed, the error; the rest goes on."""
    done: dict[str, Any] = {}
    for name, main_of, arguments in parts:
        print(f"--- {name}", flush=True)
        start = time.perf_counter()
        error = None
        try:
            main_of([*arguments, "--out", str(out / f"{name}.json")])
        except (Exception, SystemExit) as failure:
            error = f"{type(failure).__name__}: {failure}"
            print(f"{name} failed: {error}", flush=True)
        done[name] = {"seconds": round(time.perf_counter() - start, 1), "error": error}
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.quick", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench-results") / "quick", metavar="DIR")
    args = parser.parse_args(arguments)
    out = args.out.absolute()
    start = time.perf_counter()
    with torch.random.fork_rng():
        done = run(out)
    common.write_json(out / "quick.json", common.header(0) | {"parts": done})
    print(f"{out}: {time.perf_counter() - start:.0f} s")
    return 1 if any(row["error"] for row in done.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
